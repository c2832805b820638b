"""One cell of the promise 'a layout equals one device': what it is, and the run of it on every rank of a
world.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.kernels.attention import attention
from longspan.kernels.mask import Mask
from longspan.kernels.options import AttentionOptions
from longspan.kernels.span import Span, positions
from longspan.parallel.gather import Gather
from longspan.parallel.layout import Layout, shard, unshard
from longspan.parallel.mesh import Mesh
from longspan.parallel.placement import Placement
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.single import Single
from longspan.parallel.star import Star
from longspan.parallel.ulysses import Ulysses
from world import ORPHAN

SOFTMAX = AttentionOptions()


@dataclass(frozen=True)
class Cell:
    layout: str  # ring/zigzag and the like: class and placement
    mask: Mask
    heads: tuple[int, int]
    length: int
    batch: int = 1
    dtype: torch.dtype = torch.float64
    head_dim: int = 8
    options: AttentionOptions = SOFTMAX


Errors = dict[str, float]  # tensor name -> relative norm of the difference


@lru_cache
def meshed(mesh: Mesh) -> DeviceMesh:
    """One mesh of a shape for all cells: each group brings threads of its own, and hundreds of them choke
    a machine.
    """
    return mesh.build("cpu")


def build(name: str, size: int) -> Layout:
    """ring/zigzag, ring2/zigzag (both ways round), gather/striped, gather1/zigzag (a head at a time),
    ulysses, ulysses2 (two rounds), usp/zigzag (two ranks of heads where the size is even, else rings
    alone), s2/contiguous, s2-4/striped (blocks of 4), star, single.
    """
    kind, _, placement = name.partition("/")
    if kind == "single":
        return Single()
    if kind.startswith("ulysses"):
        return Ulysses(meshed(Mesh(head=size)), chunks=int(kind[7:] or 1))
    if kind == "usp":
        head = 2 if size % 2 == 0 else 1
        return Ulysses(meshed(Mesh(head=head, ring=size // head)), inner=partial(Ring, placement=placement))
    mesh = meshed(Mesh(ring=size))
    if kind.startswith("gather"):
        return Gather(mesh, placement=placement, heads_at_once=int(kind[6:] or 0))
    if kind.startswith("s2"):
        return HeadSharded(mesh, placement=placement, block=int(kind[3:] or 64))
    if kind == "star":
        return Star(mesh)
    return Ring(mesh, placement=placement, bidirectional=kind == "ring2")


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
    """One device in float64, by definition. The layout does not matter: cells that differ in it alone share
    it.
    """
    return _oracle(replace(cell, layout=""))


@lru_cache(maxsize=64)
def _oracle(cell: Cell) -> dict[str, Tensor]:
    q, k, v, dout, dlse = (x.double() for x in inputs(cell))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    at = (Span(0, cell.length),)
    out, lse = attention(q, k, v, cell.mask, at, at, options=cell.options, backend="reference")
    _pull(out, lse, dout, dlse)
    assert q.grad is not None and k.grad is not None and v.grad is not None
    found = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return found if lse is None else found | {"lse": lse.detach()}


def _pull(out: Tensor, lse: Tensor | None, dout: Tensor, dlse: Tensor) -> None:
    """Backward from out and, where there is one, lse; the gradient of a row without keys is left out."""
    if lse is None:
        out.backward(dout)
    else:
        torch.autograd.backward([out, lse], [dout, dlse.masked_fill(lse.isinf(), 0).to(lse.dtype)])


def local(
    layout: Layout, cell: Cell, placement: Placement, given: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """What the layout gives for the tokens held here; `given` stands in for the inputs of the cell."""
    q, k, v, dout, dlse = inputs(cell) if given is None else given
    q, k, v = (shard(layout, x, placement, 1).requires_grad_() for x in (q, k, v))
    out, lse = layout.attention(q, k, v, cell.mask, placement, options=cell.options)
    _pull(out, lse, shard(layout, dout, placement, 1), shard(layout, dlse, placement, 2))
    assert q.grad is not None and k.grad is not None and v.grad is not None
    found = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return found if lse is None else found | {"lse": lse.detach()}


def held(
    layout: Layout, cell: Cell, placement: Placement, given: list[Tensor] | None = None
) -> dict[str, Tensor]:
    """What the layout gives, put together again on every rank."""
    parts = local(layout, cell, placement, given)
    return {name: unshard(layout, x, placement, 2 if name == "lse" else 1) for name, x in parts.items()}


def difference(got: Tensor, want: Tensor) -> float:
    """Relative norm; infinities (rows without keys) must be the same ones."""
    if not torch.equal(got.isinf(), want.isinf()) or bool(got.isnan().any()):
        return float("inf")
    got, want = (x.double().masked_fill(x.isinf(), 0) for x in (got, want))
    return float((got - want).norm() / want.norm().clamp_min(1e-300)) if want.norm() else float(got.norm())


def worst_token(got: Tensor, want: Tensor, dim: int) -> float:
    """The greatest error of a token, over the norm that tokens have in the mean; infinities are left out."""
    got, want = (x.double().masked_fill(x.isinf(), 0).movedim(dim, 0).flatten(1) for x in (got, want))
    mean = float(want.norm()) / len(want) ** 0.5
    return float((got - want).norm(dim=1).max()) / mean if mean else float(got.norm())


class Ran(NamedTuple):
    """One cell on one rank."""

    placement: Placement
    parts: dict[str, np.ndarray[Any, Any]]


def ran(rank: int, cells: list[Cell], size: int) -> list[Ran]:
    """What each cell gives here; the ranks exchange nothing but what the layouts do."""
    # with two threads, operators as small as these wait for each other's more than they work
    torch.set_num_threads(1)
    found = []
    for cell in cells:
        layout = _built(cell.layout, size)
        placement = layout.place(cell.length, cell.mask)
        parts = local(layout, cell, placement)
        exact = torch.promote_types(cell.dtype, torch.float32)
        found.append(Ran(placement, {name: x.to(exact).numpy() for name, x in parts.items()}))
    return found


@lru_cache
def _built(name: str, size: int) -> Layout:
    return build(name, size)


def errors(cell: Cell, ranks: list[Ran]) -> Errors:
    """Errors of the whole, from what each rank has: of each tensor, and of its worst token."""
    placement = ranks[0].placement
    assert all(r.placement == placement for r in ranks), "the ranks do not agree on who holds what"
    order = torch.cat([positions(spans) for spans in placement.spans_by_rank]).argsort()
    found, want = {}, oracle(cell)
    for name, right in want.items():
        dim = 2 if name == "lse" else 1
        got = torch.cat([torch.from_numpy(r.parts[name]) for r in ranks], dim).index_select(dim, order)
        found[name], found[f"{name} of a token"] = difference(got, right), worst_token(got, right, dim)
    return found


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """The process group of all waits so long meanwhile, and what is made of it."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds))
    try:
        yield
    finally:
        dist.distributed_c10d._set_pg_timeout(ORPHAN)
