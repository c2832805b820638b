"""Rotary position embedding at global positions, with the ways of stretching it to longer contexts."""

from dataclasses import dataclass
from math import log, pi
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021) in the half-split convention of Llama.

    theta: base of the wavelengths. scaling 'linear' divides positions by `factor` (Chen et al. 2023); 'yarn'
    divides only long wavelengths and warms the scores (Peng et al. 2023, section 3): `original` is the
    context length trained before, `beta_fast`, `beta_slow` the turns within it above which a dimension is
    kept and below which it is divided; between them the share rises over the dimensions, as in the authors'
    code.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "yarn"] = "none"
    factor: float = 1.0
    original: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.scaling not in ("none", "linear", "yarn"):
            raise ValueError(f"rope.scaling is {self.scaling!r}; it can be none, linear or yarn")
        if self.theta <= 1 or self.factor < 1:
            raise ValueError(
                f"rope.theta is {self.theta} and rope.factor {self.factor}; they need theta > 1, factor >= 1"
            )
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(
                f"rope.factor is {self.factor}, but rope.scaling is none; set it to linear or yarn"
            )
        if self.scaling == "yarn" and (self.original is None or self.original < 1):
            raise ValueError("rope.scaling=yarn needs rope.original, the context length before stretching")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"rope.beta_slow is {self.beta_slow}, rope.beta_fast {self.beta_fast}; "
                f"they need 0 < beta_slow < beta_fast"
            )

    def frequencies(self, head_dim: int, device: torch.device | None = None) -> Tensor:
        """Radians a position for each pair of dimensions: float64 [head_dim // 2]."""
        pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64)
        plain = self.theta ** (-pairs / head_dim)
        if self.scaling == "linear":
            return plain / self.factor
        if self.scaling == "none" or self.original is None:
            return plain
        low, high = (self._dimension(turns, head_dim) for turns in (self.beta_fast, self.beta_slow))
        low, high = max(int(low), 0), min(int(-(-high // 1)), head_dim - 1)
        ramp = ((pairs / 2 - low) / max(high - low, 1e-3)).clamp(0, 1)
        return plain * (1 - ramp) + plain / self.factor * ramp

    def _dimension(self, turns: float, head_dim: int) -> float:
        """The pair of dimensions that makes this many turns within the original context."""
        assert self.original is not None
        return head_dim * log(self.original / (turns * 2 * pi)) / (2 * log(self.theta))

    @property
    def warmth(self) -> float:
        """Factor on queries and keys alike: YaRN's attention temperature, else 1."""
        return 0.1 * log(self.factor) + 1.0 if self.scaling == "yarn" else 1.0

    def angles(self, positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin at global `positions` [T]: two float32 [T, 1, head_dim // 2], the same for every
        layer.
        """
        # float64: at a million tokens a float32 angle is off by up to 0.3 radians
        angle = positions.double()[:, None] * self.frequencies(head_dim, positions.device)
        return (angle.cos() * self.warmth).float()[:, None], (angle.sin() * self.warmth).float()[:, None]


@dataclass(frozen=True)
class GridRope:
    """Rotary embedding of a grid's coordinates: each axis turns a part of the head's pairs (Wan team 2025).

    Of a head dim d, three axes take d - 4(d//6), 2(d//6) and 2(d//6) dimensions, two d - 2(d//4) and 2(d//4);
    each part has the wavelengths of a head of its own size. Pairs are half-split, as in `Rope`.
    """

    theta: float = 10_000.0

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ValueError(f"rope.theta is {self.theta}; it needs theta > 1")

    def split(self, head_dim: int, axes: int) -> tuple[int, ...]:
        """The dimensions of a head that each axis turns."""
        rest = 2 * (head_dim // (2 * axes))
        return head_dim - (axes - 1) * rest, *[rest] * (axes - 1)

    def angles(self, places: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
        """cos and sin at coordinates int64 `places` [..., T, axes]: two float32 [..., T, 1, head_dim // 2],
        the same for every layer.
        """
        parts = [
            x.double()[..., None] * Rope(self.theta).frequencies(dims, places.device)
            for x, dims in zip(places.unbind(-1), self.split(head_dim, places.shape[-1]), strict=True)
        ]
        angle = torch.cat(parts, -1)[..., None, :]
        return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """x [B, T, H, D] turned by `Rope.angles`; computed in float32 (float64 for float64), returned in x's
    dtype.
    """
    cos, sin = angles
    a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)
