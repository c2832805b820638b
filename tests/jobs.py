"""Training jobs on the ranks of a world: their configs, what they record, how they are stopped, and their
comparison.
"""

import hashlib
import json
import os
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from unittest.mock import patch

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from torch import Tensor

from longspan.models.block import Attends
from longspan.parallel.layout import unshard
from longspan.train import loop as loops
from longspan.train.batch import Shard, Tokens, bind, collate, place
from longspan.train.checkpoint import Checkpoints
from longspan.train.config import typed
from longspan.train.data.sample import Dataset
from longspan.train.job import Job, Launch, build, processes
from longspan.train.loop import Loop, resume
from longspan.train.measure import token_losses
from longspan.train.objective.next_token import NextToken
from longspan.train.preempt import Preempt
from longspan.train.progress import Progress
from longspan.train.record import Record
from longspan.train.run import train
from world import Worlds

Row = dict[str, float]
Once = Callable[..., list["Ran"]]  # (size, *overrides) -> the run of that config on so many ranks, by rank
STEPS = 20  # of `experiment=tiny`
COUNTED = ("step", "lr", "tokens", "valid")
EXACT = (*COUNTED, "loss", "grad_norm")
PROBES = 3  # held-out sequences whose losses are compared token by token
THEIRS = ("DeepSpeed", "Megatron")
# sparse masks that leave something out of 256 tokens
S2 = ("mask=s2", "mask.left.block=16", "mask.left.local=4", "data.pack=false")
STAR = (
    "mask=star", "mask.left.block=64", "mask.left.anchor=64", "mask.left.context=128", "data.pack=false",
)  # fmt: skip
# else ZeRO 3 never takes small weights apart
APART = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}


def config(*overrides: str) -> DictConfig:
    """`experiment=tiny` without a tracker, with these overrides, checked as the command checks it."""
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(compose("train", overrides=["experiment=tiny", "track=none", *overrides]))


@dataclass(frozen=True)
class Taken:
    """A sequence that a step was trained on, by its global index, and a hash of all that is in it."""

    step: int
    index: int
    content: str


@dataclass(frozen=True)
class Ran:
    """What one rank saw of a run: the values of each step, the sequences it took, and the losses (nats) of
    held-out tokens after training, by the average of weights if one is kept, float32 [PROBES, context] in
    global order.
    """

    rows: list[Row]
    taken: list[Taken]
    losses: Tensor


class Kept(Record):
    """Keeps what is told, on every rank; after step `stop` rank 0 sends itself SIGUSR1."""

    def __init__(self, rank: int, stop: int | None) -> None:
        super().__init__(rank, Progress(rank=1), None, None)
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.stop = stop

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        self.rows.append({"step": step, **values})
        if step == self.stop and self.rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)

    def note(self, text: str) -> None:
        self.notes.append(text)


def launch_of(rank: int) -> Launch:
    """This rank of its world; always on one thread, so that all sizes of worlds round alike."""
    world = dist.get_world_size()
    cores = len(os.sched_getaffinity(0))
    return Launch(rank, world, rank, max(world, cores), {})


@contextmanager
def joined(rank: int) -> Iterator[torch.device]:
    """This rank's device, in a world where DeepSpeed finds what torchrun would say."""
    with (
        patch.dict(os.environ, LOCAL_RANK=str(rank)),
        processes(launch_of(rank), "cpu", 60.0) as device,
    ):
        yield device


@contextmanager
def quiet(cfg: DictConfig) -> Iterator[None]:
    """Engines of others call what torch and Python have newer names for: they may."""
    with warnings.catch_warnings():
        if cfg.engine._target_.endswith(THEIRS):
            warnings.simplefilter("ignore")
        yield


def zero(stage: int, folder: Path, *overrides: str, **said: object) -> tuple[str, ...]:
    """The overrides for a stage of DeepSpeed's ZeRO, with a JSON in `folder` that says this besides."""
    path = folder / f"zero-{stage}.json"
    path.write_text(json.dumps({**(APART if stage == 3 else {}), **said}))
    return ("engine=deepspeed", f"engine.stage={stage}", f"engine.config={path}", *overrides)


def run(rank: int, cfg: DictConfig, folder: Path, stop: int | None = None) -> Ran:
    """The loop of a job with its checkpoints in `folder`, from the one that is there on, or from
    `cfg.resume`.
    """
    launch, taken = launch_of(rank), list[Taken]()

    def noted(objective: NextToken, data: Dataset, wanted: list[int], step: int) -> Tokens:
        batch = collate([data.sample(i, step) for i in wanted])
        taken.extend(Taken(step, i, content(batch, row)) for row, i in enumerate(wanted))
        return batch

    with (
        quiet(cfg),
        joined(rank) as device,
        Preempt() as preempt,
        patch.object(NextToken, "load", noted),
        patch.object(loops, "peak_flops", lambda *_: (1e12, "not measured")),
    ):
        job = build(cfg, launch, device)
        checkpoints = Checkpoints(folder, asynchronous=cfg.checkpoint.asynchronous)
        record = Kept(rank, stop)
        Loop(job, record, checkpoints, preempt, resume(job, checkpoints, cfg.resume)).run()
        with job.averaged():
            return Ran(record.rows, taken, probe(job))


