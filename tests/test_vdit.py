"""The video DiT and the MM-DiT: sizes, their arithmetic written a second time, text, halos, over ranks."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cells import build
from diffusion import TEXT, Case, beside, dense, errors, given, made
from longspan.kernels.mask import Full
from longspan.kernels.neighborhood import Neighborhood, brick_order
from longspan.kernels.span import positions
from longspan.kernels.tile import listed, tiles
from longspan.models.mmdit import MMDiT
from longspan.models.patch import places
from longspan.models.rope import GridRope, rotate
from longspan.models.vdit import VideoDiT, cross
from longspan.parallel.bricks import bricked
from longspan.parallel.layout import shard
from longspan.parallel.placement import Placement, contiguous, striped, zigzag
from test_dit import model_of, parameters
from world import Worlds

GRID = (3, 2, 4)
AT = torch.arange(24)


def test_the_shape_of_wan_counts_its_parameters() -> None:
    with torch.device("meta"):
        model = model_of("model=vdit_1b")
        bare = model_of("model=vdit_1b", "model.text_dim=null")
    assert parameters(model) == 1_418_996_800
    # text embedding, and in each block a norm with weights, four projections and two norms of 1536
    text = 1536 * (4096 + 1) + 1536 * 1537 + 30 * (2 * 1536 + 4 * 1536 * 1537 + 2 * 1536)
    assert parameters(bare) == 1_418_996_800 - text
    tokens, width = 21 * 30 * 52, 1536
    blocks = 30 * tokens * (6 * width**2 + 2 * width * 8960 + 2 * width * tokens + 2 * width * 512)
    keys = 30 * 512 * 2 * width**2 + 512 * (4096 + width) * width
    ends = 128 * tokens * width + 7 * width**2 + 256 * width
    assert model.macs(text=512) == blocks + keys + ends
    # 7 of 10 multiply-adds of the blocks are attention at this length
    assert 30 * 2 * width * tokens**2 > 0.6 * model.macs(text=512)


def test_each_axis_turns_its_part_of_a_head() -> None:
    rope = GridRope()
    assert rope.split(128, 3) == (44, 42, 42) and rope.split(64, 2) == (32, 32) and rope.split(16, 1) == (16,)
    assert rope.split(16, 3) == (8, 4, 4) and rope.split(18, 2) == (10, 8)
    at = torch.tensor([[0, 0, 0], [7, 0, 0], [0, 5, 0], [0, 0, 3], [2, 6, 1]])
    cos, sin = rope.angles(at, 128)
    for row, place in enumerate(at.tolist()):
        angle = [
            x * 10_000.0 ** (-2 * i / d)
            for x, d in zip(place, (44, 42, 42), strict=True)
            for i in range(d // 2)
        ]
        want = torch.tensor(angle, dtype=torch.float64)
        assert torch.allclose(cos[row, 0].double(), want.cos(), atol=1e-6)
        assert torch.allclose(sin[row, 0].double(), want.sin(), atol=1e-6)
    # scores depend on the distance along each axis alone
    q, k = torch.randn(2, 1, 24, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def scores(offset: list[int]) -> Tensor:
        angles = rope.angles(places(AT, GRID) + torch.tensor(offset), 16)
        return torch.einsum("bqhd,bkhd->bhqk", rotate(q, angles), rotate(k, angles))

    assert torch.allclose(scores([0, 0, 0]), scores([4, 9, 2]), atol=1e-5)
    # of each row its own places
    rows = torch.stack((places(AT, GRID), places(AT.flip(0), GRID)))
    assert rope.angles(rows, 16)[0][1].equal(rope.angles(rows[1], 16)[0])


def norm(x: Tensor, weight: Tensor | float = 1.0, bias: Tensor | float = 0.0) -> Tensor:
    spread = (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
    return (x - x.mean(-1, keepdim=True)) / spread * weight + bias


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, T, H, D]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


class Weights:
    """A model's parameters, by name."""

    def __init__(self, model: Any) -> None:
        self.w = {name: p.detach() for name, p in model.named_parameters()}

    def __getitem__(self, name: str) -> Tensor:
        return self.w[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def mlp(self, x: Tensor, first: str, second: str, act: Any = F.silu) -> Tensor:
        return self.linear(act(self.linear(x, first)), second)

    def time(self, t: Tensor, name: str) -> Tensor:
        """t [B] -> [B, 1, dim], with 8 sinusoids."""
        angle = t.double()[:, None] * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        waves = torch.cat((angle.cos(), angle.sin()), -1)
        return self.mlp(waves, f"{name}.mlp.0", f"{name}.mlp.2")[:, None]


def wan(model: Any, x: dict[str, Tensor], words: int) -> Tensor:
    """The video model as Wan's code has it; of the text the first `words` are visible."""
    w, turn = Weights(model), GridRope().angles(places(AT, GRID), 8)
    time = w.time(x["t"], "time_embedding") + w["class_embedding.embedding_table.weight"][x["y"]][:, None]
    six = w.linear(F.silu(time), "time_projection.1").unflatten(-1, (6, 24))
    text = w.mlp(x["text"][:, :words], "text_embedding.0", "text_embedding.2", gelu)
    y = w.linear(x["tokens"], "patch_embedding.proj")
    for i in range(2):
        e = (six + w[f"blocks.{i}.modulation"]).unbind(2)

        def qkv(own: Tensor, source: Tensor, name: str) -> list[Tensor]:
            q = rms(w.linear(own, f"{name}.q"), w[f"{name}.norm_q.weight"])
            k = rms(w.linear(source, f"{name}.k"), w[f"{name}.norm_k.weight"])
            return [part.unflatten(-1, (3, 8)) for part in (q, k, w.linear(source, f"{name}.v"))]

        own, name = norm(y) * (1 + e[1]) + e[0], f"blocks.{i}.self_attn"
        q, k, v = qkv(own, own, name)
        seen = softmax_attention(rotate(q, turn), rotate(k, turn), v)
        y = y + e[2] * w.linear(seen.flatten(2), f"{name}.o")
        name = f"blocks.{i}.cross_attn"
        own = norm(y, w[f"blocks.{i}.norm3.weight"], w[f"blocks.{i}.norm3.bias"])
        y = y + w.linear(softmax_attention(*qkv(own, text, name)).flatten(2), f"{name}.o")
        hidden = norm(y) * (1 + e[4]) + e[3]
        y = y + e[5] * w.mlp(hidden, f"blocks.{i}.ffn.0", f"blocks.{i}.ffn.2", gelu)
    shift, scale = (time[:, :, None] + w["head.modulation"]).unbind(2)
    return w.linear(norm(y) * (1 + scale) + shift, "head.head")


def test_the_video_model_is_what_the_paper_says() -> None:
    case = Case("vdit", "", GRID)
    model = made(case, mask=Full())
    x = given(case, model)
    rest = x["tokens"], AT, x["t"], x["y"], dense
    whole, cut = (model(*rest, text=x["text"], lengths=n) for n in (None, (3, 2)))
    assert torch.allclose(whole, wan(model, x, 3), rtol=1e-5, atol=1e-5) and whole.std() > 0.5
    assert torch.allclose(cut[1], wan(model, x, 2)[1], rtol=1e-5, atol=1e-5)
    assert torch.allclose(cut[0], whole[0], atol=1e-12) and not torch.allclose(cut[1], whole[1], atol=1e-2)


def test_padded_text_does_not_matter() -> None:
    """Whatever fills it: no bit of the output or of a gradient changes."""
    case, found = Case("vdit", "", GRID), []
    for fill in (0.0, 1e3):
        model = made(case)
        x = given(case, model)
        x["text"][1, 2:] = fill
        x["text"].requires_grad_()
        out = model(x["tokens"], AT, x["t"], x["y"], dense, **beside(case, x))
        out.backward(x["dout"])
        assert x["text"].grad is not None and x["text"].grad[1, 2:].eq(0).all()
        found.append([out.detach(), x["text"].grad, *(p.grad for p in model.parameters())])
    assert all(a is not None and b is not None and a.equal(b) for a, b in zip(*found, strict=True))
    q, k = torch.randn(2, 5, 2, 4), torch.randn(2, 3, 2, 4)
    assert cross(q, k, k, (0, 3))[0].eq(0).all() and cross(q[:, :0], k, k).shape == (2, 0, 2, 4)


def two_streams(model: Any, x: dict[str, Tensor]) -> Tensor:
    """A double block and a single one, as SD3 and Flux have them, on dense joint attention."""
    w, turn = Weights(model), GridRope().angles(places(AT, GRID), 8)
    time = w.time(x["t"], "t_embedder") + w["y_embedder.embedding_table.weight"][x["y"]][:, None]
    time = F.silu(time + w.mlp(x["pooled"], "pooled_in.0", "pooled_in.2")[:, None])
    parts = {"img": w.linear(x["tokens"], "x_embedder.proj"), "txt": w.linear(x["text"], "txt_in")}
    mods = {s: w.linear(time, f"blocks.0.{s}.adaLN_modulation.1").chunk(6, -1) for s in parts}

    def normed(qkv: Tensor, name: str, turned: bool) -> list[Tensor]:
        q, k, v = qkv.unflatten(-1, (3, 3, 8)).unbind(2)
        q, k = rms(q, w[f"{name}.q_norm.weight"]), rms(k, w[f"{name}.k_norm.weight"])
        return [rotate(q, turn), rotate(k, turn), v] if turned else [q, k, v]

    def seen(text: list[Tensor], image: list[Tensor]) -> Tensor:
        return softmax_attention(*(torch.cat(pair, 1) for pair in zip(text, image, strict=True))).flatten(2)

    heads = {}
    for s, y in parts.items():
        own = norm(y) * (1 + mods[s][1]) + mods[s][0]
        heads[s] = normed(w.linear(own, f"blocks.0.{s}.attn.qkv"), f"blocks.0.{s}.attn", s == "img")
    rows = seen(heads["txt"], heads["img"])
    for s, own in {"txt": rows[:, :3], "img": rows[:, 3:]}.items():
        y = parts[s] + mods[s][2] * w.linear(own, f"blocks.0.{s}.attn.proj")
        hidden, name = norm(y) * (1 + mods[s][4]) + mods[s][3], f"blocks.0.{s}.mlp"
        parts[s] = y + mods[s][5] * w.mlp(hidden, f"{name}.fc1", f"{name}.fc2", gelu)
    y = torch.cat((parts["txt"], parts["img"]), 1)
    shift, scale, gate = w.linear(time, "blocks.1.adaLN_modulation.1").chunk(3, -1)
    wide = w.linear(norm(y) * (1 + scale) + shift, "blocks.1.linear1")
    text, image = (
        normed(part[..., :72], "blocks.1", i == 1) for i, part in enumerate((wide[:, :3], wide[:, 3:]))
    )
    y = y + gate * w.linear(torch.cat((seen(text, image), gelu(wide[..., 72:])), -1), "blocks.1.linear2")
    shift, scale = w.linear(time, "final_layer.adaLN_modulation.1").chunk(2, -1)
    return w.linear(norm(y[:, 3:]) * (1 + scale) + shift, "final_layer.linear")


def test_two_streams_are_what_the_papers_say() -> None:
    case = Case("mmdit", "", GRID)
    model = made(case, mask=Full())
    x = given(case, model)
    out = model(x["tokens"], AT, x["t"], x["y"], dense, text=x["text"], pooled=x["pooled"])
    assert torch.allclose(out, two_streams(model, x), rtol=1e-5, atol=1e-5) and out.std() > 0.5
    each = x["t"][:, None].expand(2, 24)
    again = model(x["tokens"], AT, each, x["y"], dense, text=x["text"], pooled=x["pooled"], text_t=x["t"])
    assert torch.allclose(out, again, atol=1e-12)


@pytest.mark.parametrize(("double", "single"), [(2, 0), (0, 2)])
def test_gradients_reach_every_parameter_of_blocks_of_one_kind(double: int, single: int) -> None:
    torch.manual_seed(0)
    model = MMDiT([4, 8], 2, 1, 24, double, single, 3, TEXT).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    text, tokens = torch.randn(2, 3, TEXT).double(), torch.randn(2, 8, 4).double()
    out = model(tokens, AT[:8], torch.tensor([0.2, 0.9]), None, dense, text=text)
    out.square().sum().backward()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        # of the last double block nobody asks what the text saw
        assert p.grad.norm() > 1e-6 or name == "blocks.1.txt.attn.q_norm.weight", name


@pytest.mark.parametrize("name", ["vdit", "mmdit"])
def test_models_begin_by_saying_nothing(name: str) -> None:
    model = model_of(f"model={name}")
    tokens = 160 if name == "vdit" else 16
    more = {} if name == "vdit" else {"text": torch.randn(2, 3, 64)}
    y = torch.tensor([0, 20]) if name == "vdit" else None
    out = model(torch.randn(2, tokens, 4), torch.arange(tokens), torch.rand(2), y, dense, **more)
    assert out.shape == (2, tokens, 4) and out.eq(0).all()


def test_inputs_that_do_not_belong_are_refused() -> None:
    case = Case("vdit", "", GRID)
    model = made(case)
    x = given(case, model)
    rest = x["tokens"], AT, x["t"]
    with pytest.raises(ValueError, match="text is missing, model.text_dim set, the rows whole"):
        model(*rest, x["y"], dense)
    with pytest.raises(ValueError, match="text is given, model.text_dim set, the rows packed"):
        model(*rest, x["y"], dense, text=x["text"], offsets=(0, 9))
    with pytest.raises(ValueError, match="y is missing, but model.classes is set"):
        model(*rest, None, dense, text=x["text"])
    with pytest.raises(ValueError, match=r"text lengths are \(4, 1\); 2 rows need one each, from 0 to 3"):
        model(*rest, x["y"], dense, text=x["text"], lengths=(4, 1))
    with pytest.raises(ValueError, match="model.text_dim is 0; it must be at least 1"):
        VideoDiT([4, 4], 2, 1, 8, 1, 1, 8, text_dim=0)
    two = made(Case("mmdit", "", GRID))
    with pytest.raises(ValueError, match=r"text lengths are \(0, 3\); 2 rows need one each, from 1 to 3"):
        two(*rest, x["y"], dense, text=x["text"], lengths=(0, 3))
    with pytest.raises(ValueError, match="pooled is missing, but the model is made for it"):
        two(*rest, x["y"], dense, text=x["text"])
    with pytest.raises(ValueError, match="model.double is 0, model.single 0: together at least 1 block"):
        MMDiT([4, 4], 2, 1, 8, 0, 0, 1, TEXT)


@pytest.mark.parametrize("place", [contiguous, zigzag, striped])
def test_bricks_are_a_placement_of_the_same_positions(place: Any) -> None:
    grid, brick = (4, 6, 5), (2, 3, 2)
    order = positions(brick_order(grid, brick))
    plain = place(120, 3)
    found = bricked(plain, grid, brick)
    for ours, theirs in zip(found.spans_by_rank, plain.spans_by_rank, strict=True):
        assert positions(ours).equal(order[positions(theirs)])
    with pytest.raises(ValueError, match=r"the grid \(4, 6, 5\) has 120 positions, the placement 119"):
        bricked(place(119, 3), grid, brick)


def test_bricks_make_local_masks_dense() -> None:
    """Of the tiles that one rank visits, with as many tokens in a brick as in a tile."""
    grid, brick = (8, 16, 16), (4, 4, 4)
    mask = Neighborhood(grid, brick, stride=brick)

    def visited(placement: Placement) -> int:
        at = placement.spans_by_rank[0]
        lists = tiles(mask, at, at, 1, size=(64, 64), transpose=False, device=torch.device("cpu"))
        return len(listed(lists)) * 64**2

    area, plain = 2048 * 64, contiguous(2048, 1)
    assert visited(bricked(plain, grid, brick)) == area and visited(plain) == 4 * area


def sent(rank: int, name: str, size: int, grid: tuple[int, ...], window: Any, full: bool) -> int:
    """Bytes that this rank sent for one attention, forward."""
    layout = build(name, size)
    mask = Full() if full else Neighborhood(grid, window)
    count = grid[0] * grid[1] * grid[2]
    placement = layout.place(count, mask)
    q, k, v = (shard(layout, torch.zeros(1, count, 2, 8), placement, 1) for _ in range(3))
    layout.attention(q, k, v, mask, placement)
    return sum(layout.traffic.sent.values())


def test_frames_send_their_halo_and_no_more(world: Worlds) -> None:
    """Two frames a rank, and a window of three: each neighbour gets one frame's keys and values."""
    frame = 4 * 4 * 2 * 8 * 4 * 2
    # the first and the last window lie inside the grid, and see no frame more for it
    found = world(4)(sent, "s2-4/contiguous", 4, (8, 4, 4), 3, False)
    assert found == [frame, 2 * frame, 2 * frame, frame]


def test_a_window_of_a_tenth_sends_a_fifth_at_most(world: Worlds) -> None:
    grid, window = (40, 4, 5), (4, 4, 5)
    local = world(8)(sent, "s2-4/contiguous", 8, grid, window, False)
    ring = world(8)(sent, "ring/contiguous", 8, grid, window, True)
    assert sum(ring) == 7 * 40 * 20 * 2 * 8 * 4 * 2 and sum(local) * 5 <= sum(ring)


LAYOUTS = ["ring/contiguous", "ulysses", "s2-4/contiguous"]
GRIDS = [(3, 4, 4), (5, 5, 5)]  # 48 tokens divide by 2, 3 and 4 ranks; 125 by none of them


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_process_does(size: int, world: Worlds) -> None:
    """The output and every parameter's gradient, in float64: windows, full layers, text beside and joint."""
    layouts = LAYOUTS if size < 4 else [*LAYOUTS, "usp/zigzag"]
    grids = GRIDS[size // 4 :]
    cases = [Case(model, layout, grid) for model in ("vdit", "mmdit") for layout in layouts for grid in grids]
    # one frame of few tokens: a rank may hold none, and still takes its share of the text
    cases += [Case("mmdit", layout, (1, 1, size - 1)) for layout in LAYOUTS[:2]] if size > 3 else []
    cases.append(Case("mmdit", "ulysses", (5, 5, 5), per_token=True, brick=(2, 2, 2)))
    for case, found in zip(cases, world(size)(errors, cases, size)[-1], strict=True):
        name, worst = max(found.items(), key=lambda x: x[1])
        assert worst < 1e-10, f"{case}: {name} differs by {worst:.1e}"
