"""This Python's standard library without its tests, as source: long real documents on every machine."""

import os
import platform
import sysconfig
from pathlib import Path
from typing import Any

from .cache import Source, Store, load
from .check import whole
from .corpus import Corpus
from .packed import Packed, Plan
from .tokenizer import Bytes

_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Stdlib(Packed):
    """Python source as bytes; a file is held out by the hash of its name.

    Args:
        context: Tokens (bytes) per sample.
        seed: Of the order.
        cache: Folder for the tokens.
        held_out: Share of the files that is held out.
        min_bytes: Leave out shorter files.
        pack: Several documents a sample; else each piece of a document is padded to the context.
    """

    def __init__(
        self,
        *,
        context: int,
        seed: int = 0,
        cache: str | os.PathLike[str],
        held_out: float = 0.05,
        min_bytes: int = 0,
        pack: bool = True,
    ) -> None:
        plan = Plan(context, seed, held_out, pack=pack)
        facts = provenance() | {"corpus": "stdlib", "min_bytes": min_bytes}
        super().__init__(tokens(cache, min_bytes), Bytes(), plan, facts=facts)


def tokens(cache: str | os.PathLike[str], min_bytes: int = 0) -> Store:
    """The bytes of the source files of at least `min_bytes`."""
    return load(Source(files(min_bytes), Bytes(), split_by="name"), cache)


def files(min_bytes: int = 0) -> Corpus:
    """The source files of at least `min_bytes` (never the empty ones), sorted by name.

    Raises:
        ValueError: No file is that long, or this Python comes without source.
    """
    whole("data.min_bytes", min_bytes, 0)
    root, names = Path(sysconfig.get_path("stdlib")), list[str]()
    # strings, not a Path each: every rank of every job does this to thousands of names
    for folder, below, found in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_SOURCE]
        sources = (os.path.join(folder, name) for name in found if name.endswith(".py"))
        names += [path for path in sources if os.path.getsize(path) >= max(min_bytes, 1)]
    names = [name[len(str(root)) + 1 :].replace(os.sep, "/") for name in names]
    if not names:
        raise ValueError(f"data.min_bytes={min_bytes} leaves an empty corpus: no such source file in {root}")
    return Corpus(root, tuple(sorted(names)))


def provenance() -> dict[str, Any]:
    """Which standard library this is."""
    return {"python": platform.python_version()}
