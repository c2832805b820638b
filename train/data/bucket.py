"""Batches of one shape each, with a budget of tokens: small clips come many at once, large ones few."""

from collections.abc import Callable

import numpy as np

from .check import whole
from .clip import Clips, Shape
from .packed import permutation


class Buckets:
    """The items of `data` in batches: all of a batch have one shape (channels, frames, height, width).

    Which items are in which batch depends on data, budget and seed alone. Every item is in one batch of an
    epoch; the last batch of a shape may be small.

    Args:
        data: Clips of several shapes.
        tokens: Tokens of a shape.
        budget: Most tokens of a batch.
        seed: Of the order of the batches.

    Raises:
        ValueError: A single clip has more tokens than the budget.
    """

    def __init__(self, data: Clips, *, tokens: Callable[[Shape], int], budget: int, seed: int = 0) -> None:
        self._data, self._tokens, self._seed = data, tokens, seed
        self._budget = whole("data.buckets", budget, 1)
        self._epoch, self._batches = 0, self._dealt(0)

    def __len__(self) -> int:
        """Batches in an epoch, the same in each."""
        return len(self._batches)

    def batch(self, index: int) -> list[int]:
        """Global indices of the items of the batch with this global index (any >= 0)."""
        if index < 0:
            raise IndexError(f"batch {index}: indices start at 0")
        epoch, place = divmod(index, len(self._batches))
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._dealt(epoch)
        return self._batches[place]

    def _dealt(self, epoch: int) -> list[list[int]]:
        count = len(self._data)
        by_shape: dict[Shape, list[int]] = {}
        for index in range(epoch * count, (epoch + 1) * count):
            by_shape.setdefault(self._data.shape(index), []).append(index)
        batches = []
        for shape, items in sorted(by_shape.items()):
            each = self._budget // self._tokens(shape)
            if not each:
                raise ValueError(
                    f"data.buckets={self._budget} holds no clip of shape {shape}, which has "
                    f"{self._tokens(shape)} tokens: raise it"
                )
            batches += [items[at : at + each] for at in range(0, len(items), each)]
        order = permutation(self._seed, epoch, len(batches))
        return [batches[i] for i in np.asarray(order).tolist()]
