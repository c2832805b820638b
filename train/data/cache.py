"""A corpus tokenised once: memory-mapped tokens in a folder whose name is a hash of what went in."""

import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from .corpus import Bad, Corpus, Document
from .sample import Ints
from .tokenizer import Tokenizer

_FORMAT = 1
_ATTEMPTS = 10
_BATCH_CHARACTERS = 1 << 22
# Bad records that are written down; all are counted.
_LISTED = 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What is tokenised, and how.

    Attributes:
        corpus: The files.
        tokenizer: Text to ids.
        end: Whether each document ends with the tokenizer's end id.
        split_by: What the hash that splits off the held-out part is taken of. By `content`, copies of a
            document fall on one side; by `name`, a document stays on its side when it is edited.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    end: bool = False
    split_by: Literal["name", "content"] = "content"

    def key(self) -> str:
        """Hash of everything that decides the tokens: 32 hex digits."""
        files = [str(self.corpus.root), self.corpus.state(), self.corpus.field]
        parts = [_FORMAT, files, self.tokenizer.name, self.tokenizer.vocab, self.end, self.split_by]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Store:
    """The tokens of a corpus.

    Attributes:
        tokens: All documents one after the other, in the smallest unsigned dtype that holds the vocabulary.
        starts: Where each document starts, and the end: int64 `[documents + 1]`.
        sizes: UTF-8 bytes of each document: int64 `[documents]`.
        keys: The hash that splits off the held-out part, from 0 to 1: float64 `[documents]`.
        meta: What else is known: `root`, `sha256` of names and contents, `records`, `bad` and `bad_records`.
    """

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    starts: Ints
    sizes: Ints
    keys: npt.NDArray[np.float64]
    meta: dict[str, Any]

    def split(self, held_out: float) -> tuple[Ints, Ints]:
        """Documents to train on and documents held out, by number: the share `held_out`, at least one each.

        Raises:
            ValueError: There is only one document.
        """
        if len(self.keys) < 2:
            raise ValueError(
                f"data.held_out={held_out} leaves no document to hold out: the corpus has 1 document, "
                "at least 2 are needed (split the file, or use .jsonl with a document a line)"
            )
        order = np.argsort(self.keys, kind="stable")
        number = min(max(int(np.searchsorted(self.keys[order], held_out)), 1), len(order) - 1)
        return np.sort(order[number:]), np.sort(order[:number])


class _Damaged(Exception):
    """The folder is not what was written into it."""


def load(source: Source, cache: str | os.PathLike[str]) -> Store:
    """Open the tokens of `source` in the folder `cache`, building them if they are missing or damaged.

    Several processes may do this at once: each builds in a folder of its own, the first to rename wins.

    Raises:
        ValueError: The corpus has no document at all, or a damaged file.
        OSError: The cache can be neither read nor written.
    """
    home = Path(os.path.abspath(os.path.expanduser(cache))) / source.key()
    try:
        for _ in range(_ATTEMPTS):
            seen = _identity(home)
            if seen is None:
                _build(source, home)
                continue
            try:
                return _open(home)
            except _Damaged as error:
                # Unless another process has replaced it by now.
                if _identity(home) == seen:
                    _log.warning("data cache %s is damaged (%s): building it again", home, error)
                    _discard(home)
        raise OSError(f"{home} was missing or damaged {_ATTEMPTS} times in a row")
    except OSError as error:
        hint = "set data.cache to a folder that can be written and has room"
        raise OSError(f"data.cache={os.fspath(cache)!r} cannot be used: {error}; {hint}") from error


def _identity(home: Path) -> tuple[int, int] | None:
    """Which folder this is; None if there is none."""
    try:
        status = home.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_ctime_ns


