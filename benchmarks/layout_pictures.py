"""Draws, for each layout, who holds what and what travels: bytes counted while four processes run it.

python -m benchmarks.layout_pictures [--out docs/images]
"""

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.spawn import spawn

from longspan.kernels.mask import Causal, First, Full, Mask, Range, Window
from longspan.kernels.patterns import Anchored, Strided
from longspan.kernels.span import Span, bounds
from longspan.kernels.tile import classify
from longspan.parallel.gather import Gather
from longspan.parallel.layout import Layout
from longspan.parallel.mesh import Mesh
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.star import Star
from longspan.parallel.ulysses import Ulysses
from longspan.train.pictures import layout_picture

RANKS, TOKENS, GRID = 4, 4096, 64
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64


class Panel(NamedTuple):
    """One picture: a layout on its mesh, under a mask."""

    name: str
    title: str
    mesh: Mesh
    build: Callable[[DeviceMesh], Layout]
    mask: Mask
    said: str


PANELS = (
    Panel("ring", "Ring, zigzag: K and V go round", Mesh(ring=RANKS), Ring, Causal(), "Causal()"),
    Panel(
        "ring-window", "Ring under a window: no shard goes beyond its last user", Mesh(ring=RANKS),
        partial(Ring, placement="contiguous"), Causal() & (Window(512) | First(4)),
        "Causal & (Window(512) | First(4))",
    ),
    Panel("gather", "Gather: all K and V at once", Mesh(ring=RANKS), Gather, Full(), "Full()"),
    Panel("ulysses", "Ulysses: sequence against heads", Mesh(head=RANKS), Ulysses, Causal(), "Causal()"),
    Panel(
        "usp", "USP: Ulysses in pairs, a ring across them", Mesh(head=2, ring=2),
        partial(Ulysses, inner=Ring), Causal(), "Causal()",
    ),
    Panel(
        "s2", "S2: per head, the key blocks of that head's context", Mesh(ring=RANKS), HeadSharded,
        Strided(64, 4, 16) & Causal(), "Strided(64, 4, 16) & Causal",
    ),
    Panel(
        "star", "Star: the anchor to all, the tail's queries travel", Mesh(ring=RANKS), Star,
        Anchored(512, 256, 3584) & Causal(), "Anchored(512, 256, 3584) & Causal",
    ),
)  # fmt: skip


def measure(rank: int, store: str, out: Path) -> None:
    """One process: runs every layout forward and backward, and lets rank 0 draw what was sent."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for panel in PANELS:
        layout = panel.build(panel.mesh.build("cpu"))
        placement = layout.place(TOKENS, panel.mask)
        tokens = placement.tokens(layout.rank)
        shapes = [(1, tokens, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
        q, k, v = (torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes)
        layout.attention(q, k, v, panel.mask, placement)[0].sum().backward()
        row = torch.tensor([layout.traffic.sent[peer] for peer in range(RANKS)])
        rows = [torch.empty_like(row) for _ in range(RANKS)]
        dist.all_gather(rows, row)
        if rank == 0:
            spans = [[(s.start, s.length, s.run, s.step) for s in one] for one in placement.spans_by_rank]
            path = layout_picture(
                out / f"layout-{panel.name}.png", spans_by_rank=spans, length=TOKENS, tiles=grid(panel.mask),
                sent=np.asarray(torch.stack(rows).numpy()), title=panel.title, mask=panel.said,
            )  # fmt: skip
            print(f"{panel.name}: {int(torch.stack(rows).sum()) / 2**20:.2f} MiB, {path}", flush=True)
    dist.destroy_process_group()


def grid(mask: Mask) -> np.ndarray:
    """The mask as tiles, over all heads together: 0 empty, 1 partial, 2 full."""
    tile = Range(*bounds((Span(0, TOKENS),), TOKENS // GRID))
    some, every = classify(mask, tile, tile, KV_HEADS)
    return np.asarray((some[0].any(0).int() + every[0].all(0).int()).numpy())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        spawn(measure, (f"{folder}/store", args.out), RANKS)


if __name__ == "__main__":
    main()
