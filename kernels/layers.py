"""Masks that differ from layer to layer, and whether a model's layers together see the whole context."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from math import gcd, lcm
from operator import or_
from typing import NamedTuple

from .fields import at_least_one, require
from .heads import Composed, Heads, PerHead
from .mask import And, Bound, Causal, Documents, Full, Mask, Or, Window
from .ordered import BrickByBrick
from .patterns import Strided

# blocks after which strides repeat, beyond which they are not compared
PERIOD = 2**22
# a set of blocks, a bit each: here all of them
ALL = -1
# grids and bricks that a mask stands in, the outermost first; none: tokens one by one
Order = tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class Blocks(NamedTuple):
    """Among which blocks to look: those of one order of the tokens.

    Attributes:
        order: Of the tokens.
        unit: Tokens in each block.
        period: Tokens after which masks repeat; 0 to ask only for ALL or nothing.
    """

    order: Order
    unit: int = 0
    period: int = 0


@dataclass(frozen=True)
class PerLayer(Composed):
    """`rest` in every `every`-th layer of a model, first in layer every - 1, and `most` in the others.

    `layered` gives each layer its own. Until then it stands for all layers together: what either sees.
    """

    most: Mask
    rest: Mask
    every: int = 4

    def __post_init__(self) -> None:
        require(self, 1, "every")
        for name in ("most", "rest"):
            if not isinstance(value := getattr(self, name), Mask) or isinstance(value, Bound):
                raise ValueError(f"PerLayer.{name} is {value}; it must be a mask that is not bound to heads")

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return self.most.shift_invariant and self.rest.shift_invariant

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return self.most.per_head or self.rest.per_head

    def batch(self) -> int:
        return max(self.most.batch(), self.rest.batch())

    def parts(self, of: int) -> Mask:
        return self.most | self.rest

    def layers(self, layers: int) -> tuple[int, int]:
        """How many of the first `layers` layers take `most`, and how many `rest`."""
        return layers - layers // self.every, layers // self.every

    def at(self, layer: int) -> tuple[Mask, int]:
        """The mask of a layer, and its number among the layers that take the same."""
        before = self.layers(layer)
        return (self.rest, before[1]) if (layer + 1) % self.every == 0 else (self.most, before[0])


def layered(mask: Mask | Sequence[Mask], layers: int, kv_heads: int) -> tuple[Mask, ...]:
    """A mask for each layer: of one for all, or these, one a layer, as they are.

    Of one for all, layer l adds l % max(1, stride // kv_heads) to the offset of each `Strided`, and takes its
    part of a `PerLayer`. ValueError if the heads of all layers together leave blocks that a `Strided`
    chooses among unseen, and if there are not so many masks.
    """
    at_least_one(layers=layers, kv_heads=kv_heads)
    if isinstance(mask, Mask):
        masks = _at_layers(mask, layers, kv_heads)
    else:
        masks = tuple(mask) if isinstance(mask, Iterable) else (mask,)
        bad = [m for m in masks if not isinstance(m, Mask)]
        if len(masks) != layers or bad:
            found = f"{bad[0]!r} among the masks" if bad else f"{len(masks)} masks"
            raise ValueError(f"{found} for {layers} layers: give one, or one a layer")
    _check_coverage(masks, kv_heads, mask)
    return masks


def _at_layers(mask: Mask, layers: int, kv_heads: int) -> tuple[Mask, ...]:
    return tuple(_at_layer(mask, layer, kv_heads) for layer in range(layers))


def _at_layer(mask: Mask, layer: int, kv_heads: int) -> Mask:
    if isinstance(mask, PerLayer):
        return _at_layer(*mask.at(layer), kv_heads)
    if isinstance(mask, Strided):
        return replace(mask, offset=mask.offset + layer % mask.step(kv_heads))
    return _mapped(mask, kv_heads, lambda part, of: _at_layer(part, layer, of))


def _mapped(mask: Mask, of: int, change: Callable[[Mask, int], Mask]) -> Mask:
    """The mask with each of its parts changed, given the number of kv heads that it is asked for."""
    match mask:
        case And(left, right) | Or(left, right):
            return replace(mask, left=change(left, of), right=change(right, of))
        case Documents(inner=Mask() as inner):
            return replace(mask, inner=change(inner, of))
        case BrickByBrick(inner):
            return replace(mask, inner=change(inner, of))
        case Bound(inner, of=whole):
            return replace(mask, mask=change(inner, whole))
        case PerLayer(most, rest):
            return replace(mask, most=change(most, of), rest=change(rest, of))
        case PerHead(masks):
            return PerHead(tuple(change(m, of) for m in masks))
    return mask


def _strided(masks: Iterable[Mask]) -> list[tuple[Order, Strided]]:
    """All that are in the masks, and in which order of the tokens."""
    found: list[tuple[Order, Strided]] = []

    def look(mask: Mask, order: Order) -> Mask:
        if isinstance(mask, Strided):
            found.append((order, mask))
        inside = (*order, mask.order()) if isinstance(mask, BrickByBrick) else order
        return _mapped(mask, 1, lambda part, _: look(part, inside))

    for mask in masks:
        look(mask, ())
    return found


def _with_stride(mask: Mask, stride: int) -> Mask:
    if isinstance(mask, Strided):
        return replace(mask, stride=min(mask.stride, stride), offset=mask.offset % min(mask.stride, stride))
    return _mapped(mask, 1, lambda part, _: _with_stride(part, stride))


def _check_coverage(masks: tuple[Mask, ...], kv_heads: int, given: Mask | Sequence[Mask]) -> None:
    """ValueError if the layers leave blocks unseen, naming a stride that does not where one was given."""
    unseen, blocks, heads, layers = _unseen(masks, kv_heads)
    if not unseen:
        return
    cure = "a smaller stride, other offsets or dense_heads=1"
    if isinstance(given, Mask):
        tried = range(min(max(s.stride for _, s in _strided(masks)) - 1, 1024), 0, -1)
        smaller = ((x, _at_layers(_with_stride(given, x), len(masks), kv_heads)) for x in tried)
        fits = next((x for x, each in smaller if not _unseen(each, kv_heads)[0]), 1)
        cure = f"stride={fits} or dense_heads=1"
    raise ValueError(
        f"{masks[0] if not isinstance(given, Mask) else given}: {heads} of {kv_heads} kv heads in {layers} "
        f"layers leave {unseen} of every {blocks} blocks unseen; {cure} leaves none"
    )


def _unseen(masks: tuple[Mask, ...], kv_heads: int) -> tuple[int, int, int, int]:
    """How many blocks no head of any layer sees, of how many; heads and layers that look afar.

    Blocks of several orders of the tokens cannot be compared: the first order that leaves some unseen.
    """
    orders = dict.fromkeys(order for order, _ in _strided(dict.fromkeys(masks)))
    each = (_unseen_in(order, masks, kv_heads) for order in orders)
    return next((found for found in each if found[0]), (0, 0, 0, 0))


def _unseen_in(order: Order, masks: tuple[Mask, ...], kv_heads: int) -> tuple[int, int, int, int]:
    different = dict.fromkeys(masks)
    asked = list(product(different, range(kv_heads)))
    if ALL in (_far(m, h, kv_heads, Blocks(order)) for m, h in asked):
        return 0, 0, 0, 0
    strided = [s for there, s in _strided(different) if there == order]
    unit, period = gcd(*(s.block for s in strided)), lcm(*(s.block * s.stride for s in strided))
    blocks = period // unit
    if blocks > PERIOD:
        raise ValueError(
            f"{strided[0]}: the strides of the layers repeat after {period} tokens, too many to compare; "
            "choose blocks and strides of which one is a multiple of the other"
        )
    sets = {(m, h): _far(m, h, kv_heads, Blocks(order, unit, period)) for m, h in asked}
    seen = reduce(or_, (some or 0 for some in sets.values())) & ((1 << blocks) - 1)
    heads = {h for (_, h), some in sets.items() if some is not None}
    layers = sum(any(sets[m, h] is not None for h in heads) for m in masks)
    return blocks - seen.bit_count(), blocks, len(heads), layers


def _far(mask: Mask, head: int, of: int, asked: Blocks, here: Order = ()) -> int | None:
    """Which of the blocks that are asked for the kv head sees from afar, a bit each. None of what is near or
    about positions: it claims no share. here: the order of the tokens that the mask stands in.
    """
    match mask:
        case Full() | Causal() | Window(left=None) | Documents(inner=None):
            return ALL
        case Heads(start, stop):
            return ALL if start <= head < stop else 0
        case Strided():
            return _blocks(mask, head, of, asked, here)
        case And(left, right) | Or(left, right):
            a, b = (_far(m, head, of, asked, here) for m in (left, right))
            if isinstance(mask, And) and None in (a, b) and ALL in (a, b):
                return None
            if a is None or b is None:
                return b if a is None else a
            return a & b if isinstance(mask, And) else a | b
        case Documents(inner=Mask() as inner):
            return _far(inner, head, of, asked, here)
        case BrickByBrick(inner):
            return _far(inner, head, of, asked, (*here, mask.order()))
        case Bound(inner, indices, whole):
            if head >= len(indices):
                raise ValueError(f"the mask is bound to {len(indices)} kv heads, but the layers have {of}")
            return _far(inner, indices[head], whole, asked, here)
        case PerLayer():
            return _far(mask.parts(of), head, of, asked, here)
        case PerHead():
            return _far(mask.masks_of(of)[head], head, of, asked, here)
    return None


def _blocks(mask: Strided, head: int, of: int, asked: Blocks, here: Order) -> int:
    if mask.stride == 1 or head < mask.dense_heads:
        return ALL
    if here != asked.order or not asked.period:
        return 0
    (_, unit, period), wide = asked, mask.block * mask.stride
    first = -(head * mask.step(of) + mask.offset) % mask.stride * mask.block // unit
    once = (1 << mask.block // unit) - 1 << first
    # the pattern once, and again after each `wide` tokens of the period
    return once * (((1 << period // unit) - 1) // ((1 << wide // unit) - 1))
