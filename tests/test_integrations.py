"""Drop-ins: transformers' models on two ranks equal themselves on one, and what would not is refused."""

import ast
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cells import build, difference
from longspan.kernels.attention import attention
from longspan.kernels.loss import linear_cross_entropy
from longspan.kernels.mask import Causal, Documents, Full, Mask, Unsupported, Window
from longspan.kernels.patterns import Strided
from longspan.kernels.span import Span
from longspan.parallel.layout import shard, unshard
from longspan.parallel.placement import contiguous, zigzag
from longspan.parallel.single import Single
from longspan.train import hf, integrations
from world import Worlds

LENGTH, VOCAB = 37, 61
CAUSAL = Causal()
STARTS = ((0, 5, 19, 30), (0, 1, 33, 37))
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 9, "head_dim": 8},
    "gemma2": {
        "sliding_window": 6, "head_dim": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0,
    },
    "gpt_oss": {"sliding_window": 6, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1},
}  # fmt: skip
# (model, layout, packed documents, checkpointed blocks)
Case = tuple[str, str, bool, bool]
CASES: list[Case] = [
    ("llama", "ring/zigzag", False, False), ("llama", "ulysses", False, False),
    ("llama", "s2-4/contiguous", True, False), ("llama", "ring/zigzag", True, True),
    ("qwen2", "ring/zigzag", False, False), ("qwen2", "ulysses", True, False),
    ("qwen2", "s2-4/contiguous", False, False), ("qwen3", "ring/zigzag", True, False),
    ("mistral", "ring/zigzag", False, False), ("mistral", "s2-4/contiguous", True, False),
    ("gemma2", "ring/striped", False, False), ("gpt_oss", "ring/zigzag", False, False),
]  # fmt: skip

has_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")


@contextmanager
def foreign() -> Iterator[None]:
    """Other people's packages warn when they are imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def causal_lm(name: str, attention: str, **more: Any) -> Any:
    """A small random decoder of transformers, the same for any attention."""
    with foreign():
        from transformers import AutoConfig, AutoModelForCausalLM

        hf.register()
        config = AutoConfig.for_model(name, **(SMALL | MODELS.get(name, {}) | more))
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        for p in model.parameters():
            # weights that start at zero or one hide mistakes
            nn.init.normal_(p, std=0.2) if p.ndim == 1 else None
    return model.train()


def batch() -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(5))
    labels = ids.clone()
    labels[0, 11:14] = -100
    return ids, labels


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def one_rank(name: str, packed: bool) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of each token and gradients of the whole sequence under transformers' own attention and masks."""
    model, (ids, labels) = causal_lm(name, "eager"), batch()
    at, following = torch.arange(LENGTH).repeat(2, 1), torch.full_like(labels, -100)
    following[:, :-1] = labels[:, 1:]
    if packed:
        for row, starts in enumerate(STARTS):
            for start in starts[1:]:
                following[row, start - 1] = -100
                at[row, start:] = torch.arange(LENGTH - start)
    # transformers finds packed documents where positions restart
    losses = token_losses(model(input_ids=ids, position_ids=at, use_cache=False).logits, following)
    (losses.sum() / (following != -100).sum()).backward()
    return losses.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def two_ranks(case: Case, size: int) -> tuple[Tensor, dict[str, Tensor]]:
    name, layout_name, packed, checkpointed = case
    layout, model, (ids, labels) = build(layout_name, size), causal_lm(name, "longspan"), batch()
    if checkpointed:
        with foreign():
            model.gradient_checkpointing_enable()
    mask: Mask = Documents(STARTS, inner=Causal()) if packed else Causal()
    placement = layout.place(LENGTH, mask)
    held = integrations.shard_batch(layout, placement, ids, labels, offsets=STARTS if packed else None)
    with hf.sequence(model, layout, placement, mask):
        # without documents, positions are the placement's
        more = {"position_ids": held.position_ids} if packed else {}
        logits = model(input_ids=held.input_ids, **more).logits
    # after the `with`: what is computed again in the backward still knows its sequence
    integrations.loss(logits, held.labels, held.valid).backward()
    integrations.sum_gradients(model, layout.group)
    losses = token_losses(logits.detach(), held.labels)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return unshard(layout, losses, placement, 1), grads


