"""What a global index of training means: a clip, a batch of clips of one shape, or a row of several."""

from collections.abc import Sequence
from typing import Protocol

from ..data.bucket import Buckets
from ..data.clip import Clips
from .batch import Clean, load, token_shape
from .pack import Rows


class Feed(Protocol):
    """Whole rows by global index; nothing here knows of ranks."""

    def load(self, indices: Sequence[int]) -> Clean:
        """The rows that these indices stand for."""
        ...


class Alone:
    """An index is a clip; all are of one shape."""

    def __init__(self, data: Clips, patch: int | Sequence[int], grid: Sequence[int] | None) -> None:
        self._data, self._patch, self._grid = data, patch, grid

    def load(self, indices: Sequence[int]) -> Clean:
        return load(self._data, indices, self._patch, self._grid)


class Bucketed:
    """An index is a batch of clips of one shape, see `Buckets`."""

    def __init__(
        self, data: Clips, patch: int | Sequence[int], grid: Sequence[int], budget: int, seed: int
    ) -> None:
        self._data, self._patch, self._grid = data, patch, grid
        self._buckets = Buckets(data, tokens=lambda x: token_shape(x, patch)[0], budget=budget, seed=seed)

    def load(self, indices: Sequence[int]) -> Clean:
        """ValueError for more than one batch, which may be of different shapes."""
        if len(indices) != 1:
            raise ValueError(
                f"train.micro_batch is {len(indices)}, but with data.buckets each sample is a batch of its "
                f"own: set train.micro_batch=1, and data.buckets to the tokens of a batch"
            )
        return load(self._data, self._buckets.batch(indices[0]), self._patch, self._grid)


def feed(data: Clips, patch: int | Sequence[int], grid: Sequence[int] | None, seed: int) -> Feed:
    """As the data's traits say. patch, grid: the model's."""
    traits = data.traits
    if grid is None or (traits.buckets is None and traits.pack is None):
        return Alone(data, patch, grid)
    if traits.pack is not None:
        return Rows(data, patch=patch, grid=grid, context=traits.pack, seed=seed)
    assert traits.buckets is not None
    return Bucketed(data, patch, grid, traits.buckets, seed)
