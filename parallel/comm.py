"""Moving tensors between the ranks of a layout, and counting what was moved."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What this rank has sent since `reset`: bytes by receiving rank of the layout, and messages.

    A part of another layout counts into the whole's: `ranks[peer]` is the rank there of its own rank `peer`.
    """

    whole: "Traffic | None" = None
    ranks: Sequence[int] = ()
    sent: Counter[int] = field(default_factory=Counter)
    messages: int = 0

    def add(self, peer: int, count: int) -> None:
        self.sent[peer] += count
        self.messages += 1
        if self.whole is not None:
            self.whole.add(self.ranks[peer], count)

    def reset(self) -> None:
        self.sent.clear()
        self.messages = 0


class Pending:
    """Posted transfers. The tensors stay alive until `wait`, which also the sender must call before reusing
    them.
    """

    def __init__(self, works: list[dist.Work], tensors: list[Tensor]) -> None:
        self._works, self._tensors = works, tensors

    def wait(self) -> None:
        """Returns when everything posted has been sent and received."""
        for work in self._works:
            work.wait()
        self._works, self._tensors = [], []


Edge = tuple[Tensor, int]  # contiguous tensor, peer's rank in the group


def post(
    group: dist.ProcessGroup, sends: Sequence[Edge], receives: Sequence[Edge], traffic: Traffic
) -> Pending:
    """Starts point-to-point transfers with ranks of `group`; messages between two ranks arrive in the order
    of posting.

    Both ends must derive the edge from the same data: a send without its receive never ends.
    """
    operations = []
    for kind, edges in ((dist.isend, sends), (dist.irecv, receives)):
        for x, peer in edges:
            assert x.is_contiguous()
            if x.numel():
                operations.append(dist.P2POp(kind, x, group=group, group_peer=peer))
    for x, peer in sends:
        if x.numel():
            traffic.add(peer, x.numel() * x.element_size())
    works = dist.batch_isend_irecv(operations) if operations else []
    return Pending(works, [x for x, _ in (*sends, *receives)])


def trade(
    group: dist.ProcessGroup,
    outgoing: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    traffic: Traffic,
) -> list[list[Tensor]]:
    """One all-to-all: `outgoing[r]` are tensors for rank r, `shapes[r]` those of what rank r sends here; one
    dtype for all.

    Splits may be uneven or empty. What a rank keeps for itself is not counted as sent.
    """
    rank, like = dist.get_rank(group), outgoing[0][0]
    counts = [sum(x.numel() for x in part) for part in outgoing]
    flat = torch.cat([x.reshape(-1) for part in outgoing for x in part])
    sizes = [[prod(shape) for shape in part] for part in shapes]
    received = like.new_empty(sum(map(sum, sizes)))
    dist.all_to_all_single(received, flat, [sum(s) for s in sizes], counts, group=group)
    for peer, count in enumerate(counts):
        if peer != rank and count:
            traffic.add(peer, count * like.element_size())
    pieces = iter(received.split([n for part in sizes for n in part]))
    return [[next(pieces).view(shape) for shape in part] for part in shapes]
