"""A small model to denoise with, and what tests of objectives share."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from longspan.kernels.mask import Full, Mask
from longspan.train.batch import bind
from longspan.train.data.digits import Digits
from longspan.train.diffusion.batch import Clean, Noisy, load
from longspan.train.objective.ddpm import Diffusion
from longspan.train.objective.denoise import Denoise
from longspan.train.objective.flow import RectifiedFlow
from longspan.train.objective.process import Process

CPU = torch.device("cpu")


PROCESSES: dict[str, Process] = {
    "flow": RectifiedFlow(),
    "shifted": RectifiedFlow(times="uniform", shift=3.0),
    "eps": Diffusion(),
    "v": Diffusion(schedule="cosine", prediction="v", min_snr=5.0),
}


class Tiny(nn.Module):
    """Attention over the whole sample, and a say that depends on time, class and position."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.inner, self.out = nn.Linear(width + 3, 12), nn.Linear(4, width)
        self.table = nn.Embedding(classes + 1, 4)

    def forward(
        self, x: Tensor, positions: Tensor, t: Tensor, y: Tensor, attend: Any, offsets: Any = None
    ) -> Tensor:
        t = (t if t.ndim == 2 else t[:, None].expand(x.shape[:2])).to(x.dtype) / 1000.0
        at = torch.sin(positions.to(x.dtype)).expand(x.shape[:2])
        q, k, v = self.inner(torch.cat((x, torch.stack((t, at, t * at), -1)), -1)).chunk(3, -1)
        seen = attend(q[:, :, None], k[:, :, None], v[:, :, None], Full())[:, :, 0]
        label = self.table(y if y.ndim == 2 else y[:, None])
        return self.out(seen * label)


def objective(process: Process | None = None, **settings: Any) -> Denoise:
    torch.manual_seed(0)
    return Denoise(Tiny(4, 10).double(), process=process or RectifiedFlow(), **settings)


@lru_cache
def digits() -> Digits:
    return Digits()


def rows(indices: list[int], *, dtype: torch.dtype = torch.float64) -> Clean:
    clean = load(digits(), indices, 2)
    return replace(clean, tokens=clean.tokens.to(dtype))


def share(denoise: Denoise, noisy: Noisy, layout: Any, denominator: float, mask: Mask) -> Tensor:
    placement = layout.place(noisy.tokens.shape[1], noisy.mask(mask))
    part = noisy.held(layout, placement, CPU)
    loss: Tensor = denoise(part, bind(layout, placement), denominator)
    return loss