def run_transformers(rank: int, cases: list[Case], size: int) -> dict[str, float]:
    """The greatest error of each case: relative for each token's loss and each gradient tensor."""
    found: dict[str, float] = {}
    references: dict[tuple[str, bool], tuple[Tensor, dict[str, Tensor]]] = {}
    for case in cases:
        key = case[0], case[2]
        if key not in references:
            references[key] = one_rank(*key)
        (want, grads), (got, held) = references[key], two_ranks(case, size)
        assert held.keys() >= grads.keys()
        scale = max(float(g.norm()) for g in grads.values())
        errors = {
            n: float((held[n] - grads[n]).norm() / max(float(grads[n].norm()), 1e-4 * scale)) for n in grads
        }
        worst = max(errors, key=lambda n: errors[n])
        tokens = float(((got - want).abs() / want.abs().clamp_min(1e-3)).max())
        found[f"{'/'.join(map(str, case))} loss"] = tokens
        found[f"{'/'.join(map(str, case))} {worst}"] = errors[worst]
    return found


@has_transformers
def test_transformers_on_two_ranks(world: Worlds) -> None:
    for errors in world(2)(run_transformers, CASES, 2):
        assert len(errors) == 2 * len(CASES)
        assert not {name: e for name, e in errors.items() if not e < 1e-5}


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    # model, its config, inputs, what is told
    ("llama", {}, {"labels": torch.zeros(2, LENGTH, dtype=torch.int64)}, "integrations.loss"),
    ("llama", {}, {"use_cache": True}, "was given use_cache"),
    ("llama", {}, {"attention_mask": torch.ones(2, LENGTH).tril()}, "marks padding"),
    ("llama", {}, {"attention_mask": torch.zeros(2, 1, LENGTH, LENGTH)}, "was given attention_mask"),
    (
        "llama",
        {},
        {"input_ids": torch.zeros(2, 9, dtype=torch.int64)},
        "was given 9 tokens, but rank",
    ),
    ("llama", {}, {"output_attentions": True}, "output_attentions"),
    ("llama", {"attention_dropout": 0.1}, {}, "was given dropout"),
    ("llama", {"is_causal": False}, {}, "serves causal decoders"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
        {},
        "rope_type",
    ),
    ("qwen3_next", {"head_dim": 16, "num_experts": 2, "num_experts_per_tok": 1}, {}, "linear_attention"),
]


def run_refused(rank: int) -> None:
    layout = build("ring/zigzag", 2)
    placement = layout.place(LENGTH, CAUSAL)
    for name, config, inputs, told in REFUSED:
        model = causal_lm(name, "longspan", **config)
        ids = torch.zeros(2, placement.tokens(rank), dtype=torch.int64)
        with pytest.raises(ValueError, match=told), hf.sequence(model, layout, placement):
            model(**({"input_ids": ids} | inputs))
    model, ids = causal_lm("llama", "longspan"), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="outside of"):
        model(input_ids=ids)
    with (
        pytest.raises(Unsupported, match="leave one of 2 ranks without any"),
        hf.sequence(model, layout, contiguous(1, 2)),
    ):
        pass
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match="within the shard only"), hf.sequence(model, layout, placement):
        pass


@has_transformers
def test_what_transformers_cannot_do_is_refused(world: Worlds) -> None:
    world(2)(run_refused)


def run_refused_on_one(rank: int) -> list[str]:
    """What each rank is told when one of the two is given what it refuses: padding, or other tokens."""
    layout = build("ring/zigzag", 2)
    placement = layout.place(LENGTH, CAUSAL)
    model, told = causal_lm("llama", "longspan"), []
    whole, short = (torch.zeros(1, n, dtype=torch.int64) for n in (placement.tokens(rank), 9))
    seen = torch.ones_like(whole)
    padded = seen.clone()
    padded[:, -2:] = 0
    for ids, mask in ((whole, padded if rank == 0 else seen), (short if rank == 1 else whole, None)):
        with pytest.raises(ValueError) as error, hf.sequence(model, layout, placement):
            model(ids, mask)
        told.append(f"{type(error.value).__name__}: {error.value}")
    # nothing is left of it, and no padding is none
    with hf.sequence(model, layout, placement):
        assert model(ids if rank == 0 else whole, seen).logits.isfinite().all()
    return told


@has_transformers
def test_what_one_rank_refuses_all_refuse(world: Worlds) -> None:
    first, second = world(2)(run_refused_on_one, timeout=60.0)
    assert first[0].startswith("Unsupported: attention_mask marks padding")
    assert second[0] == "Unsupported: rank 0 refuses what it was given, and says why; all ranks stop with it"
    assert second[1].startswith("ValueError: LlamaModel was given 9 tokens, but rank 1 holds 18 of 37")
    assert first[1] == "ValueError: rank 1 refuses what it was given, and says why; all ranks stop with it"


