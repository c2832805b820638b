"""Moving tensors between the ranks of a layout, and counting what was moved.

Nothing here waits longer than the timeout of the process group: a rank that fails raises on the others too.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Doing(NamedTuple):
    """What is waited for in a group of `size` ranks; it is put into words only where somebody asks.

    peers: ranks of the group, if not all.
    """

    what: str
    size: int
    peers: Sequence[int] = ()

    def __str__(self) -> str:
        ranks = f", ranks {sorted(set(self.peers))}" if self.peers else ""
        return f"{self.what}{ranks} of a group of {self.size}"


@dataclass
class Traffic:
    """What this rank has sent since `reset`: bytes by receiving rank of the layout, and messages.

    A part of another layout counts into the whole's: `ranks[peer]` is the rank there of its own rank `peer`.
    waiting: for what just now; after an error, for what it was.
    """

    whole: "Traffic | None" = None
    ranks: Sequence[int] = ()
    sent: Counter[int] = field(default_factory=Counter)
    messages: int = 0
    waiting: Doing | None = None

    def add(self, peer: int, count: int) -> None:
        self.sent[peer] += count
        self.messages += 1
        if self.whole is not None:
            self.whole.add(self.ranks[peer], count)

    def enter(self, waiting: Doing | None) -> None:
        """Says what is waited for."""
        self.waiting = waiting
        if self.whole is not None:
            self.whole.enter(waiting)

    @property
    def doing(self) -> str:
        """What is waited for, in words, or nothing."""
        waiting = self.waiting
        return "" if waiting is None else str(waiting)

    def reset(self) -> None:
        self.sent.clear()
        self.messages = 0


class Pending:
    """Posted transfers. The tensors stay alive until `wait`, which also the sender must call before reusing
    them: so no allocator can give their memory away while another stream still reads or writes it.
    """

    def __init__(
        self,
        works: Sequence[dist.Work] = (),
        tensors: Sequence[Tensor] = (),
        landings: Sequence[tuple[Tensor, Tensor]] = (),
        traffic: Traffic | None = None,
        doing: Doing | None = None,
    ) -> None:
        """landings: (on the host, on the device), what must still be copied when it has arrived. doing: what
        `traffic` is told while this is waited for.
        """
        self._works, self._tensors, self._landings = works, tensors, landings
        self._traffic, self._doing = traffic, doing

    def wait(self) -> None:
        """Returns when everything posted has been sent and received. RuntimeError after the timeout of the
        group.

        On NCCL the host does not wait: the current stream does, for the stream of the group.
        """
        if self._traffic is not None:
            self._traffic.enter(self._doing)
        for work in self._works:
            work.wait()
        if self._traffic is not None:
            self._traffic.enter(None)
        for host, x in self._landings:
            x.copy_(host)
        self._works, self._tensors, self._landings = (), (), ()


Edge = tuple[Tensor, int]  # contiguous tensor, peer's rank in the group


def staged(group: dist.ProcessGroup, x: Tensor) -> bool:
    """Whether `x` must travel by way of the host: gloo's point-to-point reads and writes host memory only."""
    if x.device.type == "cpu":
        return False
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return backends.get(x.device.type) == "gloo"


def post(
    group: dist.ProcessGroup, sends: Sequence[Edge], receives: Sequence[Edge], traffic: Traffic
) -> Pending:
    """Starts point-to-point transfers with ranks of `group`; messages between two ranks arrive in the order
    of posting.

    Both ends must derive the edge from the same data: a send without its receive never ends. NCCL moves the
    data on a stream of its own, which starts after what the current stream was given so far: work that is
    given to the current stream between `post` and `wait` runs beside the transfer. Gloo moves it on a thread
    of its own; from and to a device by way of the host, for which the host waits here.
    """
    operations: list[dist.P2POp] = []
    kept: list[Tensor] = []
    landings: list[tuple[Tensor, Tensor]] = []
    for x, peer in sends:
        assert x.is_contiguous()
        if x.numel():
            here = _on_host(x).copy_(x) if staged(group, x) else x
            operations.append(dist.P2POp(dist.isend, here, group=group, group_peer=peer))
            traffic.add(peer, x.numel() * x.element_size())
            kept.append(here)
    for x, peer in receives:
        assert x.is_contiguous()
        if x.numel():
            here = x
            if staged(group, x):
                here = _on_host(x)
                landings.append((here, x))
            operations.append(dist.P2POp(dist.irecv, here, group=group, group_peer=peer))
            kept.append(here)
    if not operations:
        return Pending()
    doing = Doing("sends and receives", group.size(), [op.group_peer for op in operations])
    return Pending(dist.batch_isend_irecv(operations), kept, landings, traffic, doing)


def trade(
    group: dist.ProcessGroup,
    outgoing: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    traffic: Traffic,
) -> list[list[Tensor]]:
    """One all-to-all: `outgoing[r]` are tensors for rank r, `shapes[r]` those of what rank r sends here; one
    dtype for all.

    Splits may be uneven or empty. What a rank keeps for itself is not counted as sent. RuntimeError after the
    timeout of the group.
    """
    counts = [sum(x.numel() for x in part) for part in outgoing]
    flat = torch.cat([x.reshape(-1) for part in outgoing for x in part])
    sizes = [[prod(shape) for shape in part] for part in shapes]
    received = exchange(group, flat, counts, [sum(s) for s in sizes], traffic)
    pieces = iter(received.split([n for part in sizes for n in part]))
    return [[next(pieces).view(shape) for shape in part] for part in shapes]


def exchange(
    group: dist.ProcessGroup, flat: Tensor, counts: Sequence[int], sizes: Sequence[int], traffic: Traffic
) -> Tensor:
    """`trade` without the cutting: contiguous `flat` holds counts[r] numbers for rank r after rank, and so
    does the result, sizes[r] from rank r.
    """
    rank, received = dist.get_rank(group), flat.new_empty(sum(sizes))
    indirect = staged(group, flat)
    into, given = (_on_host(received), _on_host(flat).copy_(flat)) if indirect else (received, flat)
    traffic.enter(Doing("all-to-all", len(counts)))
    dist.all_to_all_single(into, given, list(sizes), list(counts), group=group)
    traffic.enter(None)
    if indirect:
        received.copy_(into)
    for peer, count in enumerate(counts):
        if peer != rank and count:
            traffic.add(peer, count * flat.element_size())
    return received


def _on_host(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=x.device.type == "cuda")
