"""Checkpoints of a run: written aside, renamed when whole, checked by hash when read, the last few kept."""

import errno
import json
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.storage import WriteResult

from .agree import Ranks, one_line
from .manifest import DamagedCheckpoint, File, Manifest, write_synced
from .shelf import Shelf
from .tensors import TensorLoad, TensorSave

EXTRA = "extra.json"
T = TypeVar("T")
# What DCP wrote where, and what the files are.
_Written = tuple[list[WriteResult], dict[str, File]]


class SaveError(OSError):
    """A checkpoint could not be saved; one line says why. The one before is as it was."""


class _Full(OSError):
    """The disk is."""


@dataclass(frozen=True)
class _Save:
    """A save that all ranks have agreed on: what this rank writes, and where. The index is rank 0's."""

    step: int
    folder: Path
    extra: bytes
    tensors: TensorSave
    index: Metadata | None


class Checkpoints:
    """The checkpoints in `folder`; every rank of the run makes one and calls its methods in the same order.

    On disk: `step-00000120/` with DCP's files, `extra.json` and `manifest.json`; `latest` names the newest.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 3,
        permanent: int = 0,
        asynchronous: bool = True,
        group: ProcessGroup | None = None,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """keep: complete checkpoints to keep, beside those of steps that `permanent` divides (0: of none).

        asynchronous: write in a thread, from copies in CPU memory.
        group: the ranks that hold the state (None: all). warn: gets a line, on rank 0, maybe in the thread,
        for a checkpoint that is skipped, and an old one that is deleted early or cannot be; by default it is
        printed. Raises ValueError if keep is below 1 or permanent below 0.
        """
        if keep < 1:
            raise ValueError(f"checkpoint.keep={keep}: at least 1 checkpoint must be kept")
        if permanent < 0:
            raise ValueError(f"checkpoint.permanent={permanent}: it must be 0 (none) or a number of steps")
        self._ranks = Ranks(group, kinds=(DamagedCheckpoint, ValueError, FileNotFoundError, _Full, OSError))
        self._shelf = Shelf(Path(folder).absolute(), keep, permanent)
        self._warn = _to_stderr if warn is None else warn
        self._thread = ThreadPoolExecutor(1, "checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any], extra: dict[str, Any]) -> None:
        """Saves `state` as checkpoint `step`, replacing one of this step, after the pending save is finished.

        state: nested dicts of tensors and DTensors; plain tensors must be equal on all ranks. It may change
        as soon as this returns. extra: what JSON can hold; rank 0's is saved.
        Raises, on all ranks alike, ValueError, naming the key, for what cannot be saved, and SaveError if
        this save failed, or the pending one; then nothing of this one was done.
        """
        self.wait()
        try:
            save = self._agree(step, state, extra)
        except (OSError, RuntimeError) as error:
            raise _save_error(step, error) from error
        if self._thread is None:
            self._write(save)
        else:
            self._pending = self._thread.submit(self._write, save)

    def wait(self) -> None:
        """Returns when no save is pending. Raises SaveError if the pending one failed, once."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        finally:
            # An interrupted wait leaves it pending.
            if self._pending.done():
                self._pending = None

    def load(self, which: str, state: dict[str, Any]) -> dict[str, Any] | None:
        """Fills the tensors of `state` in place and returns `extra`; None if there is nothing to load.

        which: "auto", the one saved last that is whole; "never"; or the path of one checkpoint folder.
        Top-level keys that `state` lacks are not read. Ranks and sharding may differ from those that saved.
        Raises, on all ranks alike, DamagedCheckpoint for a damaged one that is named by its path, or if there
        are checkpoints and none is whole; FileNotFoundError for a path that is none; ValueError if tensors,
        shapes or dtypes do not fit. After an error the tensors hold anything.
        """
        self.wait()
        if which == "never":
            return None
        folders = self._tell(lambda: self._folders(which))
        reasons: list[str] = []
        for folder in folders:
            try:
                return self._open(folder, state)
            except DamagedCheckpoint as error:
                if which != "auto":
                    raise
                reasons.append(str(error))
                self._report([f"skipped a damaged checkpoint: {error}"])
        if reasons:
            raise DamagedCheckpoint(
                f"resume=auto: of {len(reasons)} checkpoints none is whole ({'; '.join(reasons)});"
                " give the path of another one, or resume=never to start afresh"
            )
        return None

    def steps(self) -> list[int]:
        """The steps of the checkpoints that have all their files, in rising order. Hashes are not checked."""
        return sorted(entry.step for entry in self._shelf.entries() if entry.complete)

    def _agree(self, step: int, state: dict[str, Any], extra: dict[str, Any]) -> _Save:
        """Checks the arguments, decides which rank writes what, and copies what must be copied."""
        index: Metadata | None = None

        def prepare() -> tuple[bytes, TensorSave]:
            if step < 0:
                raise ValueError(f"checkpoint of step {step}: a step is at least 0")
            return _encode(extra), TensorSave(state, coordinator=self._ranks.rank == 0)

        encoded, tensors = self._ranks.together(prepare)

        def merge(plans: list[SavePlan]) -> list[tuple[Path, SavePlan]]:
            nonlocal index
            folder = self._shelf.temporary(f"step-{step:08d}")
            shares, index = tensors.merge(plans)
            return [(folder, share) for share in shares]

        folder, share = self._ranks.exchange(tensors.plan, merge)
        self._ranks.together(lambda: tensors.accept(share, copy=self._thread is not None))
        return _Save(step, folder, encoded, tensors, index)

    def _write(self, save: _Save) -> None:
        """Writes on all ranks, publishes on rank 0; while the disk is full, old checkpoints make room. Runs
        in the thread, if there is one.
        """
        while True:
            try:
                self._ranks.exchange(
                    lambda: _full_told(lambda: _write_share(save)), partial(self._close, save)
                )
                break
            except Exception as error:
                if self._ranks.rank == 0:
                    self._report(self._shelf.discard(save.folder))
                if not isinstance(error, _Full) or not self._tell(partial(self._make_room, save.step)):
                    raise _save_error(save.step, error) from error
        if self._ranks.rank == 0:
            self._report(self._shelf.tidy())

    def _close(self, save: _Save, parts: list[_Written]) -> list[None]:
        """What rank 0 adds to the ranks' files, and the name under which it all counts."""

        def close() -> None:
            assert save.index is not None
            save.tensors.finish(save.folder, save.index, [results for results, _ in parts])
            write_synced(save.folder / EXTRA, save.extra)
            files = {name: file for _, described in parts for name, file in described.items()}
            files |= {path.name: File.of(path) for path in save.folder.iterdir() if path.name not in files}
            self._shelf.publish(save.folder, save.step, files)

        _full_told(close)
        return [None] * len(parts)

    def _make_room(self, step: int) -> bool:
        gone = self._shelf.make_room()
        if gone is not None:
            self._report([f"the disk is full: {gone} was deleted for checkpoint {step}"])
        return gone is not None

    def _folders(self, which: str) -> list[Path]:
        """What to try, in this order."""
        if which == "auto":
            return [entry.folder for entry in self._shelf.entries()]
        folder = Path(which).absolute()
        if not folder.is_dir():
            raise FileNotFoundError(f"resume={which}: no such folder; give a checkpoint's, auto or never")
        if inside := Shelf(folder, 1).entries():
            raise ValueError(f"resume={which} holds checkpoints; give one, such as {inside[0].folder}")
        return [folder]

    def _open(self, folder: Path, state: dict[str, Any]) -> dict[str, Any]:
        """Checks one checkpoint, each rank its share of the files, then loads it."""
        manifest = self._tell(lambda: Manifest.of(folder))
        mine = sorted(manifest.files)[self._ranks.rank :: self._ranks.size]
        self._ranks.together(lambda: manifest.check_hashes(folder, mine))
        tensors = self._ranks.together(lambda: TensorLoad(folder, manifest.files.keys(), state))
        extra = self._ranks.together(lambda: _read_extra(folder))
        self._ranks.together(tensors.read)
        return extra

    def _tell(self, find: Callable[[], T]) -> T:
        """What `find`, run on rank 0, returns: on all ranks."""
        return self._ranks.exchange(lambda: None, lambda parts: [find()] * len(parts))

    def _report(self, lines: list[str]) -> None:
        if self._ranks.rank == 0:
            for line in lines:
                self._warn(line)