def run_sum_of_bfloat16(rank: int) -> list[float]:
    module = nn.ParameterList(torch.zeros(1, dtype=torch.bfloat16) for _ in range(3))
    for i, p in enumerate(module):
        # beside 256 bfloat16 has no room for 1, but for 2: whoever is added last, one sum goes wrong
        p.grad = torch.full_like(p, 256 if rank == i else 1)
    integrations.sum_gradients(module, dist.group.WORLD)
    assert {p.grad.dtype for p in module} == {torch.bfloat16}
    return [float(p.grad) for p in module]


def test_gradients_are_summed_in_float32(world: Worlds) -> None:
    assert world(3)(run_sum_of_bfloat16) == [[258.0] * 3] * 3


def run_own_module(rank: int) -> None:
    """The plain function, and gradients that one rank has none of."""
    layout = build("ring/zigzag", 2)
    mask = Documents((0, 11), inner=Causal())
    placement = layout.place(LENGTH, mask)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, LENGTH, h, 8, dtype=torch.float64) for h in (4, 2, 2))
    attend = integrations.longspan_attention(layout, placement, mask)
    at = (Span(0, LENGTH),)
    want, _ = attention(q, k, v, mask, at, at, backend="reference")
    parts = (shard(layout, x, placement, 1) for x in (q, k, v))
    assert difference(unshard(layout, attend(*parts), placement, 1), want) < 1e-10
    experts = nn.ParameterList(torch.ones(3) for _ in range(2))
    experts[rank].sum().backward()
    integrations.sum_gradients(experts, dist.group.WORLD)
    for expert in experts:
        assert expert.grad is not None and torch.equal(expert.grad, torch.ones(3))


def test_an_own_module_on_two_ranks(world: Worlds) -> None:
    world(2)(run_own_module)


@pytest.mark.parametrize("own", [Full(), Causal(), Window(4, 0), Window(3, 2)], ids=str)
@pytest.mark.parametrize(
    "mask", [Full(), Causal(), Window(6, 1), Documents((0, 9)), Documents((0, 9), inner=Strided(2, 1, 2)),
             Strided(2, 1, 2).heads((1, 0), 2)], ids=str,
)  # fmt: skip
def test_a_layers_mask_narrows_the_sequences(mask: Mask, own: Mask) -> None:
    q, k, v = (torch.randn(1, 17, 2, 8, dtype=torch.float64) for _ in range(3))
    at = (Span(0, 17),)
    both, short = (
        attention(q, k, v, m, at, at, backend="reference")
        for m in (mask & own, integrations.narrowed(mask, own))
    )
    assert torch.equal(both[0], short[0])
    assert both[1] is not None and short[1] is not None and torch.equal(both[1], short[1])


def test_labels_are_moved_before_they_are_cut() -> None:
    ids = torch.arange(100, 110)[None].repeat(2, 1)
    placement, offsets = zigzag(10, 2), ((0, 4), (0, 10))
    told = {}
    for rank in range(2):
        layout: Any = SimpleNamespace(rank=rank, size=2)
        held = integrations.shard_batch(layout, placement, ids, offsets=offsets)
        assert held.valid == 8 + 9
        for row in range(2):
            for x, y, at in zip(held.input_ids[row], held.labels[row], held.position_ids[row], strict=True):
                told[row, int(x) - 100] = int(y), int(at)
    nexts = {(0, 3): -100, (0, 9): -100, (1, 9): -100}
    for (row, at), (label, position) in told.items():
        assert label == nexts.get((row, at), 101 + at)
        assert position == (at - 4 if row == 0 and at >= 4 else at)
    assert len(told) == 20
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        integrations.shard_batch(Single(), contiguous(10, 1), ids, ids[:, 1:])


def test_the_loss_is_that_of_the_hidden_states() -> None:
    hidden, weight = torch.randn(2, 5, 8), torch.randn(11, 8)
    labels = torch.randint(11, (2, 5))
    labels[0, :3] = -100
    got = integrations.loss(hidden @ weight.T, labels, 23)
    want = linear_cross_entropy(hidden.flatten(0, 1), weight, labels.flatten(), denominator=23)
    assert difference(got, want) < 1e-6
    assert float(integrations.loss(hidden @ weight.T, torch.full_like(labels, -100), 0)) == 0


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install longspan\[transformers\]"):
        hf.register()


@pytest.mark.parametrize("module", [hf, integrations], ids=lambda m: m.__name__)
def test_transformers_is_not_imported_with_the_module(module: Any) -> None:
    tree = ast.parse(Path(module.__file__).read_text())
    named = [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level]
    assert not [name for name in named if name.startswith("transformers")]
