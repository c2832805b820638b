"""The folder that holds a run's checkpoints: which are there, how a new one comes in, how old ones leave."""

import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .manifest import NAME, STEP, DamagedCheckpoint, File, Manifest, sync_folder, write_synced

LATEST = "latest"


@dataclass(frozen=True)
class Entry:
    """A checkpoint folder. serial: None if the manifest cannot be read; complete: all files, in full size."""

    step: int
    folder: Path
    serial: int | None
    complete: bool


class Shelf:
    """Checkpoints as folders `step-00000120`, of which the last `keep` stay; `latest` names the newest.

    Those of steps that `permanent` divides (0: of none) stay besides, and are never deleted.
    One process changes it. A kill at any moment leaves only whole checkpoints under such names: a new one is
    renamed from `.tmp-*`, an old one is renamed to `.trash-*` before it is deleted, and one that is saved a
    second time waits as `.aside-step-*`, and counts, until its successor stands in its place.
    """

    def __init__(self, folder: Path, keep: int, permanent: int = 0) -> None:
        self.folder = folder
        self._keep, self._permanent = keep, permanent

    def entries(self) -> list[Entry]:
        """All checkpoints, the one saved last first; those without a readable manifest come before."""
        found: dict[int, Path] = {}
        # ".aside-step-" sorts before "step-", which replaces it.
        for path in self._paths():
            if match := STEP.fullmatch(path.name):
                found[int(match[1])] = path
        entries = [_entry(step, path) for step, path in found.items()]
        return sorted(entries, key=lambda e: (e.serial is None, e.serial or 0, e.step), reverse=True)

    def temporary(self, name: str) -> Path:
        """A path that nobody has used, to be renamed to `name`."""
        return self.folder / f".tmp-{name}-{secrets.token_hex(4)}"

    def publish(self, temporary: Path, step: int, files: Mapping[str, File]) -> None:
        """Closes the folder `temporary`, which holds `files`, by a manifest, renames it and moves `latest`.

        After an OSError the checkpoints that were there are as they were.
        """
        serial = 1 + max((entry.serial or 0 for entry in self.entries()), default=0)
        write_synced(temporary / NAME, Manifest(step, serial, files).render())
        sync_folder(temporary)
        target = self.folder / f"step-{step:08d}"
        aside = self.folder / f".aside-{target.name}"
        # Written before anything moves, so that a full disk is noticed in time.
        pointer = self.temporary(LATEST)
        try:
            write_synced(pointer, f"{target.name}\n".encode())
            if target.exists():
                self._remove(aside)
                target.rename(aside)
            temporary.rename(target)
            sync_folder(self.folder)
            pointer.rename(self.folder / LATEST)
            sync_folder(self.folder)
        except OSError:
            pointer.unlink(missing_ok=True)
            if aside.exists() and not target.exists():
                aside.rename(target)
            raise

    def tidy(self) -> list[str]:
        """Removes all but the last `keep` checkpoints, those that are permanent, and what dead runs left;
        returns what went wrong.

        An incomplete folder counts for nothing and stays, to be looked at, until all that are kept are later.
        """
        try:
            unwanted = self._unwanted()
        except OSError as error:
            return [f"{self.folder} cannot be tidied: {error}"]
        return [problem for path in unwanted for problem in self.discard(path)]

    def make_room(self) -> str | None:
        """Removes, for a disk that is full, what is wanted least, and says what: what dead runs left, else
        the oldest checkpoint. None if nothing can go: the last one and permanent ones stay.
        """
        try:
            whole = [entry for entry in self.entries() if entry.complete]
            spare = [entry.folder for entry in whole[:0:-1] if not self._stays(entry)]
            for path in (*self._unwanted(), *spare):
                self._remove(path)
                return path.name
        except OSError:
            # a folder that cannot be changed gives no room
            return None
        return None

    def discard(self, path: Path) -> list[str]:
        """Deletes a folder or file, if it is there; returns what went wrong."""
        try:
            self._remove(path)
        except OSError as error:
            return [f"{path} cannot be removed: {error}"]
        return []

    def _unwanted(self) -> list[Path]:
        entries = self.entries()
        complete = [entry for entry in entries if entry.complete]
        last = [entry for entry in complete if not self._stays(entry)][: self._keep]
        kept = last + [entry for entry in complete if self._stays(entry)]
        oldest = min((entry.step for entry in last), default=0)
        unwanted = [e.folder for e in entries if e not in kept and (e.complete or e.step < oldest)]
        standing = {entry.folder for entry in entries}
        leftover = (".tmp-", ".trash-", ".aside-")
        return unwanted + [p for p in self._paths() if p.name.startswith(leftover) and p not in standing]

    def _stays(self, entry: Entry) -> bool:
        return self._permanent > 0 and entry.step % self._permanent == 0

    def _paths(self) -> list[Path]:
        return sorted(self.folder.iterdir()) if self.folder.exists() else []

    def _remove(self, path: Path) -> None:
        # Half deleted, it must not have a name that is taken for a checkpoint.
        if path.is_dir():
            if not path.name.startswith((".tmp-", ".trash-")):
                path = path.rename(self.folder / f".trash-{path.name}-{secrets.token_hex(4)}")
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _entry(step: int, folder: Path) -> Entry:
    serial = None
    try:
        serial = Manifest.read(folder).serial
        Manifest.of(folder)
    except DamagedCheckpoint:
        return Entry(step, folder, serial, complete=False)
    return Entry(step, folder, serial, complete=True)
