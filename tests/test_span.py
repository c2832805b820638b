"""Spans: what positions they hold, in which order, and how they are cut."""

from random import Random
from typing import Any

import numpy as np
import pytest
import torch

from longspan.kernels.span import Span, bounds, compress, cut, positions, total
from masks import listed, random_spans

HELD = {
    Span(8, 4): [8, 9, 10, 11],
    Span(1, 4, run=1, step=3): [1, 4, 7, 10],
    Span(0, 4, run=2, step=6): [0, 1, 6, 7],
    Span(5, 5, run=2, step=3): [5, 6, 8, 9, 11],
    Span(2, 3, run=4, step=9): [2, 3, 4],
    Span(2, 5, run=3, step=3): [2, 3, 4, 5, 6],
    Span(7, 0): [],
    Span(7, 0, run=2, step=4): [],
}


@pytest.mark.parametrize("span", HELD, ids=str)
def test_a_span_holds_its_runs(span: Span) -> None:
    held = HELD[span]
    assert span.positions().tolist() == held
    assert span.positions().dtype == torch.int64
    assert [span.at(i) for i in range(span.length)] == held
    assert span.last == (held[-1] if held else span.start - 1)
    assert span.contiguous == (held == list(range(span.start, span.start + span.length)))


def test_spans_are_held_in_their_order() -> None:
    spans = (Span(6, 2), Span(0, 2), Span(3, 2, 1, 9))
    assert positions(spans).tolist() == [6, 7, 0, 1, 3, 12]
    assert total(spans) == 6
    assert positions(()).tolist() == [] and total(()) == 0


BAD = [
    (dict(start=0, length=4, run=2), "give both run and step, or neither"),
    (dict(start=0, length=4, step=2), "give both run and step, or neither"),
    (dict(start=-1, length=4), "start and length must be at least 0"),
    (dict(start=0, length=-4), "start and length must be at least 0"),
    (dict(start=0, length=4, run=0, step=2), "needs 1 <= run <= step"),
    (dict(start=0, length=4, run=3, step=2), "needs 1 <= run <= step"),
    (dict(start=0.5, length=4), "positions are integers"),
    (dict(start=0, length=4.0), "positions are integers"),
    (dict(start=2**30 - 3, length=4), f"ends at position {2**30}; positions must be below {2**30}"),
    (dict(start=0, length=3, run=1, step=2**29), f"positions must be below {2**30}"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_a_span_that_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        Span(**arguments)
    # the message shows the values
    assert all(f"{name}={value}" in str(refused.value) for name, value in arguments.items())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("tile", [1, 4, 7, 100])
def test_bounds_are_least_and_greatest_of_each_tile(seed: int, tile: int) -> None:
    spans = random_spans(Random(seed), 40)
    at = listed(spans)
    pieces = [at[i : i + tile] for i in range(0, len(at), tile)]
    low, high = bounds(spans, tile)
    assert low.tolist() == [min(x) for x in pieces]
    assert high.tolist() == [max(x) for x in pieces]


def test_integers_of_numpy_are_integers() -> None:
    span = Span(np.int64(2), np.int32(4), torch.tensor(1), np.int64(3))  # type: ignore[arg-type]
    assert span == Span(2, 4, 1, 3) and repr(span) == repr(Span(2, 4, 1, 3)) and Span(2**30 - 1, 1).last


def test_no_token_has_no_bounds() -> None:
    assert [len(x) for x in bounds((), 8)] == [0, 0]


@pytest.mark.parametrize("seed", range(12))
def test_cut_holds_the_same_slice(seed: int) -> None:
    draw = Random(seed)
    spans = random_spans(draw, 48)
    at = listed(spans)
    for _ in range(20):
        start, stop = sorted(draw.choices(range(len(at) + 3), k=2))
        assert listed(cut(spans, start, stop)) == at[start:stop]
        assert positions(cut(spans, start, stop)).tolist() == at[start:stop]
    assert cut(spans, 3, 3) == ()


def test_cut_inside_a_run_keeps_the_runs_behind_it() -> None:
    span = Span(2, 9, run=4, step=10)
    held = [2, 3, 4, 5, 12, 13, 14, 15, 22]
    for start in range(10):
        for stop in range(start, 10):
            assert listed(cut((span,), start, stop)) == held[start:stop]


def test_compress_holds_the_same_positions_in_few_spans() -> None:
    assert compress(torch.tensor([3, 4, 5, 9, 10, 2])) == (Span(3, 3), Span(9, 2), Span(2, 1))
    assert compress(torch.empty(0, dtype=torch.int64)) == ()
