"""Memory settings: the same gradients with fewer activations, and what each setting keeps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import Case, beside, dense, given, made
from longspan.kernels.attention import attention
from longspan.kernels.mask import Causal, Mask
from longspan.kernels.patterns import Strided
from longspan.kernels.span import Span
from longspan.launch.ledger import HOST, Ledger
from longspan.models.gpt import GPT
from longspan.models.memory import Memory
from longspan.models.tiled import by_tiles

TOKENS = 48
SETTINGS: dict[str, dict[str, Any]] = {
    "block": {"recompute": "block"},
    "every": {"recompute": "block", "every": 2},
    "kept": {"recompute": "keep_attention"},
    "offload": {"recompute": "block", "offload": True},
    "kept, offload": {"recompute": "keep_attention", "offload": True},
    "tiles": {"mlp_tile": 7},
    "rounds": {"head_chunks": 2},
    "all": {"recompute": "block", "offload": True, "mlp_tile": 20, "head_chunks": 3},
}


class Attending:
    """Attention on one device, which counts how often it worked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        self.calls += 1
        at = (Span(0, q.shape[1]),)
        return attention(q, k, v, mask, at, at)[0].to(q.dtype)


def small(mask: Mask, dtype: torch.dtype = torch.float64) -> GPT:
    torch.manual_seed(1)
    return GPT(13, 24, 3, 6, 40, kv_heads=3, qk_norm=True, init_std=0.3, mask=mask).to(dtype)


def gradients(model: GPT, attend: Any, rows: int = 2, tokens: int = TOKENS) -> list[Tensor]:
    ids = torch.randint(13, (rows, tokens), generator=torch.Generator().manual_seed(2))
    out = model(ids, torch.arange(tokens), attend)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype))
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mask", [Causal(), Causal() & Strided(4, 2, 3)], ids=["causal", "s2"])
def test_gradients_are_those_of_a_model_that_keeps_all(name: str, mask: Mask) -> None:
    plain, saving = small(mask), small(mask)
    host = Memory(**SETTINGS[name]).apply(saving)
    if host is not None:
        host.least = 1
    expected, found = gradients(plain, Attending()), gradients(saving, Attending())
    assert len(found) == len(expected) == 1 + len(list(plain.parameters()))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-12 * b.norm()
    assert host is None or host.held == 0


@pytest.mark.parametrize("name", ["block", "kept", "offload", "tiles"])
@pytest.mark.parametrize("kind", ["dit", "vdit", "mmdit"])
def test_diffusion_models_too(kind: str, name: str) -> None:
    case, found = Case(kind, "", (3, 4)), []
    for settings in ({}, SETTINGS[name]):
        model = made(case)
        Memory(**settings).apply(model)
        x = given(case, model)
        out = model(x["tokens"], torch.arange(12), x["t"], x["y"], dense, **beside(case, x))
        out.backward(x["dout"])
        found.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all((a - b).norm() <= 1e-12 * b.norm() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(("name", "calls"), [("block", 6), ("every", 5), ("kept", 3), ("tiles", 3)])
def test_attention_works_again_only_where_it_must(name: str, calls: int) -> None:
    model, attend = small(Causal()), Attending()
    Memory(**SETTINGS[name]).apply(model)
    gradients(model, attend)
    assert attend.calls == calls


def test_bfloat16_autocast_reaches_what_is_computed_again() -> None:
    found = []
    for settings in ({}, SETTINGS["all"]):
        model = small(Causal(), torch.float32)
        Memory(**settings).apply(model)
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, Attending()))
    # weights' gradients are summed in float32 over tiles, so they may be nearer the truth
    assert all((a - b).norm() <= 2e-2 * b.norm() for a, b in zip(*found, strict=True))


def kept_bytes(settings: dict[str, Any], tokens: int) -> tuple[int, int]:
    """Bytes on the device and in host memory when the forward is over, beside the weights."""
    model = small(Causal(), torch.float32)
    host = Memory(**settings).apply(model)
    if host is not None:
        host.least = 1
    with Ledger() as ledger:
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        if host is not None:
            host.pack = ledger.during(HOST)(host.pack)  # type: ignore[method-assign]
        out = model(ids, torch.arange(tokens), Attending())
        held = ledger.total(), ledger.now[HOST]
        del out
    return held


def test_what_is_kept_a_token() -> None:
    def a_token(settings: dict[str, Any]) -> list[float]:
        return [(b - a) / 128 for a, b in zip(*(kept_bytes(settings, n) for n in (128, 256)), strict=True)]

    plain, tiles, block, away = (
        a_token(x) for x in ({}, {"mlp_tile": 16}, SETTINGS["block"], SETTINGS["offload"])
    )
    width, hidden, layers = 4 * 24, 4 * 40, 3
    # gate, up, silu(gate) and the product
    assert plain[0] - tiles[0] >= 3 * hidden * layers
    # the input of each block; besides them the ids, angles and the output
    assert block[0] <= (layers + 4) * width + 200 < tiles[0] / 2
    assert away[1] == layers * width == block[0] - away[0]


def test_the_peak_of_a_tiled_mlp_does_not_grow_with_its_hidden_part() -> None:
    peaks = []
    for tokens in (512, 1024):
        mlp = small(Causal(), torch.float32).blocks[0].get_submodule("mlp")
        x = torch.randn(1, tokens, 24, requires_grad=True)
        with Ledger() as ledger:
            by_tiles(64, mlp)(x).sum().backward()
        peaks.append(ledger.most)
    # y, its gradient, and that of x
    assert peaks[1] - peaks[0] <= 3.1 * 512 * 24 * 4


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"recompute": "some"}, "memory.recompute is 'some'; it can be none, block, keep_attention"),
        ({"offload": True}, "memory.offload is true; it needs memory.recompute=block or keep_attention"),
        ({"mlp_tile": -1}, "memory.mlp_tile is -1; it must be at least 0"),
        ({"recompute": "block", "every": 1}, "memory.every is 1, which recomputes no block"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Memory(**settings)


def test_what_a_model_has_not_is_refused() -> None:
    with pytest.raises(ValueError, match="memory.head_chunks is 4; the model has 3 kv heads"):
        Memory(head_chunks=4).apply(small(Causal()))
    with pytest.raises(ValueError, match="memory.head_chunks is 2; it serves Attention, and the"):
        Memory(head_chunks=2).apply(made(Case("dit", "", (3, 4))))
