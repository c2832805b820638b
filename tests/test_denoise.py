"""The objective of diffusion: its loss, and that what is random knows nothing of ranks or batches."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cells import build
from denoising import CPU, PROCESSES, digits, objective, rows, share
from longspan.kernels.mask import Full, Mask
from longspan.kernels.neighborhood import Frames
from longspan.parallel.placement import Placement, balanced
from longspan.parallel.single import Single
from longspan.train.batch import Batch, bind, place
from longspan.train.data.clip import Clip
from longspan.train.diffusion.batch import Clean, Noisy, collate
from longspan.train.diffusion.pack import pack
from longspan.train.diffusion.validate import validation_loss
from longspan.train.objective.denoise import Denoise
from longspan.train.objective.flow import RectifiedFlow
from world import Worlds


def test_draws_depend_on_seed_and_index_alone() -> None:
    denoise = objective(dropout=0.5)
    one = denoise.noisy(rows([5]))
    for others in ([5, 6, 7], [9, 5], [100, 2, 3, 5]):
        noisy = denoise.noisy(rows(others))
        i = others.index(5)
        for name in ("tokens", "noise", "t", "y"):
            assert torch.equal(getattr(noisy, name)[i], getattr(one, name)[0]), name
    again, other = objective(dropout=0.5), objective(dropout=0.5, seed=1)
    many = list(range(40))
    assert torch.equal(again.noisy(rows(many)).t, denoise.noisy(rows(many)).t)
    for name in ("noise", "t", "y"):
        assert not torch.equal(
            getattr(other.noisy(rows(many)), name), getattr(denoise.noisy(rows(many)), name)
        )


def test_it_loads_what_the_model_s_patch_makes() -> None:
    denoise = objective()
    denoise.model.patch, denoise.model.grid = 2, (4, 4)
    batch: Batch = denoise.load(digits(), [3, 1], 7)
    assert isinstance(batch, Noisy) and (batch.rows, batch.length, batch.valid) == (2, 16, 32)
    assert torch.equal(batch.tokens, rows([3, 1], dtype=torch.float32).tokens)
    assert batch.mask(Full()) == Full()


def test_the_condition_is_dropped_as_often_as_asked() -> None:
    labels = collate([Clip(np.zeros((1, 1, 2, 2), np.float32), 1)] * 1500, range(1500), patch=2, null=10)
    for dropout in (0.0, 0.1, 0.7):
        y = objective(dropout=dropout).noisy(labels).y
        assert set(y.tolist()) <= {1, 10}
        assert float((y == 10).double().mean()) == pytest.approx(dropout, abs=5 * math.sqrt(0.25 / 1500))


@pytest.mark.parametrize("name", PROCESSES)
def test_the_loss_is_the_mean_square(name: str) -> None:
    denoise = objective(PROCESSES[name])
    noisy = denoise.noisy(rows([0, 1, 2]))
    process, layout = denoise.process, Single()
    placement = layout.place(16, Full())
    by_hand = []
    for i in range(3):
        t = noisy.t[i : i + 1]
        x, noise = noisy.tokens[i : i + 1], noisy.noise[i : i + 1].double()
        mixed = process.mix(x, noise, t[:, None, None])
        said = denoise.model(
            mixed, torch.arange(16), process.clock(t), noisy.y[i : i + 1], bind(layout, placement)
        )
        squares = (said - process.target(x, noise, t[:, None, None])) ** 2
        by_hand.append(process.weight(t)[0].double() * squares.mean())
    want = torch.stack(by_hand).mean()
    assert torch.allclose(share(denoise, noisy, layout, noisy.valid, Full()), want, rtol=1e-12)
    # summed over accumulated parts with one denominator
    parts = [share(denoise, denoise.noisy(rows(i)), layout, noisy.valid, Full()) for i in ([0, 1], [2])]
    assert torch.allclose(torch.stack(parts).sum(), want, rtol=1e-12)


def test_mixing_stays_in_float32_under_autocast() -> None:
    denoise = objective().float()
    noisy = denoise.noisy(rows([0, 1], dtype=torch.float32))
    layout = Single()
    with torch.autocast("cpu", torch.bfloat16):
        low = denoise.losses(noisy, bind(layout, layout.place(16, Full())))
    assert low.dtype == torch.float32
    seen: list[Tensor] = []
    denoise.model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16):
        denoise.losses(noisy, bind(layout, layout.place(16, Full())))
    t = noisy.t[:, None, None]
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[0], (1 - t) * noisy.tokens + t * noisy.noise)


def spread(rank: int, size: int, name: str, plant: str) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients on `size` ranks, summed, of two accumulated micro batches."""
    denoise = objective(PROCESSES["flow"], per_frame=name.endswith("frames"))
    layout = build(name.removesuffix("frames"), size)
    total = torch.zeros((), dtype=torch.float64)
    for wanted in ([0, 1], [2]):
        if plant == "another t a rank":
            denoise.seed = rank
        clean = rows(wanted)
        noisy = denoise.noisy(replace(clean, frames=2) if name.endswith("frames") else clean)
        loss = share(denoise, noisy, layout, 48.0, Full())
        loss.backward()
        total += loss.detach()
    gradients = {n: p.grad for n, p in denoise.named_parameters() if p.grad is not None}
    for x in (total, *gradients.values()):
        torch.distributed.all_reduce(x)
    if plant == "too small by ranks":
        gradients = {n: x / size for n, x in gradients.items()}
    return float(total), gradients


