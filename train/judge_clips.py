"""What a diffusion model is worth: held-out loss at fixed times and noise, and samples, seen and measured."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch.distributed as dist

from .data.clip import missing
from .diffusion.grids import by_class, needs_av, save_gif, save_mp4, save_png
from .diffusion.metrics import Features
from .diffusion.ruler import Ruler, Sampled
from .diffusion.samplers import Euler, Sampler
from .diffusion.validate import validation_loss
from .drawing import check_sampling, denoise_of, draw
from .job import Job
from .loop import Loop
from .measure import autocast
from .metrics import Metrics
from .objective.denoise import Denoise
from .pictures import loss_curve

Made = TypeVar("Made")
Video = Literal["gif", "mp4"]
COLUMNS = 10


class ClipJudge:
    """sampler: how samples are made. guidance: of classifier-free guidance, each measured by itself. samples:
    at the end; preview: at each evaluation while it trains, with the same noise every time; 0 makes none.
    features: of clips for the Frechet distance: their pixels, if they are few, or an object that is called
    with clips [n, C, F, H, W], such as `diffusion.metrics.Squares`. video: what clips that move are written
    as, beside a grid of their frames.
    """

    def __init__(
        self, *, sampler: Sampler | None = None, guidance: Sequence[float] = (1.0,), samples: int = 100,
        preview: int = 0, features: Literal["pixels"] | Features = "pixels", video: Video = "gif",
    ) -> None:  # fmt: skip
        if samples < 0 or preview < 0:
            raise ValueError(
                f"objective.judge.samples is {samples}, preview {preview}; both must be at least 0"
            )
        if not guidance and (samples or preview):
            raise ValueError(
                "objective.judge.guidance is empty: give at least one, such as [1.0], or set samples and "
                "preview to 0"
            )
        if features != "pixels" and not callable(features):
            raise ValueError(f"objective.judge.features is {features!r}; it can be pixels, or a _target_")
        check_video("objective.judge.video", video)
        self.video = video
        self.sampler, self.guidance = sampler or Euler(), tuple(guidance)
        self.samples, self.preview, self.features = samples, preview, features

    def check(self, objective: Denoise) -> None:
        """ValueError for samples that cannot be made of such a model, ModuleNotFoundError for pictures
        that cannot.
        """
        if self.samples or self.preview:
            for guidance in self.guidance:
                check_sampling(objective, self.sampler, guidance)
            if find_spec("PIL") is None:
                raise missing("pillow", "a picture of samples")
            films_of(self.video)

    def held_out(self, job: Job, samples: int) -> dict[str, float]:
        with autocast(job):
            losses = validation_loss(
                denoise_of(job), job.data.held_out(), samples, patch=job.model.patch, grid=job.model.grid,
                layout=job.layout, mask=job.mask, device=job.device, part=(job.dp_rank, job.dp),
            )  # fmt: skip
        return {"eval_loss": float(losses.mean())}

    def words(self, row: Mapping[str, float]) -> str:
        return f"loss {row['eval_loss']:.4f} at fixed times and noise"

    def show(self, job: Job, folder: Path, step: int) -> dict[str, Path]:
        """A grid of samples of this step."""
        if not self.preview:
            return {}
        found = draw(job, self.sampler, self.preview, self.guidance[0])

        def save() -> dict[str, Path]:
            (folder / "samples").mkdir(exist_ok=True)
            return grids(found, folder / "samples", f"step-{step:08d}", self.video)

        return on_first(job, save) or {}

    def facts(self, job: Job) -> str:
        told, shapes = job.data.describe(), job.data.traits.shapes
        shape = " or ".join(" x ".join(map(str, shape)) for shape in shapes[:3])
        more = f" or {len(shapes) - 3} others" if len(shapes) > 3 else ""
        return (
            f"{told.get('corpus', '?')}: {len(job.data)} clips of {shape}{more}, up to {job.context} tokens"
        )

    def finish(self, loop: Loop, folder: Path, samples: int) -> dict[str, Any]:
        job, summary, measured = loop.job, dict[str, Any](), {}
        if samples:
            loop.evaluate(samples)
            summary["held_out_loss"] = loop.state.evals[-1]["eval_loss"]
        wanted = self.guidance if self.samples else ()
        ruler = on_first(job, lambda: Ruler(job.data, self.features)) if wanted else None
        for guidance in wanted:
            found = draw(job, self.sampler, self.samples, guidance)
            made = on_first(job, lambda found=found: self._measured(ruler, found, folder))  # type: ignore[misc]
            if made is not None:
                measured[f"{guidance:g}"] = made[0]
                for name, path in made[1].items():
                    loop.record.picture(name, path)
        real = on_first(job, lambda: ruler.real(self.samples) if ruler is not None else {})
        if measured:
            summary |= {"samples": measured} | ({"real": real} if real else {})
        on_first(job, lambda: _curve(loop, folder))
        return summary

    def _measured(
        self, ruler: Ruler | None, found: Sampled, folder: Path
    ) -> tuple[dict[str, float], dict[str, Path]]:
        """Rank 0: measures and pictures of samples."""
        assert ruler is not None
        return ruler.measure(found), grids(found, folder, f"samples-{found.guidance:g}", self.video)

    def headline(self, summary: Mapping[str, Any], folder: Path) -> dict[str, str]:
        rows = (
            {"result": f"held-out loss {summary['held_out_loss']:.4f}"} if "held_out_loss" in summary else {}
        )
        for guidance, values in summary.get("samples", {}).items():
            rows[f"guidance {guidance}"] = _words(values)
        if "real" in summary:
            rows["held-out data"] = _words(summary["real"])
        return rows | {"try it": f"longspan draw run.dir={folder} labels=[0,1,2] guidance=2"}


def on_first(job: Job, work: Callable[[], Made]) -> Made | None:
    """Runs `work` on rank 0 alone, and returns what it gave there; what fails there fails on all ranks."""
    return job.ranks.together(lambda: work() if dist.get_rank() == 0 else None)


def check_video(setting: str, video: str) -> None:
    """ValueError for what no video can be written as."""
    if video not in get_args(Video):
        raise ValueError(f"{setting} is {video!r}; it can be {', '.join(get_args(Video))}")


def films_of(video: Video) -> None:
    """ModuleNotFoundError where such a file cannot be written."""
    if video == "mp4":
        needs_av()


def grids(found: Sampled, folder: Path, name: str, video: Video = "gif") -> dict[str, Path]:
    """Samples as a grid, a class after the other, and videos as a GIF or an MP4 too."""
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
        film = save_gif if video == "gif" else save_mp4
        made[f"{name}-video"] = film(clips, folder / f"{name}.{video}", columns=COLUMNS)
    return made


def _curve(loop: Loop, folder: Path) -> None:
    rows = [row for row in Metrics.read(folder / "metrics.jsonl") if isinstance(row["loss"], float)]
    evals = [row | {"loss": row["eval_loss"]} for row in loop.state.evals]
    path = loss_curve(rows, folder / "loss.png", evals=evals, bounds={}, unit="squared error")
    loop.record.picture("loss", path)


def _words(values: Mapping[str, float]) -> str:
    shown = {name: f"{value:.3f}" for name, value in values.items() if name != "count"}
    return ", ".join(f"{name} {text}" for name, text in shown.items()) + f" (n {values['count']:.0f})"
