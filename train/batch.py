"""Samples -> a batch on every rank of a sequence -> the shard that one rank holds."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..kernels.mask import Documents, Mask, Offsets
from ..models.block import Attend
from ..parallel.layout import Layout, positions, shard
from ..parallel.placement import Placement
from .data.sample import IGNORE, Dataset, Sample


@dataclass(frozen=True)
class Batch:
    """Whole sequences, int64 [B, T]; labels and previous tokens were taken by the data, before any
    sharding.
    """

    tokens: Tensor
    labels: Tensor
    previous: Tensor
    offsets: tuple[tuple[int, ...], ...]

    @property
    def valid(self) -> int:
        return int((self.labels != IGNORE).sum())

    def mask(self, inner: Mask) -> Documents:
        return Documents(self.offsets, inner=inner)


@dataclass(frozen=True)
class Shard:
    """What one rank holds of a batch, int64 [B, N], at global `positions` int64 [N]."""

    tokens: Tensor
    labels: Tensor
    previous: Tensor
    positions: Tensor
    offsets: Offsets


def collate(samples: list[Sample]) -> Batch:
    """Rows of equal length; document starts padded at the end with the length."""
    length, most = len(samples[0].tokens), max(len(s.offsets) for s in samples)
    offsets = tuple(tuple(s.offsets) + (length,) * (most - len(s.offsets)) for s in samples)
    tokens, labels, previous = (
        torch.from_numpy(np.stack([getattr(s, name) for s in samples]))
        for name in ("tokens", "labels", "previous")
    )
    return Batch(tokens, labels, previous, offsets)


def indices(first: int, *, dp: int, rank: int, micro: int, accumulate: int) -> list[list[int]]:
    """Global sample indices of each micro batch of one dp rank, in the step that starts at sample `first`.

    The step takes the same samples in the same order whatever dp, micro and accumulate are, if their product
    is the same.
    """
    return [[first + (a * dp + rank) * micro + i for i in range(micro)] for a in range(accumulate)]


def load(data: Dataset, wanted: list[int], step: int) -> Batch:
    return collate([data.sample(i, step) for i in wanted])


def place(layout: Layout, batch: Batch, mask: Mask) -> Placement:
    """Who holds what of this batch."""
    return layout.place(batch.tokens.shape[1], batch.mask(mask))


def held(layout: Layout, batch: Batch, placement: Placement, device: torch.device) -> Shard:
    """The shard of this rank, on `device`."""
    tokens, labels, previous = (
        shard(layout, x, placement, 1).to(device) for x in (batch.tokens, batch.labels, batch.previous)
    )
    return Shard(tokens, labels, previous, positions(layout, placement, device), batch.offsets)


def bind(layout: Layout, placement: Placement) -> Attend:
    """The attention that a model is handed: this layout, this batch's placement."""

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        return layout.attention(q, k, v, mask, placement)[0]

    return attend