def one_device(frames: bool) -> tuple[float, dict[str, Tensor]]:
    denoise = objective(PROCESSES["flow"], per_frame=frames)
    clean = rows([0, 1, 2])
    noisy = denoise.noisy(replace(clean, frames=2) if frames else clean)
    loss = share(denoise, noisy, Single(), 48.0, Full())
    loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in denoise.named_parameters() if p.grad is not None}


def worst(found: tuple[float, dict[str, Tensor]], want: tuple[float, dict[str, Tensor]]) -> float:
    """The greatest relative difference, of the loss and of each gradient."""
    each = [float((found[1][n] - g).norm() / g.norm()) for n, g in want[1].items() if g.norm() > 0]
    return max(abs(found[0] - want[0]) / want[0], *each)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["ring/zigzag", "ring/zigzagframes", "ulysses"])
def test_ranks_of_a_sample_give_what_one_gives(size: int, name: str, world: Worlds) -> None:
    for found in world(size)(spread, size, name, ""):
        assert worst(found, one_device(name.endswith("frames"))) < 1e-10


@pytest.mark.parametrize("plant", ["too small by ranks", "another t a rank"])
def test_planted_faults_are_seen(plant: str, world: Worlds) -> None:
    assert worst(world(2)(spread, 2, "ring/contiguous", plant)[0], one_device(False)) > 1e-3


def test_frames_have_times_of_their_own() -> None:
    clips = [Clip(np.zeros((1, 3, 4, 4), np.float32), 0)]
    clean = collate(clips, [4], patch=(1, 2, 2), null=10)
    t = objective(per_frame=True).noisy(clean).t
    assert t.shape == (1, 12) and len(set(t[0].tolist())) == 3
    assert torch.equal(t.view(3, 4), t.view(3, 4)[:, :1].expand(3, 4))
    assert objective().noisy(clean).t.shape == (1,)


@pytest.mark.parametrize("labels", [True, False])
def test_texts_are_dropped_with_their_class(labels: bool) -> None:
    words, pooled = np.ones((3, 5), np.float32), np.ones(4, np.float32)
    clips = [Clip(np.zeros((1, 1, 4, 4), np.float32), 1, words, pooled)] * 200
    seen: list[Any] = []

    class Reader(nn.Module):
        def forward(
            self, x: Tensor, positions: Tensor, t: Tensor, y: Any, attend: Any, **more: Any
        ) -> Tensor:
            seen.append((y, more))
            return x

    denoise = Denoise(Reader(), process=RectifiedFlow(), dropout=0.4, labels=labels)
    noisy = denoise.noisy(collate(clips, range(200), patch=2, null=10))
    denoise.losses(noisy, lambda q, k, v, mask: q)
    ((y, more),) = seen
    assert (y is not None) == labels
    for name, dims in (("text", (1, 2)), ("pooled", (1,))):
        assert torch.equal((more[name] == 0).all(dims), noisy.y == 10)
        assert torch.equal((more[name] == 1).all(dims), noisy.y == 1)
    # no text is one word of zeros
    assert [n == 1 for n in more["lengths"]] == (noisy.y == 10).tolist() and 50 < more["lengths"].count(
        1
    ) < 110


def packed(pad: float) -> Clean:
    generator = np.random.default_rng(0)
    clips = [
        Clip(generator.standard_normal((1, 1, h, w)).astype(np.float32), label)
        for label, (h, w) in enumerate([(4, 4), (2, 6), (8, 8)])
    ]
    clean = pack([clips[:2], clips[2:]], [3, 8], patch=2, grid=(1, 4, 4), context=19, null=10)
    tokens = clean.tokens.double().masked_fill(clean.members[..., None] < 0, pad)
    return replace(clean, tokens=tokens)


