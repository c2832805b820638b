"""What 'a layout equals one device' is tried on: factors, points of their product, and few of them that still
bring each two levels together.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, product
from random import Random
from typing import NamedTuple

import numpy as np
import torch

from cells import Cell
from longspan.kernels.heads import Heads, PerHead
from longspan.kernels.layers import PerLayer
from longspan.kernels.mask import Bound, Causal, Documents, First, Full, Mask, Window
from longspan.kernels.neighborhood import Frames, FrameTiles, Neighborhood
from longspan.kernels.options import AttentionOptions
from longspan.kernels.ordered import BrickByBrick, Windows
from longspan.kernels.patterns import Anchored, BlockPermutation, Chunks, Shifted, Strided, Tail

LAYOUTS = ("ring", "gather", "ulysses", "usp", "s2", "star")
# The same with other settings: both ways round, a head at a time, two rounds of heads, blocks of 4 keys.
VARIANTS = ("ring2", "gather1", "ulysses2", "s2-4")
PLACEMENTS = ("contiguous", "zigzag", "striped", "balanced", "auto")
# Layouts that place tokens in one way only.
FIXED = ("ulysses", "ulysses2", "star")
HEADS = ((4, 4), (8, 2), (4, 1), (5, 5))
LENGTHS = (48, 63, 61)
PACKINGS = ("one", "packed", "by row")
STARS = ("star", "star_wide", "star_tail", "star_whole")


class Point(NamedTuple):
    """One level of each factor, by name."""

    layout: str
    placement: str
    mask: str
    heads: tuple[int, int]
    length: int
    packing: str

    def __str__(self) -> str:
        return f"{self.layout}/{self.placement} {self.mask} {self.heads} {self.length} {self.packing}"

    def cell(self, dtype: torch.dtype = torch.float64, options: AttentionOptions | None = None) -> Cell:
        """What is run for it."""
        mask = pack(FAMILIES[self.mask](self.heads[1]), self.packing, self.length)
        batch = 2 if self.packing == "by row" else 1
        name = self.layout if self.placement == "own" else f"{self.layout}/{self.placement}"
        return Cell(name, mask, self.heads, self.length, batch, dtype, options=options or AttentionOptions())


# Mask of so many kv heads, by the name of its yaml where it has one; for positions below 64.
FAMILIES: dict[str, Callable[[int], Mask]] = {
    "full": lambda kv: Full(),
    "causal": lambda kv: Causal(),
    "window": lambda kv: Window(7, 0),
    "window_both_sides": lambda kv: Window(7, 3),
    "sinks": lambda kv: Causal() & (Window(5, 0) | First(3)),
    "prefix": lambda kv: Causal() | First(9),
    "s2": lambda kv: Strided(4, 2, 4) & Causal(),
    "s2_dense_head": lambda kv: Strided(4, 1, 3, dense_heads=1, offset=1),
    "s2_bound": lambda kv: (Strided(3, 1, 2 * kv) & Causal()).heads(range(kv, 2 * kv), 2 * kv),
    "mixed": lambda kv: PerLayer(Strided(4, 2, 4), Full()) & Causal(),
    "hepos": lambda kv: (Window(6, 0) | Strided(1, 0, 4)) & Causal(),
    "longlora": lambda kv: Shifted(10, (0, 5)[: min(kv, 2)]) & Causal(),
    "chunks": lambda kv: Chunks(9, 4),
    "permutation": lambda kv: BlockPermutation(8, 8),
    "streaming_heads": lambda kv: (Heads(0, 1) | (Window(5, 0) | First(3))) & Causal(),
    "per_head": lambda kv: PerHead((Window(9, 2), Causal(), First(4), Window(9, 2), Strided(4, 1, 2))[:kv]),
    "tail": lambda kv: (Window(5, 0) | Tail(41)) & Causal(),
    "star": lambda kv: Anchored(8, 8, 40) & Causal(),
    "star_wide": lambda kv: Anchored(8, 16, 20) & Causal(),
    "star_tail": lambda kv: Anchored(4, 10, 45) & Causal(),
    "star_whole": lambda kv: Anchored(8, 8, 99),
    "neighborhood": lambda kv: Neighborhood((8, 8), 4, stride=2),
    "neighborhood_3d": lambda kv: Neighborhood((4, 4, 4), (2, 3, 2), (2, 1, 1), causal=(True, False, False)),
    "windows": lambda kv: Windows((8, 8), 4, 2),
    "s2_bricks": lambda kv: BrickByBrick(Strided(4, 2, 4), (8, 8), (2, 4)),
    "frames": lambda kv: Frames(12),
    "frame_tiles": lambda kv: FrameTiles(9, 3),
}


def pack(mask: Mask, packing: str, length: int) -> Mask:
    """The mask within documents of 1 token up to more than half of the sequence."""
    if packing == "one":
        return mask
    if isinstance(mask, Bound):
        return pack(mask.mask, packing, length).heads(mask.kv_indices, mask.of)
    starts = (0, 1, 3, 12, 46)
    return Documents(starts if packing == "packed" else (starts, (0, 36, 37, length, length)), mask)


def served(point: Point) -> bool:
    """Whether there is such a point, and its layout serves it: only star may refuse."""
    if (point.placement == "own") != (point.layout in FIXED):
        return False
    return point.layout != "star" or (point.mask in STARS and point.packing == "one")


def points(layouts: Sequence[str] = LAYOUTS) -> Iterator[Point]:
    """Every point that is served; those that differ in layout and placement only follow each other."""
    for mask, heads, length, packing in product(FAMILIES, HEADS, LENGTHS, PACKINGS):
        for layout, placement in product(layouts, (*PLACEMENTS, "own")):
            point = Point(layout, placement, mask, heads, length, packing)
            if served(point):
                yield point


def covering(layouts: Sequence[str] = LAYOUTS + VARIANTS, *, seed: int = 0) -> list[Point]:
    """Points that bring together each two levels that any point brings together. Each is the one that
    brings together the most new ones, so that the first few make a good choice too.
    """
    every = list(points(layouts))
    Random(seed).shuffle(every)
    numbers: dict[object, int] = {}
    ids = np.array([[numbers.setdefault(pair, len(numbers)) for pair in pairs(p)] for p in every])
    missing, found = np.ones(len(numbers), dtype=bool), []
    while missing.any():
        best = int(missing[ids].sum(1).argmax())
        missing[ids[best]] = False
        found.append(every[best])
    return found


def pairs(point: Point) -> list[object]:
    """Each two of its levels, with the factors they belong to."""
    return list(combinations(zip(point._fields, point, strict=True), 2))
