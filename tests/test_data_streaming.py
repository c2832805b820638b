"""Streamed documents: each once an epoch, the same samples for everybody, and a resume that reads on."""

import gzip
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobs
from corpora import same
from longspan.train.data.sample import IGNORE, NOTHING, Dataset, Ints, Resumable, Sample
from longspan.train.data.streaming import Streaming
from longspan.train.data.tokenizer import Bytes
from world import RankFailed, Worlds

CONTEXT, HELD = 16, 3
FILES = (7, 1, 12)


@pytest.fixture(scope="module", autouse=True)
def packages() -> None:
    """Imported when the first test begins: they take seconds, also of those who only collect."""
    for name in ("datasets", "pyarrow.parquet"):
        pytest.importorskip(name)


def texts() -> list[list[str]]:
    """Documents of each file, no two alike."""
    draw = np.random.default_rng(0)
    return [[f"{file}.{i}:" + "x" * int(draw.integers(40)) for i in range(n)] for file, n in enumerate(FILES)]


def write(folder: Path, kind: str = "jsonl") -> Path:
    from pyarrow import parquet, table

    folder.mkdir()
    for number, documents in enumerate(texts()):
        path = folder / f"{number}.{kind}"
        lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(documents))
        if kind == "parquet":
            parquet.write_table(table({"text": documents}), path)
        elif kind == "jsonl.gz":
            path.write_bytes(gzip.compress(lines.encode()))
        else:
            path.write_text(lines)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("streaming") / "data")


def opened(path: Path, **settings: Any) -> Streaming:
    return Streaming(**{"path": str(path), "context": CONTEXT, "held_out": HELD, "shuffle": 0, **settings})


def want(documents: Sequence[str], index: int) -> Sample:
    """A sample by its definition, from the documents in the order of the stream."""
    ids = [np.frombuffer(text.encode(), np.uint8).astype(np.int64) for text in documents]
    tokens = np.concatenate(ids)
    labels = np.concatenate([np.append(x[1:], IGNORE) for x in ids])
    previous = np.concatenate([np.append(NOTHING, x[:-1]) for x in ids])
    starts = np.cumsum([0, *map(len, ids)])
    at = slice(index * CONTEXT, (index + 1) * CONTEXT)
    here = sorted({0, *(int(s) - at.start for s in starts if at.start <= s < at.stop)})
    return Sample(tokens[at], labels[at], previous[at], tuple(here))


def stream(data: Dataset, samples: Iterable[int]) -> Iterator[str]:
    """The documents that these samples hold, whole."""
    found = bytearray()
    for i in samples:
        sample = data.sample(i)
        for token, label in zip(sample.tokens.tolist(), sample.labels.tolist(), strict=True):
            found.append(token)
            if label == IGNORE:
                yield found.decode().strip("\0")
                found.clear()


def epochs(data: Dataset, several: int, each: int) -> list[list[str]]:
    """The documents of so many epochs of `each` documents, in order."""
    found = list(islice(stream(data, count()), several * each))
    return [found[i * each : (i + 1) * each] for i in range(several)]


