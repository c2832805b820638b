"""Ranks that hold no token take part in everything that moves and change nothing."""

import pytest

from cells import Cell, errors, ran
from longspan.kernels.mask import Causal, Documents, First, Mask, Window
from longspan.kernels.patterns import Anchored, Strided
from world import Worlds

# With the tokens of all ranks together.
MASKS: tuple[tuple[Mask, int], ...] = (
    (Causal() & (Window(1) | First(1)), 1),
    (Documents((0, 1), inner=Causal()), 2),
    (Strided(1, 1, 2), 3),
)
LAYOUTS = (
    "ring/zigzag", "ring2/contiguous", "gather/contiguous", "gather1/zigzag", "ulysses", "ulysses2",
    "usp/zigzag", "s2/contiguous", "s2-4/balanced",
)  # fmt: skip


def few() -> list[Cell]:
    """A star's context here is one block, with and without a tail."""
    found = [Cell(name, mask, (8, 2), length, batch=2) for name in LAYOUTS for mask, length in MASKS]
    star = Anchored(8, 8, 8) & Causal()
    return found + [Cell("star", star, (8, 2), length) for length in (11, 9, 8, 5)]


@pytest.mark.parametrize("size", [4])
def test_ranks_without_tokens(world: Worlds, size: int) -> None:
    cells = few()
    empty = set()
    for cell, *ranks in zip(cells, *world(size)(ran, cells, size), strict=True):
        assert max(errors(cell, ranks).values()) <= 1e-10, cell
        if not all(ranks[0].placement.tokens(r) for r in range(size)):
            empty.add(cell)
    assert all(cell in empty for cell in cells if cell.length < size)
    assert sum(cell.layout == "star" for cell in empty) == 4
