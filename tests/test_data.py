"""Data: how documents are cut, packed and labelled, and in which order the samples come."""

import inspect
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf

from corpora import runs, same, text, write_documents
from longspan.train.data.needle import Needle
from longspan.train.data.pack import best_fit, cut, group
from longspan.train.data.packed import Packed, permutation
from longspan.train.data.sample import IGNORE, Dataset
from longspan.train.data.stdlib import Stdlib, files
from longspan.train.data.text import Text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "corpus")


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


CONF = Path(__file__).resolve().parents[1] / "conf" / "data"


def naive_pieces(data: Packed) -> Counter[tuple[tuple[int, ...], ...]]:
    """Every piece as (tokens, labels, previous), cut by hand, one token at a time."""
    found: Counter[tuple[tuple[int, ...], ...]] = Counter()
    for document in data.documents():
        whole = document.tolist()
        for begin in range(0, len(whole), data.context):
            places = range(begin, min(begin + data.context, len(whole)))
            labels = tuple(whole[i + 1] if i + 1 < len(whole) else -100 for i in places)
            found[
                tuple(whole[i] for i in places), labels, tuple(whole[i - 1] if i else -1 for i in places)
            ] += 1
    return found


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "unpacked"])
@pytest.mark.parametrize("part", ["train", "held_out"])
@pytest.mark.parametrize("end", [False, True], ids=["plain", "end"])
def test_samples_hold_each_piece_once_and_mix_nothing(
    folder: Path, tmp_path: Path, pack: bool, part: str, end: bool
) -> None:
    data: Packed = text(folder, tmp_path / "cache", pack=pack, end_of_document=end)
    if part == "held_out":
        data = data.held_out()
    wanted = naive_pieces(data)
    assert len(wanted) > 10
    for epoch in range(2):
        found: Counter[tuple[tuple[int, ...], ...]] = Counter()
        padding = 0
        for index in range(epoch * len(data), (epoch + 1) * len(data)):
            sample = data.sample(index)
            arrays = (sample.tokens, sample.labels, sample.previous)
            assert all(array.shape == (16,) and array.dtype == np.int64 for array in arrays)
            assert sample.offsets[0] == 0 and list(sample.offsets) == sorted(set(sample.offsets))
            pieces = [tuple(tuple(a[s:e].tolist()) for a in arrays) for s, e in runs(sample)]
            tail = len(pieces[-1][0])
            if pieces[-1] == ((0,) * tail, (-100,) * tail, (-1,) * tail):
                padding += tail
                pieces.pop()
            found.update(pieces)
        assert found == wanted
        assert data.padding == pytest.approx(padding / (len(data) * 16), abs=1e-12)
        assert data.describe()["padding"] == data.padding


def test_unpacked_is_a_document_a_sample(folder: Path, tmp_path: Path) -> None:
    data = text(folder, tmp_path / "cache", pack=False)
    assert len(data) == naive_pieces(data).total() > len(text(folder, tmp_path / "cache"))
    assert max(len(data.sample(i).offsets) for i in range(len(data))) == 2
    assert data.padding > text(folder, tmp_path / "cache").padding


