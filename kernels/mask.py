"""Which keys a query may see: frozen values over global positions and kv heads, combined with `&` and `|`.

A mask is said three times, each for another reader, and the tests hold the three together: its *predicate*
(one `jit` function made of operators only, which the reference evaluates on torch tensors and the
kernels inline), its *parameters* (run-time numbers, so that no kernel is recompiled when one changes) and its
*classification* of a tile from the bounds of the positions in it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .fields import UNLIMITED, integer, require, starts
from .jit import jit

# ("leaf", jit, first number, numbers) | ("and" | "or", Tree, Tree) | ("documents" | "moved", table, Tree)
Tree = tuple[Any, ...]


class Unsupported(ValueError):
    """A valid request that this setting cannot serve; the message names the nearest one that can."""


class Range(NamedTuple):
    """Least and greatest position in each tile, both inclusive: int64, broadcastable over [batch, head, q
    tile, k tile].

    Where the positions themselves are at hand, they are `at`, int64 [1 or batch, tiles, tile], and `tile`
    says which of these tiles each bound is of: int64, broadcastable over [head, q tile, k tile]. `known`
    keeps what was worked out about `at`.
    """

    low: Tensor
    high: Tensor
    at: Tensor | None = None
    tile: Tensor | None = None
    known: dict[Any, Any] | None = None

    def of(self, coordinate: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Least and greatest value of a function of the positions, which must be at hand."""
        assert self.at is not None
        known = {} if self.known is None else self.known
        if coordinate not in known:
            known[coordinate] = coordinate(self.at).aminmax(dim=-1)
        low, high = known[coordinate]
        return low[:, self.tile], high[:, self.tile]


@dataclass
class Frame:
    """What lowering a mask collects: positions of the held tokens, int64 [1 or batch, tokens], and finds."""

    q: Tensor
    k: Tensor
    of: int
    numbers: list[int] = field(default_factory=list)
    tables: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Mask(ABC):
    """Base of all masks. Predicates see global positions q, k and the global kv head h of `of` kv heads."""

    # whether only k - q matters: then a document's inner mask needs no restart
    shift_invariant: ClassVar[bool] = False
    per_head: bool = False

    def __and__(self, other: "Mask") -> "Mask":
        return _compose(And, self, other)

    def __or__(self, other: "Mask") -> "Mask":
        return _compose(Or, self, other)

    def heads(self, kv_indices: Sequence[int], of: int) -> "Mask":
        """For a tensor whose kv head i is the global kv head `kv_indices[i]` of `of`; repeats allowed."""
        return Bound(self, kv_indices, of)  # type: ignore[arg-type]

    def batch(self) -> int:
        """Rows that the mask tells apart: 1 if it is the same for every row of a batch."""
        return 1

    def kind(self, head: int, of: int) -> Hashable:
        """Global kv heads of one kind see the same, and share their lists of tiles."""
        return head if self.per_head else None

    @abstractmethod
    def lower(self, frame: Frame) -> Tree:
        """The predicate tree; appends parameters and per-token tables to `frame`."""

    @abstractmethod
    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        """(some, every), bool: not `some` is surely empty, `every` surely full. head: int64 [1, H, 1, 1]."""


@dataclass(frozen=True)
class Leaf(Mask):
    predicate: ClassVar[Any]

    def parameters(self, of: int) -> tuple[int, ...]:
        return ()

    def lower(self, frame: Frame) -> Tree:
        numbers = self.parameters(frame.of)
        frame.numbers.extend(numbers)
        return ("leaf", type(self).predicate, len(frame.numbers) - len(numbers), len(numbers))


@jit
def full_predicate(q, k, h):  # type: ignore[no-untyped-def]
    return (k <= q) | (k > q)


@dataclass(frozen=True)
class Full(Leaf):
    """Every key."""

    predicate: ClassVar[Any] = full_predicate
    shift_invariant: ClassVar[bool] = True

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        yes = (q.low <= q.high) & (k.low <= k.high)
        return yes, yes


@jit
def causal_predicate(q, k, h):  # type: ignore[no-untyped-def]
    return k <= q


@dataclass(frozen=True)
class Causal(Leaf):
    """k <= q."""

    predicate: ClassVar[Any] = causal_predicate
    shift_invariant: ClassVar[bool] = True

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        return k.low <= q.high, k.high <= q.low


@jit
def window_predicate(q, k, h, left, right):  # type: ignore[no-untyped-def]
    return (k >= q - left) & (k <= q + right)


