"""Traces of a few steps of training: torch's profiler on every rank, merged into one timeline."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from .agree import Ranks, one_line
from .pulse import Pulse
from .timeline import MEETING, merge

FOLDER = "traces"
# Of more ranks, merging takes so long that the others should not wait for it.
AT_ONCE = 16


class Tracer:
    """Records the steps `first` to `first + steps - 1` of this rank into traces/rank<r>.json.gz below
    `folder`, and merges the ranks' files. first: None records no trace.

    memory: bytes in use as a curve; on CUDA also who allocated what, from the start of the run on, whatever
    `first` is, for
    traces/memory-rank<r>.pickle (https://pytorch.org/memory_viz opens it). All ranks make one and call it
    alike. note: gets a line about what was written; a trace that cannot be written stops nothing.
    """

    def __init__(
        self, folder: Path, ranks: Ranks, pulse: Pulse, note: Callable[[str], None], *,
        first: int | None, steps: int = 2, memory: bool = False,
    ) -> None:  # fmt: skip
        self._folder, self._ranks, self._note = folder / FOLDER, ranks, note
        self._first, self._last, self._memory = first, (first or 0) + steps - 1, memory
        self._profiler: profile | None = None
        self._range: record_function | None = None
        if first is not None:
            pulse.listeners.append(self.enter)
        if memory and torch.cuda.is_initialized():
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around step `number`."""
        if number == self._first:
            # once: a run may go back to a step before it
            self._first = None
            self._start()
        with nullcontext() if self._profiler is None else record_function(f"step {number}"):
            yield
            self._leave()
        if number == self._last:
            self.close()

    def enter(self, phase: str) -> None:
        """A phase begins, and the one before has ended."""
        self._leave()
        if self._profiler is not None:
            self._range = record_function(phase)
            self._range.__enter__()

    def _leave(self) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
        self._range = None

    def _start(self) -> None:
        kinds = [ProfilerActivity.CPU]
        if torch.cuda.is_initialized():
            kinds.append(ProfilerActivity.CUDA)
        if self._ranks.rank == 0:
            # an earlier start may have had more ranks
            with suppress(OSError):
                for old in self._folder.glob("rank*.json.gz"):
                    old.unlink()
        self._profiler = profile(activities=kinds, profile_memory=self._memory)
        self._profiler.start()
        who = {"rank": self._ranks.rank, "host": socket.gethostname()}
        self._profiler.add_metadata_json("longspan", json.dumps(who))
        with record_function(MEETING):
            # a number on the CPU: the group for that waits here, and not on a stream of the device
            dist.all_reduce(torch.zeros(1))

    def close(self) -> None:
        """Writes what has been recorded, also of a run that ends before the last traced step."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        self._leave()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        profiler.stop()

        def write() -> str | None:
            try:
                self._write(profiler)
            except (OSError, RuntimeError) as error:
                return f"rank {self._ranks.rank}: {one_line(error)}"
            return None

        self._note(self._ranks.exchange(write, lambda failed: [self._merged(failed)] * len(failed)))

    def _write(self, profiler: profile) -> None:
        rank = self._ranks.rank
        self._folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(self._folder / f"rank{rank}.json.gz"))
        if self._memory and torch.cuda.is_initialized():
            torch.cuda.memory._dump_snapshot(str(self._folder / f"memory-rank{rank}.pickle"))

    def _merged(self, failed: list[str | None]) -> str:
        """What rank 0 says when all have written."""
        if lines := [line for line in failed if line]:
            return f"no trace was written, training goes on: {lines[0]}"
        if len(failed) > AT_ONCE:
            return f"traces of {len(failed)} ranks are in {self._folder}; `longspan report` merges them"
        try:
            found = merge(self._folder)
        except (OSError, ValueError) as error:
            return f"the traces in {self._folder} were not merged: {one_line(error)}"
        line = f"trace of {found.ranks} rank{'s' if found.ranks > 1 else ''}: {found.path}"
        return "; left out: ".join([f"{line} (open it at https://ui.perfetto.dev)", *found.left_out])
