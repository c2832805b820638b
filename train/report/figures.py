"""The curves of a report and the figures above them."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np

from ..pictures import smooth
from ..progress import amount, duration, size
from .chart import Chart, Line, Mark
from .story import Story

STYLES = ("a", "b", "c", "d")
NEXT_TOKEN = "longspan.train.objective.next_token.NextToken"
# What held-out data are measured by, the first that is there, and how it is called.
HELD_OUT = (("bits_per_byte", "bits a byte"), ("eval_loss", "loss"))

Tile = tuple[str, str, str]  # name, value, and what is worth knowing beside it


def curves(stories: Sequence[Story]) -> list[Chart]:
    """Loss, gradient norm, speed and the ranks' steps; runs that are compared have a colour each."""
    alone, unit = len(stories) == 1, loss_unit(stories[0])
    marks = marks_of(stories[0]) if alone else ()
    loss, norm, speed = list[Line](), list[Line](), list[Line]()
    for story, style in zip(stories, STYLES, strict=False):
        name = "training" if alone else story.name
        loss += smoothed(name, story.column("loss"), style)
        held = "b" if alone else style
        loss.append(
            Line("held out" if alone else f"{name}, held out", *story.held_out("eval_loss"), f"{held} dots")
        )
        norm += smoothed(name, story.column("grad_norm"), style)
        speed.append(Line(name, *story.column("tokens_per_s"), style))
    charts = [
        Chart("Loss", unit, loss, marks),
        Chart("Gradient norm", "before clipping", norm, marks, logarithmic=_positive(norm)),
        Chart("Throughput", "tokens a second, all ranks", speed, marks, low=0.0),
    ]
    return charts + ([ranks_chart(stories[0])] if alone else [])


def ranks_chart(story: Story) -> Chart:
    """How long a step takes, and how long the slowest and the median rank are busy in it."""
    names = {"whole step, mean of 20": "step_s", "busiest rank": "step_s_max", "median rank": "step_s_median"}
    lines = [
        smoothed(name, story.column(key), style)[-1]
        for (name, key), style in zip(names.items(), STYLES, strict=False)
    ]
    return Chart("Time of a step", "seconds, smoothed", lines, marks_of(story), low=0.0)


def loss_unit(story: Story) -> str:
    text = story.config.get("objective", {}).get("_target_") == NEXT_TOKEN
    return "nats a token" if text else "mean squared error"


def marks_of(story: Story) -> list[Mark]:
    resumes = [Mark(step, f"went on from step {step}", "resume") for step in story.resumes]
    faults = [
        Mark(f["step"], f"step {f['step']}: {f.get('kind')}, {f.get('did')}", "fault") for f in story.faults
    ]
    return resumes + faults


def smoothed(name: str, points: tuple[list[float], list[float]], style: str) -> list[Line]:
    """The values, faint, and their means over a fortieth of them on either side."""
    x, y = points
    if len(y) < 20:
        return [Line(name, x, y, style)]
    # one huge value would leave no digits of the others in the sums that the means are made of
    large = 1e9 * float(np.median(np.abs(y)))
    means = smooth(np.clip(y, -large, large) if large else np.array(y), max(len(y) // 40, 1)).tolist()
    return [Line(name, x, y, f"{style} faint"), Line(name, x, means, style)]


def _positive(lines: Sequence[Line]) -> bool:
    values = [y for line in lines for y in line.y]
    return bool(values) and min(values) > 0 and max(values) > 4 * min(values)


def key_figures(story: Story) -> list[Tile]:
    """What one wants to know first; what is not known is left out."""
    rows, summary, config = story.rows, story.summary, story.config
    last: dict[str, Any] = dict(rows[-1]) if rows else {}
    done = int(story.status.get("step", last.get("step", 0)))
    seconds = summary.get("training_seconds")
    wanted = config.get("train", {}).get("steps")
    tiles: list[Tile] = [
        ("steps", f"{done:,}", f"of {wanted:,}" if isinstance(wanted, int) else ""),
        ("tokens", amount(last.get("tokens", 0)), f"in {duration(seconds)}" if seconds is not None else ""),
    ]
    _, losses = story.column("loss")
    if losses:
        tiles.append(("loss", f"{float(np.mean(losses[-max(1, len(losses) // 40) :])):.4g}", "at the end"))
    for name, words in HELD_OUT:
        if values := story.held_out(name)[1]:
            tiles.append(("held out", f"{values[-1]:.4g}", words))
            break
    _, speeds = story.column("tokens_per_s")
    if speeds:
        mfu = median(story.column("mfu")[1] or [0.0])
        tiles.append(("tokens a second", amount(median(speeds)), f"MFU {mfu:.1%}"))
        tiles.append(("memory", size(max(story.column("peak_memory")[1], default=0.0)), "rank 0 at most"))
    tiles.append(("ranks", str(story.world), layout_of(story)))
    if story.faults:
        tiles.append(("bad steps", str(len(story.faults)), "see what happened"))
    return tiles


def layout_of(story: Story) -> str:
    layout = story.config.get("parallel", {}).get("layout", {}).get("_target_", "")
    engine = story.config.get("engine", {}).get("_target_", "")
    return ", ".join(name.rpartition(".")[2] for name in (layout, engine) if name)


def slowest_ranks(story: Story) -> list[tuple[int, int]]:
    """(rank, in how many intervals it was the busiest), the most frequent first."""
    _, ranks = story.column("slowest_rank")
    counted = {int(rank): ranks.count(rank) for rank in set(ranks)}
    return sorted(counted.items(), key=lambda item: -item[1])
