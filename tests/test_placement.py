"""Placements hold every token once, share the work evenly, and say how evenly."""

import time
from itertools import product

import pytest
import torch

from benchmarks.balance import packed
from longspan.kernels.heads import Heads, PerHead
from longspan.kernels.mask import Causal, Documents, Full, Mask, Window
from longspan.kernels.neighborhood import Frames, Neighborhood
from longspan.kernels.ordered import BrickByBrick
from longspan.kernels.patterns import Anchored, BlockPermutation, Shifted, Strided
from longspan.kernels.span import Span, Spans, total
from longspan.kernels.tile import area
from longspan.parallel.balance import InBricks, heads_of, shares
from longspan.parallel.bricks import bricked
from longspan.parallel.placement import Placement, auto, balanced, contiguous, named, zigzag

NAMES = ("contiguous", "zigzag", "striped", "balanced", "auto")
LONG = 2**17
S2 = Strided(64, 8, 16) & Causal()


@pytest.mark.parametrize("name", NAMES)
def test_placements_hold_every_token_once(name: str) -> None:
    masks = Causal(), Documents((0, 7, 30), inner=Causal()), Strided(4, 1, 4) & Causal(), Window(5, 5)
    for length, size, mask in product((0, 1, 5, 48, 61, 1000), (1, 2, 3, 8), masks):
        placement = named(name)(length, size, mask)
        at = [p for spans in placement.spans_by_rank for s in spans for p in s.positions().tolist()]
        assert sorted(at) == list(range(length)), (length, size, mask)
        assert placement.size == size


@pytest.mark.parametrize("size", [8, 32, 64])
def test_zigzag_is_even_under_a_causal_mask(size: int) -> None:
    assert zigzag(LONG, size).imbalance(Causal()) <= 1.01
    assert contiguous(LONG, size).imbalance(Causal()) > 1.8