def _open(home: Path) -> Store:
    try:
        written = json.loads((home / "meta.json").read_bytes())
        meta = written["meta"]
        if written["sha256"] != _checksum(meta):
            raise _Damaged("meta.json does not match its checksum")
        for name, size in meta["files"].items():
            if (home / name).stat().st_size != size:
                raise _Damaged(f"{name} has {(home / name).stat().st_size} bytes instead of {size}")
        tokens = np.memmap(home / "tokens.bin", dtype=meta["dtype"], mode="r")
        # The zip format checks its own CRC when an array is read.
        with np.load(home / "documents.npz") as arrays:
            return Store(tokens, arrays["starts"], arrays["sizes"], arrays["keys"], meta)
    except (FileNotFoundError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise _Damaged(f"{type(error).__name__}: {error}") from error


def _checksum(meta: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _discard(home: Path) -> None:
    # Renamed first, so that nobody opens a folder that is half gone; another process may have been faster.
    grave = home.with_name(f"{home.name}.damaged-{uuid4().hex}")
    try:
        home.rename(grave)
    except FileNotFoundError:
        return
    shutil.rmtree(grave, ignore_errors=True)


def _build(source: Source, home: Path) -> None:
    work = home.with_name(f"{home.name}.tmp-{uuid4().hex}")
    work.mkdir(parents=True)
    try:
        _write(source, work)
        try:
            work.rename(home)
        except OSError:
            # Somebody else was first, which is as good; anything else is an error.
            if not home.is_dir():
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(source: Source, work: Path) -> None:
    dtype = np.min_scalar_type(source.tokenizer.vocab - 1)
    tally = _Tally(source)
    with (work / "tokens.bin").open("wb") as file:
        for batch in _batches(tally.good(source.corpus.read())):
            texts = [document.text for document in batch]
            for document, tokens in zip(batch, source.tokenizer.encode(texts), strict=True):
                if tally.add(document, tokens):
                    file.write(tokens.astype(dtype).tobytes())
                    if source.end:
                        file.write(np.array([source.tokenizer.end], dtype).tobytes())
        _sync(file)
    tally.require_documents()
    with (work / "documents.npz").open("wb") as file:
        starts = np.concatenate([[0], np.cumsum(tally.lengths)]).astype(np.int64)
        np.savez(
            file, starts=starts, sizes=np.array(tally.sizes, np.int64), keys=np.array(tally.keys, np.float64)
        )
        _sync(file)
    files = {name: (work / name).stat().st_size for name in ("tokens.bin", "documents.npz")}
    meta = tally.meta() | {"dtype": dtype.name, "files": files}
    with (work / "meta.json").open("wb") as file:
        file.write(json.dumps({"meta": meta, "sha256": _checksum(meta)}, indent=1).encode())
        _sync(file)


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    room = _BATCH_CHARACTERS
    for document in documents:
        batch.append(document)
        room -= len(document.text)
        if room <= 0:
            yield batch
            batch, room = [], _BATCH_CHARACTERS
    if batch:
        yield batch


class _Tally:
    """What is found out about the documents while they pass."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._hash = hashlib.sha256()
        self._bad: list[Bad] = []
        self._bad_count = 0
        self.lengths: list[int] = []
        self.sizes: list[int] = []
        self.keys: list[float] = []

    def good(self, records: Iterable[Document | Bad]) -> Iterator[Document]:
        for record in records:
            if isinstance(record, Bad):
                self._reject(record)
            else:
                yield record

    def add(self, document: Document, tokens: Ints) -> bool:
        """Count a document; False if the tokenizer left nothing of it."""
        if not len(tokens):
            self._reject(Bad(document.location, "empty document: the tokenizer gives no token"))
            return False
        content = document.text.encode()
        name = os.fsencode(document.location)
        digest = hashlib.sha256(content).digest()
        self._hash.update(len(name).to_bytes(8, "little") + name + digest)
        split = digest if self._source.split_by == "content" else hashlib.sha256(name).digest()
        self.keys.append(int.from_bytes(split[:8], "little") / 2.0**64)
        self.lengths.append(len(tokens) + self._source.end)
        self.sizes.append(len(content))
        return True

    def require_documents(self) -> None:
        if self.lengths:
            return
        found = "".join(f"\n  {bad.location}: {bad.reason}" for bad in self._bad)
        where = self._source.corpus.root
        raise ValueError(
            f"data.path is an empty corpus: no document in {where}, {self._bad_count} bad records{found}"
        )

    def meta(self) -> dict[str, Any]:
        bad = [{"location": bad.location, "reason": bad.reason} for bad in self._bad]
        return {
            "root": str(self._source.corpus.root),
            "tokenizer": self._source.tokenizer.name,
            "sha256": self._hash.hexdigest(),
            "records": len(self.lengths) + self._bad_count,
            "bad": self._bad_count,
            "bad_records": bad,
        }

    def _reject(self, bad: Bad) -> None:
        self._bad_count += 1
        if len(self._bad) < _LISTED:
            self._bad.append(bad)
