"""The grid that a mask is about: held against that of a model, and exchanged for that of other samples."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

from ..kernels.mask import Mask
from ..kernels.neighborhood import Frames, FrameTiles, Neighborhood
from ..kernels.ordered import BrickByBrick, Windows

Grid = tuple[int, ...]


def parts(mask: Mask) -> Iterator[Mask]:
    """The mask and all that it is made of."""
    yield mask
    for value in _inside(mask).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Mask):
                yield from parts(part)


def on_grid(mask: Mask) -> bool:
    """Whether what the mask means depends on a grid."""
    kinds = Neighborhood | Frames | FrameTiles | Windows | BrickByBrick
    return any(isinstance(part, kinds) for part in parts(mask))


def check_grid(mask: Mask, grid: Sequence[int]) -> None:
    """ValueError if the mask, or a part of it, is about another grid than the model's."""
    frame = prod(grid[1:]) if len(grid) == 3 else 1
    for part in parts(mask):
        if isinstance(part, Neighborhood | Windows | BrickByBrick) and _bare(part.grid) != _bare(grid):
            raise ValueError(
                f"mask.grid is {list(part.grid)}, but model.size and model.patch make a grid of "
                f"{list(grid)}: set mask.grid to it"
            )
        if isinstance(part, Frames | FrameTiles) and part.tokens % frame:
            raise ValueError(
                f"mask.tokens is {part.tokens}, but a frame of the model's grid {list(grid)} has {frame} "
                f"tokens: set mask.tokens to it, or to a multiple for several frames as one"
            )


@lru_cache(maxsize=256)
def regridded(mask: Mask, own: Grid, grid: Grid) -> Mask:
    """The mask of a model with the grid `own`, for samples of another one of as many axes.

    Windows and strides are cut where an axis has become shorter than they are; where one window holds a whole
    axis nothing is shifted. Cached by value.
    """
    if own == grid:
        return mask
    if isinstance(mask, Neighborhood):
        return _moved(mask, grid)
    if isinstance(mask, Windows):
        there = _with_axes(mask.grid, grid)
        axes = list(zip(mask.axes(), there, strict=True))
        shift = tuple(axis.shift if axis.window < n else 0 for axis, n in axes)
        return Windows(there, tuple(min(axis.window, n) for axis, n in axes), shift)
    if isinstance(mask, BrickByBrick):
        return replace(mask, inner=regridded(mask.inner, own, grid), grid=_with_axes(mask.grid, grid))
    if isinstance(mask, Frames | FrameTiles):
        return replace(mask, tokens=mask.tokens * prod(grid[1:]) // prod(own[1:]))

    def changed(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(changed(x) for x in value)
        return regridded(value, own, grid) if isinstance(value, Mask) else value

    inside = {name: changed(value) for name, value in _inside(mask).items()}
    return replace(mask, **inside) if inside else mask  # type: ignore[type-var]


def dilation_of(mask: Mask, axes: int) -> tuple[int, ...]:
    """The dilation that all neighbourhoods of the mask share along each of so many axes; else 1."""
    found = {each(part, "dilation") for part in parts(mask) if isinstance(part, Neighborhood)}
    only = found.pop() if len(found) == 1 else ()
    return (1,) * (axes - len(only)) + only[-axes:]


def each(mask: Neighborhood, name: str) -> tuple[int, ...]:
    """A field of a neighbourhood, one value an axis."""
    return tuple(getattr(mask, name))


def _moved(mask: Neighborhood, grid: Grid) -> Neighborhood:
    there = _with_axes(mask.grid, grid)
    windows, strides, steps = (each(mask, name) for name in ("window", "stride", "dilation"))
    window = tuple(min(w, max(1, n // d)) for w, n, d in zip(windows, there, steps, strict=True))
    stride = tuple(min(s, w) for s, w in zip(strides, window, strict=True))
    return replace(mask, grid=there, window=window, stride=stride)


def _with_axes(like: Sequence[int], grid: Grid) -> Grid:
    """The grid with as many axes: those in front are of one place."""
    return ((1,) * len(like) + grid)[-len(like) :]


def _inside(mask: Mask) -> dict[str, Any]:
    """The fields that are masks, or tuples with masks among them."""
    if not is_dataclass(mask):
        return {}
    found = {x.name: getattr(mask, x.name) for x in fields(mask)}
    return {
        name: value
        for name, value in found.items()
        if isinstance(value, Mask)
        or (isinstance(value, tuple) and any(isinstance(part, Mask) for part in value))
    }


def _bare(grid: Sequence[int]) -> Grid:
    """Without axes of one place in front, which change no position."""
    kept = tuple(grid)
    while len(kept) > 1 and kept[0] == 1:
        kept = kept[1:]
    return kept