def _write_share(save: _Save) -> _Written:
    save.folder.mkdir(parents=True, exist_ok=True)
    results = save.tensors.write(save.folder)
    names = {result.storage_data.relative_path for result in results}
    return results, {name: File.of(save.folder / name) for name in names}


def _full_told(work: Callable[[], T]) -> T:
    """Runs `work`; a full disk or quota somewhere behind its error is a `_Full`."""
    try:
        return work()
    except Exception as error:
        behind: BaseException | None = error
        while behind is not None:
            if isinstance(behind, OSError) and behind.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _Full(one_line(error)) from error
            behind = behind.__cause__ or behind.__context__
        raise


def _save_error(step: int, error: Exception) -> SaveError:
    return SaveError(f"checkpoint {step} could not be saved: {one_line(error)}")


def _encode(extra: Any) -> bytes:
    if type(extra) is not dict:
        raise ValueError(f"extra is of type {type(extra).__name__} instead of dict")
    _check_json(extra, "extra")
    return json.dumps(extra, indent=1).encode()


def _read_extra(folder: Path) -> dict[str, Any]:
    try:
        extra: dict[str, Any] = json.loads((folder / EXTRA).read_bytes())
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{folder}: {EXTRA} cannot be read: {error}") from error
    return extra


def _check_json(value: Any, name: str) -> None:
    """Only what comes back from Python's JSON as it was: NaN does; tuples and other keys do not."""
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise ValueError(f"{name} has the key {key!r}; JSON has only strings as keys")
            _check_json(item, f"{name}[{key!r}]")
    elif type(value) is list:
        for position, item in enumerate(value):
            _check_json(item, f"{name}[{position}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        kind = type(value).__name__
        raise ValueError(f"{name} is of type {kind}; extra holds numbers, text, lists and dicts only")


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
