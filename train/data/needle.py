"""The needle: a random span in a haystack of source code, to be repeated at the end of the sequence."""

import bisect
import copy
import os
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from . import stdlib
from .cache import Store
from .check import fraction, switch, whole
from .sample import IGNORE, NOTHING, Ints, Sample
from .tokenizer import Bytes

# Stands before the needle and asks for it at the end; control characters are not found in source code.
MARKER = b"\x1e\x1f"
# What a needle is made of, each character once, so that the one before says which comes next.
_LETTERS = np.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", dtype=np.uint8)
# Streams of random numbers that never meet.
_STREAMS = {"train": 1, "held_out": 2, "probe": 3}


class Needle:
    """Sequences `text, marker, span, text, marker, span`; a `Dataset` that tests how far attention reaches.

    Only the repeated span is labelled. The depth of the needle is uniform over the sequence: were it often
    the same, the model would learn the distance to it instead of looking for it.

    Args:
        context: Tokens (bytes) per sample, at most.
        seed: Of the samples.
        cache: Folder for the tokens of the haystack.
        span: Bytes to repeat, distinct random capitals and digits.
        depth: Where the needle is, 0 at the start to 1 just before the question; None: as said above.
        curriculum: Pairs of a step and the context from this step on, from step 0, `context` at most; None:
            always `context`.
        haystack_loss: Label the text too.
        held_out: Share of the files of the haystack that is held out.
    """

    vocab = Bytes.vocab
    bytes_per_token = 1.0

    def __init__(
        self,
        *,
        context: int,
        seed: int = 0,
        cache: str | os.PathLike[str],
        span: int = 24,
        depth: float | None = None,
        curriculum: Sequence[Sequence[int]] | None = None,
        haystack_loss: bool = False,
        held_out: float = 0.05,
    ) -> None:
        self._block = len(MARKER) + whole("data.span", span, 1)
        if span > len(_LETTERS):
            raise ValueError(f"data.span={span} must be at most {len(_LETTERS)}: its characters are distinct")
        self.context = whole("data.context", context, 2 * self._block)
        self._seed = whole("data.seed", seed, 0)
        self._span = span
        self._depth = None if depth is None else fraction("data.depth", depth, ends=True)
        self._steps, self._contexts = self._checked(curriculum or [(0, context)])
        self._haystack_loss = switch("data.haystack_loss", haystack_loss)
        store = stdlib.tokens(cache)
        train, held = store.split(fraction("data.held_out", held_out, ends=False))
        self._haystacks = {"train": _joined(store, train), "held_out": _joined(store, held)}
        self._documents = {"train": len(train), "held_out": len(held)}
        self._sha256 = store.meta["sha256"]
        self._part: Literal["train", "held_out"] = "train"

    def _checked(self, curriculum: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
        if not all(isinstance(pair, Sequence) and len(pair) == 2 for pair in curriculum):
            raise ValueError(f"data.curriculum={curriculum} must be pairs like [[0, 256], [1000, 2048]]")
        said = f"data.curriculum={[list(pair) for pair in curriculum]}"
        steps = [whole(f"{said}: the step", step, 0) for step, _ in curriculum]
        contexts = [whole(f"{said}: the context", context, 2 * self._block) for _, context in curriculum]
        if steps[0] != 0 or any(a >= b for a, b in zip(steps, steps[1:], strict=False)):
            raise ValueError(f"{said}: steps must start at 0 and rise")
        return steps, [min(context, self.context) for context in contexts]

    @property
    def shortest(self) -> int:
        """The least context that holds the needle and the question."""
        return 2 * self._block

    def __len__(self) -> int:
        """Samples that read the haystack about once; there is no end of samples."""
        return max(1, len(self._haystacks[self._part]) // self.context)

    def context_at(self, step: int) -> int:
        if self._part == "held_out":
            return self.context
        return self._contexts[bisect.bisect_right(self._steps, step) - 1]

    def sample(self, index: int, step: int = 0) -> Sample:
        """The sample with this index, of the length that this step has.

        Raises:
            IndexError: `index` is negative.
        """
        if index < 0:
            raise IndexError(f"sample {index}: indices start at 0")
        _, anywhere, *rest = self._random(self._seed, _STREAMS[self._part], index)
        drawn = anywhere / 2.0**64
        tokens = self._tokens(
            self._part, self.context_at(step), drawn if self._depth is None else self._depth, rest
        )
        return self._labelled(tokens, everything=self._haystack_loss)

    def probe(self, depth: float, context: int, index: int) -> Sample:
        """A sample with the needle at `depth` (0 to 1) of `context` tokens, in held-out text, for any seed.

        Only the answer is labelled, also with `haystack_loss`. `context` may exceed the one trained on.
        """
        depth = fraction("depth", depth, ends=True)
        whole("context", context, 2 * self._block)
        _, _, *rest = self._random(_STREAMS["probe"], round(depth * 2**32), context, index)
        return self._labelled(self._tokens("held_out", context, depth, rest), everything=False)

    def answer(self, context: int) -> slice:
        """Positions of a sample of `context` tokens whose labels are the repeated span."""
        return slice(context - 1 - self._span, context - 1)

    def held_out(self) -> "Needle":
        part = copy.copy(self)
        part._part = "held_out"
        return part

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: Iterable[int]) -> str:
        return Bytes().decode(tokens)

    def describe(self) -> dict[str, Any]:
        return stdlib.provenance() | {
            "corpus": "needle",
            "part": self._part,
            "sha256": self._sha256,
            "tokenizer": Bytes.name,
            "vocab": self.vocab,
            "documents": self._documents[self._part],
            "tokens": len(self._haystacks[self._part]),
            "bytes_per_token": self.bytes_per_token,
            "context": self.context,
            "curriculum": [list(pair) for pair in zip(self._steps, self._contexts, strict=True)],
            "span": self._span,
            "marker": MARKER.decode(),
            "depth": self._depth,
            "haystack_loss": self._haystack_loss,
            "samples": len(self),
            "padding": 0.0,
            "bad": 0,
            "bad_records": [],
        }

    def _random(self, *key: int) -> list[int]:
        # Raw bits, since numpy may change what it makes of them.
        bits = np.random.PCG64(np.random.SeedSequence(key)).random_raw(3 + len(_LETTERS))
        found: list[int] = bits.tolist()
        return found

    def _tokens(self, part: str, context: int, depth: float, random: list[int]) -> Ints:
        start, *letters = random
        drawn = np.argsort(np.array(letters, np.uint64), kind="stable")[: self._span]
        needle = np.concatenate([np.frombuffer(MARKER, np.uint8), _LETTERS[drawn]])
        haystack = self._haystacks[part]
        rest = context - 2 * self._block
        # Around the end, for a context longer than the haystack.
        text = haystack[(start % len(haystack) + np.arange(rest)) % len(haystack)]
        at = round(depth * rest)
        return np.concatenate([text[:at], needle, text[at:], needle]).astype(np.int64)

    def _labelled(self, tokens: Ints, *, everything: bool) -> Sample:
        labels = np.append(tokens[1:], IGNORE)
        if not everything:
            labels[: self.answer(len(tokens)).start] = IGNORE
        return Sample(tokens, labels, np.append(NOTHING, tokens[:-1]), (0,))


def _joined(store: Store, documents: Ints) -> npt.NDArray[np.uint8]:
    parts = [store.tokens[store.starts[i] : store.starts[i + 1]] for i in documents]
    return np.concatenate(parts).astype(np.uint8)
