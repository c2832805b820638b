"""float8 linear layers: near the plain ones, the same weights and names, and refused where they cannot be."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

import jobs
from diffusion import Case, beside, dense, given, made
from longspan.kernels.mask import Causal
from longspan.models.gpt import GPT
from longspan.models.memory import Memory, Recipe
from longspan.parallel.placement import contiguous
from longspan.parallel.single import Single
from longspan.train import float8
from longspan.train.batch import bind
from longspan.train.compiled import compile_blocks
from longspan.train.engine.ddp import DDP
from longspan.train.engine.deepspeed import DeepSpeed
from longspan.train.engine.fsdp import FSDP
from longspan.train.engine.megatron import Megatron
from longspan.train.engine.protocol import Engine
from world import Worlds

TOKENS, VOCAB = 40, 61
SLOW = pytest.mark.slow


def small(**settings: Any) -> GPT:
    torch.manual_seed(0)
    return GPT(VOCAB, 32, 2, 4, 48, **{"kv_heads": 2, "qk_norm": True, "init_std": 0.2, **settings})


def trained(model: GPT, steps: int = 1) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of so many steps on the same tokens, and the last gradients by name."""
    ids = torch.randint(VOCAB, (2, TOKENS + 1), generator=torch.Generator().manual_seed(1))
    attend, losses = bind(Single(), contiguous(TOKENS, 1)), list[float]()
    for _ in range(steps):
        model.zero_grad()
        x = model.head(model(ids[:, :-1], torch.arange(TOKENS), attend))
        loss = nn.functional.cross_entropy(x.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        losses.append(float(loss.detach()))
        for p in model.parameters():
            p.data -= 0.03 * p.grad  # type: ignore[operator]
    return losses, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@SLOW
@pytest.mark.parametrize("recipe", [True, "rowwise", "rowwise_with_gw_hp"])
def test_losses_and_gradients_are_near_the_plain_ones(recipe: Any) -> None:
    pytest.importorskip("torchao")
    plain, model = small(bias="qkv"), small(bias="qkv")
    names, weights = list(model.state_dict()), list(model.parameters())
    float8.convert(model, recipe, emulate=True)
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), weights, strict=True))
    kinds = {name for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    parts = [f"attention.{part}" for part in "qkvo"] + [f"mlp.{part}" for part in ("gate", "up", "down")]
    assert kinds == {f"blocks.{i}.{part}" for i in range(2) for part in parts}
    losses, _ = trained(model, 8)
    want, _ = trained(plain, 8)
    assert losses[-1] < 0.9 * losses[0] and losses != want
    assert losses == pytest.approx(want, rel=2e-2)
    # of two layers of random weights, where errors add up
    _, exact = trained(small(bias="qkv"))
    again = small(bias="qkv")
    float8.convert(again, recipe, emulate=True)
    _, near = trained(again)
    assert near.keys() == exact.keys()
    a, b = (torch.cat([grads[name].flatten() for name in exact]) for grads in (near, exact))
    assert torch.cosine_similarity(a, b, 0) > 0.94
    # a checkpoint of one is one of the other
    other = small(bias="qkv")
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(*both) for both in zip(other.parameters(), model.parameters(), strict=True))


@SLOW
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_blocks_multiply_in_float8_too() -> None:
    pytest.importorskip("torchao")
    models = [small(), small()]
    for model in models:
        float8.convert(model, "tensorwise", emulate=True)
    torch._dynamo.reset()
    compile_blocks(models[1], "aot_eager")
    (want, exact), (got, grads) = map(trained, models)
    assert got == pytest.approx(want, rel=1e-5)
    assert all((grads[name] - exact[name]).norm() <= 2e-2 * exact[name].norm() for name in exact)


