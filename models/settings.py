"""What the settings of diffusion models have in common: sizes that can be, and a mask for each layer."""

from collections.abc import Sequence

from ..kernels.layers import layered
from ..kernels.mask import Full, Mask
from .grids import check_grid


def head_dim_of(dim: int, heads: int, *, even: bool) -> int:
    """dim // heads; `even` where RoPE turns pairs."""
    if dim % heads or (even and dim // heads % 2):
        kind = "an even head dim, since RoPE turns pairs" if even else "a head dim that is whole"
        raise ValueError(f"model.dim is {dim}, model.heads {heads}: dim / heads must be {kind}")
    return dim // heads


def layer_masks(
    mask: Mask | Sequence[Mask] | None, layers: int, heads: int, grid: Sequence[int]
) -> tuple[Mask, ...]:
    """A mask for each layer: of one for all (None: full), or one a layer (see `layered`). ValueError for one
    that is about another grid.
    """
    masks = layered(Full() if mask is None else mask, layers, heads)
    for each in set(masks):
        check_grid(each, grid)
    return masks