def test_cut_documents_keep_every_label(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a").write_text("abcdefghij")
    (tmp_path / "c" / "b").write_text("k")
    for held_out in (0.001, 0.999):
        data = Text(path=tmp_path / "c", context=4, cache=tmp_path / "cache", held_out=held_out)
        train, held = data.describe(), data.held_out().describe()
        assert (train["documents"], held["documents"]) == (1, 1)
        one, long = (data, data.held_out()) if train["tokens"] == 1 else (data.held_out(), data)
        only = one.sample(0)
        assert (only.tokens[0], only.labels.tolist(), only.offsets) == (ord("k"), [IGNORE] * 4, (0, 1))
        spelled = {one.decode(s.tokens): s for s in map(long.sample, range(len(long)))}
        assert one.decode(spelled["efgh"].labels) == "fghi"
        assert one.decode(spelled["efgh"].previous) == "defg"
        assert spelled["ij\0\0"].labels.tolist() == [ord("j"), IGNORE, IGNORE, IGNORE]
        assert spelled["ij\0\0"].previous.tolist() == [ord("h"), ord("i"), -1, -1]
        assert spelled["ij\0\0"].offsets == (0, 2)


def test_order_is_a_permutation_of_seed_and_epoch(folder: Path, tmp_path: Path) -> None:
    data, again = text(folder, tmp_path / "cache"), text(folder, tmp_path / "cache")
    other = text(folder, tmp_path / "cache", seed=1)
    n = len(data)
    # Asked in another order, as other ranks would, the samples are the same.
    forward = {i: data.sample(i) for i in range(3 * n)}
    assert all(same(again.sample(i, step=i), forward[i]) for i in reversed(range(3 * n)))
    spelled = [[forward[i].tokens.tobytes() for i in range(e * n, (e + 1) * n)] for e in range(3)]
    assert sorted(spelled[0]) == sorted(spelled[1]) == sorted(spelled[2])
    assert spelled[0] != spelled[1] != spelled[2] != spelled[0]
    assert spelled[0] != [other.sample(i).tokens.tobytes() for i in range(n)]
    # Written down: an order that changes with a version of numpy breaks every resume.
    assert permutation(7, 2, 8).tolist() == GOLDEN
    with pytest.raises(IndexError, match="sample -1"):
        data.sample(-1)


GOLDEN = [6, 4, 0, 5, 7, 1, 3, 2]


def test_held_out_is_in_file_order_and_disjoint(folder: Path, tmp_path: Path) -> None:
    data = text(folder, tmp_path / "cache")
    held = data.held_out()
    train_documents = {d.tobytes() for d in data.documents()}
    held_documents = [d.tobytes() for d in held.documents()]
    everything = [
        np.frombuffer(f.read_bytes(), np.uint8).astype(np.int64).tobytes() for f in sorted(folder.iterdir())
    ]
    assert [d for d in everything if d in set(held_documents)] == held_documents
    assert train_documents.isdisjoint(held_documents)
    assert len(train_documents) + len(held_documents) == len(set(everything))
    firsts = [held.sample(i).tokens[: runs(held.sample(i))[0][1]].tobytes() for i in range(len(held))]
    joined = b"".join(held_documents)
    places = [joined.find(first) for first in firsts if len(first) >= 5 * 8]
    assert len(places) > 3 and places == sorted(places)
    assert same(held.sample(len(held)), held.sample(0))
    assert same(held.held_out().sample(0), held.sample(0))


def test_copies_of_a_document_fall_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "c").mkdir()
    for i in range(40):
        (tmp_path / "c" / f"{i}").write_text(f"text {i % 10}")
    data = text(tmp_path / "c", tmp_path / "cache", held_out=0.4)
    sides = [{d.tobytes() for d in part.documents()} for part in (data, data.held_out())]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


def naive_rooms(lengths: list[int], context: int) -> list[int]:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(context - length)
    return sorted(rooms)


