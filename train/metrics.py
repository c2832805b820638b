"""metrics.jsonl: what a run's numbers are read from."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from .lines import Lines, Tell

Value = float | int | str
REQUIRED = ("loss", "grad_norm", "tokens", "tokens_per_s")
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Metrics:
    """metrics.jsonl: one valid JSON object a line, steps strictly rising, also over kills and resumes.

    A kill tears at most the last line, which the next resume drops; what a full disk does not take is written
    later (`Lines`). JSON has no NaN or infinity: they are written as the strings "NaN", "Infinity" and
    "-Infinity", and `read` makes floats of them again.
    """

    def __init__(self, path: Path, *, resume_step: int | None, tell: Tell | None = None) -> None:
        """Opens `path` for appending.

        resume_step: the step of the checkpoint that is continued; lines of later steps are dropped (they will
            be written again). None starts afresh: a file that is there is kept as metrics.old-<n>.jsonl.
        tell: is told of a disk that takes nothing; None logs it.
        Raises ValueError if a line other than a torn last one is not JSON, OSError if it cannot be written.
        """
        self.path = path
        self._last = -1
        if resume_step is None:
            _set_aside(path)
        elif path.exists():
            self._last = _cut(path, resume_step)
        # at once: before the first step it is an error
        path.open("ab").close()
        self._lines = Lines(path, tell or logging.getLogger(__name__).warning)

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Appends {"step": step, **values}: at least loss, grad_norm, tokens (so far) and tokens_per_s.

        Raises ValueError for a missing value, for one that is no number or string, and for a step that does
        not rise.
        """
        missing = [name for name in REQUIRED if name not in values]
        if missing:
            raise ValueError(f"step {step} of {self.path.name} lacks {', '.join(missing)}")
        if step <= self._last:
            raise ValueError(f"step {step} of {self.path.name} comes after {self._last}: steps must rise")
        row = {"step": step, **{name: json_value(name, value) for name, value in values.items()}}
        self._lines.add(json.dumps(row, allow_nan=False).encode() + b"\n")
        self._last = step

    def back(self, step: int) -> None:
        """Drops the lines of later steps, which will be written again. OSError if the file cannot be cut."""
        self._lines.drop(lambda line: json.loads(line)["step"] > step)
        _cut(self.path, step)
        self._last = min(self._last, step)

    def close(self) -> None:
        """Writes what has not been written yet, or tells that it is lost."""
        self._lines.settle()

    @staticmethod
    def read(path: Path) -> list[dict[str, Any]]:
        """All rows of a metrics.jsonl, also of one that is being written; a torn last line is left out."""
        return [{name: _value(stored) for name, stored in row.items()} for _, row in _lines(path)]


def _value(stored: Value) -> Value:
    return NON_FINITE.get(stored, stored) if isinstance(stored, str) else stored


def json_value(name: str, value: Value) -> Value:
    """What stands for a value in a line of JSON. ValueError for one that is no number or string."""
    if not isinstance(value, float | int | str):
        raise ValueError(f"metric {name} is a {type(value).__name__}: give a float, an int or a str")
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of a file with what they say; bytes after the last newline are a torn line."""
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            yield line + b"\n", json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is not JSON ({error}): remove the line") from error


def _cut(path: Path, step: int) -> int:
    """Drops what is torn or later than `step`, also on a full disk; gives the last step left, -1 if none."""
    size, last = 0, -1
    for line, row in _lines(path):
        if row["step"] > step:
            break
        size, last = size + len(line), row["step"]
    os.truncate(path, size)
    return last


def _set_aside(path: Path) -> None:
    if path.exists():
        names = (path.with_name(f"{path.stem}.old-{number}{path.suffix}") for number in count(1))
        path.rename(next(name for name in names if not name.exists()))
