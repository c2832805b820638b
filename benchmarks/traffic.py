"""What each layout sends under each mask, against the fewest bytes that the mask needs, on up to 1024 ranks.

python -m benchmarks.traffic [--quick] [--out benchmarks/results]

One layer of 32 query and 8 key heads of 128, one sequence, bfloat16. The layouts' own code runs for one rank
after the other over torch's fake process group; bytes are counted where they arrive, so that they can be
held against what the same rank needs. Of more than 8 ranks 4 that lie evenly stand for all, of 1024 2:
under star and a contiguous placement these hold nothing of the tail, whose ranks need every key. Where
Ulysses has more ranks than heads, a rank with a head and one without stand for all, each for its kind.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from longspan.kernels.mask import Causal, Documents, Mask, Window
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.patterns import Anchored, Strided
from longspan.parallel.needs import needed_bytes
from longspan.parallel.placement import Placement

from .cases import Shape
from .one_rank import NODE, Moved, being, layout, passes

SHAPE = Shape(32, 8, 128)
DTYPE = torch.bfloat16
LENGTHS = {8: (2**16, 2**17), 64: (2**18,), 256: (2**19,), 1024: (2**20,)}
LAYOUTS = (
    "ring/contiguous",
    "ring/auto",
    "gather/contiguous",
    "s2/contiguous",
    "s2/auto",
    "ulysses",
    "usp/auto",
    "star",
)
TAIL = 4096


def masks(length: int, size: int) -> dict[str, Mask]:
    """By the name in the table."""
    block = min(4096, length // size)
    grid = (length // 4096, 64, 64)
    return {
        "causal": Causal(),
        "window 1024": Window(1023),
        "documents of 1000": Documents(tuple(range(0, length, 1000)), Causal()),
        "S2 stride 16": Strided(64, 8, 16) & Causal(),
        "star": Anchored(block, block, length - TAIL) & Causal(),
        "3D neighbourhood": Neighborhood(grid, (4, 16, 16), stride=(2, 8, 8)),
    }


@dataclass(frozen=True)
class Side:
    """One pass, a rank on average."""

    sent: float
    needed: float
    messages: float

    @property
    def ratio(self) -> float | None:
        return self.sent / self.needed if self.needed else None


@dataclass(frozen=True)
class Row:
    """A line of the table; bytes a rank of one layer."""

    layout: str
    mask: str
    ranks: int
    tokens: int
    sampled: int  # ranks that stand for all
    forward: Side
    backward: Side
    most: int  # that arrive on one of the ranks in the forward
    held: int  # most on one of the ranks


def sampled(size: int) -> list[int]:
    """All of 8 ranks, 4 of more that lie evenly, 2 of 1024."""
    count = size if size <= 8 else 4 if size <= 512 else 2
    return [size * (2 * i + 1) // (2 * count) for i in range(count)]


def standing(name: str, size: int) -> dict[int, float]:
    """The ranks that stand for all under a layout, and for which share of them."""
    each = size // SHAPE.q_heads
    if name == "ulysses" and each > 1:
        # of as many neighbours the last one has a head
        return {size // 2: 1 - 1 / each, size // 2 + each - 1: 1 / each}
    return dict.fromkeys(sampled(size), 1 / len(sampled(size)))


def rows(size: int, length: int) -> Iterator[Row]:
    """The table of one number of ranks and one length."""
    found: dict[tuple[str, str], list[tuple[Moved, Moved]]] = {}
    placements: dict[tuple[str, str], Placement] = {}
    every = masks(length, size)
    for rank in sorted({r for name in LAYOUTS for r in standing(name, size)}):
        with being(rank, size):
            known: dict[tuple[str, str, Placement], tuple[Moved, Moved]] = {}
            for name in (x for x in LAYOUTS if rank in standing(x, size)):
                one: Any = layout(name, size, node=min(NODE, size // 2))
                for key, mask in every.items():
                    if name == "star" and key != "star":
                        continue
                    place = one.place(length, mask)
                    # auto is often contiguous; and what Ulysses alone moves does not depend on the mask
                    like = name.partition("/")[0], key if name != "ulysses" else "", place
                    if like not in known:
                        known[like] = passes(one, mask, length, SHAPE, DTYPE)
                    found.setdefault((key, name), []).append(known[like])
                    placements[key, name] = place
    order = [(key, name) for key in every for name in LAYOUTS]
    for key, name in sorted(found, key=order.index):
        each = found[key, name]
        yield _row(name, key, every[key], placements[key, name], each)


@lru_cache
def _needed(mask: Mask, placement: Placement) -> tuple[float, ...]:
    """The fewest bytes of a forward and of a backward, a rank on average."""
    kind: Any = {"kv_heads": SHAPE.kv_heads, "head_dim": SHAPE.head_dim, "dtype": DTYPE}
    ranks = sampled(placement.size)
    least = [needed_bytes(mask, placement, r, **kind) for r in ranks]
    return tuple(sum(x) / len(ranks) for x in zip(*least, strict=True))


def _row(name: str, key: str, mask: Mask, placement: Placement, each: list[tuple[Moved, Moved]]) -> Row:
    sides, shares = [], standing(name, placement.size).values()
    for moved, need in zip(zip(*each, strict=True), _needed(mask, placement), strict=True):
        arrived, messages = (
            sum(getattr(m, x) * share for m, share in zip(moved, shares, strict=True))
            for x in ("arrived", "messages")
        )
        sides.append(Side(arrived, need, messages))
    most, held = (max(getattr(x[0], what) for x in each) for what in ("arrived", "held"))
    forward, backward = sides
    return Row(name, key, placement.size, placement.length, len(each), forward, backward, most, held)


def line(row: Row) -> str:
    """A row in Markdown."""

    def side(x: Side) -> str:
        ratio = "-" if x.ratio is None else f"{x.ratio:.2f}"
        return f"{mib(x.sent)} | {mib(x.needed)} | {ratio} | {x.messages:.0f}"

    head = f"{row.ranks} | {row.tokens // 1024}k | {row.mask} | {row.layout}"
    return f"| {head} | {side(row.forward)} | {side(row.backward)} | {mib(row.held)} |"


def mib(count: float) -> str:
    return f"{count / 2**20:,.1f}"


HEAD = (
    "| ranks | tokens | mask | layout | sent MiB | needed MiB | ratio | messages "
    "| backward sent | needed | ratio | messages | held MiB |\n|" + "---|" * 13
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="8 ranks and 64k tokens only")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--redraw", action="store_true", help="the figure of the figures in --out")
    given = parser.parse_args()
    path = given.out / "traffic.json"
    if not given.redraw:
        given.out.mkdir(parents=True, exist_ok=True)
        measure(path, quick=given.quick)
    listed = json.loads(path.read_text())["rows"]
    sides = ({side: Side(**row[side]) for side in ("forward", "backward")} for row in listed)
    draw([Row(**row | both) for row, both in zip(listed, sides, strict=True)], given.out / "traffic.png")
    print(f"{path} and traffic.png")


def measure(path: Path, *, quick: bool) -> None:
    """Print the table and write it to a file."""
    torch.set_num_threads(1)
    began, found = time.monotonic(), []
    print(HEAD)
    for size, lengths in LENGTHS.items():
        for length in lengths if not quick else lengths[:1] * (size == 8):
            for row in rows(size, length):
                found.append(row)
                print(line(row), flush=True)
    facts = {
        "heads": SHAPE._asdict(),
        "dtype": str(DTYPE).removeprefix("torch."),
        "seconds": round(time.monotonic() - began),
        "rows": [asdict(row) for row in found],
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")


def draw(found: list[Row], path: Path) -> None:
    """Bytes sent in a forward, and those that the mask needs, on the fewest and on the most ranks."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    ends = sorted({(row.ranks, row.tokens) for row in found})
    shown = [max(x for x in ends if x[0] == ranks) for ranks in sorted({ends[0][0], ends[-1][0]})]
    names = [name for name in LAYOUTS if any(row.layout == name for row in found)]
    keys = list(dict.fromkeys(row.mask for row in found))
    figure, axes = pyplot.subplots(1, len(shown), figsize=(6.5 * len(shown), 8), squeeze=False, sharey=True)
    for axis, end in zip(axes[0], shown, strict=True):
        _bars(axis, [row for row in found if (row.ranks, row.tokens) == end], names, keys)
        axis.set_title(f"{end[0]} ranks, {end[1] // 1024}k tokens", fontsize=11)
    axes[0][0].set_yticks(range(len(keys)), keys)
    axes[0][0].invert_yaxis()
    handles = [Patch(color=f"C{i}", label=name) for i, name in enumerate(names)]
    figure.legend(handles=handles, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _bars(axis: Any, found: list[Row], names: list[str], keys: list[str]) -> None:
    step = 0.85 / len(names)
    for row in found:
        at = keys.index(row.mask) + (names.index(row.layout) + 0.5) * step - 0.425
        axis.barh(at, row.forward.sent / 2**20, step * 0.9, color=f"C{names.index(row.layout)}")
        if row.forward.needed:
            need = row.forward.needed / 2**20
            axis.vlines(need, at - step / 2, at + step / 2, color="black", linewidth=1.6)
    axis.set_xscale("log")
    axis.set_xlim(left=0.5)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_xlabel("MiB a rank sends in a layer's forward; black: needed by the mask")
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


if __name__ == "__main__":
    main()
