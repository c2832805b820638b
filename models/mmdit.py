"""A Diffusion Transformer of two streams: text and patches attend jointly, each with weights of its own."""

from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.fields import at_least_one
from ..kernels.mask import Mask
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
)
from .block import HeadNorm
from .dit import Angles, SelfAttention
from .grids import regridded
from .macs import macs
from .patch import axes, patch_grid, places
from .rope import GridRope, rotate
from .settings import head_dim_of, layer_masks

Joint = tuple[Tensor, Tensor, Tensor]  # q, k, v of the text, [B, J, H, D]


class JointAttend(Protocol):
    """Attention over the whole sequence for the tokens held here, and for text that every rank holds: the
    text sees everything and everything sees the text; the mask is about the rest.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, joint: Joint) -> Tensor:
        """q, k, v [B, T, H, D] and joint [B, J, H, D] -> [B, J + T, H, D], the text first."""
        ...


def joined(
    attend: JointAttend, qkv: Joint, mask: Mask, joint: Joint, lengths: tuple[int, ...] | None
) -> Tensor:
    """`attend` with the first `lengths` (None: all) joint tokens of each row; the others are padding of any
    content, and what they see is 0.

    Rows with equally many tokens attend together, on every rank in the same order.
    """
    words = joint[0].shape[1]
    if lengths is None or all(n == words for n in lengths):
        return attend(*qkv, mask, joint=joint)
    parts, order = [], []
    for n in sorted(set(lengths)):
        rows = [row for row, length in enumerate(lengths) if length == n]
        q, k, v = (x[rows] for x in qkv)
        cut = joint[0][rows, :n], joint[1][rows, :n], joint[2][rows, :n]
        text, rest = attend(q, k, v, mask, joint=cut).tensor_split((n,), 1)
        parts.append(torch.cat((F.pad(text, (0, 0, 0, 0, 0, words - n)), rest), 1))
        order += rows
    return torch.cat(parts)[torch.tensor(order, device=parts[0].device).argsort()]


class Stream(nn.Module):
    """One of the two streams of a double block. `last`: its rows are needed for their keys and values
    only.
    """

    def __init__(self, dim: int, heads: int, hidden: int, *, last: bool = False) -> None:
        super().__init__()
        self.adaLN_modulation = Modulation(dim, 2 if last else 6)
        self.norm1, self.attn = plain_norm(dim), SelfAttention(dim, heads, qk_norm=True)
        self.norm2, self.mlp = plain_norm(dim), None if last else Mlp(dim, hidden)
        if last:
            self.attn.proj = nn.Identity()  # type: ignore[assignment]

    def project(self, x: Tensor, six: Sequence[Tensor], angles: Angles) -> Joint:
        return self.attn.project(modulate(self.norm1(x), six[0], six[1]), angles)

    def add(self, x: Tensor, seen: Tensor, six: Sequence[Tensor]) -> Tensor:
        """x [B, T, dim] with what its rows saw [B, T, H, D] and with its MLP added."""
        if self.mlp is None:
            return x
        x = x + six[2] * self.attn.proj(seen.flatten(2))
        y: Tensor = x + six[5] * self.mlp(modulate(self.norm2(x), six[3], six[4]))
        return y


class DoubleBlock(nn.Module):
    """Joint attention of two streams with weights of their own (Esser et al. 2024, section 4)."""

    def __init__(self, dim: int, heads: int, hidden: int, *, last: bool) -> None:
        super().__init__()
        self.img = Stream(dim, heads, hidden)
        self.txt = Stream(dim, heads, hidden, last=last)

    def forward(
        self, x: Tensor, text: Tensor, conditions: tuple[Tensor, Tensor], angles: Angles, attend: JointAttend,
        mask: Mask, lengths: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """x [B, T, dim] held here, text [B, J, dim]; conditions: theirs; lengths: as in `joined` -> both."""
        streams = self.img, self.txt
        six = [part.adaLN_modulation.of(c) for part, c in zip(streams, conditions, strict=True)]
        own, joint = self.img.project(x, six[0], angles), self.txt.project(text, six[1], None)
        seen = joined(attend, own, mask, joint, lengths)
        words = text.shape[1]
        return self.img.add(x, seen[:, words:], six[0]), self.txt.add(text, seen[:, :words], six[1])


class SingleBlock(nn.Module):
    """Text and patches as one stream, with attention and MLP side by side (Black Forest Labs 2024, after
    Dehghani et al. 2023, section 2).
    """

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.adaLN_modulation, self.norm = Modulation(dim, 3), plain_norm(dim)
        self.linear1, self.linear2 = nn.Linear(dim, 3 * dim + hidden), nn.Linear(dim + hidden, dim)
        self.q_norm, self.k_norm = (HeadNorm(dim // heads, eps=1e-6) for _ in range(2))

    def forward(
        self, x: Tensor, text: Tensor, conditions: tuple[Tensor, Tensor], angles: Angles, attend: JointAttend,
        mask: Mask, lengths: tuple[int, ...] | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `DoubleBlock`."""
        gates, heads, wide = [], [], []
        for part, condition, turn in zip((x, text), conditions, (angles, None), strict=True):
            shift, scale, gate = self.adaLN_modulation.of(condition)
            qkv, hidden = self.linear1(modulate(self.norm(part), shift, scale)).tensor_split(
                (3 * self.dim,), -1
            )
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
            q, k = self.q_norm(q), self.k_norm(k)
            heads.append((q, k, v) if turn is None else (rotate(q, turn), rotate(k, turn), v))
            gates.append(gate)
            wide.append(F.gelu(hidden, approximate="tanh"))
        seen = joined(attend, heads[0], mask, heads[1], lengths).flatten(2)
        words = text.shape[1]
        x = x + gates[0] * self.linear2(torch.cat((seen[:, words:], wide[0]), -1))
        return x, text + gates[1] * self.linear2(torch.cat((seen[:, :words], wide[1]), -1))


