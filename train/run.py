"""One run from its composed config to its exit code."""

import datetime
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig

from ..kernels.attention import chosen
from ..parallel.balance import ESTIMATE
from .agree import Ranks, one_line
from .checkpoint import Checkpoints
from .config import made, redacted, typed
from .entry import guarded
from .finish import finish, headline
from .heartbeat import watched
from .job import Job, Launch, build, processes, run_folder
from .loop import Loop, State, resume
from .meter import parameter_counts
from .metrics import Metrics
from .out_of_memory import explained
from .preempt import EXIT_PREEMPTED, Preempt
from .progress import Progress
from .pulse import Pulse
from .record import Record, open_folder, sweep_of, write_json
from .report.page import write

# Bytes of metrics from which on a report takes longer than the end of a run should.
LARGE = 4 * 2**20


def train(cfg: DictConfig, launch: Launch) -> int:
    """Checks, builds, trains, evaluates; the exit code (see `entry`)."""

    def work() -> int:
        config = typed(cfg)
        with (
            processes(launch, config.device, config.timeout_s) as device,
            Preempt() as preempt,
            Progress(rank=launch.rank) as shown,
        ):
            folder = agree_folder(config)
            with explained(config, folder):
                job, pulse = build(config, launch, device), Pulse()
            every_s, timeout_s = config.heartbeat_s, config.timeout_s
            with watched(
                folder / "heartbeat", pulse, job.layout.traffic, preempt, every_s=every_s, timeout_s=timeout_s
            ):
                return _run(job, folder, preempt, shown, pulse)

    return guarded(work, launch)


def agree_folder(cfg: DictConfig) -> Path:
    """The run folder, made by rank 0 and the same on all ranks. A folder with checkpoints is not taken over
    with resume=never.
    """
    ranks = Ranks(kinds=(ValueError, FileExistsError, NotADirectoryError, PermissionError, OSError))

    def make(parts: list[Path]) -> list[Path]:
        # a link, such as runs/latest, is followed once: it may soon point elsewhere
        folder = parts[0].resolve() if parts[0].is_symlink() else parts[0]
        if cfg.resume == "never" and any((folder / "checkpoints").glob("*")):
            raise ValueError(
                f"run.dir={folder} holds a run already, and resume is never: "
                f"take resume=auto or another run.name"
            )
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            (folder / ".probe").write_text("")
            (folder / ".probe").unlink()
        except OSError as error:
            raise OSError(
                f"run.dir={folder} cannot be written: {error.strerror}; give another run.dir or run.root"
            ) from error
        return [folder] * len(parts)

    return ranks.exchange(lambda: run_folder(cfg, datetime.datetime.now()), make)


def _run(job: Job, folder: Path, preempt: Preempt, shown: Progress, pulse: Pulse) -> int:
    notes: list[str] = []
    # the header comes first; what is told later, maybe by the thread that saves, is shown as it comes
    tell = notes.append
    checkpoints = Checkpoints(
        folder / "checkpoints",
        keep=job.cfg.checkpoint.keep,
        permanent=job.cfg.checkpoint.permanent,
        asynchronous=job.cfg.checkpoint.asynchronous,
        warn=lambda line: tell(line),
    )
    state = resume(job, checkpoints, job.cfg.resume)
    record = _record(job, folder, state, shown)
    loop = Loop(job, record, checkpoints, preempt, state, folder, pulse)
    if dist.get_rank() == 0:
        shown.start(facts(loop, folder))
        for note in notes:
            shown.note(note)
        tell = shown.note
        write_json(folder / "status.json", {"state": "running", "step": state.step})
    if state.step >= job.cfg.train.steps:
        record.note(
            f"already trained to step {state.step}; raise train.steps to go on, or take another run.name"
        )
    with _failures_told(job, folder, record, state), explained(job.cfg, folder, job.model):
        stopped = loop.run()
        code = EXIT_PREEMPTED if stopped is not None else 0
        summary: dict[str, Any] = {"state": f"stopped by signal {stopped}"}
        if stopped is None:
            summary = finish(loop, folder, complete=state.step >= job.cfg.train.steps)
    if dist.get_rank() == 0:
        write_json(folder / "status.json", {"state": summary["state"], "step": state.step, "exit": code})
        assert record.tracker
        record.close()
        if stopped is None:
            _report(job, folder, record)
            shown.summary(headline(loop, summary, folder))
        record.tracker.table("evaluations", state.evals)
        record.tracker.summary({k: v for k, v in summary.items() if isinstance(v, float | int | str)})
        record.tracker.finish(code)
    return code


