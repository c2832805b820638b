"""megatron-core's GPTModel on two ranks, by context or tensor parallelism, equals itself on one process."""

import ast
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cells import difference
from longspan.kernels.attention import attention
from longspan.kernels.mask import Causal, Documents, Mask, Unsupported, Window
from longspan.kernels.patterns import Strided
from longspan.kernels.span import Span
from longspan.models.rope import Rope
from longspan.parallel.layout import Layout, positions, shard, unshard
from longspan.parallel.placement import Placement, contiguous, zigzag
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.single import Single
from longspan.parallel.ulysses import Ulysses
from longspan.train import integrations, megatron
from longspan.train.megatron import LongspanCoreAttention, PackedSequence, context_parallel, core_attention
from world import run

has_megatron = pytest.mark.skipif(find_spec("megatron") is None, reason="needs megatron-core")

CAUSAL = Causal()
S2 = Strided(3, 1, 4) & Causal()
PACKED = Documents(((0, 5, 19), (0, 1, 32)), inner=Causal())


@dataclass(frozen=True)
class Megatron:
    """One run of a GPTModel: its layout, how many ranks cut the layers, who turns q and k, and whether the
    sequence is told or is as Megatron takes it.
    """

    layout: str
    mask: Mask = CAUSAL
    told: bool = True
    kv_heads: int = 2
    tp: int = 1
    rope: str = "none"


MEGATRON = [
    Megatron("ring", told=False),
    Megatron("ring", PACKED),
    Megatron("ulysses", told=False, kv_heads=4, rope="rope"),
    Megatron("ring", PACKED, rope="rope"),
    Megatron("s2", S2),
    Megatron("ring", S2, tp=2),
    # fewer kv heads than ranks: two ranks share one
    Megatron("ring", S2, tp=2, kv_heads=1),
]
BOTH_WAYS = [
    Megatron("ring", told=False, tp=2),
    Megatron("ring", S2, tp=2),
    Megatron("ulysses", PACKED, kv_heads=4, tp=2, rope="none"),
]
TOKENS = 32


