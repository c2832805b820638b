"""A diffusion model over ranks: what it is given, the same on one process with dense attention,
differences.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cells import build, difference
from longspan.kernels.layers import PerLayer
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Full, Mask
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.span import Span
from longspan.models.dit import DiT
from longspan.models.mmdit import MMDiT
from longspan.models.rope import GridRope
from longspan.models.vdit import VideoDiT
from longspan.parallel.bricks import bricked
from longspan.parallel.joint import Joint
from longspan.parallel.layout import positions, shard, unshard

WORDS, TEXT = 3, 6  # tokens of text, and the width of each
Found = dict[str, Tensor]  # the output, and the gradient of each parameter


@dataclass(frozen=True)
class Case:
    """One model under one layout. plant: a fault, to see that it is seen."""

    model: str
    layout: str
    grid: tuple[int, ...]
    per_token: bool = False
    brick: tuple[int, ...] | None = None
    plant: str = ""


def made(case: Case, **settings: Any) -> Any:
    """A float64 model of two blocks, the first with a neighbourhood of 3 an axis and the second full; its
    weights are large enough to matter everywhere.
    """
    torch.manual_seed(1)
    size, count = [2 * n for n in case.grid], len(case.grid)
    near = Neighborhood(case.grid, [min(n, 3) for n in case.grid])
    settings = {"mask": PerLayer(near, Full(), 2), "freq_dim": 8, "rope": GridRope(), **settings}
    model: nn.Module
    if case.model == "dit":
        model = DiT(size, 2, 1, 24, 2, 3, 5, qk_norm=True, **settings)
    elif case.model == "vdit":
        model = VideoDiT(size, [2] * count, 1, 24, 2, 3, 32, text_dim=TEXT, classes=5, **settings)
    else:
        model = MMDiT(size, 2, 1, 24, 1, 1, 3, TEXT, classes=5, pooled_dim=4, **settings)
    return filled(model.double())


def filled(model: nn.Module) -> nn.Module:
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    return model


def given(case: Case, model: Any) -> dict[str, Tensor]:
    """The whole inputs and the gradient of the output, the same on every rank."""
    draw = torch.Generator().manual_seed(2)
    n, width = prod(case.grid), prod(model.patch)
    t = torch.rand((2, n) if case.per_token else (2,), generator=draw)
    shapes = {
        "tokens": (2, n, width * model.channels), "text": (2, WORDS, TEXT), "pooled": (2, 4),
        "dout": (2, n, width * model.out_channels),
    }  # fmt: skip
    made = {name: torch.randn(s, generator=draw, dtype=torch.float64) for name, s in shapes.items()}
    return made | {"t": t, "y": torch.tensor([4, 1]), "text_t": torch.tensor([0.2, 0.7])}


def beside(case: Case, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """What the model takes besides tokens, positions, t, y and attend; the second row's last word is
    padding.
    """
    if case.model == "dit":
        return {}
    if case.model == "vdit":
        return {"text": inputs["text"], "lengths": (WORDS, WORDS - 1)}
    return {name: inputs[name] for name in ("text", "pooled", "text_t")}


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, joint: Any = None) -> Tensor:
    """Plain softmax attention of all tokens, with the joint ones in front seen by all and seeing all."""
    at = (Span(0, q.shape[1]),)
    seen = visible(lower(mask, at, at, k.shape[2], q.device))
    if joint is not None:
        q, k, v = (torch.cat(pair, 1) for pair in zip(joint, (q, k, v), strict=True))
        words = joint[0].shape[1]
        seen = nn.functional.pad(seen, (words, 0, words, 0), value=True)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def pulled(model: nn.Module, out: Tensor, dout: Tensor) -> Found:
    out.backward(dout)
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    missing = [name for name, grad in grads.items() if grad is None]
    assert not missing, f"no gradient reaches {missing}"
    return {"out": out.detach()} | {name: g for name, g in grads.items() if g is not None}


def whole(case: Case) -> Found:
    """One process. Cases that differ in the layout alone share it."""
    return _whole(replace(case, layout="", brick=None, plant=""))


@lru_cache(maxsize=32)
def _whole(case: Case) -> Found:
    model = made(case)
    x = given(case, model)
    at = torch.arange(prod(case.grid))
    return pulled(model, model(x["tokens"], at, x["t"], x["y"], dense, **beside(case, x)), x["dout"])


def spread(rank: int, case: Case, size: int) -> Found:
    """The same over ranks: the output put together, gradients summed over the ranks."""
    model, layout = made(case), build(case.layout, size)
    placement = layout.place(prod(case.grid), Full())
    if case.brick is not None:
        placement = bricked(placement, case.grid, case.brick)
    x = given(case, model)
    tokens, dout = (shard(layout, x[name], placement, 1) for name in ("tokens", "dout"))
    t = shard(layout, x["t"], placement, 1) if case.per_token else x["t"]
    if case.plant == "another t on each rank":
        t = t + 0.1 * rank

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, joint: Any = None) -> Tensor:
        text = None if joint is None else Joint(*joint)
        return layout.attention(q, k, v, mask, placement, joint=text)[0]

    at = positions(layout, placement)
    found = pulled(model, model(tokens, at, t, x["y"], attend, **beside(case, x)), dout)
    out = unshard(layout, found.pop("out"), placement, 1)
    for grad in found.values():
        dist.all_reduce(grad, group=layout.group)
        if case.plant == "gradients too small by the number of ranks":
            grad /= size
    return {"out": out} | found


def errors(rank: int, cases: list[Case], size: int) -> list[dict[str, float]]:
    """Of each case: the relative difference of the output and of each parameter's gradient."""
    found = []
    for case in cases:
        got, want = spread(rank, case, size), whole(case)
        assert got.keys() == want.keys()
        found.append({name: difference(got[name], want[name]) for name in want})
    return found
