"""A video Diffusion Transformer: one projection of the time for all blocks, text by cross attention."""

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from ..kernels.attention import attention
from ..kernels.fields import at_least_one
from ..kernels.mask import Documents, Full, Mask, Offsets
from ..kernels.span import Span
from .adaln import (
    ClassEmbedder,
    PatchEmbed,
    SequentialMlp,
    TimeEmbedder,
    modulate,
    per_token,
    plain_norm,
)  # fmt: skip
from .block import Attend, Attends, HeadNorm, attend_of
from .grids import regridded
from .macs import macs
from .patch import axes, patch_grid, places
from .rope import GridRope, rotate
from .settings import head_dim_of, layer_masks

Text = tuple[Tensor, tuple[int, ...] | None]  # [B, J, dim], and how many tokens of each row are text


def cross(q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...] | None = None) -> Tensor:
    """Attention of local queries q [B, T, H, D] to keys that every rank holds, k, v [B, J, H, D] -> like q.

    lengths: of each row's keys, how many are visible; the rest is padding of any content. Nothing moves: each
    rank gives the gradient of its own queries, and the sum over ranks is the whole.
    """
    tokens, keys = q.shape[1], k.shape[1]
    mask: Mask = Full()
    if lengths is not None:
        if len(lengths) != len(q) or not all(0 <= n <= keys for n in lengths):
            raise ValueError(f"text lengths are {lengths}; {len(q)} rows need one each, from 0 to {keys}")
        # the queries and the text are one document, the padding is another
        mask = Documents(tuple((0, tokens + n) for n in lengths))
    at_q, at_k = (Span(0, tokens),), (Span(tokens, keys),)
    return attention(q, k, v, mask, at_q, at_k)[0].to(q.dtype)


class Projections(nn.Module):
    """Queries, keys, values and output, with queries and keys RMS-normalised over all heads together."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = HeadNorm(dim, eps=eps), HeadNorm(dim, eps=eps)

    def split(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q of x [B, T, dim], k and v of `source`: each [B, tokens, H, D]."""
        parts = self.norm_q(self.q(x)), self.norm_k(self.k(source)), self.v(source)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in parts)
        return q, k, v

    def out(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, T, dim]."""
        y: Tensor = self.o(x.flatten(2))
        return y


class Block(nn.Module):
    """Self-attention, cross attention if there is text, and MLP. `modulation` is the block's own bias on the
    shared six vectors of the time.
    """

    def __init__(self, dim: int, heads: int, hidden: int, eps: float, *, text: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = plain_norm(dim), plain_norm(dim)
        self.self_attn = Projections(dim, heads, eps)
        self.norm3 = nn.LayerNorm(dim, eps=eps) if text else None
        self.cross_attn = Projections(dim, heads, eps) if text else None
        self.ffn = SequentialMlp(dim, hidden)
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def forward(
        self, x: Tensor, time: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, mask: Mask,
        text: Text | None,
    ) -> Tensor:  # fmt: skip
        """x [B, T, dim], time [B, 1 or T, 6, dim] -> [B, T, dim]."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (time + self.modulation[:, None]).unbind(2)
        own = modulate(self.norm1(x), shift, scale)
        q, k, v = self.self_attn.split(own, own)
        seen = attend(rotate(q, angles), rotate(k, angles), v, mask)
        x = x + gate * self.self_attn.out(seen)
        if text is not None and self.cross_attn is not None and self.norm3 is not None:
            words, lengths = text
            q, k, v = self.cross_attn.split(self.norm3(x), words)
            x = x + self.cross_attn.out(cross(q, k, v, lengths))
        y: Tensor = x + mlp_gate * self.ffn(modulate(self.norm2(x), mlp_shift, mlp_scale))
        return y


class Head(nn.Module):
    """The output patches, modulated by the time itself with a bias of its own."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm, self.head = plain_norm(dim), nn.Linear(dim, out)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [B, T, dim], time [B, 1 or T, dim]."""
        shift, scale = (time[:, :, None] + self.modulation[:, None]).unbind(2)
        y: Tensor = self.head(modulate(self.norm(x), shift, scale))
        return y


