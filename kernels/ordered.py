"""Masks over a grid's bricks: windows side by side, and masks of sequences over tokens brick by brick."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .concrete import concrete
from .fields import UNLIMITED, integer, per_axis, within
from .heads import Composed, both
from .jit import jit
from .mask import Bound, Frame, Leaf, Mask, Range, Tree
from .neighborhood import brick_order, row_major
from .patterns import same_block


@dataclass(frozen=True)
class Number:
    """Which window of an axis positions lie in."""

    inner: int  # positions a step
    size: int
    window: int
    shift: int

    def __call__(self, at: Tensor) -> Tensor:
        return (at // self.inner % self.size + self.shift) // self.window

    def span(self, x: Range) -> tuple[Tensor, Tensor]:
        """Least and greatest in each tile, from the positions themselves if they are at hand."""
        if x.at is not None:
            return x.of(self)
        # on one line along the axis positions lie between those of the bounds
        line = self.inner * self.size
        alike = x.low // line == x.high // line
        most = (self.size - 1 + self.shift) // self.window
        return self(x.low).where(alike, self.shift // self.window), self(x.high).where(alike, most)


@jit
def window_of_axis_predicate(q, k, h, inner, size, window, shift):  # type: ignore[no-untyped-def]
    return (q // inner % size + shift) // window == (k // inner % size + shift) // window


@dataclass(frozen=True)
class AxisWindows(Leaf):
    """In the same window along one axis of a grid; see `Windows`."""

    inner: int
    size: int
    window: int
    shift: int
    predicate: ClassVar[Any] = window_of_axis_predicate

    def parameters(self, of: int) -> tuple[int, ...]:
        return self.inner, self.size, self.window, self.shift

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        along = Number(self.inner, self.size, self.window, self.shift)
        return same_block(along.span(q), along.span(k))


@dataclass(frozen=True)
class Windows(Composed):
    """A query sees the window that it lies in, of windows side by side over a grid of one to three axes,
    row-major; with `shift` they begin so far before the grid (Liu et al. 2021, section 3.2, whose shifted
    windows see no further over the edge either: there they are cut). Shift every second layer by half a
    window, with `PerLayer`, so that windows are joined.

    window, shift: one value, or one an axis; 0 <= shift < window <= the axis. Positions are below the size of
    the grid; more are a ValueError.
    """

    grid: Sequence[int]
    window: int | Sequence[int]
    shift: int | Sequence[int] = 0

    def __post_init__(self) -> None:
        _grid(self)
        for name in ("window", "shift"):
            per_axis(self, name, len(self.grid))
        for axis in self.axes():
            if not 0 <= axis.shift < axis.window <= axis.size:
                raise ValueError(
                    f"Windows: window {axis.window}, shift {axis.shift} on an axis of {axis.size}; it must "
                    "be 0 <= shift < window <= size"
                )

    def axes(self) -> list[AxisWindows]:
        """What is visible along each axis."""
        grid = tuple(self.grid)
        inner = [prod(grid[i + 1 :]) for i in range(len(grid))]
        each: Any = zip(inner, grid, self.window, self.shift, strict=True)  # type: ignore[arg-type]
        return [AxisWindows(*numbers) for numbers in each]

    def parts(self, of: int) -> Mask:
        return both(self.axes())

    def lower(self, frame: Frame) -> Tree:
        within(self, prod(self.grid), frame.q, frame.k)
        return super().lower(frame)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        within(self, prod(self.grid), q.low, k.low)
        return super().classify(q, k, head, of)


@dataclass(frozen=True)
class BrickByBrick(Mask):
    """The mask `inner` over a grid's tokens in the order of its bricks (`brick_order`), in place of row by
    row: S2 or star blocks of bricks, so that a block of neighbours is near in space. Positions stay
    row-major.

    grid: of one to three axes; positions are below its size, more are a ValueError. brick: one value, or one
    an axis.
    """

    inner: Mask
    grid: Sequence[int]
    brick: int | Sequence[int]

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Mask) or isinstance(self.inner, Bound):
            raise ValueError(
                f"BrickByBrick.inner is {self.inner!r}; it must be a mask that is bound to no heads"
            )
        _grid(self)
        per_axis(self, "brick", len(self.grid), low=1)

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return self.inner.per_head

    def batch(self) -> int:
        return self.inner.batch()

    def kind(self, head: int, of: int) -> Hashable:
        return self.inner.kind(head, of)

    def order(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What says where tokens stand: grid and brick."""
        return tuple(self.grid), tuple(self.brick)  # type: ignore[arg-type]

    def places(self, at: Tensor) -> Tensor:
        """Where positions stand in the order of bricks, int64 like `at`."""
        return _places(*self.order(), at.device)[at]

    def lower(self, frame: Frame) -> Tree:
        within(self, prod(self.grid), frame.q, frame.k)
        outer_q, outer_k, table = frame.q, frame.k, len(frame.tables)
        frame.q, frame.k = self.places(outer_q), self.places(outer_k)
        frame.tables.append((outer_q - frame.q, outer_k - frame.k))
        tree = self.inner.lower(frame)
        frame.q, frame.k = outer_q, outer_k
        return ("moved", table, tree)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        within(self, prod(self.grid), q.low, k.low)
        return self.inner.classify(self._moved(q), self._moved(k), head, of)

    def _moved(self, x: Range) -> Range:
        if x.at is None:
            # anywhere
            return Range(torch.zeros_like(x.low), torch.full_like(x.high, prod(self.grid) - 1))
        known = {} if x.known is None else x.known
        if self not in known:
            within(self, prod(self.grid), x.at)
            known[self] = self.places(x.at), {}
        moved = Range(x.low, x.high, known[self][0], x.tile, known[self][1])
        low, high = moved.of(torch.Tensor.clone)
        return moved._replace(low=low, high=high)


@lru_cache(maxsize=16)
@concrete
def _places(grid: tuple[int, ...], brick: tuple[int, ...], device: torch.device) -> Tensor:
    return row_major(brick_order(grid, brick)).to(device)


def _grid(mask: Any) -> None:
    """Puts a tuple in the place of the field `grid`; ValueError if it is none."""
    grid = tuple(mask.grid) if isinstance(mask.grid, Iterable) else (mask.grid,)
    found = tuple(map(integer, grid))
    sizes = [x for x in found if x is not None and x >= 1]
    if not 1 <= len(found) <= 3 or len(sizes) != len(found) or prod(sizes) >= UNLIMITED:
        raise ValueError(
            f"{type(mask).__name__}.grid is {grid}; it must hold an integer of at least 1 for each of 1 to 3 "
            f"axes, and have fewer than {UNLIMITED} positions"
        )
    object.__setattr__(mask, "grid", found)
