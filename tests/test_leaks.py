"""Nothing leaks: what must not see a token does not change by one bit, whatever is in it."""

from dataclasses import replace
from functools import lru_cache
from itertools import cycle, product

import pytest
import torch
from torch import Tensor

import patterns
from cells import Cell, build, inputs, local
from longspan.kernels.mask import Documents
from longspan.kernels.span import Span
from longspan.parallel.layout import Layout, positions
from matrix import FAMILIES, pack
from world import Worlds

LENGTH = 61
HEADS = (4, 2)
LAYOUTS = (
    "ring/zigzag", "ring2/contiguous", "gather/striped", "gather1/zigzag", "ulysses", "ulysses2",
    "usp/zigzag", "s2/contiguous", "s2-4/contiguous",
)  # fmt: skip
MASKS = ("causal", "sinks", "s2", "per_head", "neighborhood")
# an early token, one at a border of shards, one of the last document
CHANGED = (3, 31, 50)
VALUES = (1e4, -3e3)
LONG, PADDING = 336, 168  # tokens of a sequence, and where its padding begins: at a border of shards or tiles


@lru_cache
def unmoved(cell: Cell, at: int) -> tuple[Tensor, Tensor]:
    """Rows of the queries, and of the keys, that a change of all of token `at` cannot reach: bool [batch,
    tokens, heads]; by the meaning of the mask in plain Python.
    """
    whole = (Span(0, cell.length),)
    seen = patterns.truth(cell.mask, whole, whole, cell.heads[1]).expand(cell.batch, -1, -1, -1)
    moved = seen[..., at].clone()
    moved[..., at] = True
    # a key moves with the gradient of each query that sees it
    keys = (seen & moved[..., None]).any(2)
    keys[..., at] = True
    queries = moved.repeat_interleave(cell.heads[0] // cell.heads[1], 1)
    return ~queries.transpose(1, 2), ~keys.transpose(1, 2)


def cells(name: str) -> list[Cell]:
    if name == "star":
        return [Cell(name, FAMILIES[m](2), HEADS, LENGTH, dtype=torch.float32) for m in ("star", "star_wide")]
    return [
        Cell(name, pack(FAMILIES[m](2), packing, LENGTH), HEADS, LENGTH, 2, torch.float32)
        for m, packing in zip(MASKS, cycle(("one", "by row")))
    ]


def filled(cell: Cell, tokens: slice, value: float) -> list[Tensor]:
    """The inputs, with all of some tokens replaced."""
    given = inputs(cell)
    for x in given:
        x.movedim(2 if x.ndim == 3 else 1, 0)[tokens] = value
    return given


def felt(layout: Layout, cell: Cell, given: list[Tensor], still: tuple[Tensor, Tensor]) -> list[str]:
    """Which results change when `given` takes the place of the inputs, among the queries and keys of `still`,
    bool [batch, tokens, heads] over the whole sequence.
    """
    placement = layout.place(cell.length, cell.mask)
    before, after = local(layout, cell, placement), local(layout, cell, placement, given)
    here = positions(layout, placement)
    found = []
    for kind in before:
        rows = still[kind in ("dk", "dv")][:, here]
        a, b = (x.transpose(1, 2) if kind == "lse" else x for x in (before[kind], after[kind]))
        if not torch.equal(a[rows], b[rows]):
            found.append(f"{kind}: {cell.layout} {cell.mask}")
    return found


def leaks(rank: int, size: int, names: tuple[str, ...]) -> list[str]:
    """Every place where a hidden token was felt."""
    wrong = []
    for name in names:
        layout = build(name, size)
        for i, cell in enumerate(cells(name)):
            at, value = CHANGED[i % len(CHANGED)], VALUES[i % len(VALUES)]
            # the same for all layouts, and dear
            still = unmoved(replace(cell, layout=""), at)
            wrong += felt(layout, cell, filled(cell, slice(at, at + 1), value), still)
    return wrong


@pytest.mark.parametrize(
    ("size", "names"),
    [(2, ("ulysses", "usp/zigzag", "star")), (3, (*LAYOUTS, "star")), (4, ("usp/striped",))],
)
def test_hidden_tokens_are_not_felt(world: Worlds, size: int, names: tuple[str, ...]) -> None:
    assert world(size)(leaks, size, names) == [[]] * size


def poisoned(rank: int, size: int, names: tuple[str, ...]) -> list[str]:
    """Every place where the NaN in a last document, which is padding, was felt."""
    wrong = []
    own = torch.arange(LONG)[None, :, None] < PADDING
    still = own.expand(2, -1, HEADS[0]), own.expand(2, -1, HEADS[1])
    for name, mask in product(names, ("causal", "sinks", "s2", "per_head")):
        packed = Documents((0, 1, PADDING), FAMILIES[mask](2))
        cell = Cell(name, packed, HEADS, LONG, 2, torch.float32)
        wrong += felt(build(name, size), cell, filled(cell, slice(PADDING, None), float("nan")), still)
    return wrong


def test_nan_in_padding_arrives_nowhere(world: Worlds) -> None:
    """Kernels work on tiles, where 0 times NaN is NaN: what is meant is padding that shares no tile."""
    assert world(3)(poisoned, 3, LAYOUTS) == [[]] * 3
