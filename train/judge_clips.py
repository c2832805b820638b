"""What a diffusion model is worth: held-out loss at fixed times and noise, and samples, seen and measured."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch.distributed as dist

from ..models.patch import unpatchify
from .batch import bind
from .data.clip import Clips
from .data.digits import Digits
from .data.moving_digits import MovingDigits
from .diffusion.batch import grid_of, token_shape, volume
from .diffusion.classify import DigitClassifier, motion
from .diffusion.generate import Request, generate
from .diffusion.grids import by_class, save_gif, save_png
from .diffusion.metrics import frechet_distance, nearest
from .diffusion.samplers import Euler, Sampler
from .diffusion.validate import validation_loss
from .job import Job
from .loop import Loop
from .measure import autocast
from .pictures import loss_curve
from .track import Metrics

Array = npt.NDArray[Any]
AT_ONCE = 100  # samples of a request: nothing depends on it
MOST_PIXELS = 1024  # of a clip, beyond which pixels are no features for a Frechet distance
COLUMNS = 10


class Sampled(NamedTuple):
    """Samples [n, C, F, H, W] at one guidance, and the classes that were asked for."""

    guidance: float
    clips: Array
    labels: tuple[int, ...]


class ClipJudge:
    """sampler: how samples are made. guidance: of classifier-free guidance, each measured by itself. samples:
    at the end; preview: at each evaluation while it trains, with the same noise every time; 0 makes none.
    """

    def __init__(
        self, *, sampler: Sampler | None = None, guidance: Sequence[float] = (1.0,), samples: int = 100,
        preview: int = 0,
    ) -> None:  # fmt: skip
        if samples < 0 or preview < 0:
            raise ValueError(
                f"objective.judge.samples is {samples}, preview {preview}; both must be at least 0"
            )
        self.sampler, self.guidance = sampler or Euler(), tuple(guidance)
        self.samples, self.preview = samples, preview

    def held_out(self, job: Job, samples: int) -> dict[str, float]:
        with autocast(job):
            losses = validation_loss(
                _denoise(job), job.data.held_out(), samples, patch=job.model.patch, layout=job.layout,
                mask=job.mask, device=job.device, part=(job.dp_rank, job.dp),
            )  # fmt: skip
        return {"eval_loss": float(losses.mean())}

    def words(self, row: Mapping[str, float]) -> str:
        return f"loss {row['eval_loss']:.4f} at fixed times and noise"

    def show(self, job: Job, folder: Path, step: int) -> dict[str, Path]:
        """A grid of samples of this step."""
        if not self.preview:
            return {}
        found = draw(job, self.sampler, self.preview, self.guidance[0])
        (folder / "samples").mkdir(exist_ok=True)
        return grids(found, folder / "samples", f"step-{step:08d}") if dist.get_rank() == 0 else {}

    def facts(self, job: Job) -> str:
        told = job.data.describe()
        shape = " x ".join(map(str, job.data.shape(0)))
        return f"{told.get('corpus', '?')}: {len(job.data)} clips of {shape}, {job.context} tokens each"

    def finish(self, loop: Loop, folder: Path, samples: int) -> dict[str, Any]:
        job, summary = loop.job, dict[str, Any]()
        if samples:
            loop.evaluate(samples)
            summary["held_out_loss"] = loop.state.evals[-1]["eval_loss"]
        measured = {}
        ruler = Ruler(job.data) if self.samples and self.guidance and dist.get_rank() == 0 else None
        for guidance in self.guidance if self.samples else ():
            found = draw(job, self.sampler, self.samples, guidance)
            if ruler is not None:
                measured[f"{guidance:g}"] = ruler.measure(found)
                for name, path in grids(found, folder, f"samples-{guidance:g}").items():
                    loop.record.picture(name, path)
        if dist.get_rank() == 0:
            if ruler is not None:
                summary |= {"samples": measured, "real": ruler.real(self.samples)}
            _curve(loop, folder)
        return summary

    def headline(self, summary: Mapping[str, Any], folder: Path) -> dict[str, str]:
        rows = (
            {"result": f"held-out loss {summary['held_out_loss']:.4f}"} if "held_out_loss" in summary else {}
        )
        for guidance, values in summary.get("samples", {}).items():
            rows[f"guidance {guidance}"] = _words(values)
        if "real" in summary:
            rows["held-out data"] = _words(summary["real"])
        return rows | {"try it": f"longspan draw run.dir={folder} labels=[0,1,2] guidance=2"}


def draw(job: Job, sampler: Sampler, count: int, guidance: float, labels: Sequence[int] = ()) -> Sampled:
    """`count` samples of the present weights, of all classes in turn or of these labels; whole on every rank.

    Each dp rank makes a part; the noise of sample i is a function of the seed and i.
    """
    data: Clips = job.data
    wanted = tuple(labels[i % len(labels)] if labels else i % data.classes for i in range(count))
    shape, patch = data.shape(0), job.model.patch
    placement = job.layout.place(token_shape(shape, patch)[0], job.mask)
    parts: dict[int, Array] = {}
    starts = range(0, count, AT_ONCE)
    for turn in range(job.dp_rank, -(-len(starts) // job.dp) * job.dp, job.dp):
        # weights may be gathered over dp: who has no part left makes the last one again
        first = starts[min(turn, len(starts) - 1)]
        request = Request(
            wanted[first : first + AT_ONCE], token_shape(shape, patch), data.classes, shape[0],
            seed=job.cfg.seed, first=first, guidance=guidance,
        )  # fmt: skip
        with autocast(job):
            tokens = generate(
                _denoise(job), sampler, request, layout=job.layout, placement=placement,
                attend=bind(job.layout, placement), device=job.device,
            )  # fmt: skip
        if turn < len(starts):
            parts[first] = unpatchify(tokens, grid_of(shape, patch), volume(patch)).float().numpy()
    if job.dp > 1:
        each: list[dict[int, Array]] = [{} for _ in range(job.dp)]
        dist.all_gather_object(each, parts, group=job.mesh["dp"].get_group())
        parts = {first: clips for found in each for first, clips in found.items()}
    return Sampled(guidance, np.concatenate([parts[first] for first in sorted(parts)]), wanted)


class Ruler:
    """What samples are held against, made once of the training data: an independent classifier, where there
    is one, and, for small clips, the clips themselves.
    """

    def __init__(self, data: Clips) -> None:
        self.data = data
        digits = data.digits if isinstance(data, MovingDigits) else data
        self._classifier = DigitClassifier(digits) if isinstance(digits, Digits) else None
        small = prod(data.shape(0)) <= MOST_PIXELS
        self._there = np.stack([data.item(i).pixels for i in range(len(data))]) if small else None

    def measure(self, found: Sampled) -> dict[str, float]:
        """Conditional accuracy, the Frechet distance of pixels, and the mean distance to the nearest clip."""
        values = self._accuracy(found.clips, np.array(found.labels))
        if self._there is not None:
            values["frechet"] = frechet_distance(found.clips, self._there)
            values["nearest"] = float(nearest(found.clips, self._there)[0].mean())
        return values | {"count": len(found.clips)}

    def real(self, count: int) -> dict[str, float]:
        """The same of as many held-out clips: what no model is expected to beat."""
        held = self.data.held_out()
        there = [held.item(i) for i in range(min(count, len(held)))]
        return self.measure(Sampled(1.0, np.stack([c.pixels for c in there]), tuple(c.label for c in there)))

    def _accuracy(self, clips: Array, labels: Array) -> dict[str, float]:
        """Shares of clips that are what was asked for."""
        if self._classifier is None:
            return {}
        if not isinstance(self.data, MovingDigits):
            return {"accuracy": self._classifier.accuracy(clips, labels)}
        found = motion(clips, labels, self._classifier, speed=self.data.speed)
        return {
            "accuracy": found.both, "digit": found.digit, "direction": found.direction,
            "jitter": found.jitter,
        }  # fmt: skip


def _denoise(job: Job) -> Any:
    return job.objective


def grids(found: Sampled, folder: Path, name: str) -> dict[str, Path]:
    """Samples as a grid, a class after the other, and videos as a GIF too."""
    # as many of each class, in rows
    each = max(1, COLUMNS * COLUMNS // len(set(found.labels)))
    seen: Counter[int] = Counter()
    order = []
    for i in by_class(found.labels):
        seen[found.labels[i]] += 1
        order += [i] if seen[found.labels[i]] <= each else []
    clips = found.clips[order]
    made = {name: save_png(clips, folder / f"{name}.png", columns=COLUMNS if clips.shape[2] == 1 else 2)}
    if clips.shape[2] > 1:
        made[f"{name}-video"] = save_gif(clips, folder / f"{name}.gif", columns=COLUMNS)
    return made


def _curve(loop: Loop, folder: Path) -> None:
    rows = [row for row in Metrics.read(folder / "metrics.jsonl") if isinstance(row["loss"], float)]
    evals = [row | {"loss": row["eval_loss"]} for row in loop.state.evals]
    path = loss_curve(rows, folder / "loss.png", evals=evals, bounds={}, unit="squared error")
    loop.record.picture("loss", path)


def _words(values: Mapping[str, float]) -> str:
    shown = {name: f"{value:.3f}" for name, value in values.items() if name != "count"}
    return ", ".join(f"{name} {text}" for name, text in shown.items()) + f" (n {values['count']:.0f})"
