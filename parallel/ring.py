"""Keys and values travel round a ring of ranks; queries stay (Liu et al. 2023, section 3)."""

from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import backward, combine, forward, nothing, partial_dtype
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from ..kernels.span import Spans
from .comm import Edge, Pending, Traffic, post
from .halves import Joined, Saved, Triple
from .mesh import axis_group
from .needs import meets
from .placement import Placement, named

Wire = Literal["float32", "bfloat16"]


class Route(NamedTuple):
    """How far each shard travels one way round, from placement and mask alone, so that every rank derives the
    same edges.
    """

    needs: tuple[tuple[bool, ...], ...]  # needs[r][s]: some query of rank r may see some key of shard s
    reach: tuple[int, ...]  # hops from its owner to its last user this way, 0 if nobody else needs it
    first: tuple[int, ...]  # hops to its first user other than the owner: gradients travel from there on

    def travels(self, shard: int, hop: int) -> bool:
        """Whether the shard makes its `hop`-th hop (the one that arrives `hop` ranks after the owner)."""
        return hop <= self.reach[shard]

    def returns(self, shard: int, hop: int) -> bool:
        """Whether a gradient of the shard exists after the work of hop `hop` and goes one hop further."""
        return self.first[shard] <= hop < self.reach[shard]


@lru_cache(maxsize=256)
def shards_needed(mask: Mask, placement: Placement, kv_heads: int) -> tuple[tuple[bool, ...], ...]:
    """[r][s]: whether some query of rank r may see some key of shard s. Cached by value."""
    spans = placement.spans_by_rank
    return tuple(tuple(row) for row in meets(mask, spans, spans, kv_heads).tolist())


@lru_cache(maxsize=256)
def route(mask: Mask, placement: Placement, kv_heads: int, step: int = 1, most: int | None = None) -> Route:
    """The route of each shard, whose every hop is to the rank `step` further; only the first `most` ranks are
    served (None: all). Cached by value.
    """
    size, needs = placement.size, shards_needed(mask, placement, kv_heads)
    hops = range(1, size if most is None else most + 1)
    users = [[hop for hop in hops if needs[(s + step * hop) % size][s]] for s in range(size)]
    return Route(needs, tuple(max(u, default=0) for u in users), tuple(min(u, default=size) for u in users))


