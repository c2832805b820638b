"""A sign of life from every rank, as a small file in the run folder, and one line that says who hangs."""

import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from ..parallel.comm import Traffic
from .agree import PeerError, one_line
from .preempt import Preempt
from .pulse import WORKING, Beat, Pulse, hang_line, numbering
from .record import write_json

REPORT = "hang.txt"
# after a signal; torchrun's, when a rank has failed, leaves the others 30 s
PATIENCE_S = 8.0
# a file that has not changed for so long, or for three beats, is that of a rank that is lost
SILENCE_S = 15.0
# what a collective says, on gloo or NCCL, that other ranks have left or keep waiting
UNANSWERED = (
    *("Timed out waiting", "Connection closed by peer", "Connection reset by peer"),
    *("Broken pipe", "NCCL communicator was aborted", "NCCL error", "Application timeout"),
)
# the exit code of an error, which `entry` explains
FAILED = 1


class Hang(RuntimeError):
    """Other ranks do not answer; the message says which. first: whether nobody else has printed it."""

    def __init__(self, line: str, *, first: bool) -> None:
        super().__init__(line)
        self.first = first


def unanswered(error: BaseException | None) -> bool:
    """Whether the error, or one behind it, is a collective's that other ranks have left."""
    while error is not None:
        if isinstance(error, PeerError):
            # a rank has told what went wrong there
            return False
        if isinstance(error, dist.DistError):
            return True
        if isinstance(error, RuntimeError) and any(text in str(error) for text in UNANSWERED):
            return True
        error = error.__cause__ or error.__context__
    return False


class Seen(NamedTuple):
    """A rank's file, and since when it has been so, by this rank's monotonic clock. changed: it was seen to
    become so; otherwise it may be as old as it likes.
    """

    beat: Beat
    since: float
    changed: bool


