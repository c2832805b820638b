"""python -m longspan.launch.plan experiment=llama8b_1m_8gpu gpus=8 gpu=h100: which layout, degrees, engine
and memory preset to run a job with, why, and how.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig
from rich.console import Console

from ..train.config import ConfigError, Root, made, typed
from ..train.entry import entry, guarded
from ..train.job import Launch, check_numbers
from . import plan_figure, plan_report
from .dryrun import stood_in
from .plan_calibrate import calibrated
from .plan_cost import Machine
from .plan_hardware import benchmarked
from .plan_job import Candidate, Shape, candidates, shape
from .plan_memory import needed
from .plan_search import Found, Measure, by_layout, search

# What a plan decides, and the key that narrows it.
DECIDED = {
    "parallel": "layouts=[ring]", "engine": "engines=[fsdp]", "memory": "memories=[long]",
    "train.micro_batch": "micro=1", "train.accumulate": "batch=64",
}  # fmt: skip


@dataclass
class Planning(Root):
    """The root keys of conf/plan.yaml: those of train, and what is there for it. It says what each means."""

    gpus: int = 8
    nodes: int | None = None
    gpu: Any = MISSING
    interconnect: Any = MISSING
    batch: int | None = None
    layouts: list[str] | None = None
    engines: list[str] | None = None
    memories: list[str] | None = None
    micro: int = 4
    reserve_gib: float = 6.0
    tries: int = 12
    best: int = 3
    calibrate: bool = False
    json: str | None = None
    figure: str | None = None


@dataclass(frozen=True)
class Plan:
    """What was found, and for what. given: the words that say the job."""

    job: Shape
    on: Machine
    found: Found
    ways: list[Candidate]
    given: list[str] = field(default_factory=list)
    nodes: int = 1


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="plan")
def _composed(cfg: DictConfig) -> None:
    words = list(HydraConfig.get().overrides.task)
    sys.exit(guarded(lambda: plan(typed(stood_in(cfg), Planning), words), Launch()))


def plan(cfg: DictConfig, words: Sequence[str], measure: Measure | None = None) -> int:
    """Prints the plan of the job that `words` say over conf/train.yaml; writes JSON and figure if asked.
    measure: see `planned`. ValueError for a job that cannot be planned, or if nothing fits.
    """
    made_plan = planned(cfg, words, measure)
    console = Console(highlight=False)
    args = made_plan.job, made_plan.found, made_plan.on, made_plan.given, made_plan.nodes
    plan_report.show(*args, console)
    room = made_plan.on.card.memory_gib - cfg.reserve_gib
    lengths: list[plan_figure.Point] = []
    counts: list[plan_figure.Point] = []
    if cfg.json is not None or cfg.figure is not None:
        # curves over many lengths and devices are not timed
        job, on = made_plan.job, replace(made_plan.on, attends=False)
        learned = made_plan.found.learned
        lengths = plan_figure.curves(job, made_plan.ways, on, room, learned)
        counts = plan_figure.over_gpus(job, partial(candidates, cfg, job), cfg.gpus, on, room, learned)
    if cfg.json is not None:
        curves = {"lengths": [asdict(p) for p in lengths], "gpus": [asdict(p) for p in counts]}
        Path(cfg.json).write_text(json.dumps(plan_report.content(*args, curves), indent=1) + "\n")
    if cfg.figure is not None and lengths and counts:
        _draw(made_plan, lengths, counts, cfg)
    if not made_plan.found.best:
        raise ValueError(
            f"nothing that was tried fits {cfg.gpus} x {made_plan.on.card.name}: see above by how much; take "
            f"more gpus, a shorter data.context, a larger gpu, or more tries={2 * cfg.tries}"
        )
    return 0


def planned(cfg: DictConfig, words: Sequence[str], measure: Measure | None = None) -> Plan:
    """The plan. measure: what a way needs, by default as the dry run says."""
    check_numbers(cfg)
    for name in ("gpus", "micro", "tries", "best", *(("batch",) if cfg.batch is not None else ())):
        if cfg[name] < 1:
            raise ValueError(f"{name} is {cfg[name]}; it must be at least 1")
    nodes = _nodes(cfg)
    given, node = job_words(words), cfg.gpus // nodes
    job, card = shape(cfg), made(cfg.gpu)
    rates = calibrated(job, node) if cfg.calibrate else benchmarked(card, job.precision, job.head_dim)
    on = Machine(card, made(cfg.interconnect), node, rates, attends=cfg.calibrate)
    ways = list(candidates(cfg, job, cfg.gpus, node))
    if not ways:
        raise ValueError(
            f"there is no way to share {'any number of' if cfg.batch is None else cfg.batch} sequences of "
            f"{job.tokens} tokens over {cfg.gpus} gpus with layouts={cfg.layouts} and engines={cfg.engines}: "
            f"leave layouts or engines null, or take another batch"
        )
    found = search(
        job, ways, on, measure or (lambda way: needed(given, job, way, node)),
        room_gib=card.memory_gib - cfg.reserve_gib, tries=cfg.tries, best=cfg.best,
    )  # fmt: skip
    return Plan(job, on, found, ways, given, nodes)


def _nodes(cfg: DictConfig) -> int:
    nodes = int(-(-cfg.gpus // 8) if cfg.nodes is None else cfg.nodes)
    if nodes < 1 or cfg.gpus % nodes:
        fits = [n for n in range(1, cfg.gpus + 1) if cfg.gpus % n == 0]
        raise ValueError(
            f"gpus is {cfg.gpus}, nodes {nodes}: every machine has as many; "
            f"nodes can be {', '.join(map(str, fits))}"
        )
    return nodes


def job_words(words: Sequence[str]) -> list[str]:
    """Those that say the job, not the plan. ConfigError for one that says what the plan is to find."""
    own = {f.name for f in fields(Planning)} - {f.name for f in fields(Root)}
    kept = []
    for word in words:
        key = word.partition("=")[0].lstrip("+~")
        for decided, instead in DECIDED.items():
            if key == decided or key.startswith(f"{decided}."):
                raise ConfigError(f"{word}: that is what the plan is to find; narrow it with {instead}")
        if key.partition(".")[0] not in own:
            kept.append(word)
    return kept


def _draw(
    made_plan: Plan, lengths: list[plan_figure.Point], counts: list[plan_figure.Point], cfg: DictConfig
) -> None:
    job, on = made_plan.job, made_plan.on
    bars = []
    for name, v in by_layout(job, made_plan.found).items():
        note = "fits" if v.need is not None and not v.lost else "not tried" if v.need is None else "too large"
        degrees = " ".join(f"{n}={d}" for n, d in v.way.degrees.items() if d > 1)
        bars.append((f"{name} {degrees}\nmemory={v.way.memory}, {note}", v))
    title = f"{cfg.experiment_name} on {cfg.gpus} x {on.card.name}: predicted"
    plan_figure.draw(lengths, counts, bars, job, Path(cfg.figure), title)


def main() -> None:
    """Composes the config and plans; exit codes are listed in `train.entry`."""
    entry(_composed, "plan", os.environ)


if __name__ == "__main__":
    main()
