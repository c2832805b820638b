"""The training loop: steps, evaluation, checkpoints, and an orderly end on a signal."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .agree import PeerError
from .batch import Batch, bind, indices, place
from .checkpoint import Checkpoints, SaveError
from .config import made
from .data.sample import Resumable
from .engine.protocol import Native
from .guard import FAULTS, Diverged, Faults, Guard, Kind, Policy, sources
from .job import Job
from .judge import Judge
from .manifest import DamagedCheckpoint
from .measure import autocast
from .meter import Meter, peak_flops
from .preempt import Preempt
from .pulse import Pulse
from .record import Record
from .straggler import Stragglers
from .trace import Tracer


@dataclass
class State:
    """Where a run stands: what a checkpoint keeps beside the tensors."""

    step: int = 0
    samples: int = 0  # global samples taken, so the next step starts there whatever the number of ranks
    tokens: int = 0
    seconds: float = 0.0  # of training, over all starts
    evals: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0  # bad steps that changed no weight
    rewound: int = 0  # times that the run went back to a checkpoint
    good: list[list[float]] = field(default_factory=list)  # see `Guard.passed`


class Loop:
    """Trains `job` from `state` on; `record` is told everything, `checkpoints` keep what is needed to go
    on. folder: of the run, for pictures made on the way and faults.jsonl. pulse: is told what is being done.
    phases: seconds of the last step in each of its phases.
    """

    def __init__(
        self, job: Job, record: Record, checkpoints: Checkpoints, preempt: Preempt, state: State,
        folder: Path | None = None, pulse: Pulse | None = None,
    ) -> None:  # fmt: skip
        self.job, self.record, self.checkpoints, self.preempt, self.state = (
            job,
            record,
            checkpoints,
            preempt,
            state,
        )
        self.judge: Judge = job.objective.judge()
        self.guard: Guard = made(job.cfg.guard) or Guard()
        self.folder, self.pulse = folder, pulse or Pulse()
        self.phases: dict[str, float] = {}
        self.stragglers = Stragglers(job.ranks, self.pulse, record.note)
        wanted = {"first": None} if folder is None else job.cfg.trace
        first = wanted["first"]
        if first is not None and not state.step < first <= job.cfg.train.steps:
            record.note(
                f"trace.first={first} is not among the steps {state.step + 1} to {job.cfg.train.steps} of "
                "this start: nothing is traced"
            )
        self.tracer = Tracer(folder or Path(), job.ranks, self.pulse, record.note, **wanted)
        assert isinstance(job.objective, nn.Module)
        # it ends with the loss, whose backward comes next
        job.objective.register_forward_hook(self._went_forward)
        self.saved = state.step
        # where a rewind goes: what this start came from, until it has a whole checkpoint of its own
        self.back: str = job.cfg.resume
        self.handed: int | None = None  # a checkpoint that may still be being written
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
            with self.tracer.step(self.state.step + 1):
                values = self._step()
            self.phases = self.pulse.lap()
            self.state.seconds += time.perf_counter() - began
            if values is None:
                continue
            if self.state.step % cfg.train.log_every == 0 or self.state.step == cfg.train.steps:
                self.record.step(self.state.step, cfg.train.steps, values | self.stragglers.compared())
            if cfg.eval.every and self.state.step % cfg.eval.every == 0 and self.state.step < cfg.train.steps:
                self.evaluate(cfg.eval.samples)
            if cfg.checkpoint.every and self.state.step % cfg.checkpoint.every == 0:
                self.save()
            self.pulse.enter("agree", "all-reduce of the signals")
            stopped = self.preempt.agreed()
            if stopped is not None:
                self.record.note(f"signal {stopped}: saving step {self.state.step} and leaving")
                break
        self.save_last()
        # merging takes long: a run that was asked to leave has saved by then
        self.pulse.enter("end", "traces are merged")
        self.tracer.close()
        return stopped

    def _out_of_time(self) -> bool:
        """Whether train.seconds have passed on rank 0, whose clock decides for all."""
        limit = self.job.cfg.train.seconds
        if limit is None:
            return False
        late = torch.tensor([float(self.state.seconds >= limit)])
        dist.broadcast(late, 0)
        return bool(late)

    def _step(self) -> dict[str, float] | None:
        """What is recorded of a step; None of a bad one after which the run went back to a checkpoint."""
        job, state, pulse = self.job, self.state, self.pulse
        pulse.step = state.step + 1
        pulse.enter("data")
        # what was before is no part of the step
        pulse.lap()
        lr = job.optim.lr_at(state.step, job.cfg.train.steps)
        batches = micro_batches(job, state.samples, state.step)
        job.layout.traffic.reset()
        counts = torch.tensor(
            [sum(b.valid for b in batches), sum(b.rows * b.length for b in batches)], dtype=torch.float64
        )
        if job.dp > 1:
            pulse.enter("reduce", "all-reduce of the numbers of tokens")
            dist.all_reduce(counts, group=job.mesh["dp"].get_group())
        valid = max(1.0, float(counts[0]))
        loss = backward(job, batches, valid, pulse=pulse)
        pulse.enter("reduce", "all-reduce of the loss")
        dist.all_reduce(loss)
        mean = float(loss)
        pulse.enter("optimizer")
        norm, kind = self._update(lr, mean)
        pulse.enter("record")
        if kind is not None and self._answered(kind, mean, norm) == "rewind":
            return None
        self.sent, self.stepped = dict(job.layout.traffic.sent), True
        state.step, state.samples = state.step + 1, state.samples + job.global_batch
        state.tokens += int(counts[1])
        rates = self.meter.update(state.step, int(counts[1]), job.objective.flops(batches) * job.dp)
        values = {"loss": mean, "grad_norm": norm, "lr": lr, "tokens": state.tokens, "valid": valid, **rates}
        return values if kind is None else {**values, "skipped": 1}

    def _update(self, lr: float, loss: float) -> tuple[float, Kind | None]:
        """Updates weights and their average, unless the step is bad: the gradient norm, and how it is bad."""
        job, good = self.job, self.state.good
        kind: Kind | None = None

        def may(norm: float) -> bool:
            nonlocal kind
            kind = self.guard.judged(loss, norm, good)
            return kind is None

        norm = job.engine.step(lr, job.cfg.train.clip, may)
        if kind is None:
            self.guard.passed(loss, norm, good)
            if job.ema is not None:
                job.ema.update(job.model)
        return norm, kind

    def _answered(self, kind: Kind, loss: float, norm: float) -> Policy:
        """Does what the guard says about a bad step, and records it; `Diverged` if the run stops with it."""
        state, step, first = self.state, self.state.step + 1, self.state.samples
        told = f"step {step}: {self.guard.words(kind, loss, norm, state.good)}"
        # only one that is whole can be gone back to
        self._finished()
        policy, why = self.guard.answer(kind)
        if policy == "rewind" and (why := self._rewind()):
            policy = "stop"
        did = {"stop": "stopped", "skip": "skipped", "rewind": f"rewound to {state.step}"}[policy]
        state.skipped += policy == "skip"
        wanted = range(first, first + self.job.global_batch)
        if self.folder is not None and dist.get_rank() == 0:
            row: dict[str, Any] = {"step": step, "kind": kind, "did": did, "loss": loss, "grad_norm": norm}
            row |= {"samples": [wanted[0], wanted[-1]], **sources(self.job.data, wanted)}
            if wrong := Faults(self.folder / FAULTS).write(row):
                self.record.note(wrong)
        if policy == "stop":
            raise Diverged(f"{told}: {why}")
        after = f", and on from sample {state.samples}" if policy == "rewind" else ""
        self.record.note(f"{told}; {did}{after}")
        return policy

    def _rewind(self) -> str:
        """Goes back to the newest checkpoint of this start, or else to that which it came from, and on with
        the samples after this step's; why not, if that cannot be done.
        """
        self.pulse.enter("save", "the newest checkpoint is loaded")
        state = self.state
        kept = {"samples": state.samples + self.job.global_batch, "seconds": state.seconds}
        kept |= {"skipped": state.skipped, "rewound": state.rewound + 1}
        try:
            found = loaded(self.job, self.checkpoints, self.back)
        except (DamagedCheckpoint, FileNotFoundError) as error:
            return str(error)
        if found is None:
            return "there is no checkpoint to go back to yet"
        vars(state).update(vars(found) | kept)
        # what is there of this step would go on with other samples
        self.saved = -1
        self.job.ranks.together(lambda: self.record.rewound(state.step))
        self.meter.restart()
        return ""

    def _went_forward(self, *_: Any) -> None:
        if self.pulse.phase == "forward":
            self.pulse.enter("backward")

    def evaluate(self, samples: int) -> None:
        """The first `samples` held-out samples, measured and recorded."""
        self.pulse.enter("evaluate")
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
        whole = self._finished()
        if self.saved != self.state.step or not whole:
            self._save()
            self.checkpoints.wait()
            self.saved = self.state.step
            self._written()

    def _save(self) -> None:
        self.pulse.enter("save")
        self.checkpoints.save(self.state.step, self.job.state(), extra(self.job, self.state))
        self.handed = self.state.step
        self._save_native()

    def _save_native(self) -> None:
        """The engine's own checkpoint, if it has one. One that fails is reported, as long as no rank leaves
        the others waiting inside of it.
        """
        engine, folder, step = self.job.engine, self.folder, self.state.step
        if not isinstance(engine, Native) or folder is None:
            return
        try:
            self.job.ranks.together(lambda: engine.save_native(folder / "native", step))
        except (OSError, ValueError, PeerError) as error:
            self.record.note(f"native checkpoint of step {step} failed, training goes on: {error}")

    def _finished(self) -> bool:
        """Waits for the save before, if it is still being written; False, and a note, if it failed."""
        try:
            self.checkpoints.wait()
        except SaveError as error:
            self.record.note(f"checkpoint failed, training goes on: {error}")
            self.handed = None
            return False
        self._written()
        return True

    def _written(self) -> None:
        """Tells of the checkpoint that was handed over to be written and now is whole, once."""
        if self.handed is not None:
            self.record.saved(self.handed)
            self.guard.saved()
            self.back = "auto"
        self.handed = None


def micro_batches(job: Job, first: int, step: int) -> list[Batch]:
    """The micro batches on this dp rank of the step that starts at sample `first`: the same samples whatever
    the ranks are.
    """
    micro, several = job.cfg.train.micro_batch, job.cfg.train.accumulate
    groups = indices(first, dp=job.dp, rank=job.dp_rank, micro=micro, accumulate=several)
    return [job.objective.load(job.data, wanted, step) for wanted in groups]


def backward(
    job: Job, batches: list[Batch], valid: float, given: Callable[[Any], Any] = lambda part: part,
    pulse: Pulse | None = None,
) -> Tensor:  # fmt: skip
    """Gradients of a step, and this rank's share of its loss, float64. given: what an objective takes of the
    part that is held here. pulse: is told when a forward begins.
    """
    loss = torch.zeros((), dtype=torch.float64, device=job.device)
    for i, batch in enumerate(batches):
        if pulse is not None:
            pulse.enter("forward")
        placement = place(job.layout, batch, job.mask)
        part = given(batch.held(job.layout, placement, job.device))
        with autocast(job):
            share = job.engine.backward(part, bind(job.layout, placement), valid, last=i == len(batches) - 1)
        loss += share.double()
    return loss


def extra(job: Job, state: State) -> dict[str, Any]:
    """What a checkpoint keeps as JSON."""
    kept = {
        "step": state.step,
        "samples": state.samples,
        "tokens": state.tokens,
        "seconds": state.seconds,
        "evals": state.evals,
        "skipped": state.skipped,
        "rewound": state.rewound,
        "good": state.good,
        "data": fingerprint(job),
        "global_batch": job.global_batch,
    }
    return kept | ({"stream": job.data.state(state.samples)} if isinstance(job.data, Resumable) else {})


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
    """Loads the checkpoint that `which` names into the job: the state to go on from, or that of a run that
    begins if there is none.
    """
    return loaded(job, checkpoints, which) or State()


def loaded(job: Job, checkpoints: Checkpoints, which: str) -> State | None:
    """As `resume`; None if there is no checkpoint. Other data is refused."""
    tensors = job.state()
    kept = checkpoints.load(which, tensors)
    if kept is None:
        return None
    if kept["data"] != fingerprint(job):
        raise ValueError(
            "resume: the data is not the one that the checkpoint was trained on (its hash differs); "
            "restore data.*, or start anew with resume=never and another run.name"
        )
    job.load(tensors)
    if isinstance(job.data, Resumable):
        job.data.load(kept["stream"])
    always = ("step", "samples", "tokens", "seconds", "evals")
    # which earlier checkpoints lack
    since = {name: kept[name] for name in ("skipped", "rewound", "good") if name in kept}
    return State(**{name: kept[name] for name in always}, **since)
