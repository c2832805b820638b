"""A run goes on where it stopped: after kills, signals and on other ranks, and stops when it diverges."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from jobs import (
    EXACT,
    STEPS,
    Kept,
    Once,
    Row,
    assert_same,
    config,
    launch_of,
    ring,
    run,
    values,
    wait_for,
    whole,
)
from longspan.train import loop as loops
from longspan.train.checkpoint import Checkpoints
from longspan.train.guard import Diverged
from longspan.train.job import build, processes
from longspan.train.loop import Loop, State
from longspan.train.metrics import Metrics
from longspan.train.preempt import EXIT_PREEMPTED, Preempt
from longspan.train.record import Record
from world import RankFailed, Worlds


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (1, ("parallel=single",)),
        pytest.param(2, ring(), marks=pytest.mark.slow),
        pytest.param(4, ring(), marks=pytest.mark.slow),
    ],
    ids=["single", "ring2", "ring4"],
)
def test_two_resumes_on_the_same_ranks_are_bit_equal(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, size: int, layout: tuple[str, ...]
) -> None:
    straight = once(size, *layout, "data.pack=true")
    cfg = config(data_cache, *layout, "data.pack=true")
    parts = [world(size)(run, cfg, tmp_path, stop) for stop in (6, 9, 13)]
    for rank, whole_run in enumerate(straight):
        pieces = [part[rank] for part in parts]
        assert [len(p.rows) for p in pieces] == [6, 3, 4]
        rows = [row for p in pieces for row in p.rows]
        assert values(rows, *EXACT).equal(values(whole_run.rows[:13], *EXACT))
        assert [t for p in pieces for t in p.taken] == [t for t in whole_run.taken if t.step < 13]


def test_a_resume_on_other_ranks_goes_on_with_the_same_samples(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path
) -> None:
    begun = world(2)(run, config(data_cache, *ring()), tmp_path / "begun", 6)
    assert len(begun[0].rows) == 6
    others = {
        1: ("parallel=single",),
        4: ring("contiguous", "parallel.mesh.dp=2", "parallel.mesh.ring=2", "train.micro_batch=1"),
    }
    for size, layout in others.items():
        shutil.copytree(tmp_path / "begun", tmp_path / str(size))
        rest = world(size)(run, config(data_cache, *layout), tmp_path / str(size))
        assert_same(rest, once(1, "parallel=single", "data.pack=true"), since=6)


def refused(rank: int, cfg: DictConfig, folder: Path) -> str:
    """What `run` says when it raises a ValueError."""
    with pytest.raises(ValueError) as caught:
        run(rank, cfg, folder)
    return str(caught.value)


def test_other_data_is_refused_on_resume(world: Worlds, data_cache: str, tmp_path: Path) -> None:
    world(1)(run, config(data_cache, "parallel=single"), tmp_path, 2)
    for word in ("seed=1", "data.context=128", "data.pack=false"):
        said = world(1)(refused, config(data_cache, "parallel=single", word), tmp_path)[0]
        assert said.startswith("resume: the data is not the one that the checkpoint was trained on (its hash")


def told(folder: Path) -> list[Row]:
    return Metrics.read(folder / "metrics.jsonl")


def status(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "status.json").read_text())
    return found


def through_a_full_disk(rank: int, cfg: DictConfig, first: int, last: int) -> int:
    """The job, whose metrics.jsonl takes none of the steps from `first` on, until `last`."""
    path, aside, step = Path(cfg.run.dir) / "metrics.jsonl", Path(cfg.run.dir) / "aside", Record.step

    def told(self: Record, number: int, total: int, values: Mapping[str, float]) -> None:
        if number == first:
            path.rename(aside)
            path.symlink_to("/dev/full")
        if number == last:
            assert len(Metrics.read(aside)) == first - 1
            aside.replace(path)
        step(self, number, total, values)

    with patch.object(Record, "step", told):
        return whole(rank, cfg)


def test_killed_at_any_step_and_resumed_twice(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path
) -> None:
    words = [
        data_cache,
        "parallel=single",
        "data.pack=true",
        f"run.dir={tmp_path}",
        "checkpoint.every=3",
        "eval.final=2",
    ]
    command = [sys.executable, "-m", "longspan.train", "experiment=tiny", "track=none", *words]
    # one thread, as the ranks of a world have
    environment = os.environ | {"LOCAL_WORLD_SIZE": str(len(os.sched_getaffinity(0)))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        wait_for(tmp_path / "metrics.jsonl", 5, process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 5 <= len(told(tmp_path)) < STEPS
    with pytest.raises(RankFailed, match="died with exit code -9"):
        world(1)(whole, config(*words), (signal.SIGKILL, 0, 13))
    assert 13 <= len(told(tmp_path)) < STEPS and status(tmp_path)["state"] == "running"
    assert world(1)(through_a_full_disk, config(*words), STEPS - 1, STEPS) == [0]
    straight = once(1, "parallel=single", "data.pack=true")[0].rows
    assert values(told(tmp_path), *EXACT).equal(values(straight, *EXACT))
    assert status(tmp_path) == {"state": "finished", "step": STEPS, "exit": 0}


def test_a_signal_to_one_rank_stops_all_after_saving(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path
) -> None:
    cfg = config(data_cache, *ring(), f"run.dir={tmp_path}", "eval.final=2")
    assert world(2)(whole, cfg, (signal.SIGUSR1, 1, 4)) == [EXIT_PREEMPTED] * 2 == [75, 75]
    left = status(tmp_path)
    assert left["exit"] == 75 and left["state"] == f"stopped by signal {int(signal.SIGUSR1)}"
    assert left["step"] == len(told(tmp_path)) in range(4, STEPS)
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step-{left['step']:08}\n"
    assert world(2)(whole, cfg) == [0, 0]
    straight = once(2, *ring("zigzag", "data.pack=true"))[0].rows
    assert values(told(tmp_path), *EXACT).equal(values(straight, *EXACT))
    assert {p.name for p in tmp_path.iterdir()} >= {
        "checkpoints", "config.yaml", "layout.png", "loss.png", "metrics.jsonl", "position.png", "run.json",
        "status.json", "summary.json",
    }  # fmt: skip
    assert json.loads((tmp_path / "run.json").read_text())["attention"] == "cpu"


def diverge(rank: int, cfg: DictConfig, folder: Path) -> tuple[str, bool, bool, int]:
    """A run that diverges: what it says, whether weights and moments stayed, had never moved, and steps."""
    launch = launch_of(rank)
    with processes(launch, "cpu", 60.0) as device, Preempt() as preempt:
        job = build(cfg, launch, device)
        record = Kept(rank, None)

        def tensors() -> list[Tensor]:
            state = job.engine.save()
            return [x.clone() for x in (*state["model"].values(), *_flat(state["optim"]))]

        first, at_step = tensors(), list[list[Tensor]]()
        with (
            patch.object(loops, "peak_flops", lambda *_: (1e12, "not measured")),
            patch.object(record, "step", lambda *_: at_step.append(tensors())),
        ):
            loop = Loop(job, record, Checkpoints(folder), preempt, State())
            with pytest.raises(Diverged) as caught:
                loop.run()
        return str(caught.value), _same(at_step[-1], tensors()), _same(first, tensors()), len(at_step)


def _flat(state: dict[str, dict[str, Tensor]]) -> list[Tensor]:
    return [x for moments in state.values() for x in moments.values()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_diverged_run_stops_and_leaves_the_weights(world: Worlds, data_cache: str, tmp_path: Path) -> None:
    cfg = config(data_cache, *ring(), "optim.lr=1e30", "train.clip=0")
    for said, stayed, same_as_first, steps in world(2)(diverge, cfg, tmp_path / "checkpoints"):
        assert said.startswith(f"step {steps + 1}: loss ") and "nan" in said
        assert stayed and not same_as_first and steps >= 1
    assert not list(tmp_path.glob("checkpoints/*"))


def workers(launcher: int) -> list[int]:
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    found = {}
    for pid in map(int, children.read_text().split()):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [line[5:] for line in environment if line.startswith(b"RANK=")]
        found.update({int(rank): pid for rank in ranks})
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's workers in /proc")
def test_torchrun_killed_preempted_and_resumed(once: Once, data_cache: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [data_cache, *ring("zigzag", "data.pack=true"), f"run.dir={run_dir}", "eval.final=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        *torchrun,
        "-m",
        "longspan.train",
        "experiment=tiny",
        "track=none",
        "checkpoint.every=3",
        *words,
    ]
    metrics, said = run_dir / "metrics.jsonl", tmp_path / "said"
    for number, step, rank in ((signal.SIGKILL, 4, 1), (signal.SIGUSR1, 9, 1), (signal.SIGKILL, 14, 0)):
        with open(said, "w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
            wait_for(metrics, step, process)
            os.kill(workers(process.pid)[rank], number)
            assert process.wait(60) != 0
        if number == signal.SIGUSR1:
            assert status(run_dir)["exit"] == 75
            assert "stopped by a signal after saving: start it again to go on" in said.read_text()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    straight = once(2, *ring("zigzag", "data.pack=true"))[0].rows
    assert values(told(run_dir), *EXACT).equal(values(straight, *EXACT))
