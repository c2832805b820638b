"""Draws a picture of every mask, and prints how many tiles each lists and how many of these are partial.

python -m benchmarks.mask_pictures [--out docs/images/masks.png]
"""

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import to_rgb
from matplotlib.patches import Patch

from longspan.kernels.grain import grain
from longspan.kernels.heads import Heads, PerHead
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.neighborhood import Frames, FrameTiles, Neighborhood, brick_order
from longspan.kernels.ordered import BrickByBrick, Windows
from longspan.kernels.patterns import Anchored, BlockPermutation, Shifted, Strided, Tail
from longspan.kernels.span import Span, Spans
from longspan.kernels.tile import area, tiles

CPU = torch.device("cpu")
TOKENS = 48
CELL, DPI = 7, 160  # pixels
INK, FAINT, EMPTY = "#22303c", "#7c8a97", "#eef1f4"
EITHER, FIRST, SECOND = "#2f6db5", "#e08a2e", "#3a9a78"

GRID = Neighborhood((4, 12), (2, 6), stride=2)
BRICKS = BrickByBrick(Strided(6, 1, 4), (6, 8), (3, 2))
PANELS: list[tuple[str, str, Mask, Spans]] = [
    (title, code, mask, at or (Span(0, TOKENS),))
    for title, code, mask, at in [
        ("full", "Full()", Full(), ()),
        ("causal", "Causal()", Causal(), ()),
        ("sliding window", "Window(7)", Window(7), ()),
        ("window and sinks", "Causal() & (Window(7) | First(3))", Causal() & (Window(7) | First(3)), ()),
        ("first tokens", "First(7)", First(7), ()),
        ("packed documents", "Documents((0, 10, 31), Causal())", Documents((0, 10, 31), Causal()), ()),
        ("S2", "Strided(3, 2, 4) & Causal()", Strided(3, 2, 4) & Causal(), ()),
        (
            *("S2 in documents", "Documents((0, 20), Strided(…) & …)"),
            *(Documents((0, 20), Strided(2, 2, 4) & Causal()), ()),
        ),
        ("Hepos", "Strided(1, 0, 4)", Strided(1, 0, 4), ()),
        ("star", "Anchored(8, 8, 40) & Causal()", Anchored(8, 8, 40) & Causal(), ()),
        ("LongLoRA", "Shifted(16, (0, 8)) & Causal()", Shifted(16, (0, 8)) & Causal(), ()),
        ("BlockBERT", "BlockPermutation(12, 4)", BlockPermutation(12, 4), ()),
        (
            *("dense and streaming", "PerHead((Causal(), Window(5) | …))"),
            *(PerHead((Causal(), Causal() & (Window(5) | First(2)))), ()),
        ),
        ("late queries see all", "Window(7) | Tail(40)", Window(7) | Tail(40), ()),
        ("late queries", "Tail(40)", Tail(40), ()),
        ("some heads", "Heads(0, 1)", Heads(0, 1), ()),
        ("frames", "Frames(8)", Frames(8), ()),
        ("attention tile", "FrameTiles(6, 4)", FrameTiles(6, 4), ()),
        ("neighbourhood, 1 axis", "Neighborhood([48], 13)", Neighborhood([48], 13), ()),
        ("1 axis, dilated", "Neighborhood([48], 7, dilation=3)", Neighborhood((48,), 7, dilation=3), ()),
        ("1 axis, causal", "Neighborhood([48], 13, causal=True)", Neighborhood((48,), 13, causal=True), ()),
        ("2 axes", "Neighborhood([6, 8], 3)", Neighborhood([6, 8], 3), ()),
        ("2 axes, stride 2", "Neighborhood([4, 12], [2, 6], stride=2)", GRID, ()),
        ("the same in bricks", "brick_order([4, 12], [2, 2])", GRID, brick_order([4, 12], [2, 2])),
        (
            *("3 axes, the first causal", "Neighborhood([3, 4, 4], 3, causal=…)"),
            *(Neighborhood([3, 4, 4], 3, causal=(True, False, False)), ()),
        ),
        ("windows, shifted", "Windows([6, 8], [3, 4], [1, 2])", Windows([6, 8], [3, 4], [1, 2]), ()),
        ("S2 over bricks", "BrickByBrick(Strided(6, …), …)", BRICKS, ()),
        ("the same in bricks", "brick_order([6, 8], [3, 2])", BRICKS, brick_order([6, 8], [3, 2])),
    ]
]

