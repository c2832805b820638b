"""What a diffusion objective and a sampler must agree on: how noise is mixed in, and what the model says."""

from typing import Protocol

import torch
from torch import Tensor


class Process(Protocol):
    """A path from data to noise. Elementwise throughout, so it is the same on any shard of a sample.

    x, noise and out are of one shape and float32 (float64 stays), t of a shape that broadcasts to theirs.
    """

    def time(self, u: Tensor, tokens: Tensor) -> Tensor:
        """The quantile u, in [0, 1), of the times of training, for samples of int64 `tokens` tokens: float32,
        shaped like u.
        """
        ...

    def clock(self, t: Tensor) -> Tensor:
        """What the model is told as its time, 0 (clean) to 1000."""
        ...

    def mix(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The data x at time t."""
        ...

    def target(self, x: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the model should say at time t."""
        ...

    def weight(self, t: Tensor) -> Tensor:
        """What the squared error counts at time t."""
        ...

    def clean(self, mixed: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The data that the model's `out` says `mixed` was made from."""
        ...

    def noise(self, mixed: Tensor, out: Tensor, t: Tensor) -> Tensor:
        """The noise that the model's `out` says `mixed` was made from."""
        ...


def exact(x: Tensor) -> Tensor:
    """x in float32, or float64 if it is: no mixing, target or guidance is ever rounded to 16 bits."""
    return x if x.dtype == torch.float64 else x.float()
