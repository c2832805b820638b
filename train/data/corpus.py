"""Documents read from files: text, JSON lines (plain, gzip, zstd) and Parquet; bad records are located."""

import codecs
import fnmatch
import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_JSON_LINES = {".jsonl": "", ".jsonl.gz": "gzip", ".jsonl.zst": "zstd"}
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Document:
    """A text and where it stands: `location` is `file`, `file:line` or `file:row`, relative to the corpus."""

    location: str
    text: str


@dataclass(frozen=True)
class Bad:
    """A record that is no document, where it stands, and why."""

    location: str
    reason: str


@dataclass(frozen=True)
class Corpus:
    """Files below a folder, in the order in which they are read.

    Attributes:
        root: The folder.
        names: Paths relative to it, with `/`.
        field: Where the text is in a JSON object or a Parquet table.
    """

    root: Path
    names: tuple[str, ...]
    field: str = "text"

    def read(self) -> Iterator[Document | Bad]:
        """Give every record in order.

        Raises:
            ValueError: A compressed or Parquet file is damaged, so that an unknown number of records is lost.
            ModuleNotFoundError: The file needs a package that is not installed.
        """
        for name in self.names:
            path = self.root / name
            packing = next((kind for suffix, kind in _JSON_LINES.items() if name.endswith(suffix)), None)
            if not path.is_file():
                yield Bad(name, "not a regular file")
            elif packing is not None:
                yield from _json_lines(path, name, packing, field=self.field)
            elif name.endswith(".parquet"):
                yield from _parquet(path, name, self.field)
            else:
                yield _text_file(path, name)

    def state(self) -> list[tuple[str, int, int]]:
        """Name, size in bytes and time of change in ns of every file; zeros for one that cannot be asked."""
        found = []
        for name in self.names:
            try:
                status = (self.root / name).stat()
            except OSError:
                found.append((name, 0, 0))
            else:
                found.append((name, status.st_size, status.st_mtime_ns))
        return found


def find(path: str | os.PathLike[str], field: str = "text", files: str = "*") -> Corpus:
    """The corpus at `path`: one file, or the files below a folder whose names match `files`, as a shell
    would match them, sorted.

    Hidden files and folders and `__pycache__` are left out.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: The folder holds no such file.
    """
    root = Path(os.path.abspath(os.path.expanduser(path)))
    if root.is_file():
        return Corpus(root.parent, (root.name,), field)
    if not root.is_dir() or not os.fspath(path):
        raise FileNotFoundError(
            f"data.path={os.fspath(path)!r} does not exist: give a file or a folder of texts"
        )
    names = []
    for folder, below, found in os.walk(root):
        below[:] = [name for name in below if not name.startswith(".") and name != "__pycache__"]
        visible = (Path(folder, x) for x in fnmatch.filter(found, files) if not x.startswith("."))
        names += [file.relative_to(root).as_posix() for file in visible]
    if not names:
        raise ValueError(
            f"data.path={os.fspath(path)!r} is an empty corpus: the folder holds no file"
            + (f" whose name matches data.files={files!r}" if files != "*" else "")
        )
    return Corpus(root, tuple(sorted(names)), field)


def _document(location: str, text: object) -> Document | Bad:
    if not isinstance(text, str):
        return Bad(location, f"the text is {type(text).__name__}, not a string")
    if not text:
        return Bad(location, "empty document")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Bad(location, f"a lone surrogate at character {error.start}")
    return Document(location, text)


def _decoded(location: str, content: bytes) -> Document | Bad:
    try:
        return _document(location, content.decode())
    except UnicodeDecodeError as error:
        return Bad(location, f"not UTF-8 at byte {error.start}")


def _text_file(path: Path, name: str) -> Document | Bad:
    try:
        content = path.read_bytes()
    except OSError as error:
        return Bad(name, f"cannot be read: {error.strerror}")
    return _decoded(name, content)


def _json_lines(path: Path, name: str, packing: str, *, field: str) -> Iterator[Document | Bad]:
    number = 0
    try:
        for number, line in enumerate(_lines(path, packing), 1):
            content = line.removeprefix(codecs.BOM_UTF8).strip()
            if content:
                yield _record(f"{name}:{number}", content, field)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} cannot be read beyond line {number}: {error}") from error


def _record(location: str, line: bytes, field: str) -> Document | Bad:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Bad(location, f"not UTF-8 at byte {error.start}")
    except (ValueError, RecursionError) as error:
        return Bad(location, f"broken JSON: {error}")
    if not isinstance(record, dict):
        return Bad(location, f"a JSON {type(record).__name__}, not an object")
    if field not in record:
        return Bad(location, f"no field {field!r}")
    return _document(location, record[field])


def _lines(path: Path, packing: str) -> Iterator[bytes]:
    if packing == "zstd":
        yield from _zstd_lines(path)
    elif packing == "gzip":
        with gzip.open(path, "rb") as unpacked:
            yield from unpacked
    else:
        with path.open("rb") as plain:
            yield from plain


def _zstd_lines(path: Path) -> Iterator[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs zstandard: pip install longspan[zstd]") from error
    # Not stream_reader: it ends silently in the middle of a truncated frame.
    frame, rest = None, b""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            while chunk:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    *whole, rest = (rest + frame.decompress(chunk)).split(b"\n")
                except zstandard.ZstdError as error:
                    raise OSError(str(error)) from error
                yield from whole
                chunk = frame.unused_data
                frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the zstd frame is cut short")
    yield rest


def _parquet(path: Path, name: str, field: str) -> Iterator[Document | Bad]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{path} needs pyarrow: pip install longspan[parquet]") from error
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if field not in columns:
                raise ValueError(f"data.field={field!r} is no column of {path}: it has {', '.join(columns)}")
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in batch.column(field):
                    row += 1
                    yield cell(f"{name}:{row}", value)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} cannot be read beyond row {row}: {error}") from error


def cell(location: str, value: object) -> Document | Bad:
    """A record from a value of an Arrow column."""
    # pyarrow raises UnicodeDecodeError here for a string column that holds other bytes.
    try:
        content = value.as_py()  # type: ignore[attr-defined]
    except UnicodeDecodeError as error:
        return Bad(location, f"not UTF-8 at byte {error.start}")
    return _decoded(location, content) if isinstance(content, bytes) else _document(location, content)
