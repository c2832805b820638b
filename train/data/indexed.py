"""Megatron's pair of files, PREFIX.bin with token ids and PREFIX.idx with where documents start.

The format is megatron-core's `IndexedDataset`, whose own classes read the index and write both files.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .cache import Store
from .packed import Packed, Plan
from .sample import Ints, Sample
from .tokenizer import Tokenizer, make

# Tokens at each end of a document by which it is split off: copies stay on one side.
_ENDS = 64
# Documents that are hashed at a time.
_HASHED = 4096
# Held-out tokens that are decoded to learn the bytes of one.
_DECODED = 1 << 20


class Indexed(Packed):
    """Documents of token ids in Megatron's format, packed as those of `Text` are.

    Args:
        path: PREFIX of PREFIX.bin and PREFIX.idx, or either file.
        context: Tokens per sample.
        tokenizer: What made the ids: `bytes`, or the path of a `tokenizers` JSON file.
        seed: Of the order.
        held_out: Share of the documents that is held out, by a hash of the tokens at both ends of each.
        pack: Several documents a sample; else each piece of a document is padded to the context.

    Raises:
        FileNotFoundError: One of the files is missing.
        ValueError: A setting is wrong, a file is damaged, or there are not two documents.
        ModuleNotFoundError: megatron-core is not installed.
    """

    def __init__(
        self, *, path: str | os.PathLike[str], context: int, tokenizer: str, seed: int = 0,
        held_out: float = 0.01, pack: bool = True,
    ) -> None:  # fmt: skip
        plan, ids = Plan(context, seed, held_out, pack=pack), make(tokenizer)
        prefix = _prefix(str(path))
        facts = {"corpus": "indexed", "path": os.path.abspath(prefix)}
        super().__init__(_store(prefix, ids, held_out), ids, plan, facts=facts)

    def sample(self, index: int, step: int = 0) -> Sample:
        """See `Packed.sample`. ValueError for an id that the tokenizer does not have."""
        found = super().sample(index, step)
        _check_ids(found.tokens, self.vocab, self._facts["path"])
        return found


def _prefix(path: str) -> str:
    """Both files' path without its ending."""
    prefix = path.removesuffix(".bin").removesuffix(".idx")
    for end in (".bin", ".idx"):
        if not Path(prefix + end).expanduser().is_file():
            raise FileNotFoundError(
                f"data.path={path!r}: there is no {prefix}{end}; give PREFIX of PREFIX.bin and PREFIX.idx"
            )
    return os.path.expanduser(prefix)


def _megatron() -> Any:
    try:
        from megatron.core.datasets import indexed_dataset
    except ModuleNotFoundError as error:
        message = "Megatron's .bin and .idx files need megatron-core: pip install longspan[megatron]"
        raise ModuleNotFoundError(message) from error
    return indexed_dataset


def _store(prefix: str, tokenizer: Tokenizer, held_out: float) -> Store:
    index = _index(prefix)
    lengths = np.asarray(index.sequence_lengths, np.int64)
    ends = np.concatenate([[0], np.cumsum(lengths)])
    tokens = _tokens(f"{prefix}.bin", index.dtype, ends)
    if not np.array_equal(index.sequence_pointers, ends[:-1] * tokens.itemsize):
        raise ValueError(f"data.path: {prefix}.idx is damaged: its sequences do not follow each other")
    bounds = ends[np.asarray(index.document_indices, np.int64)]
    # documents without a token are no documents
    starts = np.unique(bounds)
    keys = _keys(tokens, starts)
    meta = {
        "root": prefix,
        "tokenizer": tokenizer.name,
        "sha256": hashlib.sha256(Path(f"{prefix}.idx").read_bytes() + keys.tobytes()).hexdigest(),
        "records": len(bounds) - 1,
        "bad": len(bounds) - len(starts),
        "bad_records": [],
    }
    counted = Store(tokens, starts, np.diff(starts), keys, meta)
    sizes = np.diff(starts) * _bytes_per_token(counted, tokenizer, held_out)
    return Store(tokens, starts, np.rint(sizes).astype(np.int64), keys, meta)


def _index(prefix: str) -> Any:
    """What the .idx file says; ValueError if it says nothing that can be."""
    module, path = _megatron(), f"{prefix}.idx"
    _check_header(path)
    try:
        index = module.IndexedDataset(prefix, mmap=False).index
    except (AssertionError, ValueError) as error:
        raise ValueError(f"data.path: {path} is damaged: {error or 'its counts differ'}") from error
    documents = np.asarray(index.document_indices)
    if documents[0] or (np.diff(documents) < 0).any() or (np.asarray(index.sequence_lengths) < 0).any():
        raise ValueError(f"data.path: {path} is damaged: its documents are not in order")
    return index


