"""Where a run is told: metrics.jsonl, the tracker, the progress display and the files of the run folder; rank
0 writes.
"""

import json
import os
import platform
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from .config import redacted_argument
from .lines import Lines, stamped
from .metrics import Metrics, Value, json_value
from .progress import Progress
from .track import Tracker

VALUES = ("loss", "grad_norm", "lr", "tokens", "valid", "tokens_per_s", "mfu", "step_s", "peak_memory")
# in some rows. skipped: 1 in a bad step that changed no weight; the others: see `Stragglers.compared`
SOMETIMES = ("skipped", "step_s_max", "step_s_median", "slowest_rank")
# Starts, evaluations and remarks, a line each: `time` in seconds since 1970, `kind`, and what it is about.
EVENTS = "events.jsonl"


class Record:
    """All ways of telling, behind one door; on ranks other than 0 everything is silent."""

    def __init__(
        self, rank: int, progress: Progress, metrics: Metrics | None, tracker: Tracker | None,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        """folder: of the run, for events.jsonl."""
        self.rank, self.progress, self.metrics, self.tracker = rank, progress, metrics, tracker
        self.folder = folder
        self._events = Lines(folder / EVENTS, progress.note) if folder and not rank else None

    def started(self, step: int, world: int) -> None:
        """Training begins on `world` ranks, from step `step` on."""
        self._event("start", {"step": step, "world": world})

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        if self.rank:
            return
        row: dict[str, Value] = {name: values[name] for name in VALUES}
        row |= {name: values[name] for name in SOMETIMES if name in values}
        if self.metrics:
            self.metrics.write(step, row)
        if self.tracker:
            self.tracker.log(step, row)
        self.progress.step(step, total, dict(values))

    def rewound(self, step: int) -> None:
        """The run goes on from an earlier step. OSError if metrics.jsonl cannot be cut."""
        if self.metrics and not self.rank:
            self.metrics.back(step)

    def evaluated(self, row: Mapping[str, float], words: str) -> None:
        if self.rank:
            return
        if self.tracker:
            kept: dict[str, Value] = {n: v for n, v in row.items() if n not in ("step", "tokens")}
            self.tracker.log(int(row["step"]), kept)
        self._event("evaluation", row)
        self.progress.note(f"held out after step {row['step']:.0f}: {words}")

    def saved(self, step: int) -> None:
        """A checkpoint is whole."""
        if self.tracker and self.folder and not self.rank:
            self.tracker.checkpoint(step, self.folder / "checkpoints" / f"step-{step:08d}")

    def note(self, text: str) -> None:
        if not self.rank:
            self.progress.note(text)
            self._event("note", {"text": text})

    def picture(self, name: str, path: Path) -> None:
        if self.tracker and not self.rank:
            self.tracker.picture(name, path)

    def _event(self, kind: str, values: Mapping[str, Value]) -> None:
        """A line of events.jsonl: what a report tells beside metrics."""
        if self._events is not None:
            row = {name: json_value(name, value) for name, value in values.items()}
            self._events.add(stamped({"kind": kind, **row}))

    def close(self) -> None:
        """Writes what a full disk has not taken so far, or tells that it is lost."""
        if self.metrics:
            self.metrics.close()
        if self._events is not None:
            self._events.settle()


def write_json(path: Path, value: Any) -> None:
    """As `write_whole`."""
    write_whole(path, json.dumps(value, indent=1, default=str) + "\n")


def write_whole(path: Path, text: str) -> None:
    """The file holds the whole text or what it held before. Raises OSError, with the path."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text)
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {error.strerror or error}") from error


def open_folder(folder: Path, root: Path, config: dict[str, Any], facts: dict[str, Any]) -> None:
    """Fills the run folder with config.yaml (resolved, redacted) and run.json (what ran where); a folder
    right below `root` is what root/latest links to.
    """
    write_whole(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }
    write_json(
        folder / "run.json", {"command": [redacted_argument(a) for a in sys.argv], **versions, **facts}
    )
    link = root / "latest"
    beside = folder.resolve().parent == root.resolve() and folder.name != link.name
    if beside and (link.is_symlink() or not link.exists()):
        # for people: another run may set it at the same moment
        with suppress(OSError):
            fresh = root / f".latest-{os.getpid()}"
            fresh.symlink_to(folder.name)
            fresh.replace(link)


def sweep_of(folder: Path, root: Path) -> str | None:
    """The name of the sweep that a run is part of: of what stands between `root` and its folder."""
    above = folder.absolute().parent
    return above.name if above.parent == root.absolute() else None
