"""Documents of a Hugging Face data set as they are read: no copy on disk, no wait before the first step."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import islice
from typing import Any

import numpy as np

from .check import fraction, switch, whole
from .corpus import Bad, Document
from .packed import permutation
from .sample import Dataset, Ints, Sample
from .shards import Shards
from .text import allowed
from .tokenizer import Tokenizer, make
from .windows import Cursor, Windows

# Documents that are tokenised at once.
_ENCODED = 64


class _Tokenized:
    """What both parts of the data have in common."""

    def __init__(self, tokenizer: Tokenizer, context: int, facts: dict[str, Any]) -> None:
        self._tokenizer, self._facts = tokenizer, dict(facts)
        self.vocab, self.context = tokenizer.vocab, context

    def context_at(self, step: int) -> int:
        return self.context

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode([text])[0].tolist()
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(tokens)

    def describe(self) -> dict[str, Any]:
        return dict(self._facts)


class Streaming(_Tokenized):
    """Documents one after the other, cut into sequences as they come; a `Dataset`, and `Resumable`.

    Sample i is the i-th piece of `context` tokens of a stream that only the settings decide, so that ranks
    and restarts change nothing. The files are shuffled anew each epoch, and the records of each block of
    `shuffle` among themselves. A process reads and tokenises all that comes before the samples it takes.

    Args:
        path: A name on the Hub, or a file or a folder here (.jsonl, .parquet, ...).
        context: Tokens per sample.
        name: Of the data set's configuration, if it has several.
        split: Of the data set.
        revision: Of a data set on the Hub: a branch, tag or commit.
        tokenizer: `bytes`, or the path of a `tokenizers` JSON file.
        field: Where a record has the text.
        end_of_document: Whether each document ends with the tokenizer's end id, as its last label.
        seed: Of the order.
        shuffle: Records of a file that are shuffled together; 0 takes all in order.
        held_out: So many documents, the first ones, are not trained on.
        bad_budget: Share of the records read so far, those of held-out documents among them, that may be bad.
            Up to 10 are always skipped, unless this is 0.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
        FileNotFoundError: There is nothing at `path`.
        ValueError: A setting is wrong, a file is damaged, or there are too few documents.
    """

    def __init__(
        self, *, path: str, context: int, name: str | None = None, split: str = "train",
        revision: str | None = None, tokenizer: str = "bytes", field: str = "text",
        end_of_document: bool = False, seed: int = 0, shuffle: int = 1000, held_out: int = 100,
        bad_budget: float = 0.01,
    ) -> None:  # fmt: skip
        for setting, value, least in (("context", context, 2), ("seed", seed, 0), ("shuffle", shuffle, 0)):
            whole(f"data.{setting}", value, least)
        whole("data.held_out", held_out, 1)
        self._budget = fraction("data.bad_budget", bad_budget, ends=True)
        ids = make(tokenizer)
        if switch("data.end_of_document", end_of_document) and ids.end is None:
            raise ValueError(
                f"data.end_of_document=true: data.tokenizer={tokenizer!r} has no end token, use false"
            )
        self._seed, self._shuffle, self._end = seed, shuffle, ids.end if end_of_document else None
        self._shards = Shards(path, name=name, split=split, revision=revision, field=field)
        super().__init__(ids, context, {})
        held = self._hold(held_out)
        told: list[Any] = [self._shards.key(), name, split, field, end_of_document, seed, shuffle]
        told.append([d.text for d in held])
        self._facts |= {
            "corpus": "streaming", "path": path, "files": len(self._shards), "tokenizer": ids.name,
            "vocab": ids.vocab, "context": context, "pack": True, "held_out": held_out,
            "sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        }  # fmt: skip
        self._held = HeldOut(ids, self._encoded(held), sum(len(d.text.encode()) for d in held), self._facts)
        self.bytes_per_token = self._held.bytes_per_token
        # of samples that can be gone back to, by their index
        self._known = {0: self._begin}
        self._windows: Windows | None = None

    def __len__(self) -> int:
        raise TypeError("a stream is read to its end before anybody knows how many samples it has")

    def sample(self, index: int, step: int = 0) -> Sample:
        """The sample with this global index; all before it are read first, from the last one that was taken,
        or from a `state` that was loaded. IndexError if `index` is negative.
        """
        return self._at(index).cut()

    def state(self, index: int) -> dict[str, Any]:
        """Where the sample with this global index begins: what `load` takes."""
        found = self._at(index).cursor
        self._known[index] = found
        return asdict(found)

    def load(self, state: dict[str, Any]) -> None:
        """Makes samples from that one on known, without those before."""
        start = Cursor(**state)
        self._known[start.index] = start

    def held_out(self) -> "HeldOut":
        return self._held

    def _at(self, index: int) -> Windows:
        if index < 0:
            raise IndexError(f"sample {index}: indices start at 0")
        start = self._known[max(known for known in self._known if known <= index)]
        windows = self._windows
        if windows is None or not start.index <= windows.index <= index:
            windows = Windows(self._documents(start), start, self.context)
        while windows.index < index:
            windows.skip()
        self._windows = windows
        return windows

    def _documents(self, start: Cursor) -> Iterator[tuple[Cursor, Ints]]:
        """Each document from the one that `start` is in, and where it is."""
        taken, epoch, tokens = start.taken, start.epoch, True
        for block, found in self._blocks(start):
            if block.epoch != epoch:
                if not tokens:
                    raise ValueError(
                        f"data.path={self._facts['path']}: no document that is trained on has a token by "
                        f"data.tokenizer={self._facts['tokenizer']!r}"
                    )
                epoch, tokens = block.epoch, False
            for first in range(taken, len(found), _ENCODED):
                some = self._encoded(found[first : first + _ENCODED])
                tokens = tokens or any(map(len, some))
                yield from ((replace(block, taken=first + i), ids) for i, ids in enumerate(some))
            taken = 0

    def _blocks(self, start: Cursor) -> Iterator[tuple[Cursor, list[Document]]]:
        """The documents of each block in their order, and where it begins, epoch after epoch."""
        at = replace(start, taken=0, offset=0)
        while True:
            order = permutation(self._seed, at.epoch, len(self._shards)) if self._shuffle else None
            empty = at.turn == 0
            for turn in range(at.turn, len(self._shards)):
                shard = turn if order is None else int(order[turn])
                at = replace(at, turn=turn, record=max(at.record, self._skipped.get(shard, 0)))
                records = self._shards.read(shard, at.record)
                while block := list(islice(records, self._shuffle or _ENCODED)):
                    found = self._good(block, at)
                    yield at, self._mixed(found, at.epoch, shard, at.record)
                    empty = empty and not found
                    at = replace(
                        at, record=at.record + len(block), records=at.records + len(block),
                        bad=at.bad + len(block) - len(found),
                    )  # fmt: skip
                at = replace(at, record=0)
            if empty:
                raise ValueError(
                    f"data.held_out={self._facts['held_out']} leaves no document of {self._facts['path']} to "
                    "train on: hold out fewer"
                )
            at = replace(at, epoch=at.epoch + 1, turn=0, record=0)

    def _mixed(self, found: list[Document], epoch: int, shard: int, record: int) -> list[Document]:
        if not self._shuffle:
            return found
        return [found[i] for i in permutation(self._seed, epoch, len(found), shard, record)]

    def _good(self, block: list[Document | Bad], at: Cursor) -> list[Document]:
        """Those that are documents. ValueError as soon as too many are not."""
        found, bad = list[Document](), at.bad
        for number, record in enumerate(block, at.records + 1):
            if isinstance(record, Document):
                found.append(record)
                continue
            bad += 1
            self._spend(bad, number, record)
        return found

    def _spend(self, bad: int, records: int, last: Bad) -> None:
        """ValueError if so many of the records so far may not be bad, with the last of them."""
        if bad > allowed(records, self._budget):
            raise ValueError(
                f"data.bad_budget={self._budget}: {bad} of {records} records are bad, the last of them "
                f"{last.location}: {last.reason}; mend them or raise the budget"
            )

    def _hold(self, wanted: int) -> list[Document]:
        """The first documents of the first files. How many records of each file they are is kept, and how
        many of all are bad, where training begins.
        """
        held, bad, self._skipped = list[Document](), list[Bad](), dict[int, int]()
        for shard in range(len(self._shards)):
            for number, record in enumerate(self._shards.read(shard), 1):
                self._skipped[shard] = number
                if isinstance(record, Bad):
                    bad.append(record)
                    self._spend(len(bad), len(held) + len(bad), record)
                else:
                    held.append(record)
                if len(held) == wanted:
                    self._begin = Cursor(records=len(held) + len(bad), bad=len(bad))
                    return held
        first = f", and {len(bad)} bad records, such as {bad[0].location}: {bad[0].reason}" if bad else ""
        raise ValueError(
            f"data.held_out={wanted}, but {self._shards.files[0]} and the files behind it have "
            f"{len(held)} documents: hold out fewer{first}"
        )

    def _encoded(self, documents: list[Document]) -> list[Ints]:
        ids = self._tokenizer.encode([document.text for document in documents])
        return ids if self._end is None else [np.append(x, self._end) for x in ids]


class HeldOut(_Tokenized):
    """The documents that are not trained on, in order; the last sample is padded. A `Dataset`."""

    def __init__(self, tokenizer: Tokenizer, documents: list[Ints], size: int, facts: dict[str, Any]) -> None:
        """size: UTF-8 bytes of the documents. facts: what else `describe` says, the context among it."""
        super().__init__(tokenizer, facts["context"], facts)
        tokens = sum(map(len, documents))
        self._documents, self._samples = documents, -(-tokens // self.context)
        self.bytes_per_token = size / max(1, tokens)
        self._facts |= {"part": "held_out", "samples": self._samples, "bytes_per_token": self.bytes_per_token}

    def __len__(self) -> int:
        return self._samples

    def sample(self, index: int, step: int = 0) -> Sample:
        """The sample with this index. IndexError if there is none."""
        if index < 0:
            raise IndexError(f"sample {index}: indices start at 0")
        windows = Windows(((Cursor(), ids) for ids in self._documents), Cursor(), self.context)
        for _ in range(index):
            windows.skip()
        return windows.cut()

    def held_out(self) -> Dataset:
        return self
