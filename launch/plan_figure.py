"""Cost of each layout against sequence length and against devices, and what a step of the job is made of."""

from collections.abc import Callable, Iterable, Sequence
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
    """A layout's cheapest way at a length on so many devices, by the closed form: device-seconds of a million
    tokens.
    """

    layout: str
    tokens: int
    gpus: int
    seconds: float
    way: str


Ways = Callable[[int, int], Iterable[Candidate]]


def curves(
    job: Shape, ways: Sequence[Candidate], on: Machine, room_gib: float, learned: Learned
) -> list[Point]:
    """From a sixteenth of the job's length to twice it; none where no way of a layout is likely to fit."""
    lengths = [n for eighth in (1, 2, 4, 8, 16, 32) if (n := job.tokens * eighth // 16)]
    return [p for n in lengths for p in _cheapest(replace(job, tokens=n), ways, on, room_gib, learned)]


def over_gpus(
    job: Shape, ways: Ways, gpus: int, on: Machine, room_gib: float, learned: Learned
) -> list[Point]:
    """One sequence on all of an eighth of the job's devices to four times as many. ways: of a number of
    devices, so many a machine.
    """
    counts = [n for eighth in (1, 2, 4, 8, 16, 32) if (n := gpus * eighth // 8)]
    found = []
    for count in counts:
        node = min(on.node, count)
        if count % node == 0:
            there = replace(on, node=node)
            whole = (way for way in ways(count, node) if way.dp == way.micro == 1)
            found += _cheapest(job, whole, there, room_gib, learned)
    return found


def _cheapest(
    job: Shape, ways: Iterable[Candidate], on: Machine, room_gib: float, learned: Learned
) -> list[Point]:
    best: dict[str, Verdict] = {}
    for way in ways:
        if way.split > job.tokens or sum(learned.likely(job, way).values()) > room_gib * GIB:
            continue
        verdict = guessed(job, placed(job, way), on)
        old = best.get(way.layout)
        if verdict.lost is None and (old is None or verdict.per_token(job) < old.per_token(job)):
            best[way.layout] = verdict
    return [
        Point(layout, job.tokens, v.way.world, 1e6 * v.per_token(job) * v.way.world, str(v.way))
        for layout, v in best.items()
    ]


def draw(
    lengths: Sequence[Point], counts: Sequence[Point], bars: Sequence[tuple[str, Verdict]], job: Shape,
    path: Path, title: str,
) -> None:  # fmt: skip
    """Writes the figure. lengths: of `curves`; counts: of `over_gpus`; bars: what each is called, and whose
    step it is.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    settings: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"text.color": INK, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": FAINT}
    with matplotlib.rc_context(settings):
        figure = pyplot.figure(figsize=(13, 9), layout="constrained")
        parts = figure.subplot_mosaic([["lengths", "counts"], ["bars", "bars"]], height_ratios=(5, 4))
        _lines(
            parts["lengths"], {p.tokens: _tokens(p.tokens) for p in lengths}, [(p.tokens, p) for p in lengths]
        )
        _lines(parts["counts"], {p.gpus: str(p.gpus) for p in counts}, [(p.gpus, p) for p in counts])
        parts["lengths"].axvline(job.tokens, color=FAINT, linewidth=0.8, linestyle=":")
        parts["lengths"].set_xlabel("tokens of a sequence (dotted: this job's)")
        parts["counts"].set_xlabel(f"devices that share a sequence of {_tokens(job.tokens)} tokens")
        parts["lengths"].set_title(
            "cost against the cheapest layout; a line ends where it cannot fit", loc="left", fontsize=10
        )
        parts["counts"].set_title(
            "under both axes: device-seconds of a million tokens, of the cheapest", loc="left", fontsize=10
        )
        shown = {line.get_label(): line for name in ("counts", "lengths") for line in _layouts(parts[name])}
        parts["lengths"].legend(handles=list(shown.values()), frameon=False, fontsize=9, ncols=2)
        _bars(parts["bars"], bars, job)
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)


def _lines(axis: Any, ticks: dict[int, str], points: Sequence[tuple[int, Point]]) -> None:
    """Times the cheapest at each place: the layouts differ by less than one place costs more than another."""
    least = {x: min(p.seconds for at, p in points if at == x) for x in sorted(ticks)}
    for number, name in enumerate(LAYOUTS):
        own = sorted((x, min(p.seconds / least[x], MOST)) for x, p in points if p.layout == name)
        if own:
            look = {"color": COLOURS[number], "marker": MARKS[number], "markersize": 6, "alpha": 0.9}
            axis.plot([x for x, _ in own], [rate for _, rate in own], label=name, **look)
    axis.set_xscale("log", base=2)
    axis.set_xticks(list(least), [f"{ticks[x]}\n{seconds:,.0f} s" for x, seconds in least.items()])
    axis.minorticks_off()
    above = max(0.02, *(min(p.seconds / least[x], MOST) - 1 for x, p in points))
    axis.set_ylim(1 - 0.06 * above, 1 + 1.06 * above)
    axis.grid(alpha=0.25)


def _layouts(axis: Any) -> list[Any]:
    return [line for line in axis.lines if line.get_label() in LAYOUTS]


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
    axis.legend(frameon=False, fontsize=9, ncols=6, loc="upper left", bbox_to_anchor=(-0.02, -0.16))
    axis.grid(axis="x", alpha=0.25)
    axis.set_axisbelow(True)


def _tokens(n: int) -> str:
    if n >= 2**20:
        return f"{n / 2**20:g}M"
    return f"{n / 1024:g}k" if n >= 1024 else str(n)
