"""The planner against what was measured: `python -m benchmarks.plan` ranks layouts on gloo ranks of this
machine, `python -m benchmarks.plan --published` predicts tables that others have published.

ranks: each layout trains three small jobs for a few steps over 2 and over 4 processes, one sequence over all
of them, and the planner, with matrices, attention and the link timed here, says in which order they come. Of
two layouts it says something only where it predicts them more than TELLS apart.
published: from the constants of the cards alone; nothing was fitted to the tables.
"""

import argparse
import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf

from longspan.kernels.mask import Causal
from longspan.launch.ledger import Moved
from longspan.launch.plan_calibrate import calibrated
from longspan.launch.plan_cost import Machine, compute, placed, timed
from longspan.launch.plan_hardware import Card, Interconnect, Rates, assumed
from longspan.launch.plan_job import Candidate, Shape, candidates, shape
from longspan.launch.plan_memory import dry_config, needed
from longspan.launch.plan_search import guessed
from longspan.train.config import made
from longspan.train.job import Launch, build, processes

from .memory import composed, step
from .plan_picture import draw

CONF = Path(__file__).parent.parent / "conf"
SMALL = ("experiment=tiny", "data=mock", "data.vocab=256", "track=none", "model.head_dim=32")
# little work for each byte: keys of many heads go round where only a window of them is seen
NEAR = (
    *SMALL, "data.context=16384", "mask=window", "mask.left=127", "model.dim=64", "model.hidden=128",
    "model.heads=8",
)  # fmt: skip
JOBS = {
    "causal, 4k": (*SMALL, "data.context=4096"),
    "window, 16k, 8 kv heads": (*NEAR, "model.kv_heads=8"),
    "window, 16k, 1 kv head": (*NEAR, "model.kv_heads=1"),
}
TELLS = 0.05
LAYOUTS = ("ring", "gather", "ulysses", "s2")
STEPS = 5
ONE = Candidate("single", 1, 1, 1, 1, "ddp", "none", 1, 1)
LLAMA_8B = Shape(
    tokens=65536, layers=32, dim=4096, hidden=14336, heads=32, kv_heads=8, head_dim=128,
    parameters=8_030_261_248, matrices=7_504_924_672, masks=((Causal(), 32),),
    precision="bfloat16",
)  # fmt: skip


@dataclass(frozen=True)
class Told:
    """A published figure, and what is predicted."""

    what: str
    published: float
    predicted: float
    unit: str


def hardware(kind: str, name: str) -> Any:
    """What a yaml of conf/gpu or conf/interconnect builds."""
    return made(OmegaConf.load(CONF / kind / f"{name}.yaml"))


def published() -> Iterator[Told]:
    """What is predicted from published constants in closed form."""
    # zhuzilin/ring-flash-attention, README: attention of Llama-3.1-8B, 8k tokens on each of 8 cards;
    # iterations a second of FlashAttention-2 on one card with 8k tokens, of which 8 reach at most 1/8
    tables = (
        ("H800", "h100", 200.0, 591.5, 154.7, (85.2, 90.2)),
        ("A100", "a100", 300.0, 373.4, 94.7, (81.7, 89.8)),
    )
    for name, yaml, link, forward, both, figures in tables:
        shares = efficiency(replace(hardware("gpu", yaml), link_gbs=link), forward, both)
        for words, figure, share in zip(("forward", "forward and backward"), figures, shares, strict=True):
            yield Told(f"zigzag ring, 8 {name}, {words}, of ideal", figure, 100 * share, "%")
    # NVIDIA NeMo's long-context recipe, FP8, 1024 H100: what is left at 1M tokens of the rate at 4k
    slow, fast = (rate(tokens, 1024) for tokens in (2**20, 2**12))
    yield Told(
        "Megatron, 1024 H100, rate at 1M tokens of that at 4k", 100 * 536 / 768, 100 * slow / fast, "%"
    )