def test_samples_are_the_stream_cut_into_pieces(folder: Path) -> None:
    data, trained = opened(folder), sum(texts(), [])[HELD:]
    assert isinstance(data, Dataset) and isinstance(data, Resumable)
    total = sum(map(len, trained))
    for i in range(2 * total // CONTEXT):
        assert same(data.sample(i), want(trained * 3, i))
    held, kept = data.held_out(), sum(texts(), [])[:HELD]
    assert len(held) == -(-sum(map(len, kept)) // CONTEXT) == held.describe()["samples"]
    assert list(islice(stream(held, range(len(held))), HELD)) == kept
    assert all(same(held.sample(i), want(kept, i)) for i in range(len(held) - 1))
    assert held.bytes_per_token == data.bytes_per_token == 1.0
    with pytest.raises(IndexError, match=f"sample {len(held)}: there are {len(held)} of them"):
        held.sample(len(held))


def test_each_epoch_has_each_document_once_in_an_order_of_its_own(folder: Path) -> None:
    trained = sum(texts(), [])[HELD:]
    first, second, third = epochs(opened(folder, shuffle=5), 3, len(trained))
    assert sorted(first) == sorted(second) == sorted(third) == sorted(trained)
    assert first != second != third and first != trained
    assert epochs(opened(folder, shuffle=5), 1, len(trained)) == [first]
    assert epochs(opened(folder, shuffle=5, seed=1), 1, len(trained)) != [first]
    # a file after the other, whichever comes first, and blocks of 5 of its records
    files = [text[0] for text in first]
    assert sum(a != b for a, b in zip(files, files[1:], strict=False)) == 2
    last = [int(text[2:].split(":")[0]) for text in first if text[0] == "2"]
    assert sorted(last[:5]) == [0, 1, 2, 3, 4] != last[:5] and sorted(last[5:10]) == [5, 6, 7, 8, 9]


class Counted(Bytes):
    """Counts the documents that it is given."""

    def __init__(self) -> None:
        self.documents = 0

    def encode(self, texts: Sequence[str]) -> list[Ints]:
        self.documents += len(texts)
        return super().encode(texts)


def test_any_rank_and_any_resume_has_the_same_samples(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longspan.train.data.streaming._ENCODED", 2)
    whole, every = opened(folder, shuffle=4), list[Sample]()
    kept = []
    for i in range(60):
        kept.append(json.loads(json.dumps(whole.state(i))))
        every.append(whole.sample(i))
    assert kept[-1]["epoch"] >= 2
    ranks = [opened(folder, shuffle=4) for _ in range(3)]
    assert all(same(ranks[i % 3].sample(i), every[i]) for i in range(60))
    counted = Counted()
    monkeypatch.setattr("longspan.train.data.streaming.make", lambda _: counted)
    for i in (0, 1, 7, 23, 58):
        again = opened(folder, shuffle=4)
        again.load(kept[i])
        counted.documents = 0
        assert all(same(again.sample(j), every[j]) for j in (i, i + 1))
        assert counted.documents <= 8
        assert again.state(i + 1) == kept[i + 1]
    # one that is before what was loaded is there too
    assert same(again.sample(3), every[3])


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz"])
def test_other_kinds_of_files_give_the_same(kind: str, folder: Path, tmp_path: Path) -> None:
    data, other = opened(folder, shuffle=3), opened(write(tmp_path / "other", kind), shuffle=3)
    assert all(same(data.sample(i), other.sample(i)) for i in range(12))
    one = opened(tmp_path / "other" / f"2.{kind}", end_of_document=True)
    first = len(texts()[2][HELD])
    assert one.sample(first // CONTEXT).tokens[first % CONTEXT] == 256 and one.bytes_per_token < 1


def records(path: Path, *found: Any, good: int = 6) -> Path:
    """A file of good records with those in their midst, behind the third."""
    lines = [{"text": f"document {i}"} for i in range(good)]
    path.write_text("".join(json.dumps(x) + "\n" for x in [*lines[:3], *found, *lines[3:]]))
    return path


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"id": 1}, "no field 'text', or nothing in it"),
        ({"text": None}, "no field 'text', or nothing in it"),
        ({"text": ""}, "empty document"),
    ],
)
def test_a_bad_record_is_skipped_or_told(record: Any, reason: str, tmp_path: Path) -> None:
    path = records(tmp_path / "a.jsonl", record)
    found = [text for epoch in epochs(opened(path, held_out=1), 2, 5) for text in epoch]
    assert found == 2 * [f"document {i}" for i in range(1, 6)]
    data = opened(path, held_out=1, bad_budget=0.0)
    with pytest.raises(ValueError) as caught:
        data.sample(20)
    assert f"1 of 4 records are bad, the last of them {path}:4: {reason}" in str(caught.value)
    # one among those that are held out counts as well
    with pytest.raises(ValueError) as caught:
        opened(path, held_out=4, bad_budget=0.0)
    assert f"1 of 4 records are bad, the last of them {path}:4: {reason}" in str(caught.value)


def test_bad_records_of_both_parts_are_counted_together(tmp_path: Path) -> None:
    path = records(tmp_path / "a.jsonl", *[{"id": i} for i in range(6)])
    # five of them behind the eight documents held out, in each epoch again
    path.write_text(path.read_text() + '{"text": "more"}\n' * 9 + '{"text": ""}\n' * 5)
    assert opened(path, held_out=8).state(0)["bad"] == 6
    with pytest.raises(ValueError, match="data.bad_budget=0.01: 11 of 26 records are bad, .*:26: empty"):
        opened(path, held_out=8).sample(1000)


