"""What a rank is doing, as others can read it, and what is wrong with one that is not heard of."""

import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
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
    """The file of a rank. at: seconds since 1970 on its machine's clock. failed: why the rank left, or is
    leaving, with an error. numbering: as the function says it there.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    doing: str
    at: float
    failed: str = ""
    numbering: str = ""

    @classmethod
    def read(cls, path: Path) -> "Beat | None":
        """None if there is no such file, or none that can be read."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def lost(self, silent: float, silence: float) -> str:
        """What is wrong with the rank and where it was, in words, or nothing. silent: seconds for which its
        file has not changed, by the clock of who asks. silence: seconds after which a rank is lost whose
        process cannot be looked at.
        """
        if self.phase == "end":
            return ""
        if self.failed:
            return f"failed: {self.failed}; it was in {self.where}"
        if not self.near:
            heard = f"has not been heard of for {silent:.0f} s; it was in {self.where}"
            return heard if silent > silence else ""
        state, age = process_state(self.pid), max(0.0, time.time() - self.at)
        if state in ("", "Z", "X"):
            return f"has died; when last heard of, {age:.0f} s before, it was in {self.where}"
        if state in ("T", "t"):
            stopped = f"has not been heard of for {age:.0f} s, since its process is stopped"
            return f"{stopped} (SIGCONT lets it go on); it was in {self.where}"
        return ""

    @property
    def near(self) -> bool:
        """Whether its process can be looked at from here: a container may have the machine's name and
        numbers of its own.
        """
        return bool(self.numbering) and (self.host, self.numbering) == (socket.gethostname(), numbering())

    @property
    def where(self) -> str:
        told = f"step {self.step}, {self.phase}"
        return f"{told} ({self.doing})" if self.doing else told


def numbering() -> str:
    """What the numbers of processes belong to, on Linux: a start of the kernel, and the namespace in it."""
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{kernel} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def process_state(pid: int) -> str:
    """The letter that Linux has for the state of a process; nothing if there is none of this number."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def hang_line(beats: Sequence[Beat], lost: Mapping[int, str], me: int, ranks: int, cause: str = "") -> str:
    """Which of `ranks` the others wait for, and where, in one line. lost: what is wrong, by rank. me: the
    rank that tells. cause: why it does, which is told where nobody is lost.
    """
    found = {beat.rank: beat for beat in beats}
    parts = [
        f"rank {rank} ({found[rank].host}, process {found[rank].pid}) {lost[rank]}"
        for rank in sorted(lost.keys() & found.keys())
    ]
    parts += [f"rank {rank} has left no sign" for rank in range(ranks) if rank not in found and rank != me]
    why = [cause] if cause and not parts else []
    waiting = [beat for beat in beats if beat.rank not in lost]
    if not parts and waiting:
        behind = min(waiting, key=lambda beat: (beat.step, PHASES.index(beat.phase)))
        parts = [f"all ranks are alive, rank {behind.rank} ({behind.host}) furthest behind"]
    return "; ".join([*parts, *_places(waiting), *why])


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
