"""Engines: losses and gradient norms as of one process under every layout, and each other's checkpoints."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from omegaconf import DictConfig

from jobs import Once, assert_same, config, first_batch, gone_on, joined, launch_of, ring
from longspan.train.engine.deepspeed import package
from longspan.train.engine.megatron import initialize
from longspan.train.job import build
from world import Worlds

TEN = "train.steps=10"
ONE = ("parallel=single", "data.pack=true", TEN)
SHARDED = ("engine=fsdp", TEN)


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, ring("zigzag")),
        pytest.param(
            4, ring("zigzag", "parallel.mesh.dp=2", "parallel.mesh.ring=2", "engine.replicate=true",
                    "train.micro_batch=1"), marks=pytest.mark.slow,
        ),
        (2, ring("zigzag", "engine.prefetch=2", "engine.reshard=false", "train.micro_batch=1",
                 "train.accumulate=2")),
        pytest.param(2, ring("zigzag", "engine.offload=true"), marks=pytest.mark.slow),
    ],
    ids=["ring", "hsdp", "accumulate", "offload"],
)  # fmt: skip
def test_fsdp_trains_as_one_process(once: Once, size: int, overrides: tuple[str, ...]) -> None:
    assert_same(once(size, *SHARDED, *overrides), once(1, *ONE))


def reductions(rank: int, cfg: DictConfig) -> tuple[int, int]:
    """All-reduces of a second step's gradients, and how many parameters there are."""
    with joined(rank) as device:
        job = build(cfg, launch_of(rank), device)
        part, attend = first_batch(job, device)
        with patch.object(dist, "all_reduce", wraps=dist.all_reduce) as counted:
            for _ in range(2):
                counted.reset_mock()
                job.engine.backward(part, attend, 100.0, last=True)
        return counted.call_count, len(list(job.model.parameters()))


def test_two_ranks_sum_whole_buckets_and_more_each_parameter_alone(world: Worlds, data_cache: str) -> None:
    """a + b is b + a; three numbers have orders."""
    for size in (2, 3):
        for calls, parameters in world(size)(reductions, config(data_cache, "engine=ddp", *ring())):
            assert calls == (1 if size == 2 else parameters)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            (2, ("engine=ddp", *ring())), (4, ("engine=fsdp", "parallel=usp")), marks=pytest.mark.slow
        ),
        ((4, ("engine=fsdp", *ring())), (1, ("engine=ddp", "parallel=single"))),
    ],
    ids=["ddp 2 to fsdp 4", "fsdp 4 to ddp 1"],
)
def test_a_checkpoint_goes_on_under_another_engine(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path,
    before: tuple[int, tuple[str, ...]], after: tuple[int, tuple[str, ...]],
) -> None:  # fmt: skip
    started, then = ((n, config(data_cache, TEN, *o)) for n, o in (before, after))
    ran = gone_on(world, tmp_path / "checkpoints", started, then)
    assert_same(ran, once(1, *ONE), since=5)


@pytest.mark.parametrize(
    ("missing", "start", "extra"),
    [("deepspeed", package, "deepspeed"), ("megatron.core", lambda _: initialize(None, 1), "megatron")],  # type: ignore[arg-type]
    ids=["deepspeed", "megatron"],
)
def test_a_missing_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, start: Callable[[str], Any], extra: str
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    said = rf"engine={extra} needs {extra}.*: pip install longspan\[{extra}\]"
    with pytest.raises(ModuleNotFoundError, match=said):
        start("cpu")
