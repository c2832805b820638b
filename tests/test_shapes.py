"""Clips of several shapes, and samples of another size: buckets, packed rows, grids, and what is refused."""

from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clip_jobs import config, latent_config, trained
from clips import latents
from diffusion import Case, dense, given, made
from jobs import furthest, launch_of, values
from longspan.kernels.layers import PerLayer
from longspan.kernels.mask import And, Causal, Documents, Full, Mask
from longspan.kernels.neighborhood import Frames, FrameTiles, Neighborhood
from longspan.models.dit import DiT
from longspan.models.grids import check_grid, dilation_of, on_grid, regridded
from longspan.models.mmdit import MMDiT
from longspan.models.vdit import VideoDiT
from longspan.parallel.single import Single
from longspan.train.agree import Ranks
from longspan.train.data.clip import Traits
from longspan.train.diffusion.samplers import DDIM, Ancestral
from longspan.train.drawing import draw
from longspan.train.job import build, processes
from longspan.train.judge_clips import ClipJudge, on_first
from longspan.train.objective.ddpm import Diffusion
from longspan.train.objective.denoise import Denoise
from longspan.train.objective.flow import RectifiedFlow
from world import RankFailed, Worlds

ONE = ((1, 1, 8, 8),)
TWO = ((1, 1, 4, 8), (1, 1, 8, 8))


@dataclass
class Set:
    """The outside of a data set."""

    traits: Traits
    classes: int = 5


def small(**settings: Any) -> DiT:
    return DiT([8, 8], 2, 1, 8, 2, 2, **{"classes": 5, "learn_sigma": False, **settings})


def test_a_mask_goes_to_another_grid_and_keeps_its_window() -> None:
    near = Neighborhood((4, 6, 8), (3, 5, 5), stride=(1, 2, 5))
    moved = regridded(near, (4, 6, 8), (4, 4, 9))
    assert moved == Neighborhood((4, 4, 9), (3, 4, 5), stride=(1, 2, 5))
    assert regridded(near, (4, 6, 8), (4, 6, 8)) is near
    whole = PerLayer(And(near, FrameTiles(48, 2)), Frames(96), 2)
    assert regridded(whole, (4, 6, 8), (5, 4, 9)) == PerLayer(
        And(replace(near, grid=(5, 4, 9), window=(3, 4, 5)), FrameTiles(36, 2)), Frames(72), 2
    )
    assert on_grid(Documents((0, 3), inner=near)) and not on_grid(And(Causal(), Full()))
    assert dilation_of(Neighborhood((8, 8), 3, dilation=2), 3) == (1, 2, 2)
    assert dilation_of(And(near, replace(near, window=1, stride=1, dilation=2)), 3) == (1, 1, 1)
    check_grid(Neighborhood((4, 6), 3), (1, 4, 6))


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (Neighborhood((4, 8), 3), r"mask.grid is \[4, 8\], but .* make a grid of \[2, 4, 4\]"),
        (PerLayer(Full(), Neighborhood((2, 4, 5), 2), 2), r"mask.grid is \[2, 4, 5\]"),
        (Frames(8), r"mask.tokens is 8, but a frame of the model's grid \[2, 4, 4\] has 16 tokens"),
        (FrameTiles(24, 2), "mask.tokens is 24"),
    ],
)
def test_a_mask_of_another_grid_is_refused_with_both(mask: Mask, said: str) -> None:
    for make in (
        lambda: DiT([2, 8, 8], (1, 2, 2), 1, 12, 2, 2, 5, embedding="none", mask=mask),
        lambda: VideoDiT([2, 8, 8], (1, 2, 2), 1, 12, 2, 2, 8, mask=mask),
        lambda: MMDiT([2, 8, 8], (1, 2, 2), 1, 12, 1, 1, 2, 6, mask=mask),
    ):
        with pytest.raises(ValueError, match=said):
            make()


@pytest.mark.parametrize("name", ["dit", "vdit", "mmdit"])
@pytest.mark.parametrize("grid", [(2, 3, 4), (3, 4, 6)])
def test_samples_of_another_grid_are_those_of_a_model_of_that_size(name: str, grid: tuple[int, ...]) -> None:
    """The window, the places and the table: as in a model made for them, with the same weights."""
    other = Case(name, "", grid)
    model, right = made(Case(name, "", (3, 3, 4))), made(other)
    own = right.state_dict()
    right.load_state_dict(own | {k: v for k, v in model.state_dict().items() if k != "pos_embed"})
    x, at = given(other, right), torch.arange(int(np.prod(grid)))
    more: dict[str, Any] = {} if name == "dit" else {"text": x["text"]}
    more |= {"pooled": x["pooled"]} if name == "mmdit" else {}
    rest = x["tokens"], at, x["t"], x["y"], dense
    assert torch.allclose(model(*rest, grid=grid, **more), right(*rest, **more), atol=1e-6)


