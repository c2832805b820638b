"""Text to token ids and back: bytes, or a `tokenizers` JSON file."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from .sample import Ints

# How well-known tokenizers call the token that ends a document.
_END_NAMES = ("<|endoftext|>", "<|end_of_text|>", "<eos>", "</s>", "[EOS]", "[SEP]")


class Tokenizer(Protocol):
    """Text to token ids and back.

    Attributes:
        name: What it is, for people and as a key: two tokenizers of one name give the same ids.
        vocab: Number of ids.
        end: The id that ends a document, None if it has none.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab(self) -> int: ...
    @property
    def end(self) -> int | None: ...

    def encode(self, texts: Sequence[str]) -> list[Ints]:
        """Ids of each text, int64 `[tokens]`; `end` is not added."""
        ...

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of token ids."""
        ...


class Bytes:
    """UTF-8 bytes: ids 0 to 255, and 256 for the end of a document."""

    name = "bytes"
    vocab = 257
    end: int | None = 256

    def encode(self, texts: Sequence[str]) -> list[Ints]:
        return [np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64) for text in texts]

    def decode(self, tokens: Iterable[int]) -> str:
        return bytes(token for token in tokens if token < 256).decode(errors="replace")


class Subword:
    """A tokenizer from a `tokenizers` JSON file; special tokens are never added to a text.

    Raises:
        FileNotFoundError: The file is missing.
        ValueError: The file is not what `tokenizers` writes.
        ModuleNotFoundError: `tokenizers` is not installed.
    """

    def __init__(self, path: str) -> None:
        try:
            import tokenizers
        except ModuleNotFoundError as error:
            message = f"data.tokenizer={path!r} needs tokenizers: pip install longspan[tokenizers]"
            raise ModuleNotFoundError(message) from error
        file = Path(path).expanduser()
        if not file.is_file():
            raise FileNotFoundError(
                f"data.tokenizer={path!r} does not exist: give 'bytes' or a tokenizers JSON file"
            )
        content = file.read_bytes()
        # The package raises bare Exception for a broken file.
        try:
            self._inner = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:
            raise ValueError(f"data.tokenizer={path!r} is not a tokenizers JSON file: {error}") from error
        # A file may carry the settings of somebody's batches; both would change documents.
        self._inner.no_truncation()
        self._inner.no_padding()
        ids = self._inner.get_vocab(with_added_tokens=True)
        self.name = f"{file.name} sha256:{hashlib.sha256(content).hexdigest()}"
        self.vocab = max(ids.values(), default=-1) + 1
        self.end: int | None = next((ids[name] for name in _END_NAMES if name in ids), None)

    def encode(self, texts: Sequence[str]) -> list[Ints]:
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, dtype=np.int64) for encoding in encodings]

    def decode(self, tokens: Iterable[int]) -> str:
        return str(self._inner.decode([int(token) for token in tokens], skip_special_tokens=False))


def make(tokenizer: str) -> Tokenizer:
    """The tokenizer that a setting names: `bytes`, or the path of a JSON file."""
    if tokenizer == "bytes":
        return Bytes()
    if str(tokenizer).endswith(".json"):
        return Subword(str(tokenizer))
    raise ValueError(f"data.tokenizer={tokenizer!r} is unknown: use 'bytes' or a path that ends in .json")
