"""Masks and spans drawn at random, and what each mask means, said a second time in plain Python."""

from bisect import bisect_right
from dataclasses import dataclass
from random import Random
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor

from longspan.kernels.mask import (
    And,
    Bound,
    Causal,
    Documents,
    First,
    Full,
    Leaf,
    Mask,
    Or,
    Range,
    Window,
)
from longspan.kernels.span import Span, Spans


@triton.jit
def phase_predicate(q, k, h, period):  # type: ignore[no-untyped-def]
    return (k + h) % period == 0


@dataclass(frozen=True)
class Phase(Leaf):
    """(k + h) % period == 0: the masks of the package that exist so far do not tell heads apart."""

    period: int
    predicate: ClassVar[Any] = phase_predicate

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return True

    def parameters(self, of: int) -> tuple[int, ...]:
        return (self.period,)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        first = (k.low + head + self.period - 1) // self.period * self.period - head
        some = (first <= k.high) & (q.low <= q.high)
        return some, some & (self.period == 1)


def sees(mask: Mask, q: int, k: int, *, head: int = 0, row: int = 0) -> bool:
    """Whether the query at position q sees the key at k, for one kv head and row of the batch."""
    if isinstance(mask, Bound):
        return sees(mask.mask, q, k, head=mask.kv_indices[head], row=row)
    if isinstance(mask, And | Or):
        both = [sees(m, q, k, head=head, row=row) for m in (mask.left, mask.right)]
        return all(both) if isinstance(mask, And) else any(both)
    if isinstance(mask, Documents):
        nested = isinstance(mask.offsets[0], tuple)
        starts: Any = mask.offsets[row] if nested else mask.offsets
        of_q, of_k = (starts[bisect_right(starts, p) - 1] for p in (q, k))
        return of_q == of_k and sees(mask.inner or Full(), q - of_q, k - of_k, head=head, row=row)
    return _leaf_sees(mask, q, k, head)


def _leaf_sees(mask: Mask, q: int, k: int, head: int) -> bool:
    match mask:
        case Full():
            return True
        case Causal():
            return not k > q
        case Window(left, right):
            behind, ahead = q - k, k - q
            return (left is None or behind <= left) and (right is None or ahead <= right)
        case First(n):
            return k in range(n)
        case Phase(period):
            return (k + head) % period == 0
    raise AssertionError(f"no meaning written down for {mask}")


def matrix(mask: Mask, q: Spans, k: Spans, *, head: int = 0, row: int = 0) -> Tensor:
    """`sees` for all held tokens: bool [queries, keys]."""
    at_q, at_k = (listed(x) for x in (q, k))
    rows = [[sees(mask, i, j, head=head, row=row) for j in at_k] for i in at_q]
    return torch.tensor(rows, dtype=torch.bool).view(len(at_q), len(at_k))


def listed(spans: Spans) -> list[int]:
    """Positions, by walking run after run."""
    at: list[int] = []
    for span in spans:
        run, step = span.run or span.length, span.step or span.length
        left, start = span.length, span.start
        while left > 0:
            at += range(start, start + min(run, left))
            left, start = left - run, start + step
    return at


def random_leaf(draw: Random, length: int, batch: int = 1) -> Mask:
    def starts() -> tuple[int, ...]:
        return 0, *sorted(draw.choices(range(1, length + 1), k=3))

    def offsets() -> Any:
        return tuple(starts() for _ in range(batch)) if batch > 1 and draw.random() < 0.5 else starts()

    n = draw.randrange(length)
    windows = [Window(n), Window(n, 3), Window(None, n)]
    inner = draw.choice([None, Causal(), Window(5, 2), First(3) | Window(4), Documents((0, 7), Causal())])
    return draw.choice([Full(), Causal(), *windows, First(n), Phase(3), Documents(offsets(), inner)])


def random_mask(draw: Random, length: int, batch: int = 1, depth: int = 2) -> Mask:
    """A composition of up to 2^depth leaves."""
    if depth == 0 or draw.random() < 0.2:
        return random_leaf(draw, length, batch)
    a, b = (random_mask(draw, length, batch, depth - 1) for _ in range(2))
    return a & b if draw.random() < 0.5 else a | b


def random_spans(draw: Random, length: int) -> Spans:
    """Some of the positions below `length`, as contiguous, zigzag, striped and other placements hold them."""
    part = length // 4
    first = draw.randrange(part)
    choices: list[Spans] = [
        (Span(0, length),),
        (Span(first, 2 * part),),
        (Span(first, part), Span(length - part - first, part)),
        (Span(length - part, part), Span(first, part)),
        (Span(first % 3, length // 3, 1, 3),),
        (Span(first, part, 3, 6), Span(length - 3, 3)),
        (Span(first, 1),),
    ]
    return draw.choice(choices)
