"""What splitting a sequence over ranks costs the kernels: the times of all ranks of a ring, run one after the
other on one device, against the time of that device alone. Nothing is sent.

`python -m benchmarks.virtual_ranks --tokens 131072 --ranks 8`. A sum of more than 1 is work on tiles that the
borders of shards cut, and the start and end of more kernels; the slowest rank tells how even the ranks are.
"""

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longspan.kernels.attention import backward, forward, row_delta
from longspan.kernels.mask import Causal, Full, Mask, Window
from longspan.kernels.span import Span, Spans, positions
from longspan.kernels.tile import needed
from longspan.parallel.placement import Placement, named

MASKS: dict[str, Mask] = {"causal": Causal(), "full": Full(), "window": Window(1024)}


@dataclass(frozen=True)
class Inputs:
    """Everything of one device, [1, N, H, D]; lse and delta [1, Hq, N]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    lse: Tensor
    delta: Tensor


@dataclass(frozen=True)
class Times:
    """Milliseconds in the forward and the backward."""

    forward: float
    backward: float

    def __add__(self, other: "Times") -> "Times":
        return Times(self.forward + other.forward, self.backward + other.backward)


def made(mask: Mask, tokens: int, heads: Sequence[int], device: torch.device) -> Inputs:
    """Normal numbers: bfloat16 on a GPU, float32 on the CPU."""
    generator = torch.Generator(device).manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    hq, hk, dim = heads
    q, k, v, dout = (
        torch.randn((1, tokens, h, dim), generator=generator, device=device, dtype=dtype)
        for h in (hq, hk, hk, hq)
    )
    whole = (Span(0, tokens),)
    out, lse = forward(q, k, v, mask, whole, whole)
    delta = row_delta(dout, out, lse, None)
    assert lse is not None and delta is not None
    return Inputs(q, k, v, dout, lse, delta)


def kernels(given: Inputs, mask: Mask, at_q: Spans, at_k: Spans, rounds: int) -> Times:
    """The median time of queries at `at_q` over keys at `at_k`, after a run that builds what is kept."""
    device = given.q.device
    i, j = positions(at_q, device), positions(at_k, device)
    q, dout = (x.index_select(1, i) for x in (given.q, given.dout))
    k, v = (x.index_select(1, j) for x in (given.k, given.v))
    lse, delta = (x.index_select(2, i) for x in (given.lse, given.delta))
    return Times(
        median(lambda: forward(q, k, v, mask, at_q, at_k), device, rounds),
        median(lambda: backward(dout, delta, q, k, v, lse, mask, at_q, at_k), device, rounds),
    )


def median(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Milliseconds."""
    run()
    found = []
    for _ in range(rounds):
        if device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            # a host that is ahead: else short kernels would be timed with their launch
            torch.cuda._sleep(2_000_000)
            marks[0].record()
            run()
            marks[1].record()
            torch.cuda.synchronize()
            found.append(marks[0].elapsed_time(marks[1]))
        else:
            start = time.perf_counter()
            run()
            found.append(1e3 * (time.perf_counter() - start))
    return statistics.median(found)


def by_rank(
    given: Inputs, mask: Mask, placement: Placement, rounds: int, deadline: float = math.inf
) -> list[Times]:
    """What the kernels of each rank of a ring take together; TimeoutError past the deadline."""
    found: list[Times] = []
    for mine in placement.spans_by_rank:
        spent = Times(0.0, 0.0)
        for theirs in placement.spans_by_rank:
            if needed(mask, mine, theirs, given.k.shape[2]):
                if time.perf_counter() > deadline:
                    raise TimeoutError(f"no time for more than {len(found)} ranks")
                spent += kernels(given, mask, mine, theirs, rounds)
        found.append(spent)
    return found


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--tokens", type=int, default=131072 if cuda else 4096)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--placement", default="zigzag")
    parser.add_argument("--mask", default="causal", choices=MASKS)
    parser.add_argument("--heads", default="64,8,128" if cuda else "4,2,64", help="query, kv, width")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds, past which it stops")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> Times:
    """Prints the table; the sums over ranks against one device."""
    args = arguments(given)
    deadline = time.perf_counter() + args.budget
    # Triton 3.9 warns at a compilation when it is unset
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    device, mask = torch.device(args.device), MASKS[args.mask]
    inputs = made(mask, args.tokens, [int(x) for x in args.heads.split(",")], device)
    whole = (Span(0, args.tokens),)
    alone = kernels(inputs, mask, whole, whole, args.rounds)
    placement = named(args.placement)(args.tokens, args.ranks, mask)
    ranks = by_rank(inputs, mask, placement, args.rounds, deadline)
    together = sum(ranks, Times(0.0, 0.0))
    print(f"{args.mask}, {args.tokens} tokens, heads {args.heads}, {args.placement} over {args.ranks} ranks")
    for half in ("forward", "backward"):
        one, total = getattr(alone, half), getattr(together, half)
        slowest = max(getattr(r, half) for r in ranks)
        print(
            f"{half:8}  one device {one:9.2f} ms   all ranks {total:9.2f} ms = {total / one:.3f} of it   "
            f"slowest rank {slowest:8.2f} ms = {slowest * args.ranks / one:.3f} of its share"
        )
    ratio = Times(together.forward / alone.forward, together.backward / alone.backward)
    both = (together.forward + together.backward) / (alone.forward + alone.backward)
    print(f"forward and backward of all ranks: {both:.3f} of one device")
    return ratio


if __name__ == "__main__":
    main()
