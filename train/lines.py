"""Files that grow by whole lines of JSON, whatever the disk does."""

import json
import time
from collections import deque
from collections.abc import Callable, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

# Lines that wait for a disk that takes none: metrics of so many steps are a few MB.
KEPT = 10_000
Tell = Callable[[str], None]


class Lines:
    """A file that a run adds lines to without ever failing.

    A line is one write(), so a reader sees whole lines and a kill tears at most the last one. What the disk
    does not take waits in memory and comes before the line that it takes next, so that nothing is lost once
    there is room again. tell: is told when lines begin to wait and when they are written. most: lines that
    may wait; of more, the oldest are lost.
    """

    def __init__(self, path: Path, tell: Tell, most: int = KEPT) -> None:
        self.path, self._tell, self._most = path, tell, most
        self._waiting: deque[bytes] = deque()
        self._lost, self._told = 0, False

    def add(self, line: bytes) -> None:
        """A line more, with its newline."""
        self._waiting.append(line)
        if (wrong := self._try()) and not self._told:
            self._told = True
            self._tell(
                f"{self.path} cannot be written: {wrong}; training goes on, and its lines wait until it can, "
                f"up to {self._most:,}"
            )
        while len(self._waiting) > self._most:
            self._waiting.popleft()
            self._lost += 1

    def drop(self, gone: Callable[[bytes], bool]) -> None:
        """Forgets those that wait and are `gone`."""
        self._waiting = deque(line for line in self._waiting if not gone(line))

    def settle(self) -> None:
        """Tries once more, and tells what is lost if nobody does again."""
        if (wrong := self._try()) and self._waiting:
            lost = len(self._waiting) + self._lost
            self._tell(f"{self.path} lacks {lost:,} lines, which it could not take: {wrong}")

    def _try(self) -> str:
        """Writes what waits; what went wrong, or nothing."""
        waited = len(self._waiting)
        try:
            with self.path.open("ab", buffering=0) as file:
                while self._waiting:
                    _write(file, self._waiting[0])
                    self._waiting.popleft()
        except OSError as error:
            return error.strerror or str(error)
        if self._told:
            lost = f"; {self._lost:,} older ones are lost" if self._lost else ""
            self._tell(f"{self.path} is written again, with {waited:,} lines that had waited{lost}")
            self._lost, self._told = 0, False
        return ""


def stamped(row: Mapping[str, Any]) -> bytes:
    """The row as a line, and before it `time`, in seconds since 1970."""
    return json.dumps({"time": round(time.time(), 3), **row}, allow_nan=False).encode() + b"\n"


def append(path: Path, row: Mapping[str, Any]) -> None:
    """A stamped line more. Raises OSError."""
    with path.open("ab", buffering=0) as file:
        _write(file, stamped(row))


def _write(file: FileIO, line: bytes) -> None:
    """The line or nothing of it. Raises OSError."""
    written = file.write(line)
    if written != len(line):
        # the next one must not follow half a line
        file.truncate(file.tell() - written)
        raise OSError(f"it took {written} of the {len(line)} bytes of a line: disk full?")
