"""From noise to data: the solvers of rectified flow and of denoising diffusion, elementwise on any shard."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..objective.ddpm import Diffusion
from ..objective.flow import RectifiedFlow
from ..objective.process import Process
from ..objective.variance import log_variance

# What the model says of x [B, N, D] at a time: float32 [B, N, D] (float64 for a model in it), and the raw
# variance like it, or None.
Predict = Callable[[Tensor, float], tuple[Tensor, Tensor | None]]
# Fresh noise of the tokens held here, [B, N, D]: of the start (0), and of step k (from 1).
Fresh = Callable[[int], Tensor]


class Sampler(Protocol):
    """Solves from pure noise to data."""

    def check(self, process: Process) -> None:
        """ValueError if samples of this process cannot be made so."""
        ...

    def __call__(self, predict: Predict, fresh: Fresh, process: Process, tokens: int) -> Tensor:
        """Data [B, N, D] at the tokens held here; `tokens` are those of a whole sample."""
        ...


def _flow(process: Process, name: str) -> RectifiedFlow:
    if not isinstance(process, RectifiedFlow):
        raise ValueError(f"sampler {name} is for rectified flow, not {type(process).__name__}: take ddim")
    return process


def _chain(process: Process, name: str, steps: int) -> Diffusion:
    if not isinstance(process, Diffusion):
        raise ValueError(f"sampler {name} is for ddpm, not {type(process).__name__}: take euler or heun")
    if steps > process.steps:
        raise ValueError(f"sampler {name} takes {steps} steps of a chain of {process.steps}; take no more")
    return process


def _at_least_one(steps: int) -> None:
    if steps < 1:
        raise ValueError(f"sampler steps is {steps}; it must be at least 1")


def flow_times(process: RectifiedFlow, steps: int, tokens: int) -> list[float]:
    """Times from 1 to 0, evenly spaced before the shift that training has too."""
    even = torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64)
    found: list[float] = process.shifted(even, torch.tensor(tokens)).tolist()
    return found


@dataclass(frozen=True)
class Euler:
    """Euler's method on the flow: one prediction a step."""

    steps: int = 50

    def __post_init__(self) -> None:
        _at_least_one(self.steps)

    def check(self, process: Process) -> None:
        _flow(process, "euler")

    def __call__(self, predict: Predict, fresh: Fresh, process: Process, tokens: int) -> Tensor:
        times = flow_times(_flow(process, "euler"), self.steps, tokens)
        x = fresh(0)
        for t, after in zip(times, times[1:], strict=False):
            x = x + (after - t) * predict(x, t)[0]
        return x


@dataclass(frozen=True)
class Heun:
    """Heun's second-order method on the flow (Karras et al. 2022, algorithm 1): two predictions a step,
    one in the last.
    """

    steps: int = 25

    def __post_init__(self) -> None:
        _at_least_one(self.steps)

    def check(self, process: Process) -> None:
        _flow(process, "heun")

    def __call__(self, predict: Predict, fresh: Fresh, process: Process, tokens: int) -> Tensor:
        times = flow_times(_flow(process, "heun"), self.steps, tokens)
        x = fresh(0)
        for t, after in zip(times, times[1:], strict=False):
            slope = predict(x, t)[0]
            if after > 0:
                slope = (slope + predict(x + (after - t) * slope, after)[0]) / 2.0
            x = x + (after - t) * slope
        return x


def chain_times(process: Diffusion, steps: int) -> list[int]:
    """`steps` steps of the chain from the last to the first, evenly spaced, and then -1, which is clean."""
    even = torch.linspace(process.steps - 1, 0, steps, dtype=torch.float64)
    return [*even.round().long().tolist(), -1]


