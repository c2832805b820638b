"""Sampling: the cache against the full forward, which tokens may be drawn, and prompts as they were typed."""

import contextlib
import io
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from jobs import config, launch_of, whole
from longspan.kernels.mask import And, Causal, First, Mask, Or, Window
from longspan.models.gpt import GPT
from longspan.models.rope import Rope
from longspan.parallel.placement import contiguous
from longspan.parallel.single import Single
from longspan.train.batch import bind
from longspan.train.config import made, typed
from longspan.train.job import build_model
from longspan.train.sample import Cache, Sampling, choose, generate, logits, quoted, sample
from longspan.train.trained import config_of, load_weights
from world import Worlds

VOCAB, LENGTH = 17, 26
SINKS = And(Causal(), Or(Window(left=5, right=0), First(2)))


def model(mask: Mask) -> GPT:
    """A small model that uses everything that a cache could get wrong."""
    torch.manual_seed(0)
    yarn = Rope(scaling="yarn", factor=2.0, original=16)
    made = GPT(
        VOCAB, 32, 3, 4, 48, kv_heads=2, qk_norm=True, predecessor=True, mask=mask, rope=yarn, init_std=0.2
    )  # fmt: skip
    return made.eval()


def text() -> list[int]:
    drawn: list[int] = torch.randint(VOCAB, (LENGTH,), generator=torch.Generator().manual_seed(1)).tolist()
    return drawn


def full(made: GPT, ids: list[int], begin: int) -> Tensor:
    """Logits [tokens, vocab] of one forward over two packed documents, the second from `begin` on."""
    previous = [-1 if i in (0, begin) else ids[i - 1] for i in range(len(ids))]
    attend = bind(Single(), contiguous(len(ids), 1))
    at, offsets = torch.arange(len(ids)), ((0, begin) if begin else (0,),)
    with torch.no_grad():
        hidden = made(torch.tensor([ids]), at, attend, offsets=offsets, previous=torch.tensor([previous]))
        scores: Tensor = made.head(hidden[0])
    return scores


def settings(**changed: Any) -> DictConfig:
    return OmegaConf.create({**asdict(Sampling()), **changed})


@pytest.mark.parametrize(
    "mask", [Causal(), Window(left=6, right=0), SINKS], ids=["causal", "window", "sinks"]
)
@pytest.mark.parametrize("begin", [0, 7])
@pytest.mark.parametrize(
    "pieces", [[1] * LENGTH, [LENGTH], [9, 1, 1, 8, 1, 6]], ids=["each", "whole", "mixed"]
)
def test_the_cache_gives_what_the_full_forward_gives(mask: Mask, begin: int, pieces: list[int]) -> None:
    made, ids = model(mask), text()
    want = full(made, ids, begin)[begin:]
    cache, parts, at = Cache(), [], begin
    for piece in pieces:
        new = ids[at : at + piece]
        if new:
            parts.append(logits(made, cache, new, ids[at - 1] if at > begin else -1))
        at += piece
    got = torch.cat(parts)
    assert got.shape == want.shape == (LENGTH - begin, VOCAB)
    assert (got - want).abs().max() < 1e-5
    # or there is nothing to get wrong
    assert want.std() > 0.5


def smallest_set(scores: Tensor, top_p: float) -> set[int]:
    """The most likely tokens that together have `top_p`, counted one by one."""
    share, kept = 0.0, set()
    p = scores.double().softmax(-1)
    for token in p.argsort(descending=True).tolist():
        if share >= top_p:
            break
        share += float(p[token])
        kept.add(token)
    return kept


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999, 1.0])
def test_top_p_draws_from_the_smallest_set_in_proportion(top_p: float) -> None:
    scores = torch.randn(8, generator=torch.Generator().manual_seed(2))
    generator = torch.Generator().manual_seed(3)
    count = 4000
    drawn = [choose(scores, temperature=1.0, top_p=top_p, generator=generator) for _ in range(count)]
    allowed = smallest_set(scores, top_p)
    assert set(drawn) == allowed
    p = scores.double().softmax(-1)
    inside = float(p[sorted(allowed)].sum())
    for token in allowed:
        share = float(p[token]) / inside
        assert abs(drawn.count(token) / count - share) < 5 * (share * (1 - share) / count) ** 0.5 + 1e-9


