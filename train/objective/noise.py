"""Random numbers of a sample: pure functions of seed, sample index and what they are for.

They know nothing of ranks, batch or order, so all ranks of a sample draw the same, and a sample is treated
alike whatever shares its batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Bits = npt.NDArray[np.uint64]


class Stream(IntEnum):
    """What random numbers are for: streams never meet. The values are part of what a run is."""

    TIME = 1
    NOISE = 2
    DROP = 3
    PROBE = 4
    START = 5
    STEP = 6
    PLACE = 7


@dataclass(frozen=True)
class Key:
    """Whose random numbers: all numbers are from 0 to 2^64 - 1. step: of one sample's several draws."""

    seed: int
    stream: Stream
    index: int
    step: int = 0


def bits(count: int, key: Key) -> Bits:
    """uint64 `[count]`, the same for ever.

    Raw bits of a counter-based generator (Philox: Salmon et al. 2011): numpy keeps those, but not what it
    makes of them. Seed and stream are its key, index and step the upper words of its counter, so no two draws
    overlap.
    """
    words = np.array([[key.seed, key.stream, 0, 0], [0, key.index, key.step, 0]], np.uint64)
    return np.random.Philox(key=words[0, :2], counter=words[1]).random_raw(count)


def uniform(keys: Sequence[Key], count: int) -> Tensor:
    """Uniform in [0, 1), float64 [len(keys), count]."""
    drawn = np.stack([bits(count, key) for key in keys])
    return torch.from_numpy((drawn >> np.uint64(11)).astype(np.float64) * 2.0**-53)


def normal(keys: Sequence[Key], shape: Sequence[int]) -> Tensor:
    """Standard normal, float32 [len(keys), *shape], by Box and Muller (1958) in float64."""
    count = math.prod(shape)
    half = -(-count // 2)
    u = uniform(keys, 2 * half)
    radius = (-2.0 * torch.log1p(-u[:, :half])).sqrt()
    angle = 2.0 * math.pi * u[:, half:]
    both = torch.cat((radius * angle.cos(), radius * angle.sin()), 1)
    return both[:, :count].float().reshape(len(keys), *shape)
