"""The manifest of a checkpoint folder: every file's size and SHA-256, protected by a digest of its own."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAME = "manifest.json"
# A checkpoint's folder; "aside" while its successor of the same step is put in its place.
STEP = re.compile(r"(?:\.aside-)?step-(\d{8,})")


class DamagedCheckpoint(ValueError):
    """A checkpoint is not what was saved; the message names it and says what is wrong, on one line."""


@dataclass(frozen=True)
class File:
    """What a file must be: `size` in bytes and its SHA-256 in hex."""

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "File":
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            return cls(stream.tell(), digest)


@dataclass(frozen=True)
class Manifest:
    """step: of training; serial: 1, 2, ... in the order of saving; files: by name, all but the manifest."""

    step: int
    serial: int
    files: Mapping[str, File]

    def render(self) -> bytes:
        """The JSON text; there is exactly one for a manifest, so that any changed byte shows."""
        files = {name: {"bytes": file.size, "sha256": file.sha256} for name, file in self.files.items()}
        body: dict[str, Any] = {"step": self.step, "serial": self.serial, "files": files}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return (json.dumps({**body, "sha256": digest}, sort_keys=True, indent=1) + "\n").encode()

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """The manifest of a checkpoint folder. Raises `DamagedCheckpoint` if it is missing or changed."""
        try:
            data = (folder / NAME).read_bytes()
        except FileNotFoundError:
            raise DamagedCheckpoint(
                f"{folder}: {NAME} is missing; it was cut short or is no checkpoint"
            ) from None
        except OSError as error:
            raise DamagedCheckpoint(f"{folder}: {error}") from error
        manifest = cls.parse(data)
        if manifest is None:
            raise DamagedCheckpoint(f"{folder}: {NAME} is damaged, it does not match its own digest")
        return manifest

    @classmethod
    def parse(cls, data: bytes) -> "Manifest | None":
        """The manifest that was rendered as `data`; None if there is none."""
        try:
            raw = json.loads(data)
            files = {name: File(file["bytes"], file["sha256"]) for name, file in raw["files"].items()}
            manifest = cls(raw["step"], raw["serial"], files)
            return manifest if manifest.render() == data else None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None

    @classmethod
    def of(cls, folder: Path) -> "Manifest":
        """The manifest of a checkpoint that has all its files, no others, and no other step's name.

        Raises `DamagedCheckpoint`.
        """
        manifest = cls.read(folder)
        manifest.check_sizes(folder)
        if (match := STEP.fullmatch(folder.name)) and int(match[1]) != manifest.step:
            raise DamagedCheckpoint(f"{folder}: it was saved as step {manifest.step}")
        return manifest

    def check_sizes(self, folder: Path) -> None:
        """Compares names, kinds and sizes with what lies in `folder`. Raises `DamagedCheckpoint`."""
        try:
            with os.scandir(folder) as entries:
                there = {e.name: e.stat(follow_symlinks=False) for e in entries if e.name != NAME}
        except OSError as error:
            raise DamagedCheckpoint(f"{folder}: {error}") from error
        wrong = [f"{name} is missing" for name in sorted(self.files.keys() - there.keys())]
        wrong += [f"{name} does not belong to it" for name in sorted(there.keys() - self.files.keys())]
        for name in sorted(self.files.keys() & there.keys()):
            if not stat.S_ISREG(there[name].st_mode):
                wrong.append(f"{name} is not a regular file")
            elif there[name].st_size != self.files[name].size:
                wrong.append(f"{name} has {there[name].st_size} bytes instead of {self.files[name].size}")
        _complain(folder, wrong)

    def check_hashes(self, folder: Path, names: Iterable[str]) -> None:
        """Hashes the files `names`. Raises `DamagedCheckpoint` with those that changed or cannot be read."""
        try:
            changed = [name for name in names if File.of(folder / name) != self.files[name]]
        except OSError as error:
            raise DamagedCheckpoint(f"{folder}: {error}") from error
        _complain(folder, [f"{name} does not match its SHA-256" for name in changed])


def write_synced(path: Path, data: bytes) -> None:
    """Writes a new file and returns when it is on the disk."""
    with path.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Returns when the folder's entries, as renamed and created so far, are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _complain(folder: Path, wrong: list[str]) -> None:
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise DamagedCheckpoint(f"{folder}: {', '.join(wrong[:5])}{more}")
