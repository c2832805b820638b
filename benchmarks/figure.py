"""The picture of a run: rates at the length and shape that came first, and times faster than dense."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cases import OURS
from .peers import Contender
from .report import Entry, Results, Unit


def draw(
    results: Results, contenders: Sequence[Contender], path: Path, device: str, unit: Unit
) -> Path:  # fmt: skip
    """Write a PNG: rates over visible pairs, forward and backward, and for sparse masks the speed of our own
    over the best dense peer, with the ideal as an outline.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    first = next(iter(results.entries.values())).case
    entries = [
        entry
        for entry in results.entries.values()
        if (entry.case.tokens, entry.case.shape, entry.case.dtype) == (first.tokens, first.shape, first.dtype)
    ]
    names = [x.name for x in contenders if any(x.name in entry.measured() for entry in entries)]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 1.5 + 0.2 * len(entries) * (len(names) + 1)))
    for axis, side in zip(axes, ("forward", "backward"), strict=False):
        _rates(axis, entries, names, side, unit)
    _speeds(axes[2], results, entries)
    dtype = str(first.dtype).removeprefix("torch.")
    figure.suptitle(f"{device}, {first.tokens} tokens, {first.shape} heads, {dtype}")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path


def _rates(axis: Any, entries: Sequence[Entry], names: Sequence[str], side: str, unit: Unit) -> None:
    step = 0.8 / max(1, len(names))
    for i, name in enumerate(names):
        have = [(at, e, e.measured()[name]) for at, e in enumerate(entries) if name in e.measured()]
        heights = [unit.factor * getattr(e.tflops(found), side) for _, e, found in have]
        axis.barh([at + (i + 0.5) * step - 0.4 for at, _, _ in have], heights, step, label=name)
    _label(axis, entries, f"{side}, {unit.name} over visible pairs")


def _speeds(axis: Any, results: Results, entries: Sequence[Entry]) -> None:
    """Forward above backward, for each sparse case."""
    sparse = [e for e in entries if e.case.sparse and OURS[0] in e.measured()]
    for at, entry in enumerate(sparse):
        found = entry.measured()[OURS[0]]
        speed = results.over_dense(entry, found)
        ideal = results.of_ideal(entry, OURS[0], found)
        for i, side in enumerate(("forward", "backward") if speed else ()):
            times = getattr(speed, side)
            axis.barh(at + 0.4 * i - 0.2, times, 0.4, color=f"C{i}", label=None if at else side)
            if ideal:
                most = times / getattr(ideal, side)
                axis.barh(at + 0.4 * i - 0.2, most, 0.4, fill=False, edgecolor="black", linewidth=0.8)
    _label(axis, sparse, "longspan, times the best dense peer's speed; outline: ideal")
    if sparse:
        axis.legend(fontsize=8)


def _label(axis: Any, entries: Sequence[Entry], title: str) -> None:
    axis.set_yticks(range(len(entries)), [entry.case.name for entry in entries])
    axis.invert_yaxis()
    axis.set_title(title, fontsize=9)
