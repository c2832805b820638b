"""Samples -> a batch on every rank of a sequence -> the shard that one rank holds."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..kernels.mask import Documents, Mask, Offsets
from ..models.block import Attend, Attends
from ..parallel.joint import Joint
from ..parallel.layout import Layout, positions, shard
from ..parallel.mixed import Layers
from ..parallel.placement import Placement
from .data.sample import IGNORE, Sample


class Batch(Protocol):
    """Whole sequences of `length` tokens, before any sharding, equal on all ranks that share them."""

    @property
    def rows(self) -> int:
        """Sequences."""
        ...

    @property
    def length(self) -> int:
        """Tokens of each, over all ranks."""
        ...

    @property
    def valid(self) -> int:
        """Terms of the loss: what the summed loss is divided by, after adding up over all ranks."""
        ...

    def mask(self, inner: Mask) -> Mask:
        """What of a layer's mask is seen, given the documents of this batch."""
        ...

    def placed(self, layout: Layout, mask: Mask) -> Placement:
        """Who holds what of each sequence. mask: of the model."""
        ...

    def held(self, layout: Layout, placement: Placement, device: torch.device) -> Any:
        """What this rank holds of it, on `device`: what an objective takes."""
        ...


@dataclass(frozen=True)
class Tokens:
    """Text, int64 [B, T]; labels and previous tokens were taken by the data, before any sharding."""

    tokens: Tensor
    labels: Tensor
    previous: Tensor
    offsets: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> int:
        return len(self.tokens)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def valid(self) -> int:
        return int((self.labels != IGNORE).sum())

    def mask(self, inner: Mask) -> Documents:
        return Documents(self.offsets, inner=inner)

    def placed(self, layout: Layout, mask: Mask) -> Placement:
        return layout.place(self.length, self.mask(mask))

    def held(self, layout: Layout, placement: Placement, device: torch.device) -> "Shard":
        tokens, labels, previous = (
            shard(layout, x, placement, 1).to(device) for x in (self.tokens, self.labels, self.previous)
        )
        return Shard(tokens, labels, previous, positions(layout, placement, device), self.offsets)


@dataclass(frozen=True)
class Shard:
    """What one rank holds of text, int64 [B, N], at global `positions` int64 [N]."""

    tokens: Tensor
    labels: Tensor
    previous: Tensor
    positions: Tensor
    offsets: Offsets


def collate(samples: list[Sample]) -> Tokens:
    """Rows of equal length; document starts padded at the end with the length."""
    length, most = len(samples[0].tokens), max(len(s.offsets) for s in samples)
    offsets = tuple(tuple(s.offsets) + (length,) * (most - len(s.offsets)) for s in samples)
    tokens, labels, previous = (
        torch.from_numpy(np.stack([getattr(s, name) for s in samples]))
        for name in ("tokens", "labels", "previous")
    )
    return Tokens(tokens, labels, previous, offsets)


def indices(first: int, *, dp: int, rank: int, micro: int, accumulate: int) -> list[list[int]]:
    """Global sample indices of each micro batch of one dp rank, in the step that starts at sample `first`.

    The step takes the same samples in the same order whatever dp, micro and accumulate are, if their product
    is the same.
    """
    return [[first + (a * dp + rank) * micro + i for i in range(micro)] for a in range(accumulate)]


def place(layout: Layout, batch: Batch, mask: Mask) -> Placement:
    """Who holds what of this batch."""
    return batch.placed(layout, mask)


def bind(layout: Layout, placement: Placement) -> Attends:
    """The attention that a model is handed: this layout, this batch's placement; of a mixture over the layers
    as many as take turns.
    """
    if isinstance(layout, Layers):
        return tuple(_bound(turn, placement) for turn in layout.turns())
    return _bound(layout, placement)


def _bound(layout: Layout, placement: Placement) -> Attend:
    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Mask, *, joint: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        beside = None if joint is None else Joint(*joint)
        return layout.attention(q, k, v, mask, placement, joint=beside)[0]

    return attend
