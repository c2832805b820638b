"""engine=megatron: trains as one process does, and goes on where other engines stopped."""

from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch.distributed.tensor import DTensor

from jobs import S2, Once, assert_same, config, gone_on, joined, launch_of, quiet, ring, run
from longspan.models.gpt import GPT
from longspan.models.memory import Memory
from longspan.train.engine.megatron import refuse
from longspan.train.engine.megatron_parts import Attending
from longspan.train.job import build
from longspan.train.meter import parameter_counts
from test_oracles import needs
from world import Worlds

pytestmark = needs("megatron", "megatron-core")
TEN = "train.steps=10"
ONE = ("parallel=single", "data.pack=true")
TP = "parallel.mesh.tp=2"
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "layout", "model"),
    [
        (2, ring("zigzag"), ()),
        (2, ("parallel=single", TP), ()),
        pytest.param(2, ("parallel=ulysses",), ("model.bias=qkv", "model.predecessor=true"), marks=SLOW),
        pytest.param(4, ("parallel=usp",), ("model.qk_norm=false",), marks=SLOW),
        pytest.param(4, (*ring("zigzag"), TP), ("model.bias=qkv", "model.predecessor=true"), marks=SLOW),
        pytest.param(4, (*ring("zigzag"), TP, *S2), (), marks=SLOW),
        pytest.param(4, ("parallel=s2", TP, *S2), ("model.tied=false",), marks=SLOW),
        pytest.param(
            4,
            (*ring(), TP, "parallel.mesh.dp=2", "train.micro_batch=1", "train.accumulate=1"),
            (),
            marks=SLOW,
        ),
        pytest.param(2, (*ring(), "train.micro_batch=1", "train.accumulate=2"), (), marks=SLOW),
    ],
    ids=lambda x: "-".join(x).replace("parallel", "") if isinstance(x, tuple) else str(x),
)
def test_megatron_trains_as_one_process(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, size: int, layout: tuple[str, ...],
    model: tuple[str, ...],
) -> None:  # fmt: skip
    cfg = config(data_cache, "engine=megatron", TEN, *layout, *model)
    same = [x for x in (*layout, *model) if x.split("=")[0].startswith(("mask", "model", "data"))]
    one = ("parallel=single", TEN, *same) if "data.pack=false" in same else (*ONE, TEN, *same)
    assert_same(world(size)(run, cfg, tmp_path / "checkpoints"), once(1, *one))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, ("engine=megatron", "parallel=single", TP)), (1, ("engine=ddp", "parallel=single"))),
        pytest.param(
            (4, ("engine=megatron", *ring(), TP)), (2, ("engine=megatron", "parallel=ulysses")), marks=SLOW
        ),
    ],
)
def test_a_checkpoint_goes_on_under_another_engine(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path,
    before: tuple[int, tuple[str, ...]], after: tuple[int, tuple[str, ...]],
) -> None:  # fmt: skip
    started, then = ((n, config(data_cache, TEN, *o)) for n, o in (before, after))
    ran = gone_on(world, tmp_path / "checkpoints", started, then)
    assert_same(ran, once(1, *ONE, TEN), since=5)


def counted(rank: int, cfg: DictConfig) -> tuple[tuple[int, int], set[str], int, dict[str, tuple[int, ...]]]:
    """Parameters, kinds of attention in the layers, parameters held here, and shapes in a checkpoint."""
    with quiet(cfg), joined(rank) as device:
        model = (job := build(cfg, launch_of(rank), device)).model
        cores = {type(b.layer.self_attention).__module__ for b in model.blocks}
        cores |= {type(b.layer.self_attention.core_attention).__name__ for b in model.blocks}
        held = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
        state = job.engine.save()["model"]
        assert all(isinstance(x, DTensor | torch.Tensor) for x in state.values())
        return parameter_counts(model), cores, held, {name: tuple(x.shape) for name, x in state.items()}


def test_the_layers_are_megatrons_and_each_rank_holds_a_part(world: Worlds, data_cache: str) -> None:
    cfg = config(data_cache, "engine=megatron", "parallel=single", TP)
    plain = GPT(257, 32, 2, 4, 96, kv_heads=2, qk_norm=True)
    for counts, cores, held, shapes in world(2)(counted, cfg):
        assert counts == parameter_counts(plain)
        assert cores == {"megatron.core.transformer.attention", Attending.__name__}
        assert held < 0.52 * counts[0]
        assert shapes == {name: tuple(x.shape) for name, x in plain.state_dict().items()}


def test_what_megatron_cannot_be_is_refused() -> None:
    sizes = (8, 8, 1, 2, 8)
    changed = GPT(*sizes)
    Memory(recompute="block").apply(changed)
    for model, tp, message in (
        (GPT(*sizes, bias="qkvo"), 1, "model.bias is qkvo; with engine=megatron it can be none or qkv"),
        (changed, 1, "memory changes blocks.0, which engine=megatron replaces: set memory=none"),
        (GPT(*sizes), 4, "parallel.mesh.tp is 4, and model.heads 2: tp must divide it; 1, 2 would do"),
    ):
        with pytest.raises(ValueError, match=message):
            refuse(model, tp)
    both = GPT(*sizes, predecessor=True)
    refuse(both, 1)
    with pytest.raises(ValueError, match="engine.native is true, and model.predecessor, .* one of them to f"):
        refuse(both, 1, native=True)
