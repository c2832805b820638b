"""Moving tensors between the ranks of a layout, and counting what was moved."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor


@dataclass
class Traffic:
    """What this rank has sent since `reset`: bytes by receiving rank of the layout, and messages."""

    sent: Counter[int] = field(default_factory=Counter)
    messages: int = 0

    def add(self, peer: int, x: Tensor) -> None:
        self.sent[peer] += x.numel() * x.element_size()
        self.messages += 1

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
            traffic.add(peer, x)
    works = dist.batch_isend_irecv(operations) if operations else []
    return Pending(works, [x for x, _ in (*sends, *receives)])
