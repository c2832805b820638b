"""Tokens that are nobody's text: for throughput, memory and dry runs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .sample import IGNORE, NOTHING, Sample


@dataclass(frozen=True)
class Mock:
    """Random tokens in documents of one length; a `Dataset` that needs no file.

    context: tokens a sequence. vocab: token ids. document: tokens of each packed document; None: a sequence
    is one. seed: of the tokens. samples: sequences in an epoch.
    """

    context: int
    vocab: int
    document: int | None = None
    samples: int = 1_000_000
    seed: int = 0
    bytes_per_token: float = 1.0

    def __post_init__(self) -> None:
        least = {"context": 1, "vocab": 2, "samples": 1, "seed": 0}
        for name, low in least.items() if self.document is None else (least | {"document": 1}).items():
            if getattr(self, name) < low:
                raise ValueError(f"data.{name} is {getattr(self, name)}; it must be at least {low}")

    def __len__(self) -> int:
        return self.samples

    def sample(self, index: int, step: int = 0) -> Sample:
        """See `Dataset`."""
        every = self.document or self.context
        draw = np.random.default_rng((self.seed, index))
        tokens = draw.integers(self.vocab, size=self.context, dtype=np.int64)
        starts = np.arange(0, self.context, every)
        labels, previous = np.roll(tokens, -1), np.roll(tokens, 1)
        previous[starts] = NOTHING
        labels[starts - 1] = IGNORE
        return Sample(tokens, labels, previous, tuple(starts.tolist()))

    def context_at(self, step: int) -> int:
        return self.context

    def held_out(self) -> "Mock":
        return replace(self, seed=self.seed + 1)

    def describe(self) -> dict[str, Any]:
        facts = {"corpus": "mock", "context": self.context, "vocab": self.vocab, "samples": self.samples}
        return facts | {"document": self.document, "pack": self.document, "seed": self.seed}

    def encode(self, text: str) -> list[int]:
        """Bytes, as far as the vocabulary goes."""
        return [byte % self.vocab for byte in text.encode()]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token % 256 for token in tokens).decode(errors="replace")
