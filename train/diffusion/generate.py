"""Samples of a model: noise of whole samples, each rank's part of it solved, and the parts put together."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...kernels.mask import Mask
from ...models.block import Attends
from ...parallel.bricks import Bricks
from ...parallel.layout import Layout, unshard
from ..batch import bind, place
from ..objective.denoise import Denoise
from ..objective.noise import Key, Stream, normal
from .batch import Grid, Noisy
from .samplers import Predict, Sampler
from .text import Text


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        labels: Class of each sample.
        shape: Tokens of a sample, and the width of one.
        null: The class that stands for none.
        channels: Of the data.
        seed, first: The noise of sample i is a function of `seed` and `first + i` alone.
        guidance: Of classifier-free guidance (Ho and Salimans 2022): 1 is none, 0 unconditional.
        text: Of each sample, or None.
        grids, bricks: As in `Noisy`.
    """

    labels: tuple[int, ...]
    shape: tuple[int, int]
    null: int
    channels: int = 1
    seed: int = 0
    first: int = 0
    guidance: float = 1.0
    text: Text | None = None
    grids: tuple[Grid, Grid] | None = None
    bricks: Bricks | None = None

    def noise(self, step: int) -> Tensor:
        """Noise of whole samples in this step of the solver (0: the start), float32 [B, T, D]."""
        stream = Stream.STEP if step else Stream.START
        keys = [Key(self.seed, stream, self.first + i, step) for i in range(len(self.labels))]
        return normal(keys, self.shape)

    def rows(self, step: int) -> Noisy:
        """The samples as whole rows without content, with the noise of this step."""
        noise, count = self.noise(step), len(self.labels)
        return Noisy(
            torch.zeros_like(noise),
            noise,
            torch.ones(noise.shape[:2], dtype=torch.bool),
            torch.zeros(count),
            torch.tensor(self.labels),
            torch.arange(self.shape[0]),
            self.channels,
            text=self.text,
            grids=self.grids,
            bricks=self.bricks,
        )


@torch.no_grad()
def generate(
    denoise: Denoise,
    sampler: Sampler,
    request: Request,
    *,
    layout: Layout,
    mask: Mask,
    device: torch.device,
) -> Tensor:
    """Samples [B, T, D] in row-major order, whole on every rank and on the CPU, of the present weights
    (see `EMA.applied`). mask: of the model.
    """
    sampler.check(denoise.process)
    rows = request.rows(0)
    placement = place(layout, rows, mask)
    attend, part = bind(layout, placement), rows.held(layout, placement, device)
    double = next(denoise.parameters()).dtype == torch.float64

    def fresh(step: int) -> Tensor:
        noise = request.rows(step).held(layout, placement, device).noise if step else part.noise
        return noise.double() if double else noise

    was = denoise.training
    denoise.eval()
    try:
        x = sampler(guided(denoise, part, request, attend), fresh, denoise.process, request.shape[0])
    finally:
        denoise.train(was)
    return unshard(layout, x, placement, 1).cpu()


def guided(denoise: Denoise, part: Noisy, request: Request, attend: Attends) -> Predict:
    """The model's word with classifier-free guidance, mixed in float32; a learned variance is not guided."""
    bare = replace(
        part,
        y=torch.full_like(part.y, request.null),
        text=None if part.text is None else part.text.none(),
    )

    def say(rows: Noisy, x: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        at = torch.full((len(x),), t, device=x.device)
        return denoise.say(replace(rows, t=at), x, attend)

    def predict(x: Tensor, t: float) -> tuple[Tensor, Tensor | None]:
        if request.guidance == 1.0:
            return say(part, x, t)
        none, raw = say(bare, x, t)
        if request.guidance == 0.0:
            return none, raw
        asked, raw = say(part, x, t)
        return none + request.guidance * (asked - none), raw

    return predict
