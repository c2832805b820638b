"""What the settings of diffusion models have in common: sizes that can be, and a mask for each layer."""

from collections.abc import Sequence

from ..kernels.mask import Full, Mask
from ..kernels.patterns import layered
from .grids import check_grid


def check_sizes(**sizes: int) -> None:
    """ValueError for a size below 1, naming the setting."""
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"model.{name} is {size}; it must be at least 1")


def head_dim_of(dim: int, heads: int, *, even: bool) -> int:
    """dim // heads; `even` where RoPE turns pairs."""
    if dim % heads or (even and dim // heads % 2):
        kind = "an even head dim, since RoPE turns pairs" if even else "a head dim that is whole"
        raise ValueError(f"model.dim is {dim}, model.heads {heads}: dim / heads must be {kind}")
    return dim // heads


def layer_masks(
    mask: Mask | Sequence[Mask] | None, layers: int, heads: int, grid: Sequence[int]
) -> tuple[Mask, ...]:
    """A mask for each layer: of one for all (None: full; see `layered` and `PerLayer`), or one a layer.
    ValueError for one that is about another grid.
    """
    mask = Full() if mask is None else mask
    masks = layered(mask, layers, heads) if isinstance(mask, Mask) else tuple(mask)
    if len(masks) != layers:
        raise ValueError(f"{len(masks)} masks for {layers} layers: give one, or one a layer")
    for each in set(masks):
        check_grid(each, grid)
    return masks
