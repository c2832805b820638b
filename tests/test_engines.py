"""Engines: losses and gradient norms as of one process under every layout, and each other's checkpoints."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs import STEPS, Once, assert_same, config, gone_on, ring
from longspan.train.engine.deepspeed import package
from longspan.train.engine.megatron import initialize
from world import Worlds

SHARDED = ("engine=fsdp",)


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
    assert_same(once(size, *SHARDED, *overrides), once(1, "parallel=single", "data.pack=true"))


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
    started, then = ((n, config(data_cache, *o)) for n, o in (before, after))
    ran = gone_on(world, tmp_path / "checkpoints", started, then)
    assert_same(ran, once(1, "parallel=single", "data.pack=true"), since=STEPS // 2)


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
