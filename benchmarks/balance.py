"""How evenly each placement shares the work of a mask over ranks, and what it costs in traffic.

python -m benchmarks.balance [--tokens 131072] [--ranks 8 32 64]

Work: max / mean of visible (query, key) pairs over the ranks. Traffic: bytes of one forward of a layer with
8 key heads of 128 in bfloat16, a rank on average, under the ring and under the s2 exchange; bytes are counted
where they arrive, on 4 ranks that lie evenly. Work is exact, but for the neighbourhood, where a part of the
queries stands for all. A star marks what placement=auto takes.
"""

import argparse
import math
from random import Random
from typing import Any

import torch

from longspan.kernels.mask import Causal, Documents, Mask, Window
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.patterns import Anchored, Strided
from longspan.parallel.balance import ESTIMATE
from longspan.parallel.placement import named

from .one_rank import being, layout, passes
from .traffic import DTYPE, SHAPE, mib

PLACEMENTS = "contiguous", "zigzag", "balanced", "striped"


def packed(length: int, mean: int, seed: int = 0) -> Documents:
    """Documents of lognormal lengths, sigma 1.0, the last one cut, each causal."""
    draw, starts = Random(seed), [0]
    while starts[-1] < length:
        starts.append(starts[-1] + max(1, round(draw.lognormvariate(math.log(mean) - 0.5, 1.0))))
    return Documents(tuple(starts[:-1]), inner=Causal())


def masks(length: int) -> dict[str, Mask]:
    return {
        "causal": Causal(),
        "window 1024": Window(1023),
        "documents, mean 450": packed(length, 450),
        "documents, mean 1300": packed(length, 1300),
        "S2 stride 16": Strided(64, 8, 16) & Causal(),
        "star": Anchored(4096, 4096, length - 8192) & Causal(),
        "3D neighbourhood": Neighborhood((length // 4096, 64, 64), (4, 16, 16), stride=(2, 8, 8)),
    }


def traffic(size: int, length: int) -> dict[tuple[str, str, str], float]:
    """(layout, placement, mask) -> bytes that arrive on a rank in a forward."""
    found: dict[tuple[str, str, str], float] = {}
    ranks = [size * (2 * i + 1) // 8 for i in range(4)]
    for rank in ranks:
        with being(rank, size):
            for kind in ("ring", "s2"):
                for placement in PLACEMENTS:
                    one: Any = layout(f"{kind}/{placement}", size)
                    for name, mask in masks(length).items():
                        came = passes(one, mask, length, SHAPE, DTYPE)[0].arrived / len(ranks)
                        key = kind, placement, name
                        found[key] = found.get(key, 0) + came
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=2**17)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    given = parser.parse_args()
    length = given.tokens
    torch.set_num_threads(1)
    print("| ranks | mask | placement | max / mean work | ring MiB | s2 MiB |\n|---|---|---|---|---|---|")
    for size in given.ranks:
        sent = traffic(size, length)
        for name, mask in masks(length).items():
            auto = named("auto")(length, size, mask)
            for placement in PLACEMENTS:
                place = named(placement)(length, size, mask)
                bytes_sent = " | ".join(mib(sent[kind, placement, name]) for kind in ("ring", "s2"))
                uneven, mark = place.imbalance(mask, most=ESTIMATE), " \\*" * (place == auto)
                print(f"| {size} | {name} | {placement}{mark} | {uneven:.4f} | {bytes_sent} |", flush=True)


if __name__ == "__main__":
    main()
