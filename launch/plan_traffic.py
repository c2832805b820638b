"""What a step will send, from volumes known in closed form: which plans are tried first, and what the curves
over lengths are made of. What a plan is held to is counted by the dry run.
"""

from functools import lru_cache

import torch

from ..kernels.concrete import concrete
from ..kernels.mask import Mask
from ..parallel.placement import Placement, contiguous
from ..parallel.s2 import needs
from .ledger import Moved
from .plan_job import OFFLOADED, Candidate, Shape

BLOCK = 64  # keys that parallel=s2 fetches together


def planned(job: Shape, way: Candidate, node: int) -> list[Moved]:
    """Of one rank, by kind and link, as the ledger of a dry run tells it; tensor parallelism included."""
    passes = way.micro * way.accumulate
    found = _weights(job, way, node)
    for mask, layers in job.masks:
        for kind, ranks, span, size, calls in _attention(job, way, mask):
            if ranks > 1:
                link = "node" if span <= node else "network"
                found.append(
                    Moved(kind, ranks, link, int(size * layers * passes), calls * layers * way.accumulate)
                )
    if way.tp > 1:
        # tokens are gathered before and scattered after attention and MLP, forward, again and backward
        each = 2 * (2 + recomputes(way)) * 2 * passes * job.layers
        share = job.tokens // way.split * job.dim * job.width * (way.tp - 1) // way.tp
        found.append(Moved("all-gather", way.tp, "node", each // 2 * share, each // 2))
        found.append(Moved("reduce-scatter", way.tp, "node", each // 2 * share, each // 2))
    return found


def recomputes(way: Candidate) -> int:
    """How many times a block is computed once more for its backward."""
    return 0 if way.memory == "none" else 1


def _weights(job: Shape, way: Candidate, node: int) -> list[Moved]:
    """Gradients, and weights where they are sharded."""
    ranks, held = way.dp * way.split, job.parameters / way.tp
    if ranks == 1:
        return []
    link = "node" if way.world <= node else "network"
    around = held * (ranks - 1) / ranks
    if way.engine == "ddp":
        return [Moved("all-reduce", ranks, link, int(2 * 4 * around), job.layers)]
    width = 2 if way.engine.removesuffix(OFFLOADED) == "fsdp_bf16" else 4
    gathered = int(2 * width * around) * way.accumulate
    calls = 2 * job.layers * way.accumulate
    return [
        Moved("all-gather", ranks, link, gathered, calls),
        Moved("reduce-scatter", ranks, link, int(4 * around), job.layers),
    ]


def _attention(job: Shape, way: Candidate, mask: Mask) -> list[tuple[str, int, int, float, int]]:
    """(kind, ranks, ranks from the first to the last of a group, bytes, messages) of one layer and sequence,
    forward, again and backward.
    """
    again, e = 1 + recomputes(way), job.width
    q, kv = (n * job.head_dim / way.tp for n in (job.heads, job.kv_heads))
    found = []
    if way.head > 1:
        h, each = way.head, job.tokens / way.split * (way.head - 1) / way.head
        size = each * (again * (2 * q + 2 * kv) * e + q * e + (q + 2 * kv) * 4)
        found.append(("all-to-all", h, h * way.tp, size, 3 * again + 3))
    if way.ring > 1:
        r, shard = way.ring, job.tokens / way.ring * 2 * kv / way.head
        span = way.split * way.tp
        if way.layout == "star":
            found.append(("send", r, span, shard * (again * e + 4), 8 * (r - 1)))
        elif way.layout == "s2":
            keys = _fetched(mask, contiguous(job.tokens, r), job.kv_heads)
            size = 2 * job.head_dim / way.tp * keys * ((again + 1) * e + 4)
            found.append(("all-to-all", r, span, size, again + 2))
        else:
            # a ring takes gradients one hop further, home
            home = r if way.layout != "gather" else r - 1
            size = shard * (r - 1) * e * (again + 1) + shard * home * 4
            found.append(("send", r, span, size, (r - 1) * (again + 2)))
    return found


@lru_cache(maxsize=64)
@concrete
def _fetched(mask: Mask, placement: Placement, kv_heads: int) -> float:
    """(key, kv head) pairs that the last rank fetches, which sees most of the context."""
    last = placement.size - 1
    found = needs(mask, placement, kv_heads, last, BLOCK, torch.device("cpu"))
    return float(
        sum(
            len(heads) * (sum(wants) - wants[last])
            for heads, wants in zip(found.heads, found.wants, strict=True)
        )
    )
