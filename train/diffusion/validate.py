"""Held-out loss at fixed times and fixed noise, so that steps and runs can be compared."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from ...kernels.mask import Mask
from ...parallel.layout import Layout
from ..batch import bind, place
from ..data.clip import Clips
from ..objective.denoise import Denoise
from .batch import load, token_shape

TIMES = 8
# Samples at once, and tokens: nothing depends on it.
_MICRO = 16
_TOKENS = 32_768


def validation_loss(
    denoise: Denoise,
    data: Clips,
    samples: int,
    *,
    patch: int | Sequence[int],
    grid: Sequence[int] | None = None,
    layout: Layout,
    mask: Mask,
    device: torch.device,
    part: tuple[int, int] = (0, 1),
    times: int = TIMES,
) -> Tensor:
    """Mean loss of the first `samples` of `data` at the medians of `times` equal parts of training's times.

    float64 [times], the same on every rank; its mean is one number for all.

    patch, grid: of the model. part: this rank's place among those that take other samples (dp), and their
    number.
    """
    rank, ranks = part
    sums = torch.zeros(2, times, dtype=torch.float64)
    was = denoise.training
    denoise.eval()
    held = min(samples, len(data))
    each = [list(_alike(data, range(r, held, ranks), patch)) for r in range(ranks)]
    for turn in range(max(map(len, each))):
        # weights may be gathered over dp: who has no batch left takes another one, uncounted
        counted = turn < len(each[rank])
        clean = load(data, each[rank if counted else 0][turn], patch, grid)
        for number in range(times):
            rows = denoise.probe(clean, number, times)
            placement = place(layout, rows, mask)
            here = rows.held(layout, placement, device)
            errors = denoise.losses(here, bind(layout, placement))
            sums[0, number] += counted * errors.double().sum().cpu()
            sums[1, number] += counted * here.real.sum().cpu()
    denoise.train(was)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums[0] / sums[1].clamp_min(1.0)


def _alike(data: Clips, wanted: Iterable[int], patch: int | Sequence[int]) -> Iterator[list[int]]:
    """Batches of neighbours of one shape."""
    for shape, group in groupby(wanted, data.shape):
        indices, most = list(group), max(1, min(_MICRO, _TOKENS // token_shape(shape, patch)[0]))
        yield from (indices[at : at + most] for at in range(0, len(indices), most))