def gone_on(
    world: Worlds, folder: Path, before: tuple[int, DictConfig], after: tuple[int, DictConfig]
) -> list[Ran]:
    """The run of the second config on so many ranks, from where the first was stopped: after half its
    steps.
    """
    (size, cfg), (then, other) = before, after
    world(size)(run, cfg, folder, cfg.train.steps // 2)
    return world(then)(run, other, folder)


def first_batch(job: Job, device: torch.device) -> tuple[Shard, Attends]:
    """What this rank holds of the first two sequences, and the attention over them."""
    batch = job.objective.load(job.data, [0, 1], 0)
    placement = place(job.layout, batch, job.mask)
    return batch.held(job.layout, placement, device), bind(job.layout, placement)


def content(batch: Tokens, row: int) -> str:
    parts = (batch.tokens[row], batch.labels[row], batch.previous[row])
    # the starts are padded to the longest list of the micro batch
    starts = [at for at in batch.offsets[row] if at < batch.tokens.shape[1]]
    everything = b"".join(x.numpy().tobytes() for x in parts) + repr(starts).encode()
    return hashlib.sha256(everything).hexdigest()


def probe(job: Job) -> Tensor:
    """The loss of each token of the first held-out sequences, gathered from the ranks that hold them."""
    rows = []
    for index in range(PROBES):
        batch = collate([job.data.held_out().sample(index)])
        losses, _, _ = token_losses(job, batch)
        rows.append(unshard(job.layout, losses, place(job.layout, batch, job.mask), 1)[0])
    return torch.stack(rows)


def whole(rank: int, cfg: DictConfig, strike: tuple[int, int, int] | None = None) -> int:
    """The job as the command runs it, with its run folder: its exit code.

    strike: (signal, rank, step): that rank gets the signal as soon as metrics.jsonl holds the step.
    """
    if strike is not None and rank == strike[1]:
        path = Path(cfg.run.dir) / "metrics.jsonl"
        Thread(target=strike_at, args=(path, strike[2], os.getpid(), strike[0]), daemon=True).start()
    with patch.dict(os.environ, LOCAL_RANK=str(rank)):
        return train(cfg, launch_of(rank))


def refusal(rank: int, *cfgs: DictConfig) -> list[str]:
    """What each of these jobs is refused with when it is built; nothing where it is not."""
    said = []
    for cfg in cfgs:
        with joined(rank) as device:
            try:
                build(cfg, launch_of(rank), device)
                said.append("")
            except ValueError as error:
                said.append(str(error))
    return said


def strike_at(path: Path, step: int, pid: int, number: int) -> None:
    """Sends a process a signal when metrics.jsonl holds a step."""
    wait_for(path, step)
    os.kill(pid, number)


def wait_for(path: Path, step: int, process: subprocess.Popen[bytes] | None = None) -> None:
    """Returns when metrics.jsonl holds a step. TimeoutError after 100 s, or if the process ends before."""
    end = time.monotonic() + 100
    while not path.exists() or path.read_bytes().count(b"\n") < step:
        if time.monotonic() > end or (process is not None and process.poll() is not None):
            raise TimeoutError(f"step {step} was not reached")
        time.sleep(0.002)


def values(rows: Sequence[Mapping[str, float]], *names: str) -> Tensor:
    """float64 [steps, names]."""
    return torch.tensor([[row[name] for name in names] for row in rows], dtype=torch.float64)


def furthest(got: Tensor, want: Tensor) -> float:
    """The greatest relative difference of any element."""
    assert got.shape == want.shape, f"{got.shape} is not {want.shape}"
    return float(((got - want).abs() / want.abs().clamp_min(1e-12)).max())


def together(ranks: Sequence[Ran]) -> list[Taken]:
    """The sequences of all ranks, each once, in the order of their indices."""
    return sorted({t for ran in ranks for t in ran.taken}, key=lambda t: (t.step, t.index))


def ring(placement: str = "zigzag", *overrides: str) -> tuple[str, ...]:
    return ("parallel=ring", f"parallel.layout.placement={placement}", *overrides)


def assert_same(got: list[Ran], want: list[Ran], *, since: int = 0) -> None:
    """Steps after `since` saw the same sequences, and nothing of them differs but by rounding."""
    left = [t for t in together(want) if t.step >= since]
    assert together(got) == left
    assert len(left) == 2 * (len(want[0].rows) - since)
    for ran in got:
        rows = want[0].rows[since:]
        assert values(ran.rows, "step", "lr", "tokens", "valid").equal(
            values(rows, "step", "lr", "tokens", "valid")
        )
        assert furthest(values(ran.rows, "loss"), values(rows, "loss")) < 2e-6
        assert furthest(values(ran.rows, "grad_norm"), values(rows, "grad_norm")) < 1e-5
        assert_same_tokens(ran.losses, want[0].losses)


def assert_same_tokens(got: Tensor, want: Tensor) -> None:
    worst = (got - want).abs()
    assert worst.max() < 2e-5, f"token {int(worst.amax(0).argmax())} is off by {float(worst.max())} nats"
