"""Memory of a training step by tokens and `memory=` preset, and how near the dry run comes:
`python -m benchmarks.memory`.

measured: bytes that torch's CPU allocator handed out, summed from its profiler's events, in a real step.
predicted: what `longspan.launch.dryrun` says without data. A step is forward, backward and optimizer.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from longspan.launch.dryrun import Dry, estimate, stood_in
from longspan.train.config import typed
from longspan.train.job import Job, Launch, build, processes
from longspan.train.loop import backward, micro_batches

MODEL = (
    "experiment=tiny", "parallel=single", "data=mock", "data.vocab=4096", "track=none", "train.micro_batch=1",
    "model.dim=128", "model.hidden=512", "model.layers=4", "objective.chunk=512",
)  # fmt: skip
CASES: dict[str, tuple[str, ...]] = {
    "none": (),
    "long": ("memory=long", "memory.mlp_tile=1024"),
    "longest": ("memory=longest", "memory.mlp_tile=1024"),
    "keep_attention": ("memory.recompute=keep_attention",),
    "none, bf16": ("train.precision=bfloat16",),
    "longest, S2 mask": ("memory=longest", "memory.mlp_tile=1024", "mask=s2"),
    "none, 2 micro batches": ("train.accumulate=2",),
}
TOKENS = (1024, 2048, 4096, 8192)
COMPARED = 4096


@dataclass(frozen=True)
class Row:
    """Bytes of one step; activations are what is on the device beside weights, optimizer and gradients when
    most is held, host what is in host memory.
    """

    case: str
    tokens: int
    predicted: int
    measured: int
    activations: int
    host: int

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def composed(overrides: Sequence[str]) -> DictConfig:
    """The config of a training."""
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(compose("train", overrides=list(overrides)))


def dry(overrides: Sequence[str]) -> DictConfig:
    """The config of a dry run."""
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(stood_in(compose("dryrun", overrides=list(overrides))), Dry)


def step(job: Job, number: int) -> None:
    """Forward, backward and optimizer, as the loop does."""
    batches = micro_batches(job, job.global_batch * number, number)
    backward(job, batches, float(sum(b.valid for b in batches)) * job.dp)
    job.engine.step(1e-3, 1.0)


def measured(cfg: DictConfig, launch: Launch | None = None) -> int:
    """Most bytes held in the second step of the job: weights and optimizer, and what the allocator gave."""
    with processes(launch or Launch(), "cpu", 600.0) as device:
        job = build(cfg, launch or Launch(), device)
        step(job, 0)
        held: dict[int, int] = {}
        engine: Any = job.engine
        for p in job.model.parameters():
            for x in (p, *(v for v in engine.optimizer.state[p].values() if isinstance(v, Tensor))):
                x = x.to_local() if hasattr(x, "to_local") else x
                held[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            step(job, 1)
        results: Any = seen.profiler
        events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
        now, most = 0, 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return sum(held.values()) + most


def row(case: str, tokens: int) -> Row:
    """One case, run and predicted."""
    words = (*MODEL, *CASES[case], f"data.context={tokens}")
    found = estimate(dry(words))
    still = ("parameters", "optimizer", "gradients")
    active = sum(n for name, n in found.peak.items() if name not in still)
    # on the CPU host memory is memory like any other
    return Row(case, tokens, found.total + found.host, measured(composed(words)), active, found.host)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| case | tokens | predicted MiB | measured MiB | ratio | activations B/token | host B/token |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r.case} | {r.tokens} | {r.predicted / 2**20:.1f} | {r.measured / 2**20:.1f} | {r.ratio:.3f} "
            f"| {r.activations / r.tokens:,.0f} | {r.host / r.tokens:,.0f} |"
        )
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """Measured bytes against tokens, with the predictions as rings."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for case in dict.fromkeys(r.case for r in rows):
        some = [r for r in rows if r.case == case]
        if len(some) > 1:
            line = axes.plot([r.tokens for r in some], [r.measured / 2**20 for r in some], "-", label=case)[0]
            axes.plot(
                [r.tokens for r in some], [r.predicted / 2**20 for r in some], "o",
                markerfacecolor="none", color=line.get_color(),
            )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(TOKENS, [str(n) for n in TOKENS])
    axes.set_yticks([32 * 2**i for i in range(6)], [str(32 * 2**i) for i in range(6)])
    axes.minorticks_off()
    axes.set_xlabel("tokens of a sequence")
    axes.set_ylabel("MiB at the peak of a step")
    axes.set_title("measured (lines) and predicted by the dry run (rings)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(title="memory=", frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "memory.json")
    out: Path = parser.parse_args().out
    rows = [row(case, n) for case in ("none", "long", "longest") for n in TOKENS]
    rows += [row(case, COMPARED) for case in list(CASES)[3:]]
    shape = {"model": list(MODEL), "torch": torch.__version__}
    kept = [asdict(r) | {"ratio": r.ratio} for r in rows]
    out.write_text(json.dumps(shape | {"rows": kept}, indent=1) + "\n")
    draw(rows, out.with_suffix(".png"))
    print(table(rows))


if __name__ == "__main__":
    main()
