"""Parts of a block that take their tokens, or their heads, a few at a time and compute them again in the
backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from ..kernels.mask import Mask
from .block import Attend, Attention
from .rope import rotate


def by_tiles(rows: int, module: nn.Module) -> Callable[[Tensor], Tensor]:
    """A forward for a `module` that works on each token by itself, `rows` tokens at once (ALST: Bekman et al.
    2025, section 3.1). Only its input is kept; gradients of its weights are summed in float32.
    """
    plain = type(module).forward

    def call(x: Tensor) -> Tensor:
        y: Tensor = plain(module, x)
        return y

    def forward(x: Tensor) -> Tensor:
        if x[..., 0].numel() <= rows and not torch.is_grad_enabled():
            return call(x)
        y: Tensor = _Tiled.apply(call, rows, x, *module.parameters())
        return y

    return forward


class _Tiled(torch.autograd.Function):
    """y[i] = call(x[i]) for tiles of tokens. x [..., D] -> [..., E]."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[Tensor], Tensor], rows: int, x: Tensor, *weights: Tensor) -> Tensor:
        ctx.call, ctx.rows, ctx.autocast = call, rows, _autocast(x)
        ctx.save_for_backward(x, *weights)
        tiles = x.flatten(0, -2).split(rows)
        first = call(tiles[0])
        y = first.new_empty(*x.shape[:-1], first.shape[-1])
        parts = y.view(-1, y.shape[-1]).split(rows)
        parts[0].copy_(first)
        del first
        for tile, part in zip(tiles[1:], parts[1:], strict=True):
            part.copy_(call(tile))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dx = torch.empty_like(x) if ctx.needs_input_grad[2] else None
        wanted = [i for i, w in enumerate(weights) if w.requires_grad]
        sums = {
            i: torch.zeros_like(weights[i], dtype=torch.promote_types(weights[i].dtype, torch.float32))
            for i in wanted
        }
        flat, dflat = x.flatten(0, -2), dy.flatten(0, -2)
        for start in range(0, max(1, len(flat)), ctx.rows):
            at = slice(start, start + ctx.rows)
            tile = flat[at].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                y = ctx.call(tile)
            dtile, *found = torch.autograd.grad(y, [tile, *(weights[i] for i in wanted)], dflat[at])
            for i, grad in zip(wanted, found, strict=True):
                sums[i] += grad
            if dx is not None:
                dx.view(-1, dx.shape[-1])[at] = dtile
        grads = [sums[i].to(w.dtype) if i in sums else None for i, w in enumerate(weights)]
        return None, None, dx, *grads


def _autocast(x: Tensor) -> dict[str, Any]:
    kind = x.device.type
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
        "cache_enabled": False,
    }


def by_head_groups(rounds: int, attention: Attention) -> Callable[..., Tensor]:
    """A forward for `attention` that takes its kv heads in `rounds`, each with its query heads: q, k and v of
    one round are there at a time, and are computed again in the backward.

    The idea is UPipe's, which has it for Ulysses (`parallel.layout.chunks`); here it serves every layout.
    """
    d = attention.head_dim
    kv_heads = attention.k.out_features // d
    group = attention.q.out_features // d // kv_heads
    if rounds > kv_heads:
        raise ValueError(f"memory.head_chunks is {rounds}; the model has {kv_heads} kv heads")
    for name in ("q", "k", "v"):
        if type(getattr(attention, name)) is not nn.Linear:
            kind = type(getattr(attention, name)).__name__
            raise ValueError(f"memory.head_chunks is {rounds}; it takes plain linear layers, not {kind}")
    cuts = [kv_heads * i // rounds for i in range(rounds + 1)]

    def some(
        x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, mask: Mask, heads: Sequence[int]
    ) -> Tensor:
        first, end = heads[0], heads[-1] + 1
        q = _rows(attention.q, x, first * group * d, end * group * d).unflatten(-1, (-1, d))
        k, v = (
            _rows(part, x, first * d, end * d).unflatten(-1, (-1, d)) for part in (attention.k, attention.v)
        )
        q, k = rotate(attention.q_norm(q), angles), rotate(attention.k_norm(k), angles)
        return attend(q, k, v, mask.heads(tuple(heads), kv_heads)).flatten(2)

    def forward(x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, mask: Mask) -> Tensor:
        parts = []
        for start, end in zip(cuts, cuts[1:], strict=False):
            given = (x, angles, attend, mask, range(start, end))
            if torch.is_grad_enabled():
                parts.append(checkpoint(some, *given, use_reentrant=False))
            else:
                parts.append(some(*given))
        y: Tensor = attention.o(torch.cat(parts, -1))
        return y

    return forward


def _rows(layer: nn.Linear, x: Tensor, start: int, end: int) -> Tensor:
    """Only these outputs of the layer."""
    return F.linear(x, layer.weight[start:end], None if layer.bias is None else layer.bias[start:end])
