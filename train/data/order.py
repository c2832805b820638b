"""Which record a global index means: shuffled anew each epoch for training, in file order when held out."""

import copy
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from .packed import permutation
from .sample import Ints

Part = Literal["train", "held_out"]
# Of the split, which no seed changes: what is held out stays so from run to run.
_SPLIT = (0, 0)


class Order:
    """`members` (record numbers, int64) in the order that part, seed and epoch decide."""

    def __init__(self, members: Ints, seed: int, part: Part) -> None:
        self._members, self._seed, self._part = members, seed, part
        self._epoch: tuple[int, Ints] = (-1, np.empty(0, np.int64))

    def __len__(self) -> int:
        return len(self._members)

    def record(self, index: int) -> int:
        """The record that a global index means. Raises IndexError if it is negative."""
        if index < 0:
            raise IndexError(f"item {index}: indices start at 0")
        epoch, position = divmod(index, len(self._members))
        if self._part == "held_out":
            return int(self._members[position])
        if self._epoch[0] != epoch:
            self._epoch = (epoch, permutation(self._seed, epoch, len(self._members)))
        return int(self._members[self._epoch[1][position]])


@dataclass(frozen=True)
class Split:
    """The records of both parts, int64, in file order."""

    train: Ints
    held_out: Ints

    def part(self, part: Part) -> Ints:
        return self.train if part == "train" else self.held_out


def split(records: int, held_out: float) -> Split:
    """A share of the records, held out at random; at least one in each part. ValueError for fewer than 2."""
    if records < 2:
        raise ValueError(
            f"data: {records} record(s) cannot be split into training and held-out: give at least 2"
        )
    count = min(max(1, round(held_out * records)), records - 1)
    order = permutation(*_SPLIT, records)
    return Split(np.sort(order[count:]), np.sort(order[:count]))


class Parted:
    """One part of records that are split once, as an epoch after the other; `held_out` is the other part."""

    def __init__(self, parts: Split, seed: int) -> None:
        self._split, self._seed = parts, seed
        self._take("train")

    def _take(self, part: Part) -> None:
        self._part, self._order = part, Order(self._split.part(part), self._seed, part)

    def __len__(self) -> int:
        return len(self._order)

    def held_out(self) -> Self:
        part = copy.copy(self)
        part._take("held_out")
        return part
