"""Attention crosses ranks: what stands on the first shard is repeated on the last, unless the mask
forbids it.
"""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig

from jobs import Kept, launch_of
from longspan.train.checkpoint import Checkpoints
from longspan.train.config import typed
from longspan.train.data.needle import Needle
from longspan.train.job import build, processes
from longspan.train.loop import Loop, State
from longspan.train.measure import retrieval
from longspan.train.preempt import Preempt
from world import Worlds


def config(root: Path, *overrides: str) -> DictConfig:
    given = [
        "experiment=needle", "track=none", f"run.root={root}", "parallel.layout.placement=contiguous",
        "data.context=256", "data.curriculum=[[0,80],[300,256]]", "train.steps=500", "checkpoint.every=0",
    ]  # fmt: skip
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(compose("train", overrides=[*given, *overrides]))


def found_at_the_start(rank: int, cfg: DictConfig, folder: Path) -> float:
    """The share of needles at the very start, on rank 0, that are repeated at the very end, on the last
    rank.
    """
    with processes(launch_of(rank), "cpu", 120.0) as device, Preempt() as preempt:
        job = build(cfg, launch_of(rank), device)
        Loop(job, Kept(rank, None), Checkpoints(folder, asynchronous=False), preempt, State()).run()
        assert isinstance(job.data, Needle)
        accuracy = retrieval(job, job.data, depths=[0.0], lengths=[256], samples=16)
        return float(accuracy[0, 0])


@pytest.mark.slow
def test_a_needle_crosses_the_ranks(world: Worlds, tmp_path: Path) -> None:
    """Distance 230, so a window of 128 hides the needle: then only which characters are left can be
    guessed.
    """
    crossing, cut_off = (
        world(2)(found_at_the_start, config(tmp_path, *mask), tmp_path / name, timeout=900.0)[0]
        for name, mask in (("causal", []), ("window", ["mask=window", "mask.left=127"]))
    )
    assert crossing >= 0.8
    assert cut_off <= 0.2
