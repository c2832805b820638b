"""python -m longspan.train.draw run.dir=runs/latest labels=[3,7] guidance=2"""

import os
import sys
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig

from .config import Run, made, typed
from .diffusion.ruler import Ruler
from .diffusion.samplers import Sampler
from .drawing import check_sampling, denoise_of, draw
from .entry import entry, guarded
from .job import Launch, build, processes
from .judge_clips import ClipJudge, check_video, films_of, grids, on_first
from .progress import Progress
from .trained import config_of, load_weights


@dataclass
class Drawing:
    """The root keys of conf/draw.yaml."""

    run: Run = field(default_factory=Run)
    checkpoint: str = "auto"
    device: str = "auto"
    timeout_s: float = 600.0
    count: int = 100
    labels: list[int] = field(default_factory=list)
    guidance: float = 1.0
    sampler: Any = None
    steps: int | None = None
    size: list[int] | None = None
    video: str = "gif"
    parallel: Any = None


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="draw")
def _composed(cfg: DictConfig) -> None:
    launch = Launch.of(os.environ)
    sys.exit(guarded(lambda: samples(typed(cfg, Drawing), launch), launch))


def samples(cfg: DictConfig, launch: Launch) -> int:
    """Samples of a run's weights (their average, if it kept one) as a picture in the run's folder, measured;
    split over the ranks like a training sequence.
    """
    folder = Path(cfg.run.dir)
    config = config_of(folder, parallel=cfg.parallel)
    if cfg.count < 1:
        raise ValueError(f"count is {cfg.count}; it must be at least 1")
    check_video("video", cfg.video)
    films_of(cfg.video)
    with processes(launch, cfg.device, cfg.timeout_s) as device, Progress(rank=launch.rank) as shown:
        job = build(config, launch, device)
        judge = job.objective.judge()
        if not isinstance(judge, ClipJudge):
            raise ValueError(f"run.dir={folder} trained a language model: take longspan sample")
        if bad := [label for label in cfg.labels if not 0 <= label < job.data.classes]:
            raise ValueError(f"labels holds {bad[0]}; the data's classes are 0 to {job.data.classes - 1}")
        sampler = chosen(cfg, judge)
        check_sampling(denoise_of(job), sampler, cfg.guidance)
        step = load_weights(
            folder, cfg.checkpoint, job.model, shown.note, cfg=config, averaged=job.ema is not None
        )
        found = draw(job, sampler, cfg.count, cfg.guidance, list(cfg.labels), cfg.size)

        def tell() -> None:
            pictures = grids(found, folder, f"drawn-{step}-{cfg.guidance:g}", cfg.video)
            values = Ruler(job.data, judge.features).measure(found) if cfg.count > 1 else {}
            rows = {"run": f"{folder}, step {step}", "pictures": ", ".join(map(str, pictures.values()))}
            shown.summary(rows | {name: f"{value:.3f}" for name, value in values.items()})

        on_first(job, tell)
    return 0


def chosen(cfg: DictConfig, judge: ClipJudge) -> Sampler:
    """The sampler that is asked for, by default the run's own, with as many steps as asked."""
    sampler: Sampler = judge.sampler if cfg.sampler is None else made(cfg.sampler)
    if cfg.steps is None:
        return sampler
    assert is_dataclass(sampler) and not isinstance(sampler, type)
    steps: Any = {"steps": cfg.steps}
    return replace(sampler, **steps)


def main() -> None:
    """Composes the config and draws; exit codes are listed in `entry`."""
    entry(_composed, "draw", os.environ)


if __name__ == "__main__":
    main()
