"""Diffusion jobs from their configs: the same on every layout, resumed and sampled on other ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from numpy.typing import NDArray
from omegaconf import DictConfig

from jobs import Kept, Row, furthest, launch_of, values
from longspan.train.checkpoint import Checkpoints
from longspan.train.config import typed
from longspan.train.job import build, processes
from longspan.train.judge_clips import draw
from longspan.train.loop import Loop, resume
from longspan.train.preempt import Preempt
from world import RankFailed, Worlds

pytest.importorskip("sklearn", reason="the digits need the extra images")
STEPS = 4


def config(*overrides: str, experiment: str = "vdit_moving_digits") -> DictConfig:
    small = [
        "track=none", "device=cpu", "model.dim=32", "model.layers=2", f"train.steps={STEPS}",
        "train.micro_batch=4", "train.log_every=1", "checkpoint.every=2", "eval.every=2", "eval.samples=4",
        "eval.final=4", "objective.judge.samples=4", "objective.judge.preview=4",
        "objective.judge.sampler.steps=2",
    ]  # fmt: skip
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(compose("train", overrides=[f"experiment={experiment}", *small, *overrides]))


def trained(
    rank: int, cfg: DictConfig, folder: Path, stop: int | None = None
) -> tuple[list[Row], list[float], NDArray[np.float32]]:
    """Steps from the checkpoint that is there on, held-out losses, and samples of the averaged weights."""
    with processes(launch_of(rank), "cpu", 60.0) as device, Preempt() as preempt:
        job = build(cfg, launch_of(rank), device)
        checkpoints, record = Checkpoints(folder / "checkpoints"), Kept(rank, stop)
        folder.mkdir(parents=True, exist_ok=True)
        state = resume(job, checkpoints, cfg.resume)
        loop = Loop(job, record, checkpoints, preempt, state, folder)
        loop.run()
        with job.averaged():
            judge = job.objective.judge()
            clips = draw(job, judge.sampler, 6, 2.0).clips
        return record.rows, [row["eval_loss"] for row in state.evals], clips


@pytest.fixture(scope="module")
def alone(
    world: Worlds, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[Row], list[float], NDArray[np.float32]]:
    return world(1)(trained, config("parallel=single"), tmp_path_factory.mktemp("alone"))[0]


WINDOW = ("mask=neighborhood", "mask.grid=[5,4,8]", "mask.window=[3,3,5]", "mask.stride=1")


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, ("parallel=ring", "parallel.layout.placement=zigzag")),
        (3, ("parallel=ulysses",)),
        (2, ("parallel=single", "train.micro_batch=2")),
        (2, ("parallel=ring", "engine=fsdp")),
        (2, ("parallel=single", "train.micro_batch=2", "engine=fsdp")),
    ],
    ids=["ring", "ulysses 3", "dp", "fsdp", "fsdp over dp"],
)
def test_a_diffusion_job_is_the_same_on_other_ranks(
    world: Worlds, alone: tuple[list[Row], list[float], NDArray[np.float32]], tmp_path: Path, size: int,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    rows, evals, clips = alone
    for found in world(size)(trained, config(*overrides), tmp_path):
        assert furthest(values(found[0], "loss"), values(rows, "loss")) < 2e-6
        assert furthest(values(found[0], "grad_norm"), values(rows, "grad_norm")) < 1e-5
        assert found[1] == pytest.approx(evals, rel=2e-6)
        assert np.abs(found[2] - clips).max() < 1e-4


def test_a_window_on_ranks_is_the_window_on_one(world: Worlds, tmp_path: Path) -> None:
    one = world(1)(trained, config("parallel=single", *WINDOW), tmp_path / "one")[0]
    for found in world(2)(trained, config("parallel=s2", *WINDOW), tmp_path / "two"):
        assert furthest(values(found[0], "loss"), values(one[0], "loss")) < 2e-6
        assert np.abs(found[2] - one[2]).max() < 1e-4


def test_a_run_goes_on_and_is_sampled_on_other_ranks(
    world: Worlds, alone: tuple[list[Row], list[float], NDArray[np.float32]], tmp_path: Path
) -> None:
    begun = world(4)(trained, config("parallel=usp"), tmp_path, 2)
    assert len(begun[0][0]) == 2
    rest = world(2)(trained, config("parallel=ring"), tmp_path)
    assert furthest(values(rest[0][0], "loss"), values(alone[0][2:], "loss")) < 2e-6
    again = world(1)(trained, config("parallel=single"), tmp_path)[0]
    assert again[0] == [] and np.abs(again[2] - alone[2]).max() < 1e-4
    assert {p.name for p in (tmp_path / "samples").iterdir()} >= {"step-00000002.png", "step-00000002.gif"}


def test_a_model_that_does_not_fit_the_data_is_refused(world: Worlds, tmp_path: Path) -> None:
    for setting, said in (
        ("model.classes=10", "model.classes gives 10, but the data has 20"),
        ("model.size=[5,8,8]", "model.size gives"),
    ):
        with pytest.raises(RankFailed, match=said.replace("[", r"\[")):
            world(1)(trained, config("parallel=single", setting), tmp_path)


def test_digits_compose_and_run(world: Worlds, tmp_path: Path) -> None:
    cfg = config("parallel=single", experiment="dit_digits")
    rows, evals, clips = world(1)(trained, cfg, tmp_path)[0]
    assert len(rows) == STEPS and len(evals) == 1 and clips.shape == (6, 1, 1, 8, 8)
    assert torch.isfinite(values(rows, "loss")).all() and not dist.is_initialized()