LONG = 16384
STREAMING = Causal() & (Window(1023) | First(4))
BLOCKS: dict[str, Mask] = {
    "`Full()`": Full(),
    "`First(1000)`": First(1000),
    "`Tail(15000)`": Tail(15000),
    "`Causal()`": Causal(),
    "`Window(1023)`": Window(1023),
    "`Causal() & (Window(1023) \\| First(4))`": STREAMING,
    "`PerHead`, the first 2 of 8 heads causal, the others as the row above": PerHead(
        (Causal(),) * 2 + (STREAMING,) * 6
    ),
    "`Documents(every 3000, Causal())`": Documents(tuple(range(0, LONG, 3000)), Causal()),
    "`Strided(128, 4, 16) & Causal()`": Strided(128, 4, 16) & Causal(),
    "`Strided(64, 8, 16) & Causal()`": Strided(64, 8, 16) & Causal(),
    "`Anchored(1024, 1024, 14336) & Causal()`": Anchored(1024, 1024, 14336) & Causal(),
    "`Shifted(2048, (0, 1024)) & Causal()`": Shifted(2048, (0, 1024)) & Causal(),
    "`BlockPermutation(2048, 8)`": BlockPermutation(2048, 8),
    "`Frames(1024)`": Frames(1024),
    "`FrameTiles(1024, 4)`": FrameTiles(1024, 4),
}
VIDEO = (16, 32, 32)
VIDEOS: dict[str, Mask] = {
    "`Neighborhood((16, 32, 32), (4, 8, 8), dilation=2)`": Neighborhood(VIDEO, (4, 8, 8), dilation=2),
    "`Neighborhood((16, 32, 32), (8, 16, 16), causal=(True, False, False))`": Neighborhood(
        VIDEO, (8, 16, 16), causal=(True, False, False)
    ),
    "`Neighborhood((16, 32, 32), (8, 16, 16))`": Neighborhood(VIDEO, (8, 16, 16)),
    "`Neighborhood((16, 32, 32), (8, 16, 16), stride=(2, 8, 8))`": Neighborhood(
        VIDEO, (8, 16, 16), stride=(2, 8, 8)
    ),
    "`Neighborhood((16, 32, 32), (6, 24, 24), stride=(2, 8, 8))`": Neighborhood(
        VIDEO, (6, 24, 24), stride=(2, 8, 8)
    ),
}


def picture(mask: Mask, at: Spans) -> np.ndarray:
    """Red, green and blue of CELL x CELL pixels a pair of tokens, with a white line between pairs."""
    seen = visible(lower(mask, at, at, 2, CPU)).expand(1, 2, TOKENS, TOKENS)[0]
    first, second = (np.asarray(x.numpy()) for x in seen)
    shades = np.array([to_rgb(x) for x in (EMPTY, FIRST, SECOND, EITHER)])
    pixels = shades[first + 2 * second].repeat(CELL, 0).repeat(CELL, 1)
    pixels[CELL - 1 :: CELL] = pixels[:, CELL - 1 :: CELL] = 1.0
    return pixels


def draw(path: Path) -> None:
    """One panel a mask: queries from top to bottom, keys from left to right."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    side, gap, head = CELL * TOKENS, 44, 92
    columns, rows = 5, -(-len(PANELS) // 5)
    width, height = columns * (side + gap) + 2 * gap, rows * (side + head) + 2 * gap
    settings: Any = {"font.family": "DejaVu Sans", "text.color": INK, "axes.linewidth": 0}
    with matplotlib.rc_context(settings):
        figure = pyplot.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
        for i, (title, code, mask, at) in enumerate(PANELS):
            # placed by the pixel, so that all cells are equally large
            left, top = 1.5 * gap + i % columns * (side + gap), i // columns * (side + head) + head
            bottom = height - top - side
            box = figure.add_axes((left / width, bottom / height, side / width, side / height))
            box.imshow(picture(mask, at), interpolation="nearest", aspect="auto")
            box.set(xticks=[], yticks=[])
            box.set_title(title, loc="left", fontsize=10.5, pad=15, fontweight="bold")
            box.text(0, 1.022, code, transform=box.transAxes, fontsize=6.6, family="monospace", color=FAINT)
            if not i:
                box.set_ylabel("queries", color=FAINT, fontsize=8, labelpad=3)
                box.set_xlabel("keys", color=FAINT, fontsize=8, labelpad=3)
        named = {"visible": EITHER, "to the first of two kv heads only": FIRST, "to the second only": SECOND}
        handles = [Patch(color=colour, label=name) for name, colour in named.items()]
        figure.legend(handles=handles, loc="lower center", ncols=3, frameon=False, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)


def table() -> None:
    """Tiles of 128 x 128 among 16,384 tokens and 8 kv heads, as a table in Markdown."""
    print("| mask | visible | tiles visited | of these partial |\n|---|---|---|---|")
    whole: Spans = (Span(0, LONG),)
    for name, mask in BLOCKS.items():
        row(name, mask, whole)
        # smaller tiles, where the blocks of the mask divide no tile of 128
        if grain(mask) == 64:
            row(f"{name} in tiles of 64 x 64", mask, whole, 64)
    for name, mask in VIDEOS.items():
        row(name, mask, whole)
        # positions of one residue make a brick of a dilated neighbourhood
        bricks = brick_order(VIDEO, (2, 8, 8), 2 if "dilation=2" in name else 1)
        row(f"{name} in bricks of 2 x 8 x 8", mask, bricks)


def row(name: str, mask: Mask, at: Spans, tile: int = 128) -> None:
    lists = tiles(mask, at, at, 8, size=(tile, tile), transpose=False, device=CPU)
    full, partial = (int(x.diff().sum()) for x in (lists.full, lists.partial))
    seen = area(mask, at, at, 8) / LONG**2
    visited = (full + partial) * tile**2 / LONG**2 / lists.heads
    print(f"| {name} | {seen:.2%} | {visited:.2%} | {partial / (full + partial):.1%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("docs/images/masks.png"))
    path = parser.parse_args().out
    draw(path)
    print(f"{path}\n")
    table()


if __name__ == "__main__":
    main()
