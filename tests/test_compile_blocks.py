"""Blocks by torch.compile: losses and gradients of eager ones in every layout, one graph for all blocks, and
what is refused.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch._dynamo.utils import counters

from jobs import Once, Ran, assert_same_tokens, config, furthest, ring, run, values
from longspan.kernels.mask import Mask
from longspan.models.gpt import GPT
from longspan.parallel.placement import contiguous
from longspan.parallel.single import Single
from longspan.train.batch import bind
from longspan.train.compiled import check, compile_blocks
from longspan.train.config import made
from test_oracles import needs
from world import Worlds

STEPS = 4
# dynamo asks inputs for gradients behind a filter that pytest's own replaces; inductor imports torch.jit
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore:.torch.jit.script")
DEEPSPEED = [
    needs("deepspeed", "deepspeed"),
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch", "ignore:.*:DeprecationWarning:torch"),
]


def stepped(model: GPT, length: int) -> tuple[Tensor, list[Tensor]]:
    """A loss of some tokens, and all gradients."""
    tokens = torch.arange(2 * length).view(2, length) % 11
    attend = bind(Single(), contiguous(length, 1))
    loss = model(tokens, torch.arange(length), attend, offsets=((0, 5), (0, 9))).square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return loss.detach(), grads


def test_blocks_share_what_was_compiled_and_no_step_compiles_again() -> None:
    torch.manual_seed(0)
    model = GPT(11, 16, 3, 4, 32, kv_heads=2, qk_norm=True)
    want = stepped(model, 12)
    torch._dynamo.reset()
    counters.clear()
    compile_blocks(model, "eager")
    for _ in range(2):
        loss, grads = stepped(model, 12)
        torch.testing.assert_close(loss, want[0])
        torch.testing.assert_close(grads, want[1])
    # norm and projections, up to attention; its output; the MLP
    assert counters["stats"]["unique_graphs"] == counters["frames"]["ok"] == 4


def test_attention_is_called_as_it_is_between_graphs() -> None:
    model, calls = GPT(11, 16, 2, 4, 32, qk_norm=True), list[bool]()

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        calls.append(torch.compiler.is_compiling())
        return v

    torch._dynamo.reset()
    compile_blocks(model, "eager")
    model(torch.zeros(1, 6, dtype=torch.int64), torch.arange(6), attend)
    assert calls == [False, False]


@pytest.mark.parametrize(
    ("overrides", "tp", "message"),
    [
        (("engine=deepspeed", "engine.stage=3"), 1, "engine.stage=3 gathers weights inside of blocks: take"),
        (("engine=fsdp",), 2, "with parallel.mesh.tp=2 ranks trade tokens in blocks: set tp=1"),
        (("memory=long",), 1, "memory.mlp_tile=32768 walks a graph of its own .* set memory.mlp_tile=0"),
        (("memory.head_chunks=2",), 1, "memory.head_chunks=2 walks .* set memory.head_chunks=1"),
    ],
)
def test_what_cannot_be_compiled_is_refused(overrides: tuple[str, ...], tp: int, message: str) -> None:
    cfg = config(*overrides)
    mesh = {"tp": SimpleNamespace(size=lambda: tp)}
    with pytest.raises(ValueError, match=f"train.compile is true; {message}"):
        check(cfg, made(cfg.engine), mesh)  # type: ignore[arg-type]


def compiled(rank: int, cfg: DictConfig, folder: Path) -> Ran:
    """The run, with blocks that were compiled for it."""
    torch._dynamo.reset()
    counters.clear()
    # DeepSpeed asks for it
    os.environ["LOCAL_RANK"] = str(rank)
    ran = run(rank, cfg, folder)
    assert counters["stats"]["unique_graphs"] >= 4 and not counters["unimplemented"]
    return ran


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, ("parallel=single", "data.pack=true")),
        (1, ("parallel=single", "data.pack=true", "train.precision=bfloat16")),
        (2, ring("striped", "memory.recompute=block", "memory.offload=true")),
        (2, ring("zigzag", "engine=fsdp", "memory.recompute=keep_attention")),
        (2, ("parallel=gather", "memory.recompute=block", "memory.every=2")),
        pytest.param(2, ("parallel=ulysses", "engine=deepspeed", "engine.stage=2"), marks=DEEPSPEED),
        (2, ("parallel=ulysses", "engine=fsdp_bf16")),
        (2, ("parallel=s2", "mask=s2", "engine=fsdp")),
        (2, ("parallel=star", "mask=star")),
        (4, ("parallel=usp",)),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, tuple) else str(x),
)
@pytest.mark.slow
def test_a_run_with_compiled_blocks_is_the_same_run(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, size: int, overrides: tuple[str, ...],
) -> None:  # fmt: skip
    few = (*overrides, f"train.steps={STEPS}")
    # the engine may not matter to what is compared
    want = once(size, *(word for word in few if not word.startswith("engine") or "bf16" in word))
    got = world(size)(compiled, config(data_cache, *few, "train.compile=true"), tmp_path, timeout=600.0)
    exact = not any("bf" in word for word in overrides)
    for name in ("loss", "grad_norm"):
        off = furthest(values(got[0].rows, name), values(want[0].rows, name))
        assert off < (1e-5 if exact else 1e-2), name
    if exact:
        for ran, eager in zip(got, want, strict=True):
            assert_same_tokens(ran.losses, eager.losses)
