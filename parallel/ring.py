"""Keys and values travel round a ring of ranks; queries stay (Liu et al. 2023, section 3)."""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import backward, combine, forward, nothing, partial_dtype
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from ..kernels.tile import needed
from .comm import Edge, Pending, Traffic, post
from .halves import Joined, Saved, Triple
from .placement import Placement, named


class Route(NamedTuple):
    """How far each shard travels, from placement and mask alone, so that every rank derives the same
    edges.
    """

    needs: tuple[tuple[bool, ...], ...]  # needs[r][s]: some query of rank r may see some key of shard s
    reach: tuple[int, ...]  # hops from its owner to its last user, 0 if nobody else needs it
    first: tuple[int, ...]  # hops to its first user other than the owner: gradients travel from there on

    def travels(self, shard: int, hop: int) -> bool:
        """Whether the shard makes its `hop`-th hop (the one that arrives `hop` ranks after the owner)."""
        return hop <= self.reach[shard]

    def returns(self, shard: int, hop: int) -> bool:
        """Whether a gradient of the shard exists after the work of hop `hop` and goes one hop further."""
        return self.first[shard] <= hop < self.reach[shard]


@lru_cache(maxsize=256)
def route(mask: Mask, placement: Placement, kv_heads: int) -> Route:
    """The route of each shard. Cached by value."""
    size, spans = placement.size, placement.spans_by_rank
    needs = tuple(tuple(needed(mask, at_q, at_k, kv_heads) for at_k in spans) for at_q in spans)
    users = [[hop for hop in range(1, size) if needs[(s + hop) % size][s]] for s in range(size)]
    return Route(needs, tuple(max(u, default=0) for u in users), tuple(min(u, default=size) for u in users))


class Ring(Joined):
    """K and V in the inputs' dtype, dK and dV in float32; at most two key shards are alive, and none goes
    where no mask needs it.
    """

    def __init__(self, mesh: DeviceMesh, *, axis: str = "ring", placement: str = "zigzag") -> None:
        if axis not in (mesh.mesh_dim_names or ()):
            raise ValueError(
                f"parallel.layout.axis is {axis!r}; it can be {', '.join(mesh.mesh_dim_names or ())}"
            )
        self.group = mesh.get_group(axis)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic = Traffic()
        self._place = named(placement)

    def place(self, length: int, mask: Mask) -> Placement:
        return self._place(length, self.size)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        hops = _Hops(self, placement, route(mask, placement, k.shape[2]))
        mine, row = placement.spans_by_rank[self.rank], nothing(q, options)
        kv = torch.stack((k, v))
        for hop in range(hops.count):
            incoming, moving = hops.pass_on(kv, hop)
            shard = hops.shard(hop)
            if hops.route.needs[self.rank][shard]:
                theirs = placement.spans_by_rank[shard]
                row = combine(row, forward(q, kv[0], kv[1], mask, mine, theirs, options=options))
            moving.wait()
            kv = incoming
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
        hops = _Hops(self, placement, route(mask, placement, k.shape[2]))
        mine, dtype = placement.spans_by_rank[self.rank], partial_dtype(q)
        dq = torch.zeros(q.shape, dtype=dtype, device=q.device)
        own = torch.zeros((2, *k.shape), dtype=dtype, device=q.device)
        kv = torch.stack((k, v))
        travelling: Tensor | None = None  # the gradient of the shard that is here, from the ranks before us
        home: Tensor | None = None
        returning = Pending([], [])
        for hop in range(hops.count):
            incoming, moving = hops.pass_on(kv, hop)
            shard, part = hops.shard(hop), None
            if hops.route.needs[self.rank][shard]:
                theirs = placement.spans_by_rank[shard]
                part = backward(dout, delta, q, kv[0], kv[1], lse, mask, mine, theirs, options=options)
                dq += part[0]
            returning.wait()
            if part and hop == 0:
                own[0] += part[1]
                own[1] += part[2]
            elif part:
                term = torch.stack(part[1:])
                travelling = term if travelling is None else travelling.add_(term)
            travelling, back, returning = hops.pass_back(travelling, hop, own)
            home = back if back is not None else home
            moving.wait()
            kv = incoming
        returning.wait()
        if home is not None:
            own += home
        return dq, own[0], own[1]


class _Hops:
    """The transfers of one turn, as one rank sees them."""

    def __init__(self, ring: Ring, placement: Placement, way: Route) -> None:
        self.ring, self.placement, self.route = ring, placement, way
        self.count = 1 + max(way.reach)
        self.next, self.previous = (ring.rank + 1) % ring.size, (ring.rank - 1) % ring.size

    def shard(self, hop: int) -> int:
        """Whose keys are here at `hop`, if they travelled this far."""
        return (self.ring.rank - hop) % self.ring.size

    def pass_on(self, kv: Tensor, hop: int) -> tuple[Tensor, Pending]:
        """Posts the next hop's keys before this hop's work: (where they will be, what to wait for)."""
        held, coming = self.shard(hop), self.shard(hop + 1)
        sends: list[Edge] = (
            [(kv, self.next)] if self.route.travels(held, hop + 1) and hop + 1 < self.ring.size else []
        )
        arrives = hop + 1 < self.ring.size and self.route.travels(coming, hop + 1)
        tokens = self.placement.tokens(coming) if arrives else 0
        into = kv.new_empty((*kv.shape[:2], tokens, *kv.shape[3:]))
        return into, post(
            self.ring.group, sends, [(into, self.previous)] if arrives else [], self.ring.traffic
        )

    def pass_back(
        self, grad: Tensor | None, hop: int, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Pending]:
        """Posts the gradient of the shard held at `hop`, onwards or home: (the next shard's, our own come
        home, pending).

        like: a gradient of a shard, [2, B, tokens, heads, head_dim], for dtype, device and all sizes but the
        tokens.
        """
        way, ring = self.route, self.ring
        if hop == 0:
            return None, None, Pending([], [])
        held, coming = self.shard(hop), self.shard(hop + 1)
        sends: list[Edge] = []
        receives: list[Edge] = []
        arriving = home = None
        if grad is not None and way.reach[held] == hop:
            sends.append((grad, held))
        elif grad is not None and way.returns(held, hop):
            sends.append((grad, self.next))
        if hop + 1 < ring.size and way.returns(coming, hop):
            arriving = self._empty(coming, like)
            receives.append((arriving, self.previous))
        if way.reach[ring.rank] == hop:
            home = self._empty(ring.rank, like)
            receives.append((home, (ring.rank + hop) % ring.size))
        return arriving, home, post(ring.group, sends, receives, ring.traffic)

    def _empty(self, shard: int, like: Tensor) -> Tensor:
        return like.new_empty((*like.shape[:2], self.placement.tokens(shard), *like.shape[3:]))
