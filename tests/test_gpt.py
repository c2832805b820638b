"""The GPT: published sizes, its own arithmetic written a second time, and what it refuses."""

from math import ceil, floor, log, pi
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from confs import composed, made
from longspan.kernels.mask import Causal, Mask, Window
from longspan.models.block import Attend
from longspan.models.gpt import GPT
from longspan.models.rope import Rope, rotate
from longspan.parallel.placement import contiguous
from longspan.parallel.single import Single
from longspan.train.batch import bind

LENGTH, VOCAB = 23, 19


def attend(length: int = LENGTH) -> Attend:
    bound = bind(Single(), contiguous(length, 1))
    assert callable(bound)
    return bound


def small(**settings: Any) -> GPT:
    """A float64 model whose weights are large enough to matter everywhere."""
    torch.manual_seed(1)
    model = GPT(VOCAB, 24, 2, 6, 40, **{"kv_heads": 3, "init_std": 0.3, **settings}).double()
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def tokens(rows: int = 2) -> tuple[Tensor, Tensor]:
    """int64 [rows, LENGTH], and the tokens before them."""
    drawn = torch.randint(VOCAB, (rows, LENGTH), generator=torch.Generator().manual_seed(2))
    return drawn, torch.cat((torch.full((rows, 1), -1), drawn[:, :-1]), 1)


@pytest.mark.parametrize(
    ("name", "count", "head_dim", "kv_heads"),
    [
        ("llama_3_2_1b", 1_235_814_400, 64, 8),
        ("llama_3_2_3b", 3_212_749_824, 128, 8),
        ("llama_3_1_8b", 8_030_261_248, 128, 8),
        ("llama_3_1_70b", 70_553_706_496, 128, 8),
        ("qwen2_5_0_5b", 494_032_768, 64, 2),
        ("qwen2_5_7b", 7_615_616_512, 128, 4),
        ("mistral_7b", 7_241_732_096, 128, 8),
    ],
)
def test_published_models_have_their_published_sizes(
    name: str, count: int, head_dim: int, kv_heads: int
) -> None:
    with torch.device("meta"):
        model = made(composed(f"model={name}").model)(mask=Causal())
    assert sum(p.numel() for p in model.parameters()) == count
    assert (model.head_dim, model.kv_heads) == (head_dim, kv_heads)
    assert model.masks[0] == (Window(4095, 0) if name == "mistral_7b" else Causal())


def as_complex(x: Tensor) -> Tensor:
    """[..., D] in Llama's convention -> complex128 [..., D / 2]."""
    a, b = x.double().chunk(2, -1)
    return torch.complex(a, b)


