"""Where tokens sit: runs of global positions, and sequences of such runs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fields import UNLIMITED, at_least_one, integer


@dataclass(frozen=True)
class Span:
    """`length` global positions from `start`: runs of `run` neighbours, a new run every `step` positions.

    `Span(8, 4)` is 8 9 10 11; `Span(1, 4, run=1, step=3)` is 1 4 7 10; `Span(0, 4, run=2, step=6)` is 0 1 6
    7. Without `run` and `step` the positions are contiguous. The last run may be cut short by `length`.
    """

    start: int
    length: int
    run: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        given = (self.start, self.length, self.run, self.step)
        if not all(x is None or type(x) is int for x in given):
            found = [None if x is None else integer(x) for x in given]
            if [x is None for x in found] != [x is None for x in given]:
                raise ValueError(f"{self}: positions are integers")
            for name, value in zip(("start", "length", "run", "step"), found, strict=True):
                object.__setattr__(self, name, value)
        if (self.run is None) != (self.step is None):
            raise ValueError(f"{self}: give both run and step, or neither for contiguous positions")
        if self.start < 0 or self.length < 0:
            raise ValueError(f"{self}: start and length must be at least 0")
        if self.run is not None and self.step is not None and not 1 <= self.run <= self.step:
            raise ValueError(f"{self}: needs 1 <= run <= step")
        if self.last >= UNLIMITED:
            raise ValueError(f"{self} ends at position {self.last}; positions must be below {UNLIMITED}")

    @property
    def contiguous(self) -> bool:
        return self.run is None or self.run == self.step or self.length <= self.run

    def at(self, index: int) -> int:
        """Global position of the `index`-th token of the span."""
        if self.run is None or self.step is None:
            return self.start + index
        return self.start + index // self.run * self.step + index % self.run

    @property
    def last(self) -> int:
        """The greatest position; `start - 1` for an empty span."""
        return self.at(self.length - 1) if self.length else self.start - 1

    def positions(self, device: torch.device | None = None) -> Tensor:
        """int64 [length]."""
        i = torch.arange(self.length, device=device)
        if self.run is None or self.step is None:
            return self.start + i
        return self.start + i // self.run * self.step + i % self.run


Spans = tuple[Span, ...]


def total(spans: Iterable[Span]) -> int:
    """Tokens in all the spans."""
    return sum(s.length for s in spans)


def positions(spans: Sequence[Span], device: torch.device | None = None) -> Tensor:
    """Global positions of the tokens, in the order in which they are held: int64 [total(spans)]."""
    if not spans:
        return torch.empty(0, dtype=torch.int64, device=device)
    return torch.cat([s.positions(device) for s in spans])


def bounds(spans: Sequence[Span], tile: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Least and greatest position in each tile of `tile` held tokens (the last tile may be short): two int64
    [tiles]. ValueError for a tile below 1.
    """
    at_least_one(tile=tile)
    at = positions(spans, device)
    short = -len(at) % tile
    if short:
        at = torch.cat((at, at[-1:].expand(short)))
    rows = at.view(-1, tile)
    if rows.shape[0] == 0:
        return at, at
    return rows.amin(1), rows.amax(1)


def cut(spans: Sequence[Span], start: int, stop: int) -> Spans:
    """The spans of the held tokens `start` to `stop` (indices into the local order), in the same order."""
    pieces: list[Span] = []
    before = 0
    for span in spans:
        low, high = max(start - before, 0), min(stop - before, span.length)
        if low < high:
            pieces.extend(_slice(span, low, high))
        before += span.length
    return tuple(pieces)


def _slice(span: Span, low: int, high: int) -> list[Span]:
    if span.run is None or span.step is None:
        return [Span(span.start + low, high - low)]
    head = min(-low % span.run, high - low)
    pieces = [Span(span.at(low), head)] if head else []
    if low + head < high:
        pieces.append(Span(span.at(low + head), high - low - head, span.run, span.step))
    return pieces


def compress(at: Tensor) -> Spans:
    """Contiguous spans that hold these positions, int64 [tokens], in this order."""
    if not len(at):
        return ()
    edges = (at[1:] != at[:-1] + 1).nonzero().flatten() + 1
    starts = torch.cat((edges.new_zeros(1), edges))
    lengths = torch.cat((edges, edges.new_full((1,), len(at)))) - starts
    return tuple(Span(s, n) for s, n in zip(at[starts].tolist(), lengths.tolist(), strict=True))
