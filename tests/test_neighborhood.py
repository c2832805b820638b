"""Neighbourhoods: NATTEN's definition by hand, and the order of tokens that makes their tiles dense."""

from typing import Any

import pytest
import torch

from longspan.kernels.lower import lower
from longspan.kernels.mask import Documents
from longspan.kernels.neighborhood import Neighborhood, brick_order, row_major
from longspan.kernels.patterns import BlockPermutation
from longspan.kernels.span import Span, positions
from longspan.kernels.tile import area, listed, pairs, tiles
from patterns import CPU, KV_HEADS, WHOLE, check_classification, line, seen, truth


def test_neighbourhoods_by_hand() -> None:
    """By NATTEN's definition."""
    for q, row in {0: "1110000000", 5: "0000111000", 9: "0000000111"}.items():
        assert line(Neighborhood([10], 3), q, 10) == row
    assert line(Neighborhood([10], 4), 5, 10) == "0001111000"
    for q, row in {4: "0001111000", 5: "0001111000", 6: "0000011110"}.items():
        assert line(Neighborhood([10], 4, stride=2), q, 10) == row
    assert line(Neighborhood([9], 3, dilation=2), 1, 9) == "010101000"
    assert line(Neighborhood([9], 3, dilation=2), 8, 9) == "000010101"
    for q, row in {4: "000110000", 5: "000111000", 8: "000000111"}.items():
        assert line(Neighborhood([9], 3, stride=2, causal=True), q, 9) == row
    assert line(Neighborhood([3, 4], (1, 3)), 5, 12) == "000011100000"
    assert line(Neighborhood([3, 4], 3, causal=(True, False)), 4, 12) == "111011100000"


def test_bricks_make_the_tiles_of_a_neighbourhood_dense() -> None:
    grid, brick = (8, 32, 32), (4, 4, 4)
    mask = Neighborhood(grid, (4, 8, 8), stride=brick)
    area = 4 * 8 * 8 * 8 * 32 * 32
    pairs = {}
    for name, at in {"row-major": (Span(0, 8192),), "bricks": brick_order(grid, brick)}.items():
        lists = tiles(mask, at, at, 1, size=(64, 64), transpose=False, device=CPU)
        pairs[name] = len(listed(lists)) * 64 * 64
    assert pairs["bricks"] < 2 * area < 4 * area <= pairs["row-major"]
    # with windows of whole bricks nothing is partial
    whole = Neighborhood(grid, (8, 4, 4), stride=(8, 4, 4))
    lists = tiles(whole, at, at, 1, size=(64, 64), transpose=False, device=CPU)
    assert all(full for _, _, full in listed(lists)) and len(listed(lists)) * 64 * 64 == 8 * 4 * 4 * 8192


@pytest.mark.parametrize(
    ("grid", "brick", "dilation"),
    [
        ((12,), (5,), 1),
        ((12,), (4,), 3),
        ((6, 10), (4, 3), 1),
        ((5, 7), (2, 2), (2, 3)),
        ((6, 5), (2, 2), (2, 1)),
        ((4, 5, 6), (2, 2, 4), 1),
    ],
)
def test_brick_order_holds_each_position_once_brick_by_brick(
    grid: tuple[int, ...], brick: tuple[int, ...], dilation: Any
) -> None:
    order = brick_order(grid, brick, dilation)
    at = positions(order)
    steps = (dilation,) * len(grid) if isinstance(dilation, int) else dilation

    def key(p: int) -> tuple[Any, ...]:
        cell = tuple(int(x) for x in torch.unravel_index(torch.tensor(p), grid))
        places = [x // d for x, d in zip(cell, steps, strict=True)]
        bricks = [x // b for x, b in zip(places, brick, strict=True)]
        return [x % d for x, d in zip(cell, steps, strict=True)], bricks, places

    assert at.tolist() == sorted(range(len(at)), key=key)
    x = torch.randn(1, len(at), 2)
    assert torch.equal(x[:, at][:, row_major(order)], x)


def test_packed_grids_may_end_within_a_tile() -> None:
    """Positions count within a document, so that a tile over two of them is not beyond the grid."""
    for inner in (Neighborhood((4, 5), 3), BlockPermutation(5, 4), Neighborhood((2, 2, 5), 2)):
        mask = Documents((0, 20, 40), inner)
        assert torch.equal(seen(mask, WHOLE, WHOLE), truth(mask, WHOLE, WHOLE, KV_HEADS))
        check_classification(mask, WHOLE, WHOLE, (16, 16))
        with pytest.raises(ValueError, match="has 20 positions, 0 to 19, but is asked for"):
            lower(Documents((0, 30), inner), WHOLE, WHOLE, KV_HEADS, CPU)


@pytest.mark.parametrize("causal", [False, True, (True, False, False)])
@pytest.mark.parametrize(
    ("window", "dilation", "stride"),
    [((3, 3, 5), 1, 1), ((2, 4, 3), 1, (2, 4, 1)), ((2, 2, 2), (2, 1, 3), 1)],
)
def test_pairs_of_a_whole_grid_are_known(
    window: tuple[int, ...], dilation: int | tuple[int, ...], stride: int | tuple[int, ...],
    causal: bool | tuple[bool, ...],
) -> None:  # fmt: skip
    mask = Neighborhood((5, 4, 8), window, dilation, stride, causal)
    everything = (Span(0, 160),)
    assert mask.counted(160) == pairs(mask, 160, 2) == area(mask, everything, everything, 2)
    assert mask.counted(150) is None
    assert pairs(mask, 150, 2) == area(mask, (Span(0, 150),), (Span(0, 150),), 2) < pairs(mask, 160, 2)
