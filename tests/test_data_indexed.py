"""Megatron's .bin and .idx: megatron-core reads what is written, and what it wrote trains as text does."""

import hashlib
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_module

from longspan.train.config import typed
from longspan.train.data import indexed
from longspan.train.data.indexed import Indexed, write
from longspan.train.data.sample import Ints
from longspan.train.data.text import Text
from longspan.train.job import Launch
from longspan.train.tokenize import Tokenizing, tokenize

WORDS = ["sun", "moon", "star", "sea", "wind", "rain", "snow", "leaf", "root", "stone"]


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Any:
    """Imported when the first test begins: it takes seconds, also of those who only collect."""
    return pytest.importorskip("megatron.core.datasets.indexed_dataset")


def texts(folder: Path, documents: int = 40) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(documents):
        (folder / f"{i:02}.txt").write_text(f"{i}: " + " ".join(rng.choice(WORDS, 3 + 4 * i)) + " é")
    return folder


def documents(data: Any) -> list[bytes]:
    return sorted(x.tobytes() for part in (data, data.held_out()) for x in part.documents())


def converted(tmp_path: Path) -> tuple[Text, str]:
    """The texts, and the prefix of the files that the command made of them."""
    folder, out = texts(tmp_path / "texts"), str(tmp_path / "made" / "corpus")
    with initialize_config_module("longspan.conf", version_base="1.3"):
        words = [f"data.path={folder}", f"out={out}", f"run.root={tmp_path}"]
        assert tokenize(typed(compose("tokenize", overrides=words), Tokenizing), Launch()) == 0
    return Text(path=folder, context=64, cache=tmp_path / "cache", held_out=0.2), out


def test_texts_become_files_that_megatron_reads_and_back(megatron: Any, tmp_path: Path) -> None:
    data, out = converted(tmp_path)
    theirs = megatron.IndexedDataset(out)
    assert theirs.index.dtype == np.uint16 and len(theirs) == 40
    assert sorted(theirs[i].astype(np.int64).tobytes() for i in range(40)) == documents(data)
    for path in (out, f"{out}.bin", f"{out}.idx"):
        ours = Indexed(path=path, context=64, tokenizer="bytes", held_out=0.2)
        assert documents(ours) == documents(data) and ours.vocab == 257
        assert ours.bytes_per_token == 1.0 and len(list(ours.held_out().documents())) > 2
    assert not list(Path(out).parent.glob("*.part"))


def test_samples_are_those_of_the_same_documents_as_text(tmp_path: Path) -> None:
    """Labels and predecessors at the cuts too: each token of an epoch is followed by its true next one."""
    data, out = converted(tmp_path)
    ours = Indexed(path=out, context=64, tokenizer="bytes", held_out=0.2, seed=3)
    whole = {tuple(x.tolist()) for x in ours.documents()}
    seen = 0
    for i in range(len(ours)):
        sample = ours.sample(i)
        for begin, end in zip(sample.offsets, (*sample.offsets[1:], 64), strict=True):
            piece, after = sample.tokens[begin:end], sample.labels[begin:end]
            if (after < 0).all():
                continue
            seen += int((after >= 0).sum())
            first, last = after[0], sample.tokens[begin]
            assert any(
                document[at : at + 2] == (int(last), int(first))
                for document in whole
                for at in range(len(document))
            )
            inside = after[:-1] >= 0
            assert (after[:-1][inside] == piece[1:][inside]).all()
    assert seen == sum(len(x) - 1 for x in whole)
    again = Indexed(path=out, context=64, tokenizer="bytes", held_out=0.2, seed=3)
    assert all((again.sample(i).tokens == ours.sample(i).tokens).all() for i in (0, 5, 200))
    assert type(ours.sample(0)) is type(data.sample(0))


def made(tmp_path: Path, rows: list[Ints], vocab: int = 257) -> str:
    prefix = str(tmp_path / "corpus")
    write(prefix, rows, vocab)
    return prefix


ROWS = [np.arange(n, dtype=np.int64) % 200 for n in (5, 0, 40, 7, 90)]


def test_several_sequences_are_one_document_and_none_is_none(megatron: Any, tmp_path: Path) -> None:
    builder = megatron.IndexedDatasetBuilder(str(tmp_path / "c.bin"), dtype=np.int32)
    for lengths in ([3, 4], [], [5], [1, 1, 1]):
        builder.add_document(np.arange(sum(lengths)), lengths)
    builder.finalize(str(tmp_path / "c.idx"))
    data = Indexed(path=tmp_path / "c", context=8, tokenizer="bytes", held_out=0.4)
    assert sorted(map(len, documents(data))) == [24, 40, 56]
    assert data.describe()["bad"] == 1 and data.describe()["records"] == 4


def test_keys_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held out, and so the order of the rest, never changes: SHA-256 of 64 tokens at each end."""
    monkeypatch.setattr(indexed, "_HASHED", 7)
    draw = np.random.default_rng(0)
    lengths = [*range(1, 20), 63, 64, 65, 127, 128, 129, *draw.integers(1, 400, 60).tolist()]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    tokens = draw.integers(0, 60_000, starts[-1]).astype(np.uint16)
    want = []
    for begin, end in pairwise(starts.tolist()):
        ids = tokens[begin:end].tolist()
        said = b"".join(i.to_bytes(8, "little") for i in (*ids[:64], *ids[-64:], len(ids)))
        want.append(int.from_bytes(hashlib.sha256(said).digest()[:8], "little") / 2.0**64)
    assert indexed._keys(tokens, starts).tolist() == want


def cut(path: str, size: int) -> None:
    os.truncate(path, os.path.getsize(path) - size)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda p: os.remove(f"{p}.bin"), r"there is no .*corpus.bin; give PREFIX"),
        (lambda p: os.remove(f"{p}.idx"), r"there is no .*corpus.idx; give PREFIX"),
        (lambda p: cut(f"{p}.bin", 2), "bytes, but its index needs 284: copy it again"),
        (lambda p: cut(f"{p}.idx", 9), "corpus.idx is (damaged, cut short|no Megatron index, or cut short)"),
        (
            lambda p: os.truncate(f"{p}.idx", 12),
            "corpus.idx is (damaged, cut short|no Megatron index, or cut short)",
        ),
        (lambda p: Path(f"{p}.idx").write_bytes(b"text" * 20), "no Megatron index"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, harm: Any, message: str) -> None:
    prefix = made(tmp_path, ROWS)
    harm(prefix)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Indexed(path=prefix, context=8, tokenizer="bytes", held_out=0.4)


def test_ids_that_the_tokenizer_lacks_are_named(tmp_path: Path) -> None:
    prefix = made(tmp_path, [np.array([3, 999]), *ROWS, np.array([5, 999])], 1000)
    with pytest.raises(ValueError, match="data.tokenizer has 257 ids, but .*holds the id 999"):
        data = Indexed(path=prefix, context=8, tokenizer="bytes", held_out=0.2)
        for i in range(len(data)):
            data.sample(i)


def test_files_are_not_written_over(tmp_path: Path) -> None:
    prefix = made(tmp_path, ROWS)
    with pytest.raises(FileExistsError, match=r"corpus.bin is there already; give another name"):
        write(prefix, ROWS, 257)
