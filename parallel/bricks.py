"""A placement of a grid brick by brick, so that what a rank holds, and each tile of it, is compact."""

from collections.abc import Sequence
from functools import lru_cache

from ..kernels.concrete import concrete
from ..kernels.neighborhood import brick_order
from ..kernels.span import Span, Spans, compress, cut, positions, total
from .placement import Placement


def bricked(
    placement: Placement, grid: Sequence[int], brick: Sequence[int], dilation: int | Sequence[int] = 1
) -> Placement:
    """The placement with the n-th position of the grid in brick order where it had position n.

    Positions stay row-major ones, so that masks, embeddings and `unshard` need not know: cutting a batch by
    this placement is the one permutation of the tokens. A rank that held a piece of the sequence then holds a
    piece of the grid, and tiles of as many tokens as a brick are dense under local masks (see `brick_order`).
    Cached by value. ValueError if the grid does not hold the placement's tokens.
    """
    steps = dilation if isinstance(dilation, int) else tuple(dilation)
    return _bricked(placement, tuple(grid), tuple(brick), steps)


@lru_cache(maxsize=64)
@concrete
def _bricked(
    placement: Placement, grid: tuple[int, ...], brick: tuple[int, ...], dilation: int | tuple[int, ...]
) -> Placement:
    order = brick_order(grid, brick, dilation)
    if total(order) != placement.length:
        raise ValueError(f"the grid {grid} has {total(order)} positions, the placement {placement.length}")
    ranks = [[_held(order, span) for span in spans] for spans in placement.spans_by_rank]
    return Placement(placement.length, tuple(tuple(s for part in parts for s in part) for parts in ranks))


def _held(order: Spans, span: Span) -> Spans:
    if span.contiguous:
        return cut(order, span.start, span.start + span.length)
    return compress(positions(order)[span.positions()])