class One(nn.Module):
    """A model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 48)
        self.blocks = nn.ModuleList([self.layer])


@SLOW
@pytest.mark.parametrize(
    ("recipe", "errors"),
    [
        # 3 bits of mantissa round by 2.6 % on average, in both factors; 2 bits by twice as much
        ("tensorwise", (0.045, 0.075, 0.075)),
        ("rowwise", (0.045, 0.045, 0.045)),
        ("rowwise_with_gw_hp", (0.045, 0.045, 1e-6)),
    ],
)
def test_a_layer_is_off_by_what_rounding_explains(recipe: Recipe, errors: Sequence[float]) -> None:
    """The result, the gradient of the input, that of the weight. The tokens are no multiple of 16."""
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    x, dy, found = torch.randn(37, 64), torch.randn(37, 48), []
    plain, model = One(), One()
    model.load_state_dict(plain.state_dict())
    float8.convert(model, recipe, emulate=True)
    for layer in (plain.blocks[0], model.blocks[0]):
        y = layer(given_x := x.clone().requires_grad_())
        y.backward(dy)
        found.append((y.detach(), given_x.grad, layer.get_parameter("weight").grad))
    for want, got, most in zip(*found, errors, strict=True):
        assert want is not None and got is not None
        assert (got - want).norm() <= most * want.norm()


@SLOW
def test_recomputed_blocks_have_the_same_gradients_and_no_token_is_served() -> None:
    pytest.importorskip("torchao")
    models = [small(), small()]
    for model in models:
        float8.convert(model, "tensorwise", emulate=True)
    Memory(recompute="block").apply(models[1])
    (_, a), (_, b) = map(trained, models)
    assert all(torch.equal(a[name], b[name]) for name in a)
    empty = torch.zeros(1, 0, 32, requires_grad=True)
    y = models[0].blocks[0].get_submodule("mlp.gate")(empty)
    y.sum().backward()
    assert y.shape == (1, 0, 48) and all(p.grad.isfinite().all() for p in models[0].parameters())  # type: ignore[union-attr]


@SLOW
@pytest.mark.parametrize("kind", ["dit", "mmdit", "vdit"])
def test_what_modulates_a_diffusion_model_stays_plain(kind: str) -> None:
    pytest.importorskip("torchao")
    case, found = Case(kind, "", (3, 4)), []
    for recipe in (None, "tensorwise"):
        model = made(case).float()
        sizes = {
            m.in_features % 16 or m.out_features % 16 for m in model.blocks.modules() if type(m) is nn.Linear
        }
        if sizes != {0}:
            pytest.skip(f"layers of {kind} have other sizes")
        if recipe:
            float8.convert(model, recipe, emulate=True)
            left = [n for n, m in model.blocks.named_modules() if type(m) is nn.Linear]
            assert all("adaLN" in name for name in left)
        x = given(case, model)
        found.append(model(x["tokens"], torch.arange(12), x["t"], x["y"], dense, **beside(case, x)))
    assert 0 < (found[0] - found[1]).norm() <= 0.1 * found[0].norm()


def emulated(rank: int, cfg: Any, folder: Path, stop: int | None = None) -> jobs.Ran:
    """A run that multiplies rounded numbers on the CPU."""
    with (
        patch.object(float8, "check", lambda *_: None),
        patch.object(float8, "convert", partial(float8.convert, emulate=True)),
    ):
        return jobs.run(rank, cfg, folder, stop)


@SLOW
def test_engines_agree_and_checkpoints_go_both_ways(world: Worlds, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    words = ("data.context=64", "memory.float8=true")
    said = world(1)(jobs.refusal, jobs.config(*words, "train.precision=bfloat16"))
    assert "it needs a GPU of compute capability 8.9 or newer, and device is cpu: set" in str(said)
    plain = world(1)(jobs.run, jobs.config(*words[:1], "parallel=single"), tmp_path / "plain")
    want = jobs.values(plain[0].rows, "loss")
    for engine in ("ddp", "fsdp"):
        cfg, folder = jobs.config(*words, f"engine={engine}", *jobs.ring()), tmp_path / engine
        world(2)(emulated, cfg, folder, jobs.STEPS // 2)
        back = world(1)(jobs.run, jobs.config(*words[:1], "parallel=single"), folder)
        got = jobs.values(back[0].rows, "loss")
        assert 0 < jobs.furthest(got, want[jobs.STEPS // 2 :]) < 2e-2
    # and into float8
    world(2)(jobs.run, jobs.config(*words[:1], *jobs.ring()), tmp_path / "into", jobs.STEPS // 2)
    ran = world(2)(emulated, jobs.config(*words, "engine=fsdp", *jobs.ring()), tmp_path / "into")
    assert jobs.furthest(jobs.values(ran[0].rows, "loss"), want[jobs.STEPS // 2 :]) < 2e-2


@pytest.mark.parametrize(
    ("engine", "tp", "settings", "message"),
    [
        (DDP(), 1, {}, "memory.float8 is True; it needs a GPU of .* 8.9 or newer, and A100 has 8.0: set"),
        (DDP(), 1, {"train": {"precision": "float32"}}, "bfloat16, and train.precision is float32: set"),
        (DeepSpeed(), 1, {}, "DeepSpeed runs layers of its own: take engine=ddp or fsdp"),
        (Megatron(), 1, {}, "Megatron runs layers of its own: take engine=ddp or fsdp"),
        (FSDP(), 1, {"lora": {"rank": 4}}, "lora.rank=4 adds to plain layers: set lora.rank=0"),
        (FSDP(), 2, {}, "parallel.mesh.tp=2 splits plain layers: set parallel.mesh.tp=1"),
    ],
)
def test_a_job_that_cannot_is_refused(
    engine: Engine, tp: int, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = {"memory": {"float8": True}, "train": {"precision": "bfloat16"}, "lora": {"rank": 0}}
    mesh: Any = {"tp": SimpleNamespace(size=lambda: tp)}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    with pytest.raises(ValueError, match=message):
        float8.check(OmegaConf.create(fine | settings), engine, mesh, torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    one: Any = {"tp": SimpleNamespace(size=lambda: 1)}
    for other in (DDP(), FSDP()):
        float8.check(OmegaConf.create(fine), other, one, torch.device("cuda"))


def test_what_cannot_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="memory.float8 is 'int8'; it can be false, true, tensorwise"):
        Memory(float8="int8")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="memory.float8 is True; memory.head_chunks=2 takes a few rows"):
        Memory(float8=True, head_chunks=2)
    assert Memory(float8=True).apply(small(mask=Causal())) is None
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ModuleNotFoundError, match=r"float8=True needs .* pip install longspan\[float8\]"):
        float8.convert(small(), True)


@SLOW
def test_sizes_that_tensor_cores_do_not_have_are_refused() -> None:
    pytest.importorskip("torchao")
    model = GPT(VOCAB, 40, 1, 4, 48)
    with pytest.raises(ValueError, match=r"blocks.0.attention.q.weight is \[40, 40\], and 16"):
        float8.convert(model, True, emulate=True)
