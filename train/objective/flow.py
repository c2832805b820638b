"""Rectified flow: straight lines from data to noise."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RectifiedFlow:
    """x_t = (1 - t) x + t noise; the model says the velocity, noise - x (Liu et al. 2023, section 2.1).

    Args:
        times: `uniform`, or `logit_normal`: sigmoid(mean + std z) (Esser et al. 2024, section 3.1).
        mean, std: Of the logit.
        shift: t -> shift t / (1 + (shift - 1) t), in training and sampling: more than 1 spends more time near
            the noise (Esser et al. 2024, section 5.3.2).
        shift_tokens: Tokens of a sample at which the shift is `shift`; it grows with the root of the tokens.
            None: it is the same for all.

    Raises:
        ValueError: A setting is out of its range.
    """

    times: Literal["uniform", "logit_normal"] = "logit_normal"
    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    shift_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.times not in ("uniform", "logit_normal"):
            raise ValueError(f"objective.process.times is {self.times!r}; it can be uniform or logit_normal")
        if not math.isfinite(self.mean) or not 0 < self.std < math.inf:
            raise ValueError(
                f"objective.process.mean is {self.mean}, std {self.std}; mean must be finite, std > 0"
            )
        if not 0 < self.shift < math.inf:
            raise ValueError(f"objective.process.shift is {self.shift}; it must be more than 0")
        if self.shift_tokens is not None and self.shift_tokens < 1:
            raise ValueError(
                f"objective.process.shift_tokens is {self.shift_tokens}; it must be null or at least 1"
            )

    def shift_at(self, tokens: Tensor) -> Tensor:
        """The shift of samples of so many tokens, float64."""
        grown = torch.ones_like(tokens) if self.shift_tokens is None else tokens / self.shift_tokens
        return self.shift * grown.double().sqrt()

    def shifted(self, t: Tensor, tokens: Tensor) -> Tensor:
        """float64 t after the shift, which keeps 0 and 1."""
        shift = self.shift_at(tokens)
        return shift * t / (1.0 + (shift - 1.0) * t)

    def time(self, u: Tensor, tokens: Tensor) -> Tensor:
        u = u.double()
        t = u if self.times == "uniform" else torch.sigmoid(self.mean + self.std * torch.special.ndtri(u))
        return self.shifted(t, tokens).float()

    def clock(self, t: Tensor) -> Tensor:
        return 1000.0 * t

    def mix(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return (1.0 - t) * x + t * noise

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - x

    def weight(self, t: Tensor) -> Tensor:
        return torch.ones_like(t)

    def clean(self, mixed: Tensor, out: Tensor, t: Tensor) -> Tensor:
        return mixed - t * out

    def noise(self, mixed: Tensor, out: Tensor, t: Tensor) -> Tensor:
        return mixed + (1.0 - t) * out
