"""Windows side by side and masks brick by brick: by hand, what is refused, other grids, and coverage."""

from collections import Counter
from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch

from longspan.kernels.attention import attention
from longspan.kernels.cells import held
from longspan.kernels.heads import PerHead
from longspan.kernels.layers import PerLayer, _at_layers, layered
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, Full, Mask, Window
from longspan.kernels.neighborhood import brick_order, row_major
from longspan.kernels.ordered import BrickByBrick, Windows
from longspan.kernels.patterns import Anchored, Strided
from longspan.kernels.span import Span, positions
from longspan.kernels.steps import steps
from longspan.kernels.tile import area, classify, needed, pairs
from longspan.models.grids import check_grid, on_grid, regridded
from patterns import line
from test_layers import composed, sees_all

GRID, BRICK = (4, 6, 5), (2, 3, 2)
WHOLE = (Span(0, 120),)
CPU = torch.device("cpu")


def test_windows_by_hand() -> None:
    rows = [line(Windows((2, 4), (1, 2), (0, shift)), 1, 8) for shift in (0, 1)]
    assert rows == ["11000000", "01100000"]
    # a window that the edge cuts
    assert line(Windows((2, 4), (1, 2), (0, 1)), 0, 8) == "10000000"
    assert line(Windows((4, 4), 2), 5, 16) == "1100110000000000"
    assert line(Windows((4, 4), 2, 1), 5, 16) == "0000011001100000"


def test_every_second_layer_joins_what_the_others_keep_apart() -> None:
    apart = layered(PerLayer(Windows((6,), 2), Windows((6,), 2, 1), 2), 2, 1)
    seen = [torch.tensor([[c == "1" for c in line(mask, q, 6)] for q in range(6)]) for mask in apart]
    again = (seen[1].int() @ seen[0].int()).bool()
    assert again[2].tolist() == [True, True, True, True, False, False]


def test_bricks_by_hand() -> None:
    # 2 x 4 in bricks of 2 x 2: positions 0 1 4 5 2 3 6 7
    near = BrickByBrick(Window(0, 1), (2, 4), (2, 2))
    assert [line(near, q, 8) for q in (1, 5, 7)] == ["01001000", "00100100", "00000001"]


@pytest.mark.parametrize(
    "inner", [Strided(12, 1, 4), Anchored(12, 12, 90), Causal(), Strided(12, 1, 4) & Window(30)], ids=str
)
def test_attention_is_that_of_the_tokens_put_in_order(inner: Mask) -> None:
    """Values and gradients, in float64."""
    order = brick_order(GRID, BRICK)
    at, back = positions(order), row_major(order)
    q, k, v = (torch.randn(1, 120, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3))
    ours = attention(q, k, v, BrickByBrick(inner, GRID, BRICK), WHOLE, WHOLE)[0]
    theirs = attention(q[:, at], k[:, at], v[:, at], inner, WHOLE, WHOLE)[0][:, back]
    up = torch.randn_like(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x, (q, k, v), up) for x in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_tokens_held_brick_by_brick_make_the_tiles_of_the_sequence() -> None:
    """As many partial tiles as the inner mask over a sequence; far more where tokens stand row by row."""
    inner = Strided(12, 1, 4)
    mask, order = BrickByBrick(inner, GRID, BRICK), brick_order(GRID, BRICK)

    def partial(mask: Mask, at: Any) -> int:
        both = held(at, 12, CPU)
        some, every = classify(mask, both, both, 4)
        return int((some & ~every).sum())

    assert partial(mask, order) == partial(inner, WHOLE) == 0 < partial(mask, WHOLE)
    assert area(mask, order, order, 4) == area(mask, WHOLE, WHOLE, 4) == pairs(inner, 120, 4)


def bricks(stride: int, offset: int = 0, brick: tuple[int, ...] = BRICK) -> Mask:
    return BrickByBrick(Strided(12, 1, stride, offset=offset), GRID, brick)


@pytest.mark.parametrize(
    ("mask", "layers", "kv_heads"),
    [
        (bricks(4), 1, 4),
        (bricks(2).heads((0, 1), 2), 1, 2),
        (bricks(4) & Causal(), 1, 4),
        (bricks(4) | Window(3, 3), 1, 4),
        (PerHead((bricks(4),) * 4), 1, 4),
        (Documents((0, 9), bricks(4)), 1, 4),
        (BrickByBrick(bricks(4), GRID, (4, 6, 1)), 1, 4),
        (PerLayer(bricks(4), Windows(GRID, 3), 2), 2, 4),
        ([bricks(2, o) for o in (0, 1)], 2, 1),
        # each order by itself
        ([bricks(2, o, b) for b in (BRICK, (4, 2, 1)) for o in (0, 1)], 4, 1),
        (PerLayer(bricks(4), Strided(12, 1, 4), 2), 2, 4),
        # full attention in any layer sees all
        ([bricks(4), Full()], 2, 1),
    ],
)  # fmt: skip
def test_blocks_of_bricks_that_cover_are_taken(mask: Any, layers: int, kv_heads: int) -> None:
    assert len(layered(mask, layers, kv_heads)) == layers