def test_what_is_no_text_is_refused_where_it_stands(tmp_path: Path) -> None:
    """The package would hand out its neighbours as JSON, in quotes."""
    good, path = records(tmp_path / "a.jsonl"), records(tmp_path / "b.jsonl", {"text": 5})
    data = opened(tmp_path, held_out=1)
    with pytest.raises(ValueError) as caught:
        data.sample(20)
    assert f"{path} cannot be read beyond record 0" in str(caught.value)
    assert "Column(/text) changed from string to number in row 3" in str(caught.value)
    path.write_text(good.read_text() + "{broken\n")
    with pytest.raises(ValueError, match="b.jsonl cannot be read beyond record 0"):
        data.sample(20)
    numbers = tmp_path / "c.jsonl"
    numbers.write_text('{"text": 1}\n' * 20)
    with pytest.raises(ValueError, match="11 of 11 records are bad, the last .*:11: .* is int, not a string"):
        opened(numbers, held_out=1)
    numbers.write_text('{"text": 1}\n' * 9)
    with pytest.raises(ValueError, match="hold out fewer, and 9 bad .* is int, not a string"):
        opened(numbers, held_out=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "data.split='test' is not there: .* has train"),
        ({"field": "content"}, r"data.field='content' is not there at .*0.jsonl:1, which has id, text"),
        ({"held_out": 21}, r"data.held_out=21, but .*0.jsonl and the files behind it have 20 documents"),
        ({"held_out": 0}, "data.held_out=0 must be a whole number of at least 1"),
        ({"shuffle": -1}, "data.shuffle=-1 must be a whole number of at least 0"),
        ({"context": 1}, "data.context=1 must be a whole number of at least 2"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        opened(folder, **settings)


def test_what_cannot_be_found_or_trained_on_is_told(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="data.held_out=20 leaves no document of .* to train on"):
        opened(folder, held_out=20).sample(0)
    with pytest.raises(TypeError, match="before anybody knows how many"):
        len(opened(folder))
    (tmp_path / "a.doc").touch()
    with pytest.raises(ValueError, match="a.doc': a file that is streamed ends in .jsonl, "):
        opened(tmp_path / "a.doc")

    def nothing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist on the Hub")

    monkeypatch.setattr("datasets.load_dataset_builder", nothing)
    with pytest.raises(FileNotFoundError, match="data.path='nobody/nothing' is neither a file or a folder"):
        Streaming(path="nobody/nothing", context=CONTEXT)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"data=streaming needs .* install longspan\[datasets\]"):
        opened(folder)


def words(folder: Path, *more: str) -> tuple[str, ...]:
    settings = ("context=64", "held_out=9", "shuffle=4")
    return (
        "data=streaming",
        f"data.path={folder}",
        *(f"data.{x}" for x in settings),
        "train.steps=20",
        *more,
    )


@pytest.mark.slow
def test_a_run_goes_on_over_other_ranks(world: Worlds, folder: Path, tmp_path: Path) -> None:
    two, one = ("parallel=single",), (*jobs.ring(), "train.accumulate=2")
    whole = world(2)(jobs.run, jobs.config(*words(folder, *two)), tmp_path / "whole")
    before = (2, jobs.config(*words(folder, *two)))
    after = (2, jobs.config(*words(folder, *one)))
    got = jobs.gone_on(world, tmp_path / "part", before, after)
    assert jobs.together(got) == [t for t in jobs.together(whole) if t.step >= 10]
    rows = whole[0].rows[10:]
    assert jobs.furthest(jobs.values(got[0].rows, "loss"), jobs.values(rows, "loss")) < 2e-6
    kept = json.loads(next((tmp_path / "part").glob("step-*10/extra.json")).read_text())
    assert kept["stream"]["index"] == kept["samples"] == 40 and kept["stream"]["epoch"] > 0
    other = words(folder, *two, "data.shuffle=5")
    with pytest.raises(RankFailed, match="the data is not the one that the checkpoint was trained on"):
        world(2)(jobs.run, jobs.config(*other), tmp_path / "part")
