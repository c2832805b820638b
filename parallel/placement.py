"""Who holds what: for one batch, the spans of global positions on each rank of a layout."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, groupby

import torch

from ..kernels.concrete import concrete
from ..kernels.count import MOST
from ..kernels.mask import Mask
from ..kernels.span import Span, Spans, positions, total
from .balance import ESTIMATE, heads_of, shares, work_of_queries


@dataclass(frozen=True)
class Placement:
    """`spans_by_rank[r]` says which of the `length` positions rank r holds, in the order it holds them; none
    is fine. ValueError unless each position is held once.
    """

    length: int
    spans_by_rank: tuple[Spans, ...]

    def __post_init__(self) -> None:
        held = sum(map(total, self.spans_by_rank))
        if held != self.length:
            raise ValueError(f"the ranks hold {held} tokens, but the sequence has {self.length}")
        missing = _missing(self.length, self.spans_by_rank)
        if missing is not None:
            raise ValueError(
                f"the ranks hold {held} tokens, as many as the sequence has, but none holds position "
                f"{missing}, so that another is held twice or lies beyond the end"
            )

    @property
    def size(self) -> int:
        return len(self.spans_by_rank)

    def tokens(self, rank: int) -> int:
        """How many tokens `rank` holds."""
        return total(self.spans_by_rank[rank])

    def work(self, mask: Mask, kv_heads: int | None = None, *, most: int = MOST) -> tuple[int, ...]:
        """Visible (query, key) pairs of each rank's queries, summed over the mask's batch rows and averaged
        over the kv heads, rounded down.

        kv_heads None: as many as the mask says, see `heads_of`. Exact up to `most` pairs in partial tiles,
        else a close estimate.
        """
        kv_heads = kv_heads or heads_of(mask)
        each = work_of_queries(mask, self.length, kv_heads, most)
        heads = kv_heads if mask.per_head else 1
        return tuple(int(each[positions(spans)].sum()) // heads for spans in self.spans_by_rank)

    def imbalance(self, mask: Mask, kv_heads: int | None = None, *, most: int = MOST) -> float:
        """max / mean of `work` over the ranks: 1.0 is even."""
        work = self.work(mask, kv_heads, most=most)
        return max(work) * len(work) / sum(work) if sum(work) else 1.0


Place = Callable[[int, int, Mask], Placement]


def contiguous(length: int, size: int) -> Placement:
    """One piece a rank, in order; sizes differ by at most one token."""
    cuts = [length * r // size for r in range(size + 1)]
    return Placement(length, tuple(_piece(a, b) for a, b in zip(cuts, cuts[1:], strict=False)))


def zigzag(length: int, size: int) -> Placement:
    """One piece from the front and its mirror from the back, so that causal work is even
    (ring-flash-attention).
    """
    cuts = [length * i // (2 * size) for i in range(2 * size + 1)]
    pieces = [_piece(a, b) for a, b in zip(cuts, cuts[1:], strict=False)]
    return Placement(length, tuple(pieces[r] + pieces[-1 - r] for r in range(size)))


def striped(length: int, size: int) -> Placement:
    """Every `size`-th token, so that causal work is even at the grain of a token (Brandon et al. 2023)."""
    counts = [(length - r + size - 1) // size for r in range(size)]
    return Placement(
        length, tuple((Span(r, n, run=1, step=size),) if n > 0 else () for r, n in enumerate(counts))
    )


@lru_cache(maxsize=64)
@concrete
def balanced(
    length: int, size: int, mask: Mask, *, kv_heads: int | None = None, chunk: int = 128
) -> Placement:
    """Chunks of `chunk` tokens, shorter if a rank would get fewer than 8, given to the ranks so that the
    mask's work is even; each rank gets as many as any other, or one more. Cached by value.

    kv_heads: see `Placement.work`. Even work may cost traffic: neighbours part.
    """
    chunk = max(1, min(chunk, length // (8 * size)))
    work = work_of_queries(mask, length, kv_heads or heads_of(mask), ESTIMATE)
    starts = range(0, length, chunk)
    owners = shares(torch.stack([x.sum() for x in work.split(chunk)]) if length else work, size)
    spans: list[list[Span]] = [[] for _ in range(size)]
    for rank, run in groupby(zip(owners, starts, strict=True), key=lambda x: x[0]):
        first, *rest = (start for _, start in run)
        stop = min((rest or [first])[-1] + chunk, length)
        spans[rank].append(Span(first, stop - first))
    return Placement(length, tuple(map(tuple, spans)))


@lru_cache(maxsize=64)
@concrete
def auto(length: int, size: int, mask: Mask) -> Placement:
    """The first of contiguous, zigzag, balanced and striped whose max / mean work is within 1% of the best
    one's. Cached by value.

    Striped comes last: a tile of its tokens reaches over `size` times as many positions, so that sparse masks
    have few empty tiles left, and each rank needs keys of all others.
    """
    found = [place(length, size, mask) for place in (_contiguous, _zigzag, balanced, _striped)]
    uneven = [placement.imbalance(mask, most=ESTIMATE) for placement in found]
    return next(p for p, x in zip(found, uneven, strict=True) if x <= 1.01 * min(uneven))


def named(name: str) -> Place:
    """The placement that a config names."""
    known: dict[str, Place] = {
        "contiguous": _contiguous,
        "zigzag": _zigzag,
        "striped": _striped,
        "balanced": balanced,
        "auto": auto,
    }
    if name not in known:
        raise ValueError(f"parallel.layout.placement is {name!r}; it can be {', '.join(known)}")
    return known[name]


@concrete
def _missing(length: int, spans_by_rank: Sequence[Spans]) -> int | None:
    """The first of `length` positions that no rank holds, if there is one."""
    spans = [s for s in chain.from_iterable(spans_by_rank) if s.length]
    if all(s.contiguous for s in spans):
        # without a look at each position, of which there may be millions
        reach = 0
        for s in sorted(spans, key=lambda s: s.start):
            if s.start > reach:
                break
            reach = max(reach, s.start + s.length)
        return reach if reach < length else None
    free, at = torch.ones(length, dtype=torch.bool), positions(spans)
    free[at[at < length]] = False
    return int(free.nonzero()[0]) if free.any() else None


def _contiguous(length: int, size: int, mask: Mask) -> Placement:
    return contiguous(length, size)


def _zigzag(length: int, size: int, mask: Mask) -> Placement:
    return zigzag(length, size)


def _striped(length: int, size: int, mask: Mask) -> Placement:
    return striped(length, size)


def _piece(start: int, stop: int) -> Spans:
    return (Span(start, stop - start),) if stop > start else ()
