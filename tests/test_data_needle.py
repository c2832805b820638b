"""The needle: where it lies, what is asked, and that the haystack is real."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpora import same
from longspan.train.data.needle import MARKER, Needle
from longspan.train.data.sample import IGNORE, Dataset, Sample
from longspan.train.data.stdlib import Stdlib


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def a_needle(cache: Path, **settings: Any) -> Needle:
    chosen: dict[str, Any] = {"context": 256, "cache": cache} | settings
    return Needle(**chosen)


def needle_at(needle: Needle, sample: Sample) -> tuple[int, bytes]:
    """Where the marker first is, and the span behind it."""
    tokens = bytes(sample.tokens.astype(np.uint8))
    assert tokens.count(MARKER) == 2
    place = tokens.index(MARKER)
    return place, tokens[place + 2 : place + 26]


def test_needle_asks_for_the_span_at_the_end(shared_cache: Path) -> None:
    needle = a_needle(shared_cache)
    starts = []
    for part in (needle, needle.held_out()):
        for index in range(100):
            sample = part.sample(index)
            place, span = needle_at(needle, sample)
            starts.append(place)
            assert sample.offsets == (0,) and len(sample.tokens) == 256
            answer = np.flatnonzero(sample.labels != IGNORE)
            assert bytes(sample.labels[answer].astype(np.uint8)) == span
            assert span.isalnum() and span == span.upper() and len(set(span)) == 24
            assert bytes(sample.tokens[-26:].astype(np.uint8)) == MARKER + span
            assert answer.tolist() == list(range(256)[needle.answer(256)])
            assert sample.labels[:-1][answer].tolist() == sample.tokens[answer + 1].tolist()
            assert sample.previous.tolist() == [-1, *sample.tokens[:-1].tolist()]
    thirds = [sum(68 * i <= start < 68 * (i + 1) for start in starts) for i in range(3)]
    assert min(thirds) > 45 and max(starts) <= 204


def test_needle_is_deterministic_and_its_haystack_real(shared_cache: Path) -> None:
    needle, again = a_needle(shared_cache), a_needle(shared_cache)
    assert all(same(needle.sample(i), again.sample(i)) for i in (0, 7, 10**9))
    spans = {needle_at(needle, sample)[1] for sample in map(needle.sample, range(50))}
    spans |= {needle_at(needle, sample)[1] for sample in map(needle.held_out().sample, range(50))}
    other = a_needle(shared_cache, seed=1)
    spans |= {needle_at(other, sample)[1] for sample in map(other.sample, range(50))}
    assert len(spans) == 150
    source = Stdlib(context=4096, cache=shared_cache)
    for part, documents in ((needle, source), (needle.held_out(), source.held_out())):
        whole = b"".join(bytes(d.astype(np.uint8)) for d in documents.documents())
        place, _ = needle_at(needle, sample := part.sample(3))
        tokens = bytes(sample.tokens.astype(np.uint8))
        assert tokens[:place] + tokens[place + 26 : -26] in whole + whole[:256]
    with pytest.raises(IndexError, match="sample -1"):
        needle.sample(-1)


def test_needle_probe(shared_cache: Path) -> None:
    needle, other = a_needle(shared_cache, haystack_loss=True), a_needle(shared_cache, seed=3)
    for context in (256, 1000, 2_000_000):
        for depth in (0.0, 0.5, 1.0):
            sample = needle.probe(depth, context, 2)
            place, span = needle_at(needle, sample)
            assert len(sample.tokens) == context and abs(place / (context - 52) - depth) < 0.01
            assert bytes(sample.labels[sample.labels != IGNORE].astype(np.uint8)) == span
            assert same(sample, other.probe(depth, context, 2))
            assert span != needle_at(needle, needle.probe(depth, context, 3))[1]
            assert place <= 0.05 * context or depth > 0
    with pytest.raises(ValueError, match="depth=1.5"):
        needle.probe(1.5, 256, 0)


def test_needle_settings(shared_cache: Path) -> None:
    fixed = a_needle(shared_cache, depth=0.5)
    assert {needle_at(fixed, fixed.sample(i))[0] for i in range(9)} == {102}
    everywhere = a_needle(shared_cache, haystack_loss=True).sample(0)
    assert everywhere.labels.tolist() == [*everywhere.tokens[1:].tolist(), IGNORE]
    assert a_needle(shared_cache, context=256, curriculum=[[0, 128], [5, 512]]).context_at(5) == 256
    growing = a_needle(shared_cache, context=1024, curriculum=[[0, 128], [10, 512], [20, 1024]])
    for step, context in ((0, 128), (9, 128), (10, 512), (19, 512), (20, 1024), (999, 1024)):
        assert growing.context_at(step) == len(growing.sample(4, step).tokens) == context
    assert growing.context == len(growing.held_out().sample(4).tokens) == 1024
    assert len({needle_at(growing, growing.sample(4, step))[1] for step in (0, 10, 20)}) == 1
    json.dumps(growing.describe())
    used: Dataset = growing
    assert used.decode(used.encode("aé")) == "aé"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 51}, "data.context=51 must be a whole number of at least 52"),
        ({"span": 0}, "data.span=0"),
        ({"span": 37}, "data.span=37"),
        ({"depth": 1.5}, "data.depth=1.5"),
        ({"curriculum": [[5, 128]]}, r"data.curriculum=\[\[5, 128\]\]: steps must start at 0"),
        ({"curriculum": [[0, 128], [0, 256]]}, "steps must start at 0 and rise"),
        ({"curriculum": [[0]]}, r"data.curriculum=\[\[0\]\] must be pairs like"),
        ({"haystack_loss": "no"}, "data.haystack_loss='no' must be true or false"),
        ({"curriculum": [[0, 20]]}, "the context=20 must be a whole number of at least 52"),
    ],
)
def test_needle_wrong_settings_are_named(shared_cache: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        a_needle(shared_cache, **settings)
