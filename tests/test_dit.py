"""The class-conditional DiT: published sizes and names, its arithmetic written a second time, over ranks."""

from math import log, prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from confs import composed
from confs import made as built
from diffusion import Case, dense, errors, filled, given, made
from longspan.kernels.layers import PerLayer
from longspan.kernels.mask import Full, Mask
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.patterns import Strided
from longspan.models.adaln import sinusoid
from longspan.models.dit import DiT
from longspan.models.patch import patchify, places, unpatchify
from longspan.models.rope import GridRope
from longspan.parallel.single import Single
from longspan.train.data.clip import Traits
from world import Worlds

PUBLISHED = [
    ("dit_s_2", 32_963_360, 6.06),
    ("dit_b_2", 130_512_416, 23.01),
    ("dit_l_2", 458_102_816, 80.70),
    ("dit_xl_2", 675_129_632, 118.62),
]


def model_of(*overrides: str) -> Any:
    """The model of a config, alone."""
    return built(composed(*overrides).model)()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("name", "count", "gmacs"), PUBLISHED)
def test_published_models_have_their_published_sizes(name: str, count: int, gmacs: float) -> None:
    with torch.device("meta"):
        model = model_of(f"model={name}")
    assert parameters(model) == count
    assert round(model.macs() / 1e9, 2) == gmacs
    assert model.out_channels == 8 and model.y_embedder.embedding_table.num_embeddings == 1001
    # a mask that lets an eighth through saves the rest of the attention
    saved = 2 * model.dim * len(model.masks) * 256**2 * 7 // 8
    assert model.macs() - model.macs(pairs=[256**2 // 8] * len(model.masks)) == saved


def test_larger_patches_are_fewer_tokens() -> None:
    with torch.device("meta"):
        models = [model_of("model=dit_s_2", f"model.patch={p}") for p in (4, 8)]
    assert [prod(model.grid) for model in models] == [64, 16]
    # Peebles & Xie 2023, table 4
    assert [round(model.macs() / 1e9, 2) for model in models] == [1.41, 0.36]


def test_the_models_of_the_experiments_have_their_sizes() -> None:
    """Small ones, and presets for clusters: nothing is allocated, and the objective takes them."""
    sizes = {
        "dit_digits": 1_259_536, "vdit_moving_digits": 327_556, "dit_xl_2": 675_129_632,
        "vdit_1b_720p": 1_418_996_800,
    }  # fmt: skip
    window = ["mask=neighborhood", "mask.grid=[21,45,80]", "mask.window=[9,25,40]", "mask.stride=[3,5,8]"]
    for name, count in sizes.items():
        more = window if name == "vdit_1b_720p" else []
        cfg = composed(f"experiment={name}", *more)
        with torch.device("meta"):
            model = built(cfg.model)(mask=built(cfg.mask))
        assert parameters(model) == count
        words = 4096 if name == "vdit_1b_720p" else None
        shape = model.channels, *(1, *(n * p for n, p in zip(model.grid, model.patch, strict=True)))[-3:]
        data: Any = SimpleNamespace(traits=Traits((shape,), text=words), classes=model.classes)
        objective = built(cfg.objective)(model)
        assert objective.context(data) == prod(model.grid)
    assert prod(model.grid) == 75_600
    placed = objective.placement(data, Single(), model.masks[0])
    assert placed.length == 75_600 and placed.spans_by_rank[0][0].length == 5 * 8


# of width 8, 2 layers, 3 classes and the null class, 4 channels, 3 x 3 patches of 2 x 2
CHECKPOINT = {
    "pos_embed": (1, 9, 8),
    "x_embedder.proj.weight": (8, 4, 2, 2),
    "x_embedder.proj.bias": (8,),
    "t_embedder.mlp.0.weight": (8, 256),
    "t_embedder.mlp.0.bias": (8,),
    "t_embedder.mlp.2.weight": (8, 8),
    "t_embedder.mlp.2.bias": (8,),
    "y_embedder.embedding_table.weight": (4, 8),
    **{
        f"blocks.{i}.{name}": shape
        for i in range(2)
        for name, shape in {
            "attn.qkv.weight": (24, 8),
            "attn.qkv.bias": (24,),
            "attn.proj.weight": (8, 8),
            "attn.proj.bias": (8,),
            "mlp.fc1.weight": (32, 8),
            "mlp.fc1.bias": (32,),
            "mlp.fc2.weight": (8, 32),
            "mlp.fc2.bias": (8,),
            "adaLN_modulation.1.weight": (48, 8),
            "adaLN_modulation.1.bias": (48,),
        }.items()
    },
    "final_layer.linear.weight": (32, 8),
    "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (16, 8),
    "final_layer.adaLN_modulation.1.bias": (16,),
}


def by_hand(w: dict[str, Tensor], pixels: Tensor, t: Tensor, y: Tensor, heads: int) -> Tensor:
    """The published model on latent pixels [B, C, H, W], as its paper and code have it."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(x: Tensor) -> Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()

    x = F.conv2d(pixels, w["x_embedder.proj.weight"], w["x_embedder.proj.bias"], stride=2)
    rows, columns = x.shape[2:]
    x = x.flatten(2).transpose(1, 2) + w["pos_embed"]
    angle = t.double()[:, None] * torch.exp(-log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    c = linear(torch.cat((angle.cos(), angle.sin()), 1), "t_embedder.mlp.0")
    c = linear(c * c.sigmoid(), "t_embedder.mlp.2") + w["y_embedder.embedding_table.weight"][y]
    c = (c * c.sigmoid())[:, None]
    for i in range(2):
        name = f"blocks.{i}"
        six = linear(c, f"{name}.adaLN_modulation.1").chunk(6, -1)
        qkv = linear(norm(x) * (1 + six[1]) + six[0], f"{name}.attn.qkv")
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + six[2] * linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.attn.proj")
        hidden = linear(norm(x) * (1 + six[4]) + six[3], f"{name}.mlp.fc1")
        x = x + six[5] * linear(F.gelu(hidden, approximate="tanh"), f"{name}.mlp.fc2")
    shift, scale = linear(c, "final_layer.adaLN_modulation.1").chunk(2, -1)
    x = linear(norm(x) * (1 + scale) + shift, "final_layer.linear")
    # their unpatchify
    x = x.reshape(len(x), rows, columns, 2, 2, -1)
    return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, 2 * rows, 2 * columns)


def test_a_published_checkpoint_loads_and_computes_what_it_did() -> None:
    draw = torch.Generator().manual_seed(3)
    state = {n: torch.randn(s, generator=draw, dtype=torch.float64) / 2 for n, s in CHECKPOINT.items()}
    model = DiT([6, 6], 2, 4, 8, 2, 2, 3).double()
    before = dict(state)
    model.load_state_dict(state)
    assert state.keys() == before.keys() and all(state[n] is before[n] for n in state)
    pixels = torch.randn(2, 4, 6, 6, generator=draw, dtype=torch.float64)
    t, y = torch.tensor([3.0, 812.0]), torch.tensor([3, 1])
    out = model(patchify(pixels, 2), torch.arange(9), t, y, dense)
    got, want = unpatchify(out, (3, 3), 2), by_hand(state, pixels, t, y, 2)
    assert got.shape == (2, 8, 6, 6) and want.std() > 0.5
    # the sinusoids are float32
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    # what was saved here loads again
    again = DiT([6, 6], 2, 4, 8, 2, 2, 3).double()
    again.load_state_dict(model.state_dict())
    assert again(patchify(pixels, 2), torch.arange(9), t, y, dense).equal(out)


def test_the_table_is_that_of_the_published_code_and_stays_as_it_is() -> None:
    table = DiT([6, 10], 2, 1, 16, 1, 1, 1).pos_embed
    assert table is not None and not table.requires_grad
    frequency = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    for position in range(15):
        row, column = divmod(position, 5)
        parts = (f(x * frequency) for x in (column, row) for f in (torch.sin, torch.cos))
        assert torch.allclose(table[0, position].double(), torch.cat(list(parts)), atol=1e-6)


def test_the_beginning_is_zero() -> None:
    """adaLN-Zero: every block adds nothing, and the last layer says nothing."""
    torch.manual_seed(0)
    model = DiT([4, 4], 2, 3, 16, 3, 2, 4)
    blocks: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda _, given, out: blocks.append((out - given[0]).abs().max()))
    x = torch.randn(2, 4, 12)
    out = model(x, torch.arange(4), torch.tensor([1.0, 500.0]), torch.tensor([0, 4]), dense)
    assert out.shape == (2, 4, 24) and out.eq(0).all() and blocks == [0, 0, 0]
    stds = {name: float(p.detach().std()) for name, p in model.named_parameters() if p.ndim == 2}
    assert stds["y_embedder.embedding_table.weight"] == pytest.approx(0.02, rel=0.3)
    assert stds["t_embedder.mlp.0.weight"] == pytest.approx(0.02, rel=0.1)
    assert stds["blocks.0.mlp.fc1.weight"] == pytest.approx((2 / 80) ** 0.5, rel=0.1)


@pytest.mark.parametrize("embedding", ["sincos", "learned", "none"])
@pytest.mark.parametrize("rope", [None, GridRope()])
def test_positions_are_told_by_the_table_and_by_rope(embedding: Any, rope: GridRope | None) -> None:
    """Tokens held in another order give the same at their positions; without either, order is all the
    same.
    """
    model = made(Case("dit", "", (3, 4)), embedding=embedding, mask=Full(), rope=rope)
    x = given(Case("dit", "", (3, 4)), model)
    at, order = torch.arange(12), torch.randperm(12, generator=torch.Generator().manual_seed(4))
    rest = x["t"], x["y"], dense
    whole = model(x["tokens"], at, *rest)
    assert torch.allclose(model(x["tokens"][:, order], at[order], *rest), whole[:, order], atol=1e-10)
    blind = embedding == "none" and rope is None
    assert torch.allclose(model(x["tokens"], at.flip(0), *rest), whole, atol=1e-10) == blind


def test_a_time_for_each_token() -> None:
    case = Case("dit", "", (3, 4))
    model = made(case)
    x, at = given(case, model), torch.arange(12)
    one = model(x["tokens"], at, x["t"], x["y"], dense)
    each = model(x["tokens"], at, x["t"][:, None].expand(2, 12), x["y"][:, None].expand(2, 12), dense)
    assert torch.allclose(one, each, atol=1e-12)
    moved = x["t"][:, None].repeat(1, 12)
    moved[0, 5] += 0.5
    other = model(x["tokens"], at, moved, x["y"], dense)
    assert not torch.allclose(other[0, 5], one[0, 5], atol=1e-3) and other[1].equal(each[1])


def test_packed_samples_are_as_each_alone() -> None:
    """Samples of different sizes in one row, each with its own places in the grid, time and class (NaViT)."""
    model = made(Case("dit", "", (3, 4)), mask=Full())
    x = given(Case("dit", "", (3, 4)), model)
    # 2 x 3 patches and 2 x 2 patches, in the rows and columns of the model's grid, and 2 of padding
    at = torch.tensor([[0, 1, 2, 4, 5, 6, 0, 1, 4, 5, 0, 0]])
    t = torch.tensor([[0.3] * 6 + [0.8] * 4 + [0.0] * 2])
    y = torch.tensor([[2] * 6 + [0] * 4 + [5] * 2])
    tokens = x["tokens"][:1].clone()
    tokens[:, 10:] = 1e3
    out = model(tokens, at, t, y, dense, offsets=(0, 6, 10))
    for part in (slice(0, 6), slice(6, 10)):
        args = tokens[:, part], at[0, part], t[:, part.start], y[:, part.start], dense
        assert torch.allclose(out[:, part], model(*args), atol=1e-10)


def test_each_layer_has_its_mask() -> None:
    near, seen = Neighborhood((3, 4), 3), list[Mask]()

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        seen.append(mask)
        return dense(q, k, v, mask)

    x = torch.randn(1, 12, 4)
    rest = torch.arange(12), torch.zeros(1), torch.zeros(1, dtype=torch.int64), spy
    for settings, masks in (
        ({"mask": PerLayer(near, Full(), 3)}, (near, near, Full(), near)),
        ({"mask": [near, Full(), near, near]}, (near, Full(), near, near)),
        ({}, (Full(),) * 4),
        ({"mask": Strided(1, 1, 4)}, tuple(Strided(1, 1, 4, offset=i % 2) for i in range(4))),
    ):
        model = DiT([6, 8], 2, 1, 8, 4, 2, 1, **settings)
        model(x, *rest)
        assert model.masks == tuple(seen) == masks
        seen.clear()


def test_bfloat16_autocast_keeps_the_stream_and_the_time_in_float32() -> None:
    model = filled(DiT([4, 4], 2, 1, 16, 1, 2, 3, rope=GridRope(), qk_norm=True))
    kinds: list[torch.dtype] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        kinds.extend(x.dtype for x in (q, k, v))
        return dense(q, k, v, mask)

    stream: list[torch.dtype] = []
    model.get_submodule("blocks.0").register_forward_hook(lambda *x: stream.append(x[2].dtype))
    model.requires_grad_(False)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 4, 4), torch.arange(4), torch.zeros(1), torch.zeros(1, dtype=torch.int64), spy)
    assert kinds == [torch.bfloat16] * 3 and stream == [torch.float32]
    # 999 and 998.9 would be the same time in bfloat16
    near = torch.tensor([999.0, 998.9])
    assert (sinusoid(near, 16)[0] - sinusoid(near, 16)[1]).abs().max() > 0.05


@pytest.mark.parametrize(
    ("size", "patch", "tokens"), [((6, 8), 2, 12), ((4, 6, 8), (1, 2, 4), 24), ((4, 4, 4), 2, 8)]
)
def test_patches_go_and_come_back(size: tuple[int, ...], patch: Any, tokens: int) -> None:
    x = torch.randn(2, 3, *size)
    steps = (patch,) * len(size) if isinstance(patch, int) else patch
    grid = tuple(n // p for n, p in zip(size, steps, strict=True))
    cut = patchify(x, patch)
    assert cut.shape == (2, tokens, 3 * prod(steps)) and unpatchify(cut, grid, patch).equal(x)
    # the token at a place of the grid holds the pixels there, the channel fastest
    place = tuple(n - 1 for n in grid)
    corner = x[1]
    for dim, (i, p) in enumerate(zip(place, steps, strict=True), 1):
        corner = corner.narrow(dim, i * p, p)
    index = int(torch.arange(tokens).view(grid)[place])
    assert cut[1, index].equal(corner.movedim(0, -1).flatten())
    assert places(torch.tensor(index), grid).tolist() == list(place)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "model.layers is 0; it must be at least 1"),
        ({"classes": 0}, "model.classes is 0; it must be at least 1"),
        ({"size": [6]}, "model.patch is [2, 2]; it must be one number of at least 1, or 1 of them"),
        ({"size": [7, 8]}, "model.size is (7, 8), model.patch (2, 2): each size must be a multiple"),
        ({"size": [1, 2, 3, 4], "patch": 1}, "model.size is (1, 2, 3, 4); it must be (height, width) or"),
        ({"patch": 0}, "model.patch is 0; it must be one number of at least 1, or 2 of them"),
        ({"heads": 3}, "model.dim is 8, model.heads 3: dim / heads must be a head dim that is whole"),
        ({"heads": 8, "rope": GridRope()}, "dim / heads must be an even head dim, since RoPE turns pairs"),
        ({"dim": 6, "heads": 1}, "model.dim is 6; a sin-cos table of 2 axes needs a multiple of 4"),
        ({"embedding": "cosine"}, "model.embedding is 'cosine'; it can be sincos, learned or none"),
        ({"freq_dim": 5}, "model.freq_dim is 5; it must be even"),
        ({"class_std": 0.0}, "model.class_std is 0.0; it must be finite and more than 0"),
        ({"mask": [Full()]}, "1 masks for 2 layers: give one, or one a layer"),
    ],
)
def test_a_model_that_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    sizes = {"size": [4, 4], "patch": [2, 2], "channels": 1, "dim": 8, "layers": 2, "heads": 2, "classes": 3}
    with pytest.raises(ValueError, match=r"model|masks|dim") as caught:
        DiT(**{**sizes, **settings})
    assert message in str(caught.value)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_classes_begin_as_far_apart_as_asked(std: float) -> None:
    model = DiT((4, 4), 2, 1, 64, 1, 2, 200, class_std=std)
    weights = {name: float(p.detach().std()) for name, p in model.named_parameters()}
    assert weights["y_embedder.embedding_table.weight"] == pytest.approx(std, rel=0.05)
    # and nothing else with them
    assert weights["t_embedder.mlp.0.weight"] == pytest.approx(0.02, rel=0.05)


def test_tokens_that_are_no_grid_are_refused() -> None:
    message = r"tokens are \(1, 5, 4\); a grid of \(2, 3\) with patches of \(2, 2\) holds 6"
    with pytest.raises(ValueError, match=message):
        unpatchify(torch.zeros(1, 5, 4), (2, 3), 2)
    with pytest.raises(ValueError, match="rope.theta is 1.0; it needs theta > 1"):
        GridRope(1.0)


LAYOUTS = ["ring/contiguous", "ulysses", "s2-4/contiguous"]
GRIDS = [(3, 4, 4), (5, 5, 5)]  # 48 tokens divide by 2, 3 and 4 ranks; 125 by none of them


def assert_exact(world: Worlds, size: int, cases: list[Case]) -> None:
    """The output and every parameter's gradient, in float64."""
    for case, found in zip(cases, world(size)(errors, cases, size)[-1], strict=True):
        name, worst = max(found.items(), key=lambda x: x[1])
        assert worst < 1e-10, f"{case}: {name} differs by {worst:.1e}"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_compute_what_one_process_does(size: int, world: Worlds) -> None:
    layouts = LAYOUTS if size < 4 else [*LAYOUTS, "usp/zigzag"]
    cases = [Case("dit", layout, grid) for layout in layouts for grid in GRIDS[size // 4 :]]
    cases.append(Case("dit", "ring/zigzag", (5, 5), per_token=True))
    cases.append(Case("dit", "s2-4/contiguous", (5, 5, 5), brick=(2, 2, 2)))
    assert_exact(world, size, cases)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_model_is_exact_under_every_layout(size: int, world: Worlds) -> None:
    """Images or video with windowed and full layers, text by cross attention and as joint tokens; token
    counts that divide and that do not.
    """
    layouts = [*LAYOUTS, "usp/zigzag"]
    assert_exact(
        world,
        size,
        [Case(kind, name, grid) for kind in ("dit", "vdit", "mmdit") for name in layouts for grid in GRIDS],
    )


def test_faults_over_ranks_are_seen(world: Worlds) -> None:
    faults = ["gradients too small by the number of ranks", "another t on each rank"]
    cases = [Case("dit", "ulysses", (3, 4), plant=plant) for plant in faults]
    small, times = world(2)(errors, cases, 2)[0]
    # which an optimizer that divides by the gradient's size would hide, and the output does not show
    assert small.pop("out") < 1e-10 and min(small.values()) > 0.4
    # of which the last bias knows nothing
    assert times.pop("final_layer.linear.bias") < 1e-10 and min(times.values()) > 1e-4
