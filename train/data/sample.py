"""What a data set gives: one training sequence with its labels, and the protocol of every data set."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# The label of a position that predicts nothing; torch's cross entropy skips it by default.
IGNORE = -100
# What `previous` says where a document starts.
NOTHING = -1


@dataclass(frozen=True)
class Sample:
    """One sequence over all ranks, before any sharding; the arrays are int64 `[context]`.

    Attributes:
        tokens: Token ids; 0 in the padding at the tail.
        labels: The token that follows in the same document, else `IGNORE`. Where a document was cut, the last
            label of a piece is the document's true next token.
        previous: The token before in the same document, across a cut too, else -1 at a document's start.
        offsets: Sorted starts of the documents in this sample, the first 0. Padding is a document of its own.
    """

    tokens: Ints
    labels: Ints
    previous: Ints
    offsets: tuple[int, ...]


@runtime_checkable
class Dataset(Protocol):
    """A data set. `index // len(dataset)` is the epoch; nothing here knows of ranks."""

    @property
    def vocab(self) -> int:
        """Number of token ids."""
        ...

    @property
    def context(self) -> int:
        """Tokens per sequence, over all ranks; the longest where the context grows with the step."""
        ...

    @property
    def bytes_per_token(self) -> float:
        """Mean UTF-8 bytes of a held-out token: nats per token / (ln 2 * this) is bits per byte."""
        ...

    def __len__(self) -> int:
        """Samples in an epoch."""
        ...

    def sample(self, index: int, step: int = 0) -> Sample:
        """The sample with this global index (any index >= 0), a pure function of its arguments."""
        ...

    def context_at(self, step: int) -> int:
        """Tokens per sequence in this step."""
        ...

    def held_out(self) -> "Dataset":
        """The held-out part, in file order, with the same context."""
        ...

    def describe(self) -> dict[str, Any]:
        """What this data is, for the record of the run; can be written as JSON."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        ...


@runtime_checkable
class Resumable(Protocol):
    """A data set that is read in order, so that a run goes on from where a checkpoint says."""

    def state(self, index: int) -> dict[str, Any]:
        """Where the sample with this global index begins, the same on every rank; can be written as JSON."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave: samples from that one on need none before."""
        ...


@runtime_checkable
class Sourced(Protocol):
    """A data set that knows where its samples are from."""

    def documents_of(self, index: int) -> list[int]:
        """The documents of the corpus, by number, that the sample with this global index holds parts of."""
        ...
