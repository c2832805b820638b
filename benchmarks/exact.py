"""The truth in float64 for a slice of a case, and how far a result is from it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from longspan.kernels.attention import backward, forward, row_delta
from longspan.kernels.span import cut

from .cases import Case

NAMES = ("out", "dq", "dk", "dv")
SCORES = 2**27  # float64 numbers a step: a gigabyte


@dataclass(frozen=True)
class Given:
    """Inputs of a case: q, dout [1, N, Hq, D], k, v [1, N, Hkv, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    @property
    def leaves(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v


def given(case: Case, device: torch.device, seed: int = 0) -> Given:
    """Normal numbers; q, k and v ask for gradients."""
    generator = torch.Generator(device).manual_seed(seed)
    heads = (case.shape.q_heads, case.shape.kv_heads, case.shape.kv_heads, case.shape.q_heads)
    shapes = [(1, case.tokens, n, case.shape.head_dim) for n in heads]
    q, k, v, dout = (torch.randn(s, generator=generator, device=device).to(case.dtype) for s in shapes)
    return Given(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout)


def slices(case: Case, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Of out, dq, dk and dv: the last kv head and the query heads that share it."""
    group = case.shape.q_heads // case.shape.kv_heads
    return tuple(x[:, :, -n:] for x, n in zip(tensors, (group, group, 1, 1), strict=True))


@torch.no_grad()
def truth(case: Case, inputs: Given) -> tuple[Tensor, ...]:
    """out, dq, dk, dv of `slices`, float64: the reference over one piece of the queries after the other."""
    mask = case.mask.heads((case.shape.kv_heads - 1,), case.shape.kv_heads)
    q, dout, k, v = slices(case, (inputs.q, inputs.dout, inputs.k, inputs.v))
    k, v = k.double(), v.double()
    out, dq, dk, dv = (torch.zeros_like(x, dtype=torch.float64) for x in (q, q, k, v))
    step = max(1, SCORES // case.tokens // q.shape[2])
    for first in range(0, case.tokens, step):
        rows = slice(first, min(first + step, case.tokens))
        at = cut(case.at, rows.start, rows.stop)
        own, grad = q[:, rows].double(), dout[:, rows].double()
        out[:, rows], lse = forward(own, k, v, mask, at, case.at, backend="reference")
        delta = row_delta(grad, out[:, rows], lse, None)
        parts = backward(grad, delta, own, k, v, lse, mask, at, case.at, backend="reference")
        dq[:, rows] = parts[0]
        dk += parts[1]
        dv += parts[2]
    return out, dq, dk, dv


def errors(case: Case, found: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> dict[str, float]:
    """Greatest difference of out, dq, dk and dv in the slice; a NaN gives a NaN."""
    pairs = zip(NAMES, slices(case, found), right, strict=True)
    return {name: float((a.double() - b).abs().max()) for name, a, b in pairs}