@pytest.mark.parametrize("context", [2, 7, 64, 1000])
def test_best_fit_is_best_fit_decreasing(context: int) -> None:
    rng = np.random.default_rng(context)
    for count in (1, 2, 50, 400):
        for top in (context, max(1, context // 3)):
            lengths = rng.integers(1, top + 1, count)
            bins = best_fit(lengths, context)
            used = np.bincount(bins, weights=lengths).astype(int)
            assert sorted((context - used).tolist()) == naive_rooms(lengths.tolist(), context)
            # Each bin but the last is more than half full, so twice the least number is never passed.
            assert len(used) <= 2 * -(-int(lengths.sum()) // context)
            members, bounds = group(bins)
            assert sorted(members.tolist()) == list(range(count))
            assert all(
                len(set(bins[members[a:b]])) == 1 for a, b in zip(bounds[:-1], bounds[1:], strict=True)
            )
            assert (np.diff(members[bounds[:-1]]) > 0).all()


def test_a_million_pieces_pack_fast_and_tight() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.geometric(1 / 700, 1_000_000), 4096)
    start = time.perf_counter()
    members, bounds = group(best_fit(lengths, 4096))
    assert time.perf_counter() - start < 8
    assert len(bounds) - 1 <= 1.001 * lengths.sum() / 4096
    assert np.add.reduceat(lengths[members], bounds[:-1]).max() <= 4096


def test_cut_by_hand() -> None:
    pieces = cut(np.array([0, 4, 5]), np.array([4, 5, 14]), 4)
    assert pieces.begin.tolist() == [0, 4, 5, 9, 13]
    assert pieces.end.tolist() == [4, 5, 9, 13, 14]
    assert pieces.first.tolist() == [0, 4, 5, 5, 5]
    assert pieces.last.tolist() == [4, 5, 14, 14, 14]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 1}, "data.context=1 must be a whole number of at least 2"),
        ({"context": "abc"}, "data.context='abc'"),
        ({"context": True}, "data.context=True"),
        ({"seed": -1}, "data.seed=-1"),
        ({"held_out": 0}, "data.held_out=0 must be a number between 0 and 1"),
        ({"held_out": 1.0}, "data.held_out=1.0"),
        ({"bad_budget": 1.5}, "data.bad_budget=1.5 must be a number from 0 to 1"),
        ({"pack": "no"}, "data.pack='no'"),
        ({"end_of_document": 1}, "data.end_of_document=1 must be true or false"),
        ({"tokenizer": "gpt2"}, "data.tokenizer='gpt2' is unknown: use 'bytes' or a path"),
    ],
)
def test_wrong_settings_are_named(
    folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        text(folder, tmp_path / "cache", **settings)


def test_stdlib_is_long_real_source_without_tests(shared_cache: Path) -> None:
    names = files().names
    assert len(names) > 500 and "argparse.py" in names and "asyncio/base_events.py" in names
    assert not [n for n in names if {"test", "tests", "idle_test", "site-packages"} & set(n.split("/"))]
    data = Stdlib(context=4096, cache=shared_cache)
    facts, held = data.describe(), data.held_out().describe()
    assert facts["documents"] + held["documents"] == len(names) and facts["bad"] == 0
    assert facts["tokens"] + held["tokens"] > 8e6
    assert 0.02 < held["documents"] / len(names) < 0.09
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert len(facts["sha256"]) == 64
    assert data.padding < 0.001 and data.bytes_per_token == 1.0 and data.vocab == 257
    source = (files().root / "argparse.py").read_bytes()
    parts = (*data.documents(), *data.held_out().documents())
    assert source in {bytes(d.astype(np.uint8)) for d in parts if len(d) == len(source)}
    json.dumps([facts, held])
    used: Dataset = data
    assert used.context_at(5) == 4096


def test_stdlib_min_bytes(shared_cache: Path) -> None:
    data = Stdlib(context=4096, cache=shared_cache, min_bytes=50_000)
    assert min(len(d) for d in data.documents()) >= 50_000
    with pytest.raises(ValueError, match="data.min_bytes=1000000000 leaves an empty corpus"):
        Stdlib(context=4096, cache=shared_cache, min_bytes=10**9)


@pytest.mark.parametrize(("name", "kind"), [("stdlib", Stdlib), ("text", Text), ("needle", Needle)])
def test_a_yaml_says_what_the_constructor_takes(
    name: str, kind: type, folder: Path, shared_cache: Path, tmp_path: Path
) -> None:
    node = OmegaConf.create(
        {"seed": 3, "run": {"root": str(tmp_path)}, "data": OmegaConf.load(CONF / f"{name}.yaml")}
    )
    if name == "text":
        node.data.path = str(folder)
    if name == "needle":
        node.data.curriculum = [[0, 256], [5, 2048]]
    settings = dict(OmegaConf.to_container(node.data, resolve=True))  # type: ignore[arg-type]
    assert settings.pop("_target_") == f"{kind.__module__}.{kind.__qualname__}"
    assert settings["cache"] == f"{tmp_path}/.cache/data" and settings["seed"] == 3
    parameters = inspect.signature(kind).parameters
    assert settings.keys() == parameters.keys()
    defaults = {k: p.default for k, p in parameters.items() if p.default is not inspect.Parameter.empty}
    assert {k: v for k, v in settings.items() if k in defaults} | {"seed": 0} == defaults | (
        {"curriculum": [[0, 256], [5, 2048]]} if name == "needle" else {}
    )
    # As Hydra hands it over, lists are not Python's.
    data = kind(**{k: node.data[k] for k in settings} | {"cache": str(shared_cache)})
    assert len(data.sample(0).tokens) == data.context_at(0)
