"""Clips -> patch tokens of whole samples -> noisy tokens -> the shard that one rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from ...kernels.mask import Documents, Mask, Offsets
from ...models.grids import regridded
from ...models.patch import axes, patch_grid, patchify
from ...parallel.bricks import Bricks, place
from ...parallel.layout import Layout, positions
from ...parallel.placement import Placement
from ..data.clip import Clip, Clips, Shape
from .text import Text

Grid = tuple[int, ...]

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
        text: The rows' texts, or None.
        grids: The model's grid and that of the samples, where it is another one; `positions` are in it then.
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
    text: Text | None = None
    grids: tuple[Grid, Grid] | None = None

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
        positions: Row-major places in the samples' grid, int64 [N] or [B, N].
        channels, offsets, text, grids: As in `Clean`; where the condition was dropped, the text is none.
        bricks: Grid, brick and dilation, where ranks hold the tokens brick after brick (see `bricked`).
    """

    tokens: Tensor
    noise: Tensor
    real: Tensor
    t: Tensor
    y: Tensor
    positions: Tensor
    channels: int
    offsets: Offsets | None = None
    text: Text | None = None
    grids: tuple[Grid, Grid] | None = None
    bricks: Bricks | None = None

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
        """What `inner` becomes for these rows: packed samples do not see each other, and a neighbourhood is
        one in the samples' own grid.
        """
        inner = inner if self.grids is None else regridded(inner, *self.grids)
        return inner if self.offsets is None else Documents(self.offsets, inner=inner)

    def placed(self, layout: Layout, mask: Mask) -> Placement:
        """See `Batch`. In bricks too positions stay row-major ones."""
        return place(layout, self.length, self.mask(mask), self.bricks)

    def held(self, layout: Layout, placement: Placement, device: torch.device) -> "Noisy":
        """The shard of this rank, on `device`."""
        if placement.length != self.length:
            raise ValueError(f"rows of {self.length} tokens, but the placement is for {placement.length}")
        chosen = positions(layout, placement)

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
            self.grids,
        )


def collate(
    clips: Sequence[Clip], indices: Sequence[int], *, patch: int | Sequence[int], null: int,
    grid: Sequence[int] | None = None,
) -> Clean:  # fmt: skip
    """Clips of one shape, each a row. patch: of the model, two axes for images or three for video, or one
    number. grid: the model's, None for that of the clips.

    Raises:
        ValueError: The clips differ in shape, or a size is no multiple of the patch.
    """
    if len(shapes := {clip.shape for clip in clips}) > 1:
        raise ValueError(
            f"clips of shapes {sorted(shapes)} are in one batch; one batch needs one shape: set data.buckets "
            f"to the tokens of a batch, or data.pack to those of a row"
        )
    pixels = torch.from_numpy(np.stack([clip.pixels for clip in clips]))
    tokens = patchify(pixels, volume(patch))
    own = grid_of(clips[0].shape, patch)
    return Clean(
        tokens,
        torch.tensor([[clip.label] for clip in clips]),
        torch.zeros(tokens.shape[:2], dtype=torch.int64),
        torch.arange(tokens.shape[1]),
        tuple(indices),
        null,
        pixels.shape[1],
        frames=own[0],
        text=Text.of(clips),
        grids=grids_of(clips[0].shape, patch, own if grid is None else grid),
    )


def grids_of(shape: Shape, patch: int | Sequence[int], grid: Sequence[int]) -> tuple[Grid, Grid] | None:
    """The model's grid and that of clips of this shape along as many axes; None if they are the same."""
    own = grid_of(shape, patch)[-len(grid) :]
    return None if own == tuple(grid) else (tuple(grid), own)


def load(
    data: Clips, indices: Sequence[int], patch: int | Sequence[int], grid: Sequence[int] | None = None
) -> Clean:
    """The clips with these global indices, as `collate` says."""
    clips = [data.item(i) for i in indices]
    return collate(clips, indices, patch=patch, null=data.classes, grid=grid)


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
