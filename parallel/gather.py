"""All keys and values that a rank needs come at once, from the ranks that hold them; queries stay."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import backward, forward, partial_dtype
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from ..kernels.span import Spans
from .comm import Traffic, post
from .halves import Joined, Saved, Triple
from .mesh import axis_group
from .pairs import as_pair, tokens_first
from .placement import Placement, named
from .ring import Route, route


class Gather(Joined):
    """K, V from every rank whose shard the mask needs, `heads_at_once` kv heads at a time (0: all) to bound
    memory.

    dK and dV go home in float32 and are added there in the order of the ranks (Llama 3, section 3.3.2,
    gathers too).
    """

    def __init__(
        self, mesh: DeviceMesh, *, axis: str = "ring", placement: str = "zigzag", heads_at_once: int = 0
    ) -> None:
        if heads_at_once < 0:
            raise ValueError(f"parallel.layout.heads_at_once is {heads_at_once}; it must be 0 (all) or more")
        self.group = axis_group(mesh, axis)
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.traffic, self.heads_at_once = Traffic(), heads_at_once
        self._place = named(placement)

    def place(self, length: int, mask: Mask) -> Placement:
        return self._place(length, self.size, mask)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        way = route(mask, placement, k.shape[2])
        outs, lses = [], []
        for kv_heads, q_heads in self._groups(q, k):
            kv, at = self._collect(k[:, :, kv_heads], v[:, :, kv_heads], placement, way)
            bound = mask.heads(range(kv_heads.start, kv_heads.stop), k.shape[2])
            mine = placement.spans_by_rank[self.rank]
            out, lse = forward(q[:, :, q_heads], *as_pair(kv), bound, mine, at, options=options)
            outs.append(out)
            lses.append(lse)
            # else it would be alive while the next group's keys come
            del kv
        whole = None if lses[0] is None else torch.cat([x for x in lses if x is not None], 1)
        return torch.cat(outs, 2), whole, (q, k, v, whole)

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
        way, mine = route(mask, placement, k.shape[2]), placement.spans_by_rank[self.rank]
        dtype = partial_dtype(q)
        dq = torch.empty(q.shape, dtype=dtype, device=q.device)
        dkv = torch.empty((k.shape[1], 2, k.shape[0], *k.shape[2:]), dtype=dtype, device=q.device)
        for kv_heads, q_heads in self._groups(q, k):
            kv, at = self._collect(k[:, :, kv_heads], v[:, :, kv_heads], placement, way)
            bound = mask.heads(range(kv_heads.start, kv_heads.stop), k.shape[2])
            rows = [None if x is None else x[:, q_heads] for x in (delta, lse)]
            part = backward(
                dout[:, :, q_heads],
                rows[0],
                q[:, :, q_heads],
                *as_pair(kv),
                rows[1],
                bound,
                mine,
                at,
                options=options,
            )
            dq[:, :, q_heads] = part[0]
            grad = tokens_first(part[1], part[2])
            # else they would be alive while gradients travel and the next group's keys come
            del kv, part
            dkv[:, :, :, kv_heads] = self._give_back(grad, placement, way)
            del grad
        return dq, *as_pair(dkv)

    def _groups(self, q: Tensor, k: Tensor) -> list[tuple[slice, slice]]:
        """(kv heads, their query heads), a group at a time."""
        heads, each = k.shape[2], q.shape[2] // k.shape[2]
        step = self.heads_at_once or heads
        starts = range(0, heads, step)
        return [
            (slice(i, min(i + step, heads)), slice(i * each, min(i + step, heads) * each)) for i in starts
        ]

    def _collect(self, k: Tensor, v: Tensor, placement: Placement, way: Route) -> tuple[Tensor, Spans]:
        """Own keys and values and those of every rank that this one needs, in rank order, [T, 2, B, Hkv, D],
        and where they sit: each arrives where it stays.
        """
        own, sources = tokens_first(k, v), self._sources(way)
        whole = own.new_empty((sum(placement.tokens(s) for s in sources), *own.shape[1:]))
        parts = dict(zip(sources, whole.split([placement.tokens(s) for s in sources]), strict=True))
        receives = [(part, peer) for peer, part in parts.items() if peer != self.rank]
        post(self.group, [(own, peer) for peer in self._users(way)], receives, self.traffic).wait()
        if self.rank in parts:
            parts[self.rank].copy_(own)
        return whole, tuple(span for s in sources for span in placement.spans_by_rank[s])

    def _give_back(self, grad: Tensor, placement: Placement, way: Route) -> Tensor:
        """Sends each part of the gradient home, [T, 2, B, Hkv, D]; this rank's own, summed over its users."""
        sources = self._sources(way)
        parts = dict(zip(sources, grad.split([placement.tokens(s) for s in sources]), strict=True))
        shape = (placement.tokens(self.rank), *grad.shape[1:])
        arrivals = [(grad.new_empty(shape), peer) for peer in self._users(way)]
        sends = [(part, peer) for peer, part in parts.items() if peer != self.rank]
        post(self.group, sends, arrivals, self.traffic).wait()
        total = parts[self.rank] if self.rank in parts else grad.new_zeros(shape)
        for part, _ in arrivals:
            total += part
        return total

    def _sources(self, way: Route) -> list[int]:
        return [s for s in range(self.size) if way.needs[self.rank][s]]

    def _users(self, way: Route) -> list[int]:
        return [r for r in range(self.size) if r != self.rank and way.needs[r][self.rank]]
