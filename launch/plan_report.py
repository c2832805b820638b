"""A plan in words: the best few, why the others lose, and the command."""

import shlex
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from ..train.progress import size
from .plan_cost import Machine
from .plan_job import Shape
from .plan_search import Found, Verdict

SHOWN = 12
SAID = {
    "matrices": "matrices",
    "attention": "attention",
    "elementwise": "elementwise work",
    "optimizer": "optimizer",
    "layout": "keys, queries or heads on their way",
    "weights": "weights and gradients on their way",
    "tensor": "transfers inside layers",
    "host": "copies to host memory",
}


def advice(winner: Verdict) -> str:
    """Whether to split a sequence at all."""
    way = winner.way
    if way.split == 1:
        rest = f" (its layers are: tp={way.tp})" if way.tp > 1 else ""
        return f"do not split the sequence: each rank takes whole ones{rest}"
    return f"split each sequence over {way.split} ranks, with parallel={way.layout}"


def command(winner: Verdict, given: Sequence[str], nodes: int) -> str:
    """What starts the training."""
    world = winner.way.world
    words = ["-m", "longspan.train", *given, *winner.way.overrides()]
    if world == 1:
        return shlex.join(["python", *words])
    start = ["torchrun"]
    if nodes > 1:
        start += ["--nnodes", str(nodes), "--nproc-per-node", str(world // nodes)]
        start += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "HOST:29500"]
    else:
        start += ["--nproc-per-node", str(world)]
    return shlex.join([*start, *words])


def show(job: Shape, found: Found, on: Machine, given: Sequence[str], nodes: int, console: Console) -> None:
    """Prints all of it."""
    between = f", {on.between.name} between {nodes} machines" if nodes > 1 else ""
    console.print(f"{on.node * nodes} x {on.card.name}{between}; {on.rates.source}")
    console.print(f"{found.counted} ways counted, {found.skipped} of them set aside without a dry run")
    for place, v in enumerate(found.best, 1):
        console.print(f"{place}: {v.way}", style="bold", markup=False)
    if found.best:
        console.print(_breakdown(job, found.best))
    losers = reasons(job, found)
    if losers:
        console.print("why others lose", style="italic")
    for way, why in losers[:SHOWN]:
        console.print(f"- {way}: {why}", markup=False)
    if found.best:
        console.print(f"\n{advice(found.best[0])}", style="bold")
        console.print(command(found.best[0], given, nodes), soft_wrap=True, markup=False)


def _breakdown(job: Shape, best: Sequence[Verdict]) -> Table:
    """Time and memory of each, as columns."""
    table = Table(title="a step on the busiest rank, and memory at its peak by the dry run")
    table.add_column("what")
    for place in range(1, len(best) + 1):
        table.add_column(str(place), justify="right")
    table.add_row("tokens/s, all devices", *(f"{1 / v.per_token(job):,.0f}" for v in best), style="bold")
    table.add_row("step", *(_s(v.times.total) for v in best))
    for name, said in SAID.items():
        each = [asdict(v.times)[name] for v in best]
        if any(x > 0.002 * v.times.total for x, v in zip(each, best, strict=True)):
            table.add_row(f"  {said}", *(_s(x) for x in each))
    needs = [v.need for v in best if v.need is not None]
    table.add_row("memory of a rank", *(size(n.total) for n in needs), style="bold")
    for name in dict.fromkeys(name for n in needs for name in n.peak):
        table.add_row(f"  {name}", *(size(n.peak.get(name, 0)) for n in needs))
    if any(n.host for n in needs):
        table.add_row("in host memory", *(size(n.host) for n in needs))
    return table


def reasons(job: Shape, found: Found) -> list[tuple[str, str]]:
    """(way, why it loses): what was run dry, then what cannot be, then what was set aside of each layout."""
    said = []
    for v in sorted(found.losers, key=lambda v: v.need is None):
        why = v.lost or slower(job, v, found.best[0])
        said.append((str(v.way) if v.times.total else f"parallel={v.way.layout}", why))
    named = {v.way.layout for v in (*found.best, *(v for v in found.losers if v.lost is None))}
    for v in found.guesses:
        if v.way.layout not in named and found.best:
            said.append((str(v.way), f"{slower(job, v, found.best[0])}, by the closed form"))
    return said


def slower(job: Shape, v: Verdict, than: Verdict) -> str:
    """By how much, and most of it where."""
    more = v.per_token(job) / than.per_token(job) - 1
    return f"{more:.0%} slower, most of it {_why(v, than, job)}" if more >= 0.005 else "about as fast"


def _why(slow: Verdict, fast: Verdict, job: Shape) -> str:
    """What of its step takes the most more, for each token."""
    a, b = (asdict(v.times) for v in (slow, fast))
    tokens = [v.way.sequences * job.tokens for v in (slow, fast)]
    more = {name: a[name] / tokens[0] - b[name] / tokens[1] for name in a}
    most = max(more, key=lambda name: more[name])
    again = most in ("matrices", "attention") and slow.way.memory != "none" and fast.way.memory == "none"
    return SAID[most] + (", computed once more" if again else "")


def content(
    job: Shape, found: Found, on: Machine, given: Sequence[str], nodes: int, curves: Any
) -> dict[str, Any]:
    """The plan as plain data."""
    one = [
        {
            "way": str(v.way),
            "overrides": v.way.overrides(),
            "command": command(v, given, nodes),
            "tokens_per_s": 1 / v.per_token(job),
            "step_s": v.times.total,
            "times": asdict(v.times),
            "peak": None if v.need is None else v.need.peak,
            "host": None if v.need is None else v.need.host,
        }
        for v in found.best
    ]
    lost = [{"way": way, "because": why} for way, why in reasons(job, found)]
    where: dict[str, Any] = {
        "card": asdict(on.card),
        "interconnect": asdict(on.between),
        "rates": asdict(on.rates),
    }
    where |= {"nodes": nodes, "gpus": nodes * on.node}
    said = advice(found.best[0]) if found.best else "nothing fits"
    counts = {"counted": found.counted, "set_aside": found.skipped}
    return {"advice": said, "best": one, "losers": lost, "where": where, "curves": curves, **counts}


def _s(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"
