"""Tiles: none is wrongly empty or full, the lists hold what the classification says, the area is exact."""

from random import Random

import pytest
import torch
from torch import Tensor

from longspan.kernels import cells, tile
from longspan.kernels.cells import held
from longspan.kernels.heads import PerHead
from longspan.kernels.lower import lower
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Range, Window
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.patterns import Anchored, Shifted, Strided
from longspan.kernels.span import Span, Spans, bounds, total
from longspan.kernels.tile import Tiles, area, chosen, classify, listed, needed, pairs, tiles
from masks import Phase, matrix, random_mask, random_spans
from patterns import truth as meant

CPU = torch.device("cpu")
KV_HEADS = 2
PLACEMENTS: dict[str, Spans] = {
    "contiguous": (Span(20, 20),),
    "zigzag": (Span(10, 10), Span(50, 10)),
    "striped": (Span(1, 20, 1, 3),),
}


def truth(mask: Mask, q: Spans, k: Spans) -> Tensor:
    """bool [mask rows, kv heads, queries, keys]."""
    heads = [
        [matrix(mask, q, k, head=head, row=row) for head in range(KV_HEADS)] for row in range(mask.batch())
    ]
    return torch.stack([torch.stack(x) for x in heads])


def tiled(seen: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Whether any and whether every pair of each tile is visible."""
    rows = [x.split(size[1], -1) for x in seen.split(size[0], -2)]
    some, every = (
        torch.stack([torch.stack([f(x.flatten(-2)) for x in row], -1) for row in rows], -2)
        for f in (lambda x: x.any(-1), lambda x: x.all(-1))
    )
    return some, every


def check_classification(mask: Mask, q: Spans, k: Spans, size: tuple[int, int]) -> None:
    some, every = classify(mask, Range(*bounds(q, size[0])), Range(*bounds(k, size[1])), KV_HEADS)
    really_some, really_every = tiled(truth(mask, q, k), size)
    assert not (really_some & ~some).any(), f"{mask}: a tile called empty holds work"
    assert not (every & ~really_every).any(), f"{mask}: a tile called full is not"
    assert not (every & ~some).any()


@pytest.mark.parametrize("seed", range(40))
def test_no_tile_is_wrongly_empty_or_full(seed: int) -> None:
    draw = Random(seed)
    mask = random_mask(draw, 60, batch=draw.choice([1, 2]))
    if draw.random() < 0.3:
        mask = mask.heads(draw.choices(range(4), k=KV_HEADS), of=4)
    size = draw.choice([(4, 4), (7, 3), (5, 16)])
    check_classification(mask, random_spans(draw, 60), random_spans(draw, 60), size)


MASKS = [
    Causal(),
    Window(12),
    Window(6, 3),
    First(23),
    Documents((0, 13, 32, 51), Causal()),
    Documents((0, 13, 32, 51), First(2) | Window(4)),
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("at_q", PLACEMENTS)
@pytest.mark.parametrize("at_k", PLACEMENTS)
def test_no_tile_is_wrong_under_any_placement(mask: Mask, at_q: str, at_k: str) -> None:
    for size in ((4, 4), (5, 3)):
        check_classification(mask, PLACEMENTS[at_q], PLACEMENTS[at_k], size)


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(12), Window(5, 9), First(23)], ids=str)
def test_on_contiguous_tokens_leaves_are_classified_exactly(mask: Mask) -> None:
    """Where a tile's positions have no holes, partial is said of tiles that are partial only."""
    q, k = (Span(16, 32),), (Span(3, 40),)
    found = classify(mask, Range(*bounds(q, 4)), Range(*bounds(k, 4)), KV_HEADS)
    for said, real in zip(found, tiled(truth(mask, q, k), (4, 4)), strict=True):
        assert torch.equal(said.expand(real.shape), real)


@pytest.mark.parametrize("at", [(Span(0, 64),), (Span(64, 64),), (Span(8, 32), Span(88, 32))], ids=str)
def test_causal_is_partial_on_the_diagonal_only(at: Spans) -> None:
    lists = tiles(Causal(), at, at, KV_HEADS, size=(8, 8), transpose=False, device=CPU)
    partial = [(row, column) for row, column, full in listed(lists) if not full]
    assert partial == [(i, i) for i in range(8)]
    assert len(listed(lists)) == 8 * 9 // 2


def decoded(lists: Tiles) -> tuple[Tensor, Tensor]:
    """(some, every) again, from the lists."""
    some = torch.zeros(len(lists.full), lists.columns, dtype=torch.bool)
    every = some.clone()
    for row, column, full in listed(lists):
        assert not some[row, column], "listed twice"
        some[row, column], every[row, column] = True, full
    shape = lists.batch, lists.heads, lists.rows, lists.columns
    return some.view(shape), every.view(shape)


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_lists_hold_what_the_classification_says(seed: int, transpose: bool) -> None:
    draw = Random(seed)
    mask, size = random_mask(draw, 60, batch=draw.choice([1, 2])), draw.choice([(4, 4), (7, 3)])
    q, k = random_spans(draw, 60), random_spans(draw, 60)
    some, every = classify(mask, held(q, size[0], CPU), held(k, size[1], CPU), KV_HEADS)
    every = every.clone()
    # a tile that the end of the columns cuts is not full
    if transpose and total(q) % size[0]:
        every[..., -1, :] = False
    if not transpose and total(k) % size[1]:
        every[..., -1] = False
    lists = tiles(mask, q, k, KV_HEADS, size=size, transpose=transpose, device=CPU)
    for found, right in zip(decoded(lists), (some, every), strict=True):
        right = right.mT if transpose else right
        assert torch.equal(found, right)
    check_order(lists)


def check_order(lists: Tiles) -> None:
    count = (lists.full + lists.partial).diff().flatten()
    assert sorted(lists.order.tolist()) == list(range(len(count)))
    assert (count[lists.order.long()].diff() <= 0).all(), "longest rows come first"
    assert {x.dtype for x in (lists.full, lists.partial, lists.index, lists.order)} == {torch.int32}


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("height", [1, 3, 4])
def test_cells_of_any_height_make_the_same_lists(
    monkeypatch: pytest.MonkeyPatch, transpose: bool, height: int
) -> None:
    """Tiles are judged some rows at a time, which must not show."""
    at = (Span(0, 60),)
    for mask in (Causal(), Phase(5) & Window(9), Documents(((0, 9, 31), (0, 40, 60)), Causal()) | Phase(7)):
        for size in ((4, 5), (7, 4)):
            made = []
            for tiles_in_a_cell in (64, height):
                monkeypatch.setattr(cells, "HEIGHT", tiles_in_a_cell)
                made.append(
                    tiles.__wrapped__(mask, at, at, KV_HEADS, size=size, transpose=transpose, device=CPU)
                )
            assert sorted(listed(made[0])) == sorted(listed(made[1]))
            check_order(made[1])


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize(
    "mask",
    [
        Strided(4, 1, 3) & Causal(),
        Strided(7, 0, 2),
        Anchored(8, 9, 50) & Causal(),
        Shifted(10, (0, 5)),
        Neighborhood((6, 10), (3, 5), stride=(1, 2)),
        Neighborhood((60,), 9, dilation=2, causal=True),
    ],
    ids=str,
)
def test_blocks_of_rows_hold_all_work_and_call_none_full(
    monkeypatch: pytest.MonkeyPatch, mask: Mask, transpose: bool
) -> None:
    """Lists made of several blocks of query tiles, whatever their height, against every pair."""
    at = (Span(0, 60),)
    real = meant(mask, at, at, KV_HEADS)
    for height, size in ((1, (4, 5)), (3, (4, 5)), (2, (7, 4))):
        monkeypatch.setattr(cells, "HEIGHT", height)
        lists = tiles.__wrapped__(mask, at, at, KV_HEADS, size=size, transpose=transpose, device=CPU)
        some, every = (x.mT if transpose else x for x in decoded(lists))
        really_some, really_every = tiled(real, size)
        assert not (really_some & ~some).any() and not (every & ~really_every).any()
        check_order(lists)


@pytest.mark.parametrize("transpose", [False, True])
def test_heads_that_see_the_same_share_their_lists(transpose: bool) -> None:
    at = (Span(0, 61),)
    one, two = Phase(5) & Window(30), Window(3) | First(9)
    many = PerHead((Strided(4, 1, 2), two, two, Strided(4, 1, 2), two))
    for mask, heads, kinds in (
        (many, 5, 3),
        (many.heads((4, 1, 2), 5), 3, 1),
        (one.heads((1, 0, 1), 2), 3, 2),
    ):
        lists, some, every = (
            tiles(mask, at, at, heads, size=(4, 4), transpose=transpose, device=CPU),
            *classify(mask, held(at, 4, CPU), held(at, 4, CPU), heads),
        )
        every = every.clone()
        every[..., -1, :] &= not transpose
        every[..., -1] &= transpose
        for found, right in zip(decoded(lists), (some, every), strict=True):
            assert torch.equal(found, right.mT if transpose else right)
        check_order(lists)
        ranges = torch.cat((lists.full, lists.partial), 1).view(heads, -1)
        assert len(ranges.unique(dim=0)) == kinds


def test_lists_of_neighbours_take_no_memory() -> None:
    at = (Span(0, 640),)
    for mask in (Full(), Causal(), Causal() & First(77)):
        for transpose in (False, True):
            lists = tiles(mask, at, at, KV_HEADS, size=(4, 4), transpose=transpose, device=CPU)
            assert len(lists.index) == lists.columns == 160


def test_lists_made_at_run_time() -> None:
    some = torch.tensor([[[[1, 0, 1], [0, 0, 0]], [[1, 1, 1], [0, 1, 0]]]]).bool()
    every = torch.tensor([[[[0, 0, 1], [0, 0, 0]], [[1, 0, 1], [0, 0, 0]]]]).bool()
    lists = chosen(some, every, tokens=9, size=3)
    assert listed(lists) == [
        *((0, 2, True), (0, 0, False)),
        *((2, 0, True), (2, 2, True), (2, 1, False)),
        (3, 1, False),
    ]
    assert lists[:4] == (1, 2, 2, 3) and lists.order.tolist() == [2, 0, 3, 1]


def test_lists_without_tokens_are_empty() -> None:
    some = (Span(0, 9),)
    for q, k in (((), some), (some, ()), ((), ())):
        for transpose in (False, True):
            lists = tiles(Causal(), q, k, 1, size=(4, 4), transpose=transpose, device=CPU)
            assert listed(lists) == [] and lists.full.sum() == lists.partial.sum() == 0
    assert area(Causal(), (), some, 1) == 0 and not needed(Causal(), some, (), 1)


@pytest.mark.parametrize("seed", range(25))
def test_area_counts_visible_pairs(seed: int) -> None:
    draw = Random(seed)
    mask = random_mask(draw, 60, batch=draw.choice([1, 2]))
    q, k = random_spans(draw, 60), random_spans(draw, 60)
    seen = truth(mask, q, k)
    assert area(mask, q, k, KV_HEADS, tile=8) == int(seen.sum()) // KV_HEADS
    assert needed(mask, q, k, KV_HEADS, tile=8) or not seen.any()


@pytest.mark.parametrize("length", [1, 12, 40, 41, 60])
def test_pairs_counts_a_whole_sequence(length: int) -> None:
    rows = ((0, 12, 12, 41), (0, 40, 60, 60))
    for mask in (
        Causal(),
        Window(7),
        Documents(rows),
        Documents(rows, Causal()),
        Documents(rows[0], Window(3, 3)),
        # each row has its own inner mask
        Documents(rows, Documents(((0, 5), (0, 9)), Causal())),
        Documents(rows[0], Documents(((0, 5), (0, 9)))),
    ):
        whole = (Span(0, length),)
        assert pairs(mask, length, KV_HEADS) == int(truth(mask, whole, whole)[:, 0].sum()), mask


def test_needed_is_false_where_a_hop_has_nothing_to_see() -> None:
    early, late = (Span(0, 500),), (Span(500, 500),)
    assert needed(Causal(), late, early, 1) and not needed(Causal(), early, late, 1)
    assert not needed(Causal() & Window(100), (Span(900, 50),), early, 1)
    assert not needed(Documents((0, 500)), late, early, 1)


@pytest.mark.parametrize("seed", range(10))
def test_seen_is_the_predicate_on_that_tile(seed: int) -> None:
    draw = Random(seed)
    mask, size = random_mask(draw, 40, batch=2), (6, 9)
    q, k = random_spans(draw, 40), random_spans(draw, 40)
    low = lower(mask, q, k, KV_HEADS, CPU)
    lists = tiles(mask, q, k, KV_HEADS, size=size, transpose=False, device=CPU)
    whole = truth(mask, q, k)
    for row, column, _ in listed(lists):
        group, i = divmod(row, lists.rows)
        own = whole[group // lists.heads, group % lists.heads]
        own = own[i * size[0] : (i + 1) * size[0], column * size[1] : (column + 1) * size[1]]
        rows = slice(i * size[0], (i + 1) * size[0])
        keys = torch.arange(column * size[1], min((column + 1) * size[1], total(k)))
        assert torch.equal(tile.seen(low, group, lists.heads, q=rows, k=keys), own)
    assert whole.shape[2:] == (total(q), total(k))
