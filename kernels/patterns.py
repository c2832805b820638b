"""Sparse masks over blocks: strided (S2), anchored (star), shifted and permuted."""

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .fields import UNLIMITED, at_least_one, integers, require, within
from .heads import Composed, PerHead
from .jit import jit
from .mask import Frame, Leaf, Mask, Range, Tree


@jit
def tail_predicate(q, k, h, start):  # type: ignore[no-untyped-def]
    return q >= start


@dataclass(frozen=True)
class Tail(Leaf):
    """q >= start: the queries from `start` on see every key. Within `Documents`, of each document."""

    start: int
    predicate: ClassVar[Any] = tail_predicate

    def __post_init__(self) -> None:
        require(self, 0, "start")

    def parameters(self, of: int) -> tuple[int, ...]:
        return (self.start,)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        return q.high >= self.start, q.low >= self.start


@jit
def strided_predicate(q, k, h, block, local, stride, step, offset, dense):  # type: ignore[no-untyped-def]
    near = (q // block - k // block < local) & (k // block - q // block < local)
    return near | ((k // block + h * step + offset) % stride == 0) | (h < dense)


@dataclass(frozen=True)
class Strided(Leaf):
    """The blocks nearby, and each `stride`-th block, others for each head (S2-Attention, Lin et al. 2024).

    With qb = q // block, kb = k // block: |qb - kb| < local, or (kb + h * max(1, stride // H) + offset) %
    stride == 0, for kv head h of H; the first `dense_heads` kv heads see every key. Fewer heads than `stride`
    see the whole context between them only over several layers of different `offset`: see `layered`.
    block=1, local=0 is Hepos (Huang et al. 2021).
    """

    block: int
    local: int
    stride: int
    dense_heads: int = 0
    offset: int = 0
    predicate: ClassVar[Any] = strided_predicate

    def __post_init__(self) -> None:
        require(self, 1, "block")
        require(self, 0, "local", "dense_heads", "offset")
        # a block and two shifts below the stride are added in int32
        require(self, 1, "stride", high=UNLIMITED // 2)

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return self.stride > 1

    def step(self, of: int) -> int:
        """Blocks between what a kv head and the next one see."""
        return max(1, self.stride // of)

    def kind(self, head: int, of: int) -> Hashable:
        return -1 if head < self.dense_heads else (head * self.step(of) + self.offset) % self.stride

    def parameters(self, of: int) -> tuple[int, ...]:
        offset = self.offset % self.stride
        return self.block, self.local, self.stride, self.step(of), offset, self.dense_heads

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        block, local, stride, step, offset, dense = self.parameters(of)
        q_low, q_high, k_low, k_high = (x // block for x in (q.low, q.high, k.low, k.high))
        near = (q_low - k_high < local) & (k_low - q_high < local)
        only_near = (q_high - k_low < local) & (k_high - q_low < local)
        shift = head * step + offset
        some = (k_high + shift) // stride * stride >= k_low + shift
        every = (some & (k_low == k_high)) | (head < dense) | (stride == 1)
        # without local blocks `near` is still true of tiles that overlap
        return (near & (local > 0)) | (some | (head < dense)), only_near | every

    def coverage(self, kv_heads: int, layers: int) -> bool:
        """Whether each query sees the whole context in some head of some layer, where layer l adds
        l % max(1, stride // kv_heads) to the offset. ValueError without heads or layers.
        """
        at_least_one(kv_heads=kv_heads, layers=layers)
        step = self.step(kv_heads)
        seen = {h * step + layer for h in range(kv_heads) for layer in range(min(step, layers))}
        return self.dense_heads > 0 or len({shift % self.stride for shift in seen}) == self.stride


def same_block(q: tuple[Tensor, Tensor], k: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """(some, every) of 'in the same block', from the first and last block in each tile."""
    return (q[0] <= k[1]) & (k[0] <= q[1]), (q[0] == k[1]) & (k[0] == q[1])


@jit
def anchored_predicate(q, k, h, block, anchor, context):  # type: ignore[no-untyped-def]
    return (q // block == k // block) | (k < anchor) | (q >= context)


@dataclass(frozen=True)
class Anchored(Leaf):
    """Its own block and the first `anchor` tokens; from `context` on every key (Star Attention, Acharya et
    al. 2024). Used with `Causal`.
    """

    block: int
    anchor: int
    context: int
    predicate: ClassVar[Any] = anchored_predicate

    def __post_init__(self) -> None:
        require(self, 1, "block")
        require(self, 0, "anchor", "context")

    def parameters(self, of: int) -> tuple[int, ...]:
        return self.block, self.anchor, self.context

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        some, every = same_block(*((x.low // self.block, x.high // self.block) for x in (q, k)))
        some = some | (k.low < self.anchor) | (q.high >= self.context)
        return some, every | (k.high < self.anchor) | (q.low >= self.context)


@jit
def chunks_predicate(q, k, h, chunk, shift):  # type: ignore[no-untyped-def]
    return (q + shift) // chunk == (k + shift) // chunk


@dataclass(frozen=True)
class Chunks(Leaf):
    """q and k in the same chunk; the first chunk is `shift` tokens short."""

    chunk: int
    shift: int = 0
    predicate: ClassVar[Any] = chunks_predicate

    def __post_init__(self) -> None:
        require(self, 1, "chunk")
        require(self, 0, "shift")

    def parameters(self, of: int) -> tuple[int, ...]:
        return self.chunk, self.shift

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        chunk, shift = self.chunk, self.shift
        return same_block(*(((x.low + shift) // chunk, (x.high + shift) // chunk) for x in (q, k)))


@dataclass(frozen=True)
class Shifted(Composed):
    """(q + s) // chunk == (k + s) // chunk, with s = shifts[h * len(shifts) // H] for kv head h of H.

    shifts (0, chunk // 2) is LongLoRA (Chen et al. 2024), more of them SCCA (Guo 2023). Here the first and
    the last chunk are short, where theirs are rolled into one that shows early tokens the late ones.
    """

    chunk: int
    shifts: tuple[int, ...]

    def __post_init__(self) -> None:
        require(self, 1, "chunk")
        integers(self, "shifts", 0)

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return len(set(self.shifts)) > 1

    def parts(self, of: int) -> Mask:
        groups = len(self.shifts)
        if of < groups:
            raise ValueError(f"Shifted.shifts has {groups} shifts for {of} kv heads; give at most {of}")
        return PerHead(tuple(Chunks(self.chunk, self.shifts[h * groups // of]) for h in range(of)))


@jit
def permutation_predicate(q, k, h, block, blocks):  # type: ignore[no-untyped-def]
    return k // block == (q // block + h) % blocks


@dataclass(frozen=True)
class BlockPermutation(Leaf):
    """k // block == (q // block + h) % blocks: each kv head sees another block (BlockBERT, Qiu et al. 2020).

    Positions are below block * blocks; others are a ValueError.
    """

    block: int
    blocks: int
    predicate: ClassVar[Any] = permutation_predicate

    def __post_init__(self) -> None:
        require(self, 1, "block", "blocks")

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return self.blocks > 1

    def kind(self, head: int, of: int) -> Hashable:
        return head % self.blocks

    def parameters(self, of: int) -> tuple[int, ...]:
        return self.block, self.blocks

    def lower(self, frame: Frame) -> Tree:
        within(self, self.block * self.blocks, frame.q, frame.k)
        return super().lower(frame)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        # no token need be at a greatest position, which may be a bound only
        within(self, self.block * self.blocks, q.low, k.low)
        q_low, q_high, k_low, k_high = (x // self.block for x in (q.low, q.high, k.low, k.high))
        first = (q_low + head) % self.blocks
        last = first + q_high - q_low
        some = ((first <= k_high) & (k_low <= last)) | (k_low + self.blocks <= last)
        return some, (first == k_high) & (k_low == last)