@pytest.mark.parametrize(
    ("mask", "layers", "kv_heads", "said"),
    [
        (bricks(16).heads((0, 1), 2), 1, 2, "14 of every 16 blocks unseen; stride=2"),
        ([bricks(4), bricks(4)], 2, 1, "3 of every 4 blocks unseen"),
        (bricks(8) & Causal(), 1, 4, "4 of every 8 blocks unseen; stride=4"),
        (PerLayer(bricks(8), Windows(GRID, 3), 2), 2, 4, "4 of 4 kv heads in 1 layers leave 4 of every 8"),
        ([bricks(2, 0), bricks(2, 1, (4, 2, 1))], 2, 1, "1 of every 2 blocks unseen"),
        # one order covers, the other does not
        (PerLayer(bricks(4), Strided(12, 1, 8), 2), 2, 4, "4 of every 8 blocks unseen"),
        # what both let through of blocks in two orders is not known
        (bricks(4) & Strided(12, 1, 4), 1, 4, "4 of every 4 blocks unseen"),
    ],
)  # fmt: skip
def test_blocks_of_bricks_that_do_not_cover_are_refused(
    mask: Any, layers: int, kv_heads: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        layered(mask, layers, kv_heads)


def test_what_is_taken_is_seen_in_any_composition() -> None:
    """And all that is seen is taken, where there is one order."""
    turn, grid, found = Random(3), (6, 12), Counter[tuple[bool, bool]]()

    def bricked(brick: tuple[int, int]) -> Mask:
        return BrickByBrick(composed(turn, 1), grid, brick)

    for i in range(160):
        alone = i % 2 == 0
        a, b = bricked((2, 3)), bricked((2, 3) if alone else (3, 4))
        mask = (a, a & b, a | b, PerHead((a, b)), a.heads((0, 1), 2), PerLayer(a, b, 2), a & Full())[i % 7]
        if not alone and i % 3 == 0:
            mask = PerLayer(mask, composed(turn, 1), 2) if i % 7 != 4 else mask
        try:
            taken = len(layered(mask, 2, 2)) == 2
        except ValueError:
            taken = False
        seen = sees_all(_at_layers(mask, 2, 2))
        assert seen == taken if alone else seen or not taken, mask
        found[alone, taken] += 1
    assert len(found) == 4 and min(found.values()) > 5


def test_pairs_are_those_of_the_tokens_in_order() -> None:
    inner = Strided(12, 1, 4) & Window(30)
    assert pairs(BrickByBrick(inner, GRID, BRICK), 120, 4) == pairs(inner, 120, 4)
    # a part of the grid
    some, part = (Span(0, 50),), BrickByBrick(Window(3, 0), GRID, BRICK)
    assert pairs(part, 50, 1) == visible(lower(part, some, some, 1, CPU)).sum() < pairs(Window(3, 0), 50, 1)


def test_bricks_cut_no_tiles_of_the_cpu_operator() -> None:
    """Where documents end tiles end, but not at each edge of a brick."""
    grid, at = (32, 32), (Span(0, 1024),)
    rows = {step.rows.start for step in steps(BrickByBrick(Causal(), grid, 4), at, at, kv_heads=1)}
    assert rows <= set(range(0, 1024, 128))
    packed = Documents((0, 300), BrickByBrick(Causal(), grid, 4))
    assert 300 in {step.rows.start for step in steps(packed, at, at, kv_heads=1)}


def test_they_are_about_a_grid_and_change_with_it() -> None:
    for mask in (Windows(GRID, 3, 1), BrickByBrick(Causal(), GRID, BRICK)):
        assert on_grid(Documents((0, 7), mask) | Causal())
        check_grid(mask, GRID)
        with pytest.raises(ValueError, match="set mask.grid to it"):
            check_grid(mask, (4, 5, 6))
    assert regridded(Windows(GRID, (2, 6, 5), (1, 5, 0)), GRID, (4, 3, 9)) == Windows(
        (4, 3, 9), (2, 3, 5), (1, 0, 0)
    )
    near = BrickByBrick(Windows(GRID, 3), GRID, BRICK)
    assert regridded(near, GRID, (8, 8, 8)) == BrickByBrick(Windows((8, 8, 8), 3), (8, 8, 8), BRICK)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Windows((4, 4), 5), "window 5, shift 0 on an axis of 4; it must be 0 <= shift < window"),
        (lambda: Windows((4, 4), 2, (0, 2)), "window 2, shift 2 on an axis of 4"),
        (lambda: Windows((4, 4), (2,)), r"Windows.window is \(2,\); it must be an integer, or one for each"),
        (lambda: Windows((4, 4, 4, 4), 2), r"Windows.grid is \(4, 4, 4, 4\)"),
        (lambda: Windows("a", 2), "Windows.grid is"),  # type: ignore[arg-type]
        (lambda: BrickByBrick(Causal(), (4, 4), 0), r"BrickByBrick.brick is \(0, 0\)"),
        (lambda: BrickByBrick(Causal(), (0, 4), 2), r"BrickByBrick.grid is \(0, 4\)"),
        (lambda: BrickByBrick(None, (4, 4), 2), "BrickByBrick.inner is None; it must be a mask"),  # type: ignore[arg-type]
        (lambda: Windows((2, 2**30), 2), "fewer than 1073741824 positions"),
        (lambda: needed(BrickByBrick(Causal(), (4, 4), 2), (Span(0, 17),), WHOLE, 1), "asked for 16"),
        (lambda: line(Windows((4, 4), 2), 3, 17), "16"),
        (lambda: line(BrickByBrick(Causal(), (4, 4), 2), 3, 17), "16"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()