@dataclass(frozen=True)
class Window(Leaf):
    """q - left <= k <= q + right; None is unlimited on that side."""

    left: int | None
    right: int | None = 0
    predicate: ClassVar[Any] = window_predicate
    shift_invariant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                require(self, 0, name, also="None or ")

    def parameters(self, of: int) -> tuple[int, ...]:
        return tuple(UNLIMITED if x is None else x for x in (self.left, self.right))

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        left, right = self.parameters(of)
        some = (k.high >= q.low - left) & (k.low <= q.high + right)
        every = (k.low >= q.high - left) & (k.high <= q.low + right)
        return some, every


@jit
def first_predicate(q, k, h, n):  # type: ignore[no-untyped-def]
    return k < n


@dataclass(frozen=True)
class First(Leaf):
    """k < n: attention sinks, prefixes. Within `Documents`, the first n of each document."""

    n: int
    predicate: ClassVar[Any] = first_predicate

    def __post_init__(self) -> None:
        require(self, 0, "n", high=UNLIMITED)

    def parameters(self, of: int) -> tuple[int, ...]:
        return (self.n,)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        anything = q.low <= q.high
        return (k.low < self.n) & anything, (k.high < self.n) & anything


Offsets = tuple[int, ...] | tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Documents(Mask):
    """q and k in the same document, and `inner` (None: no more condition) holds at their positions *within*
    it.

    offsets: the sorted starts of the documents, the first 0; `[n]` for all rows of the batch or `[batch, n]`
    padded at the end with the length. A tensor or nested lists are taken too and kept as tuples.
    """

    offsets: Offsets
    inner: Mask | None = None

    def __post_init__(self) -> None:
        # of a tensor or array at once: its elements one by one are slow
        raw: Any = self.offsets.tolist() if hasattr(self.offsets, "tolist") else self.offsets
        nested = isinstance(next(iter(raw), None) if isinstance(raw, Iterable) else None, Iterable)
        rows = [starts(self, "offsets", row) for row in (raw if nested else [raw])]
        if len({len(row) for row in rows}) > 1:
            raise ValueError("Documents.offsets has rows of different lengths; pad them with the length")
        if not isinstance(self.inner, Mask | None):
            raise ValueError(f"Documents.inner is {self.inner!r}; it must be a mask or None")
        if isinstance(self.inner, Bound):
            raise ValueError(
                "Documents.inner is bound to heads; bind the whole mask instead: Documents(...).heads(...)"
            )
        object.__setattr__(self, "offsets", tuple(rows) if nested else rows[0])

    def __repr__(self) -> str:
        rows = self.rows()
        return f"Documents({sum(len(set(r)) for r in rows)} in {len(rows)} row(s), inner={self.inner})"

    def rows(self) -> tuple[tuple[int, ...], ...]:
        return self.offsets if isinstance(self.offsets[0], tuple) else (self.offsets,)

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return False

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return self.inner is not None and self.inner.per_head

    def batch(self) -> int:
        own = len(self.rows()) if isinstance(self.offsets[0], tuple) else 1
        return max(own, self.inner.batch() if self.inner else 1)

    def kind(self, head: int, of: int) -> Hashable:
        return None if self.inner is None else self.inner.kind(head, of)

    def starts(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Start and number of the document at each position, int64 [1 or batch, ...], of each row."""
        offsets = torch.tensor(self.rows(), device=at.device)
        rows = max(offsets.shape[0], at.shape[0])
        offsets, at = offsets.expand(rows, -1).contiguous(), at.expand(rows, *at.shape[1:])
        which = torch.searchsorted(offsets, at.flatten(1).contiguous(), right=True) - 1
        return offsets.gather(1, which).view(at.shape), which.view(at.shape)

    def lower(self, frame: Frame) -> Tree:
        q, k = self.starts(frame.q)[0], self.starts(frame.k)[0]
        table = len(frame.tables)
        frame.tables.append((q, k))
        inner = self.inner or Full()
        outer_q, outer_k = frame.q, frame.k
        frame.q, frame.k = outer_q - q, outer_k - k
        tree = inner.lower(frame)
        frame.q, frame.k = outer_q, outer_k
        return ("documents", table, tree)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        (q0, a), (_, b) = self.starts(q.low), self.starts(q.high)
        (k0, c), (_, d) = self.starts(k.low), self.starts(k.high)
        some = (a <= d) & (c <= b)
        every = (a == b) & (c == d) & (a == c)
        if self.inner is None:
            return some, every
        if not self.inner.shift_invariant:
            # a tile that spans documents holds positions from 0, and none beyond the greatest before a cut
            q = self._within(q, Range(torch.where(a == b, q.low - q0, 0), q.high - q0))
            k = self._within(k, Range(torch.where(c == d, k.low - k0, 0), k.high - k0))
        inner_some, inner_every = self.inner.classify(q, k, head, of)
        return some & inner_some, every & inner_every

    def _within(self, x: Range, bounds: Range) -> Range:
        """Positions within the document: exact if they are at hand, else `bounds`."""
        if x.at is None:
            return bounds
        known = {} if x.known is None else x.known
        if self not in known:
            known[self] = x.at - self.starts(x.at)[0], {}
        moved = Range(x.low, x.high, known[self][0], x.tile, known[self][1])
        low, high = moved.of(torch.Tensor.clone)
        return moved._replace(low=low, high=high)


@dataclass(frozen=True)
class _Pair(Mask):
    left: Mask
    right: Mask
    word: ClassVar[str]

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return self.left.shift_invariant and self.right.shift_invariant

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return self.left.per_head or self.right.per_head

    def batch(self) -> int:
        return max(self.left.batch(), self.right.batch())

    def kind(self, head: int, of: int) -> Hashable:
        return self.left.kind(head, of), self.right.kind(head, of)

    def lower(self, frame: Frame) -> Tree:
        return (self.word, self.left.lower(frame), self.right.lower(frame))


@dataclass(frozen=True)
class And(_Pair):
    """Visible under both masks."""

    word: ClassVar[str] = "and"

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        a, b = self.left.classify(q, k, head, of), self.right.classify(q, k, head, of)
        return a[0] & b[0], a[1] & b[1]


@dataclass(frozen=True)
class Or(_Pair):
    """Visible under either mask."""

    word: ClassVar[str] = "or"

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        a, b = self.left.classify(q, k, head, of), self.right.classify(q, k, head, of)
        return a[0] | b[0], a[1] | b[1]


@dataclass(frozen=True)
class Bound(Mask):
    """A mask whose local kv head i is the global kv head `kv_indices[i]` of `of`."""

    mask: Mask
    kv_indices: tuple[int, ...]
    of: int

    def __post_init__(self) -> None:
        require(self, 1, "of")
        indices: Any = self.kv_indices
        found = [(i, integer(i)) for i in (indices if isinstance(indices, Iterable) else [repr(indices)])]
        bad = [i for i, x in found if x is None or not 0 <= x < self.of]
        if bad:
            raise ValueError(f"mask.heads: kv indices {bad} are not heads of {self.of}, 0 to {self.of - 1}")
        object.__setattr__(self, "kv_indices", tuple(x for _, x in found))

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return self.mask.shift_invariant

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return self.mask.per_head

    def heads(self, kv_indices: Sequence[int], of: int) -> "Bound":
        if of != len(self.kv_indices):
            raise ValueError(
                f"mask.heads: of is {of}, but the mask is bound to {len(self.kv_indices)} kv heads"
            )
        local = Bound(self.mask, tuple(kv_indices), of).kv_indices
        return Bound(self.mask, tuple(self.kv_indices[i] for i in local), self.of)

    def batch(self) -> int:
        return self.mask.batch()

    def lower(self, frame: Frame) -> Tree:
        return self.mask.lower(frame)

    def classify(self, q: Range, k: Range, head: Tensor, of: int) -> tuple[Tensor, Tensor]:
        return self.mask.classify(q, k, head, of)


def _compose(kind: type[And] | type[Or], a: Mask, b: Mask) -> Mask:
    if not isinstance(b, Mask):
        raise ValueError(f"{a} can be combined with a mask only, not with {b!r}")
    binding = {(m.kv_indices, m.of) for m in (a, b) if isinstance(m, Bound)}
    if len(binding) > 1:
        raise ValueError(
            "masks bound to different heads cannot be combined; combine them first, then call heads()"
        )
    bare = kind(*(m.mask if isinstance(m, Bound) else m for m in (a, b)))
    return Bound(bare, *binding.pop()) if binding else bare


def bound_heads(mask: Mask, kv_heads: int) -> tuple[tuple[int, ...], int]:
    """Global kv heads of a tensor's `kv_heads` local ones, and the global number."""
    if not isinstance(mask, Bound):
        return tuple(range(kv_heads)), kv_heads
    if len(mask.kv_indices) != kv_heads:
        raise ValueError(f"the mask is bound to {len(mask.kv_indices)} kv heads, but k has {kv_heads}")
    return mask.kv_indices, mask.of
