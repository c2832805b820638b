"""Small diffusion jobs from their configs: trained, evaluated and sampled on the ranks of a world."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from hydra import compose, initialize_config_module
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from jobs import Kept, Row, launch_of
from longspan.train.checkpoint import Checkpoints
from longspan.train.config import typed
from longspan.train.drawing import draw
from longspan.train.engine import fsdp
from longspan.train.job import build, processes
from longspan.train.loop import Loop, resume
from longspan.train.preempt import Preempt

STEPS = 4


class Trained(NamedTuple):
    """What each step recorded, held-out losses, samples, and the average of the weights, whole."""

    rows: list[Row]
    evals: list[float]
    clips: NDArray[np.float32]
    average: dict[str, Tensor]


def config(*overrides: str, experiment: str = "vdit_moving_digits") -> DictConfig:
    small = [
        "track=none", "device=cpu", "model.dim=32", "model.layers=2", f"train.steps={STEPS}",
        "train.micro_batch=4", "train.log_every=1", "checkpoint.every=2", "eval.every=2", "eval.samples=4",
        "eval.final=4", "objective.judge.samples=4", "objective.judge.preview=4",
        "objective.judge.sampler.steps=2",
    ]  # fmt: skip
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(compose("train", overrides=[f"experiment={experiment}", *small, *overrides]))


def latent_config(path: Path, *overrides: str) -> DictConfig:
    """A job of two steps on the latents at `path`, without guidance."""
    small = [
        "track=none", "device=cpu", "mask=full", "objective=rectified_flow", "data=latents",
        f"data.path={path}", f"data.cache={path.parent}/cache", "data.held_out=0.25", "train.steps=2",
        "train.micro_batch=2", "train.ema=0.5", "eval.samples=4", "eval.final=4", "checkpoint.every=0",
        "objective.judge.samples=4", "objective.judge.sampler.steps=2", "optim.warmup=0",
    ]  # fmt: skip
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(compose("train", overrides=[*small, *overrides]))


@contextmanager
def weights_in(dtype: torch.dtype) -> Iterator[None]:
    """Jobs that are built meanwhile have weights of this dtype, and FSDP leaves them so."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    none = MixedPrecisionPolicy(cast_forward_inputs=False)
    policy = MixedPrecisionPolicy if dtype == torch.float32 else lambda *_, **__: none
    try:
        with patch.object(fsdp, "MixedPrecisionPolicy", policy):
            yield
    finally:
        torch.set_default_dtype(before)


def trained(
    rank: int, cfg: DictConfig, folder: Path, stop: int | None = None, dtype: torch.dtype = torch.float32
) -> Trained:
    """Steps from the checkpoint that is there on, held-out losses, and samples of the averaged weights."""
    with processes(launch_of(rank), "cpu", 60.0) as device, Preempt() as preempt, weights_in(dtype):
        job = build(cfg, launch_of(rank), device)
        checkpoints, record = Checkpoints(folder / "checkpoints"), Kept(rank, stop)
        folder.mkdir(parents=True, exist_ok=True)
        state = resume(job, checkpoints, cfg.resume)
        loop = Loop(job, record, checkpoints, preempt, state, folder)
        loop.run()
        with job.averaged():
            judge = job.objective.judge()
            clips = draw(job, judge.sampler, 6, 2.0).clips
        average = {} if job.ema is None else {name: _whole(x) for name, x in job.ema.weights.items()}
        return Trained(record.rows, [row["eval_loss"] for row in state.evals], clips, average)


def _whole(x: Tensor) -> Tensor:
    return (x.full_tensor() if isinstance(x, DTensor) else x).clone()
