"""A class-conditional Diffusion Transformer over patch tokens."""

from collections.abc import Sequence
from math import inf, prod
from typing import Literal

import torch
from torch import Tensor, nn

from ..kernels.fields import at_least_one
from ..kernels.mask import Documents, Mask, Offsets
from .adaln import (
    ClassEmbedder,
    FinalLayer,
    Mlp,
    Modulation,
    PatchEmbed,
    TimeEmbedder,
    modulate,
    per_token,
    plain_norm,
    reset,
)  # fmt: skip
from .block import Attend, Attends, HeadNorm, attend_of
from .grids import regridded
from .macs import macs
from .patch import axes, patch_grid, places, sincos
from .rope import GridRope, rotate
from .settings import head_dim_of, layer_masks

Angles = tuple[Tensor, Tensor] | None


class SelfAttention(nn.Module):
    """Attention of all heads from one matrix, with RoPE and RMS-normalised queries and keys if asked."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.q_norm = HeadNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(dim // heads, eps=1e-6) if qk_norm else nn.Identity()

    def project(self, x: Tensor, angles: Angles) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, dim] -> q, k, v [B, T, H, D], normed and turned."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        return (q, k, v) if angles is None else (rotate(q, angles), rotate(k, angles), v)

    def forward(self, x: Tensor, angles: Angles, attend: Attend, mask: Mask) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""
        y: Tensor = self.proj(attend(*self.project(x, angles), mask).flatten(2))
        return y


class Block(nn.Module):
    """Attention and MLP, each with shift and scale before and a gate after it (adaLN-Zero)."""

    def __init__(self, dim: int, heads: int, hidden: int, *, qk_norm: bool) -> None:
        super().__init__()
        self.norm1, self.attn = plain_norm(dim), SelfAttention(dim, heads, qk_norm=qk_norm)
        self.norm2, self.mlp = plain_norm(dim), Mlp(dim, hidden)
        self.adaLN_modulation = Modulation(dim, 6)

    def forward(self, x: Tensor, condition: Tensor, angles: Angles, attend: Attend, mask: Mask) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.adaLN_modulation.of(condition)
        x = x + gate * self.attn(modulate(self.norm1(x), shift, scale), angles, attend, mask)
        y: Tensor = x + mlp_gate * self.mlp(modulate(self.norm2(x), mlp_shift, mlp_scale))
        return y


class DiT(nn.Module):
    """Diffusion Transformer with adaLN-Zero (Peebles & Xie 2023) over images or video.

    size: height and width of the (latent) pixels, before them the frames of video. patch: of each axis, or
    one for all. channels: of the input; the output has as many, twice with learn_sigma. classes: without the
    null class, which is the last row of the table. hidden: width inside the MLP, None is 4 dim. embedding: of
    the positions, a frozen sin-cos table, a learned one, or none. rope: turns queries and keys by their
    coordinates besides. freq_dim: sinusoids of the time; time_scale: factor on t before them, 1 for steps of
    0 to 999, 1000 for t of 0 to 1. class_std: spread of the classes' first vectors; 0.02 as published, about
    1 where a short training has to tell them apart. mask: one for all layers or one a layer, over row-major
    positions of the grid.

    Parameters are named as in the published checkpoints, which `load_state_dict` takes as they are (size,
    patch and width as published). Nothing here knows of ranks.
    """

    def __init__(
        self, size: Sequence[int], patch: int | Sequence[int], channels: int, dim: int, layers: int,
        heads: int, classes: int, *, hidden: int | None = None, learn_sigma: bool = True,
        embedding: Literal["sincos", "learned", "none"] = "sincos", rope: GridRope | None = None,
        qk_norm: bool = False, freq_dim: int = 256, time_scale: float = 1.0,
        class_std: float = 0.02, mask: Mask | Sequence[Mask] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        at_least_one(
            "model.", channels=channels, dim=dim, layers=layers, heads=heads, classes=classes, hidden=hidden
        )
        if embedding not in ("sincos", "learned", "none"):
            raise ValueError(f"model.embedding is {embedding!r}; it can be sincos, learned or none")
        if not 0 < class_std < inf:
            raise ValueError(f"model.class_std is {class_std}; it must be finite and more than 0")
        self.grid, self.patch = patch_grid(size, patch), axes(patch, len(size), "patch")
        self.kv_heads, self.classes = heads, classes
        self.text_dim, self.pooled_dim = None, None
        self.channels, self.out_channels = channels, channels * (2 if learn_sigma else 1)
        self.dim, self.heads, self.head_dim = dim, heads, head_dim_of(dim, heads, even=rope is not None)
        self.rope = rope
        self.masks = layer_masks(mask, layers, heads, self.grid)
        self.x_embedder = PatchEmbed(prod(self.patch) * channels, dim)
        self.t_embedder = TimeEmbedder(dim, freq_dim, time_scale)
        self.y_embedder = ClassEmbedder(classes, dim)
        self.pos_embed = None if embedding == "none" else self._table(embedding == "learned")
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, qk_norm=qk_norm) for _ in range(layers))
        self.final_layer = FinalLayer(dim, prod(self.patch) * self.out_channels)
        reset(self, class_std)

    def _table(self, learned: bool) -> nn.Parameter:
        shape = (1, prod(self.grid), self.dim)
        if learned:
            return nn.Parameter(0.02 * torch.randn(shape))
        at = places(torch.arange(prod(self.grid)), self.grid)
        return nn.Parameter(sincos(at, self.dim).to(torch.get_default_dtype())[None], requires_grad=False)

    def _embedded(self, positions: Tensor, grid: tuple[int, ...]) -> Tensor:
        """The table's rows at places of a grid; beyond the model's, a sin-cos table goes on."""
        assert self.pos_embed is not None
        if grid == self.grid:
            return self.pos_embed[0][positions]
        at = places(positions, grid)
        if not self.pos_embed.requires_grad:
            return sincos(at, self.dim).to(self.pos_embed.dtype)
        if any(a > b for a, b in zip(grid, self.grid, strict=True)):
            raise ValueError(
                f"model.embedding is learned for a grid of {self.grid}: it has no rows for one of {grid}"
            )
        row = torch.zeros_like(positions)
        for along, count in zip(at.unbind(-1), self.grid, strict=True):
            row = row * count + along
        return self.pos_embed[0][row]

    def forward(
        self, tokens: Tensor, positions: Tensor, t: Tensor, y: Tensor, attend: Attends, *,
        offsets: Offsets | None = None, grid: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens [B, T, prod(patch) * channels] held here at row-major `positions` of the grid, int64 [T] or
        [B, T] -> [B, T, prod(patch) * out_channels].

        t: float32 [B], or [B, T] for a time of its own for each token (diffusion forcing, Chen et al. 2024).
        y: class int64 [B], or [B, T]. offsets: starts of packed samples in the whole row (see `Documents`),
        each of which has its own positions in the grid, t and y. grid: of the samples, where it is another
        than the model's.
        """
        grid = grid or self.grid
        x = self.x_embedder(tokens)
        if self.pos_embed is not None:
            x = x + self._embedded(positions, grid)
        condition = self.t_embedder(per_token(t)) + self.y_embedder(per_token(y))
        angles = None
        if self.rope is not None:
            angles = self.rope.angles(places(positions, grid), self.head_dim)
        for layer, (block, mask) in enumerate(zip(self.blocks, self.masks, strict=True)):
            here, mask = attend_of(attend, layer), regridded(mask, self.grid, grid)
            seen = mask if offsets is None else Documents(offsets, inner=mask)
            x = block(x, condition, angles, here, seen)
        out: Tensor = self.final_layer(x, condition)
        return out

    def macs(self, tokens: int | None = None, pairs: Sequence[int] | None = None) -> int:
        """Multiply-adds of the forward pass for one sample of `tokens` (None: the whole grid). pairs: visible
        (query, key) pairs of each layer; None counts all, as the published figures do.
        """
        tokens = prod(self.grid) if tokens is None else tokens
        pairs = [tokens**2] * len(self.masks) if pairs is None else pairs
        once = ("t_embedder", "adaLN_modulation")
        return macs(self, lambda name: 1 if any(x in name for x in once) else tokens, self.dim * sum(pairs))
