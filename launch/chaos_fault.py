"""A fault that launch.chaos knows, and those that strike a rank or the launcher while they run."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from .chaos_bench import EVERY, RANKS, STEPS, Bench, Life, Promise
from .chaos_row import Row, Skipped

# 2 checkpoints are whole by then, unless the disk is slow
AT = 2 * EVERY + 3
LOST = 2 * EVERY
KILLED = (137, 1)
PREEMPTED = 75
# seconds that a save of so small a model may take
SAVE_S = 0.06


@dataclass(frozen=True)
class Fault:
    """name: on the command line; what: in words; play: makes it, and says what came of it."""

    name: str
    what: str
    play: Callable[["Fault", Bench], Row | Skipped]


@dataclass(frozen=True)
class Struck:
    """A strike of chaos_rank in step AT, as `act place`, after which the run is started again. answer: what
    it does; words: of every start.
    """

    strike: str
    answer: str
    promise: Promise
    words: tuple[str, ...] = ()

    def __call__(self, fault: Fault, bench: Bench) -> Row:
        act, place = self.strike.split()
        strike = bench.strike(fault.name, act, place, AT)
        lives = [bench.life(fault.name, *self.words, strike=planted) for planted in (strike, None)]
        return bench.row(fault.name, fault.what, self.answer, lives, self.promise)


# by policy: what faults.jsonl and the run say of a bad step, and what is done
ANSWERS = {
    "stop": ("stopped", f"error: step {AT}: ", "all ranks stop; started again, it goes on"),
    "skip": ("skipped", f"step {AT}: [^;]*; skipped", "the step changes nothing, training goes on"),
    "rewind": (
        "rewound to ",
        f"step {AT}: [^;]*; rewound to",
        "back to the last checkpoint, and on with later samples",
    ),
}


@dataclass(frozen=True)
class Bad:
    """One bad step on rank 1 alone, under guard.`kind`=`policy`."""

    act: str
    kind: str
    policy: str
    words: tuple[str, ...] = ()

    def __call__(self, fault: Fault, bench: Bench) -> Row:
        done, says, answer = ANSWERS[self.policy]
        stops = self.policy == "stop"
        strike = bench.strike(fault.name, self.act, "forward", AT)
        lives = [bench.life(fault.name, f"guard.{self.kind}={self.policy}", *self.words, strike=strike)]
        if stops:
            lives.append(bench.life(fault.name))
        noted = faults(bench.run(fault.name))
        did = noted[0]["did"] if noted else ""
        back = int(did.removeprefix(done)) if self.policy == "rewind" and noted else AT - 1
        promise = Promise((1,) if stops else (0,), says, LOST, True if stops else None)
        lost = None if stops else AT - back
        row = bench.row(fault.name, fault.what, answer, lives, promise, lost=lost)
        if len(noted) == 1 and did.startswith(done) and noted[0]["ids"]:
            return row
        return replace(row, broken=f"faults.jsonl has {noted}")


def faults(run: Path) -> list[dict[str, str]]:
    """The bad steps that a run has noted."""
    path = run / "faults.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def killed_in_saves(fault: Fault, bench: Bench) -> Row:
    """One rank after another is killed at a random moment of a save, then the run goes on to its end."""
    draw = random.Random(0)
    lives: list[Life] = []
    torn: set[Path] = set()
    words = ("checkpoint.every=1", "checkpoint.keep=2")
    # each life may get a step or two further
    while len(lives) < bench.moments and (not lives or lives[-1].after < STEPS - 4):
        after = round(draw.uniform(0, SAVE_S), 3)
        strike = bench.strike(fault.name, "kill", "save", 1, rank=draw.randrange(RANKS), after=after)
        lives.append(bench.life(fault.name, *words, strike=strike))
        torn |= set((bench.run(fault.name) / "checkpoints").glob(".tmp-step-*"))
    lives.append(bench.life(fault.name, *words))
    answer = f"killed {len(lives) - 1} times, {len(torn)} times a save was half written; each start goes on"
    row = bench.row(fault.name, fault.what, answer, lives, Promise(KILLED, _DEATH, 2))
    codes = {life.code for life in lives[:-1]} - {*KILLED}
    damaged = any("skipped a damaged" in life.said for life in lives)
    wrong = f"exit codes {codes}, damaged checkpoints: {damaged}" if codes or damaged else ""
    return replace(row, broken=row.broken or wrong)


# who is first to notice: another rank, or torchrun
_DEATH = r"(error: rank \d|signal SIGKILL)"
_SAVES = "all ranks end the step, save and leave"
_SIGNAL = "signal {}: saving step"
_GOES_ON = "the launcher ends the others; started again, it goes on from the last checkpoint"

STRIKES = (
    Fault(
        "term-launcher", "SIGTERM to the launcher",
        Struck("term-launcher forward", _SAVES, Promise((143,), _SIGNAL.format(15))),
    ),
    Fault(
        "usr1-launcher", "SIGUSR1 to the launcher",
        Struck("usr1-launcher forward", _SAVES, Promise((PREEMPTED,), _SIGNAL.format(10))),
    ),
    Fault(
        "term-rank", "SIGTERM to one rank",
        Struck("term forward", _SAVES, Promise((PREEMPTED,), _SIGNAL.format(15))),
    ),
    Fault(
        "usr1-rank", "SIGUSR1 to one rank",
        Struck("usr1 forward", _SAVES, Promise((PREEMPTED,), _SIGNAL.format(10))),
    ),
    *(
        Fault(
            f"kill-{place}", f"SIGKILL of a rank in {words}",
            Struck(f"kill {place}", _GOES_ON, Promise(KILLED, _DEATH, LOST)),
        )
        for place, words in (
            ("forward", "its forward"), ("backward", "its backward"), ("optimizer", "its optimizer step")
        )
    ),
    Fault("kill-save", "SIGKILL of a rank at random moments of a save", killed_in_saves),
    Fault(
        "stop-rank", "SIGSTOP of a rank",
        Struck(
            "stop forward", "the others say who is not heard of, and leave; started again, it goes on",
            Promise((1, 137), "rank 1", LOST), words=("timeout_s=8", "heartbeat_s=1"),
        ),
    ),
    *(
        Fault(
            f"nan-{policy}", f"NaN in the loss of one rank, guard.nonfinite={policy}",
            Bad("nan", "nonfinite", policy),
        )
        for policy in ANSWERS
    ),
    *(
        Fault(
            f"spike-{policy}", f"a loss 50 times too high, guard.spike={policy}",
            Bad("spike", "spike", policy, ("guard.window=8",)),
        )
        for policy in ANSWERS
    ),
)  # fmt: skip
