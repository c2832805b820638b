"""Sparse masks over blocks: strided (S2), anchored (star), shifted and permuted; and a model's, by layer."""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from .fields import UNLIMITED, integers, require, within
from .heads import Composed, Heads, PerHead
from .jit import jit
from .layers import PerLayer
from .mask import And, Bound, Causal, Documents, Frame, Full, Leaf, Mask, Or, Range, Tree, Window


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
        l % max(1, stride // kv_heads) to the offset.
        """
        return self.dense_heads > 0 or not self.unseen(range(kv_heads), kv_heads, layers)

    def unseen(self, heads: Iterable[int], of: int, layers: int) -> int:
        """Of `stride` blocks in a row, how many are seen from afar by none of these heads in no layer."""
        step = self.step(of)
        return self.stride - len(
            {(h * step + layer) % self.stride for h in heads for layer in range(min(step, layers))}
        )


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


def layered(mask: Mask, layers: int, kv_heads: int) -> tuple[Mask, ...]:
    """A mask for each layer, so that the heads of all layers together see the whole context.

    Layer l adds l % max(1, stride // kv_heads) to the offset of each `Strided` in the mask. ValueError if
    blocks are left unseen all the same and no head is dense. Of a `PerLayer` each layer gets its part,
    for which the layers that share it count alone.
    """
    if not any(_dense(mask, h, kv_heads, layers) for h in range(kv_heads)):
        _check_coverage(mask, range(kv_heads), kv_heads, layers)
    return tuple(_at_layer(mask, layer, kv_heads) for layer in range(layers))


def _dense(mask: Mask, h: int, of: int, layers: int) -> bool:
    """Whether kv head h sees all that came before in some layer."""
    match mask:
        case Full() | Causal() | Window(left=None) | Documents(inner=None):
            return True
        case Heads(start, stop):
            return start <= h < stop
        case Strided():
            return mask.stride == 1 or h < mask.dense_heads
        case And(left, right):
            return _dense(left, h, of, layers) and _dense(right, h, of, layers)
        case Or(left, right):
            return _dense(left, h, of, layers) or _dense(right, h, of, layers)
        case Documents(inner=Mask() as inner):
            return _dense(inner, h, of, layers)
        case PerLayer():
            parts = zip((mask.most, mask.rest), mask.layers(layers), strict=True)
            return any(n > 0 and _dense(m, h, of, n) for m, n in parts)
        case PerHead():
            return _dense(mask.masks_of(of)[h], h, of, layers)
    return False


def _check_coverage(mask: Mask, heads: Sequence[int], of: int, layers: int) -> None:
    match mask:
        case Strided():
            unseen = mask.unseen(heads, of, layers)
            if unseen:
                most = min(mask.stride, len(heads) * layers)
                strides = (replace(mask, stride=stride) for stride in range(most, 0, -1))
                fits = next(s.stride for s in strides if not s.unseen(heads, of, layers))
                raise ValueError(
                    f"{mask}: {len(heads)} of {of} kv heads in {layers} layers leave {unseen} of every "
                    f"{mask.stride} blocks unseen; stride={fits} or dense_heads={heads[0] + 1} leave none"
                )
        case And(left, right) | Or(left, right):
            for part in (left, right):
                _check_coverage(part, heads, of, layers)
        case Documents(inner=Mask() as inner):
            _check_coverage(inner, heads, of, layers)
        case Bound(inner, indices, of=whole):
            _check_coverage(inner, sorted({*indices}), whole, layers)
        case PerLayer():
            for part, n in zip((mask.most, mask.rest), mask.layers(layers), strict=True):
                if n:
                    _check_coverage(part, heads, of, n)
        case PerHead():
            masks = mask.masks_of(of)
            for part in dict.fromkeys(masks):
                _check_coverage(part, [h for h in heads if masks[h] == part], of, layers)


def _at_layer(mask: Mask, layer: int, kv_heads: int) -> Mask:
    match mask:
        case Strided():
            return replace(mask, offset=mask.offset + layer % mask.step(kv_heads))
        case And(left, right) | Or(left, right):
            return replace(
                mask, left=_at_layer(left, layer, kv_heads), right=_at_layer(right, layer, kv_heads)
            )
        case Documents(inner=Mask() as inner):
            return replace(mask, inner=_at_layer(inner, layer, kv_heads))
        case Bound(inner, of=whole):
            return replace(mask, mask=_at_layer(inner, layer, whole))
        case PerLayer():
            return _at_layer(*mask.at(layer), kv_heads)
        case PerHead(masks):
            return PerHead(tuple(_at_layer(m, layer, kv_heads) for m in masks))
    return mask
