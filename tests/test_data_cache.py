"""The token cache: built once, followed, raced for, and rebuilt when it is damaged."""

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpora import text, write_documents
from longspan.train.data import cache as cache_module
from longspan.train.data.cache import Source, Store, load
from longspan.train.data.corpus import find
from longspan.train.data.tokenizer import Bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "corpus")


def a_source(folder: Path) -> Source:
    return Source(find(folder), Bytes())


def home_of(source: Source, cache: Path) -> Path:
    return cache / source.key()


def contents(store: Store) -> tuple[Any, ...]:
    arrays = (store.tokens, store.starts, store.sizes, store.keys)
    return (*(array.tobytes() for array in arrays), store.meta["sha256"])


def test_cache_is_built_once_and_follows_the_files(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[Path] = []
    build: Callable[[Source, Path], None] = cache_module._build

    def counted(source: Source, home: Path) -> None:
        built.append(home)
        build(source, home)

    monkeypatch.setattr(cache_module, "_build", counted)
    cache = tmp_path / "cache"
    first = load(a_source(folder), cache)
    assert contents(load(a_source(folder), cache)) == contents(first) and len(built) == 1
    assert isinstance(first.tokens, np.memmap) and first.tokens.dtype == np.uint16
    assert first.sizes.tolist() == [f.stat().st_size for f in sorted(folder.iterdir())]
    assert load(Source(find(folder), Bytes(), end=True), cache).starts[-1] == first.starts[-1] + 60
    load(Source(find(folder), Bytes(), split_by="name"), cache)
    assert len(built) == 3
    # Same size, so only the time of the change tells.
    (folder / "000.txt").write_bytes(b"!" if (folder / "000.txt").read_bytes() != b"!" else b"?")
    os.utime(folder / "000.txt", ns=(1, 1))
    assert contents(load(a_source(folder), cache)) != contents(first) and len(built) == 4


def cut_short(home: Path) -> None:
    with (home / "tokens.bin").open("rb+") as file:
        file.truncate(100)


def flip(name: str, place: float) -> Callable[[Path], None]:
    def damage(home: Path) -> None:
        content = bytearray((home / name).read_bytes())
        content[int(place * len(content))] ^= 1
        (home / name).write_bytes(content)

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        cut_short,
        flip("meta.json", 0.3),
        flip("meta.json", 0.9),
        flip("documents.npz", 0.2),
        lambda home: (home / "tokens.bin").unlink(),
        lambda home: (home / "meta.json").write_bytes(b""),
        lambda home: (home / "meta.json").write_bytes(b"[]"),
    ],
)
def test_a_damaged_cache_is_noticed_and_rebuilt(
    folder: Path, tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    source, cache = a_source(folder), tmp_path / "cache"
    before = contents(load(source, cache))
    assert not caplog.records
    damage(home_of(source, cache))
    assert contents(load(source, cache)) == before
    assert "is damaged" in caplog.text
    caplog.clear()
    assert contents(load(source, cache)) == before and not caplog.records
    assert [p.name for p in cache.iterdir()] == [source.key()]


def race(folder: Path, cache: Path, barrier: Any, answers: Any) -> None:
    for _ in range(5):
        barrier.wait(60)
        try:
            store = load(a_source(folder), cache)
        except Exception as error:
            answers.put(repr(error))
        else:
            answers.put(store.meta["sha256"] + store.tokens.tobytes().hex())


def test_processes_may_race_for_the_cache(folder: Path, tmp_path: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(4), spawn.Queue()
    cache = tmp_path / "cache"
    workers = [
        spawn.Process(target=race, args=(folder, cache, barrier, answers), daemon=True) for _ in range(3)
    ]
    for worker in workers:
        worker.start()
    wanted = load(a_source(folder), tmp_path / "other")
    for turn in range(5):
        # Missing at first, then damaged before each turn.
        if turn:
            cut_short(home_of(a_source(folder), cache))
        barrier.wait(60)
        found = {answers.get(timeout=60) for _ in workers}
        assert found == {wanted.meta["sha256"] + wanted.tokens.tobytes().hex()}
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    assert [p.name for p in cache.iterdir()] == [a_source(folder).key()]


def test_a_cache_that_cannot_be_written_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=r"data.cache='.*file/x' cannot be used: .*; set data.cache to a folder"
    ):
        text(folder, tmp_path / "file" / "x")


def test_a_full_disk_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="data.cache=.*No space left on device"):
            text(folder, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert len(text(folder, tmp_path / "cache")) > 10


def test_documents_that_the_tokenizer_empties_are_bad(tmp_path: Path) -> None:
    class Spaceless(Bytes):
        def encode(self, texts: Any) -> Any:
            return super().encode([t.strip() for t in texts])

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a").write_text(" \n")
    (tmp_path / "c" / "b").write_text("b")
    meta = load(Source(find(tmp_path / "c"), Spaceless()), tmp_path / "cache").meta
    assert meta["bad_records"] == [
        {"location": "a", "reason": "empty document: the tokenizer gives no token"}
    ]
