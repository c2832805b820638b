"""What a layout refuses before anything is sent: on all ranks alike, for nothing local is looked at."""

from functools import lru_cache

from torch import Tensor

from ..kernels.concrete import concrete
from ..kernels.mask import Mask
from ..kernels.span import Span
from ..kernels.tile import needed
from .placement import Placement


def refuse_misfits(size: int, q: Tensor, k: Tensor, mask: Mask, placement: Placement) -> None:
    """ValueError for a placement over other than `size` ranks, and for a mask of other rows or kv heads than
    q and k have: a kernel would say so too, but only on ranks with work, while others wait for them.
    """
    if placement.size != size:
        raise ValueError(
            f"the placement is over {placement.size} ranks, but the layout has {size}: take what its place() "
            f"gives"
        )
    rows = mask.batch()
    if rows not in (1, q.shape[0]):
        raise ValueError(f"the mask has documents for {rows} rows, but the batch has {q.shape[0]}")
    _ask(mask, placement.length, k.shape[2])


@lru_cache(maxsize=256)
@concrete
def _ask(mask: Mask, length: int, kv_heads: int) -> None:
    """Lets the mask refuse a number of heads or a position. Cached by value."""
    if length:
        ends = (Span(0, 1), Span(length - 1, 1))
        needed(mask, ends, ends, kv_heads, tile=1)
