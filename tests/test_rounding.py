"""Weights that rest in bfloat16: rounding by chance is right on average, and the same after a resume."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

from cells import meshed
from jobs import Once, config, furthest, ring, run, values
from longspan.models.gpt import GPT
from longspan.parallel.mesh import Mesh
from longspan.train.engine.states import local, total_norm
from longspan.train.job import Launch, processes
from longspan.train.rounding import Rounded, rounded, stochastic
from longspan.train.run import train
from longspan.train.trained import load_weights
from world import Worlds

SR = "memory.weights=bfloat16"


def seeded(n: int) -> torch.Generator:
    return torch.Generator().manual_seed(n)


def test_the_mean_of_many_roundings_is_the_number() -> None:
    x = torch.tensor([1.0 + 1e-3, -3.3e-3, 7.77e5, 1e-30])
    found = torch.stack([stochastic(x, seeded(i)).double() for i in range(4_000)])
    near = x.to(torch.bfloat16).double()
    assert ((found - x).abs() <= 2 * (near - x).abs().clamp_min(x.abs() * 2**-8)).all()
    assert [len(column.unique()) for column in found.T] == [2] * 4
    spread = found.std(0) / 4_000**0.5
    assert ((found.mean(0) - x.double()).abs() < 5 * spread).all()
    # the nearest is off by far more than that
    assert ((near - x).abs() > 10 * spread).sum() >= 3


def test_what_bfloat16_holds_stays() -> None:
    inf = float("inf")
    x = torch.tensor([0.0, -0.0, 1.0, -2.5, 3.3895e38, inf, -inf, float("nan"), 2**-126])
    exact = x.to(torch.bfloat16).float()
    for i in range(50):
        got = stochastic(exact, seeded(i)).float()
        assert torch.equal(got.nan_to_num(7.0), exact.nan_to_num(7.0))


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_small_updates_add_up_that_rounding_to_the_nearest_loses(kind: type[torch.optim.Optimizer]) -> None:
    weights = [nn.Parameter(torch.full((4000,), 1.0, dtype=torch.bfloat16)) for _ in range(2)]
    near = torch.optim.SGD([weights[0]], lr=2e-4)
    chance = Rounded([{"params": [weights[1]], "lr": 2e-4, "weight_decay": 0.0}], kind, 0)
    for _ in range(50):
        for p in weights:
            p.grad = torch.ones_like(p)
        near.step()
        chance.step()
    assert (weights[0] == 1.0).all()
    assert weights[1].float().mean().item() == pytest.approx(1 - 50 * 2e-4, abs=5e-4)
    assert all(x.dtype == torch.float32 for x in chance.state[weights[1]].values() if x.ndim)


def test_groups_keep_their_settings_and_weights_without_gradient_stay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).bfloat16()

    def build(model: nn.Module) -> torch.optim.Optimizer:
        decayed, plain = list(model[0].parameters()), list(model[1].parameters())  # type: ignore[index]
        return torch.optim.AdamW(
            [{"params": decayed, "weight_decay": 0.5}, {"params": plain, "lr": 0.0}], lr=0.1
        )

    before = [p.detach().clone() for p in model.parameters()]
    optimizer = rounded(build, 0)(model)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.01]
    model(torch.ones(2, 8, dtype=torch.bfloat16)).sum().backward()
    model[0].bias.grad = None
    optimizer.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)]
    assert moved == [True, False, False, False]


def shards(rank: int) -> torch.Tensor:
    """This rank's part of a weight whose parts are alike, after an update."""
    mesh = meshed(Mesh(ring=2))["ring"]
    whole = torch.ones(2, 500, dtype=torch.bfloat16)
    p = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    p.grad = distribute_tensor(whole, mesh, [Shard(0)])
    Rounded([{"params": [p], "lr": 1e-3}], torch.optim.SGD, 0).step()
    return local(p.detach())


def test_parts_of_a_weight_are_not_rounded_alike(world: Worlds) -> None:
    a, b = world(2)(shards)
    assert 0 < (a != 1).sum() < 500 and not torch.equal(a, b)


def test_norms_of_bfloat16_gradients_are_summed_in_float32() -> None:
    grads = [torch.randn(n, generator=seeded(n)).bfloat16() for n in (1000, 37)]
    exact = torch.cat([g.double() for g in grads]).norm().item()
    assert total_norm(grads) == pytest.approx(exact, rel=1e-6)


def test_a_run_is_evaluated_and_sampled(once: Once, world: Worlds, data_cache: str, tmp_path: Path) -> None:
    """Also its average, which is float32; and by models that are built without memory=."""
    words = (SR, "parallel=single", "train.steps=2", "train.ema=0.5", "eval.final=1", f"run.dir={tmp_path}")
    cfg = config(data_cache, *words)
    with processes(Launch(), "cpu", 60.0):
        assert train(cfg, Launch()) == 0
    plain = GPT(257, 32, 2, 4, 96, kv_heads=2, qk_norm=True)
    for averaged in (False, True):
        assert load_weights(tmp_path, "auto", plain, print, cfg=cfg, averaged=averaged) == 2
        assert all(p.dtype == torch.float32 for p in plain.parameters())
        low = [torch.equal(p, p.bfloat16().float()) for p in plain.parameters()]
        assert all(low) != averaged


def test_a_job_trains_as_in_float32_but_for_rounding(once: Once) -> None:
    exact, low = once(1, "parallel=single", "data.pack=true"), once(2, SR, *ring("zigzag"))
    apart = furthest(values(low[0].rows, "loss"), values(exact[0].rows, "loss"))
    assert 0 < apart < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_a_run_that_goes_on_is_the_same(world: Worlds, data_cache: str, tmp_path: Path, engine: str) -> None:
    cfg = config(data_cache, SR, f"engine={engine}", "train.steps=8", *ring())
    whole = world(2)(run, cfg, tmp_path / "whole")
    for stop in (4, None):
        ran = world(2)(run, cfg, tmp_path / "parts", stop)
    for name in ("loss", "grad_norm"):
        assert values(ran[0].rows, name).equal(values(whole[0].rows[4:], name))