class Ring(Joined):
    """K and V in the inputs' dtype, dK and dV in float32 (float64 for float64 inputs): none goes where no
    mask needs it.

    Beside its own, a rank holds two key shards at a time, the one it works on and the one that is coming.

    bidirectional: shards go both ways round, each as far as the opposite rank, in half as many rounds, where
    links carry both directions at once; twice as many shards are held.

    grad_dtype: what dK and dV travel in. "bfloat16" halves their bytes and rounds them at each hop. Measured
    (causal, 256 tokens, zigzag): float32 inputs get dK and dV with a relative error of 0.8e-3, 1.7e-3 and
    2.9e-3 at 2, 4 and 8 ranks instead of 3e-7; the error that bfloat16 inputs have by themselves becomes 1.1,
    1.4 and 1.9 times as large. out, lse and dQ do not change.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        *,
        axis: str = "ring",
        placement: str = "zigzag",
        bidirectional: bool = False,
        grad_dtype: Wire = "float32",
    ) -> None:
        if grad_dtype not in get_args(Wire):
            raise ValueError(
                f"parallel.layout.grad_dtype is {grad_dtype!r}; it can be {', '.join(get_args(Wire))}"
            )
        self.group = axis_group(mesh, axis)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic, self.bidirectional, self.grad_dtype = Traffic(), bidirectional, grad_dtype
        self._place = named(placement)

    def place(self, length: int, mask: Mask) -> Placement:
        return self._place(length, self.size, mask)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        lanes = self._lanes(k, v, mask, placement)
        mine, row = placement.spans_by_rank[self.rank], nothing(q, options)
        for hop in range(max(lane.hops for lane in lanes)):
            for lane in lanes:
                lane.pass_on(hop)
            for lane in lanes:
                if lane.works(hop):
                    theirs = lane.spans(hop)
                    part = forward(q, lane.kv[0], lane.kv[1], mask, mine, theirs, options=options)
                    row = combine(row, part)
            for lane in lanes:
                lane.arrive()
        return *row, (q, k, v, row[1])

    def backward(
        self,
        dout: Tensor,
        delta: Tensor | None,
        saved: Saved,
        mask: Mask,
        placement: Placement,
        options: AttentionOptions,
    ) -> Triple:
        q, k, v, lse = saved
        assert q is not None and k is not None and v is not None
        lanes = self._lanes(k, v, mask, placement)
        mine, dtype = placement.spans_by_rank[self.rank], partial_dtype(q)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        own = torch.zeros((2, *k.shape), dtype=dtype, device=q.device)

        def part(lane: _Lane, hop: int) -> Tensor:
            at, kv = lane.spans(hop), lane.kv
            found = backward(dout, delta, q, kv[0], kv[1], lse, mask, mine, at, options=options)
            dq.add_(found[0])
            return torch.stack(found[1:])

        for hop in range(max(lane.hops for lane in lanes)):
            for lane in lanes:
                lane.pass_on(hop)
            for lane in lanes:
                if hop:
                    lane.pass_back(part(lane, hop) if lane.works(hop) else None, hop)
                elif lane.works(hop):
                    own += part(lane, hop)
            for lane in lanes:
                lane.arrive()
        for lane in lanes:
            home = lane.come_home()
            if home is not None:
                own += home
        return dq, own[0], own[1]

    def _lanes(self, k: Tensor, v: Tensor, mask: Mask, placement: Placement) -> "list[_Lane]":
        """The ways round; the first one works on the own shard."""
        kv = torch.stack((k, v))
        there, back = (self.size // 2, (self.size - 1) // 2) if self.bidirectional else (self.size - 1, 0)
        ways = [(1, there)] + [(-1, back)] * (back > 0)
        return [_Lane(self, placement, kv, mask, step, most) for step, most in ways]


class _Lane:
    """One way round the ring in one pass, as one rank sees it: the shard that is here, and its gradient."""

    def __init__(
        self, ring: Ring, placement: Placement, kv: Tensor, mask: Mask, step: int, most: int
    ) -> None:
        self.ring, self.placement, self.step, self.most = ring, placement, step, most
        self.kv = kv  # [2, B, tokens, Hkv, D]
        self.route = route(mask, placement, kv.shape[3], step, most)
        self.hops = 1 + max(self.route.reach)
        self.next, self.previous = (ring.rank + step) % ring.size, (ring.rank - step) % ring.size
        self._wire = torch.bfloat16 if ring.grad_dtype == "bfloat16" else partial_dtype(kv)
        self._coming = kv
        self._grad: Tensor | None = None  # of the shard that is here, from the ranks before this one
        self._home: Tensor | None = None  # of this rank's own shard
        self._moving = self._returning = Pending()

    def shard(self, hop: int) -> int:
        """Whose keys are here at `hop`, if they travelled this far."""
        return (self.ring.rank - self.step * hop) % self.ring.size

    def spans(self, hop: int) -> Spans:
        return self.placement.spans_by_rank[self.shard(hop)]

    def works(self, hop: int) -> bool:
        """Whether queries held here may see keys of the shard that is here."""
        mine = self.step > 0 if hop == 0 else hop <= self.most
        return mine and self.route.needs[self.ring.rank][self.shard(hop)]

    def pass_on(self, hop: int) -> None:
        """Posts the next hop's keys, before this hop's work."""
        arrives = self.route.travels(self.shard(hop + 1), hop + 1)
        self._coming = self._empty(self.shard(hop + 1), self.kv.dtype, arrives)
        sends: list[Edge] = [(self.kv, self.next)] if self.route.travels(self.shard(hop), hop + 1) else []
        receives: list[Edge] = [(self._coming, self.previous)] if arrives else []
        self._moving = post(self.ring.group, sends, receives, self.ring.traffic)

    def arrive(self) -> None:
        """The next hop's keys take the place of this one's."""
        self._moving.wait()
        self.kv = self._coming

    def pass_back(self, term: Tensor | None, hop: int) -> None:
        """Adds this rank's part to the gradient of the shard held at `hop`, and posts it onwards or home.

        term: [2, B, tokens, Hkv, D] in the partial dtype.
        """
        self._returning.wait()
        if term is not None:
            self._grad = term if self._grad is None else term.add_(self._grad)
        way, ring, held, coming = self.route, self.ring, self.shard(hop), self.shard(hop + 1)
        sends: list[Edge] = []
        receives: list[Edge] = []
        if self._grad is not None and way.reach[held] == hop:
            sends.append((self._grad.to(self._wire), held))
        elif self._grad is not None and way.returns(held, hop):
            sends.append((self._grad.to(self._wire), self.next))
        self._grad = None
        if way.returns(coming, hop):
            self._grad = self._empty(coming, self._wire)
            receives.append((self._grad, self.previous))
        if way.reach[ring.rank] == hop:
            self._home = self._empty(ring.rank, self._wire)
            receives.append((self._home, (ring.rank + self.step * hop) % ring.size))
        self._returning = post(ring.group, sends, receives, ring.traffic)

    def come_home(self) -> Tensor | None:
        """The gradient of the own shard from all other ranks, None if there is none."""
        self._returning.wait()
        return self._home

    def _empty(self, shard: int, dtype: torch.dtype, arrives: bool = True) -> Tensor:
        tokens = self.placement.tokens(shard) if arrives else 0
        return self.kv.new_empty((*self.kv.shape[:2], tokens, *self.kv.shape[3:]), dtype=dtype)