class ByDefinition(nn.Module):
    """Megatron's core attention on one process: complex RoPE, then the mask as a matrix."""

    def __init__(self, *, mask: Mask, **_: Any) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *more: Any, **named: Any) -> Tensor:
        n, dim = query.shape[0], query.shape[3]
        turn = torch.arange(n)[:, None] * 10_000.0 ** (-torch.arange(0, dim, 2) / dim)
        phase = torch.polar(torch.ones(n, dim // 2), turn)[:, None, None]
        q, k = (
            torch.cat((y.real, y.imag), -1)
            for y in (torch.complex(*x.contiguous().chunk(2, -1)) * phase for x in (query, key))
        )
        at = (Span(0, n),)
        q, k, v = (x.transpose(0, 1) for x in (q, k, value))
        out, _ = attention(q, k, v, self.mask, at, at, backend="reference")
        return out.transpose(0, 1).flatten(2)


@contextmanager
def on_the_cpu() -> Iterator[None]:
    """Parts of megatron-core ask for the current GPU: its RoPE, and kv heads that ranks share."""
    made = torch.tensor

    def tensor(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
        return made(*args, **kwargs)

    with (
        patch("torch.cuda.current_device", return_value=torch.device("cpu")),
        patch("torch.Tensor.cuda", lambda x, *args, **kwargs: x),
        patch("torch.tensor", tensor),
    ):
        yield


def gpt_model(core: Any, case: Megatron, *, tp: int, cp: int, rope: str) -> Any:
    """A small GPTModel of megatron-core; the weights of a seed are the same however they are cut."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=2, hidden_size=32, num_attention_heads=4, num_query_groups=case.kv_heads,
        use_cpu_initialization=True, tensor_model_parallel_size=tp, context_parallel_size=cp,
        hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        apply_rope_fusion=False, init_method_std=0.2,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm")
    spec.submodules.self_attention.submodules.core_attention = core
    torch.manual_seed(7)
    return GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=64, max_sequence_length=TOKENS,
        position_embedding_type=rope,
    )  # fmt: skip


@contextmanager
def parallel(tp: int, cp: int) -> Iterator[None]:
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp, context_parallel_size=cp)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def one_gpt(case: Megatron, ids: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
    """Loss of each token, and the model with its gradients, from one process."""
    from megatron.core.transformer.spec_utils import ModuleSpec

    with parallel(1, 1):
        core = ModuleSpec(ByDefinition, {"mask": case.mask})
        model = gpt_model(core, case, tp=1, cp=1, rope="none")
        losses = model(ids, torch.arange(TOKENS)[None], None, labels=labels)
        losses.mean().backward()
    return losses.detach(), model


def held_by(layout: Layout, case: Megatron, whole: Tensor) -> tuple[Placement, Tensor]:
    """The placement, and the part of this rank: as Megatron's own training script cuts it, if not told."""
    from megatron.core.utils import get_batch_on_this_cp_rank

    if case.told:
        placement = layout.place(TOKENS, case.mask)
        return placement, shard(layout, whole, placement, 1)
    return zigzag(TOKENS, layout.size), get_batch_on_this_cp_rank({"tokens": whole})["tokens"]


def spread_gpt(case: Megatron) -> tuple[float, float]:
    """Greatest relative errors, of a token's loss and of a gradient tensor, against one process."""
    ids = torch.randint(64, (2, TOKENS), generator=torch.Generator().manual_seed(5))
    want, one = one_gpt(case, ids, ids.roll(-1, 1))
    makes: dict[str, Any] = {
        "ring": Ring,
        "ulysses": partial(Ulysses, axis="ring"),
        "s2": partial(HeadSharded, block=4),
    }
    cp = dist.get_world_size() // case.tp
    with parallel(case.tp, cp):
        layout = context_parallel(makes[case.layout])
        rope = Rope() if case.rope == "none" else None
        core = core_attention(layout, rope=rope, kv_heads=case.kv_heads)
        model = gpt_model(core, case, tp=case.tp, cp=cp, rope=case.rope)
        placement, tokens = held_by(layout, case, ids)
        _, labels = held_by(layout, case, ids.roll(-1, 1))
        told = PackedSequence(placement, case.mask) if case.told else None
        got = model(tokens, positions(layout, placement)[None], None, labels=labels, packed_seq_params=told)
        (got.sum() / ids.numel()).backward()
        integrations.sum_gradients(model, layout.group)
        losses = unshard(layout, got.detach(), placement, 1)
    errors = []
    for p, whole in zip(model.parameters(), one.parameters(), strict=True):
        at = dist.get_rank() % case.tp if getattr(p, "tensor_model_parallel", False) else None
        weight, grad = (
            x if at is None else x.chunk(case.tp, p.partition_dim)[at] for x in (whole, whole.grad)
        )
        assert torch.equal(p, weight)
        errors.append(difference(p.grad, grad))
    return float(((losses - want).abs() / want).max()), max(errors)


def run_megatron(rank: int, cases: list[Megatron]) -> list[tuple[float, float]]:
    with warnings.catch_warnings(), on_the_cpu():
        warnings.simplefilter("ignore")
        return [spread_gpt(case) for case in cases]


@has_megatron
@pytest.mark.slow
def test_megatron_on_two_ranks() -> None:
    # ranks of its own: Megatron's groups are many and stay
    for errors in run(2, run_megatron, MEGATRON):
        assert all(error < 1e-5 for pair in errors for error in pair), errors


@pytest.mark.slow
@has_megatron
def test_megatron_with_layers_and_sequence_cut() -> None:
    """TP 2 x CP 2."""
    for errors in run(4, run_megatron, BOTH_WAYS):
        assert all(error < 1e-5 for pair in errors for error in pair), errors


CONFIG = {
    "attention_dropout": 0.0, "softmax_type": "vanilla", "qk_clip": False, "context_parallel_size": 1,
    "num_query_groups": 2, "window_size": None, "window_attn_skip_freq": None,
}  # fmt: skip
KIND = SimpleNamespace(name="causal")


def layer(
    layer_number: int = 1, kv_heads: int | None = None, tp: int = 1, **config: Any
) -> LongspanCoreAttention:
    groups = SimpleNamespace(tp=SimpleNamespace(rank=lambda: 1, size=lambda: tp))
    return LongspanCoreAttention(
        SimpleNamespace(**(CONFIG | config)), layer_number, KIND, "self", pg_collection=groups,
        layout=Single(), kv_heads=kv_heads,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"attention_dropout": 0.1}, "attention_dropout=0"),
        ({"softmax_type": "learnable"}, "softmax_type='vanilla'"),
        ({"qk_clip": True}, "qk_clip=False"),
        ({"context_parallel_size": 2}, "context_parallel_size is 2"),
        ({"window_size": (4, 1)}, "must end in 0"),
    ],
)
def test_a_model_that_cannot_be_served_is_refused(config: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        layer(**config)


def test_arguments_that_would_be_ignored_are_refused() -> None:
    x = torch.randn(8, 1, 2, 4)
    core = layer()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"attention_mask": torch.ones(1, 1, 8, 8)}, "was given attention_mask"),
        ({"attention_bias": torch.ones(1, 1, 8, 8)}, "was given attention_bias"),
        ({"attn_mask_type": SimpleNamespace(name="padding")}, "attn_mask_type is padding"),
        ({"packed_seq_params": SimpleNamespace(qkv_format="thd")}, "pass a megatron.PackedSequence"),
    ]
    for given, told in cases:
        with pytest.raises(Unsupported, match=told):
            core(x, x, x, **given)


