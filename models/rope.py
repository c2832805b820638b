"""Rotary position embedding at global positions, with the ways of stretching it to longer contexts."""

from dataclasses import dataclass
from math import ceil, floor, log, pi
from typing import Literal

import torch
from torch import Tensor

SCALINGS = ("none", "linear", "ntk", "yarn", "llama3", "longrope")


@dataclass(frozen=True)
class Rope:
    """Rotary embedding (Su et al. 2021) in the half-split convention of Llama.

    theta: base of the wavelengths. scaling 'linear' divides positions by `factor` (position interpolation:
    Chen et al. 2023, section 2.3). 'ntk' makes the base greater, so that the longest wavelength grows by
    `factor` and the shortest stays (NTK-aware: Peng et al. 2023, section 3.1). 'yarn' divides only long
    wavelengths and warms the scores (Peng et al. 2023, section 3): `original` is the context length trained
    before, `beta_fast`, `beta_slow` the turns within it above which a dimension is kept and below which it is
    divided; between them the share rises over the dimensions, as in the authors' code (truncate: from a whole
    dimension to a whole one). 'llama3' does so by `high` and `low` turns, with a share that rises over the
    turns (Llama team 2024, as Llama 3.1 was published). 'longrope' divides each wavelength by one of
    `factors`, one for each pair of dimensions (Ding et al. 2024, section 3).
    attention_factor: on queries and keys alike; None is what the scaling has by itself.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "ntk", "yarn", "llama3", "longrope"] = "none"
    factor: float = 1.0
    original: int | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    low: float = 1.0
    high: float = 4.0
    factors: tuple[float, ...] | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.scaling not in SCALINGS:
            raise ValueError(f"rope.scaling is {self.scaling!r}; it can be {', '.join(SCALINGS)}")
        if self.theta <= 1 or self.factor < 1:
            raise ValueError(
                f"rope.theta is {self.theta} and rope.factor {self.factor}; they need theta > 1, factor >= 1"
            )
        if self.scaling == "none" and self.factor != 1:
            raise ValueError(
                f"rope.factor is {self.factor}, but rope.scaling is none; set it to linear, ntk or yarn"
            )
        if self.scaling in ("yarn", "llama3") and (self.original is None or self.original < 1):
            raise ValueError(
                f"rope.scaling={self.scaling} needs rope.original, the context length before stretching"
            )
        for low, high in (("beta_slow", "beta_fast"), ("low", "high")):
            if not 0 < getattr(self, low) < getattr(self, high):
                raise ValueError(
                    f"rope.{low} is {getattr(self, low)}, rope.{high} {getattr(self, high)}; "
                    f"they need 0 < {low} < {high}"
                )
        if self.attention_factor is not None and self.attention_factor <= 0:
            raise ValueError(f"rope.attention_factor is {self.attention_factor}; it must be more than 0")
        if (self.factors is not None) != (self.scaling == "longrope"):
            raise ValueError(
                f"rope.factors is {self.factors}, rope.scaling {self.scaling}; longrope, and nothing else, "
                f"needs a factor for each pair of dimensions"
            )
        if self.factors is not None:
            # a config gives a list, which would make the value unhashable
            object.__setattr__(self, "factors", tuple(float(f) for f in self.factors))
            if not all(f > 0 for f in self.factors):
                raise ValueError(f"rope.factors is {self.factors}; all must be more than 0")

    def frequencies(self, head_dim: int, device: torch.device | None = None) -> Tensor:
        """Radians a position for each pair of dimensions: float64 [head_dim // 2]. ValueError if longrope has
        factors for another head dim.
        """
        pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64)
        plain = self.theta ** (-pairs / head_dim)
        match self.scaling:
            case "linear":
                return plain / self.factor
            case "ntk":
                # the last pair has the exponent (d - 2) / d
                return plain * self.factor ** (-pairs / max(head_dim - 2, 1))
            case "yarn":
                kept = 1 - self._ramp(pairs / 2, head_dim)
            case "llama3":
                assert self.original is not None
                turns = self.original * plain / (2 * pi)
                kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
            case "longrope":
                assert self.factors is not None
                if len(self.factors) != len(plain):
                    raise ValueError(
                        f"rope.factors has {len(self.factors)} numbers, but a head dim of {head_dim} has "
                        f"{len(plain)} pairs"
                    )
                return plain / torch.tensor(self.factors, device=device, dtype=torch.float64)
            case _:
                return plain
        return plain * kept + plain / self.factor * (1 - kept)

    def _ramp(self, pairs: Tensor, head_dim: int) -> Tensor:
        """YaRN's share of each pair that is divided."""
        low, high = (self._dimension(turns, head_dim) for turns in (self.beta_fast, self.beta_slow))
        if self.truncate:
            low, high = floor(low), ceil(high)
        low, high = max(low, 0), min(high, head_dim - 1)
        return ((pairs - low) / max(high - low, 1e-3)).clamp(0, 1)

    def _dimension(self, turns: float, head_dim: int) -> float:
        """The pair of dimensions that makes this many turns within the original context."""
        assert self.original is not None
        return head_dim * log(self.original / (turns * 2 * pi)) / (2 * log(self.theta))

    @property
    def warmth(self) -> float:
        """Factor on queries and keys alike: `attention_factor`, or YaRN's attention temperature, or 1."""
        if self.attention_factor is not None:
            return self.attention_factor
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
