"""Who holds what: for one batch, the spans of global positions on each rank of a layout."""

from collections.abc import Callable
from dataclasses import dataclass

from ..kernels.mask import Mask
from ..kernels.span import Span, Spans, total
from ..kernels.tile import area


@dataclass(frozen=True)
class Placement:
    """`spans_by_rank[r]` says which of the `length` positions rank r holds, in the order it holds them; none
    is fine.
    """

    length: int
    spans_by_rank: tuple[Spans, ...]

    def __post_init__(self) -> None:
        held = sum(map(total, self.spans_by_rank))
        if held != self.length:
            raise ValueError(f"the ranks hold {held} tokens, but the sequence has {self.length}")

    @property
    def size(self) -> int:
        return len(self.spans_by_rank)

    def tokens(self, rank: int) -> int:
        """How many tokens `rank` holds."""
        return total(self.spans_by_rank[rank])

    def work(self, mask: Mask, kv_heads: int) -> tuple[int, ...]:
        """Visible (query, key) pairs of each rank's queries, averaged over kv heads."""
        whole = (Span(0, self.length),) if self.length else ()
        return tuple(area(mask, spans, whole, kv_heads) for spans in self.spans_by_rank)

    def imbalance(self, mask: Mask, kv_heads: int) -> float:
        """max / mean of `work` over the ranks: 1.0 is even."""
        work = self.work(mask, kv_heads)
        return max(work) * len(work) / sum(work) if sum(work) else 1.0


Place = Callable[[int, int], Placement]


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


def named(name: str) -> Place:
    """The placement that a config names."""
    known: dict[str, Place] = {"contiguous": contiguous, "zigzag": zigzag, "striped": striped}
    if name not in known:
        raise ValueError(f"parallel.layout.placement is {name!r}; it can be {', '.join(known)}")
    return known[name]


def _piece(start: int, stop: int) -> Spans:
    return (Span(start, stop - start),) if stop > start else ()
