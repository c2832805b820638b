"""The picture of a run, from its JSON: rates at the length and shape that came first, and times faster than
dense. `python -m benchmarks.figure benchmarks/results/kernels-cpu.json` draws it again, and prints a table.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .cases import OURS
from .report import UNITS, Unit

COLOURS = {
    "longspan": "#1f5fa8",
    "sdpa": "#e08a1e",
    "flash": "#e08a1e",
    "cudnn": "#6aa84f",
    "reference": "#9aa0a6",
}
REST = ("#8e5ea2", "#3aa6a0", "#c05a5a", "#7f6b4f")
INK, FAINT = "#222222", "#777777"
SIDES = ("forward", "backward")
SHADES = {"forward": "#1f5fa8", "backward": "#8fb8e3"}


def draw(content: Any, path: Path) -> Path:
    """Write a PNG of a document of `report`: rates over visible pairs, forward and backward, and for sparse
    masks our own speed over the best dense peer's, beside the most that the share of visible pairs allows.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    first = content["cases"][0]
    alike = ("tokens", "q_heads", "kv_heads", "head_dim", "dtype")
    cases = [case for case in content["cases"] if all(case[key] == first[key] for key in alike)]
    names = list(dict.fromkeys(name for case in cases for name in measured(case)))
    sparse = [case for case in cases if measured(case).get(OURS[0], {}).get("of_ideal")]
    unit = UNITS["cuda" if "cuda" in content["versions"] else "cpu"]
    settings: Any = {
        **{"font.family": "DejaVu Sans", "font.size": 10, "axes.edgecolor": FAINT, "axes.spines.top": False},
        **{"text.color": INK, "axes.labelcolor": INK, "xtick.color": FAINT, "ytick.color": INK},
        **{"axes.spines.right": False, "axes.spines.left": False, "ytick.major.size": 0},
    }
    with matplotlib.rc_context(settings):
        bars = max(len(cases) * (len(names) + 1), 3 * len(sparse), 5)
        height = 1.7 + 0.24 * bars
        figure, axes = pyplot.subplots(
            1, 2 + bool(sparse), figsize=(5.2 * (2 + bool(sparse)), height), layout="constrained"
        )
        for axis, side in zip(axes, SIDES, strict=False):
            _rates(axis, cases, names, side, unit)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=len(names), frameon=False)
        if sparse:
            _speeds(axes[2], sparse)
            handles, labels = axes[2].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower right", ncols=3, frameon=False)
        figure.suptitle(title(content, first), x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
    return path


def rows(content: Any) -> Iterator[str]:
    """A table in Markdown: ms forward / backward of everyone, and our own speed against dense attention."""
    names = list(dict.fromkeys(name for case in content["cases"] for name in measured(case)))
    yield "| " + " | ".join(["case", "visible", *names, "times dense"]) + " |"
    yield "|---" * (3 + len(names)) + "|"
    for case in content["cases"]:
        shape = f"{case['tokens']}, {case['q_heads']}/{case['kv_heads']}x{case['head_dim']}, {case['dtype']}"
        found = measured(case)
        times = [" / ".join(f"{ms:.4g}" for ms in found[x]["ms"]) if x in found else "-" for x in names]
        over = found.get(OURS[0], {}).get("over_dense")
        speed = " / ".join(f"{x:.2f}" for x in over) if over else "-"
        share = case["pairs"] / case["tokens"] ** 2
        yield "| " + " | ".join([f"{case['name']}, {shape}", f"{share:.1%}", *times, speed]) + " |"


def title(content: Any, first: Any) -> str:
    shape = f"{first['q_heads']} query and {first['kv_heads']} kv heads of {first['head_dim']}"
    threads = content["settings"].get("threads")
    where = content["device"] + (
        f", {threads} threads" if threads and "cuda" not in content["versions"] else ""
    )
    return f"Attention on {where}: {first['tokens']} tokens, {shape}, {first['dtype']}"


def measured(case: Any) -> dict[str, Any]:
    """Who gave a result at a case."""
    return {name: found for name, found in case["found"].items() if not isinstance(found, str)}


def _rates(axis: Any, cases: Sequence[Any], names: Sequence[str], side: str, unit: Unit) -> None:
    spare = iter(REST * len(names))
    for name in names:
        have = [(at, measured(case)[name]) for at, case in enumerate(cases) if name in measured(case)]
        rates = [unit.factor * found["tflops"][SIDES.index(side)] for _, found in have]
        # the bars of a case stand together, whoever is missing there
        places = [at + _offset(cases[at], name) for at, _ in have]
        colour = COLOURS.get(name) or next(spare)
        bars = axis.barh(places, rates, _thick(names), label=name, color=colour)
        axis.bar_label(bars, [f"{rate:.3g}" for rate in rates], padding=3, fontsize=8.5, color=FAINT)
    _frame(axis, cases, f"{side.capitalize()}: {unit.name} over visible pairs")


def _offset(case: Any, name: str) -> float:
    names = list(measured(case))
    return (names.index(name) - (len(names) - 1) / 2) * 0.8 / max(3, len(names))


def _thick(names: Sequence[str]) -> float:
    return 0.74 / max(3, len(names))


def _speeds(axis: Any, sparse: Sequence[Any]) -> None:
    """Forward above backward for each case; a line where the ideal is, and one where dense attention is."""
    for i, side in enumerate(SIDES):
        places = [at + 0.32 * i - 0.16 for at in range(len(sparse))]
        own = [case["found"][OURS[0]] for case in sparse]
        times = [found["over_dense"][i] for found in own]
        bars = axis.barh(places, times, 0.3, color=SHADES[side], label=side)
        axis.bar_label(bars, [f"{x:.2f}" for x in times], padding=3, fontsize=8.5, color=FAINT)
        most = [x / found["of_ideal"][i] for x, found in zip(times, own, strict=True)]
        axis.plot(most, places, "|", color=INK, markersize=13, label=None if i else "the ideal")
    axis.axvline(1, color=INK, linewidth=0.8, linestyle=":")
    _frame(axis, sparse, f"{OURS[0]} against the best dense attention: times as fast")


def _frame(axis: Any, cases: Sequence[Any], words: str) -> None:
    axis.set_yticks(range(len(cases)), [case["name"] for case in cases], fontsize=11)
    axis.set_ylim(len(cases) - 0.45, -0.55)
    axis.set_xlim(0, 1.12 * axis.get_xlim()[1])
    axis.set_title(words, fontsize=10.5, loc="left", color=INK)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw runs of benchmarks.kernels again, from their JSON.")
    parser.add_argument("results", nargs="+", type=Path)
    for path in parser.parse_args(given).results:
        content = json.loads(path.read_text())
        print(draw(content, path.with_suffix(".png")), "", *rows(content), "", sep="\n")


if __name__ == "__main__":
    main()
