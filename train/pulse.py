"""What a rank is doing, as others can read it, and what is wrong with one that is not heard of."""

import json
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# in the order of a step; the first and the last are around all steps
PHASES = (
    *("start", "data", "forward", "backward", "reduce", "optimizer", "record", "evaluate", "save", "agree"),
    "end",
)
# in these, ranks wait for each other and for nothing else
WORKING = ("forward", "backward", "reduce", "optimizer", "agree")


class Pulse:
    """What this rank is doing: set by the thread that trains, read by any.

    step: the one that is made, from 1. phase: one of PHASES. doing: what is waited for, where it has a name.
    clock: what the phases' seconds are of. listeners: are told of each phase as it begins.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.step, self.phase, self.doing = 0, "start", ""
        self._clock, self._since = clock, clock()
        self.listeners: list[Callable[[str], None]] = []
        self._seconds: dict[str, float] = {}

    def enter(self, phase: str, doing: str = "") -> None:
        """The next phase begins. On a GPU the host runs ahead: it waits for the device in `reduce`."""
        now = self._clock()
        self._seconds[self.phase] = self._seconds.get(self.phase, 0.0) + now - self._since
        self._since, self.phase, self.doing = now, phase, doing
        for hear in self.listeners:
            hear(phase)

    def lap(self) -> dict[str, float]:
        """Seconds in each phase that was left since the last call."""
        seconds, self._seconds = self._seconds, {}
        return seconds


@dataclass(frozen=True)
class Beat:
    """The file of a rank. at: seconds since 1970. failed: why the rank left, or is leaving, with an error."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    doing: str
    at: float
    failed: str = ""

    @classmethod
    def read(cls, path: Path) -> "Beat | None":
        """None if there is no such file, or none that can be read."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def lost(self, silence: float) -> str:
        """What is wrong with the rank, in words, or nothing. silence: seconds after which a rank is lost
        whose process is on another machine, where it cannot be looked at.
        """
        if self.phase == "end":
            return ""
        if self.failed:
            return f"failed: {self.failed}"
        age = time.time() - self.at
        unheard = f"has not been heard of for {age:.0f} s"
        if self.host == socket.gethostname() and sys.platform == "linux":
            state = process_state(self.pid)
            if state in ("", "Z", "X"):
                return "has died"
            if state in ("T", "t"):
                return f"{unheard}, since its process is stopped (SIGCONT lets it go on)"
            return ""
        return unheard if age > silence else ""

    @property
    def where(self) -> str:
        told = f"step {self.step}, {self.phase}"
        return f"{told} ({self.doing})" if self.doing else told


def process_state(pid: int) -> str:
    """The letter that Linux has for the state of a process; nothing if there is none of this number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def hang_line(beats: Sequence[Beat], me: int, ranks: int, silence: float) -> str:
    """Which of `ranks` the others wait for, and where, in one line. me: the rank that tells."""
    found = {beat.rank: beat for beat in beats}
    lost = {rank: wrong for rank, beat in found.items() if rank != me and (wrong := beat.lost(silence))}
    parts = [
        f"rank {rank} ({found[rank].host}, process {found[rank].pid}) {wrong}; it was in {found[rank].where}"
        for rank, wrong in sorted(lost.items())
    ]
    parts += [f"rank {rank} has left no sign" for rank in range(ranks) if rank not in found and rank != me]
    waiting = [beat for beat in beats if beat.rank not in lost]
    if not parts and waiting:
        behind = min(waiting, key=lambda beat: (beat.step, PHASES.index(beat.phase)))
        parts = [f"all ranks are alive, rank {behind.rank} ({behind.host}) furthest behind"]
    return "; ".join([*parts, *_places(waiting)])


def _places(beats: Sequence[Beat]) -> list[str]:
    """Where ranks are, those in the same place together."""
    places: dict[str, list[int]] = {}
    for beat in beats:
        places.setdefault(beat.where, []).append(beat.rank)
    return [
        f"rank{'s' if len(ranks) > 1 else ''} {_numbers(ranks)} in {where}"
        for where, ranks in sorted(places.items(), key=lambda item: min(item[1]))
    ]


def _numbers(ranks: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2, 5'."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
