"""Masks of images and video: neighbourhoods in a grid of one to three axes, and whole frames."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from .fields import UNLIMITED, integer, integers, per_axis, require, within
from .heads import Composed, both
from .jit import jit
from .mask import Frame, Leaf, Mask, Range, Tree
from .patterns import same_block
from .span import Span, Spans, positions


@dataclass(frozen=True)
class Coordinate:
    """Where positions lie on one axis of a grid: their residue, or else their place among those with it."""

    inner: int  # positions a step
    size: int
    dilation: int
    residue: bool

    def __call__(self, at: Tensor) -> Tensor:
        along = at // self.inner % self.size
        return along % self.dilation if self.residue else along // self.dilation

    def span(self, x: Range) -> tuple[Tensor, Tensor]:
        """Least and greatest in each tile, from the positions themselves if they are at hand."""
        if x.at is not None:
            return x.of(self)
        # on one line along the axis positions lie between those of the bounds, on one point they are alike
        apart = self.inner if self.residue else self.inner * self.size
        alike = x.low // apart == x.high // apart
        most = self.dilation - 1 if self.residue else (self.size - 1) // self.dilation
        return self(x.low).where(alike, 0), self(x.high).where(alike, most)


@jit
def residue_predicate(q, k, h, inner, size, dilation):  # type: ignore[no-untyped-def]
    return q // inner % size % dilation == k // inner % size % dilation


@dataclass(frozen=True)
class Residue(Leaf):
    """q and k a multiple of `dilation` apart along one axis."""

    inner: int
    size: int
    dilation: int
    predicate: ClassVar[Any] = residue_predicate

    def parameters(self, of: int) -> tuple[int, ...]:
        return self.inner, self.size, self.dilation

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        along = Coordinate(self.inner, self.size, self.dilation, residue=True)
        return same_block(along.span(q), along.span(k))


@jit
def near_predicate(q, k, h, inner, size, window, dilation, stride):  # type: ignore[no-untyped-def]
    xq, xk = q // inner % size // dilation, k // inner % size // dilation
    last = (size - 1 - k // inner % size % dilation) // dilation
    leader = xq // stride * stride + stride // 2
    # start <= xk < start + window, with start = min(max(leader - window // 2, 0), last + 1 - window)
    after = (xk + window > last) | (xk + window // 2 >= leader)
    return after & ((xk < window) | (xk + window // 2 < leader + window))


@jit
def before_predicate(q, k, h, inner, size, window, dilation, stride):  # type: ignore[no-untyped-def]
    xq, xk = q // inner % size // dilation, k // inner % size // dilation
    last = (size - 1 - k // inner % size % dilation) // dilation
    leader = xq // stride * stride + stride - 1
    return (xk <= xq) & ((xk + window > last) | (xk + window > leader))


@dataclass(frozen=True)
class Axis(Leaf):
    """Within the window along one axis of a grid, for keys of the same residue; see `Neighborhood`."""

    inner: int
    size: int
    window: int
    dilation: int = 1
    stride: int = 1
    predicate: ClassVar[Any] = near_predicate

    def parameters(self, of: int) -> tuple[int, ...]:
        return self.inner, self.size, self.window, self.dilation, self.stride

    def check(self) -> None:
        """ValueError unless 1 <= stride <= window <= the smallest n."""
        least = self.size // self.dilation if self.dilation > 0 else 0
        if self.dilation < 1 or not 1 <= self.stride <= self.window <= least:
            raise ValueError(
                f"Neighborhood: window {self.window}, dilation {self.dilation}, stride {self.stride} on an "
                f"axis of {self.size}; it must be 1 <= stride <= window <= size // dilation"
            )

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        place, residue = (Coordinate(self.inner, self.size, self.dilation, x) for x in (False, True))
        (low, high), (k_low, k_high), (least, most) = place.span(q), place.span(k), residue.span(k)
        last_low, last_high = ((self.size - 1 - x) // self.dilation for x in (most, least))
        first, end = self.seen(low, last_low), self.seen(high, last_high)
        return (k_high >= first[0]) & (k_low <= end[1]), (k_low >= end[0]) & (k_high <= first[1])

    def pairs(self) -> int:
        """Visible pairs along the axis."""
        at = torch.arange(self.size)
        first, end = self.seen(at // self.dilation, (self.size - 1 - at % self.dilation) // self.dilation)
        return int((end - first.clamp(min=0) + 1).sum())

    def seen(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        """First and last place that a query at place x of 0 to `last` sees; neither falls as these grow."""
        leader = (x // self.stride * self.stride + self.stride // 2).minimum(last)
        start = (leader - self.window // 2).clamp(min=0).minimum(last + 1 - self.window)
        return start, start + self.window - 1


@dataclass(frozen=True)
class CausalAxis(Axis):
    """An `Axis` along which nothing later is visible."""

    predicate: ClassVar[Any] = before_predicate

    def seen(self, x: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
        leader = (x // self.stride * self.stride + self.stride - 1).minimum(last)
        return leader - self.window + 1, x


@dataclass(frozen=True)
class Neighborhood(Composed):
    """The window around a query in a grid of one to three axes, row-major (GNA, Hassani et al. 2025).

    Visible iff visible on every axis. Per axis, of the positions p with the same residue p % dilation, n of
    them, at places x = p // dilation: `stride` neighbours share the window of their leader, x // stride *
    stride + stride // 2, and windows are shifted to lie inside the grid, so that `window` keys are seen
    everywhere. On a causal axis the leader is the last of the `stride`, and the window ends at the query.
    window, dilation, stride, causal: one value, or one an axis. Positions are below the size of the grid;
    more are a ValueError.
    """

    grid: Sequence[int]
    window: int | Sequence[int]
    dilation: int | Sequence[int] = 1
    stride: int | Sequence[int] = 1
    causal: bool | Sequence[bool] = False

    def __post_init__(self) -> None:
        grid = integers(self, "grid", 1)
        if len(grid) > 3 or prod(grid) >= UNLIMITED:
            raise ValueError(
                f"Neighborhood.grid is {grid}; it must have 1 to 3 axes and fewer than {UNLIMITED} positions"
            )
        for name in ("window", "dilation", "stride"):
            per_axis(self, name, len(grid))
        causal = tuple(self.causal) if isinstance(self.causal, Iterable) else (self.causal,) * len(grid)
        if len(causal) != len(grid) or any(type(x) is not bool for x in causal):
            raise ValueError(
                f"Neighborhood.causal is {causal}; it must be true or false, or one for each of {len(grid)} "
                "axes"
            )
        object.__setattr__(self, "causal", causal)
        for axis in self.axes():
            axis.check()

    def axes(self) -> list[Axis]:
        """What is visible along each axis."""
        grid = tuple(self.grid)
        inner = [prod(grid[i + 1 :]) for i in range(len(grid))]
        each: Any = zip(inner, grid, self.window, self.dilation, self.stride, self.causal, strict=True)  # type: ignore[arg-type]
        return [(CausalAxis if causal else Axis)(*numbers) for *numbers, causal in each]

    def counted(self, length: int) -> int | None:
        """Visible pairs of the whole grid, whose axes are independent; None for another length."""
        return prod(axis.pairs() for axis in self.axes()) if length == prod(self.grid) else None

    def parts(self, of: int) -> Mask:
        axes = self.axes()
        return both([*(Residue(x.inner, x.size, x.dilation) for x in axes if x.dilation > 1), *axes])

    def lower(self, frame: Frame) -> Tree:
        within(self, prod(self.grid), frame.q, frame.k)
        return super().lower(frame)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        # a greatest position may be a bound that no token reaches
        within(self, prod(self.grid), q.low, k.low)
        return super().classify(q, k, head, of)


@jit
def frames_predicate(q, k, h, tokens):  # type: ignore[no-untyped-def]
    return k // tokens <= q // tokens


@dataclass(frozen=True)
class Frames(Leaf):
    """frame(k) <= frame(q), for frames of `tokens`: causal between frames, full within one."""

    tokens: int
    predicate: ClassVar[Any] = frames_predicate

    def __post_init__(self) -> None:
        require(self, 1, "tokens")

    def parameters(self, of: int) -> tuple[int, ...]:
        return (self.tokens,)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        q_low, q_high, k_low, k_high = (x // self.tokens for x in (q.low, q.high, k.low, k.high))
        return k_low <= q_high, k_high <= q_low


@jit
def frame_tiles_predicate(q, k, h, tokens, every):  # type: ignore[no-untyped-def]
    fq, fk = q // tokens, k // tokens
    return (fq == fk) | (fq % every == 0) | (fk % every == 0)


@dataclass(frozen=True)
class FrameTiles(Leaf):
    """A frame sees itself and each `every`-th frame, and each of these sees all (Attention Tile, Ding et al.
    2025).
    """

    tokens: int
    every: int
    predicate: ClassVar[Any] = frame_tiles_predicate

    def __post_init__(self) -> None:
        require(self, 1, "tokens", "every")

    def parameters(self, of: int) -> tuple[int, ...]:
        return self.tokens, self.every

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        a, b = ((x.low // self.tokens, x.high // self.tokens) for x in (q, k))
        some, only = same_block(a, b)
        for low, high in (a, b):
            held = high // self.every * self.every >= low
            some = some | held
            only = only | (held & (low == high)) | (self.every == 1)
        return some, only


def brick_order(grid: Sequence[int], brick: Sequence[int], dilation: int | Sequence[int] = 1) -> Spans:
    """All positions of a row-major grid, brick after brick: with as many tokens in a brick as in a tile, the
    tiles of a `Neighborhood` are dense. `x[:, positions(order)]` brings row-major tokens into this order.

    The bricks, and the tokens in each, stand in row-major order; bricks at the far ends are cut to the grid.
    With a dilation, the positions of one residue are a grid of their own, and these follow each other.
    """
    steps = tuple(dilation) if isinstance(dilation, Iterable) else (dilation,) * len(grid)
    found = [integer(x) for x in (*grid, *brick, *steps)]
    if not 1 <= len(grid) == len(brick) == len(steps) <= 3 or any(x is None or x < 1 for x in found):
        raise ValueError(
            f"brick is {tuple(brick)} and dilation {dilation} for the grid {tuple(grid)}; they must hold an "
            "integer of at least 1 for each of its 1 to 3 axes"
        )
    padded = [(1,) * (3 - len(grid)) + tuple(x) for x in (grid, brick, steps)]
    return tuple(_slabs(*padded))


def _slabs(grid: Sequence[int], brick: Sequence[int], steps: Sequence[int]) -> Iterator[Span]:
    line = steps[1] * grid[2]  # from a row of a slab to the next
    for residue in product(*map(range, steps)):
        axes = [range(r, g, d) for r, g, d in zip(residue, grid, steps, strict=True)]
        cuts = ([x[i : i + b] for i in range(0, len(x), b)] for x, b in zip(axes, brick, strict=True))
        for planes, rows, columns in product(*cuts):
            for plane in planes:
                start = (plane * grid[1] + rows.start) * grid[2] + columns.start
                if steps[2] == 1:
                    yield Span(start, len(rows) * len(columns), len(columns), line)
                else:
                    yield from (Span(start + i * line, len(columns), 1, steps[2]) for i in range(len(rows)))


def row_major(order: Spans) -> Tensor:
    """Where each position of a permuted grid is held, int64 [tokens]: `y[:, row_major(order)]` brings tokens
    held in `order` back into row-major order.
    """
    return positions(order).argsort()
