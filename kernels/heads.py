"""Masks that are said by other masks: the same for some kv heads only, and one for each."""

from abc import abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import and_, or_
from typing import Any, ClassVar

from torch import Tensor

from .fields import require
from .jit import jit
from .mask import Bound, Frame, Leaf, Mask, Range, Tree


class Composed(Mask):
    """A mask that is said by other masks: its parts depend on the global number of kv heads at most."""

    @abstractmethod
    def parts(self, of: int) -> Mask:
        """The same mask for `of` global kv heads, in simpler ones."""

    def kind(self, head: int, of: int) -> Hashable:
        return self.parts(of).kind(head, of)

    def lower(self, frame: Frame) -> Tree:
        return self.parts(frame.of).lower(frame)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        return self.parts(of).classify(q, k, head, of)


@jit
def heads_predicate(q, k, h, start, stop):  # type: ignore[no-untyped-def]
    return (h >= start) & (h < stop)


@dataclass(frozen=True)
class Heads(Leaf):
    """start <= h < stop: every key for these kv heads, none for the others."""

    start: int
    stop: int
    predicate: ClassVar[Any] = heads_predicate
    shift_invariant: ClassVar[bool] = True
    per_head: ClassVar[bool] = True  # type: ignore[misc]

    def __post_init__(self) -> None:
        require(self, 0, "start", "stop")

    def kind(self, head: int, of: int) -> Hashable:
        return self.start <= head < self.stop

    def parameters(self, of: int) -> tuple[int, ...]:
        return self.start, self.stop

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        yes = (head >= self.start) & (head < self.stop)
        return yes, yes


@dataclass(frozen=True)
class PerHead(Composed):
    """The mask masks[h] for kv head h: as many masks as there are global kv heads.

    Mixtures of dense and streaming heads (DuoAttention, Xiao et al. 2024; MoA, Fu et al. 2024).
    """

    masks: tuple[Mask, ...]

    def __post_init__(self) -> None:
        given: Any = self.masks
        masks = tuple(given) if isinstance(given, Iterable) else ()
        if not masks or any(not isinstance(m, Mask) or isinstance(m, Bound) for m in masks):
            raise ValueError(
                f"PerHead.masks is {given}; it must hold a mask for each kv head, none bound to heads"
            )
        object.__setattr__(self, "masks", masks)

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return all(m.shift_invariant for m in self.masks)

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return len(set(self.masks)) > 1 or self.masks[0].per_head

    def batch(self) -> int:
        return max(m.batch() for m in self.masks)

    def kind(self, head: int, of: int) -> Hashable:
        own = self.masks_of(of)[head]
        return self.masks.index(own), own.kind(head, of)

    def masks_of(self, of: int) -> tuple[Mask, ...]:
        """The masks of `of` kv heads; ValueError if there are more or fewer."""
        if of != len(self.masks):
            raise ValueError(f"PerHead.masks has {len(self.masks)} masks for {of} kv heads; give {of}")
        return self.masks

    def parts(self, of: int) -> Mask:
        masks = self.masks_of(of)
        found = list(dict.fromkeys(masks))
        if len(found) == 1:
            return found[0]
        heads = ([h for h, m in enumerate(masks) if m == mask] for mask in found)
        return either(either(_runs(own)) & mask for own, mask in zip(heads, found, strict=True))


def either(masks: Iterable[Mask]) -> Mask:
    """Visible under any of the masks."""
    return reduce(or_, masks)


def both(masks: Iterable[Mask]) -> Mask:
    """Visible under all of the masks."""
    return reduce(and_, masks)


def _runs(heads: Sequence[int]) -> Iterable[Mask]:
    """`Heads` for each run of neighbours among these sorted heads."""
    starts = [h for h in heads if h - 1 not in heads]
    stops = [h + 1 for h in heads if h + 1 not in heads]
    return (Heads(a, b) for a, b in zip(starts, stops, strict=True))