def test_packed_rows_are_their_samples_and_padding_is_nothing() -> None:
    clean = packed(0.0)
    assert clean.offsets == ((0, 4, 7), (0, 16, 19))
    assert clean.sizes().tolist() == [[4, 3], [16, 0]]
    assert clean.positions[0, :7].tolist() == [0, 1, 4, 5, 0, 1, 2]
    denoise = objective(RectifiedFlow(shift=2.0, shift_tokens=4), dropout=0.5)
    noisy = denoise.noisy(clean)
    assert noisy.valid == 23 and len(set(noisy.t[0, :7].tolist())) == 2
    layout, loss = Single(), 0.0

    class Documented(nn.Module):
        """Packing is a mask of the batch, which the model puts on each layer's."""

        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(
            self, x: Tensor, positions: Tensor, t: Tensor, y: Tensor, attend: Any, **more: Any
        ) -> Tensor:
            return self.model(x, positions, t, y, lambda q, k, v, m: attend(q, k, v, noisy.mask(m)))

    inner = denoise.model
    denoise.model = Documented(inner)
    packed_loss = share(denoise, noisy, layout, noisy.valid, Full())
    poisoned = share(denoise, denoise.noisy(packed(1e3)), layout, noisy.valid, Full())
    assert torch.equal(packed_loss, poisoned)
    # each sample alone, with its part of the row's noise and its own time
    denoise.model = inner
    for r, start, length in ((0, 0, 4), (0, 4, 3), (1, 0, 16)):
        at = slice(start, start + length)
        alone = Noisy(
            noisy.tokens[r : r + 1, at],
            noisy.noise[r : r + 1, at],
            noisy.real[r : r + 1, at],
            noisy.t[r : r + 1, start],
            noisy.y[r : r + 1, start],
            noisy.positions[r, at],
            1,
        )
        loss += float(share(denoise, alone, layout, 23.0, Full()).detach())
    assert float(packed_loss.detach()) == pytest.approx(loss, rel=1e-12)


def test_brick_order_changes_nothing() -> None:
    denoise, bricks = objective(), objective(brick=[2, 2])
    for each in (denoise, bricks):
        each.model.grid, each.model.masks = (4, 4), (Full(),)
    clean, layout = rows([0, 1]), Single()
    found = []
    for each in (denoise, bricks):
        noisy = each.noisy(clean)
        placement = place(layout, noisy, Full())
        part = noisy.held(layout, placement, CPU)
        losses = each.losses(part, bind(layout, placement))
        found.append((part.positions, losses[:, part.positions.argsort()]))
    assert found[1][0][:8].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]
    assert torch.allclose(found[0][1], found[1][1], rtol=1e-12)


def test_a_placement_that_is_even_is_so_in_bricks_too() -> None:
    class Even(Single):
        def place(self, length: int, mask: Mask) -> Placement:
            return balanced(length, 2, mask)

    denoise, mask = objective(brick=[2, 2]), Frames(4)
    denoise.model.grid, denoise.model.masks, denoise.model.patch = (4, 4), (mask,), 2
    noisy = denoise.noisy(rows([0]))
    placement = noisy.placed(Even(), mask)
    # rows see 4, 8, 12 and 16 tokens: of two bricks beside each other and two below, each rank takes one
    assert placement.work(mask) == (80, 80)
    denoise.model.channels = denoise.model.out_channels = 1
    denoise.model.classes, denoise.model.text_dim, denoise.model.pooled_dim = 10, None, None
    assert denoise.placement(digits(), Even(), mask) == placement


def test_validation_is_fixed_and_knows_no_seed() -> None:
    layout, data = Single(), digits().held_out()
    settings: dict[str, Any] = {"patch": 2, "layout": layout, "mask": Full(), "device": CPU, "times": 4}
    one, two = (
        validation_loss(objective(seed=seed, dropout=d).float(), data, 20, **settings)
        for seed, d in ((0, 0.0), (5, 0.9))
    )
    assert torch.equal(one, two) and one.shape == (4,)
    halves = [validation_loss(objective().float(), data, 20, part=(rank, 2), **settings) for rank in range(2)]
    assert torch.allclose(sum(halves) / 2, one, rtol=1e-5)  # type: ignore[arg-type]
    times = objective().probe(rows([0]), 0, 2).t, objective().probe(rows([0]), 1, 2).t
    assert float(times[0]) == pytest.approx(1 - float(times[1])) == pytest.approx(0.3375, abs=1e-3)


def test_rows_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="per_frame is true, but the rows are packed"):
        objective(per_frame=True).noisy(packed(0))
    with pytest.raises(ValueError, match="rows of 16 tokens, but the placement is for 15"):
        objective().noisy(rows([0])).held(Single(), Single().place(15, Full()), CPU)
