"""Jobs that are disturbed on purpose: how one is started, watched, and compared with one left alone."""

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from ..train.metrics import Metrics
from . import node
from .chaos_rank import END, Strike
from .chaos_row import Row, shortened

RANKS, STEPS, EVERY = 2, 24, 4
SAME = ("step", "loss", "grad_norm", "lr", "tokens")
ALONE = ("--standalone",)
PATIENCE_S = 240.0
HERE = __name__.rpartition(".")[0]
PACKAGE = HERE.rpartition(".")[0]
# torchrun runs a file inside the processes that it forks
RANK = f"from {HERE}.chaos_rank import main\n\nmain()\n"
PRELOAD = [
    *(f"{HERE}.chaos_rank", f"{HERE}.node", f"{PACKAGE}.train.run", f"{PACKAGE}.models.gpt"),
    *(f"{PACKAGE}.train.data.stdlib", f"{PACKAGE}.train.engine.ddp", f"{PACKAGE}.parallel.ring"),
    *("torch._dynamo", "torch.distributed._functional_collectives", "torch.distributed.device_mesh"),
]
Losses = list[tuple[object, ...]]


@dataclass(frozen=True)
class Life:
    """One start of a job. code, said: its exit code and what it printed. since: the step that it went on
    from; before, after: the last step in metrics.jsonl then and at its end.

    struck: when the fault came, as time.time(), None if none was planted in a rank, or it did not come
    (missed); at: in which step; began: when it was started; passed: when each new step was first seen.
    """

    code: int
    said: str
    since: int
    before: int
    after: int
    struck: float | None
    missed: bool
    at: int
    began: float
    passed: Mapping[int, float]


@dataclass(frozen=True)
class Promise:
    """What must come of a fault. codes: exit codes of the start that is struck; says: a pattern in what it
    prints; lost: the most steps; equal: whether the losses end as if nothing had happened; None where they
    cannot.
    """

    codes: tuple[int, ...] = (0,)
    says: str = ""
    lost: int = 0
    equal: bool | None = True


class Bench:
    """Runs of `experiment=tiny` with `overrides` on two gloo ranks, each in a folder of its own in `folder`.

    moments: how many times a run is killed in a save.
    """

    def __init__(self, folder: Path, overrides: Sequence[str] = (), *, moments: int = 20) -> None:
        self.folder, self.moments = folder, moments
        self._words = (
            *("experiment=tiny", "track=none", "report=false", "data.context=64", "model.layers=1"),
            *(f"train.steps={STEPS}", "train.log_every=1", f"checkpoint.every={EVERY}", "eval.final=0"),
            *(f"data.cache={folder / 'cache'}", *overrides),
        )  # fmt: skip

    @cached_property
    def whole(self) -> Path:
        """The run folder of a run that nothing disturbs; it has all its checkpoints."""
        life = self.life("whole", "checkpoint.keep=1000")
        if life.code:
            last = "\n".join(life.said.strip().splitlines()[-12:])
            raise RuntimeError(f"a run that nothing disturbs left with {life.code}:\n{last}")
        return self.run("whole")

    def run(self, name: str) -> Path:
        """The run folder of that name."""
        return self.folder / name / "run"

    def life(
        self, name: str, *words: str, strike: Strike | None = None, env: Mapping[str, str] | None = None,
        launch: Sequence[str] = ALONE,
    ) -> Life:  # fmt: skip
        """Starts the job of that name, or starts it again, and waits for its end.

        Raises:
            RuntimeError: It did not end.
        """
        run = self.run(name)
        run.mkdir(parents=True, exist_ok=True)
        script = self.folder / "rank.py"
        script.write_text(RANK)
        job = [*(strike.words() if strike else []), END, *self._words, f"run.dir={run}", *words]
        how = [*launch, f"--nproc-per-node={RANKS}", "--start-method=fork", "--run-path", str(script)]
        output = run.with_name(f"output-{len(list(run.parent.glob('output-*')))}.txt")
        before, began = last_step(run), time.time()
        process = nursery().Process(target=launched, args=([*how, *job], dict(env or {}), output))
        process.start()
        passed = watched(process, run, before)
        said = output.read_text()
        since = came_from(said)
        note = json.loads(strike.note.read_text()) if strike and strike.note.exists() else {}
        at = since + note.get("step", 0)
        missed, struck = strike is not None and not note, note.get("at")
        return Life(
            process.exitcode or 0, said, since, before, last_step(run), struck, missed, at, began, passed
        )

    def strike(
        self, name: str, act: str, place: str, step: int, *, rank: int = 1, after: float = 0.0
    ) -> Strike:
        """A strike in the job of that name."""
        note = self.folder / name / f"struck-{step}-{after:g}.json"
        note.unlink(missing_ok=True)
        return Strike(act, place, step, rank, after, note)

    def row(
        self, name: str, fault: str, answer: str, lives: Sequence[Life], promise: Promise, *,
        lost: int | None = None,
    ) -> Row:  # fmt: skip
        """What came of a fault in the first of `lives`, which are the starts of one job one after another.

        lost: steps, where it is not what a later start did again.
        """
        first, last = lives[0], lives[-1]
        again = [max(0, a.after - b.since) for a, b in zip(lives, lives[1:], strict=False)]
        lost = max(again, default=0) if lost is None else lost
        equal = None if promise.equal is None else losses(self.run(name)) == losses(self.whole)
        said = line_like(promise.says, first.said)
        broken = []
        if first.code not in promise.codes:
            broken.append(f"exit code {first.code} is none of {promise.codes}")
        if promise.says and not said:
            broken.append(f"nothing that it printed is like {promise.says!r}")
        if lost > promise.lost:
            broken.append(f"{lost} steps were lost, more than {promise.lost}")
        if equal is not promise.equal:
            broken.append("the losses are not those of an undisturbed run")
        if last.code and last is not first:
            broken.append(f"started again, it left with {last.code}")
        if any(life.missed for life in lives):
            broken.append("the fault did not come")
        said = shortened(said, str(self.folder))
        return Row(name, fault, answer, first.code, said, lost, recovered(lives), equal, "; ".join(broken))


