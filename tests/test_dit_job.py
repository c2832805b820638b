"""Diffusion jobs from their configs: the same on every layout, resumed and sampled on other ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from cells import difference
from clip_jobs import STEPS, Trained, config, trained
from jobs import furthest, values
from world import RankFailed, Worlds

pytest.importorskip("sklearn", reason="the digits need the extra images")


@pytest.fixture(scope="module")
def alone(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return world(1)(trained, config("parallel=single"), tmp_path_factory.mktemp("alone"))[0]


@pytest.fixture(scope="module")
def exact(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    cfg, folder = config("parallel=single"), tmp_path_factory.mktemp("exact")
    return world(1)(trained, cfg, folder, None, torch.float64)[0]


WINDOW = ("mask=neighborhood", "mask.grid=[5,4,8]", "mask.window=[3,3,5]", "mask.stride=1")


def assert_exact(ran: list[Trained], exact: Trained) -> None:
    """Losses, norms of gradients before they are clipped, the average of the weights, held-out losses and
    samples, in float64.
    """
    assert values(exact.rows, "grad_norm").min() > config().train.clip
    for found in ran:
        for name in ("loss", "grad_norm"):
            assert furthest(values(found.rows, name), values(exact.rows, name)) < 1e-10, name
        assert found.average.keys() == exact.average.keys()
        for name, want in exact.average.items():
            assert want.dtype == torch.float64 and difference(found.average[name], want) < 1e-10, name
        assert found.evals == pytest.approx(exact.evals, rel=1e-10)
        assert np.abs(found.clips - exact.clips).max() < 1e-6


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (2, ("parallel=ring", "parallel.layout.placement=zigzag")),
        (3, ("parallel=ulysses",)),
        pytest.param(4, ("parallel=usp",), marks=SLOW),
        pytest.param(3, ("parallel=s2",), marks=SLOW),
        (2, ("parallel=single", "train.micro_batch=2")),
        (2, ("parallel=ring", "engine=fsdp")),
        pytest.param(2, ("parallel=single", "train.micro_batch=2", "engine=fsdp"), marks=SLOW),
    ],
    ids=["ring", "ulysses 3", "usp 4", "s2 3", "dp", "fsdp", "fsdp over dp"],
)
def test_a_diffusion_job_is_the_same_on_other_ranks(
    world: Worlds, exact: Trained, tmp_path: Path, size: int,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    assert_exact(world(size)(trained, config(*overrides), tmp_path, None, torch.float64), exact)


@pytest.fixture(scope="module")
def near(world: Worlds, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    cfg, folder = config("parallel=single", *WINDOW), tmp_path_factory.mktemp("near")
    return world(1)(trained, cfg, folder, None, torch.float64)[0]


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (2, "s2"),
        *(pytest.param(n, x, marks=SLOW) for n, x in ((3, "ring"), (3, "s2"), (4, "ulysses"), (4, "usp"))),
    ],
)
def test_a_window_on_ranks_is_the_window_on_one(
    world: Worlds, near: Trained, exact: Trained, tmp_path: Path, size: int, layout: str
) -> None:
    assert_exact(
        world(size)(trained, config(f"parallel={layout}", *WINDOW), tmp_path, None, torch.float64), near
    )
    assert furthest(values(near.rows, "loss"), values(exact.rows, "loss")) > 1e-9


def test_a_run_goes_on_and_is_sampled_on_other_ranks(world: Worlds, alone: Trained, tmp_path: Path) -> None:
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
    rows, evals, clips, _ = world(1)(trained, cfg, tmp_path)[0]
    assert len(rows) == STEPS and len(evals) == 1 and clips.shape == (6, 1, 1, 8, 8)
    assert torch.isfinite(values(rows, "loss")).all() and not dist.is_initialized()
