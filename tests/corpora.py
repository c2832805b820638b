"""Small corpora for tests of data, and comparison of samples."""

from pathlib import Path
from typing import Any

import numpy as np

from longspan.train.data.sample import Sample
from longspan.train.data.text import Text


def write_documents(root: Path) -> Path:
    """60 documents of 1 to 300 random bytes, two of a single byte, in a new folder."""
    root.mkdir()
    rng = np.random.default_rng(0)
    lengths = [1, 1, 16, 17, 32, 33, 300, *rng.integers(2, 120, 53).tolist()]
    for i, length in enumerate(lengths):
        (root / f"{i:03}.txt").write_bytes(bytes(rng.integers(32, 127, length, dtype=np.uint8)))
    return root


def text(path: str | Path, cache: Path, **settings: Any) -> Text:
    """`data=text` with 16 tokens a sample and a fifth held out."""
    chosen: dict[str, Any] = {"path": path, "context": 16, "cache": cache, "held_out": 0.2} | settings
    return Text(**chosen)


def runs(sample: Sample) -> list[tuple[int, int]]:
    """Start and end of each document in a sample."""
    return list(zip(sample.offsets, [*sample.offsets[1:], len(sample.tokens)], strict=True))


def same(a: Sample, b: Sample) -> bool:
    arrays = all(np.array_equal(getattr(a, n), getattr(b, n)) for n in ("tokens", "labels", "previous"))
    return arrays and a.offsets == b.offsets
