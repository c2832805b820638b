"""One cell of the promise 'a layout equals one device': what it is, and the run of it on every rank of a
world.
"""

from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.kernels.attention import attention
from longspan.kernels.mask import Mask
from longspan.kernels.span import Span
from longspan.parallel.gather import Gather
from longspan.parallel.layout import Layout, shard, unshard
from longspan.parallel.mesh import Mesh
from longspan.parallel.placement import Placement
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.single import Single
from longspan.parallel.star import Star
from longspan.parallel.ulysses import Ulysses


@dataclass(frozen=True)
class Cell:
    layout: str  # ring/zigzag and the like: class and placement
    mask: Mask
    heads: tuple[int, int]
    length: int
    batch: int = 1
    dtype: torch.dtype = torch.float64
    head_dim: int = 8


Errors = dict[str, float]  # tensor name -> relative norm of the difference


@lru_cache
def meshed(mesh: Mesh) -> DeviceMesh:
    """One mesh of a shape for all cells: each group brings threads of its own, and hundreds of them choke
    a machine.
    """
    return mesh.build("cpu")


def build(name: str, size: int) -> Layout:
    """ring/zigzag, gather/striped, gather1/zigzag (a head at a time), ulysses, ulysses2 (two rounds),
    usp/zigzag, s2/contiguous, s2-4/striped (blocks of 4), star, single.
    """
    kind, _, placement = name.partition("/")
    if kind == "single":
        return Single()
    if kind.startswith("ulysses"):
        return Ulysses(meshed(Mesh(head=size)), chunks=int(kind[7:] or 1))
    if kind == "usp":
        head = 2 if size % 2 == 0 else size
        return Ulysses(meshed(Mesh(head=head, ring=size // head)), inner=partial(Ring, placement=placement))
    mesh = meshed(Mesh(ring=size))
    if kind.startswith("gather"):
        return Gather(mesh, placement=placement, heads_at_once=int(kind[6:] or 0))
    if kind.startswith("s2"):
        return HeadSharded(mesh, placement=placement, block=int(kind[3:] or 64))
    if kind == "star":
        return Star(mesh)
    return Ring(mesh, placement=placement)


def inputs(cell: Cell) -> list[Tensor]:
    """q, k, v, dout, dlse over the whole sequence, the same on all ranks."""
    generator = torch.Generator().manual_seed(1)
    hq, hk = cell.heads
    shapes = [(cell.batch, cell.length, h, cell.head_dim) for h in (hq, hk, hk, hq)]
    made = [
        torch.randn(s, generator=generator, dtype=torch.float64)
        for s in (*shapes, (cell.batch, hq, cell.length))
    ]
    return [x.to(cell.dtype) for x in made]


def oracle(cell: Cell) -> dict[str, Tensor]:
    """One device in float64, by definition."""
    q, k, v, dout, dlse = (x.double() for x in inputs(cell))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    at = (Span(0, cell.length),)
    out, lse = attention(q, k, v, cell.mask, at, at, backend="reference")
    assert lse is not None
    dead = lse.isinf()
    torch.autograd.backward([out, lse.masked_fill(dead, 0)], [dout, dlse])
    assert q.grad is not None and k.grad is not None and v.grad is not None
    return {"out": out.detach(), "lse": lse.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def held(layout: Layout, cell: Cell, placement: Placement) -> dict[str, Tensor]:
    """What the layout gives, put together again."""
    q, k, v, dout, dlse = inputs(cell)
    q, k, v = (shard(layout, x, placement, 1).requires_grad_() for x in (q, k, v))
    out, lse = layout.attention(q, k, v, cell.mask, placement)
    assert lse is not None
    lse_gradient = shard(layout, dlse, placement, 2).masked_fill(lse.isinf(), 0)
    torch.autograd.backward([out, lse], [shard(layout, dout, placement, 1), lse_gradient.to(lse.dtype)])
    assert q.grad is not None and k.grad is not None and v.grad is not None
    parts = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    whole = {name: unshard(layout, x, placement, 1) for name, x in parts.items()}
    return whole | {"lse": unshard(layout, lse.detach(), placement, 2)}


def difference(got: Tensor, want: Tensor) -> float:
    """Relative norm; infinities (rows without keys) must be the same ones."""
    if not torch.equal(got.isinf(), want.isinf()) or bool(got.isnan().any()):
        return float("inf")
    got, want = (x.double().masked_fill(x.isinf(), 0) for x in (got, want))
    return float((got - want).norm() / want.norm().clamp_min(1e-300)) if want.norm() else float(got.norm())


def run_cells(rank: int, cells: list[Cell], size: int) -> list[Errors]:
    """The errors of each cell, on every rank alike."""
    found = []
    for cell in cells:
        layout = build(cell.layout, size)
        got, want = held(layout, cell, layout.place(cell.length, cell.mask)), oracle(cell)
        found.append({name: difference(got[name], want[name]) for name in want})
    return found
