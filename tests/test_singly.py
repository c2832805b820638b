"""State of an optimizer in host memory: the same updates, and checkpoints that know nothing of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from jobs import EXACT, config, gone_on, refusal, ring, run, values
from longspan.train.singly import Singly, singly
from test_oracles import needs
from world import Worlds

HOST = "memory.optimizer=host"


def trained(optimizer: torch.optim.Optimizer, net: nn.Module) -> list[Tensor]:
    """The weights after three updates, in the second of which one has no gradient."""
    for step in range(3):
        for i, p in enumerate(net.parameters()):
            p.grad = None if (step, i) == (1, 0) else torch.full_like(p, 0.1 * step + i)
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.Adafactor])
def test_updates_are_those_of_the_plain_optimizer(kind: Callable[..., torch.optim.Optimizer]) -> None:
    found, states = [], []
    for wrap in (lambda x: x, singly):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
        optimizer = wrap(lambda m: kind([{"params": m.parameters(), "weight_decay": 0.1}], lr=0.2))(net)
        found.append(trained(optimizer, net))
        states.append([optimizer.state[p] for p in net.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    for a, b in zip(*states, strict=True):
        assert a.keys() == b.keys()


def test_a_state_that_is_loaded_stays_as_it_is() -> None:
    net = nn.Linear(5, 4)
    optimizer = Singly([{"params": [*net.parameters()], "lr": 0.1}], torch.optim.AdamW, host=True)
    trained(optimizer, net)
    kept = optimizer.state_dict()
    again = Singly([{"params": [*net.bfloat16().parameters()], "lr": 0.1}], torch.optim.AdamW, host=True)
    again.load_state_dict(kept)
    for p in net.parameters():
        state = again.state[p]
        assert state["exp_avg"].dtype == torch.float32
        assert int(state["step"]) == 3 - (p is net.weight)


def test_the_state_of_a_weight_on_a_gpu_rests_on_the_cpu() -> None:
    """With tensors that have devices and no data."""
    with FakeTensorMode():
        weight = nn.Parameter(torch.ones(3, 4, device="cuda"))
        optimizer = Singly([{"params": [weight], "lr": 0.1}], torch.optim.AdamW, host=True)
        for _ in range(2):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            assert {x.device.type for x in optimizer.state[weight].values()} == {"cpu"}
        assert weight.is_cuda


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    ["ddp", pytest.param("megatron", marks=needs("megatron", "megatron-core"))],
)
def test_a_job_trains_and_goes_on_as_without(
    world: Worlds, data_cache: str, tmp_path: Path, engine: str
) -> None:
    plain, host = (
        config(data_cache, "train.steps=6", f"engine={engine}", *ring(), *words) for words in ((), (HOST,))
    )
    want = world(2)(run, plain, tmp_path / "plain")
    for i, (before, after) in enumerate(((host, plain), (plain, host))):
        ran = gone_on(world, tmp_path / str(i), (2, before), (2, after))
        assert values(ran[0].rows, *EXACT).equal(values(want[0].rows[3:], *EXACT))


@pytest.mark.parametrize("engine", ["fsdp", pytest.param("deepspeed", marks=needs("deepspeed", "deepspeed"))])
@pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch", "ignore:.*:DeprecationWarning:torch")
def test_engines_with_an_offload_of_their_own_name_it(world: Worlds, data_cache: str, engine: str) -> None:
    said = f"memory.optimizer is host; with engine={engine} set engine.offload=true instead"
    cfg = config(data_cache, HOST, f"engine={engine}", "parallel=single")
    assert world(1)(refusal, cfg) == [[said]]
