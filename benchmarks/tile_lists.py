"""Time of one CPU core and memory that the tile lists of long sequences take, forward and transposed.

python -m benchmarks.tile_lists [--tokens 1048576] [--tile 128] [--kv-heads 8]
"""

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.neighborhood import Frames, FrameTiles, Neighborhood
from longspan.kernels.patterns import Anchored, Shifted, Strided
from longspan.kernels.span import Span
from longspan.kernels.tile import tiles


def masks(tokens: int) -> dict[str, Mask]:
    grid = (tokens // 2**14, 128, 128)
    return {
        "Full()": Full(),
        "Causal()": Causal(),
        "Causal() & (Window(4095) \\| First(4))": Causal() & (Window(4095) | First(4)),
        "Documents(every 3000, Causal())": Documents(tuple(range(0, tokens, 3000)), Causal()),
        "Strided(128, 4, 16) & Causal()": Strided(128, 4, 16) & Causal(),
        "Strided(64, 8, 16) & Causal()": Strided(64, 8, 16) & Causal(),
        "Anchored(4096, 4096, tokens - 8192) & Causal()": Anchored(4096, 4096, tokens - 8192) & Causal(),
        "Shifted(8192, (0, 4096)) & Causal()": Shifted(8192, (0, 4096)) & Causal(),
        "Frames(1024)": Frames(1024),
        "FrameTiles(1024, 8)": FrameTiles(1024, 8),
        f"Neighborhood({grid}, (16, 32, 32))": Neighborhood(grid, (16, 32, 32)),
    }


def measure(mask: Mask, given: argparse.Namespace) -> str:
    """A row of the table, in a process of its own."""
    torch.set_num_threads(1)
    at, seconds, lists = (Span(0, given.tokens),), [], []
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for transpose in (False, True):
        began = time.process_time()
        size = (given.tile, given.tile)
        lists.append(
            tiles(mask, at, at, given.kv_heads, size=size, transpose=transpose, device=torch.device("cpu"))
        )
        seconds.append(time.process_time() - began)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    kept = sum(x.numel() * x.element_size() for found in lists for x in found[4:]) / 2**20
    listed = sum(int(x.long().diff().sum()) for x in (lists[0].full, lists[0].partial))
    return f"{listed:,} | {seconds[0]:.2f} s | {seconds[1]:.2f} s | {kept:.0f} MiB | {peak:.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    for name, default in (("tokens", 2**20), ("tile", 128), ("kv-heads", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    print("| mask | tiles visited | lists | transposed | kept | peak |\n|---|---|---|---|---|---|")
    for name, mask in masks(given.tokens).items():
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            print(f"| `{name}` | {pool.submit(measure, mask, given).result()} |", flush=True)


if __name__ == "__main__":
    main()
