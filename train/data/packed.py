"""A data set of packed documents: fixed-length samples in an order that only seed and epoch decide."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .cache import Store
from .check import fraction, switch, whole
from .pack import best_fit, cut, group
from .sample import IGNORE, NOTHING, Ints, Sample
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class Plan:
    """How documents become samples.

    Attributes:
        context: Tokens per sample.
        seed: Of the order.
        held_out: Share of the documents that is held out.
        pack: Several documents a sample, without seeing each other; else each piece is padded to the context.
    """

    context: int
    seed: int = 0
    held_out: float = 0.05
    pack: bool = True

    def __post_init__(self) -> None:
        whole("data.context", self.context, 2)
        whole("data.seed", self.seed, 0)
        fraction("data.held_out", self.held_out, ends=False)
        switch("data.pack", self.pack)


class Packed:
    """The samples of one part of a store; a `Dataset`.

    Args:
        store: Tokens of the corpus.
        tokenizer: What made them.
        plan: How they become samples.
        part: `train` (shuffled anew each epoch) or `held_out` (in file order).
        facts: What else `describe` should say.
    """

    def __init__(
        self,
        store: Store,
        tokenizer: Tokenizer,
        plan: Plan,
        *,
        facts: Mapping[str, Any],
        part: Literal["train", "held_out"] = "train",
    ) -> None:
        self._store, self._tokenizer, self._plan, self._part, self._facts = (
            store,
            tokenizer,
            plan,
            part,
            dict(facts),
        )
        train, held = store.split(plan.held_out)
        lengths = np.diff(store.starts)
        self.vocab = tokenizer.vocab
        self.context = plan.context
        self.bytes_per_token = float(store.sizes[held].sum() / lengths[held].sum())
        self._documents = train if part == "train" else held
        self._pieces = cut(
            store.starts[:-1][self._documents], store.starts[1:][self._documents], plan.context
        )
        sizes = self._pieces.end - self._pieces.begin
        self._members, self._bounds = group(
            best_fit(sizes, plan.context) if plan.pack else np.arange(len(sizes), dtype=np.int64)
        )
        self._order: tuple[int, Ints] = (-1, np.empty(0, dtype=np.int64))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def sample(self, index: int, step: int = 0) -> Sample:
        """The sample with this global index; every step has the same context.

        Raises:
            IndexError: `index` is negative.
        """
        if index < 0:
            raise IndexError(f"sample {index}: indices start at 0")
        place = self._place(*divmod(index, len(self)))
        tokens = np.zeros(self.context, dtype=np.int64)
        labels = np.full(self.context, IGNORE, dtype=np.int64)
        previous = np.full(self.context, NOTHING, dtype=np.int64)
        offsets = []
        at = 0
        for piece in self._members[self._bounds[place] : self._bounds[place + 1]].tolist():
            begin, end = int(self._pieces.begin[piece]), int(self._pieces.end[piece])
            first, last = int(self._pieces.first[piece]), int(self._pieces.last[piece])
            offsets.append(at)
            tokens[at : at + end - begin] = self._store.tokens[begin:end]
            # One token more on either side, where the document has it: a cut loses no label.
            after = self._store.tokens[begin + 1 : min(end + 1, last)]
            before = self._store.tokens[max(begin - 1, first) : end - 1]
            labels[at : at + len(after)] = after
            previous[at + end - begin - len(before) : at + end - begin] = before
            at += end - begin
        if at < self.context:
            offsets.append(at)
        return Sample(tokens, labels, previous, tuple(offsets))

    def documents_of(self, index: int) -> list[int]:
        """The documents of the corpus, by number, that the sample with this global index holds parts of."""
        place = self._place(*divmod(index, len(self)))
        pieces = self._members[self._bounds[place] : self._bounds[place + 1]]
        found = np.searchsorted(self._store.starts, self._pieces.first[pieces], side="right") - 1
        return [int(number) for number in np.unique(found)]

    def _place(self, epoch: int, position: int) -> int:
        if self._part == "held_out":
            return position
        if self._order[0] != epoch:
            self._order = (epoch, permutation(self._plan.seed, epoch, len(self)))
        return int(self._order[1][position])

    def context_at(self, step: int) -> int:
        return self.context

    def held_out(self) -> "Packed":
        return Packed(self._store, self._tokenizer, self._plan, facts=self._facts, part="held_out")

    def documents(self) -> Iterator[Ints]:
        """The tokens of each document of this part, whole, in file order."""
        for i in self._documents.tolist():
            yield np.asarray(self._store.tokens[self._store.starts[i] : self._store.starts[i + 1]], np.int64)

    def encode(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer.encode([text])[0].tolist()
        return found

    def decode(self, tokens: Iterable[int]) -> str:
        return self._tokenizer.decode(tokens)

    @property
    def padding(self) -> float:
        """Share of the tokens of an epoch that are padding."""
        used = int((self._pieces.end - self._pieces.begin).sum())
        return 1.0 - used / (len(self) * self.context)

    def describe(self) -> dict[str, Any]:
        meta = self._store.meta
        lengths = np.diff(self._store.starts)[self._documents]
        return self._facts | {
            "part": self._part,
            "sha256": meta["sha256"],
            "tokenizer": meta["tokenizer"],
            "vocab": self.vocab,
            "documents": len(self._documents),
            "tokens": int(lengths.sum()),
            "bytes_per_token": self.bytes_per_token,
            "context": self.context,
            "samples": len(self),
            "pack": self._plan.pack,
            "padding": self.padding,
            "records": meta["records"],
            "bad": meta["bad"],
            "bad_records": meta["bad_records"],
        }


def permutation(seed: int, epoch: int, length: int, *part: int) -> Ints:
    """The order of an epoch, or of a part of one, int64 `[length]`.

    Sorts raw random bits: numpy promises those for ever, but not what `Generator.permutation` makes of them.
    """
    bits = np.random.PCG64(np.random.SeedSequence([seed, epoch, *part])).random_raw(length)
    return np.argsort(bits, kind="stable")
