"""The optimizer: the learning rate of each step, which parameters decay, and what is refused."""

from functools import partial
from math import cos, pi
from typing import Any

import pytest
import torch
from torch import nn

from longspan.models.gpt import GPT
from longspan.train.optim import Optim

AdamW = partial(torch.optim.AdamW, betas=(0.9, 0.95))


def rates(steps: int, **settings: Any) -> list[float]:
    optim = Optim(AdamW, 1.0, **settings)
    return [optim.lr_at(step, steps) for step in range(steps)]


def test_cosine_rises_over_the_warm_up_and_falls_to_the_floor() -> None:
    found = rates(25, schedule="cosine", warmup=4, floor=0.2)
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert found[4] == 1.0
    # half way between the end of the warm-up and the end of training
    assert Optim(AdamW, 1.0, warmup=4, floor=0.2).lr_at(14, 24) == pytest.approx(0.6, abs=1e-15)
    assert found[-1] == pytest.approx(0.2 + 0.8 * (1 + cos(pi * 20 / 21)) / 2, abs=1e-15)
    assert Optim(AdamW, 1.0, floor=0.2).lr_at(25, 25) == pytest.approx(0.2, abs=1e-15)
    assert all(a > b for a, b in zip(found[4:], found[5:], strict=False))


def test_wsd_stays_and_falls_in_a_line_at_the_end() -> None:
    found = rates(20, schedule="wsd", warmup=2, decay=5, floor=0.0)
    assert found == pytest.approx([0.5, 1.0] + [1.0] * 14 + [0.8, 0.6, 0.4, 0.2], abs=1e-15)
    floored = rates(20, schedule="wsd", decay=4, floor=0.5)
    assert floored == pytest.approx([1.0] * 17 + [0.875, 0.75, 0.625], abs=1e-15)
    # no decay: as constant
    assert rates(9, schedule="wsd", warmup=3) == rates(9, schedule="constant", warmup=3)


def test_constant_stays_whatever_the_number_of_steps() -> None:
    assert rates(6, schedule="constant", warmup=3, floor=0.0) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1])
    assert rates(3, schedule="constant") == [1.0] * 3


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_a_warm_up_longer_than_the_run_only_rises(schedule: str) -> None:
    found = rates(5, schedule=schedule, warmup=10, decay=2)
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("tied", [True, False])
def test_only_matrices_that_are_no_embedding_decay(tied: bool) -> None:
    model = GPT(11, 8, 2, 2, 12, kv_heads=1, tied=tied, qk_norm=True, predecessor=True)
    names = {id(p): name for name, p in model.named_parameters()}
    optimizer = Optim(AdamW, 0.5, weight_decay=0.3).build(model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [g["lr"] for g in optimizer.param_groups] == [0.5, 0.5]
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in optimizer.param_groups)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.3, 0.0]
    layers = ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"]
    matrices = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}
    assert decayed == matrices | {"mix.weight"} | (set() if tied else {"head.weight"})
    assert decayed | plain == set(names.values()) and not decayed & plain
    assert {"embed.weight", "norm.weight", "blocks.0.attention.q_norm.weight"} <= plain


def test_the_decay_falls_on_its_group_alone() -> None:
    matrix, table = nn.Linear(3, 3), nn.Embedding(4, 3)
    model = nn.Sequential(matrix, table)
    for p in model.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    Optim(AdamW, 0.1, weight_decay=0.5).build(model).step()
    assert matrix.weight.flatten().tolist() == pytest.approx([0.95] * 9)
    assert matrix.bias.tolist() == [1.0] * 3
    assert table.weight.flatten().tolist() == [1.0] * 12


def test_a_model_without_matrices_has_one_group() -> None:
    assert len(Optim(AdamW, 0.1).build(nn.LayerNorm(3)).param_groups) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "optim.schedule is 'cosin'; it can be cosine, wsd or constant"),
        ({"lr": 0.0}, "optim.lr is 0.0, optim.weight_decay 0.1; lr > 0"),
        ({"lr": float("nan")}, "optim.lr is nan"),
        ({"weight_decay": -1.0}, "optim.weight_decay -1.0; lr > 0, weight_decay >= 0"),
        ({"warmup": -1}, "optim.warmup -1 and optim.decay 0 must be at least 0"),
        ({"decay": -2}, "optim.decay -2 must be at least 0"),
        ({"floor": 1.5}, "optim.floor 1.5 from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="optim") as caught:
        Optim(**{"optimizer": AdamW, "lr": 0.1, **settings})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"betas": (2.0, 0.9)}, "Invalid beta parameter at index 0"), ({"beta": 0.9}, "unexpected keyword")],
)
def test_what_the_optimizer_refuses_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=f"optim.optimizer cannot be built: .*{said}"):
        Optim(partial(torch.optim.AdamW, **settings), 0.1).build(nn.Linear(2, 2))