class Heartbeat:
    """Writes `rank<r>.json` into `folder` every `every_s` seconds, from a thread of its own, and looks there
    for what is wrong with the others. Of one whose process cannot be looked at it is whether its file goes on
    changing: no clocks are compared.

    traffic: of the layout. timeout_s: how long ranks wait for each other. signals: of this process.
    """

    def __init__(
        self, folder: Path, pulse: Pulse, traffic: Traffic, signals: Preempt, *, every_s: float,
        timeout_s: float,
    ) -> None:  # fmt: skip
        self.folder, self.pulse, self.traffic, self.signals = folder, pulse, traffic, signals
        self.every_s, self.timeout_s, self.silence = every_s, timeout_s, max(SILENCE_S, 3 * every_s)
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self._host, self._numbering = socket.gethostname(), numbering()
        self._ended, self._told = threading.Event(), False
        # the thread that trains writes, too, and both would write the same .part
        self._writing = threading.Lock()
        self._seen: dict[int, Seen] = {}
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    def start(self) -> None:
        """The first file is there when this returns."""
        with suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            if self.rank == 0:
                # of the start before
                (self.folder / REPORT).unlink(missing_ok=True)
        self.write()
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; a disk that holds it up is not waited for."""
        self._ended.set()
        self.signals.wake()
        self._thread.join(2.0)

    def write(self, failed: str = "") -> None:
        """This rank's file as of now. A disk that does not take it stops nobody."""
        pulse, now = self.pulse, round(time.time(), 3)
        doing = self.traffic.doing or pulse.doing
        beat = Beat(
            self.rank, self._host, os.getpid(), pulse.step, pulse.phase, doing, now, failed, self._numbering
        )  # fmt: skip
        if not self._writing.acquire(timeout=2.0):
            return
        try:
            with suppress(OSError):
                write_json(self.folder / f"rank{self.rank}.json", asdict(beat))
        finally:
            self._writing.release()

    def read(self) -> None:
        """Looks at what all ranks wrote last."""
        now, fresh = time.monotonic(), dict[int, Seen]()
        for rank in range(self.ranks):
            beat, before = Beat.read(self.folder / f"rank{rank}.json"), self._seen.get(rank)
            if beat is not None and (before is None or before.beat != beat):
                fresh[rank] = Seen(beat, now, before is not None)
        # a new one, since both threads come here
        self._seen = self._seen | fresh

    def lost(self) -> dict[int, str]:
        """What is wrong with other ranks, as far as `read` has seen."""
        now, others = time.monotonic(), self._others()
        found = {seen.beat.rank: seen.beat.lost(now - seen.since, self.silence) for seen in others}
        return {rank: wrong for rank, wrong in found.items() if wrong}

    def report(self, cause: str = "") -> tuple[str, bool]:
        """The line that says who hangs, and whether no rank has told it: the first also puts it into
        hang.txt. Waits until it can be told whether ranks on other machines are lost. cause: see `hang_line`.
        """
        self.write()
        self.read()
        while not (lost := self.lost()) and self._unsure() and not self._ended.wait(min(1.0, self.every_s)):
            self.read()
        beats = [seen.beat for _, seen in sorted(self._seen.items())]
        line = hang_line(beats, lost, self.rank, self.ranks, cause)
        try:
            with (self.folder / REPORT).open("x") as file:
                file.write(line + "\n")
        except FileExistsError:
            return line, False
        except OSError:
            # better told twice than never
            return line, True
        return line, True

    def _others(self) -> list[Seen]:
        return [seen for rank, seen in self._seen.items() if rank != self.rank]

    def _unsure(self) -> bool:
        """Whether a rank that is not lost yet may be: its file has not changed of late."""
        late = time.monotonic() - 2 * self.every_s
        return any(
            not (seen.beat.near or seen.beat.phase == "end" or (seen.changed and seen.since > late))
            for seen in self._others()
        )

    def _work(self) -> None:
        """The thread. It also speaks up where the one that trains cannot: NCCL ends a process that waited for
        too long without a word to Python, and torchrun kills those that a failed rank has left waiting.
        """
        before, moved, asked = (-1, "", -1), 0.0, 0.0
        while not self._ended.is_set():
            with suppress(OSError):
                if self.signals.heard(1.0 if asked else self.every_s):
                    asked = asked or time.monotonic()
                now, place = time.monotonic(), (self.pulse.step, self.pulse.phase, self.traffic.messages)
                if place != before:
                    before, moved = place, now
                    self._moved()
                elif self.pulse.phase in WORKING and not self._ended.is_set():
                    self._look(now - moved, now - asked if asked else 0.0)
            if not self._ended.is_set():
                self.write()

    def _moved(self) -> None:
        """Takes back what was told too early, and forgets when files were seen to change."""
        self._seen = {}
        if self._told:
            self._told = False
            with suppress(OSError):
                (self.folder / REPORT).unlink(missing_ok=True)

    def _look(self, still: float, asked: float) -> None:
        """Tells who hangs if this rank has stood still for longer than it may; leaves, if it was asked to and
        others are lost. Seconds. In time before, it begins to look at the others' files.
        """
        if asked or still > self.timeout_s / 2:
            self.read()
        if still > self.timeout_s and not (self.folder / REPORT).exists():
            self._tell()
        if min(asked, still) > PATIENCE_S and self.lost():
            self._tell()
            os._exit(FAILED)

    def _tell(self) -> None:
        line, self._told = self.report()
        if self._told:
            print(f"longspan: {line}", file=sys.stderr, flush=True)


@contextmanager
def watched(
    folder: Path, pulse: Pulse, traffic: Traffic, signals: Preempt, *, every_s: float, timeout_s: float
) -> Iterator[None]:
    """A heartbeat in `folder` meanwhile; every_s = 0: none. What a collective raises since other ranks do not
    answer becomes a `Hang` that says which; any other error is left in this rank's file.
    """
    if not every_s:
        yield
        return
    beat = Heartbeat(folder, pulse, traffic, signals, every_s=every_s, timeout_s=timeout_s)
    beat.start()
    try:
        yield
        pulse.enter("end")
    except Exception as error:
        if unanswered(error):
            line, first = beat.report(one_line(error))
            raise Hang(line, first=first) from error
        beat.stop()
        beat.write(failed=one_line(error))
        raise
    finally:
        beat.stop()
    beat.write()
