"""How scores become weights: the numbers that every backend takes."""

import math
from dataclasses import dataclass
from numbers import Real
from typing import Literal


@dataclass(frozen=True)
class AttentionOptions:
    """scale: of q k^T, None is head_dim ** -0.5. softcap: cap * tanh(score / cap), 0 is off (Gemma 2, section
    2).

    normalizer: softmax, or elementwise sigmoid (FlashSigmoid, Ramapuram et al. 2024), which has no lse and
    whose partial results add. bias: sigmoid's only, -log of the *global* length; it is never taken from the
    shape of k.
    """

    scale: float | None = None
    softcap: float = 0.0
    normalizer: Literal["softmax", "sigmoid"] = "softmax"
    bias: float = 0.0

    def __post_init__(self) -> None:
        if self.normalizer not in ("softmax", "sigmoid"):
            raise ValueError(f"AttentionOptions.normalizer is {self.normalizer!r}; allowed: softmax, sigmoid")
        for name in ("scale", "softcap", "bias"):
            value = getattr(self, name)
            number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
            if not number and not (name == "scale" and value is None):
                raise ValueError(f"AttentionOptions.{name} is {value}; it must be a finite number")
        if self.softcap < 0:
            raise ValueError(f"AttentionOptions.softcap is {self.softcap}; it must be at least 0")
        if self.normalizer == "softmax" and self.bias:
            raise ValueError(f"AttentionOptions.bias is {self.bias}; only normalizer='sigmoid' has one")

    def scaling(self, head_dim: int) -> float:
        """The factor on q k^T."""
        return head_dim**-0.5 if self.scale is None else self.scale
