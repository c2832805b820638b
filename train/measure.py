"""What a model is worth: held-out loss by position, retrieval by depth and length, and what other means reach
on the same bytes.
"""

import lzma
import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from .batch import Tokens, bind, collate, place
from .data.needle import Needle
from .data.sample import IGNORE, Dataset
from .job import Job


@dataclass(frozen=True)
class HeldOut:
    """Summed nats and number of labels by global position, float64 [context], over all ranks."""

    nats: Tensor
    counts: Tensor
    bytes_per_token: float

    @property
    def loss(self) -> float:
        """Nats a token."""
        return float(self.nats.sum() / self.counts.sum().clamp_min(1))

    @property
    def bits_per_byte(self) -> float:
        return self.loss / math.log(2) / self.bytes_per_token

    def by_position(self) -> tuple[list[int], list[float]]:
        """Edges of buckets that double in width, and the bits per byte in each; empty buckets are left out at
        the end.
        """
        edges, values = [0], []
        length = len(self.nats)
        while edges[-1] < length:
            stop = min(max(16, 2 * edges[-1]), length)
            count = float(self.counts[edges[-1] : stop].sum())
            if not count:
                break
            bits = float(self.nats[edges[-1] : stop].sum()) / count / math.log(2)
            edges.append(stop)
            values.append(bits / self.bytes_per_token)
        return edges, values


def autocast(job: Job) -> AbstractContextManager[Any]:
    """bfloat16 autocast if train.precision says so."""
    if job.cfg.train.precision == "bfloat16":
        # the cache would keep a bfloat16 copy of every weight until the backward is over
        return torch.autocast(job.device.type, torch.bfloat16, cache_enabled=False)
    return nullcontext()


def token_losses(job: Job, batch: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (nats, float32 [B, N]), labels [B, N] and global positions [N] of the tokens held here, on the
    CPU.
    """
    placement = place(job.layout, batch, job.mask)
    part = batch.held(job.layout, placement, job.device)
    with autocast(job), torch.no_grad():
        losses = job.objective.losses(part, bind(job.layout, placement))
    return losses.float().cpu(), part.labels.cpu(), part.positions.cpu()


def shares(samples: int, job: Job) -> Iterator[tuple[int, bool]]:
    """The samples of this dp rank, and whether they count: weights may be gathered over dp, so all ranks take
    equally many, the last ones again if need be.
    """
    for first in range(0, samples, job.dp):
        index = first + job.dp_rank
        yield min(index, samples - 1), index < samples


def held_out_loss(job: Job, data: Dataset, samples: int) -> HeldOut:
    """The loss on the first `samples` sequences of `data`, each split over the ranks like a training
    sequence.
    """
    nats, counts = (torch.zeros(data.context, dtype=torch.float64) for _ in range(2))
    job.model.eval()
    for index, counted in shares(min(samples, len(data)), job):
        losses, labels, at = token_losses(job, collate([data.sample(index)]))
        if not counted:
            continue
        nats.index_add_(0, at, losses.double().sum(0))
        counts.index_add_(0, at, (labels != IGNORE).double().sum(0))
    job.model.train()
    both = torch.stack((nats, counts))
    dist.all_reduce(both)
    return HeldOut(both[0], both[1], data.bytes_per_token)


def retrieval(
    job: Job, data: Needle, *, depths: Sequence[float], lengths: Sequence[int], samples: int
) -> npt.NDArray[np.float64]:
    """Share of the needle's bytes that greedy prediction gets right, [depths, lengths], the true ones before
    it given.
    """
    found = torch.zeros(2, len(depths), len(lengths), dtype=torch.float64)
    job.model.eval()
    for i, depth in enumerate(depths):
        for j, length in enumerate(lengths):
            for index, counted in shares(samples, job):
                right, asked = _guessed(job, collate([data.probe(depth, length, index)]))
                found[:, i, j] += counted * torch.tensor([right, asked], dtype=torch.float64)
    job.model.train()
    dist.all_reduce(found)
    return (found[0] / found[1]).numpy()


def _guessed(job: Job, batch: Tokens) -> tuple[int, int]:
    placement = place(job.layout, batch, job.mask)
    part = batch.held(job.layout, placement, job.device)
    asked = part.labels != IGNORE
    with autocast(job):
        objective: Any = job.objective
        guess: Tensor = objective.guesses(part, bind(job.layout, placement), asked)
    return int((guess == part.labels[asked]).sum()), int(asked.sum())


def text_of(data: Dataset, samples: int) -> bytes:
    """The bytes that `held_out_loss` was asked about: the labels, in order."""
    pieces = []
    for index in range(min(samples, len(data))):
        labels = data.sample(index).labels
        pieces.append(data.decode(labels[labels != IGNORE]).encode("utf-8", "replace"))
    return b"".join(pieces)


def bounds(text: bytes) -> dict[str, float]:
    """Bits per byte of these bytes by other means: their own order-1 and order-2 entropy, and lzma (preset 9,
    extreme).
    """
    if len(text) < 3:
        return {}
    codes = np.frombuffer(text, np.uint8).astype(np.int64)
    pair = codes[:-1] * 256 + codes[1:]
    triple = pair[:-1] * 256 + codes[2:]
    one, two, three = (_entropy(np.unique(x, return_counts=True)[1]) for x in (codes[:-1], pair, triple))
    packed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    return {
        "order-1 entropy": two - one,
        "order-2 entropy": three - _entropy(np.unique(pair[:-1], return_counts=True)[1]),
        "lzma": 8 * len(packed) / len(text),
    }


def _entropy(counts: npt.NDArray[np.int64]) -> float:
    p = counts / counts.sum()
    return float(-(p * np.log2(p)).sum())
