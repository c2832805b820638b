"""Engines: losses and gradient norms as of one process under every layout, and each other's checkpoints."""

from pathlib import Path

import pytest

from jobs import STEPS, Once, assert_same, config, gone_on, ring
from world import Worlds

SHARDED = ("engine=fsdp",)


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, ring("zigzag")),
        pytest.param(2, ("parallel=ulysses",), marks=pytest.mark.slow),
        pytest.param(4, ("parallel=usp",), marks=pytest.mark.slow),
        (4, ring("zigzag", "parallel.mesh.dp=2", "parallel.mesh.ring=2", "engine.replicate=true",
                 "train.micro_batch=1")),
        (2, ring("zigzag", "engine.prefetch=2", "engine.reshard=false", "train.micro_batch=1",
                 "train.accumulate=2")),
    ],
    ids=["ring", "ulysses", "usp", "hsdp", "accumulate"],
)  # fmt: skip
def test_fsdp_trains_as_one_process(once: Once, size: int, overrides: tuple[str, ...]) -> None:
    assert_same(once(size, *SHARDED, *overrides), once(1, "parallel=single", "data.pack=true"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(
            (2, ("engine=ddp", *ring())), (4, ("engine=fsdp", "parallel=usp")), marks=pytest.mark.slow
        ),
        ((4, ("engine=fsdp", *ring())), (1, ("engine=ddp", "parallel=single"))),
        pytest.param(
            (2, ("engine=fsdp", "parallel=ulysses")), (2, ("engine=fsdp", *ring())), marks=pytest.mark.slow
        ),
    ],
    ids=["ddp 2 to fsdp 4", "fsdp 4 to ddp 1", "fsdp 2 to fsdp 2"],
)
def test_a_checkpoint_goes_on_under_another_engine(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path,
    before: tuple[int, tuple[str, ...]], after: tuple[int, tuple[str, ...]],
) -> None:  # fmt: skip
    ran = gone_on(world, tmp_path / "checkpoints", *((n, config(data_cache, *o)) for n, o in (before, after)))
    assert_same(ran, once(1, "parallel=single", "data.pack=true"), since=STEPS // 2)
