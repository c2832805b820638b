"""The planner beside what was measured here and what others have published, as one picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from longspan.launch.plan_figure import COLOURS, FAINT, INK, MARKS

Rows = Mapping[str, Mapping[str, Any]]


def draw(ranked: Rows, told: Sequence[Mapping[str, Any]], path: Path) -> None:
    """ranked: by job and number of ranks, rows of a layout's predicted and measured seconds of a step. told:
    what is published, and what is predicted.
    """
    settings: Any = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    settings |= {"text.color": INK, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": INK}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(13, 6.2), layout="constrained")
        here, others = figure.subplots(1, 2, width_ratios=(5, 4))
        _measured(here, ranked)
        _published(others, told)
        figure.savefig(path, dpi=110)


def _measured(axis: Any, ranked: Rows) -> None:
    groups = [(job, ranks, found) for job, sizes in ranked.items() for ranks, found in sizes.items()]
    layouts = [row["layout"] for row in groups[0][2]["rows"]]
    for place, (_, _, found) in enumerate(groups):
        for number, row in enumerate(found["rows"]):
            y = place + (number - (len(layouts) - 1) / 2) * 0.18
            look = {"color": COLOURS[number], "marker": MARKS[number], "markersize": 7}
            axis.plot(
                [row["predicted"], row["measured"]], [y, y], color=COLOURS[number], linewidth=1, alpha=0.5
            )
            axis.plot([row["measured"]], [y], **look, label=row["layout"] if not place else None)
            axis.plot([row["predicted"]], [y], **look, fillstyle="none")
    axis.set_yticks(range(len(groups)), [f"{job}\n{ranks} ranks" for job, ranks, _ in groups])
    axis.invert_yaxis()
    axis.set_xscale("log")
    low, high = axis.get_xlim()
    ticks = [x for x in (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0) if low <= x <= high]
    axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axis.minorticks_off()
    axis.set_xlabel("seconds of a step on 2 cores; filled: measured, open: predicted")
    axis.set_title("gloo ranks here", loc="left", fontsize=11, fontweight="bold")
    axis.grid(axis="x", alpha=0.25)
    axis.legend(frameon=False, fontsize=9, ncols=len(layouts), loc="upper left", bbox_to_anchor=(-0.02, -0.1))


def _published(axis: Any, told: Sequence[Mapping[str, Any]]) -> None:
    axis.axvline(1.0, color=INK, linewidth=1)
    for place, one in enumerate(told):
        share = one["predicted"] / one["published"]
        axis.plot([1.0, share], [place, place], color=COLOURS[1], linewidth=2, alpha=0.5)
        axis.plot([share], [place], "o", color=COLOURS[1], markersize=8)
        values = f"{one['predicted']:.3g} for {one['published']:.3g} {one['unit']}"
        axis.annotate(values, (share, place), (0, 9), textcoords="offset points", ha="center", fontsize=8)
    axis.set_yticks(range(len(told)), [one["what"].replace(", ", ",\n", 1) for one in told])
    axis.set_ylim(len(told) - 0.5, -0.7)
    axis.set_xlim(0.5, 1.5)
    axis.set_xlabel("predicted over published")
    axis.set_title("what others have published", loc="left", fontsize=11, fontweight="bold")
    axis.grid(axis="x", alpha=0.25)