@pytest.mark.parametrize(("size", "most"), [(8, 1.01), (32, 1.01), (64, 1.03)])
@pytest.mark.parametrize("mean", [450, 1300])
def test_balanced_is_even_under_packed_documents(mean: int, size: int, most: float) -> None:
    for seed in range(2):
        mask = packed(LONG, mean, seed)
        placement = balanced(LONG, size, mask)
        assert placement.imbalance(mask) <= most, seed
        assert zigzag(LONG, size).imbalance(mask) > 1.1
        assert {placement.tokens(r) for r in range(size)} == {LONG // size}
        assert all(s.start % 128 == s.length % 128 == 0 for spans in placement.spans_by_rank for s in spans)


def test_balanced_is_even_under_other_masks_too() -> None:
    star = Anchored(4096, 4096, LONG - 8192) & Causal()
    for mask, size in product((Causal(), star, Window(1023), S2), (8, 64)):
        assert balanced(LONG, size, mask).imbalance(mask) <= 1.01, (mask, size)


def test_balanced_is_fast() -> None:
    began = time.process_time()
    balanced(LONG, 64, packed(LONG, 450, seed=9))
    assert time.process_time() - began < 3


def test_balanced_counts_the_documents_of_every_row() -> None:
    """Each row has its long document elsewhere: one row alone would be balanced otherwise."""
    rows = Documents(((0, 3072, 3200, 3300), (0, 100, 200, 1024)), inner=Causal())
    first = Documents((0, 3072, 3200, 3300), inner=Causal())
    placement = balanced(4096, 4, rows)
    assert placement.imbalance(rows) <= 1.01 < placement.imbalance(first)


def test_balanced_parts_neighbours_only_where_it_must() -> None:
    """Windows are even as they are: what moves is what the first tokens lack."""
    placement = balanced(LONG, 8, Window(1023))
    assert sum(map(len, placement.spans_by_rank)) <= 24
    assert balanced(LONG, 8, Full()) == contiguous(LONG, 8)


@pytest.mark.parametrize(
    "mask", [Frames(64), Neighborhood((16, 8, 8), (9, 3, 3), causal=(True, False, False))]
)
def test_balanced_is_even_in_bricks(mask: Mask) -> None:
    """What the tokens cost is asked in the order in which they are dealt out."""
    bricks = (16, 8, 8), (4, 4, 4), (1, 1, 1)
    aware, blind = (bricked(balanced(1024, 4, asked), *bricks) for asked in (InBricks(mask, *bricks), mask))
    assert aware.imbalance(mask) <= 1.001 < 1.05 < blind.imbalance(mask)
    dealt = InBricks(mask, *bricks)
    assert balanced(1024, 4, dealt).work(dealt) == aware.work(mask)
    assert heads_of(InBricks(S2, *bricks)) == heads_of(S2) == 8
    assert heads_of(BrickByBrick(PerHead((Causal(), Window(5), Full())), *bricks[:2])) == 3


def test_uneven_numbers_of_chunks_differ_by_one() -> None:
    work = torch.randint(1, 1000, (101,), generator=torch.Generator().manual_seed(0))
    owners = shares(work, 7)
    counts = [owners.count(r) for r in range(7)]
    assert sum(counts) == 101 and max(counts) - min(counts) == 1
    loads = [sum(w for w, o in zip(work.tolist(), owners, strict=True) if o == r) for r in range(7)]
    assert max(loads) * 7 / sum(loads) <= 1.02
    assert owners == shares(work.clone(), 7)


def test_work_is_the_area_of_each_rank() -> None:
    whole: Spans = (Span(0, 1000),)
    for mask in (Causal(), packed(1000, 100), Strided(16, 1, 4) & Causal()):
        for name in NAMES:
            placement = named(name)(1000, 3, mask)
            wanted = tuple(area(mask, spans, whole, 4) for spans in placement.spans_by_rank)
            assert placement.work(mask, 4) == wanted, (name, mask)


def test_auto_takes_the_simplest_of_the_even_ones() -> None:
    assert auto(LONG, 8, Full()) == contiguous(LONG, 8) == auto(LONG, 8, Window(1023))
    assert auto(LONG, 8, Causal()) == zigzag(LONG, 8) == auto(LONG, 8, S2)
    mask = packed(LONG, 1300)
    assert auto(LONG, 8, mask) == balanced(LONG, 8, mask)


def test_heads_that_stand_for_all() -> None:
    each: list[tuple[Mask, int]] = [
        (Causal(), 1),
        (S2, 8),
        (Strided(64, 1, 4), 4),
        (S2.heads([0, 3, 5], 16), 3),
        (PerHead((Causal(), Window(5), Full())) & S2, 3),
        (Documents((0, 9), Shifted(8, (0, 2, 4, 6))), 4),
        (Heads(1, 2) | Window(3), 3),
        (BlockPermutation(8, 4), 8),
    ]
    for mask, heads in each:
        assert heads_of(mask) == heads, mask
        assert balanced(31, 2, mask).imbalance(mask) >= 1


def test_bad_input_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match="parallel.layout.placement is 'zigzga'; it can be contiguous, zigzag, striped, balanced, auto",
    ):
        named("zigzga")
    with pytest.raises(ValueError, match="hold 3 tokens, but the sequence has 4"):
        Placement(4, ((Span(0, 3),),))


@pytest.mark.parametrize(
    ("spans", "missing"),
    [
        # as many tokens as there should be, but one is held twice, or lies beyond the end
        (((Span(0, 3),), (Span(2, 2),)), 4),
        (((Span(1, 3),), (Span(1, 1),)), 0),
        (((Span(0, 2),), (Span(3, 2),)), 2),
        (((Span(0, 2, run=1, step=2),), (Span(2, 2, run=1, step=2),)), 1),
        (((Span(0, 4, run=2, step=4),), (Span(3, 4, run=2, step=4),)), 2),
    ],
)
def test_a_placement_holds_each_position_once(spans: tuple[Spans, ...], missing: int) -> None:
    with pytest.raises(ValueError, match=f"none holds position {missing}, so that another is held twice"):
        Placement(sum(map(total, spans)), spans)


def test_placements_of_a_million_tokens_on_many_ranks_are_checked_fast() -> None:
    for name in ("contiguous", "zigzag", "striped"):
        placement = named(name)(2**20, 1024, Causal())
        began = time.process_time()
        Placement(2**20, placement.spans_by_rank)
        assert time.process_time() - began < 1, name
