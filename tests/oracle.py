"""What the tests of attention share: inputs, plain attention with a dense mask, distances, gradients."""

from collections.abc import Callable
from random import Random
from typing import Literal

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import DEFAULT, AttentionOptions, attention
from longspan.kernels.mask import Mask
from longspan.kernels.span import Spans, cut, total
from masks import matrix

Which = Literal["reference", "cpu"]
BACKENDS: list[Which] = ["reference", "cpu"]
both_backends = pytest.mark.parametrize("backend", BACKENDS)
MINUS_INFINITY = float("-inf")
LIMITS = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-5, 5e-5)}  # relative: forward, gradients

Given = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # q, k, v, dout, dlse
At = tuple[Spans, Spans]
Run = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]


def inputs(
    q_tokens: int, k_tokens: int, heads: tuple[int, int] = (2, 1), *, batch: int = 1, dim: int = 8,
    dtype: torch.dtype = torch.float64, seed: int = 0,
) -> Given:  # fmt: skip
    """Normal numbers, the same in each dtype but for its rounding."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [
        (batch, n, h, dim)
        for n, h in zip((q_tokens, k_tokens, k_tokens, q_tokens), (*heads, heads[1], heads[0]), strict=True)
    ]
    lse = batch, heads[0], q_tokens
    q, k, v, dout, dlse = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (*shapes, lse))
    return cast((q, k, v, dout, dlse), dtype)


def cast(given: Given, dtype: torch.dtype = torch.float64) -> Given:
    q, k, v, dout, dlse = (x.to(dtype) for x in given)
    return q, k, v, dout, dlse


def sizes(at: At) -> tuple[int, int]:
    return total(at[0]), total(at[1])


def door(mask: Mask, at: At, backend: Which, options: AttentionOptions = DEFAULT) -> Run:
    """`attention` of q, k and v alone."""
    return lambda q, k, v: attention(q, k, v, mask, *at, options=options, backend=backend)


def partial(run: Run, given: Given) -> tuple[Tensor, Tensor]:
    """out and lse, where there is one."""
    out, lse = run(*given[:3])
    assert lse is not None
    return out, lse


def plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor]:
    """(out, lse) with a dense bool mask [.., Nq, Nk], for autograd to differentiate; for sigmoid lse is 0."""
    times = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(times, 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * options.scaling(q.shape[3])
    if options.softcap:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    if options.normalizer == "sigmoid":
        weights = torch.sigmoid(scores + options.bias) * seen
        return torch.einsum("bhqk,bkhd->bqhd", weights, v), scores.new_zeros(())
    alive = seen.any(-1)
    # a row without keys sees everything here, and is then set to what the contract says
    scores = scores.masked_fill(~(seen | ~alive[..., None]), MINUS_INFINITY)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    out = out * alive.expand(scores.shape[:3]).transpose(1, 2)[..., None]
    return out, scores.logsumexp(-1).masked_fill(~alive, MINUS_INFINITY)


def gradients(run: Run, given: Given) -> list[Tensor]:
    """dq, dk, dv of `run(q, k, v)` under dout and, on living rows, dlse."""
    q, k, v = (x.detach().clone().requires_grad_() for x in given[:3])
    out, lse = run(q, k, v)
    ends = [(out, given[3])]
    if lse is not None and lse.ndim and lse.isfinite().any():
        ends.append((lse, given[4].masked_fill(lse.isinf(), 0.0)))
    return [*torch.autograd.grad([x for x, _ in ends], (q, k, v), [g.to(x.dtype) for x, g in ends])]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def dense(mask: Mask, at_q: Spans, at_k: Spans, heads: tuple[int, int]) -> Tensor:
    """bool [mask rows, Hq, Nq, Nk]."""
    rows = [
        torch.stack([matrix(mask, at_q, at_k, head=head, row=row) for head in range(heads[1])])
        for row in range(mask.batch())
    ]
    return torch.stack(rows).repeat_interleave(heads[0] // heads[1], 1)


def split(draw: Random, at: Spans, parts: int) -> list[tuple[slice, Spans]]:
    """The held tokens cut into runs, in a random order."""
    borders = [0, *sorted(draw.choices(range(total(at) + 1), k=parts - 1)), total(at)]
    pieces = [(slice(a, b), cut(at, a, b)) for a, b in zip(borders, borders[1:], strict=False)]
    draw.shuffle(pieces)
    return pieces


def check_against_reference(mask: Mask, at: At, given: Given, options: AttentionOptions = DEFAULT) -> None:
    """The cpu backend is within the limits of its dtype of the reference in float64."""
    limits = LIMITS[given[0].dtype]
    ours, reference = (door(mask, at, which, options) for which in ("cpu", "reference"))
    exact = cast(given)
    (out, lse), (right_out, right_lse) = partial(ours, given), partial(reference, exact)
    assert torch.equal(lse.isinf(), right_lse.isinf())
    dead = right_lse.isinf()
    assert distance(out, right_out) < limits[0]
    assert distance(lse.masked_fill(dead, 0.0), right_lse.masked_fill(dead, 0.0)) < limits[0]
    for found, right in zip(gradients(ours, given), gradients(reference, exact), strict=True):
        assert distance(found, right) < limits[1], (mask, at)