def test_temperature_flattens_and_sharpens() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0])

    def share(temperature: float) -> float:
        generator = torch.Generator().manual_seed(4)
        drawn = [choose(scores, temperature=temperature, top_p=1.0, generator=generator) for _ in range(2000)]
        return drawn.count(0) / len(drawn)

    for temperature in (0.25, 1.0, 4.0):
        assert share(temperature) == pytest.approx(float((scores / temperature).softmax(-1)[0]), abs=0.05)
    assert share(0.0) == 1.0


def test_greedy_generation_follows_the_full_forward() -> None:
    made, prompt = model(SINKS), text()[:4]
    got = list(generate(made, prompt, settings(temperature=0.0, tokens=12)))
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(full(made, ids, 0)[-1].argmax()))
    assert got == ids[4:]


def test_the_seed_decides_the_text() -> None:
    made, prompt = model(Causal()), text()[:4]

    def drawn(seed: int) -> list[int]:
        return list(generate(made, prompt, settings(temperature=2.0, top_p=1.0, tokens=20, seed=seed)))

    assert drawn(1) == drawn(1) != drawn(2)
    assert len(drawn(1)) == 20 and all(0 <= token < VOCAB for token in drawn(1))


@pytest.mark.parametrize(
    "changed", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.5}, {"tokens": 0}, {"top_p": float("nan")}]
)
def test_numbers_that_cannot_be_are_refused(changed: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="they need temperature >= 0, 0 < top_p <= 1, tokens >= 1"):
        next(generate(model(Causal()), [1], settings(**changed)))


@pytest.mark.parametrize(
    "prompt",
    [
        "def main(", "a, b = [c] {d: 1}", "it's \"x\"", "'quoted'", '"quoted"', "ends with \\", 'quote \\" b',
        "${seed} \\${seed} \\\\${", "null", "12", "two\nlines\t", "=x=", "# é 你好", " space ", '\\"${x}\\',
    ],
)  # fmt: skip
def test_a_prompt_is_taken_as_it_is(prompt: str) -> None:
    with initialize_config_module("longspan.conf", version_base="1.3"):
        cfg = compose("sample", overrides=["run.dir=x", quoted(f"prompt={prompt}")])
    assert typed(cfg, Sampling).prompt == prompt


@pytest.mark.parametrize("argument", ["seed=3", "run.dir=a b", "prompt", "--cfg", "prompts=a,b"])
def test_other_words_are_left_alone(argument: str) -> None:
    assert quoted(argument) == argument


def spoken(rank: int, folder: Path, prompt: str, tokens: int) -> tuple[str, str]:
    """What the command prints, and the same greedy text from full forwards of the loaded model."""
    cfg = settings(run={"root": "runs", "name": None, "dir": str(folder)}, prompt=prompt, tokens=tokens)
    cfg.temperature = 0.0
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert sample(cfg, launch_of(rank)) == 0
    config = config_of(folder)
    data = made(config.data)
    gpt = build_model(config, data, made(config.mask)).eval()
    assert isinstance(gpt, GPT)
    warned: list[str] = []
    assert load_weights(folder, "auto", gpt, warned.append, cfg=config) == 3 and not warned
    ids = data.encode(prompt)
    for _ in range(tokens):
        ids.append(int(full(gpt, ids, 0)[-1].argmax()))
    return printed.getvalue(), prompt + data.decode(ids[len(data.encode(prompt)) :]) + "\n"


def unspoken(rank: int, folder: Path) -> str:
    with pytest.raises(ValueError) as caught:
        spoken(rank, folder, "", 12)
    return str(caught.value)


def test_a_trained_run_speaks(world: Worlds, tmp_path: Path) -> None:
    run = tmp_path / "run"
    small = ("parallel=single", f"data.cache={tmp_path / 'cache'}", "train.steps=3", "eval.final=0")
    assert world(1)(whole, config(*small, f"run.dir={run}", "optim.lr=3e-2")) == [0]
    printed, want = world(1)(spoken, run, "def main(é", 12)[0]
    assert printed == want and printed.startswith("def main(é")
    said = world(1)(unspoken, run)[0]
    assert said == "prompt is empty; give at least one character"