def turned(x: Tensor, at: Tensor, theta: float) -> Tensor:
    """x [B, T, H, D], every pair times exp(i position theta^(-2 pair / D)): complex128."""
    dim = x.shape[-1]
    frequency = theta ** (-2.0 * torch.arange(dim // 2, dtype=torch.float64) / dim)
    angle = at.double()[:, None, None] * frequency
    return as_complex(x) * torch.polar(torch.ones_like(angle), angle)


@pytest.mark.parametrize("theta", [10_000.0, 500_000.0])
def test_rope_turns_pairs_of_dimensions(theta: float) -> None:
    x = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(3))
    at = torch.tensor([0, 1, 7, 4095, 1_048_575])
    got = rotate(x, Rope(theta).angles(at, 16))
    assert got.dtype == torch.float32 and got[:, 0].equal(x[:, 0])
    assert (as_complex(got) - turned(x, at, theta)).abs().max() < 1e-6


def yarn_by_the_authors_code(rope: Rope, dim: int) -> list[float]:
    """Radians a position, one pair at a time."""

    def pair_with(turns: float) -> float:
        assert rope.original is not None
        return dim * log(rope.original / (turns * 2 * pi)) / (2 * log(rope.theta))

    low, high = max(floor(pair_with(rope.beta_fast)), 0), min(ceil(pair_with(rope.beta_slow)), dim - 1)
    found = []
    for pair in range(dim // 2):
        plain = rope.theta ** (-2 * pair / dim)
        stretched = min(max((pair - low) / (high - low), 0.0), 1.0)
        found.append(plain / rope.factor * stretched + plain * (1 - stretched))
    return found


@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize(("theta", "original", "factor"), [(10_000.0, 4096, 16.0), (500_000.0, 8192, 8.0)])
def test_yarn_keeps_short_wavelengths_and_divides_long_ones(
    dim: int, theta: float, original: int, factor: float
) -> None:
    rope = Rope(theta, "yarn", factor, original)
    got = rope.frequencies(dim)
    want = torch.tensor(yarn_by_the_authors_code(rope, dim), dtype=torch.float64)
    assert torch.allclose(got, want, rtol=1e-12, atol=0)
    # Peng et al. 2023, section 3.2: by the number of turns within the original context
    plain = Rope(theta).frequencies(dim)
    turns = original * plain / (2 * pi)
    share = plain / got
    whole = turns > 1.5 * rope.beta_fast
    assert torch.allclose(share[whole], torch.ones(int(whole.sum()), dtype=torch.float64), rtol=1e-6)
    assert torch.allclose(share[turns < 0.5], torch.tensor(factor, dtype=torch.float64), rtol=1e-6)
    assert (share.diff() > -1e-6).all()
    # its attention temperature: 1 / sqrt(t) = 0.1 ln(factor) + 1, on queries and keys alike
    x = torch.randn(1, 1, 1, dim, generator=torch.Generator().manual_seed(4))
    norms = rotate(x, rope.angles(torch.tensor([5]), dim)).norm() / x.norm()
    assert float(norms) == pytest.approx(0.1 * log(factor) + 1, rel=1e-5)


def test_linear_scaling_divides_positions() -> None:
    x = torch.randn(1, 4, 2, 8, generator=torch.Generator().manual_seed(5))
    at = torch.tensor([0, 8, 40, 400])
    stretched = rotate(x, Rope(scaling="linear", factor=8.0).angles(at, 8))
    assert torch.allclose(stretched, rotate(x, Rope().angles(at // 8, 8)), atol=1e-5)


@pytest.mark.parametrize(
    "rope", [Rope(), Rope(scaling="linear", factor=4.0), Rope(scaling="yarn", factor=4.0, original=64)]
)
def test_scores_depend_on_distances_alone(rope: Rope) -> None:
    draw = torch.Generator().manual_seed(6)
    q, k = (torch.randn(1, 9, 2, 16, generator=draw, dtype=torch.float64) for _ in range(2))

    def scores(start: int) -> Tensor:
        angles = rope.angles(torch.arange(start, start + 9), 16)
        return torch.einsum("bthd,bshd->bhts", rotate(q, angles), rotate(k, angles))

    assert torch.allclose(scores(0), scores(1000), atol=1e-4)
    assert not torch.allclose(scores(0), torch.einsum("bthd,bshd->bhts", q, k), atol=1.0)


def by_hand(model: GPT, ids: Tensor, previous: Tensor) -> Tensor:
    """The decoder as the papers write it: complex RoPE, repeated keys, a dense causal mask."""
    w = {name: p.detach() for name, p in model.named_parameters()}

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w[f"{name}.weight"]

    def heads(x: Tensor, name: str) -> Tensor:
        return (x @ w[f"{name}.weight"].T).unflatten(-1, (-1, model.head_dim))

    at = torch.arange(ids.shape[1])
    x = w["embed.weight"][ids]
    if "mix.weight" in w:
        before = torch.where((previous < 0)[..., None], 0.0, w["embed.weight"][previous])
        x = x + before @ w["mix.weight"].T
    for i in range(model.layers):
        name = f"blocks.{i}.attention"
        y = norm(x, f"blocks.{i}.attention_norm")
        q, k, v = (heads(y, f"{name}.{part}") for part in "qkv")
        if f"{name}.q_norm.weight" in w:
            q, k = norm(q, f"{name}.q_norm"), norm(k, f"{name}.k_norm")
        q, k = (turned(part, at, model.rope.theta) for part in (q, k))
        k, v = (part.repeat_interleave(model.heads // model.kv_heads, 2) for part in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k.conj()).real / model.head_dim**0.5
        weights = scores.masked_fill(at[:, None] < at, -torch.inf).softmax(-1)
        out = torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)
        x = x + out @ w[f"{name}.o.weight"].T
        y, mlp = norm(x, f"blocks.{i}.mlp_norm"), f"blocks.{i}.mlp"
        gate, up = y @ w[f"{mlp}.gate.weight"].T, y @ w[f"{mlp}.up.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w[f"{mlp}.down.weight"].T
    return norm(x, "norm")


@pytest.mark.parametrize(
    "settings",
    [
        {"kv_heads": None},
        {"qk_norm": True, "tied": False},
        {"kv_heads": 1, "predecessor": True, "head_dim": 10, "rope": Rope(500.0)},
    ],
    ids=["MHA", "GQA norm", "MQA predecessor"],
)
def test_the_forward_is_what_the_papers_say(settings: dict[str, Any]) -> None:
    model = small(**settings)
    ids, previous = tokens()
    got = model(ids, torch.arange(LENGTH), attend(), previous=previous)
    assert torch.allclose(got, by_hand(model, ids, previous), atol=2e-6)
    # or the comparison is about nothing
    assert got.std() > 0.5 and not torch.allclose(got[:, 0], got[:, 1], atol=0.1)


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_reach_every_parameter(tied: bool) -> None:
    model = small(tied=tied, qk_norm=True, predecessor=True)
    ids, previous = tokens()
    hidden = model(ids, torch.arange(LENGTH), attend(), previous=previous)
    F.cross_entropy(model.head(hidden).flatten(0, 1), ids.roll(-1, 1).flatten()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.norm() > 1e-4, name
    assert (model.head.weight is model.embed.weight) == tied
    assert ("head.weight" in dict(model.named_parameters())) != tied


def test_the_predecessor_is_all_that_a_token_sees_besides_itself() -> None:
    # every layer's attention lets a token see itself alone
    model = small(predecessor=True, mask=Window(left=0, right=0))
    ids, previous = tokens(1)
    changed, moved = ids.clone(), previous.clone()
    changed[0, 7] = (ids[0, 7] + 1) % VOCAB
    moved[0, 8] = changed[0, 7]
    at = torch.arange(LENGTH)
    before = model(ids, at, attend(), previous=previous)
    after = model(changed, at, attend(), previous=moved)
    differ = (before != after).any(-1)[0].nonzero().flatten().tolist()
    assert differ == [7, 8]
    # what is told counts, not what stands before: a document's first token has no predecessor
    cut = previous.clone()
    cut[0, 8] = -1
    alone = model(ids, at, attend(), previous=cut)
    assert (before != alone).any(-1)[0].nonzero().flatten().tolist() == [8]
    plain = small(mask=Window(left=0, right=0))
    plain.load_state_dict({n: p for n, p in model.state_dict().items() if n != "mix.weight"})
    assert torch.allclose(plain(ids, at, attend())[0, 8], alone[0, 8], atol=1e-12)


def test_packed_documents_are_as_each_alone() -> None:
    model = small(qk_norm=True, predecessor=True)
    ids, previous = tokens()
    previous[:, 9] = -1
    previous[1, 15] = -1
    offsets = ((0, 9, LENGTH), (0, 9, 15))
    packed = model(ids, torch.arange(LENGTH), attend(), offsets=offsets, previous=previous)
    for row, begin, end in ((0, 0, 9), (0, 9, LENGTH), (1, 9, 15), (1, 15, LENGTH)):
        part = (ids[row : row + 1, begin:end], torch.arange(end - begin), attend(end - begin))
        alone = model(*part, previous=previous[row : row + 1, begin:end])
        assert torch.allclose(packed[row, begin:end], alone[0], atol=1e-5)


def test_each_layer_has_its_own_mask_and_heads_of_one_dtype() -> None:
    seen: list[tuple[Mask, torch.dtype, torch.dtype, torch.dtype]] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        seen.append((mask, q.dtype, k.dtype, v.dtype))
        return attend()(q, k, v, mask)

    masks = [Causal(), Window(left=3, right=0)]
    model = small(mask=masks, qk_norm=True).float()
    ids, _ = tokens()
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model(ids, torch.arange(LENGTH), spy)
    half = torch.bfloat16
    assert seen == [(mask, half, half, half) for mask in masks]
    assert hidden.dtype == torch.float32


def test_weights_begin_normal_and_narrow_where_they_write_to_the_stream() -> None:
    torch.manual_seed(0)
    model = GPT(500, 64, 8, 4, 160, tied=False, predecessor=True)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            narrow = name.endswith(("attention.o.weight", "mlp.down.weight"))
            std = 64**-0.5 if name == "mix.weight" else 0.02 / 4 if narrow else 0.02
            assert p.std().item() == pytest.approx(std, rel=0.05), name
        else:
            assert p.eq(1).all(), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vocab": None}, "model.vocab is null; give the number of token ids"),
        ({"vocab": 0}, "model.vocab is 0; it must be at least 1"),
        ({"layers": 0}, "model.layers is 0; it must be at least 1"),
        ({"heads": 0}, "model.heads is 0; it must be at least 1"),
        ({"kv_heads": 0}, "model.kv_heads is 0; it must be at least 1"),
        ({"hidden": -8}, "model.hidden is -8; it must be at least 1"),
        ({"kv_heads": 3}, "model.heads is 4, model.kv_heads 3: heads must be a multiple of kv_heads"),
        ({"dim": 18}, "model.dim is 18, model.heads 4: set model.head_dim, or a dim that heads divides"),
        ({"dim": 12}, "the head dim is 3; RoPE turns pairs, so it must be even (model.head_dim)"),
        ({"head_dim": 0}, "the head dim is 0; RoPE turns pairs"),
        ({"window": 0}, "model.window is 0; it must be at least 1, for all 2 layers or one a layer"),
        ({"window": [3]}, "model.window is [3]; it must be at least 1, for all 2 layers"),
        ({"bias": "q"}, "model.bias is 'q'; it can be none, qkv, qkvo"),
        ({"mask": [Causal()]}, "1 masks for 2 layers: give one, or one a layer"),
    ],
)
def test_a_model_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    sizes: dict[str, Any] = {"vocab": 8, "dim": 16, "layers": 2, "heads": 4, "hidden": 8}
    with pytest.raises(ValueError, match=r"model|head|mask") as caught:
        GPT(**{**sizes, **settings})
    assert str(caught.value).startswith(message)


def test_a_predecessor_model_needs_the_previous_tokens() -> None:
    with pytest.raises(ValueError, match="model.predecessor=true needs the previous tokens"):
        small(predecessor=True)(tokens()[0], torch.arange(LENGTH), attend())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scaling": "some"}, "rope.scaling is 'some'; it can be none, linear, ntk, yarn, llama3, longrope"),
        ({"theta": 1.0}, "rope.theta is 1.0 and rope.factor 1.0; they need theta > 1, factor >= 1"),
        ({"scaling": "linear", "factor": 0.5}, "rope.factor 0.5; they need theta > 1, factor >= 1"),
        ({"factor": 4.0}, "rope.factor is 4.0, but rope.scaling is none; set it to linear, ntk or yarn"),
        ({"scaling": "yarn", "factor": 4.0}, "rope.scaling=yarn needs rope.original"),
        ({"scaling": "llama3", "factor": 4.0}, "rope.scaling=llama3 needs rope.original"),
        ({"scaling": "longrope"}, "rope.factors is None, rope.scaling longrope"),
        ({"factors": (1.0, 2.0)}, "rope.factors is (1.0, 2.0), rope.scaling none"),
        ({"low": 4.0}, "rope.low is 4.0, rope.high 4.0; they need 0 < low < high"),
        ({"attention_factor": 0.0}, "rope.attention_factor is 0.0; it must be more than 0"),
        ({"beta_slow": 64.0}, "rope.beta_slow is 64.0, rope.beta_fast 32.0; they need 0 < beta"),
    ],
)
def test_a_rope_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="rope") as caught:
        Rope(**settings)
    assert message in str(caught.value)
