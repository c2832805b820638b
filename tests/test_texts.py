"""Texts beside the clips: read, padded, told to the model, dropped, counted, and sampled with."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from torch.utils.flop_counter import FlopCounterMode

from clip_jobs import latent_config, trained
from clips import every, latents, npy, write_tar
from diffusion import Case, dense, given, made
from jobs import furthest, launch_of, values
from longspan.kernels.mask import Full
from longspan.parallel.single import Single
from longspan.train.batch import bind
from longspan.train.config import typed
from longspan.train.data.clip import Clip
from longspan.train.data.latents import Latents
from longspan.train.diffusion.batch import collate
from longspan.train.diffusion.samplers import DDIM, Ancestral, Euler, Heun
from longspan.train.diffusion.text import Text
from longspan.train.draw import Drawing, chosen
from longspan.train.drawing import asked
from longspan.train.job import build, processes
from longspan.train.judge_clips import ClipJudge
from longspan.train.loop import fingerprint
from longspan.train.objective.denoise import Denoise
from longspan.train.objective.flow import RectifiedFlow
from world import Worlds

GRID = (2, 3, 4)
AT = torch.arange(24)
COUNT, WORDS, WIDTH = 12, 5, 6
LENGTHS = np.arange(COUNT) % WORDS + 1


def write(root: Path, fill: float = 0.0) -> Path:
    """Twelve latents [1, 4, 4] of three classes with texts of 1 to 5 words, padded with `fill`."""
    text = latents(COUNT, WORDS, WIDTH)
    text[np.arange(WORDS) >= LENGTHS[:, None]] = fill
    root.mkdir()
    np.savez(
        root / "a.npz", latents=latents(COUNT, 1, 4, 4), labels=np.arange(COUNT) % 3, text=text,
        text_lengths=LENGTHS, pooled=latents(COUNT, 4),
    )  # fmt: skip
    return root


def test_padded_joint_text_does_not_matter() -> None:
    """Whatever fills it: no bit of the output or of a gradient changes; and it is the text without it."""
    case, found = Case("mmdit", "", GRID), []
    for fill in (0.0, 1e3):
        model = made(case)
        x = given(case, model)
        x["text"][1, 2:] = fill
        x["text"].requires_grad_()
        rest = {"text": x["text"], "pooled": x["pooled"]}
        out = model(x["tokens"], AT, x["t"], x["y"], dense, lengths=(3, 2), **rest)
        out.backward(x["dout"])
        assert x["text"].grad is not None and x["text"].grad[1, 2:].eq(0).all()
        found.append([out.detach(), x["text"].grad, *(p.grad for p in model.parameters())])
    assert all(a is not None and b is not None and a.equal(b) for a, b in zip(*found, strict=True))
    rows = (x[name][1:] for name in ("t", "y"))
    cut = {"text": x["text"][1:, :2], "pooled": x["pooled"][1:]}
    assert torch.allclose(model(x["tokens"][1:], AT, *rows, dense, **cut), out[1:], atol=1e-12)


def test_multiply_adds_are_those_that_torch_counts() -> None:
    model = made(Case("mmdit", "", GRID), mask=Full())
    x = given(Case("mmdit", "", GRID), model)
    one = {name: value[:1] for name, value in x.items()}
    with FlopCounterMode(display=False) as counted:
        model(one["tokens"], AT, one["t"], one["y"], dense, text=one["text"], pooled=one["pooled"])
    assert counted.get_total_flops() == 2 * model.macs(text=3)
    masked = model.macs(text=3, pairs=[24 * 6, 24 * 24])
    assert model.macs(text=3) - masked == 2 * model.dim * 24 * 18


def test_the_padding_of_a_file_is_left_out(tmp_path: Path) -> None:
    sets: list[Latents] = []
    for name, fill in (("zero", 0.0), ("full", 1e3)):
        sets.append(Latents(path=write(tmp_path / name, fill), cache=tmp_path / "c", held_out=0.25))
    for a, b in zip(*map(every, sets), strict=True):
        assert a.text is not None and b.text is not None and a.pooled is not None
        assert a.text.shape == b.text.shape and np.array_equal(a.text, b.text) and np.abs(b.text).max() < 100
    assert sets[0].traits.text == WIDTH and sets[0].traits.pooled == 4
    parts = (sets[0], sets[0].held_out())
    assert {len(c.text) for part in parts for c in every(part) if c.text is not None} == {
        1, 2, 3, 4, 5,
    }  # fmt: skip
    mute = Latents(path=tmp_path / "full", cache=tmp_path / "c", text=False)
    assert mute.traits.text is None and mute.item(0).text is None and mute.item(0).pooled is None
    members = {"0.npy": npy(latents(1, 1, 4, 4)[0]), "0.text.npy": npy(latents(1, 3, WIDTH)[0])}
    members |= {"1.npy": npy(latents(2, 1, 4, 4)[1]), "1.text.npy": npy(latents(2, 7, WIDTH)[1])}
    (tmp_path / "tar").mkdir()
    write_tar(
        tmp_path / "tar" / "a.tar", members | {"2.npy": members["0.npy"], "2.text.npy": npy(np.zeros(3))}
    )
    tarred = Latents(path=tmp_path / "tar", cache=tmp_path / "c", held_out=0.5)
    words = [p.item(0).text for p in (tarred, tarred.held_out())]
    assert {len(x) for x in words if x is not None} == {3, 7}
    assert "the text's shape (3,) is not [J, E]" in tarred.describe()["bad_records"][0]["reason"]


@pytest.mark.parametrize("name", ["vdit", "mmdit"])
def test_what_fills_a_batch_does_not_matter(name: str) -> None:
    """From the batch to the loss: padding of any content, and no text is one word of zeros."""
    model = made(Case(name, "", (1, 2, 2)), mask=Full())
    clips = [
        Clip(x, 1, latents(3, n, WIDTH)[0], latents(n, 4)[0] if name == "mmdit" else None)
        for x, n in zip(latents(2, 1, 2, 4, 4), (2, 5), strict=True)
    ]
    denoise = Denoise(model, process=RectifiedFlow(), dropout=0.5)
    clean = collate(clips, [0, 1], patch=(2, 2, 2), null=5)
    assert isinstance(clean.text, Text) and clean.text.lengths == (2, 5)
    losses = []
    for fill in (0.0, 1e3):
        clean.text.states[0, 2:] = fill
        noisy = denoise.noisy(clean)
        layout = Single()
        placement = layout.place(noisy.length, Full())
        part = noisy.held(layout, placement, torch.device("cpu"))
        losses.append(denoise.losses(part, bind(layout, placement)))
    assert losses[0].equal(losses[1])
    none = clean.text.none()
    assert none.lengths == (1, 1) and none.states.eq(0).all()


MODELS = {
    "mmdit": ["model=mmdit", "model.size=[4,4]", "model.dim=24", "model.double=1", "model.single=1",
              "model.heads=2", "model.pooled_dim=4", "objective.labels=false"],
    "vdit": ["model=vdit", "model.size=[1,4,4]", "model.dim=24", "model.layers=1", "model.heads=2",
             "model.classes=3"],
}  # fmt: skip


@pytest.mark.parametrize("name", ["mmdit", pytest.param("vdit", marks=pytest.mark.slow)])
def test_a_job_with_texts_trains_and_is_sampled(name: str, world: Worlds, tmp_path: Path) -> None:
    path = write(tmp_path / "latents", 1e3)
    if name == "vdit":
        data = dict(np.load(path / "a.npz"))
        del data["pooled"]
        np.savez(path / "a.npz", **data)
    overrides = [*MODELS[name], f"model.text_dim={WIDTH}"]
    one = world(1)(trained, latent_config(path, "parallel=single", *overrides), tmp_path / "one")[0]
    assert one[2].shape == (6, 1, 1, 4, 4) and np.isfinite(one[2]).all()
    for found in world(2)(trained, latent_config(path, "parallel=ring", *overrides), tmp_path / "two"):
        assert furthest(values(found[0], "loss"), values(one[0], "loss")) < 2e-6
        assert np.abs(found[2] - one[2]).max() < 1e-4


def flops_of(rank: int, cfg: Any) -> tuple[float, list[float]]:
    with processes(launch_of(rank), "cpu", 60.0) as device:
        job = build(cfg, launch_of(rank), device)
        batch: Any = job.objective.load(job.data, [0, 1], 0)
        each = [6.0 * job.model.macs(4, [16, 16], text=n) for n in batch.text.lengths]
        return job.objective.flops([batch]), each


def test_a_step_s_work_counts_the_words_and_weights_may_be_bfloat16(world: Worlds, tmp_path: Path) -> None:
    cfg = latent_config(write(tmp_path / "latents"), *MODELS["mmdit"], f"model.text_dim={WIDTH}")
    ((whole, each),) = world(1)(flops_of, cfg)
    assert whole == sum(each)
    low = ("parallel=single", "engine=fsdp", "engine.param_dtype=bfloat16", "train.steps=1")
    cfg = latent_config(tmp_path / "latents", *MODELS["mmdit"], f"model.text_dim={WIDTH}", *low)
    rows, _, clips, _ = world(1)(trained, cfg, tmp_path / "low")[0]
    assert np.isfinite(rows[0]["loss"]) and np.isfinite(clips).all()


def test_samples_are_asked_for_with_texts_that_training_never_saw(tmp_path: Path) -> None:
    data = Latents(path=write(tmp_path / "latents"), cache=tmp_path / "c", held_out=0.5)
    held = [c for c in every(data.held_out())]
    labels, clips = asked(data, 8, [])
    assert [c.label for c in clips] == list(labels) == [held[i % 6].label for i in range(8)]
    label = held[0].label
    labels, clips = asked(data, 3, [label])
    assert labels == (label,) * 3 and {c.label for c in clips} == {label}
    assert clips[0].text is not None and held[0].text is not None
    assert np.array_equal(clips[0].text, held[0].text)
    with pytest.raises(ValueError, match="labels holds 9, but no held-out clip of that class"):
        asked(data, 3, [9])


def test_another_scale_is_another_data_set(tmp_path: Path) -> None:
    path, hashes = write(tmp_path / "latents"), set[str]()
    settings: list[dict[str, Any]] = [{}, {"scale": 2.0}, {"shift": 0.5}, {"text": False}, {"buckets": 64}]
    for each in [*settings, *settings]:
        data = Latents(path=path, cache=tmp_path / "c", **each)
        job: Any = SimpleNamespace(data=data, cfg=SimpleNamespace(seed=0))
        hashes.add(fingerprint(job))
    assert len(hashes) == 5


def test_the_sampler_and_its_steps_can_be_chosen() -> None:
    judge = ClipJudge(sampler=Euler(steps=7))
    for words, want in (
        ([], Euler(steps=7)), (["steps=3"], Euler(steps=3)), (["sampler=heun"], Heun()),
        (["sampler=ddim", "steps=9", "sampler.eta=0.5", "size=[8,8]"], DDIM(steps=9, eta=0.5)),
        (["sampler=ancestral"], Ancestral()),
    ):  # fmt: skip
        with initialize_config_module("longspan.conf", version_base="1.3"):
            cfg = typed(compose("draw", overrides=["run.dir=x", *words]), Drawing)
        assert chosen(cfg, judge) == want
