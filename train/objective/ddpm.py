"""Denoising diffusion in discrete steps, variance preserving: noise or velocity prediction."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Diffusion:
    """x_t = sqrt(a) x + sqrt(1 - a) noise with a = `alpha_bar[t]`, t in 0 .. steps - 1 (Ho et al. 2020).

    Args:
        schedule: `linear`, beta from 1e-4 to 0.02 (Ho et al. 2020, section 4; at 1000 steps, else scaled), or
            `cosine` (Nichol and Dhariwal 2021, section 3.2).
        prediction: `eps`, the noise, or `v`, sqrt(a) noise - sqrt(1 - a) x (Salimans and Ho 2022).
        steps: Of the chain.
        min_snr: The gamma of min-SNR weighting, 5 in its paper (Hang et al. 2023): the error in x counts
            min(snr, gamma). None: the error in what is predicted counts 1.

    Raises:
        ValueError: A setting is out of its range.
    """

    schedule: Literal["linear", "cosine"] = "linear"
    prediction: Literal["eps", "v"] = "eps"
    steps: int = 1000
    min_snr: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("schedule", ("linear", "cosine")), ("prediction", ("eps", "v"))):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"objective.process.{name} is {value!r}; it can be {' or '.join(known)}")
        # fewer linear steps would need a beta of more than 1
        if self.steps < 25:
            raise ValueError(f"objective.process.steps is {self.steps}; it must be at least 25")
        if self.min_snr is not None and self.min_snr <= 0:
            raise ValueError(f"objective.process.min_snr is {self.min_snr}; it must be null or more than 0")

    @cached_property
    def alpha_bar(self) -> Tensor:
        """What is left of the data's variance, float64 [steps], falling."""
        if self.schedule == "linear":
            scale = 1000.0 / self.steps
            beta = torch.linspace(scale * 1e-4, scale * 0.02, self.steps, dtype=torch.float64)
        else:
            at = torch.arange(self.steps + 1, dtype=torch.float64) / self.steps
            f = ((at + 0.008) / 1.008 * math.pi / 2.0).cos() ** 2
            beta = (1.0 - f[1:] / f[:-1]).clamp(max=0.999)
        return (1.0 - beta).cumprod(0)

    def signal(self, t: Tensor, like: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """The shares of data and noise, sqrt(a) and sqrt(1 - a), at the steps t; t = -1 is clean."""
        a = torch.cat((self.alpha_bar, torch.ones(1, dtype=torch.float64))).to(t.device)[t.long()]
        return a.sqrt().to(like), (1.0 - a).sqrt().to(like)

    def time(self, u: Tensor, tokens: Tensor) -> Tensor:
        return (u.double() * self.steps).floor().clamp(0, self.steps - 1).float()

    def clock(self, t: Tensor) -> Tensor:
        return t * (1000.0 / self.steps)

    def mix(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        data, dirt = self.signal(t, x.dtype)
        return data * x + dirt * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        data, dirt = self.signal(t, x.dtype)
        return noise if self.prediction == "eps" else data * noise - dirt * x

    def weight(self, t: Tensor) -> Tensor:
        data, dirt = self.signal(t, torch.float64)
        snr = (data / dirt) ** 2
        if self.min_snr is None:
            return torch.ones_like(t)
        # the squared error in x is that in eps / snr, and that in v / (snr + 1)
        by = snr if self.prediction == "eps" else snr + 1.0
        return (snr.clamp(max=self.min_snr) / by).to(t.dtype)

    def clean(self, mixed: Tensor, out: Tensor, t: Tensor) -> Tensor:
        data, dirt = self.signal(t, mixed.dtype)
        return (mixed - dirt * out) / data if self.prediction == "eps" else data * mixed - dirt * out

    def noise(self, mixed: Tensor, out: Tensor, t: Tensor) -> Tensor:
        data, dirt = self.signal(t, mixed.dtype)
        return out if self.prediction == "eps" else dirt * mixed + data * out