def nursery() -> ForkServerContext:
    """What launchers are forked from, and those fork the ranks: a process that has imported everything and
    runs one thread. To import it all anew in three processes takes longer than the jobs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    before = os.environ.get("OPENBLAS_NUM_THREADS")
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    forkserver.ensure_running()
    if before is None:
        del os.environ["OPENBLAS_NUM_THREADS"]
    return context


def launched(words: list[str], env: Mapping[str, str], output: Path) -> None:
    """The life of a launcher: torchrun with these words, as launch/local.sh starts it."""
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    # until it listens
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    threads = max(1, (os.cpu_count() or 1) // RANKS)
    os.environ.update({"OMP_NUM_THREADS": str(threads), **env})
    sys.argv[1:] = words
    node.main()


def line_like(pattern: str, said: str) -> str:
    """The first line that a pattern fits, whole, or several where it was broken at a space; none for no
    pattern.
    """
    found = (
        re.search(rf"^.*{pattern.replace(' ', chr(92) + 's+')}.*$", said, re.MULTILINE) if pattern else None
    )
    return found[0] if found else ""


def recovered(lives: Sequence[Life]) -> float | None:
    """Seconds from a fault until there was a step that had not been there before, at most; None if no rank
    knows when it came, or no such step did.
    """
    first, *others = lives
    if not others:
        later = [at for step, at in first.passed.items() if step >= first.at]
        waits = [min(later) - first.struck] if first.struck is not None and later else []
    else:
        pairs = [(a, b) for a, b in zip(lives, others, strict=False) if a.struck is not None and b.passed]
        waits = [min(b.passed.values()) - (a.struck or 0.0) for a, b in pairs]
    return round(max(waits), 1) if waits else None


def losses(run: Path) -> Losses:
    """What a run's steps gave."""
    path = run / "metrics.jsonl"
    rows = Metrics.read(path) if path.exists() else []
    return [tuple(row[key] for key in SAME) for row in rows]


def last_step(run: Path) -> int:
    """The last step in metrics.jsonl, 0 before there is one."""
    try:
        rows = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        return int(json.loads(rows[-1])["step"]) if rows else 0
    except FileNotFoundError:
        return 0


def came_from(said: str) -> int:
    """The step that a start says it goes on from, 0 where it says none."""
    found = re.search(r"^\s+from +step (\d+)", said, re.MULTILINE)
    return int(found[1]) if found else 0


def watched(process: BaseProcess, run: Path, before: int) -> dict[int, float]:
    """Waits for the end; when metrics.jsonl first held each step after `before`."""
    passed: dict[int, float] = {}
    end = time.monotonic() + PATIENCE_S
    over = False
    while not over:
        over = process.exitcode is not None
        step = last_step(run)
        for new in range(max(before, *passed, 0) + 1, step + 1) if step > before else ():
            passed[new] = time.time()
        if time.monotonic() > end:
            killed(process)
            raise RuntimeError(f"{run.parent.name} did not end within {PATIENCE_S:g} s")
        if not over:
            time.sleep(0.02)
    return passed


def killed(process: BaseProcess) -> None:
    """Ends a launcher and its ranks."""
    launcher = process.pid or 0
    for pid in (*node.children(launcher), launcher):
        os.kill(pid, signal.SIGKILL)
    process.join()
