"""On a GPU: every layout over gloo, two and four processes on the one device, in bfloat16 against float64.

On any machine: the same on the CPU in float32.
"""

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.kernels import reference
from longspan.kernels.attention import row_delta
from longspan.kernels.lower import lower
from longspan.kernels.mask import Causal, Documents, Mask, Window
from longspan.kernels.options import AttentionOptions
from longspan.kernels.patterns import Anchored, Strided
from longspan.kernels.span import Span
from longspan.parallel.gather import Gather
from longspan.parallel.layout import Layout, shard, unshard
from longspan.parallel.mesh import Mesh
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.star import Star
from longspan.parallel.ulysses import Ulysses
from world import Worlds, run

Errors = dict[str, float]
LENGTH, HEADS = 509, (8, 2)
STAR = Anchored(64, 64, 384) & Causal()
MASKS: dict[str, Mask] = {
    "causal": Causal(),
    "window": Window(100),
    "documents": Documents((0, 90, 91, 400), Causal()),
    "s2": Strided(32, 2, 4) & Causal(),
    "star": STAR,
}


@lru_cache
def meshed(device: str, ring: int, head: int = 1) -> DeviceMesh:
    """One mesh of a shape for all layouts: each group brings threads of its own."""
    return Mesh(ring=ring, head=head).build(device)


LAYOUTS: dict[str, Callable[[str, int], Layout]] = {
    "ring": lambda device, size: Ring(meshed(device, size)),
    "both ways": lambda device, size: Ring(meshed(device, size), bidirectional=True),
    "gather": lambda device, size: Gather(meshed(device, size), heads_at_once=1),
    "ulysses": lambda device, size: Ulysses(meshed(device, 1, size)),
    "usp": lambda device, size: Ulysses(meshed(device, size // 2, 2), inner=Ring),
    "s2": lambda device, size: HeadSharded(meshed(device, size)),
    "star": lambda device, size: Star(meshed(device, size)),
}


def given(device: str, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v, dout, dlse, the same on all ranks."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(1, LENGTH, h, head_dim) for h in (HEADS[0], HEADS[1], HEADS[1], HEADS[0])]
    made = [torch.randn(s, generator=generator).to(dtype) for s in shapes]
    return [x.to(device) for x in (*made, torch.randn(1, HEADS[0], LENGTH, generator=generator))]


def exact(mask: Mask, inputs: list[Tensor]) -> dict[str, Tensor]:
    q, k, v, dout, dlse = (x.double() for x in inputs)
    at, options = (Span(0, LENGTH),), AttentionOptions()
    low = lower(mask, at, at, HEADS[1], q.device)
    out, lse = reference.forward(q, k, v, low, options)
    assert lse is not None
    grads = reference.backward(dout, row_delta(dout, out, lse, dlse), q, k, v, lse, low, options)
    return {"out": out, "lse": lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}


def errors(
    rank: int, size: int, device: str, head_dim: int, dtype: torch.dtype, masks: tuple[str, ...]
) -> dict[tuple[str, str], Errors]:
    """Relative errors of every layout under every mask; star under its own."""
    found, inputs = {}, given(device, head_dim, dtype)
    right = {word: exact(MASKS[word], inputs) for word in masks}
    for name, build in LAYOUTS.items():
        layout = build(device, size)
        for word, want in right.items():
            if name == "star" and word != "star":
                continue
            mask = MASKS[word]
            placement = layout.place(LENGTH, mask)
            q, k, v = (shard(layout, x, placement, 1).requires_grad_() for x in inputs[:3])
            dout, dlse = (shard(layout, x, placement, i) for x, i in zip(inputs[3:], (1, 2), strict=True))
            out, lse = layout.attention(q, k, v, mask, placement)
            assert lse is not None and out.device.type == device
            grads = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
            parts = dict(zip(("out", "dq", "dk", "dv"), (out.detach(), *grads), strict=True))
            got = {n: unshard(layout, x, placement, 1) for n, x in parts.items()}
            got["lse"] = unshard(layout, lse.detach(), placement, 2)
            found[name, word] = {n: float((got[n] - want[n]).norm() / want[n].norm()) for n in want}
    return found


def on_the_device(rank: int, size: int) -> dict[tuple[str, str], Errors]:
    assert dist.get_backend() == "gloo"
    return errors(rank, size, "cuda", 64, torch.bfloat16, tuple(MASKS))


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_layouts_on_one_gpu_equal_float64(size: int) -> None:
    for found in run(size, on_the_device, size, timeout=400.0):
        for cell, error in found.items():
            assert error.pop("lse") <= 1e-5, cell
            assert max(error.values()) <= torch.finfo(torch.bfloat16).eps, (cell, error)


def test_the_same_measure_on_a_cpu(world: Worlds) -> None:
    for found in world(2)(errors, 2, "cpu", 16, torch.float32, ("documents", "star")):
        assert len(found) == 2 * len(LAYOUTS) - 1
        for cell, error in found.items():
            assert max(error["out"], error["lse"]) <= 1e-5 and max(error.values()) <= 5e-5, (cell, error)
