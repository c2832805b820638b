"""Cost against sequence length for each layout, and what a step is made of at the job's own length."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .plan_cost import Machine, placed
from .plan_job import LAYOUTS, Candidate, Shape
from .plan_memory import Learned
from .plan_report import SAID
from .plan_search import GIB, Verdict, guessed

SHADES = ("#35618f", "#6a9bc9", "#a9c6e0", "#d5dbe0", "#c44e2b", "#e2905f", "#efbf8f", "#8c8c8c")
COLOURS = ("#333333", "#35618f", "#5aa469", "#c44e2b", "#8a5fa8", "#c9a227", "#3fa3a3")
MARKS = "osD^vPX"
# A layout that costs more is drawn here.
MOST = 2.0
INK, FAINT = "#222222", "#666666"


@dataclass(frozen=True)
class Point:
    """A layout's cheapest way at a length, by the closed form: device-seconds of a million tokens."""

    layout: str
    tokens: int
    seconds: float
    way: str


def curves(
    job: Shape, ways: Sequence[Candidate], on: Machine, room_gib: float, learned: Learned
) -> list[Point]:
    """From a sixteenth of the job's length to twice it; none where no way of a layout is likely to fit."""
    found = []
    for eighth in (1, 2, 4, 8, 16, 32):
        length = job.tokens * eighth // 16
        here = replace(job, tokens=length)
        best: dict[str, Verdict] = {}
        for way in ways if length else ():
            if way.split > length or sum(learned.likely(here, way).values()) > room_gib * GIB:
                continue
            verdict = guessed(here, placed(here, way), on)
            old = best.get(way.layout)
            if verdict.lost is None and (old is None or verdict.per_token(here) < old.per_token(here)):
                best[way.layout] = verdict
        for layout, v in best.items():
            seconds = 1e6 * v.per_token(here) * v.way.world
            found.append(Point(layout, length, seconds, str(v.way)))
    return found


def draw(
    points: Sequence[Point], bars: Sequence[tuple[str, Verdict]], job: Shape, path: Path, title: str
) -> None:
    """Writes the figure. bars: what each is called, and whose step it is."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"text.color": INK, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT}
    with matplotlib.rc_context(settings):
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
        _lines(left, points, job)
        _bars(right, bars, job)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _lines(axis: Any, points: Sequence[Point], job: Shape) -> None:
    """Times the cheapest at each length: the layouts differ by less than a length costs more than another."""
    least = {n: min(p.seconds for p in points if p.tokens == n) for n in sorted({p.tokens for p in points})}
    names = [name for name in LAYOUTS if any(p.layout == name for p in points)]
    for name in names:
        own = sorted((p for p in points if p.layout == name), key=lambda p: p.tokens)
        rates = [min(p.seconds / least[p.tokens], MOST) for p in own]
        colour, mark = COLOURS[LAYOUTS.index(name)], MARKS[LAYOUTS.index(name)]
        axis.plot(
            [p.tokens for p in own], rates, mark + "-", color=colour, label=name, markersize=6, alpha=0.9
        )
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(least), [f"{_tokens(n)}\n{s:,.0f}" for n, s in least.items()])
    axis.minorticks_off()
    above = max(0.02, *(min(p.seconds / least[p.tokens], MOST) - 1 for p in points))
    axis.set_ylim(1 - 0.06 * above, 1 + 1.06 * above)
    axis.axvline(job.tokens, color=FAINT, linewidth=0.8, linestyle=":")
    axis.set_xlabel("tokens of a sequence, and below it device-seconds of the cheapest; dotted: this job's")
    axis.set_title(
        "cost against the cheapest layout; a line ends where it cannot fit", loc="left", fontsize=10
    )
    axis.legend(frameon=False, fontsize=9, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    axis.grid(alpha=0.25)


def _bars(axis: Any, bars: Sequence[tuple[str, Verdict]], job: Shape) -> None:
    places = range(len(bars))
    left = [0.0] * len(bars)
    for (part, said), colour in zip(SAID.items(), SHADES, strict=True):
        widths = [1e6 * asdict(v.times)[part] / (v.way.sequences * job.tokens) * v.way.world for _, v in bars]
        if any(w > 0.002 * max(1e-9, *left, *widths) for w in widths):
            axis.barh(places, widths, 0.62, left=left, color=colour, label=said)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_yticks(places, [name for name, _ in bars])
    axis.invert_yaxis()
    axis.set_xlabel("device-seconds of a million tokens")
    axis.set_title(f"what they are spent on at {_tokens(job.tokens)} tokens", loc="left", fontsize=10)
    axis.legend(frameon=False, fontsize=8.5, ncols=3, loc="upper left", bbox_to_anchor=(-0.3, -0.13))
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _tokens(n: int) -> str:
    if n >= 2**20:
        return f"{n / 2**20:g}M"
    return f"{n / 1024:g}k" if n >= 1024 else str(n)