class VideoDiT(nn.Module):
    """Video Diffusion Transformer in the shape of Wan 2.1 (Wan team 2025, section 4.2): 3D RoPE,
    RMS-normalised queries and keys, one time projection of six vectors for all blocks with a bias in each.

    size, patch, channels, hidden, mask, time_scale: as in `DiT`. text_dim: width of
    the text encoder's states, None for a model without text and its cross attention. classes: labels added to
    the time, without the null class; None for none. Every block's parts are named as in Wan; RoPE's pairs are
    half-split here and interleaved there.
    """

    def __init__(
        self, size: Sequence[int], patch: int | Sequence[int], channels: int, dim: int, layers: int,
        heads: int, hidden: int, *, text_dim: int | None = None, classes: int | None = None,
        freq_dim: int = 256, time_scale: float = 1.0, rope: GridRope | None = None,
        mask: Mask | Sequence[Mask] | None = None,
        eps: float = 1e-6,
    ) -> None:  # fmt: skip
        super().__init__()
        at_least_one("model.", channels=channels, dim=dim, layers=layers, heads=heads, hidden=hidden)
        self.grid, self.patch = patch_grid(size, patch), axes(patch, len(size), "patch")
        self.kv_heads, self.classes = heads, classes
        self.text_dim, self.pooled_dim = text_dim, None
        self.channels = self.out_channels = channels
        self.dim, self.heads, self.head_dim = dim, heads, head_dim_of(dim, heads, even=True)
        self.rope = rope or GridRope()
        self.masks = layer_masks(mask, layers, heads, self.grid)
        self.patch_embedding = PatchEmbed(prod(self.patch) * channels, dim)
        self.time_embedding = TimeEmbedder(dim, freq_dim, time_scale)
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.text_embedding = None
        if text_dim is not None:
            at_least_one("model.", text_dim=text_dim)
            two = nn.Linear(text_dim, dim), nn.Linear(dim, dim)
            self.text_embedding = nn.Sequential(two[0], nn.GELU(approximate="tanh"), two[1])
        self.class_embedding = None if classes is None else ClassEmbedder(classes, dim)
        self.blocks = nn.ModuleList(
            Block(dim, heads, hidden, eps, text=text_dim is not None) for _ in range(layers)
        )
        self.head = Head(dim, prod(self.patch) * channels)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Xavier-uniform matrices, normal 0.02 in the embeddings of time, text and class, zero in the last
        layer (Wan's code).
        """
        for name, part in self.named_modules():
            if isinstance(part, nn.Linear):
                if name.startswith(("time_embedding", "text_embedding")):
                    nn.init.normal_(part.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(part.weight)
                nn.init.zeros_(part.bias)
            elif isinstance(part, nn.Embedding):
                nn.init.normal_(part.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def forward(
        self, tokens: Tensor, positions: Tensor, t: Tensor, y: Tensor | None, attend: Attends, *,
        offsets: Offsets | None = None, text: Tensor | None = None, lengths: tuple[int, ...] | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens [B, T, prod(patch) * channels] held here at row-major `positions` of the grid, int64 [T] or
        [B, T] -> like tokens.

        t: float32 [B] or [B, T]. y: class int64 [B] or [B, T], of no meaning to a model without classes.
        offsets: starts of packed samples, as in `DiT`. text: [B, J, text_dim], the same on every rank;
        lengths: how many tokens of each row are text, None for all. grid: as in `DiT`.
        """
        grid = grid or self.grid
        if (text is None) != (self.text_embedding is None) or (text is not None and offsets is not None):
            raise ValueError(
                f"text is {'missing' if text is None else 'given'}, model.text_dim "
                f"{'null' if self.text_embedding is None else 'set'}, the rows "
                f"{'whole' if offsets is None else 'packed'}: text goes with text_dim and whole rows"
            )
        x = self.patch_embedding(tokens)
        time = self.time_embedding(per_token(t))
        if self.class_embedding is not None:
            if y is None:
                raise ValueError("y is missing, but model.classes is set")
            time = time + self.class_embedding(per_token(y))
        six = self.time_projection(time).unflatten(-1, (6, self.dim))
        angles = self.rope.angles(places(positions, grid), self.head_dim)
        words: Text | None = None
        if text is not None and self.text_embedding is not None:
            words = self.text_embedding(text.to(x.dtype)), lengths
        for layer, (block, mask) in enumerate(zip(self.blocks, self.masks, strict=True)):
            here, mask = attend_of(attend, layer), regridded(mask, self.grid, grid)
            seen = mask if offsets is None else Documents(offsets, inner=mask)
            x = block(x, six, angles, here, seen, words)
        out: Tensor = self.head(x, time)
        return out

    def macs(self, tokens: int | None = None, pairs: Sequence[int] | None = None, *, text: int = 0) -> int:
        """Multiply-adds of the forward pass for one sample of `tokens` (None: the whole grid) and `text`
        tokens. pairs: visible (query, key) pairs of each layer's self-attention; None counts all.
        """
        tokens = prod(self.grid) if tokens is None else tokens
        pairs = [tokens**2] * len(self.masks) if pairs is None else pairs

        def rows(name: str) -> int:
            if name.startswith("time_"):
                return 1
            words = name.startswith("text_") or name.endswith(("cross_attn.k", "cross_attn.v"))
            return text if words else tokens

        seen = sum(pairs) + (tokens * text * len(self.masks) if self.text_embedding is not None else 0)
        return macs(self, rows, self.dim * seen)
