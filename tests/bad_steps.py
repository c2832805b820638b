"""Steps made bad on one rank, and what a run does about them."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from omegaconf import DictConfig
from torch import Tensor

from jobs import Kept, Row, joined, launch_of, quiet, whole
from longspan.train import loop as loops
from longspan.train.checkpoint import Checkpoints
from longspan.train.guard import FAULTS, Diverged
from longspan.train.job import Job, build
from longspan.train.loop import Loop, resume
from longspan.train.objective.next_token import NextToken
from longspan.train.preempt import Preempt


class _BadGradient(torch.autograd.Function):
    """What it is given, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * math.nan


SPOILT: dict[str, Callable[[Tensor], Tensor]] = {
    "loss": lambda x: x * math.nan,
    "gradient": _BadGradient.apply,
    "spike": lambda x: x * 100,
    # a loss as it should be, with gradients of a hundred times their size
    "steep": lambda x: x * 100 - (x * 99).detach(),
}


@dataclass(frozen=True)
class Plant:
    """The step that begins with sample `at` goes bad on one rank."""

    at: int
    rank: int = 1
    what: str = "loss"


@contextmanager
def planted(rank: int, plants: Sequence[Plant]) -> Iterator[None]:
    first = -1
    batches, forward = loops.micro_batches, NextToken.forward

    def noted(job: Job, begin: int, step: int) -> Any:
        nonlocal first
        first = begin
        return batches(job, begin, step)

    def spoilt(self: NextToken, *inputs: Any) -> Tensor:
        loss = forward(self, *inputs)
        for plant in plants:
            if (plant.at, plant.rank) == (first, rank):
                loss = SPOILT[plant.what](loss)
        return loss

    with (
        patch.object(loops, "micro_batches", noted),
        patch.object(NextToken, "forward", spoilt),
        patch.object(loops, "peak_flops", lambda *_: (1e12, "not measured")),
    ):
        yield


class Digests(Kept):
    """Keeps a hash of all that a checkpoint would hold after each step, too, and forgets what is redone."""

    def __init__(self, rank: int, stop: int | None) -> None:
        super().__init__(rank, stop)
        self.job: Job
        self.digests: dict[int, str] = {}

    def step(self, step: int, total: int, values: Mapping[str, float]) -> None:
        self.digests[step] = digest(self.job.state())
        super().step(step, total, values)

    def rewound(self, step: int) -> None:
        self.rows = [row for row in self.rows if row["step"] <= step]


@dataclass(frozen=True)
class Went:
    """What a rank saw of a run: rows, notes and hashes by step, and with what it stopped, if it did."""

    rows: list[Row]
    notes: list[str]
    digests: dict[int, str]
    stopped: str
    skipped: int
    rewound: int
    phases: dict[str, float]


def went(
    rank: int, cfg: DictConfig, folder: Path, plants: Sequence[Plant], stop: int | None = None,
    jump: int | None = None,
) -> Went:  # fmt: skip
    """A run with these bad steps, from `cfg.resume` on, as a rule the newest checkpoint in `folder`. stop:
    the step after which it is told to. jump: the sample to go on with.
    """
    with quiet(cfg), joined(rank) as device, Preempt() as preempt, planted(rank, plants):
        folder.mkdir(parents=True, exist_ok=True)
        job = build(cfg, launch_of(rank), device)
        record, checkpoints = Digests(rank, stop), Checkpoints(folder / "checkpoints", asynchronous=False)
        record.job = job
        state = resume(job, checkpoints, cfg.resume)
        if jump is not None:
            state.samples = jump
        loop = Loop(job, record, checkpoints, preempt, state, folder)
        said = ""
        try:
            loop.run()
        except Diverged as error:
            said = str(error)
        return Went(
            record.rows, record.notes, record.digests, said, state.skipped, state.rewound, loop.phases
        )


def whole_bad(rank: int, cfg: DictConfig, plants: Sequence[Plant]) -> int:
    """As `whole`, with bad steps."""
    with planted(rank, plants):
        return whole(rank, cfg)


def digest(state: Mapping[str, Any]) -> str:
    """A hash of all tensors; of a DTensor, of this rank's part."""
    found = hashlib.sha256()

    def take(part: Mapping[str, Any], path: str) -> None:
        for name, x in part.items():
            if isinstance(x, Mapping):
                take(x, f"{path}{name}/")
            else:
                found.update(f"{path}{name}".encode())
                local = getattr(x, "_local_tensor", x).detach().cpu().contiguous()
                found.update(local.flatten().view(torch.uint8).numpy().tobytes())

    take(state, "")
    return found.hexdigest()


def faults(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / FAULTS).read_text().splitlines()]