class MMDiT(nn.Module):
    """Multimodal Diffusion Transformer: `double` blocks of two streams (Esser et al. 2024), then `single`
    ones of one (Flux).

    size, patch, channels, hidden, mask (one for all blocks or one a block), freq_dim, time_scale,
    text_dim: width of the text encoder's states. pooled_dim: width of one vector for
    the whole text, added to the time; None for none. Patches are turned by `rope` at their coordinates, text
    is not. The text stream is the same on every rank; each rank's gradient of it, and of its weights, is the
    share of the tokens held there, and the sum over ranks is the whole.
    """

    def __init__(
        self, size: Sequence[int], patch: int | Sequence[int], channels: int, dim: int, double: int,
        single: int, heads: int, text_dim: int, *, pooled_dim: int | None = None,
        classes: int | None = None, hidden: int | None = None,
        freq_dim: int = 256, time_scale: float = 1.0, rope: GridRope | None = None,
        mask: Mask | Sequence[Mask] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        at_least_one("model.", channels=channels, dim=dim, heads=heads, hidden=hidden, text_dim=text_dim)
        if min(double, single) < 0 or double + single < 1:
            raise ValueError(f"model.double is {double}, model.single {single}: together at least 1 block")
        self.grid, self.patch = patch_grid(size, patch), axes(patch, len(size), "patch")
        self.kv_heads, self.classes = heads, classes
        self.text_dim, self.pooled_dim = text_dim, pooled_dim
        self.channels = self.out_channels = channels
        self.dim, self.heads, self.head_dim = dim, heads, head_dim_of(dim, heads, even=True)
        self.rope = rope or GridRope()
        self.masks = layer_masks(mask, double + single, heads, self.grid)
        self.x_embedder = PatchEmbed(prod(self.patch) * channels, dim)
        self.txt_in = nn.Linear(text_dim, dim)
        self.t_embedder = TimeEmbedder(dim, freq_dim, time_scale)
        self.pooled_in = None
        if pooled_dim is not None:
            at_least_one("model.", pooled_dim=pooled_dim)
            self.pooled_in = nn.Sequential(nn.Linear(pooled_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.y_embedder = None if classes is None else ClassEmbedder(classes, dim)
        doubles = [
            DoubleBlock(dim, heads, hidden, last=not single and i == double - 1) for i in range(double)
        ]
        singles = [SingleBlock(dim, heads, hidden) for _ in range(single)]
        self.blocks = nn.ModuleList([*doubles, *singles])
        self.final_layer = FinalLayer(dim, prod(self.patch) * channels)
        reset(self)

    def forward(
        self, tokens: Tensor, positions: Tensor, t: Tensor, y: Tensor | None,
        attend: JointAttend | Sequence[JointAttend], *, text: Tensor, pooled: Tensor | None = None,
        text_t: Tensor | None = None, lengths: tuple[int, ...] | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens [B, T, prod(patch) * channels] held here at row-major `positions` int64 [T] -> like tokens.

        t: float32 [B], or [B, T], where the text's is text_t [B], by default 0: it is never noisy. y: class
        int64 [B], of no meaning to a model without classes. text: [B, J, text_dim], pooled: [B, pooled_dim],
        the same on every rank; lengths: how many tokens of each row are text, at least 1, None for all. grid:
        as in `DiT`.
        """
        if lengths is not None and (
            len(lengths) != len(tokens) or not all(1 <= n <= text.shape[1] for n in lengths)
        ):
            raise ValueError(
                f"text lengths are {lengths}; {len(tokens)} rows need one each, from 1 to {text.shape[1]}"
            )
        grid = grid or self.grid
        if t.ndim == 2 and text_t is None:
            text_t = torch.zeros_like(t[:, 0])
        conditions = [self.t_embedder(per_token(x)) for x in (t, t if text_t is None else text_t)]
        for name, given, part in (("y", y, self.y_embedder), ("pooled", pooled, self.pooled_in)):
            if part is not None:
                if given is None:
                    raise ValueError(f"{name} is missing, but the model is made for it")
                given = given if name == "y" else given.to(conditions[0].dtype)
                conditions = [c + part(given)[:, None] for c in conditions]
        ours, theirs = conditions
        x = self.x_embedder(tokens)
        words = self.txt_in(text.to(x.dtype))
        angles = self.rope.angles(places(positions, grid), self.head_dim)
        for layer, (block, mask) in enumerate(zip(self.blocks, self.masks, strict=True)):
            here = attend[layer % len(attend)] if isinstance(attend, Sequence) else attend
            rest = (ours, theirs), angles, here, regridded(mask, self.grid, grid), lengths
            x, words = block(x, words, *rest)
        out: Tensor = self.final_layer(x, ours)
        return out

    def macs(self, tokens: int | None = None, pairs: Sequence[int] | None = None, *, text: int) -> int:
        """Multiply-adds of the forward pass for one sample of `tokens` (None: the whole grid) and `text`
        tokens. pairs: visible (query, key) pairs of each block among the patches; None counts all.
        """
        tokens = prod(self.grid) if tokens is None else tokens
        pairs = [tokens**2] * len(self.masks) if pairs is None else pairs

        def rows(name: str) -> int:
            once = "adaLN_modulation" in name
            if name.startswith(("t_embedder", "pooled_in")):
                return 2
            if name.startswith("x_embedder") or ".img." in name:
                return 1 if once else tokens
            if name.startswith("txt_in") or ".txt." in name:
                return 1 if once else text
            if name.startswith("final_layer"):
                return 1 if once else tokens
            return 2 if once else tokens + text

        seen = sum(pairs) + len(self.masks) * text * (2 * tokens + text)
        return macs(self, rows, self.dim * seen)
