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
from .progress import Progress
from .track import Metrics, Tracker, Value

VALUES = ("loss", "grad_norm", "lr", "tokens", "valid", "tokens_per_s", "mfu", "step_s", "peak_memory")


class Record:
    """All ways of telling, behind one door; on ranks other than 0 everything is silent."""

    def __init__(
        self, rank: int, progress: Progress, metrics: Metrics | None, tracker: Tracker | None
    ) -> None:
        self.rank, self.progress, self.metrics, self.tracker = rank, progress, metrics, tracker

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        if self.rank:
            return
        row: dict[str, Value] = {name: values[name] for name in VALUES}
        if self.metrics:
            self.metrics.write(step, row)
        if self.tracker:
            self.tracker.log(step, row)
        self.progress.step(step, total, dict(values))

    def evaluated(self, row: Mapping[str, float], words: str) -> None:
        if self.rank:
            return
        if self.tracker:
            kept: dict[str, Value] = {n: v for n, v in row.items() if n not in ("step", "tokens")}
            self.tracker.log(int(row["step"]), kept)
        self.progress.note(f"held out after step {row['step']:.0f}: {words}")

    def note(self, text: str) -> None:
        if not self.rank:
            self.progress.note(text)

    def picture(self, name: str, path: Path) -> None:
        if self.tracker and not self.rank:
            self.tracker.picture(name, path)


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
        link.unlink(missing_ok=True)
        link.symlink_to(folder.name)
