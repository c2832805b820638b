"""LoRA: what learns and what does not, adapters merged, and over a ring."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jobs
from longspan.models.gpt import GPT
from longspan.models.lora import Lora, LoraLinear, merged_weights
from longspan.parallel.placement import contiguous
from longspan.parallel.single import Single
from longspan.train.batch import bind
from longspan.train.optim import Optim
from world import Worlds

LENGTH, VOCAB = 20, 61


def logits(model: GPT) -> Tensor:
    """[2, LENGTH, VOCAB]."""
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    attend = bind(Single(), contiguous(LENGTH, 1))
    out: Tensor = model.head(model(ids, torch.arange(LENGTH), attend))
    return out


def adapted(**settings: Any) -> GPT:
    torch.manual_seed(3)
    model = GPT(VOCAB, 32, 2, 4, 48, kv_heads=2, bias="qkvo", tied=False, init_std=0.2)
    Lora(**{"rank": 3, **settings}).apply(model.double())
    return model


def test_merged_weights_do_what_adapters_do() -> None:
    model = adapted()
    plain = GPT(VOCAB, 32, 2, 4, 48, kv_heads=2, bias="qkvo", tied=False)
    plain.double().load_state_dict(merged_weights(model))
    # as long as b is zero
    assert torch.equal(logits(plain), logits(model))
    for module in model.modules():
        if isinstance(module, LoraLinear):
            nn.init.normal_(module.b, std=0.2)
    before = logits(plain).detach()
    plain.load_state_dict(merged_weights(model))
    assert (logits(model) - before).abs().max() > 0.1
    assert (logits(plain) - logits(model)).abs().max() < 1e-12


def test_only_what_learns_reaches_the_optimizer() -> None:
    model = adapted(norms=False)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    parts = {f"blocks.{i}.attention.{part}.{x}" for i in range(2) for part in "qkvo" for x in "ab"}
    assert names == parts | {"embed.weight"}
    optimizer = Optim(torch.optim.AdamW, lr=0.1).build(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    frozen = {name: p.clone() for name, p in model.named_parameters() if name not in names}
    logits(model).square().mean().backward()
    optimizer.step()
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], p) for name, p in frozen.items())
    with pytest.raises(
        ValueError, match="lora.rank is 2; it serves the attention of GPT, and Linear has none"
    ):
        Lora(rank=2).apply(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="lora.rank is -1, lora.alpha 16.0; they need rank >= 0, alpha > 0"):
        Lora(rank=-1)


@pytest.mark.slow
def test_adapters_train_over_a_ring_as_on_one_rank_and_resume(
    world: Worlds, data_cache: str, tmp_path: Path
) -> None:
    words = (data_cache, "data.pack=true", "lora.rank=2", "mask=longlora", "mask.left.chunk=64",
             "mask.left.shifts=[0,32]", "train.steps=4", "checkpoint.every=2")  # fmt: skip
    one = world(1)(jobs.run, jobs.config(*words, "parallel=single"), tmp_path / "one")
    two = world(2)(jobs.run, jobs.config(*words, *jobs.ring()), tmp_path / "two", 2)
    two = world(2)(jobs.run, jobs.config(*words, "engine=fsdp", *jobs.ring()), tmp_path / "two")
    jobs.assert_same(two, one, since=2)
    assert not math.isclose(one[0].rows[0]["loss"], one[0].rows[-1]["loss"], rel_tol=1e-3)
