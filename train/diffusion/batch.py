"""Clips -> patch tokens of whole samples -> noisy tokens -> the shard that one rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from ...kernels.mask import Documents, Mask, Offsets
from ...models.patch import axes, patch_grid, patchify
from ...parallel.layout import Layout, positions
from ...parallel.placement import Placement
from ..data.clip import Clip, Clips, Floats

# The member of a padding token.
PADDING = -1


@dataclass(frozen=True)
class Clean:
    """Whole rows of patch tokens, before noise, in row-major order; a row is one sample, or several packed.

    Attributes:
        tokens: float32 [B, T, D].
        labels: Classes of the row's samples, int64 [B, M].
        members: Which of them a token belongs to, int64 [B, T]; -1 is padding.
        positions: Row-major places in the model's grid, int64 [T], or [B, T] in packed rows.
        indices: Global index of each row: all that is random depends on it.
        null: The class that stands for none.
        channels: Of the data; within a token the channel runs fastest.
        frames: Frames of patches of a sample; 1 in packed rows.
        offsets: Starts of the samples in packed rows (see `Documents`); None: a row is one sample.
        text: Embeddings of a text, float32 [B, J, E], or None.
    """

    tokens: Tensor
    labels: Tensor
    members: Tensor
    positions: Tensor
    indices: tuple[int, ...]
    null: int
    channels: int
    frames: int = 1
    offsets: Offsets | None = None
    text: Tensor | None = None

    def sizes(self) -> Tensor:
        """Tokens of each of a row's samples, int64 [B, M]."""
        each = torch.arange(self.labels.shape[1])
        return (self.members[:, :, None] == each).sum(1)


@dataclass(frozen=True)
class Noisy:
    """What the objective is given: whole rows on the CPU, or what one rank holds of them.

    Attributes:
        tokens, noise: Data and noise, float32 [B, N, D].
        real: Whether a token is no padding, bool [B, N].
        t: Times of the process, float32 [B] or, where tokens differ, [B, N].
        y: Classes, int64 [B] or [B, N]; the null class where the condition was dropped.
        positions: Row-major places in the model's grid, int64 [N] or [B, N].
        channels, offsets, text: As in `Clean`; the text is zero where the condition was dropped.
        order: The row-major token at each place of the sequence, int64 [T], where the sequence is not
            row-major (bricks); the model is told row-major positions all the same. None once it is held.
    """

    tokens: Tensor
    noise: Tensor
    real: Tensor
    t: Tensor
    y: Tensor
    positions: Tensor
    channels: int
    offsets: Offsets | None = None
    text: Tensor | None = None
    order: Tensor | None = None

    @property
    def rows(self) -> int:
        """Sequences."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Tokens of each, over all ranks."""
        return self.tokens.shape[1]

    @property
    def valid(self) -> int:
        """Tokens that are no padding."""
        return int(self.real.sum())

    def mask(self, inner: Mask) -> Mask:
        """What `inner` becomes for these rows: packed samples do not see each other."""
        return inner if self.offsets is None else Documents(self.offsets, inner=inner)

    def held(self, layout: Layout, placement: Placement, device: torch.device) -> "Noisy":
        """The shard of this rank, on `device`."""
        if placement.length != self.length:
            raise ValueError(f"rows of {self.length} tokens, but the placement is for {placement.length}")
        at = positions(layout, placement)
        chosen = at if self.order is None else self.order[at]

        def cut(x: Tensor) -> Tensor:
            return x.index_select(1, chosen).to(device)

        return Noisy(
            cut(self.tokens),
            cut(self.noise),
            cut(self.real),
            cut(self.t) if self.t.ndim == 2 else self.t.to(device),
            cut(self.y) if self.y.ndim == 2 else self.y.to(device),
            self.positions[..., chosen].to(device),
            self.channels,
            self.offsets,
            None if self.text is None else self.text.to(device),
        )


def collate(clips: Sequence[Clip], indices: Sequence[int], *, patch: int | Sequence[int], null: int) -> Clean:
    """Clips of one shape, each a row. patch: of the model, two axes for images or three for video, or one
    number.

    Raises:
        ValueError: The clips differ in shape, or a size is no multiple of the patch.
    """
    if len(shapes := {clip.shape for clip in clips}) > 1:
        raise ValueError(f"clips of shapes {sorted(shapes)} are in one batch; one batch needs one shape")
    pixels = torch.from_numpy(np.stack([clip.pixels for clip in clips]))
    steps = volume(patch)
    tokens = patchify(pixels, steps)
    text = None if clips[0].text is None else torch.from_numpy(np.stack([_text(clip) for clip in clips]))
    return Clean(
        tokens,
        torch.tensor([[clip.label] for clip in clips]),
        torch.zeros(tokens.shape[:2], dtype=torch.int64),
        torch.arange(tokens.shape[1]),
        tuple(indices),
        null,
        pixels.shape[1],
        frames=patch_grid(pixels.shape[2:], steps)[0],
        text=text,
    )


def load(data: Clips, indices: Sequence[int], patch: int | Sequence[int]) -> Clean:
    return collate([data.item(i) for i in indices], indices, patch=patch, null=data.classes)


def volume(patch: int | Sequence[int]) -> tuple[int, ...]:
    """A patch over frames, height and width: one of two axes, or of one number, is one frame deep."""
    if isinstance(patch, int):
        return (1, patch, patch)
    return axes((1, *patch) if len(patch) == 2 else patch, 3, "patch")


def grid_of(shape: Sequence[int], patch: int | Sequence[int]) -> tuple[int, int, int]:
    """Patches of a clip of shape (channels, frames, height, width): frames, rows, columns."""
    frames, rows, columns = patch_grid(shape[1:], volume(patch))
    return frames, rows, columns


def token_shape(shape: Sequence[int], patch: int | Sequence[int]) -> tuple[int, int]:
    """Tokens of a clip of this shape, and the width of one."""
    return prod(grid_of(shape, patch)), prod(volume(patch)) * shape[0]


def _text(clip: Clip) -> Floats:
    assert clip.text is not None
    return clip.text
