"""Blocks chosen at run time: the reference and the cpu backend against plain attention, and what is refused.
The Triton kernels' part is in test_triton.py.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import AttentionOptions, Selection, Unsupported, attention, picked
from longspan.kernels.mask import Causal, Documents, Full, Mask, Window
from longspan.kernels.patterns import Strided
from longspan.kernels.span import Span, total
from longspan.kernels.tile import check_lists, chosen, listed
from oracle import LIMITS, At, cast, distance, gradients, inputs, partial, plain
from patterns import truth

AT: At = (Span(0, 45),), (Span(0, 45),)
CASES: list[tuple[Mask, tuple[int, int], tuple[int, int], tuple[int, int], At]] = [
    # mask, heads, block, rows and heads of the selection
    (Causal(), (4, 2), (16, 16), (2, 2), AT),
    (Window(9), (2, 2), (7, 12), (1, 1), AT),
    (Strided(8, 1, 4) & Causal(), (4, 2), (20, 9), (2, 1), AT),
    (Full(), (2, 2), (45, 5), (1, 2), AT),
    (Documents(((0, 13, 32), (0, 20, 40)), Causal()), (2, 2), (16, 16), (1, 2), AT),
    (Causal(), (2, 1), (8, 8), (2, 1), ((Span(30, 20), Span(3, 9)), (Span(1, 16, 1, 3),))),
]


def random(case: Any, seed: int = 0) -> Selection:
    _, _, size, shared, at = case
    blocks = (-(-total(x) // n) for x, n in zip(at, size, strict=True))
    generator = torch.Generator().manual_seed(seed)
    return Selection(torch.rand(*shared, *blocks, generator=generator) < 0.6, size)


def seen(case: Any, selection: Selection) -> Tensor:
    """bool [2, Hq, Nq, Nk], pair by pair."""
    mask, (hq, hk), size, _, at = case
    found = truth(mask, at[0], at[1], hk).expand(2, -1, -1, -1).clone()
    rows, heads = selection.chosen.shape[:2]
    picks = selection.chosen.tolist()
    hidden = [
        (b, h, i, j)
        for b, h, i, j in found.nonzero().tolist()
        if not picks[b % rows][h % heads][i // size[0]][j // size[1]]
    ]
    found[tuple(torch.tensor(hidden).T)] = False
    return found.repeat_interleave(hq // hk, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_only_chosen_blocks_are_seen(case: Any) -> None:
    mask, heads, _, _, at = case
    selection = random(case)
    given = inputs(total(at[0]), total(at[1]), heads, batch=2)
    right = seen(case, selection)

    def run(backend: Any) -> Any:
        return lambda q, k, v: attention(q, k, v, mask, *at, backend=backend, selection=selection)

    def definition(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return plain(q, k, v, right, AttentionOptions())

    want = [*partial(definition, given), *gradients(definition, given)]
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float64), ("cpu", torch.float32)):
        own = cast(given, dtype)
        found = [*partial(run(backend), own), *gradients(run(backend), own)]
        for i, (a, b) in enumerate(zip(found, want, strict=True)):
            assert torch.equal(a.isinf(), b.isinf())
            a, b = (x.masked_fill(x.isinf(), 0.0) for x in (a, b))
            assert distance(a, b) < LIMITS[dtype][i > 1], (backend, i)


def test_all_blocks_chosen_change_nothing_and_none_leave_nothing() -> None:
    q, k, v, *_ = inputs(45, 45)
    for share, right in ((1, attention(q, k, v, Causal(), *AT)[0]), (0, torch.zeros_like(q))):
        selection = Selection(torch.full((1, 1, 3, 3), bool(share)), (16, 16))
        found, lse = attention(q, k, v, Causal(), *AT, selection=selection)
        torch.testing.assert_close(found, right)
        assert lse is not None and bool(lse.isinf().all()) != bool(share)


def test_numbers_of_blocks_make_a_selection() -> None:
    index = torch.tensor([[[[0, 2], [1, -1], [7, 3]]]])
    assert picked(index, 3).int().tolist() == [[[[1, 0, 1], [0, 1, 0], [0, 0, 0]]]]


def test_a_selection_that_changes_before_the_backward_is_an_error() -> None:
    q, k, v, *_ = (x.requires_grad_() for x in inputs(45, 45))
    selection = Selection(torch.ones(1, 1, 3, 3, dtype=torch.bool), (16, 16))
    out, _ = attention(q, k, v, Causal(), *AT, selection=selection)
    selection.chosen[0, 0, 1] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_selections_that_do_not_fit_are_refused() -> None:
    q, k, v, *_ = inputs(45, 45, (4, 2))
    ones = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    for made, words in (
        (
            lambda: Selection(ones.float(), (16, 16)),
            r"float32 \(1, 1, 3, 3\); it must be bool",
        ),
        (lambda: Selection(ones[0], (16, 16)), r"it must be bool \[1 or batch"),
        (lambda: Selection(ones, (16, 0)), r"Selection.size is \(16, 0\); it must be a list of integers"),
        (lambda: Selection(ones, (16, 16, 2)), "it must be two, of queries and of keys"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=words):
            made()
    for shape in ((3, 1, 3, 3), (1, 4, 3, 3), (1, 1, 2, 3), (1, 1, 3, 4)):
        selection = Selection(torch.ones(shape, dtype=torch.bool), (16, 16))
        with pytest.raises(ValueError, match=r"Selection.chosen is .*\[1 or 1, 1 or 2, 3, 3\]"):
            attention(q, k, v, Causal(), *AT, selection=selection)
    with pytest.raises(Unsupported, match="'sdpa' takes no selection of blocks; backend='triton' does"):
        attention(q, k, v, Causal(), *AT, selection=Selection(ones, (16, 16)), backend="sdpa")


def test_no_list_leads_beyond_the_tensor() -> None:
    """A selector may call the tile that the end cuts full, or one full that it does not visit."""
    some = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    some[..., 0, 1] = False
    lists = chosen(some, torch.ones_like(some), tokens=45, size=16)
    assert listed(lists) == [(0, 0, True), (0, 2, False), (1, 0, True), (1, 1, True), (1, 2, False)]
    whole = chosen(some, torch.ones_like(some), tokens=48, size=16)
    assert [row for row in listed(whole) if not row[2]] == []
    with pytest.raises(ValueError, match="45 tokens are 6 tiles of 8, but some has 3"):
        chosen(some, some, tokens=45, size=8)
    with pytest.raises(ValueError, match="they must be bool"):
        chosen(some, some.int(), tokens=45, size=16)
    check_lists(lists, 2, 4, (20, 45), (16, 16))
    for batch, heads, tokens, size in (
        (2, 4, (33, 45), (16, 16)),
        (2, 4, (20, 49), (16, 16)),
        (2, 4, (20, 45), (16, 32)),
    ):
        with pytest.raises(ValueError, match="lists are of 1 rows, 1 heads, 2 x 3 tiles; they must be of"):
            check_lists(lists, batch, heads, tokens, size)
    for field, words in (("full", "lists.full is torch.int64"), ("index", "lists.index is torch.int64")):
        with pytest.raises(ValueError, match=words):
            check_lists(lists._replace(**{field: getattr(lists, field).long()}), 1, 1, (20, 45), (16, 16))


@pytest.mark.parametrize(
    ("index", "blocks", "words"),
    [
        (torch.zeros(1, 1, 2, 2), 4, "index is torch.float32"),
        (torch.zeros(1, 1, 2, dtype=torch.int64), 4, r"index is torch.int64 \(1, 1, 2\)"),
        (torch.zeros(1, 1, 2, 2, dtype=torch.int64), 0, "blocks is 0; it must be at least 1"),
    ],
)
def test_what_cannot_be_picked_is_refused(index: Tensor, blocks: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        picked(index, blocks)