@contextmanager
def _failures_told(job: Job, folder: Path, record: Record, state: State) -> Iterator[None]:
    """Says in status.json and the report why a run failed, if the disk still takes it."""
    try:
        yield
    except Exception as error:
        if dist.get_rank() == 0:
            with suppress(OSError):
                failed = {"state": f"failed: {one_line(error)}", "step": state.step}
                write_json(folder / "status.json", failed)
            record.close()
            _report(job, folder, record)
        raise


def _report(job: Job, folder: Path, record: Record) -> None:
    """Writes report.html on rank 0, if asked to; what goes wrong with it is only told."""
    if not job.cfg.report:
        return
    try:
        if (folder / "metrics.jsonl").stat().st_size > LARGE:
            record.note(f"the run is long, so its report is left to you: longspan report run={folder}")
            return
        write([folder])
    except Exception as error:
        record.note(f"report.html was not written: {one_line(error)}")


def _record(job: Job, folder: Path, state: State, shown: Progress) -> Record:
    """The record of this run, opened on rank 0; a fault there stops all ranks."""

    def opened() -> Record:
        if dist.get_rank() != 0:
            return Record(dist.get_rank(), shown, None, None)
        config = redacted(job.cfg)
        env: Mapping[str, str] = job.launch.env or {}
        facts = {"world": dist.get_world_size(), "attention": attends(job), "data": job.data.describe()}
        try:
            open_folder(folder, Path(job.cfg.run.root), config, facts)
            metrics = Metrics(folder / "metrics.jsonl", resume_step=state.step or None, tell=shown.note)
        except OSError as error:
            raise OSError(f"run.dir={folder} cannot be written: {error.strerror or error}") from error
        try:
            tracker = made(job.cfg.track)(
                run_dir=folder, name=folder.name, config=config, resume=state.step > 0, env=env,
                sweep=sweep_of(folder, Path(job.cfg.run.root)),
            )  # fmt: skip
        except Exception:
            metrics.close()
            raise
        record = Record(0, shown, metrics, tracker, folder)
        record.started(state.step, dist.get_world_size())
        return record

    return job.ranks.together(opened)


def attends(job: Job) -> str:
    """The backend that attention runs on, as `chosen` says it."""
    dtype = torch.bfloat16 if job.cfg.train.precision == "bfloat16" else torch.float32
    # a model of somebody else's may not say; only widths that no kernel takes would matter
    width = getattr(job.model, "head_dim", 1)
    return chosen(torch.empty(1, 1, 1, width, dtype=dtype, device=job.device))


def facts(loop: Loop, folder: Path) -> dict[str, str]:
    """What runs, for the header."""
    job, model = loop.job, loop.job.model
    total, _ = parameter_counts(model)
    placement = job.objective.placement(job.data, job.layout, job.mask)
    degrees = " x ".join(
        f"{n} {s}" for n, s in zip(job.mesh.mesh_dim_names or (), job.mesh.shape, strict=True) if s > 1
    )
    uneven = placement.imbalance(job.mask, model.kv_heads, most=ESTIMATE)
    return {
        "model": f"{type(model).__name__}, {total:,} parameters, {job.cfg.train.precision}",
        "layout": f"{type(job.layout).__name__.lower()}, {degrees or 'one process'}, "
        f"work max/mean {uneven:.2f} over ranks",
        "attention": f"{attends(job)} kernels, {job.mask} in each document",
        "data": loop.judge.facts(job),
        "step": f"{job.global_batch} sequences a step, {job.cfg.train.steps} steps",
        "from": f"step {loop.state.step}" if loop.state.step else job.cfg.init.path or "random weights",
        "peak": f"{loop.peak / 1e9:.1f} GFLOP/s a rank ({loop.peak_source})",
        "run folder": str(folder),
    }