def efficiency(card: Card, forward: float, both: float) -> tuple[float, float]:
    """Forward, and both ways: of the rate of one card that a ring of 8 keeps in attention alone."""
    job = replace(LLAMA_8B, layers=1, masks=((Causal(), 1),), dim=0, hidden=0, matrices=0, parameters=0)
    one = 4 * 128 * 32 * 8192 * 8193 / 2
    rates = Rates(1.0, one * forward, 2.5 * one / (1 / both - 1 / forward), card.call_us / 1e6, "published")
    on = Machine(card, Interconnect("", 1.0), 8, rates)
    way = replace(ONE, layout="ring", ring=8)
    work = compute(job, way, on)
    shard = job.tokens // 8 * 2 * 8 * 128
    # k and v go round in bfloat16, forward and backward, their gradients in float32
    sent = [Moved("send", 8, "node", shard * (7 * 2 * 2 + 8 * 4), 3 * 7)]
    whole = timed(job, way, on, sent, 0)
    # of a forward only: as much as of the kernel's time is forward, and its own additions
    ahead = 8 / forward
    added = 7 * 16 * 4096 * job.tokens / 8 / (1e9 * card.memory_gbs) + 8 * rates.call
    waits = max(0.0, (shard * 7 * 2) / (1e9 * card.link_gbs * card.link_share) - ahead * 7 / 8)
    return ahead / (ahead + added + waits), (8 / both) / (work.attention + work.elementwise + whole.layout)


def rate(tokens: int, gpus: int) -> float:
    """Useful FLOP/s of each H100 at the best way for Llama-3-8B, in closed form."""
    job, card = replace(LLAMA_8B, tokens=tokens), hardware("gpu", "h100")
    on = Machine(card, hardware("interconnect", "ib400"), 8, assumed(card, job.precision))
    words = {"layouts": ["single", "usp", "ulysses"], "engines": ["fsdp_bf16"], "micro": 4, "batch": None}
    fits = ["none"] if tokens < 2**15 else ["longest"]
    words |= {"memories": fits, "train": {"precision": "bfloat16", "accumulate": 1}}
    ways = candidates(OmegaConf.create(words), job, gpus, 8)
    least = 2 * job.parameters
    best = min(
        (guessed(job, way, on) for way in ways if fitting(job, way, least)), key=lambda v: v.per_token(job)
    )
    useful = 6 * job.matrices + 12 * job.layers * job.heads * job.head_dim * (tokens + 1) / 2
    return useful / (best.per_token(job) * gpus)


def fitting(job: Shape, way: Candidate, least: int) -> bool:
    """Whether a rank's tokens are no more than the dry run of experiment=llama8b_1m_8gpu has: 131,072."""
    return way.tp == 1 and way.micro * job.tokens // way.split <= 131_072


def longest(gpus: int, card: Card) -> float:
    """Tokens of Llama-3-8B that fit with memory=longest and weights in host memory, by dry runs."""
    words, room = ["experiment=llama8b_1m_8gpu"], (card.memory_gib - 6.0) * 2**30
    way = replace(ONE, engine="fsdp_bf16+offload", memory="longest")
    if gpus > 1:
        way = replace(way, layout="ulysses", head=gpus)
    held = []
    lengths = [n * gpus for n in (2**15, 2**16)]
    for n in lengths:
        job = replace(LLAMA_8B, tokens=n)
        held.append(needed([*words, f"data.context={n}"], job, way, 8).total)
    slope = (held[1] - held[0]) / (lengths[1] - lengths[0])
    return lengths[0] + (room - held[0]) / slope


def ways(size: int) -> list[Candidate]:
    """One sequence over all ranks, in each layout."""
    axis = {"ulysses": "head"}
    return [replace(ONE, layout=name, **{axis.get(name, "ring"): size}) for name in LAYOUTS]  # type: ignore[arg-type]


def ranked(words: Sequence[str], size: int) -> list[dict[str, Any]]:
    """Each layout's predicted and measured seconds of a step of a job on this machine."""
    manager = mp.Manager()
    found = manager.dict()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = shape(dry_config([*words, "world=1"]))
    tried = [placed(job, way) for way in ways(size)]
    mp.spawn(_measured, (words, size, port, tried, found), nprocs=size)
    link = found["link"]
    card = replace(hardware("gpu", "cpu"), link_gbs=link[1], link_us=link[0], link_share=1.0)
    on = Machine(card, Interconnect("", 1.0), size, calibrated(job, size), attends=True)
    rows = []
    for way in tried:
        sent = needed(words, job, way, size).sent
        rows.append({"layout": way.layout, "predicted": timed(job, way, on, sent, 0).total})
        rows[-1] |= {"measured": found[way.layout], "times": asdict(timed(job, way, on, sent, 0))}
    return rows