@dataclass(frozen=True)
class DDIM:
    """Steps down the chain with `eta` times the posterior's noise (Song et al. 2021, equations 12 and 16): 0
    is deterministic. clip: the bound that predicted data is held to, None for none.
    """

    steps: int = 50
    eta: float = 0.0
    clip: float | None = None

    def __post_init__(self) -> None:
        _at_least_one(self.steps)
        if not 0 <= self.eta <= 1:
            raise ValueError(f"sampler eta is {self.eta}; it must be from 0 to 1")
        _check_clip(self.clip)

    def check(self, process: Process) -> None:
        _chain(process, "ddim", self.steps)

    def __call__(self, predict: Predict, fresh: Fresh, process: Process, tokens: int) -> Tensor:
        chain = _chain(process, "ddim", self.steps)
        times, x = chain_times(chain, self.steps), fresh(0)
        for k, (t, after) in enumerate(zip(times, times[1:], strict=False), 1):
            clean, noise = _split(chain, x, predict(x, float(t))[0], t, self.clip)
            now, then = _alpha_bar(chain, t), _alpha_bar(chain, after)
            sigma = self.eta * ((1.0 - then) / (1.0 - now) * (1.0 - now / then)) ** 0.5
            # not below 0 by rounding
            x = then**0.5 * clean + max(1.0 - then - sigma**2, 0.0) ** 0.5 * noise
            if sigma > 0:
                x = x + sigma * fresh(k)
        return x


@dataclass(frozen=True)
class Ancestral:
    """The chain's own way back (Ho et al. 2020, algorithm 2), over `steps` of its steps (Nichol and Dhariwal
    2021, section 4).

    Args:
        steps: Steps to take, evenly spaced.
        variance: Of a step: `posterior`, or `beta`, the greater (Ho et al. 2020, section 3.2), or `learned`
            by the model, between the two.
        clip: The bound that predicted data is held to; None: none.
    """

    steps: int = 250
    variance: Literal["posterior", "beta", "learned"] = "posterior"
    clip: float | None = None

    def __post_init__(self) -> None:
        _at_least_one(self.steps)
        if self.variance not in ("posterior", "beta", "learned"):
            raise ValueError(f"sampler variance is {self.variance!r}; it can be posterior, beta or learned")
        _check_clip(self.clip)

    def check(self, process: Process) -> None:
        _chain(process, "ancestral", self.steps)

    def __call__(self, predict: Predict, fresh: Fresh, process: Process, tokens: int) -> Tensor:
        chain = _chain(process, "ancestral", self.steps)
        times, x = chain_times(chain, self.steps), fresh(0)
        for k, (t, after) in enumerate(zip(times, times[1:], strict=False), 1):
            out, raw = predict(x, float(t))
            clean, _ = _split(chain, x, out, t, self.clip)
            now, then = _alpha_bar(chain, t), _alpha_bar(chain, after)
            alpha = now / then
            beta = 1.0 - alpha
            x = (then**0.5 * beta * clean + alpha**0.5 * (1.0 - then) * x) / (1.0 - now)
            if after >= 0:
                x = x + self._deviation(beta, beta * (1.0 - then) / (1.0 - now), raw, x) * fresh(k)
        return x

    def _deviation(self, beta: float, posterior: float, raw: Tensor | None, like: Tensor) -> Tensor:
        """Of the noise of a step; of another shape than `like` where it is one for all."""
        if self.variance != "learned":
            return like.new_tensor(beta if self.variance == "beta" else posterior).sqrt()
        if raw is None:
            raise ValueError("sampler variance is 'learned', but the model learns none: take posterior")
        return (0.5 * log_variance(raw, like.new_tensor(beta), like.new_tensor(posterior))).exp()


def _check_clip(clip: float | None) -> None:
    if clip is not None and clip <= 0:
        raise ValueError(f"sampler clip is {clip}; it must be null or more than 0")


def _alpha_bar(chain: Diffusion, t: int) -> float:
    return float(chain.alpha_bar[t]) if t >= 0 else 1.0


def _split(chain: Diffusion, x: Tensor, out: Tensor, t: int, clip: float | None) -> tuple[Tensor, Tensor]:
    """The data and the noise that x is made of, by what the model says."""
    at = torch.tensor(t, device=x.device)
    clean, noise = chain.clean(x, out, at), chain.noise(x, out, at)
    if clip is not None:
        clean = clean.clamp(-clip, clip)
        data, dirt = chain.signal(at, x.dtype)
        noise = (x - data * clean) / dirt
    return clean, noise
