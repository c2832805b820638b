"""Which blocks of keys each block of queries looks at, chosen at run time: what a learned selector gives."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .cells import held
from .fields import integers
from .mask import Mask
from .span import Spans
from .tile import Tiles, chosen, classify


@dataclass(frozen=True, eq=False)
class Selection:
    """A query sees a key if the mask says so and its block of keys is chosen for its block of queries.

    chosen: bool [1 or batch, 1 or kv heads, blocks of queries, blocks of keys], on the device of q. size:
    tokens in a block of queries and of keys, as they are held; the last blocks may be short. No gradient
    leads to `chosen`: a selector learns from a loss of its own (SeerAttention, Gao et al. 2024, section 3).
    """

    chosen: Tensor
    size: tuple[int, int]

    def __post_init__(self) -> None:
        if len(integers(self, "size", 1)) != 2:
            raise ValueError(f"Selection.size is {self.size}; it must be two, of queries and of keys")
        if self.chosen.ndim != 4 or self.chosen.dtype != torch.bool:
            raise ValueError(
                f"Selection.chosen is {self.chosen.dtype} {tuple(self.chosen.shape)}; it must be bool [1 or "
                "batch, 1 or kv heads, blocks of queries, blocks of keys]"
            )

    def check(self, q: Tensor, k: Tensor) -> None:
        """Raise ValueError unless it is for q [B, Nq, Hq, D] and k [B, Nk, Hkv, D]."""
        batch, heads, *blocks = self.chosen.shape
        need = [-(-x.shape[1] // n) for x, n in zip((q, k), self.size, strict=True)]
        if batch not in (1, q.shape[0]) or heads not in (1, k.shape[2]) or blocks != need:
            raise ValueError(
                f"Selection.chosen is {tuple(self.chosen.shape)}; of {q.shape[0]} rows, {k.shape[2]} kv "
                f"heads, {q.shape[1]} queries and {k.shape[1]} keys in blocks of {self.size} it must be "
                f"[1 or {q.shape[0]}, 1 or {k.shape[2]}, {need[0]}, {need[1]}]"
            )
        if self.chosen.device != q.device:
            raise ValueError(f"Selection.chosen is on {self.chosen.device}, but q on {q.device}")

    def in_blocks(self, size: tuple[int, int], queries: int, keys: int) -> Tensor:
        """The same in blocks that divide its own: bool [1 or batch, 1 or kv heads, rows, columns]."""
        found = self.chosen
        for dim, own, new, tokens in zip((2, 3), self.size, size, (queries, keys), strict=True):
            found = found.repeat_interleave(own // new, dim).narrow(dim, 0, -(-tokens // new))
        return found


def picked(index: Tensor, blocks: int) -> Tensor:
    """`Selection.chosen` from the numbers of the chosen blocks of keys: integers [batch, heads, blocks of
    queries, any], of `blocks`. A number below 0 or from `blocks` on chooses none: selectors that choose fewer
    fill up with -1.
    """
    if index.ndim != 4 or index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise ValueError(
            f"index is {index.dtype} {tuple(index.shape)}; it must be integers [batch, heads, blocks, any]"
        )
    if blocks < 1:
        raise ValueError(f"blocks is {blocks}; it must be at least 1")
    found = torch.zeros(*index.shape[:3], blocks + 1, dtype=torch.bool, device=index.device)
    place = index.long().masked_fill((index < 0) | (index >= blocks), blocks)
    return found.scatter_(3, place, True)[..., :blocks]


def tiles(
    selection: Selection, mask: Mask, at: tuple[Spans, Spans], kv_heads: int, *, size: tuple[int, int],
    transpose: bool,
) -> Tiles:  # fmt: skip
    """Lists as `tile.tiles` gives them, of the chosen blocks alone; `size` divides the selection's. Made anew
    each time: on the selection's device, without waiting for its values except to count them.
    """
    device = selection.chosen.device
    q, k = (held(spans, n, device) for spans, n in zip(at, size, strict=True))
    some, every = classify(mask, q, k, kv_heads)
    tokens = tuple(sum(s.length for s in spans) for spans in at)
    own = selection.in_blocks(size, *tokens)
    some, every = some & own, every & own
    if transpose:
        some, every = some.mT, every.mT
    return chosen(some, every, tokens=tokens[not transpose], size=size[not transpose])
