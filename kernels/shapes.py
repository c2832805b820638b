"""Attention over tensors without data: what comes out has its shape, and nothing is computed."""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .options import AttentionOptions


def without_data(x: Tensor) -> bool:
    """Whether there is nothing to compute with: a fake tensor, or one on the meta device."""
    return isinstance(x, FakeTensor) or x.is_meta


def forward(q: Tensor, options: AttentionOptions) -> tuple[Tensor, Tensor | None]:
    dtype = torch.promote_types(q.dtype, torch.float32)
    out = q.new_empty(q.shape, dtype=dtype)
    if options.normalizer == "sigmoid":
        return out, None
    return out, q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=dtype)


def backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv for q, k, v."""
    dq, dk, dv = (x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, torch.float32)) for x in inputs)
    return dq, dk, dv
