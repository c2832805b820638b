"""Denoising: a model is shown noisy tokens and says what the noise did; weighted by token over all ranks."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...kernels.mask import Documents, Mask
from ...kernels.tile import pairs
from ...models.block import Attends
from ...models.grids import dilation_of, regridded
from ...parallel.bricks import Bricks, place
from ...parallel.layout import Layout
from ...parallel.placement import Placement
from ..data.clip import Clips
from ..diffusion.batch import Clean, Grid, Noisy, grids_of, token_shape
from ..diffusion.feed import Feed, feed
from ..diffusion.fit import check_fit
from ..judge import Judge
from .ddpm import Diffusion
from .noise import Key, Stream, normal, uniform
from .process import Process, exact
from .variance import bound, split


class DrawingJudge(Judge, Protocol):
    """A judge that makes samples."""

    def check(self, objective: "Denoise") -> None:
        """ValueError if samples of such a model cannot be made as its settings say."""
        ...


class Denoise(nn.Module):
    """Mean squared error between what the model says and what `process` asks, over real tokens and features.

    Time, noise and what is dropped are functions of seed and row index, drawn for the whole row before
    sharding: all ranks of a row agree, and another number of ranks or another batch changes nothing.

    Args:
        model: `model(tokens, positions, t, y, attend, ...) -> [B, N, D]`, as `models.dit.DiT`.
        process: How noise is mixed in, and what the model predicts.
        dropout: Share of the samples whose condition is replaced by the null class, for classifier-free
            guidance (Ho and Salimans 2022).
        labels: Whether the model is told classes; false for one of texts alone.
        per_frame: A time of its own for each frame of a clip (diffusion forcing: Chen et al. 2024).
        seed: Of everything random.
        brick: Patches of a brick along each axis of the grid. The tokens stand brick after brick then, which
            makes the tiles of local masks dense (see `bricked`); the result is the same. None: row by row.
        judge: Who tells what the model is worth; training needs one.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        process: Process,
        dropout: float = 0.1,
        labels: bool = True,
        per_frame: bool = False,
        seed: int = 0,
        brick: Sequence[int] | None = None,
        judge: DrawingJudge | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= dropout < 1:
            raise ValueError(f"objective.dropout is {dropout}; it must be from 0 to less than 1")
        if seed < 0:
            raise ValueError(f"objective.seed is {seed}; it must be at least 0")
        self.model: Any = model
        self.process = process
        self.dropout, self.labels, self.per_frame, self.seed = dropout, labels, per_frame, seed
        self.brick = None if brick is None else tuple(brick)
        self._judge = judge
        self._fed: tuple[Clips, Feed] | None = None

    def load(self, data: Clips, wanted: Sequence[int], step: int) -> Noisy:
        """The rows with these global indices, see `Feed`; the step changes nothing."""
        if self._fed is None or self._fed[0] is not data:
            self._fed = data, feed(data, self.model.patch, self.model.grid, self.seed)
        return self.noisy(self._fed[1].load(wanted))

    def context(self, data: Clips) -> int:
        """Raises ValueError naming the settings of model, data and objective that do not fit each other."""
        check_fit(self, data)
        if self._judge is not None:
            self._judge.check(self)
        traits = data.traits
        return traits.pack or max(token_shape(shape, self.model.patch)[0] for shape in traits.shapes)

    def placement(self, data: Clips, layout: Layout, mask: Mask) -> Placement:
        context, traits, patch = self.context(data), data.traits, self.model.patch
        if traits.pack is not None:
            return layout.place(context, Documents((0, 1), inner=mask))
        found = []
        for length, shape in sorted((token_shape(shape, patch)[0], shape) for shape in traits.shapes):
            grids = grids_of(shape, patch, self.model.grid)
            own = mask if grids is None else regridded(mask, *grids)
            found.append(place(layout, length, own, self.bricks(grids)))
        return found[-1]

    def bricks(self, grids: tuple[Grid, Grid] | None) -> Bricks | None:
        """As in `Noisy`, for samples whose grids are these."""
        if self.brick is None:
            return None
        grid = tuple(self.model.grid) if grids is None else grids[1]
        return grid, self.brick, dilation_of(self.model.masks[0], len(grid))

    def flops(self, batches: Sequence[Noisy]) -> float:
        model, macs = self.model, 0
        for batch in batches:
            rows = 1 if batch.offsets is None else batch.rows
            found = {m: pairs(batch.mask(m), batch.length, model.kv_heads) // rows for m in set(model.masks)}
            seen = [found[mask] for mask in model.masks]
            if batch.text is None:
                macs += batch.rows * model.macs(batch.length, seen)
            else:
                macs += sum(model.macs(batch.length, seen, text=words) for words in batch.text.lengths)
        return 6.0 * macs

    def judge(self) -> Judge:
        if self._judge is None:
            raise ValueError("objective.judge is null; training needs one, as conf/objective/ has")
        return self._judge

    def say(self, part: Noisy, mixed: Tensor, attend: Attends) -> tuple[Tensor, Tensor | None]:
        """`predict`, for those who make samples: engines know it as a way in."""
        return self.predict(part, mixed, attend)

    def noisy(self, batch: Clean) -> Noisy:
        """Whole rows as they are trained on.

        Raises:
            ValueError: Times per frame are asked of packed rows.
        """
        count = batch.frames if self.per_frame else batch.labels.shape[1]
        u = uniform(self._keys(Stream.TIME, batch), count)
        dropped = uniform(self._keys(Stream.DROP, batch), batch.labels.shape[1]) < self.dropout
        return self._drawn(batch, u, dropped, normal(self._keys(Stream.NOISE, batch), batch.tokens.shape[1:]))

    def probe(self, batch: Clean, number: int, of: int) -> Noisy:
        """Whole rows at fixed time and noise, for validation: the median time of part `number` of `of` equal
        parts of their distribution. No seed plays a part, so runs can be compared.
        """
        keys = [Key(0, Stream.PROBE, index, number) for index in batch.indices]
        u = torch.full(batch.labels.shape, (number + 0.5) / of, dtype=torch.float64)
        none = torch.zeros(batch.labels.shape, dtype=torch.bool)
        return self._drawn(batch, u, none, normal(keys, batch.tokens.shape[1:]))

    def _keys(self, stream: Stream, batch: Clean) -> list[Key]:
        return [Key(self.seed, stream, index) for index in batch.indices]

    def _drawn(self, batch: Clean, u: Tensor, dropped: Tensor, noise: Tensor) -> Noisy:
        packed = batch.offsets is not None
        if packed and self.per_frame:
            raise ValueError("objective.per_frame is true, but the rows are packed: set it to false")
        sizes, length = batch.sizes(), batch.tokens.shape[1]
        t = self.process.time(u, sizes.clamp_min(1) if packed else torch.tensor(length))
        y = batch.labels.masked_fill(dropped, batch.null)
        text = None if batch.text is None else batch.text.without(dropped[:, 0])
        if packed:
            t, y = (x.gather(1, batch.members.clamp_min(0)) for x in (t, y))
        else:
            y = y[:, 0]
            t = t.repeat_interleave(length // batch.frames, 1) if t.shape[1] > 1 else t[:, 0]
        real = batch.members >= 0
        return Noisy(
            batch.tokens, noise, real, t, y, batch.positions, batch.channels, batch.offsets, text,
            batch.grids, self.bricks(batch.grids),
        )  # fmt: skip

    def predict(self, part: Noisy, mixed: Tensor, attend: Attends) -> tuple[Tensor, Tensor | None]:
        """What the model says of `mixed` at the times and conditions of `part`: float32 [B, N, D], and the
        raw variance, like it, of a model that learns one.
        """
        more: dict[str, Any] = {} if part.offsets is None else {"offsets": part.offsets}
        if part.text is not None:
            more |= part.text.arguments()
        if part.grids is not None:
            more["grid"] = part.grids[1]
        y = part.y if self.labels else None
        said = self.model(mixed, part.positions, self.process.clock(part.t), y, attend, **more)
        return split(exact(said), mixed.shape[-1], part.channels)

    def errors(self, part: Noisy, attend: Attends) -> Tensor:
        """Weighted squared error of each token, the mean over its features, and, where the model learns a
        variance, its part of the variational bound: [B, N]; 0 for padding.
        """
        x, noise = exact(part.tokens), exact(part.noise)
        t = part.t[..., None] if part.t.ndim == 2 else part.t[:, None, None]
        mixed = self.process.mix(x, noise, t)
        said, raw = self.predict(part, mixed, attend)
        error = (said - self.process.target(x, noise, t)).square() * self.process.weight(t)
        if raw is not None:
            # a flow has none: refused before the first step (see `check_fit`)
            assert isinstance(self.process, Diffusion)
            error = error + bound(self.process, x, mixed, (said, raw), t)
        return error.mean(-1).where(part.real, 0.0)

    def forward(self, part: Noisy, attend: Attends, denominator: float) -> Tensor:
        """This rank's share of the mean: its summed error over the *global* number of real tokens."""
        return self.errors(part, attend).sum() / denominator

    @torch.no_grad()
    def losses(self, part: Noisy, attend: Attends) -> Tensor:
        """`errors`, without a gradient."""
        return self.errors(part, attend)
