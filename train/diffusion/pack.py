"""Clips of different sizes in rows of one length, without seeing each other (NaViT: Dehghani et al. 2023)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...models.patch import patchify
from ..data.check import whole
from ..data.clip import Clip, Clips
from ..data.pack import best_fit, group
from ..data.packed import permutation
from .batch import PADDING, Clean, grid_of, token_shape, volume


class Rows:
    """The items of `data` in rows of `context` tokens by greedy best fit, every item in one row of an epoch.

    Args:
        data: Clips whose shapes may differ.
        patch: Of the model.
        grid: The model's: rows and columns of patches, and before them frames. No clip may be larger.
        context: Tokens of a row (`data.pack`).
        seed: Of the order of the rows.

    Raises:
        ValueError: A clip has more tokens than a row, or a larger grid than the model.
    """

    def __init__(
        self,
        data: Clips,
        *,
        patch: int | Sequence[int],
        grid: Sequence[int],
        context: int,
        seed: int = 0,
    ) -> None:
        self._data, self._patch, self._seed = data, patch, seed
        # an image is a clip of one frame
        self._grid = (*(1,) * (3 - len(grid)), *grid)
        self.context = whole("data.pack", context, 1)
        self._epoch, self._rows = 0, self._dealt(0)

    def __len__(self) -> int:
        """Rows in an epoch, the same in each."""
        return len(self._rows)

    def items(self, index: int) -> list[int]:
        """Global indices of the items in the row with this global index (any >= 0)."""
        if index < 0:
            raise IndexError(f"row {index}: indices start at 0")
        epoch, place = divmod(index, len(self._rows))
        if epoch != self._epoch:
            self._epoch, self._rows = epoch, self._dealt(epoch)
        return self._rows[place]

    def load(self, indices: Sequence[int]) -> Clean:
        """The rows with these global indices."""
        packed = [[self._data.item(i) for i in self.items(index)] for index in indices]
        return pack(
            packed, indices, patch=self._patch, grid=self._grid, context=self.context, null=self._data.classes
        )

    def _dealt(self, epoch: int) -> list[list[int]]:
        first, count = epoch * len(self._data), len(self._data)
        lengths = np.array([self._length(first + i) for i in range(count)], np.int64)
        members, bounds = group(best_fit(lengths, self.context))
        rows = [(first + members[a:b]).tolist() for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
        return [rows[i] for i in permutation(self._seed, epoch, len(rows)).tolist()]

    def _length(self, index: int) -> int:
        shape = self._data.shape(index)
        tokens = token_shape(shape, self._patch)[0]
        if tokens > self.context:
            raise ValueError(f"data.pack={self.context} holds no clip of {shape}: it has {tokens} tokens")
        _check_grid(grid_of(shape, self._patch), self._grid)
        return tokens


def pack(
    rows: Sequence[Sequence[Clip]],
    indices: Sequence[int],
    *,
    patch: int | Sequence[int],
    grid: tuple[int, ...],
    context: int,
    null: int,
) -> Clean:
    """Rows of clips as tokens; what is left of a row is padding, a document of its own.

    A clip lies at the corner of the model's grid, so its positions are its own coordinates there.
    """
    parts = [[_tokens(clip, patch) for clip in row] for row in rows]
    width = parts[0][0].shape[1]
    tokens = torch.zeros(len(rows), context, width)
    members = torch.full((len(rows), context), PADDING)
    at = torch.zeros(len(rows), context, dtype=torch.int64)
    most = max(map(len, rows))
    labels = torch.full((len(rows), most), null)
    offsets = []
    for r, row in enumerate(rows):
        starts, end = [], 0
        for m, (clip, part) in enumerate(zip(row, parts[r], strict=True)):
            starts.append(end)
            here = slice(end, end + len(part))
            tokens[r, here], members[r, here], labels[r, m] = part, m, clip.label
            at[r, here] = _corner(grid_of(clip.shape, patch), grid)
            end += len(part)
        starts += [end] if end < context else []
        # padded with the length, where no document starts
        offsets.append((*starts, *[context] * (most + 1 - len(starts))))
    channels = rows[0][0].shape[0]
    return Clean(tokens, labels, members, at, tuple(indices), null, channels, offsets=tuple(offsets))


def _tokens(clip: Clip, patch: int | Sequence[int]) -> Tensor:
    return patchify(torch.from_numpy(clip.pixels)[None], volume(patch))[0]


def _corner(own: tuple[int, ...], grid: tuple[int, ...]) -> Tensor:
    """Row-major places, in the model's grid, of a clip's patches: int64 [tokens]."""
    _check_grid(own, grid)
    frames, rows, columns = (torch.arange(n) for n in own)
    return ((frames[:, None, None] * grid[1] + rows[:, None]) * grid[2] + columns).flatten()


def _check_grid(own: tuple[int, ...], grid: tuple[int, ...]) -> None:
    if any(a > b for a, b in zip(own, grid, strict=True)):
        raise ValueError(
            f"a clip of {own} patches is larger than the model's grid of {grid}: raise model.size"
        )
