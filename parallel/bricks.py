"""A placement of a grid brick by brick, so that what a rank holds, and each tile of it, is compact."""

from collections.abc import Sequence
from functools import lru_cache

from ..kernels.concrete import concrete
from ..kernels.mask import Mask
from ..kernels.neighborhood import brick_order
from ..kernels.span import Span, Spans, compress, cut, positions, total
from .balance import InBricks
from .layout import Layout
from .placement import Placement

Bricks = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # grid, brick, dilation


def place(layout: Layout, length: int, mask: Mask, bricks: Bricks | None) -> Placement:
    """Who holds what of `length` tokens that stand brick after brick, or, without bricks, row by row: the
    layout's own placement, told which queries are where, so that one that evens out work does so.
    """
    if bricks is None:
        return layout.place(length, mask)
    return bricked(layout.place(length, InBricks(mask, *bricks)), *bricks)


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
