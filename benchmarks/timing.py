"""How long one forward and backward take on a device, and what memory they hold."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

CACHE = 2**28  # bytes, several times the second-level cache of any GPU


@dataclass(frozen=True)
class Attempt:
    """Someone's attention of a case: `run` gives out [1, N, Hq, D] in the dtype of the leaves q, k and v."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, Tensor, Tensor]
    dout: Tensor
    order: Tensor | None = None  # token i of the case is token order[i] here
    slow: bool = False  # worth one measurement only

    def once(self, between: Callable[[], Any] = lambda: None) -> tuple[Tensor, ...]:
        """out, dq, dk, dv; `between` is called between forward and backward."""
        out = self.run()
        between()
        return out.detach(), *torch.autograd.grad(out, self.leaves, self.dout)

    def result(self) -> tuple[Tensor, ...]:
        """out, dq, dk, dv in the order of the case."""
        found = self.once()
        return found if self.order is None else tuple(x[:, self.order] for x in found)


class Clock(Protocol):
    """Times attempts; readings are in ms, forward and backward."""

    statistic: str

    def time(self, attempt: Attempt) -> Callable[[], tuple[float, float]]:
        """Run once; what it returns gives the reading, when the device is done."""
        ...

    def summary(self, readings: Sequence[float]) -> float: ...

    def wait(self) -> None:
        """Until all that was started is done."""
        ...

    def memory(self, attempt: Attempt) -> float | None:
        """Most GiB held at a time by a run, beyond its inputs; None if the device does not tell."""
        ...


class CpuClock:
    """The least of all readings: what else the machine does only adds to them."""

    statistic = "least"

    def time(self, attempt: Attempt) -> Callable[[], tuple[float, float]]:
        marks = [time.perf_counter()]
        attempt.once(lambda: marks.append(time.perf_counter()))
        marks.append(time.perf_counter())
        return lambda: (1e3 * (marks[1] - marks[0]), 1e3 * (marks[2] - marks[1]))

    def summary(self, readings: Sequence[float]) -> float:
        return min(readings)

    def wait(self) -> None:
        pass

    def memory(self, attempt: Attempt) -> float | None:
        return None


class CudaClock:
    """The median of event times, with the second-level cache flushed before each forward and backward.

    The host does not wait in between, so that launches are hidden as in training.
    """

    statistic = "median"

    def __init__(self, device: torch.device) -> None:
        self.flushed = torch.empty(CACHE, dtype=torch.int8, device=device)

    def time(self, attempt: Attempt) -> Callable[[], tuple[float, float]]:
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(4)]

        def between() -> None:
            marks[1].record()
            self.flushed.zero_()
            marks[2].record()

        self.flushed.zero_()
        marks[0].record()
        attempt.once(between)
        marks[3].record()
        return lambda: (marks[0].elapsed_time(marks[1]), marks[2].elapsed_time(marks[3]))

    def summary(self, readings: Sequence[float]) -> float:
        return statistics.median(readings)

    def wait(self) -> None:
        torch.cuda.synchronize()

    def memory(self, attempt: Attempt) -> float | None:
        self.wait()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attempt.once()
        self.wait()
        return (torch.cuda.max_memory_allocated() - before) / 2**30