def test_a_learned_table_has_no_more_rows() -> None:
    model = small(embedding="learned")
    tokens, y = torch.randn(1, 8, 4), torch.tensor([0])
    a = model._embedded(torch.arange(8), (2, 4))
    assert model.pos_embed is not None and a.equal(model.pos_embed[0][:8])
    assert model._embedded(torch.arange(6), (3, 2)).equal(model.pos_embed[0][[0, 1, 4, 5, 8, 9]])
    with pytest.raises(ValueError, match=r"embedding is learned for a grid of \(4, 4\): .* one of \(1, 8\)"):
        model(tokens, torch.arange(8), torch.zeros(1), y, dense, grid=(1, 8))


near = {"mask": Neighborhood((4, 4), 3)}
REFUSED: list[tuple[dict[str, Any], dict[str, Any], Traits, str]] = [
    ({}, {}, Traits(TWO), r"clips of 2 shapes, .*: set data.buckets to the tokens of a batch, or data.pack"),
    ({}, {}, Traits(((1, 1, 4, 8),)), r"model.size gives \(4, 4\), but the data has \(2, 4\)"),
    ({}, {}, Traits(((1, 3, 8, 8),)), r"model.size gives \(4, 4\), but the data has \(3, 4, 4\)"),
    ({}, {}, Traits(((1, 1, 8, 16), *ONE), buckets=99), r"gives \(4, 4\), but the data has \(4, 8\)"),
    ({}, {}, Traits(((2, 1, 8, 8),)), "model.channels gives 1, but the data has 2"),
    ({}, {}, Traits(ONE, text=7), "model.text_dim is null, .* texts of width 7: .*data.text=false"),
    ({"classes": 4}, {}, Traits(ONE), "model.classes gives 4, but the data has 5 classes"),
    ({}, {"labels": False}, Traits(ONE), "objective.labels is false, but model.classes is 5"),
    ({"learn_sigma": True}, {}, Traits(ONE), "model.learn_sigma is true, which only objective=ddpm trains"),
    ({}, {"brick": [2]}, Traits(ONE), r"objective.brick is \[2\]; it needs .* of the grid \[4, 4\]"),
    ({}, {"per_frame": True}, Traits(TWO, pack=32), "data.pack is 32, but objective.per_frame is true"),
    ({}, {"brick": [2, 2]}, Traits(TWO, pack=32), "data.pack is 32, but objective.brick is set"),
    (near, {}, Traits(TWO, pack=32), "data.pack is 32, but the mask is about a grid, which a row is not"),
    ({}, {"dropout": 0.0, "judge": ClipJudge(guidance=[2.0])}, Traits(ONE), "guidance is 2, but .*dropout"),
    ({}, {"judge": ClipJudge(sampler=DDIM())}, Traits(ONE), "ddim is for ddpm, not RectifiedFlow"),
    (
        {}, {"judge": ClipJudge(sampler=Ancestral(variance="learned")), "process": Diffusion()}, Traits(ONE),
        "variance is 'learned', but model.learn_sigma is false",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("model", "settings", "traits", "said"), REFUSED)
def test_what_cannot_be_is_refused_before_the_first_step(
    model: dict[str, Any], settings: dict[str, Any], traits: Traits, said: str
) -> None:
    objective = Denoise(small(**model), **{"process": RectifiedFlow(), **settings})
    with pytest.raises(ValueError, match=said):
        objective.context(Set(traits))  # type: ignore[arg-type]


def test_what_fits_has_a_context_and_a_placement() -> None:
    objective = Denoise(small(), process=RectifiedFlow(), judge=ClipJudge(guidance=[1.0, 2.0]))
    for traits, tokens in ((Traits(ONE), 16), (Traits(TWO, buckets=64), 16), (Traits(TWO, pack=40), 40)):
        data: Any = Set(traits)
        assert objective.context(data) == objective.placement(data, Single(), Full()).length == tokens
    text_only = VideoDiT([8, 8], 2, 1, 8, 1, 1, 8, text_dim=7)
    words = Denoise(text_only, process=RectifiedFlow(), labels=False)
    assert words.context(Set(Traits(ONE, text=7))) == 16  # type: ignore[arg-type]
    for made_so, said in (
        (lambda: ClipJudge(guidance=[]), "objective.judge.guidance is empty"),
        (lambda: ClipJudge(features="colours"), "objective.judge.features is 'colours'"),  # type: ignore[arg-type]
        (lambda: Traits(ONE, buckets=3, pack=3), "data.buckets=3, data.pack=3: set one of them to null"),
        (lambda: Traits(ONE, pack=0), "data.pack=0 must be a whole number of at least 1"),
    ):
        with pytest.raises(ValueError, match=said):
            made_so()


def write(root: Path) -> Path:
    """16 latents [1, 4, 4] and 12 of [1, 4, 8]."""
    root.mkdir()
    for name, shape, count in (("a", (1, 4, 4), 16), ("b", (1, 4, 8), 12)):
        np.savez(root / f"{name}.npz", latents=latents(count, *shape), labels=np.arange(count) % 3)
    return root


MODEL = (
    "model=dit", "model.size=[4,8]", "model.dim=16", "model.layers=2", "model.heads=2", "model.classes=3",
    "model.embedding=sincos", "+model.rope._target_=longspan.models.rope.GridRope",
)  # fmt: skip
NEAR = ("mask=neighborhood", "mask.grid=[2,4]", "mask.window=[2,3]", "mask.stride=1", "objective.brick=[2,2]")


@pytest.mark.parametrize(
    "overrides",
    [("data.buckets=16", "train.micro_batch=1", *NEAR), ("data.pack=13",)],
    ids=["buckets", "pack"],
)
def test_clips_of_several_shapes_train_the_same_on_other_ranks(
    world: Worlds, tmp_path: Path, overrides: tuple[str, ...]
) -> None:
    path = write(tmp_path / "latents")
    one = world(1)(trained, latent_config(path, "parallel=single", *MODEL, *overrides), tmp_path / "one")[0]
    assert one[2].shape == (6, 1, 1, 4, 8) and len(one[0]) == 2 and all(0 < x["loss"] < 3 for x in one[0])
    found = world(2)(trained, latent_config(path, "parallel=ulysses", *MODEL, *overrides), tmp_path / "two")
    for rows, evals, clips, _ in found:
        assert furthest(values(rows, "loss"), values(one[0], "loss")) < 2e-6
        assert furthest(values(rows, "grad_norm"), values(one[0], "grad_norm")) < 1e-5
        assert evals == pytest.approx(one[1], rel=2e-6) and np.abs(clips - one[2]).max() < 1e-4


def test_several_shapes_without_a_way_and_wrong_batches_are_refused(world: Worlds, tmp_path: Path) -> None:
    path = write(tmp_path / "latents")
    for overrides, said in (
        ((), "the data has clips of 2 shapes"),
        (("data.buckets=16",), "train.micro_batch is 2, but with data.buckets=16"),
    ):
        with pytest.raises(RankFailed, match=said):
            world(1)(trained, latent_config(path, "parallel=single", *MODEL, *overrides), tmp_path / "no")


def drawn(rank: int, cfg: Any, size: list[int]) -> Any:
    with processes(launch_of(rank), "cpu", 60.0) as device:
        job = build(cfg, launch_of(rank), device)
        for p in job.model.parameters():
            if p.requires_grad:
                torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(p.numel()))
        return draw(job, job.objective.judge().sampler, 2, 2.0, size=size).clips


