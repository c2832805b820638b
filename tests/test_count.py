"""Counts of visible pairs hold against the mask written out as a matrix."""

from random import Random

import pytest
import torch
from torch import Tensor

import masks
from longspan.kernels.count import keys_per_query, keys_seen
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.patterns import Anchored, Shifted, Strided
from longspan.kernels.span import Span, Spans, total
from longspan.kernels.tile import area

CPU = torch.device("cpu")
LENGTH = 300
ROWS = (0, 5, 70, 71, 200), (0, 130, 260, 300, 300)
EACH: list[Mask] = [
    Full(),
    Causal(),
    Window(70, 3),
    Causal() & (Window(20) | First(4)),
    Documents(ROWS, inner=Causal()),
    Documents(ROWS[0], inner=Strided(16, 1, 4) & Causal()),
    Strided(64, 1, 3) & Causal(),
    Strided(1, 0, 4),
    Anchored(32, 32, 250) & Causal(),
    Shifted(50, (0, 25)),
    Neighborhood((3, 10, 10), (3, 4, 4)),
    (Strided(10, 1, 5) & Causal()).heads([2, 0, 2], 5),
]


def dense(mask: Mask, at_q: Spans, at_k: Spans, kv_heads: int) -> Tensor:
    """bool [mask rows, kv heads or 1, queries, keys]."""
    heads = kv_heads if mask.per_head else 1
    found = visible(lower(mask, at_q, at_k, kv_heads, CPU))
    return found.expand(mask.batch(), kv_heads, total(at_q), total(at_k))[:, :heads]


@pytest.mark.parametrize("mask", EACH, ids=str)
def test_counts_equal_the_matrix(mask: Mask) -> None:
    draw = Random(3)
    for _ in range(6):
        q, k = (masks.random_spans(draw, LENGTH) for _ in range(2))
        seen = dense(mask, q, k, 3)
        assert torch.equal(keys_per_query(mask, q, k, 3), seen.sum((0, 1, 3)))
        assert torch.equal(keys_seen(mask, q, k, 3), seen.any(2))


def test_random_compositions_are_counted() -> None:
    draw, at = Random(0), (Span(0, 200),)
    for _ in range(40):
        mask = masks.random_mask(draw, 200, batch=2)
        seen = dense(mask, at, at, 2)
        assert torch.equal(keys_per_query(mask, at, at, 2), seen.sum((0, 1, 3))), mask
        assert torch.equal(keys_seen(mask, at, at, 2), seen.any(2)), mask


def test_counts_add_up_to_the_area() -> None:
    at = (Span(0, 1000),)
    for mask in (Causal(), Documents((0, 300, 301), Causal()), Strided(64, 2, 4) & Causal()):
        heads = 4 if mask.per_head else 1
        assert int(keys_per_query(mask, at, at, 4).sum()) // heads == area(mask, at, at, 4)


def test_without_tokens_nothing_is_seen() -> None:
    some = (Span(0, 3),)
    assert keys_per_query(Causal(), (), some, 2).tolist() == []
    assert keys_per_query(Causal(), some, (), 2).tolist() == [0, 0, 0]
    assert keys_seen(Strided(2, 1, 2), (), some, 2).tolist() == [[[False] * 3] * 2]


def test_many_partial_tiles_are_estimated() -> None:
    """Every tile of these holds visible and hidden pairs."""
    at = (Span(0, 2048),)
    frames = Neighborhood((2, 32, 32), (2, 16, 16), causal=(True, False, False))
    for mask in ((Window(63) | Strided(1, 0, 4)) & Causal(), frames & Causal()):
        exact = keys_per_query(mask, at, at, 4)
        rough = keys_per_query(mask, at, at, 4, most=2**18)
        assert not torch.equal(exact, rough)
        chunks, about = (x.view(-1, 128).sum(1) for x in (exact, rough))
        assert ((chunks - about).abs() <= 0.03 * chunks).all()
        assert abs(int(about.sum()) / int(chunks.sum()) - 1) <= 0.01
