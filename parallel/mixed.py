"""Mixtures of layouts: another one in every n-th layer of a model, or for some of the kv heads."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.mask import Mask, Unsupported
from ..kernels.options import AttentionOptions
from .comm import Traffic
from .halves import DEFAULT, Joined, Saved, Triple
from .joint import Joint
from .layout import Layout
from .placement import Placement
from .ulysses import InnerLayout


class _Mixture:
    """Layouts over the same ranks, whose placements must agree."""

    def __init__(self, parts: Sequence[Layout]) -> None:
        self._parts, first = parts, parts[0]
        held = [_ranks(part) for part in parts]
        if any(ranks != held[0] for ranks in held):
            sizes = " and ".join(str(part.size) for part in parts)
            raise Unsupported(
                f"parallel.layout mixes {self._names()}, which split a sequence over different ranks "
                f"({sizes} of them): give them the same axis"
            )
        self.group, self.rank, self.size = first.group, first.rank, first.size
        self.traffic = Traffic()
        for part in parts:
            part.traffic.whole, part.traffic.ranks = self.traffic, range(self.size)

    def place(self, length: int, mask: Mask) -> Placement:
        """Where all parts place the tokens. Unsupported if they do not agree."""
        places = [part.place(length, mask) for part in self._parts]
        if any(place != places[0] for place in places):
            raise Unsupported(
                f"parallel.layout mixes {self._names()}, which place {length} tokens differently, but tokens "
                f"stay where they are from layer to layer: give them one placement, such as contiguous"
            )
        return places[0]

    def _names(self) -> str:
        return " and ".join(type(part).__name__ for part in self._parts)


def _ranks(layout: Layout) -> list[int]:
    """The processes that hold one sequence, in the order of the placement."""
    return [dist.get_rank()] if layout.group is None else dist.get_process_group_ranks(layout.group)


class Layers(_Mixture):
    """`rest` in every `every`-th layer of a model, first in layer every - 1, and `most` in the others.

    It goes with the mask `PerLayer`, which counts alike, and is right with any mask.
    """

    def __init__(
        self, mesh: DeviceMesh, *, most: Callable[[DeviceMesh], Layout], rest: Callable[[DeviceMesh], Layout],
        every: int = 4,
    ) -> None:  # fmt: skip
        if every < 1:
            raise ValueError(f"parallel.layout.every is {every}; it must be at least 1")
        self.every, self.most, self.rest = every, most(mesh), rest(mesh)
        super().__init__((self.most, self.rest))

    def turns(self) -> tuple[Layout, ...]:
        """The layouts of the first `every` layers; then they come again."""
        return (*[self.most] * (self.every - 1), self.rest)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, *,
        options: AttentionOptions = DEFAULT, joint: Joint | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Unsupported: which layout it is depends on the layer, see `turns`."""
        raise Unsupported(
            f"parallel.layout.every is {self.every}, but what attends does not say which layer it is; "
            f"take one layout for all, such as parallel=s2 or parallel=ring"
        )


class _Group(NamedTuple):
    """Some kv heads, their query heads, the layout that they go through, and the mask bound to them."""

    layout: InnerLayout
    kv: slice
    q: slice
    mask: Mask

    def of(self, q: Tensor, k: Tensor, v: Tensor) -> Triple:
        return q[:, :, self.q], k[:, :, self.kv], v[:, :, self.kv]


class HeadGroups(_Mixture, Joined):
    """The first `kv_heads` kv heads through one layout, the others through another."""

    def __init__(
        self, mesh: DeviceMesh, *, first: Callable[[DeviceMesh], InnerLayout],
        rest: Callable[[DeviceMesh], InnerLayout], kv_heads: int = 1,
    ) -> None:  # fmt: skip
        if kv_heads < 1:
            raise ValueError(f"parallel.layout.kv_heads is {kv_heads}; it must be at least 1")
        self.kv_heads, self.first, self.others = kv_heads, first(mesh), rest(mesh)
        super().__init__((self.first, self.others))

    def refuse(self, mask: Mask, placement: Placement, kv_heads: int) -> None:
        """See `Halves.refuse`: what either group's layout does not take, or one without a kv head."""
        for layout, kv in self._kv(kv_heads):
            layout.refuse(mask.heads(kv, kv_heads), placement, len(kv))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        groups = list(self._groups(q.shape[2], k.shape[2], mask))
        return _together(k, [g.layout.forward(*g.of(q, k, v), g.mask, placement, options) for g in groups])

    def partial(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        groups = list(self._groups(q.shape[2], k.shape[2], mask))
        return _together(k, [g.layout.partial(*g.of(q, k, v), g.mask, placement, options) for g in groups])

    def again(
        self, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, mask: Mask, placement: Placement
    ) -> Saved:
        first, rest = (
            g.layout.again(*g.of(q, k, v), None if lse is None else lse[:, g.q], g.mask, placement)
            for g in self._groups(q.shape[2], k.shape[2], mask)
        )
        return _marked(k, first, rest)

    def backward(
        self, dout: Tensor, delta: Tensor | None, saved: Saved, mask: Mask, placement: Placement,
        options: AttentionOptions,
    ) -> Triple:  # fmt: skip
        like, *rest = saved
        assert like is not None
        count, kv_heads, grads = like.shape[0], like.shape[1], []
        kept = tuple(rest[:count]), tuple(rest[count:])
        for g, own in zip(self._groups(dout.shape[2], kv_heads, mask), kept, strict=True):
            rows = None if delta is None else delta[:, g.q]
            grads.append(g.layout.backward(dout[:, :, g.q], rows, own, g.mask, placement, options))
        dq, dk, dv = (torch.cat(parts, 2) for parts in zip(*grads, strict=True))
        return dq, dk, dv

    def _kv(self, kv_heads: int) -> tuple[tuple[InnerLayout, range], tuple[InnerLayout, range]]:
        """Each layout and its kv heads."""
        if self.kv_heads >= kv_heads:
            raise ValueError(
                f"parallel.layout.kv_heads is {self.kv_heads}, but there are {kv_heads} kv heads; "
                f"it must be from 1 to {kv_heads - 1}, so that both layouts have some"
            )
        return (self.first, range(self.kv_heads)), (self.others, range(self.kv_heads, kv_heads))

    def _groups(self, q_heads: int, kv_heads: int, mask: Mask) -> Iterator[_Group]:
        each = q_heads // kv_heads
        for layout, kv in self._kv(kv_heads):
            q = slice(kv.start * each, kv.stop * each)
            yield _Group(layout, slice(kv.start, kv.stop), q, mask.heads(kv, kv_heads))


def _together(
    k: Tensor, parts: Sequence[tuple[Tensor, Tensor | None, Saved]]
) -> tuple[Tensor, Tensor | None, Saved]:
    """The heads of both groups."""
    outs, lses, saved = zip(*parts, strict=True)
    lse = None if lses[0] is None else torch.cat(lses, 1)
    return torch.cat(outs, 2), lse, _marked(k, *saved)


def _marked(k: Tensor, first: Saved, rest: Saved) -> Saved:
    """What both groups keep, after a tensor whose shape says how many the first one keeps, and how many kv
    heads there are.
    """
    return k.new_empty(len(first), k.shape[2], 0), *first, *rest
