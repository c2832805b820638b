"""Records that lie in files or in tar archives: what there is, and where its bytes are."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Blob:
    """`size` bytes of `path` from `start` on; `location` names them in messages."""

    location: str
    path: str
    start: int
    size: int

    def read(self) -> bytes:
        """Raises OSError if the file cannot be read, ValueError if it has become shorter."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            content = file.read(self.size)
        if len(content) != self.size:
            raise ValueError(f"{self.location} has changed: {len(content)} bytes are left of {self.size}")
        return content


@dataclass(frozen=True)
class Files:
    """Files below a folder, sorted by name (with `/`, relative to `root`)."""

    root: Path
    names: tuple[str, ...]

    def state(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every file: a cache made from other ones is not used."""
        stats = [(name, (self.root / name).stat()) for name in self.names]
        return [(name, status.st_size, status.st_mtime_ns) for name, status in stats]

    def blob(self, name: str) -> Blob:
        path = self.root / name
        return Blob(name, str(path), 0, path.stat().st_size)


def listing(path: str | os.PathLike[str], suffixes: tuple[str, ...], what: str) -> Files:
    """The file at `path`, or every file below the folder whose name ends in one of `suffixes` (lower case).

    Hidden files and folders are left out.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: There is no such file.
    """
    root = Path(os.path.abspath(os.path.expanduser(path)))
    if root.is_file():
        found, root = [root], root.parent
    elif root.is_dir() and os.fspath(path):
        found = [p for p in root.rglob("*") if p.is_file()]
    else:
        raise FileNotFoundError(f"data.path={os.fspath(path)!r} does not exist: give {what}")
    names = sorted(p.relative_to(root).as_posix() for p in found)
    kept = [
        name
        for name in names
        if name.lower().endswith(suffixes) and not any(part.startswith(".") for part in name.split("/"))
    ]
    if not kept:
        raise ValueError(f"data.path={os.fspath(path)!r} has no {', '.join(suffixes)}: give {what}")
    return Files(root, tuple(kept))


def groups(files: Files, name: str) -> Iterator[tuple[str, dict[str, Blob]]]:
    """The samples of a WebDataset tar: location, and its members by extension.

    Members that follow each other and agree up to the first dot of the file name are one sample
    (https://github.com/webdataset/webdataset, "The WebDataset Format").

    Raises:
        ValueError: The archive is damaged, or compressed, so that its members cannot be sought.
    """
    path, key, found = files.root / name, "", dict[str, Blob]()
    last = "its start"
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                last = member.name
                if not member.isfile():
                    continue
                stem, extension = _split(member.name)
                if stem != key and found:
                    yield f"{name}:{key}", found
                    found = {}
                key = stem
                found[extension] = Blob(f"{name}:{member.name}", str(path), member.offset_data, member.size)
            _whole(path, archive.offset)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read beyond {last}: {error}; archives must be whole and not compressed"
        ) from error
    if found:
        yield f"{name}:{key}", found


def _whole(path: Path, end: int) -> None:
    # tarfile ends silently where the last member's bytes are missing, or the archive's closing zeros are
    if path.stat().st_size < end:
        raise EOFError("the archive is cut short")


def _split(name: str) -> tuple[str, str]:
    folder, _, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, extension.lower()
