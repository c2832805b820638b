"""The training loop: steps, evaluation, checkpoints, and an orderly end on a signal."""

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .batch import Batch, bind, indices, place
from .checkpoint import Checkpoints, SaveError
from .engine.protocol import Native
from .job import Job
from .judge import Judge
from .measure import autocast
from .meter import Meter, peak_flops
from .preempt import Preempt
from .record import Record


class Diverged(RuntimeError):
    """The loss or the gradient norm is not finite."""


@dataclass
class State:
    """Where a run stands: what a checkpoint keeps beside the tensors."""

    step: int = 0
    samples: int = 0  # global samples taken, so the next step starts there whatever the number of ranks
    tokens: int = 0
    seconds: float = 0.0  # of training, over all starts
    evals: list[dict[str, float]] = field(default_factory=list)


class Loop:
    """Trains `job` from `state` on; `record` is told everything, `checkpoints` keep what is needed to go
    on. folder: of the run, for pictures made on the way.
    """

    def __init__(
        self, job: Job, record: Record, checkpoints: Checkpoints, preempt: Preempt, state: State,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.job, self.record, self.checkpoints, self.preempt, self.state = (
            job,
            record,
            checkpoints,
            preempt,
            state,
        )
        self.judge: Judge = job.objective.judge()
        self.folder = folder
        self.saved = state.step
        self.sent: dict[int, int] = {}  # bytes by receiving rank in the last step
        self.stepped = False
        dtype = torch.bfloat16 if job.cfg.train.precision == "bfloat16" else torch.float32
        self.peak, self.peak_source = peak_flops(job.device, dtype)
        self.meter = Meter(
            peak_flops=self.peak,
            ranks=dist.get_world_size(),
            steps=job.cfg.train.steps,
            start_step=state.step,
        )

    def run(self) -> int | None:
        """Trains until train.steps, train.seconds or a signal; the checkpoint is complete when this returns.
        The signal, or None.
        """
        cfg, stopped = self.job.cfg, None
        while self.state.step < cfg.train.steps and not self._out_of_time():
            began = time.perf_counter()
            values = self._step()
            self.state.seconds += time.perf_counter() - began
            if self.state.step % cfg.train.log_every == 0 or self.state.step == cfg.train.steps:
                self.record.step(self.state.step, cfg.train.steps, values)
            if cfg.eval.every and self.state.step % cfg.eval.every == 0 and self.state.step < cfg.train.steps:
                self.evaluate(cfg.eval.samples)
            if cfg.checkpoint.every and self.state.step % cfg.checkpoint.every == 0:
                self.save()
            stopped = self.preempt.agreed()
            if stopped is not None:
                self.record.note(f"signal {stopped}: saving step {self.state.step} and leaving")
                break
        self.save_last()
        return stopped

    def _out_of_time(self) -> bool:
        """Whether train.seconds have passed on rank 0, whose clock decides for all."""
        limit = self.job.cfg.train.seconds
        if limit is None:
            return False
        late = torch.tensor([float(self.state.seconds >= limit)])
        dist.broadcast(late, 0)
        return bool(late)

    def _step(self) -> dict[str, float]:
        job, state = self.job, self.state
        lr = job.optim.lr_at(state.step, job.cfg.train.steps)
        batches = micro_batches(job, state.samples, state.step)
        job.layout.traffic.reset()
        counts = torch.tensor(
            [sum(b.valid for b in batches), sum(b.rows * b.length for b in batches)], dtype=torch.float64
        )
        if job.dp > 1:
            dist.all_reduce(counts, group=job.mesh["dp"].get_group())
        valid = max(1.0, float(counts[0]))
        loss = backward(job, batches, valid)
        dist.all_reduce(loss)
        mean = float(loss)
        norm = job.engine.step(lr, job.cfg.train.clip) if math.isfinite(mean) else math.nan
        if not (math.isfinite(mean) and math.isfinite(norm)):
            raise Diverged(
                f"step {state.step + 1}: loss {mean}, gradient norm {norm}; weights were left as they were"
            )
        if job.ema is not None:
            job.ema.update(job.model)
        self.sent, self.stepped = dict(job.layout.traffic.sent), True
        state.step, state.samples = state.step + 1, state.samples + job.global_batch
        state.tokens += int(counts[1])
        values = self.meter.update(state.step, int(counts[1]), job.objective.flops(batches) * job.dp)
        return {"loss": mean, "grad_norm": norm, "lr": lr, "tokens": state.tokens, "valid": valid, **values}

    def evaluate(self, samples: int) -> None:
        """The first `samples` held-out samples, measured and recorded."""
        with self.job.averaged():
            self.evaluated(self.judge.held_out(self.job, samples))
            if self.folder is not None:
                for name, path in self.judge.show(self.job, self.folder, self.state.step).items():
                    self.record.picture(name, path)
        self.meter.restart()

    def evaluated(self, values: Mapping[str, float]) -> None:
        """Records what was measured on held-out data."""
        row = {"step": self.state.step, "tokens": self.state.tokens, **values}
        self.state.evals.append(row)
        self.record.evaluated(row, self.judge.words(row))

    def save(self) -> None:
        """A checkpoint of now, written beside training. One that fails is reported: training goes on."""
        self._finished()
        try:
            self._save()
            self.saved = self.state.step
        except SaveError as error:
            self.record.note(f"checkpoint of step {self.state.step} failed, training goes on: {error}")
        self.meter.restart()

    def save_last(self) -> None:
        """The checkpoint that the run ends with; SaveError if it cannot be written, also at a second try."""
        if self.saved != self.state.step or not self._finished():
            self._save()
            self.checkpoints.wait()
            self.saved = self.state.step

    def _save(self) -> None:
        self.checkpoints.save(self.state.step, self.job.state(), extra(self.job, self.state))
        if isinstance(self.job.engine, Native) and self.folder is not None:
            self.job.engine.save_native(self.folder / "native", self.state.step)

    def _finished(self) -> bool:
        """Waits for the save before, if it is still being written; False, and a note, if it failed."""
        try:
            self.checkpoints.wait()
        except SaveError as error:
            self.record.note(f"checkpoint failed, training goes on: {error}")
            return False
        return True


def micro_batches(job: Job, first: int, step: int) -> list[Batch]:
    """The micro batches on this dp rank of the step that starts at sample `first`: the same samples whatever
    the ranks are.
    """
    micro, several = job.cfg.train.micro_batch, job.cfg.train.accumulate
    groups = indices(first, dp=job.dp, rank=job.dp_rank, micro=micro, accumulate=several)
    return [job.objective.load(job.data, wanted, step) for wanted in groups]


def backward(
    job: Job, batches: list[Batch], valid: float, given: Callable[[Any], Any] = lambda part: part
) -> Tensor:
    """Gradients of a step, and this rank's share of its loss, float64. given: what an objective takes of the
    part that is held here.
    """
    loss = torch.zeros((), dtype=torch.float64, device=job.device)
    for i, batch in enumerate(batches):
        placement = place(job.layout, batch, job.mask)
        part = given(batch.held(job.layout, placement, job.device))
        with autocast(job):
            share = job.engine.backward(part, bind(job.layout, placement), valid, last=i == len(batches) - 1)
        loss += share.double()
    return loss


def extra(job: Job, state: State) -> dict[str, Any]:
    """What a checkpoint keeps as JSON."""
    return {
        "step": state.step,
        "samples": state.samples,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "evals": state.evals,
        "data": fingerprint(job),
        "global_batch": job.global_batch,
    }


def fingerprint(job: Job) -> str:
    """A hash of what decides which sample has which index."""
    facts = job.data.describe()
    names = (
        *("corpus", "sha256", "tokenizer", "context", "pack", "samples", "held_out", "size", "sizes"),
        *("frames", "canvas", "speed", "shrink", "flip", "channels"),
        *("shift", "scale", "text", "pooled", "buckets"),
    )
    kept = {name: facts[name] for name in names if name in facts}
    return hashlib.sha256(json.dumps([kept, job.cfg.seed], sort_keys=True, default=str).encode()).hexdigest()


def resume(job: Job, checkpoints: Checkpoints, which: str) -> State:
    """Loads the checkpoint that `which` names into the job: the state to go on from. Other data is
    refused.
    """
    tensors = job.state()
    kept = checkpoints.load(which, tensors)
    if kept is None:
        return State()
    if kept["data"] != fingerprint(job):
        raise ValueError(
            "resume: the data is not the one that the checkpoint was trained on (its hash differs); "
            "restore data.*, or start anew with resume=never and another run.name"
        )
    job.load(tensors)
    return State(kept["step"], kept["samples"], kept["tokens"], kept["seconds"], kept["evals"])