def _check_header(path: str) -> None:
    """megatron-core's reader leaves noise behind where it fails, so that the commonest faults are found
    before: another file, another version, a file cut short.
    """
    head = struct.Struct("<9sQBQQ")
    with open(path, "rb") as file:
        found = file.read(head.size)
    if len(found) < head.size or not found.startswith(b"MMIDIDX"):
        raise ValueError(f"data.path: {path} is no Megatron index, or cut short")
    _, version, _, sequences, documents = head.unpack(found)
    wanted = head.size + 12 * sequences + 8 * documents
    # modes of several media may follow, a byte each
    if version != 1 or os.path.getsize(path) not in (wanted, wanted + sequences) or not documents:
        raise ValueError(
            f"data.path: {path} is damaged, cut short or of another version: version {version}, "
            f"{sequences} sequences and {documents - 1} documents in {os.path.getsize(path)} bytes"
        )


def _tokens(path: str, dtype: Any, ends: Ints) -> npt.NDArray[Any]:
    wanted, found = int(ends[-1]) * np.dtype(dtype).itemsize, os.path.getsize(path)
    if found != wanted:
        raise ValueError(f"data.path: {path} has {found} bytes, but its index needs {wanted}: copy it again")
    if not np.issubdtype(dtype, np.integer) or not wanted:
        raise ValueError(
            f"data.path: {path} holds {np.dtype(dtype)}, {ends[-1]} of them; it must hold token ids"
        )
    return np.memmap(path, dtype=dtype, mode="r")


def _keys(tokens: npt.NDArray[Any], starts: Ints) -> npt.NDArray[np.float64]:
    """From 0 to 1 by what each document holds at its ends, and its length: eight bytes of their SHA-256."""
    tokens, lengths, found = np.asarray(tokens), np.diff(starts), np.empty(len(starts) - 1)
    # documents whose ends are as long as each other's are rows of an array
    ends = np.minimum(lengths, _ENDS)
    order = np.argsort(ends, kind="stable")
    bounds = np.searchsorted(ends[order], np.arange(1, _ENDS + 2))
    for end, first, last in zip(range(1, _ENDS + 1), bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        for at in range(first, last, _HASHED):
            some = order[at : min(at + _HASHED, last)]
            found[some] = _hashed(tokens, starts[some], lengths[some], end)
    return found


def _hashed(tokens: npt.NDArray[Any], starts: Ints, lengths: Ints, end: int) -> npt.NDArray[np.float64]:
    """`_keys` of documents by the first and the last `end` tokens of each."""
    rows = np.empty((len(starts), 2 * end + 1), "<i8")
    pieces = np.lib.stride_tricks.sliding_window_view(tokens, end)
    rows[:, :end] = pieces[starts]
    rows[:, end:-1] = pieces[starts + lengths - end]
    rows[:, -1] = lengths
    digests, blank = list[bytes](), hashlib.sha256()
    for row in rows.view(np.uint8):
        # OpenSSL makes a new one slower than it hashes so little
        one = blank.copy()
        one.update(row.data)
        digests.append(one.digest())
    return np.frombuffer(b"".join(digests), "<u8")[::4] / 2.0**64


def _bytes_per_token(store: Store, tokenizer: Tokenizer, held_out: float) -> float:
    """UTF-8 bytes of what the first held-out tokens decode to, for each of them."""
    count, size = 0, 0
    for i in store.split(held_out)[1].tolist():
        begin, end = int(store.starts[i]), int(store.starts[i + 1])
        ids = store.tokens[begin : min(end, begin + _DECODED - count)].tolist()
        _check_ids(np.asarray(ids), tokenizer.vocab, store.meta["root"])
        count, size = count + len(ids), size + len(tokenizer.decode(ids).encode())
        if count >= _DECODED:
            break
    return max(size, 1) / count


def _check_ids(ids: npt.NDArray[Any], vocab: int, prefix: str) -> None:
    """ValueError for an id that the tokenizer does not have."""
    bad = ids[(ids < 0) | (ids >= vocab)]
    if len(bad):
        raise ValueError(
            f"data.tokenizer has {vocab} ids, but {prefix}.bin holds the id {bad[0]}: give the tokenizer "
            "that made the file"
        )


def write(prefix: str, documents: Iterable[Ints], vocab: int) -> tuple[int, int]:
    """Writes PREFIX.bin and PREFIX.idx, the index last; returns how many documents and tokens they hold.

    Raises:
        FileExistsError: One of them is there.
        ModuleNotFoundError: megatron-core is not installed.
    """
    module = _megatron()
    for end in (".bin", ".idx"):
        if Path(prefix + end).exists():
            raise FileExistsError(f"out={prefix}: {prefix}{end} is there already; give another name")
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    # under other names until they are whole
    builder = module.IndexedDatasetBuilder(f"{prefix}.bin.part", dtype=module.DType.optimal_dtype(vocab))
    count = tokens = 0
    for ids in documents:
        builder.add_document(ids, [len(ids)])
        count, tokens = count + 1, tokens + len(ids)
    builder.finalize(f"{prefix}.idx.part")
    for end in (".bin", ".idx"):
        os.replace(f"{prefix}{end}.part", prefix + end)
    return count, tokens
