"""Records of a Hugging Face data set, file by file; nothing is on this machine before it is read."""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .corpus import Bad, Document, cell

# What reads a single file, by the end of its name; of a folder or of the Hub the package knows by itself.
_KINDS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
_PACKED = (".gz", ".zst", ".bz2", ".xz")
# Records that are fetched at a time.
_ROWS = 256


class Unreachable(RuntimeError):
    """A file elsewhere cannot be had just now. A run that is started again may get it."""


class Shards:
    """The files of one split, which are read from their beginning only.

    Args:
        path: A file (.jsonl, .json, .parquet, .txt, also packed), a folder, or a name on the Hub.
        name: Of the data set's configuration, if it has several.
        split: `train`, or what else it has.
        revision: Of a data set on the Hub: a branch, tag or commit.
        field: Where the text is.

    Raises:
        ModuleNotFoundError: `datasets` is not installed.
        FileNotFoundError: There is nothing at `path`, here or on the Hub.
        ValueError: The split or the configuration is not there, or the first file is damaged.
        Unreachable: The Hub does not answer.
    """

    def __init__(
        self, path: str, *, name: str | None = None, split: str = "train", revision: str | None = None,
        field: str = "text",
    ) -> None:  # fmt: skip
        builder = _builder(path, name, split, revision)
        found = {str(kind): list(files) for kind, files in (builder.config.data_files or {}).items()}
        if split not in found:
            raise ValueError(
                f"data.split={split!r} is not there: {path} has {', '.join(found) or 'no files'}"
            )
        self.field = field
        with _told(found[split][0], 0):
            self._data = builder.as_streaming_dataset(split=split)
        count = self._data.num_shards
        # such as files within one archive
        self.files = found[split] if len(found[split]) == count else [f"{path}[{i}]" for i in range(count)]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, shard: int, first: int = 0) -> Iterator[Document | Bad]:
        """The records of a file in order, from the one with this number on (0 is the first); a location is
        `file:record`, which counts from 1. Those before are fetched, but not looked at.

        Raises:
            ValueError: The file is damaged, or has no such field.
            OSError: It cannot be reached.
        """
        file, at = self.files[shard], 0
        tables = self._data.shard(len(self), shard).with_format("arrow").iter(batch_size=_ROWS)
        while True:
            with _told(file, at):
                table = next(tables, None)
            if table is None:
                return
            if self.field not in table.column_names:
                raise ValueError(
                    f"data.field={self.field!r} is not there at {file}:{at + 1}, which has "
                    f"{', '.join(table.column_names)}"
                )
            skipped = min(max(0, first - at), table.num_rows)
            for row, value in enumerate(table.column(self.field).slice(skipped), at + skipped + 1):
                yield self._record(f"{file}:{row}", value)
            at += table.num_rows

    def _record(self, location: str, value: Any) -> Document | Bad:
        if not value.is_valid:
            return Bad(location, f"no field {self.field!r}, or nothing in it")
        return cell(location, value)

    def key(self) -> list[tuple[str, int]]:
        """Names of the files, and sizes of those that are here; on the Hub a name holds the commit."""
        here = ((file, Path(file)) for file in self.files)
        return [(path.name, path.stat().st_size) if path.is_file() else (file, 0) for file, path in here]


@contextmanager
def _told(file: str, records: int) -> Iterator[None]:
    """Says which file is damaged, and behind which record."""
    said = f"{file} cannot be read beyond record {records}"
    # what pyarrow raises is one of these
    try:
        yield
    except OSError as error:
        if not Path(file).exists():
            raise Unreachable(f"{said}, which is not on this machine: {error}") from error
        raise OSError(f"{said}: {error}") from error
    except (ValueError, EOFError, zlib.error) as error:
        raise ValueError(f"{said}: {error}") from error


def _builder(path: str, name: str | None, split: str, revision: str | None) -> Any:
    """What knows the files of the data set, and how they are read."""
    try:
        import datasets
        from datasets.packaged_modules.json.json import JsonConfig
    except ModuleNotFoundError as error:
        message = "data=streaming needs the package datasets: pip install longspan[datasets]"
        raise ModuleNotFoundError(message) from error
    here = Path(os.path.expanduser(path))
    try:
        if here.is_file():
            kind = _kind(here)
            builder = datasets.load_dataset_builder(kind, data_files={split: str(here)})
        elif here.is_dir():
            builder = datasets.load_dataset_builder(str(here), name)
        else:
            builder = datasets.load_dataset_builder(path, name, revision=revision)
    except ConnectionError as error:
        raise Unreachable(f"data.path={path!r}: the Hub does not answer: {error}") from error
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data.path={path!r} is neither a file or a folder of data nor on the Hub: {error}"
        ) from error
    if isinstance(builder.config, JsonConfig):
        # else what is not text would come as JSON, and so would all texts beside it, in quotes
        builder.config.on_mixed_types = None
        builder.config.parse_agent_traces = False
    return builder


def _kind(file: Path) -> str:
    suffixes = [suffix for suffix in file.suffixes if suffix not in _PACKED]
    kind = _KINDS.get(suffixes[-1]) if suffixes else None
    if kind is None:
        raise ValueError(
            f"data.path={str(file)!r}: a file that is streamed ends in {', '.join(_KINDS)}; "
            "data=text takes any other"
        )
    return kind
