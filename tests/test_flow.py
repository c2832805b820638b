"""Processes of diffusion: random numbers, times, mixing, targets, weights and a learned variance."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from denoising import PROCESSES, objective
from longspan.train.diffusion.batch import Noisy
from longspan.train.objective.ddpm import Diffusion
from longspan.train.objective.denoise import Denoise
from longspan.train.objective.flow import RectifiedFlow
from longspan.train.objective.noise import Key, Stream, bits, normal, uniform
from longspan.train.objective.process import Process
from longspan.train.objective.variance import _level_likelihood, split


def test_random_numbers_are_written_down() -> None:
    # other numbers would break every resume
    assert bits(2, Key(7, Stream.NOISE, 3)).tolist() == GOLDEN
    assert len(
        {bits(1, Key(s, k, i, n))[0] for s in range(3) for k in Stream for i in range(3) for n in (0, 1)}
    ) == (3 * len(Stream) * 3 * 2)
    # a longer draw begins with the shorter one
    assert bits(9, Key(0, Stream.TIME, 0))[:2].tolist() == bits(2, Key(0, Stream.TIME, 0)).tolist()


GOLDEN = [18433488244966777507, 14597912321509443220]


def test_noise_is_normal_and_independent() -> None:
    keys = [Key(0, Stream.NOISE, i) for i in range(64)]
    x = normal(keys, (32, 63)).double().flatten(1)
    assert x.shape == (64, 32 * 63)
    # 129,024 numbers: five standard errors each
    assert abs(float(x.mean())) < 5 / math.sqrt(x.numel())
    assert abs(float((x**2).mean()) - 1) < 5 * math.sqrt(2 / x.numel())
    assert abs(float((x**4).mean()) - 3) < 5 * math.sqrt(96 / x.numel())
    cross = torch.corrcoef(x).fill_diagonal_(0)
    assert float(cross.abs().max()) < 5.5 / math.sqrt(x.shape[1])
    u = uniform(keys, 2000)
    assert float(u.min()) >= 0 and float(u.max()) < 1 and abs(float(u.mean()) - 0.5) < 0.005


def test_flow_times_have_their_distribution() -> None:
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5)[None] / 10_000
    tokens = torch.tensor(16)
    assert torch.allclose(RectifiedFlow(times="uniform").time(u, tokens).double(), u, atol=1e-6)
    t = RectifiedFlow(mean=0.5, std=2.0).time(u, tokens).double().logit()
    assert float(t.mean()) == pytest.approx(0.5, abs=1e-2) and float(t.std()) == pytest.approx(2.0, abs=1e-2)
    # Esser et al. 2024: a shift moves the logit, and grows with the root of the tokens
    for process, shift in (
        (RectifiedFlow(shift=3.0), 3.0),
        (RectifiedFlow(shift=3.0, shift_tokens=4), 6.0),
        (RectifiedFlow(shift=1.0, shift_tokens=64), 0.5),
    ):
        moved = process.time(u, tokens).double()
        plain = torch.special.ndtri(u)
        assert torch.allclose(moved.logit(), plain + math.log(shift), atol=1e-2)
    sizes = torch.tensor([[4, 16, 64]])
    each = RectifiedFlow(times="uniform", shift_tokens=16).time(torch.full((1, 3), 0.5), sizes)
    assert torch.allclose(each, torch.tensor([[1 / 3, 1 / 2, 2 / 3]]))


def test_chains_are_the_published_ones() -> None:
    linear, cosine = Diffusion().alpha_bar, Diffusion(schedule="cosine").alpha_bar
    by_hand = 1.0
    for i in range(1000):
        by_hand *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        assert float(linear[i]) == pytest.approx(by_hand, rel=1e-12)
    f = [math.cos((i / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(1001)]
    assert cosine[:-1].tolist() == pytest.approx([f[i + 1] / f[0] for i in range(999)], rel=1e-9)
    assert float(cosine[-1] / cosine[-2]) == pytest.approx(0.001)
    u = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    assert Diffusion().time(u, torch.tensor(1)).tolist() == [i // 2 for i in range(2000)]
    snr = linear / (1 - linear)
    t = torch.arange(1000)
    for prediction, by in (("eps", snr), ("v", snr + 1)):
        weight = Diffusion(prediction=prediction, min_snr=5.0).weight(t.double())  # type: ignore[arg-type]
        assert torch.allclose(weight, snr.clamp(max=5.0) / by, rtol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_a_perfect_answer_gives_back_data_and_noise(name: str) -> None:
    process = PROCESSES[name]
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 6, 5, 4, generator=generator, dtype=torch.float64)
    t = process.time(torch.linspace(0.05, 0.95, 6, dtype=torch.float64), torch.tensor(5))[
        :, None, None
    ].double()
    mixed, target = process.mix(x, noise, t), process.target(x, noise, t)
    assert torch.allclose(process.clean(mixed, target, t), x, atol=1e-9)
    assert torch.allclose(process.noise(mixed, target, t), noise, atol=1e-9)
    assert float(process.clock(t).min()) >= 0 and float(process.clock(t).max()) <= 1000
    # an error in the answer is one in the data, weighted as the process says
    if isinstance(process, Diffusion) and process.min_snr:
        wrong = target + 0.1
        a = process.alpha_bar[t.long()]
        error = (process.clean(mixed, wrong, t) - x) ** 2 * (a / (1 - a)).clamp(max=process.min_snr)
        assert torch.allclose(process.weight(t) * (wrong - target) ** 2, error, atol=1e-9)


class Learner(nn.Module):
    """Says a fixed mean and a learned raw variance, channel by channel."""

    def __init__(self, mean: Tensor, raw: float) -> None:
        super().__init__()
        self.mean, self.raw = nn.Parameter(mean), nn.Parameter(torch.tensor(raw, dtype=torch.float64))

    def forward(self, x: Tensor, positions: Tensor, t: Tensor, y: Tensor, attend: Any) -> Tensor:
        both = torch.stack((self.mean.unflatten(-1, (-1, 3)), self.raw.expand(*x.shape[:2], 4, 3)), -2)
        return both.flatten(-3)


def learner(process: Process, raw: float = 0.3, t: int = 500) -> tuple[Learner, Tensor, Noisy]:
    generator = torch.Generator().manual_seed(0)
    clean, noise, mean = torch.randn(3, 1, 5, 12, generator=generator, dtype=torch.float64)
    at, real = torch.full((1,), float(t)), torch.ones(1, 5, dtype=torch.bool)
    part = Noisy(clean.clamp(-1, 1), noise, real, at, torch.zeros(1), torch.arange(5), 3)
    model = Learner(mean, raw)
    return model, Denoise(model, process=process).errors(part, lambda q, k, v, mask: q), part


@pytest.mark.parametrize("t", [1, 500, 999])
def test_a_learned_variance_is_trained_by_the_bound(t: int) -> None:
    process = Diffusion()
    model, errors, part = learner(process, t=t)
    now, then = float(process.alpha_bar[t]), float(process.alpha_bar[t - 1])
    beta = 1 - now / then
    posterior = beta * (1 - then) / (1 - now)
    variance = math.exp(0.65 * math.log(beta) + 0.35 * math.log(posterior))
    mixed = now**0.5 * part.tokens + (1 - now) ** 0.5 * part.noise
    guess = (mixed - (1 - now) ** 0.5 * model.mean.detach()) / now**0.5
    means = [
        (then**0.5 * beta * x + (now / then) ** 0.5 * (1 - then) * mixed) / (1 - now)
        for x in (part.tokens, guess)
    ]
    normals = [
        torch.distributions.Normal(m, v**0.5) for m, v in zip(means, (posterior, variance), strict=True)
    ]
    divergence = torch.distributions.kl_divergence(*normals) / math.log(2)
    want = ((model.mean.detach() - part.noise) ** 2 + divergence).mean(-1)
    assert torch.allclose(errors.detach(), want, rtol=1e-8)
    errors.sum().backward()
    # the mean learns from the squared error alone
    assert model.mean.grad is not None and model.raw.grad is not None
    assert torch.allclose(model.mean.grad, 2 * (model.mean.detach() - part.noise) / 12, rtol=1e-9)
    assert float(model.raw.grad) != 0


def test_the_last_step_back_is_a_likelihood_of_grey_levels() -> None:
    model, errors, part = learner(Diffusion(), t=0)
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean, spread in ((0.2, -6.0), (1.3, -3.0)):
        levels = _level_likelihood(x, torch.full_like(x, mean), torch.full_like(x, spread)).exp()
        assert float(levels.sum()) == pytest.approx(1.0, abs=1e-6)
    assert bool(errors.isfinite().all())
    errors.sum().backward()
    assert model.raw.grad is not None and bool(model.raw.grad.isfinite())


WRONG: list[tuple[Any, str]] = [
    (lambda: RectifiedFlow(times="beta"), "process.times is 'beta'"),  # type: ignore[arg-type]
    (lambda: RectifiedFlow(std=0), "std 0"),
    (lambda: RectifiedFlow(shift=0), "shift is 0"),
    (lambda: RectifiedFlow(shift_tokens=0), "shift_tokens is 0"),
    (lambda: Diffusion(schedule="sqrt"), "schedule is 'sqrt'"),  # type: ignore[arg-type]
    (lambda: Diffusion(prediction="x"), "prediction is 'x'"),  # type: ignore[arg-type]
    (lambda: Diffusion(steps=20), "steps is 20"),
    (lambda: Diffusion(min_snr=0), "min_snr is 0"),
    (lambda: objective(dropout=1.0), "dropout is 1.0"),
    (lambda: objective(seed=-1), "seed is -1"),
    (lambda: split(torch.zeros(1, 1, 12), 4, 1), "12 features a token of 4"),
]


@pytest.mark.parametrize(("make", "told"), WRONG)
def test_wrong_settings_are_named(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