def test_samples_may_be_larger_than_the_crops_of_training(world: Worlds, tmp_path: Path) -> None:
    window = ("mask=neighborhood", "mask.grid=[5,4,8]", "mask.window=[3,3,5]", "mask.stride=1")
    free = ("model.embedding=sincos", "model.dim=48", "objective.brick=[2,2,4]")
    cfg = config("parallel=single", *window, *free)
    one = world(1)(drawn, cfg, [3, 12, 20])[0]
    assert one.shape == (2, 1, 3, 12, 20) and one.std() > 0.1
    two = world(2)(drawn, config("parallel=s2", *window, *free), [3, 12, 20])
    assert all(np.abs(x - one).max() < 1e-4 for x in two)
    with pytest.raises(
        RankFailed, match=r"size is \[3, 12, 21\]; it needs a multiple of model.patch \[1, 2, 2\]"
    ):
        world(1)(drawn, cfg, [3, 12, 21])


def failing(rank: int) -> str:
    def work() -> None:
        raise ValueError("the disk is full")

    job: Any = SimpleNamespace(ranks=Ranks())
    assert on_first(job, lambda: 5) == (5 if rank == 0 else None)
    with pytest.raises(ValueError) as caught:
        on_first(job, work)
    return str(caught.value)


def test_what_fails_where_samples_are_measured_fails_everywhere(world: Worlds) -> None:
    assert world(2)(failing) == ["rank 0: the disk is full"] * 2
