"""python -m longspan.train.evaluate run.dir=runs/latest"""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from omegaconf import DictConfig

from .config import ConfigError, Run, typed
from .data.needle import Needle
from .data.sample import Dataset
from .entry import entry, guarded
from .job import Job, Launch, build, processes
from .measure import bounds, held_out_loss, retrieval, text_of
from .pictures import loss_by_position, needle_map
from .progress import Progress
from .record import write_json
from .trained import config_of, load_weights


@dataclass
class Evaluation:
    """The root keys of conf/evaluate.yaml."""

    run: Run = field(default_factory=Run)
    checkpoint: str = "auto"
    device: str = "auto"
    timeout_s: float = 600.0
    samples: int | None = None
    depths: list[float] = field(default_factory=list)
    lengths: list[int] | None = None
    needles: int = 8
    parallel: Any = None


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="evaluate")
def _composed(cfg: DictConfig) -> None:
    launch = Launch.of(os.environ)
    sys.exit(guarded(lambda: evaluate(typed(cfg, Evaluation), launch), launch))


def evaluate(cfg: DictConfig, launch: Launch) -> int:
    """Measures a run's newest (or a named) checkpoint; rank 0 prints, draws and writes evaluation.json into
    the run folder.
    """
    _check_numbers(cfg)
    folder = Path(cfg.run.dir)
    config = config_of(folder, parallel=cfg.parallel)
    with processes(launch, cfg.device, cfg.timeout_s) as device, Progress(rank=launch.rank) as shown:
        job = build(config, launch, device)
        if not isinstance(job.data, Dataset):
            raise ValueError(f"run.dir={folder} trained no language model: take longspan draw")
        step = load_weights(folder, cfg.checkpoint, job.model, shown.note, cfg=config)
        found: dict[str, Any] = {"step": step}
        rows = {"run": f"{folder}, step {step}"}
        rows |= _text(job, cfg, folder, found)
        if isinstance(job.data, Needle):
            rows |= _needles(job, cfg, folder, found)
        if dist.get_rank() == 0:
            write_json(folder / "evaluation.json", found)
            shown.summary(rows)
    return 0


def _check_numbers(cfg: DictConfig) -> None:
    counts = {
        "samples": [1 if cfg.samples is None else cfg.samples],
        "needles": [cfg.needles],
        "lengths": list(cfg.lengths or [1]),
    }
    for name, values in counts.items():
        if not values or min(values) < 1:
            raise ConfigError(f"{name} is {cfg[name]}; it must be at least 1")
    if not cfg.depths or not all(0 <= depth <= 1 for depth in cfg.depths):
        raise ConfigError(f"depths is {cfg.depths}; it must list numbers from 0 (the start) to 1")


def _text(job: Job, cfg: DictConfig, folder: Path, found: dict[str, Any]) -> dict[str, str]:
    data = job.data.held_out()
    samples = len(data) if cfg.samples is None else min(cfg.samples, len(data))
    measured = held_out_loss(job, data, samples)
    edges, values = measured.by_position()
    text = text_of(data, samples)
    others: Mapping[str, float] = {} if isinstance(data, Needle) else bounds(text)
    found |= {
        "held_out": {
            "bits_per_byte": measured.bits_per_byte,
            "sequences": samples,
            "bytes": len(text),
            "others": others,
        },
        "by_position": {"edges": edges, "bits_per_byte": values},
    }
    if dist.get_rank() == 0 and values:
        loss_by_position(edges, values, folder / "position.png", shard_edges=[])
    buckets = zip(edges, edges[1:], values, strict=False)
    return {
        "held out": f"{measured.bits_per_byte:.3f} bits per byte over {len(text):,} bytes",
        "same bytes": ", ".join(f"{name} {value:.2f}" for name, value in others.items()) or "-",
        "by position": "  ".join(f"{a}-{b}: {v:.2f}" for a, b, v in buckets),
    }


def _needles(job: Job, cfg: DictConfig, folder: Path, found: dict[str, Any]) -> dict[str, str]:
    assert isinstance(job.data, Needle)
    trained = job.data.context
    lengths = list(
        cfg.lengths
        or [n for n in (trained // 4, trained // 2, trained, 2 * trained) if n >= job.data.shortest]
    )
    accuracy = retrieval(job, job.data, depths=list(cfg.depths), lengths=lengths, samples=cfg.needles)
    found["retrieval"] = {"depths": list(cfg.depths), "lengths": lengths, "accuracy": accuracy.tolist()}
    if dist.get_rank() == 0:
        needle_map(
            folder / "needle.png",
            depths=list(cfg.depths),
            lengths=lengths,
            accuracy=accuracy,
            trained=trained,
        )
    return {f"{length} tokens": _line(cfg.depths, accuracy[:, j]) for j, length in enumerate(lengths)}


def _line(depths: list[float], accuracy: npt.NDArray[np.float64]) -> str:
    return "  ".join(f"depth {d:g}: {a:.2f}" for d, a in zip(depths, accuracy, strict=True))


def main() -> None:
    """Composes the config and evaluates; exit codes are listed in `entry`."""
    entry(_composed, "evaluate", os.environ)


if __name__ == "__main__":
    main()
