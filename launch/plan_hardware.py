"""What a step runs on: one card, the links between cards, and how fast our kernels go there."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


@dataclass(frozen=True)
class Card:
    """One device. Published: memory_gib; tflops, dense, in bfloat16 and in the matrix format that float32
    takes; memory_gbs to its own memory; link_gbs to a card of the same machine and host_gbs to host memory,
    each way, in 10^9 bytes a second. host_gib: of host memory for each card of a machine.

    Assumed: matmul, forward, backward: the share of the peak that matrices and attention reach; link_share:
    the share that transfers reach of every link; link_us: before a transfer begins; call_us: of an attention
    call beside its work. overlap: transfers run beside kernels. device: how the card calls itself, a regular
    expression, by which a benchmark's file is found.
    """

    name: str
    device: str
    memory_gib: float
    bfloat16_tflops: float
    float32_tflops: float
    memory_gbs: float
    link_gbs: float
    host_gbs: float
    host_gib: float
    matmul: float = 0.65
    forward: float = 0.45
    backward: float = 0.33
    link_share: float = 0.8
    link_us: float = 10.0
    call_us: float = 20.0
    overlap: bool = True

    def peak(self, precision: str) -> float:
        """FLOP/s of matrices in `float32` or `bfloat16`."""
        return 1e12 * (self.bfloat16_tflops if precision == "bfloat16" else self.float32_tflops)


@dataclass(frozen=True)
class Interconnect:
    """Between machines: gbs each way of one card, in 10^9 bytes a second, and us before a transfer begins."""

    name: str
    gbs: float
    us: float = 20.0


@dataclass(frozen=True)
class Rates:
    """FLOP/s of matrices and of attention over visible pairs, forward and backward; call: seconds of an
    attention call beside its work; source: where they are from, in words.
    """

    matmul: float
    forward: float
    backward: float
    call: float
    source: str


def assumed(card: Card, precision: str) -> Rates:
    """Shares of the published peak."""
    peak = card.peak(precision)
    said = (
        f"assumed: {card.matmul:.0%} of the published {peak / 1e12:,.4g} TFLOP/s in matrices, "
        f"{card.forward:.0%} / {card.backward:.0%} in attention forward / backward"
    )
    return Rates(card.matmul * peak, card.forward * peak, card.backward * peak, card.call_us / 1e6, said)


def benchmarked(card: Card, precision: str, head_dim: int, folder: Path = RESULTS) -> Rates:
    """With attention as a committed benchmark found it on this card, if there is one; else `assumed`.

    Of its causal cases in this precision the one of the nearest head width, and of those the longest.
    """
    plain = assumed(card, precision)
    for path in sorted(folder.glob("kernels-*.json")):
        content = json.loads(path.read_text())
        if not re.search(card.device, content["device"]):
            continue
        # what several threads did together is no rate of one rank on one core
        threads = content["settings"].get("threads") or 1
        threads = threads if "cuda" not in content["versions"] else 1
        case = _nearest(content["cases"], precision, head_dim)
        if case is not None:
            forward, backward = (1e12 * x / threads for x in case["found"]["longspan"]["tflops"])
            said = f"{plain.source.split(' in matrices')[0]} in matrices; attention measured: {path.name}"
            return Rates(plain.matmul, forward, backward, plain.call, said)
    return plain


def _nearest(cases: list[Any], precision: str, head_dim: int) -> Any | None:
    fits = [
        c
        for c in cases
        if c["name"] == "causal"
        and c["dtype"] == precision
        and isinstance(c["found"].get("longspan"), dict)
        and c["found"]["longspan"].get("tflops")
    ]
    return min(fits, key=lambda c: (abs(c["head_dim"] - head_dim), -c["tokens"]), default=None)
