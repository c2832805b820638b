"""Samplers against closed forms, guidance, and that ranks make the samples of one device."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cells import build
from longspan.kernels.mask import Full
from longspan.parallel.single import Single
from longspan.train.diffusion.generate import Request, generate
from longspan.train.diffusion.samplers import DDIM, Ancestral, Euler, Heun, Sampler, chain_times, flow_times
from longspan.train.objective.ddpm import Diffusion
from longspan.train.objective.denoise import Denoise
from longspan.train.objective.flow import RectifiedFlow
from longspan.train.objective.noise import Key, Stream, normal
from longspan.train.objective.process import Process
from world import Worlds

MEAN, DEVIATION = 0.7, 0.4
CPU = torch.device("cpu")


def start() -> Tensor:
    return normal([Key(0, Stream.START, i) for i in range(4)], (6, 5)).double()


def fresh(step: int) -> Tensor:
    return normal([Key(0, Stream.STEP, i, step) for i in range(4)], (6, 5)).double() if step else start()


def gaussian(process: Process) -> Any:
    """What a perfect model says where all data is normal, with MEAN and DEVIATION."""

    def predict(x: Tensor, t: float) -> tuple[Tensor, None]:
        at = torch.tensor(t, dtype=torch.float64)
        one, zero = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        data, dirt = process.mix(one, zero, at), process.mix(zero, one, at)
        spread = (data * DEVIATION) ** 2 + dirt**2
        clean = MEAN + data * DEVIATION**2 / spread * (x - data * MEAN)
        noise = dirt / spread * (x - data * MEAN)
        return process.target(clean, noise, at), None

    return predict


def flow_error(sampler: Sampler, process: RectifiedFlow) -> float:
    # the flow carries each quantile of the noise to the same quantile of the data
    found = sampler(gaussian(process), fresh, process, 6)
    return float((found - (MEAN + DEVIATION * start())).abs().max())


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_solvers_of_the_flow_have_their_order(shift: float) -> None:
    process = RectifiedFlow(shift=shift)
    for kind, order, last in ((Euler, 1, 3e-2), (Heun, 2, 2e-3)):
        errors = [flow_error(kind(steps=n), process) for n in (40, 80, 160)]
        rates = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
        assert all(abs(rate - order) < 0.25 for rate in rates), (kind, rates)
        assert errors[-1] < last


def test_times_follow_the_shift_of_training() -> None:
    assert flow_times(RectifiedFlow(), 4, 1) == pytest.approx([1, 0.75, 0.5, 0.25, 0])
    assert flow_times(RectifiedFlow(shift=3), 4, 1) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    assert flow_times(RectifiedFlow(shift_tokens=4), 2, 16) == pytest.approx([1, 2 / 3, 0])
    assert chain_times(Diffusion(), 5) == [999, 749, 500, 250, 0, -1]
    assert chain_times(Diffusion(), 1) == [999, -1]
    assert chain_times(Diffusion(steps=50), 50) == [*range(49, -1, -1), -1]


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_ddim_carries_quantiles_to_quantiles(schedule: Any, prediction: Any) -> None:
    process = Diffusion(schedule=schedule, prediction=prediction)
    a = float(process.alpha_bar[-1])
    # where the chain ends noise is not all that is left
    score = (start() - a**0.5 * MEAN) / (a * DEVIATION**2 + 1 - a) ** 0.5
    errors = [
        float((DDIM(steps=n)(gaussian(process), fresh, process, 6) - (MEAN + DEVIATION * score)).abs().max())
        for n in (50, 250)
    ]
    assert errors[1] < errors[0] < 0.2 and errors[1] < 0.05


def test_ddim_with_all_its_noise_is_ancestral() -> None:
    process = Diffusion(schedule="cosine", prediction="v")
    for clip in (None, 1.0):
        one, two = (
            s(gaussian(process), fresh, process, 6)
            for s in (DDIM(steps=40, eta=1.0, clip=clip), Ancestral(steps=40, clip=clip))
        )
        assert torch.allclose(one, two, atol=1e-6), (one - two).abs().max()
    assert not torch.allclose(one, DDIM(steps=40, clip=1.0)(gaussian(process), fresh, process, 6), atol=1e-2)


@pytest.mark.parametrize("variance", ["posterior", "beta"])
def test_ancestral_samples_have_the_data_s_moments(variance: Any) -> None:
    process = Diffusion(schedule="cosine")
    generator = torch.Generator().manual_seed(0)

    def many(step: int) -> Tensor:
        return torch.randn(1, 200, 100, generator=generator, dtype=torch.float64)

    found = Ancestral(steps=100, variance=variance)(gaussian(process), many, process, 400)
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(found.std()) == pytest.approx(DEVIATION, abs=0.02)


def test_a_learned_variance_lies_between_its_ends() -> None:
    process = Diffusion(schedule="cosine")

    def ends(raw: float, variance: Any) -> Tensor:
        def predict(x: Tensor, t: float) -> tuple[Tensor, Tensor]:
            return gaussian(process)(x, t)[0], torch.full_like(x, raw)

        return Ancestral(steps=30, variance=variance)(predict, fresh, process, 6)

    assert torch.allclose(ends(-1.0, "learned"), ends(0.0, "posterior"), atol=1e-9)
    assert torch.allclose(ends(1.0, "learned"), ends(0.0, "beta"), atol=1e-9)
    with pytest.raises(ValueError, match="the model learns none"):
        Ancestral(steps=30, variance="learned")(gaussian(process), fresh, process, 6)


class Small(nn.Module):
    """Attention over the sample and a table of classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.table = nn.Linear(5, 15), nn.Embedding(4, 5)

    def forward(self, x: Tensor, positions: Tensor, t: Tensor, y: Tensor, attend: Any) -> Tensor:
        q, k, v = self.inner(x + torch.sin(positions)[:, None].to(x.dtype)).chunk(3, -1)
        seen = attend(q[:, :, None], k[:, :, None], v[:, :, None], Full())[:, :, 0]
        return seen * (t[:, None, None].to(x.dtype) / 1000.0) + self.table(y)[:, None]


