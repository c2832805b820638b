"""What a run folder tells: its config, its figures step by step, and what happened."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from ..guard import FAULTS
from ..metrics import Metrics
from ..record import EVENTS

PICTURES = (".png", ".gif")
# Drawn here by ourselves, in the colours of the page.
OURS = ("loss.png", "layout.png")
# Of the pictures that a run made on its way, so many are shown.
ON_THE_WAY = 6

Row = dict[str, Any]


@dataclass(frozen=True)
class Story:
    """One run, read from its folder; what is not there (yet) is empty. title: what it is called, if not by
    its folder's name.
    """

    folder: Path
    config: Row
    about: Row
    status: Row
    summary: Row
    layout: Row
    rows: Sequence[Row]
    events: Sequence[Row]
    faults: Sequence[Row]
    title: str = ""

    @classmethod
    def read(cls, folder: Path) -> "Story":
        """FileNotFoundError if the folder holds no run; ValueError, with the path, for a file that is
        damaged.
        """
        folder = folder.resolve() if folder.is_symlink() else folder
        path = folder / "config.yaml"
        if not path.is_file():
            raise FileNotFoundError(
                f"run={folder} holds no config.yaml; give the folder of a run, such as runs/latest"
            )
        metrics = folder / "metrics.jsonl"
        return cls(
            folder=folder,
            config=_yaml(path),
            about=_json(folder / "run.json"),
            status=_json(folder / "status.json"),
            summary=_json(folder / "summary.json"),
            layout=_json(folder / "layout.json"),
            rows=Metrics.read(metrics) if metrics.exists() else [],
            events=_lines(folder / EVENTS),
            faults=_lines(folder / FAULTS),
        )

    @property
    def name(self) -> str:
        return self.title or self.folder.resolve().name

    @property
    def state(self) -> str:
        return str(self.status.get("state", "unknown"))

    @property
    def world(self) -> int:
        return int(self.about.get("world", 1))

    @cached_property
    def starts(self) -> list[Row]:
        return [event for event in self.events if event["kind"] == "start"]

    @property
    def resumes(self) -> list[int]:
        """The steps that it went on from."""
        return [int(start["step"]) for start in self.starts if start["step"]]

    @cached_property
    def evals(self) -> list[Row]:
        """Held-out values by step; of a step that was measured twice, by a run that was resumed, the last."""
        found = {e["step"]: e for e in self.events if e["kind"] == "evaluation"}
        return [found[step] for step in sorted(found)]

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of the rows that have a finite one."""
        pairs = [(row["step"], row[name]) for row in self.rows if _finite(row.get(name))]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]

    def held_out(self, name: str) -> tuple[list[float], list[float]]:
        """As `column`, of what was measured on held-out data."""
        pairs = [(row["step"], row[name]) for row in self.evals if _finite(row.get(name))]
        return [float(step) for step, _ in pairs], [float(value) for _, value in pairs]

    def pictures(self) -> list[Path]:
        """Those at the end of the run, and a few that it made on its way."""
        last = sorted(p for p in self.folder.iterdir() if p.suffix in PICTURES and p.name not in OURS)
        way = sorted(p for p in (self.folder / "samples").glob("*") if p.suffix in PICTURES)
        stride = max(1, math.ceil(len(way) / ON_THE_WAY))
        return last + way[::-1][::stride][::-1]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _yaml(path: Path) -> Row:
    try:
        return yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is damaged: {' '.join(str(error).split())}") from error


def _json(path: Path) -> Row:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): remove it, or write it anew") from error
    return found if isinstance(found, dict) else {}


def _lines(path: Path) -> list[Row]:
    """The rows of a file of JSON lines, also of one that is being written; what a kill tore is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in rows if isinstance(row, dict)]
