"""The average of weights: its formula, its precision, sharded weights, saving, and a loan to the model."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cells import meshed
from longspan.parallel.mesh import Mesh
from longspan.train.ema import EMA
from world import Worlds


def model(dtype: torch.dtype = torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(5, 3, dtype=dtype)


def walk(net: nn.Module, step: int) -> None:
    """The next weights, the same for sharded and whole ones."""
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.mul_(0.9).add_(0.1 * math.sin(3 * step + i))


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_its_formula(warmup: bool) -> None:
    net = model()
    ema = EMA(net, decay=0.7, warmup=warmup)
    want = net.weight.detach().double().clone()
    for step in range(30):
        walk(net, step)
        d = min(0.7, (1 + step) / (10 + step)) if warmup else 0.7
        assert ema.rate() == pytest.approx(d)
        want = d * want + (1 - d) * net.weight.detach().double()
        ema.update(net)
    assert torch.allclose(ema.weights["weight"].double(), want, atol=1e-6)
    assert ema.rate() == 0.7 and ema.updates == 30


def test_sixteen_bit_weights_have_a_float32_average() -> None:
    net = model(torch.bfloat16)
    ema = EMA(net, decay=0.999, warmup=False)
    before = ema.weights["weight"].clone()
    with torch.no_grad():
        net.weight.add_(0.5)
    for _ in range(3):
        ema.update(net)
    # in bfloat16 a share of 1 / 1000 would be lost
    want = before + (1 - 0.999**3) * (net.weight.detach().float() - before)
    assert ema.weights["weight"].dtype == torch.float32
    assert torch.allclose(ema.weights["weight"], want, atol=1e-6)
    assert EMA(model(torch.float64)).weights["weight"].dtype == torch.float64


def test_the_model_gets_its_own_weights_back() -> None:
    net = model()
    ema = EMA(net, decay=0.5)
    walk(net, 0)
    ema.update(net)
    own = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(KeyError), ema.applied(net):
        assert torch.equal(net.weight, ema.weights["weight"])
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), own, strict=True))
    assert not torch.equal(net.weight, ema.weights["weight"])


def test_it_goes_on_where_it_was_saved() -> None:
    net = model()
    ema = EMA(net, decay=0.9)
    for step in range(5):
        walk(net, step)
        ema.update(net)
    saved = {"weights": {k: v.clone() for k, v in ema.state()["weights"].items()}, "updates": torch.tensor(5)}
    again = EMA(nn.Linear(5, 3), decay=0.9)
    again.load(saved)
    for e in (ema, again):
        e.update(net)
    assert again.updates == 6 and again.rate() == ema.rate()
    assert all(torch.equal(again.weights[k], v) for k, v in ema.weights.items())
    with pytest.raises(ValueError, match="of another model: bias"):
        EMA(nn.Linear(5, 3, bias=False)).load(saved)
    with pytest.raises(ValueError, match=r"ema.decay is 1.0"):
        EMA(net, decay=1.0)


def sharded(rank: int, size: int) -> dict[str, Tensor]:
    """The average of sharded weights after a few steps, a save into a new one, and a loan, gathered."""
    mesh = meshed(Mesh(ring=size))["ring"]

    def cut(net: nn.Linear) -> nn.Linear:
        for name, p in list(net.named_parameters()):
            setattr(net, name, nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])))
        return net

    net = cut(model())
    ema = EMA(net, decay=0.8)
    for step in range(4):
        walk(net, step)
        ema.update(net)
    again = EMA(cut(nn.Linear(5, 3)), decay=0.8)
    again.load(ema.state())
    with again.applied(net):
        lent = net.weight.detach()
        assert isinstance(lent, DTensor)
        lent = lent.full_tensor().clone()
    weights = {k: v.full_tensor() for k, v in again.weights.items() if isinstance(v, DTensor)}
    return weights | {"lent": lent}


def test_sharded_weights_have_the_same_average(world: Worlds) -> None:
    net = model()
    ema = EMA(net, decay=0.8)
    for step in range(4):
        walk(net, step)
        ema.update(net)
    # three rows over two ranks: shards of different sizes
    for found in world(2)(sharded, 2):
        assert found.keys() == {"weight", "bias", "lent"}
        assert torch.equal(found["weight"], ema.weights["weight"])
        assert torch.equal(found["bias"], ema.weights["bias"])
        assert torch.equal(found["lent"], ema.weights["weight"])
