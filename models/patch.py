"""Images and video as rows of patch tokens, and back."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor


def axes(value: int | Sequence[int], count: int, name: str) -> tuple[int, ...]:
    """One whole number an axis, at least 1; a single one counts for all. ValueError naming the setting."""
    each = (value,) * count if isinstance(value, int) else tuple(value)
    if len(each) != count or any(x < 1 for x in each):
        raise ValueError(f"model.{name} is {value}; it must be one number of at least 1, or {count} of them")
    return each


def patch_grid(size: Sequence[int], patch: int | Sequence[int]) -> tuple[int, ...]:
    """How many patches an image (height, width) or a video (frames, height, width) has along each axis."""
    size = tuple(size)
    if not 1 <= len(size) <= 3 or min(size) < 1:
        raise ValueError(f"model.size is {size}; it must be (height, width) or (frames, height, width)")
    steps = axes(patch, len(size), "patch")
    if any(n % p for n, p in zip(size, steps, strict=True)):
        raise ValueError(
            f"model.size is {size}, model.patch {steps}: each size must be a multiple of its patch"
        )
    return tuple(n // p for n, p in zip(size, steps, strict=True))


def patchify(x: Tensor, patch: int | Sequence[int]) -> Tensor:
    """[B, C, *size] -> tokens [B, N, prod(patch) * C] in row-major order; within a token the channel runs
    fastest, as in the output of the published DiT.
    """
    steps = axes(patch, x.ndim - 2, "patch")
    for i, (n, p) in enumerate(zip(patch_grid(x.shape[2:], steps), steps, strict=True)):
        x = x.unflatten(2 + 2 * i, (n, p))
    # [B, C, n0, p0, n1, p1, ...] -> [B, n0, n1, ..., p0, p1, ..., C]
    x = x.permute(0, *range(2, x.ndim, 2), *range(3, x.ndim, 2), 1)
    return x.reshape(len(x), prod(x.shape[1 : 1 + len(steps)]), -1)


def unpatchify(tokens: Tensor, grid: Sequence[int], patch: int | Sequence[int]) -> Tensor:
    """The inverse of `patchify` for `grid` patches along each axis: [B, N, prod(patch) * C] -> [B, C,
    *size].
    """
    count = len(grid)
    steps = axes(patch, count, "patch")
    if tokens.shape[1] != prod(grid) or tokens.shape[2] % prod(steps):
        raise ValueError(
            f"tokens are {tuple(tokens.shape)}; a grid of {tuple(grid)} with patches of {steps} holds "
            f"{prod(grid)} tokens of a multiple of {prod(steps)}"
        )
    x = tokens.reshape(len(tokens), *grid, *steps, -1)
    pairs = [d for i in range(count) for d in (1 + i, 1 + count + i)]
    return x.permute(0, 1 + 2 * count, *pairs).reshape(
        len(x), -1, *(n * p for n, p in zip(grid, steps, strict=True))
    )


def places(positions: Tensor, grid: Sequence[int]) -> Tensor:
    """Coordinates of row-major positions in a grid: int64 [...] -> [..., axes]."""
    return torch.stack(torch.unravel_index(positions, tuple(grid)), -1)


def sincos(at: Tensor, dim: int) -> Tensor:
    """The sin-cos embedding of coordinates int64 [..., axes] -> float64 [..., dim] (Dosovitskiy et al. 2021;
    the order of DiT and MAE: the last axis first, in each the sines before the cosines, base 10000).
    """
    if dim % (2 * at.shape[-1]):
        raise ValueError(
            f"model.dim is {dim}; a sin-cos table of {at.shape[-1]} axes needs a multiple of "
            f"{2 * at.shape[-1]}"
        )
    half = dim // at.shape[-1] // 2
    frequency = 10_000.0 ** (-torch.arange(half, device=at.device, dtype=torch.float64) / half)
    angle = at.double().flip(-1)[..., None] * frequency
    return torch.cat((angle.sin(), angle.cos()), -1).flatten(-2)