def agreement(rows: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Of the pairs of layouts that are predicted more than TELLS of the measured time apart, how many were
    measured in that order, and how many there are.
    """
    right = told = 0
    for a, b in combinations(rows, 2):
        fast, slow = sorted((a, b), key=lambda r: float(r["predicted"]))
        if slow["predicted"] - fast["predicted"] > TELLS * min(a["measured"], b["measured"]):
            told += 1
            right += slow["measured"] > fast["measured"]
    return right, told


def _measured(
    rank: int, words: Sequence[str], size: int, port: int, tried: Sequence[Candidate], found: Any
) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
    }
    launch = Launch(rank, size, rank, size)
    with processes(launch, "cpu", 600.0) as device:
        link = _link(rank)
        for way in tried:
            job = build(composed([*words, *way.overrides()]), launch, device)
            seconds = []
            for number in range(STEPS + 1):
                dist.barrier()
                began = time.perf_counter()
                step(job, number)
                dist.barrier()
                seconds.append(time.perf_counter() - began)
            if rank == 0:
                found[way.layout] = min(seconds[1:])
        if rank == 0:
            found["link"] = link


def _link(rank: int) -> tuple[float, float]:
    """(microseconds of an empty message, 10^9 bytes a second of a large one) between ranks 0 and 1."""
    found = []
    for count in (1, 2**21):
        x, least = torch.ones(count), 1e9
        for _ in range(6):
            dist.barrier()
            began = time.perf_counter()
            if rank < 2:
                dist.send(x, 1) if rank == 0 else dist.recv(x, 0)
                dist.recv(x, 1) if rank == 0 else dist.send(x, 0)
            least = min(least, (time.perf_counter() - began) / 2)
        found.append(least)
    return 1e6 * found[0], 4e-9 * 2**21 / max(1e-9, found[1] - found[0])


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--published", action="store_true", help="tables of others, in closed form")
    parser.add_argument(
        "--longest", action="store_true", help="ALST's longest sequences, by dry runs: minutes"
    )
    parser.add_argument("--figure", type=Path, help="draw what earlier runs have written, and no more")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "plan.json")
    args = parser.parse_args(given)
    beside = args.out.with_stem(f"{args.out.stem}-published")
    if args.figure is not None:
        draw(json.loads(args.out.read_text()), json.loads(beside.read_text()), args.figure)
        return
    if args.published or args.longest:
        told = list(published())
        if args.longest:
            told += [
                Told(
                    "ALST, Llama-3-8B, longest on 1 H200", 1.2, longest(1, hardware("gpu", "h200")) / 1e6, "M"
                ),
                Told(
                    "ALST, Llama-3-8B, longest on 8 H100", 3.7, longest(8, hardware("gpu", "h100")) / 1e6, "M"
                ),
            ]
        print("| what | published | predicted |\n|---|---|---|")
        for t in told:
            print(f"| {t.what} | {t.published:.3g} {t.unit} | {t.predicted:.3g} {t.unit} |")
        if args.longest:
            beside.write_text(json.dumps([asdict(t) for t in told], indent=1) + "\n")
        return
    kept: dict[str, Any] = {}
    for name, words in JOBS.items():
        for size in (2, 4):
            rows = ranked(words, size)
            right, pairs = agreement(rows)
            kept.setdefault(name, {})[str(size)] = {"rows": rows, "pairs_right": right, "pairs_told": pairs}
            orders = [
                [r["layout"] for r in sorted(rows, key=lambda r: r[k])] for k in ("predicted", "measured")
            ]
            print(
                f"{name}, {size} ranks: predicted {' < '.join(orders[0])}, measured {' < '.join(orders[1])}"
            )
            for r in rows:
                print(f"  {r['layout']}: {r['predicted']:.3f} s predicted, {r['measured']:.3f} s measured")
            print(f"  {right} of {pairs} pairs in order, predicted more than {TELLS:.0%} of a step apart")
    args.out.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