def test_a_layers_window() -> None:
    for skip in (2, [1, 0]):
        owns = [layer(i, window_size=(4, 0), window_attn_skip_freq=skip).own for i in (1, 2)]
        assert owns == [Window(4, 0), Causal()]
    core = layer(window_size=(4, 0))
    q, k, v = (torch.randn(11, 2, 2, 8, dtype=torch.float64) for _ in range(3))
    at = (Span(0, 11),)
    got = core(q, k, v)
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    want, _ = attention(q, k, v, Window(4, 0), at, at, backend="reference")
    assert difference(got, want.transpose(0, 1).flatten(2)) < 1e-12


def test_tensor_parallel_ranks_know_their_kv_heads() -> None:
    assert layer(tp=4, num_query_groups=8)._global_heads(S2, 2) == S2.heads([2, 3], 8)
    assert layer(tp=4, num_query_groups=4, kv_heads=2)._global_heads(S2, 1) == S2.heads([0], 2)
    assert layer(tp=4, num_query_groups=4)._global_heads(CAUSAL, 1) == CAUSAL
    with pytest.raises(Unsupported, match="kv_heads=num_query_groups"):
        layer(tp=4, num_query_groups=4)._global_heads(S2, 1)


def test_megatrons_rope_takes_only_its_own_placement() -> None:
    assert PackedSequence(zigzag(32, 2)).max_seqlen_kv == 32
    with pytest.raises(Unsupported, match="position_embedding_type='none'"):
        _ = PackedSequence(contiguous(32, 2)).max_seqlen_q
    with pytest.raises(ValueError, match="4 equal pieces, but this has 30 tokens"):
        megatron.megatron_placement(30, 2)


def test_without_megatron_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("megatron.core", "megatron.core.transformer.spec_utils"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (context_parallel, partial(core_attention, Single())):
        with pytest.raises(ModuleNotFoundError, match=r"pip install longspan\[megatron\]"):
            call()


def test_megatron_is_not_imported_with_the_module() -> None:
    tree = ast.parse(Path(str(megatron.__file__)).read_text())
    named = [n.module or "" for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level]
    assert not [name for name in named if name.startswith("megatron")]