def request(**settings: Any) -> Request:
    usual: dict[str, Any] = {"labels": (0, 1, 2), "shape": (7, 5), "null": 3, "guidance": 1.5}
    return Request(**usual | settings)


SAMPLERS: list[tuple[Process, Sampler]] = [
    (RectifiedFlow(shift=2.0), Euler(steps=4)),
    (RectifiedFlow(), Heun(steps=3)),
    (Diffusion(), DDIM(steps=4, eta=0.5, clip=2.0)),
    (Diffusion(prediction="v"), Ancestral(steps=4)),
]


def samples(rank: int, size: int, name: str, case: int, bricks: bool = False) -> Tensor:
    process, sampler = SAMPLERS[case]
    denoise = Denoise(Small().double(), process=process)
    layout = build(name, size) if size > 1 else Single()
    asked = request(bricks=((7,), (2,), (3,)) if bricks else None)
    return generate(denoise, sampler, asked, layout=layout, mask=Full(), device=CPU)


@pytest.mark.parametrize(
    ("case", "name"), [*((i, "ring/zigzag") for i in range(len(SAMPLERS))), (0, "ulysses")]
)
def test_ranks_sample_what_one_device_does(case: int, name: str, world: Worlds) -> None:
    want = samples(0, 1, "", case)
    assert want.shape == (3, 7, 5)
    for found in world(3)(samples, 3, name, case):
        assert float((found - want).norm() / want.norm()) < 1e-10


@pytest.mark.parametrize("case", range(len(SAMPLERS)))
def test_bricks_do_not_matter(case: int) -> None:
    plain, bricks = samples(0, 1, "", case), samples(0, 1, "", case, bricks=True)
    assert torch.allclose(plain, bricks, atol=1e-9)


def made(asked: Request, case: int = 3) -> Tensor:
    process, sampler = SAMPLERS[case]
    denoise = Denoise(Small().double(), process=process)
    return generate(denoise, sampler, asked, layout=Single(), mask=Full(), device=CPU)


def test_a_sample_is_a_function_of_seed_and_index() -> None:
    whole = made(request())
    assert torch.allclose(made(request(labels=(1, 2), first=1)), whole[1:], atol=1e-12)
    assert not torch.allclose(made(request(seed=1)), whole, atol=1e-2)
    assert not torch.equal(request().noise(0), request().noise(1))


def test_guidance_goes_from_none_through_the_condition_and_beyond() -> None:
    # Euler with one step is linear in what the model says
    SAMPLERS.append((RectifiedFlow(), Euler(steps=1)))
    none, asked, beyond = (made(request(guidance=g), case=-1) for g in (0.0, 1.0, 3.0))
    SAMPLERS.pop()
    assert torch.allclose(beyond - none, 3 * (asked - none), atol=1e-9)
    assert torch.allclose(made(request(labels=(3, 3, 3))), made(request(guidance=0.0)), atol=1e-12)


def test_sampling_leaves_the_mode_and_the_gradients_alone() -> None:
    denoise = Denoise(Small(), process=RectifiedFlow()).train()
    settings: dict[str, Any] = {"layout": Single(), "mask": Full(), "device": CPU}
    found = generate(denoise, Euler(steps=2), request(), **settings)
    assert denoise.training and found.dtype == torch.float32 and not found.requires_grad
    with pytest.raises(ValueError, match="for ddpm, not RectifiedFlow"):
        generate(denoise, DDIM(), request(), **settings)


WRONG: list[tuple[Any, str]] = [
    (lambda: Euler(steps=0), "steps is 0"),
    (lambda: DDIM(eta=2.0), "eta is 2.0"),
    (lambda: DDIM(clip=0.0), "clip is 0.0"),
    (lambda: Ancestral(variance="none"), "variance is 'none'"),  # type: ignore[arg-type]
    (lambda: Euler().check(Diffusion()), "euler is for rectified flow, not Diffusion"),
    (lambda: Heun().check(Diffusion()), "heun is for rectified flow"),
    (lambda: Ancestral(steps=60).check(Diffusion(steps=50)), "takes 60 steps of a chain of 50"),
]


@pytest.mark.parametrize(("make", "told"), WRONG)
def test_wrong_settings_are_named(make: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        make()
