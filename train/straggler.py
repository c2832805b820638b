"""Which rank keeps the others waiting: seconds that each was busy in a step, compared over ranks."""

import socket
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from .agree import Ranks
from .pulse import Pulse

PHASES = ("data", "forward", "backward", "reduce", "optimizer")
SCHEDSTAT = Path("/proc/thread-self/schedstat")
# A rank is told of if it takes so many times as long as the median rank, in so many intervals in a row.
SLOW, OFTEN = 1.3, 10


def busy() -> float:
    """Seconds that this thread has run, or waited for a core to run on: not what it slept, for instance until
    another rank's message came. Where the system does not say, only what it has run.
    """
    try:
        ran, waited, _ = SCHEDSTAT.read_text().split()
    except (OSError, ValueError):
        return time.thread_time()
    return (int(ran) + int(waited)) / 1e9


class Stragglers:
    """Compares the ranks at the end of each interval between two lines of metrics.

    A step takes the same time on all ranks, since they wait for each other; what tells them apart is how long
    each was busy. On CUDA that is the host's time, in which a slow device does not show: for that there are
    traces. tell: gets the one line about a rank that stays behind. All ranks make one and call it alike.
    """

    def __init__(self, ranks: Ranks, pulse: Pulse, tell: Callable[[str], None]) -> None:
        self._size, self._pulse, self._tell = ranks.size, pulse, tell
        self._hosts: list[str] = ranks.exchange(socket.gethostname, lambda hosts: [hosts] * len(hosts))
        self._suspect, self._seen = -1, 0
        self._told: set[int] = set()
        self._phase, self._since = "", (0.0, 0.0)
        self._steps = 0
        self._spent: defaultdict[str, float] = defaultdict(float)
        if self._size > 1:
            pulse.listeners.append(self.enter)

    def enter(self, phase: str) -> None:
        """A phase begins. Of data all the time counts: what a disk makes a rank wait for is its own."""
        now = (time.perf_counter(), busy())
        whole = self._phase == "data" or torch.cuda.is_initialized()
        self._spent[self._phase] += now[not whole] - self._since[not whole]
        self._steps += phase == "data"
        self._phase, self._since = phase, now

    def compared(self) -> dict[str, float]:
        """At the end of an interval: `step_s_max` and `step_s_median`, seconds that the slowest and the
        median rank were busy in a step, and `slowest_rank`; {} for one rank.
        """
        if self._size == 1:
            return {}
        spent, steps = self._spent, max(self._steps, 1)
        self._spent, self._steps = defaultdict(float), 0
        mine = torch.tensor([spent[name] / steps for name in PHASES], dtype=torch.float64)
        rows = [torch.empty_like(mine) for _ in range(self._size)]
        self._pulse.enter("reduce", "comparison of the ranks")
        dist.all_gather(rows, mine)
        self._pulse.enter("record")
        table = torch.stack(rows)  # [ranks, phases]
        # on CUDA all time counts, and that of waiting for the others would make all alike
        own = [name for name in PHASES if name != "reduce" or not torch.cuda.is_initialized()]
        table = table[:, [PHASES.index(name) for name in own]]
        total = table.sum(1)
        slowest, median = int(total.argmax()), float(total.median())
        self._watch(table, own, slowest, float(total[slowest]), median)
        return {
            "step_s_max": float(total[slowest]),
            "step_s_median": median,
            "slowest_rank": float(slowest),
        }

    def _watch(self, table: torch.Tensor, names: list[str], slowest: int, most: float, median: float) -> None:
        slow = most > SLOW * median > 0
        self._seen = (self._seen + 1 if slowest == self._suspect else 1) if slow else 0
        self._suspect = slowest
        if self._seen < OFTEN or slowest in self._told:
            return
        self._told.add(slowest)
        # the lower median, so that of two ranks the other one is what the slow one is compared with
        behind = table[slowest] - table.median(0).values
        phase = names[int(behind.argmax())]
        self._tell(
            f"rank {slowest} on {self._hosts[slowest]} is busy {most / median:.1f} times as long as the "
            f"median rank ({most:.3g} s a step against {median:.3g} s), most of it in {phase}: its machine "
            f"is slower, or its share of the work is larger (the header's work max/mean)"
        )
