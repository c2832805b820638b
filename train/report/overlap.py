"""A step of a trace: what each rank did when, and how much of its communication ran beside computation."""

import gzip
import json
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

Spans = list[tuple[float, float]]  # of time, in microseconds, apart and rising

# Larger files are for a viewer.
LARGEST = 16 * 2**20
RANKS = 8
# The phases of a step, by the class that gives their colour.
PHASES = {"data": "e", "forward": "a", "backward": "b", "reduce": "c", "optimizer": "d"}
LANE = 13
# Of the width: what is nearer to each other is drawn as one.
NEAR = 1 / 1500


def timeline_html(path: Path) -> str:
    """A figure from a merged trace; empty if there is none, or none that is small enough."""
    if not path.exists() or path.stat().st_size > LARGEST:
        return ""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    lanes = {(e["pid"], e["tid"]): e["args"]["name"].split()[0] for e in events if e["name"] == "thread_name"}
    timed = [e | {"lane": lanes[e["pid"], e["tid"]]} for e in events if e["ph"] == "X"]
    steps = [e for e in timed if e["lane"] == "phases" and e["name"].startswith("step ")]
    if not steps:
        return ""
    # the last one that was traced: the first is still slowed by what is done once
    name = steps[-1]["name"]
    of_step = [e for e in steps if e["name"] == name]
    start, end = min(e["ts"] for e in of_step), max(e["ts"] + e["dur"] for e in of_step)
    inside = [
        e | {"dur": min(e["dur"], end - e["ts"])} for e in timed if start <= e["ts"] < end
    ]  # what outlasts the step is cut
    ranks = sorted({e["pid"] for e in of_step})[:RANKS]
    told = [_rank([e for e in inside if e["pid"] == rank], rank, start, end) for rank in ranks]
    whole = f"{(end - start) / 1000:,.1f} ms"
    keys = "".join(f'<li class="{style}">{name}</li>' for name, style in PHASES.items())
    return (
        f'<figure class="chart"><figcaption><h3>{escape(name.capitalize())}</h3> <span class="unit">{whole}; '
        "of each rank its phases, its communication, its computation</span>"
        f'<ul class="legend">{keys}'
        '<li class="faint">communication</li><li class="busy">computation</li></ul></figcaption>'
        f"{''.join(told)}</figure>"
    )


def _rank(events: Sequence[dict[str, Any]], rank: int, start: float, end: float) -> str:
    """The strip of a rank, and in words how much it computed and how much of its communication was hidden."""
    scale = 1000 / (end - start)
    # on the CPU what stands around operators, such as autograd's, may wait for other ranks
    operators = [e for e in events if e["name"].startswith("aten::")]
    busy = united(_spans(events, "kernels") or _spans(operators, "compute"))
    sent = united(_spans(events, "communication"))
    drawn = [
        _rect(e["ts"], e["ts"] + e["dur"], 0, PHASES[e["name"]], start, scale)
        for e in events
        if e["lane"] == "phases" and e["name"] in PHASES
    ]
    near = NEAR * (end - start)
    for row, (spans, style) in enumerate(((sent, "faint"), (busy, "busy")), 1):
        drawn += [_rect(a, b, row, style, start, scale) for a, b in united(spans, near)]
    compute, transfer = total(busy) / (end - start), total(sent)
    hidden = f", {total(common(sent, busy)) / transfer:.0%} of it beside computation" if transfer else ""
    words = f"computes {compute:.0%} of the step, communicates {transfer / (end - start):.0%}{hidden}"
    return (
        f'<p class="note">Rank {rank} {words}.</p><svg class="strips lanes" viewBox="0 0 1000 {3 * LANE}" '
        f'style="height:{3 * LANE}px" preserveAspectRatio="none" role="img" '
        f'aria-label="Rank {rank} {words}">{"".join(drawn)}</svg>'
    )


def _spans(events: Iterable[dict[str, Any]], lane: str) -> Spans:
    return [(e["ts"], e["ts"] + e["dur"]) for e in events if e["lane"] == lane]


def _rect(first: float, last: float, row: int, style: str, start: float, scale: float) -> str:
    x, width = (first - start) * scale, max((last - first) * scale, 0.5)
    return (
        f'<rect class="{style}" x="{x:.2f}" y="{row * LANE}" width="{min(width, 1000 - x):.2f}" '
        f'height="{LANE - 2}"/>'
    )


def united(spans: Iterable[tuple[float, float]], near: float = 0.0) -> Spans:
    """The spans with those that touch, or are as near as `near`, made one."""
    found: Spans = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1] + near:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def common(a: Spans, b: Spans) -> Spans:
    """What is in both."""
    found, i, j = Spans(), 0, 0
    while i < len(a) and j < len(b):
        first, last = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if first < last:
            found.append((first, last))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def total(spans: Spans) -> float:
    return sum(last - first for first, last in spans)
