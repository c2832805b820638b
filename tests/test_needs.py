"""What ranks need of each other, held against the mask written out as a matrix."""

from itertools import product
from random import Random

import pytest
import torch
from torch import Tensor

import masks
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.patterns import Anchored, Strided
from longspan.kernels.span import Span, total
from longspan.parallel.needs import blocks_met, foreign_keys, meets, needed_bytes, tiled
from longspan.parallel.placement import Placement, contiguous, named, striped
from longspan.parallel.s2 import Needs, needs

CPU = torch.device("cpu")
LENGTH = 180
ROWS = (0, 5, 70, 71, 120), (0, 60, 60, 130, 180)
EACH: list[Mask] = [
    Full(),
    Causal(),
    Window(20, 3),
    Causal() & (Window(10) | First(4)),
    Documents(ROWS, inner=Causal()),
    Strided(8, 1, 4) & Causal(),
    Anchored(16, 16, 150) & Causal(),
    Neighborhood((5, 6, 6), (2, 3, 3)),
    (Strided(10, 1, 5) & Causal()).heads([2, 0, 2], 5),
]


def dense(mask: Mask, kv_heads: int) -> Tensor:
    """bool [mask rows, kv heads or 1, LENGTH, LENGTH]."""
    at = (Span(0, LENGTH),)
    found = visible(lower(mask, at, at, kv_heads, CPU)).expand(mask.batch(), kv_heads, LENGTH, LENGTH)
    return found if mask.per_head else found[:, :1]


def held(placement: Placement, rank: int) -> list[int]:
    return masks.listed(placement.spans_by_rank[rank])


@pytest.mark.parametrize("mask", EACH, ids=str)
def test_needs_hold_against_the_matrix(mask: Mask) -> None:
    seen = dense(mask, 3)
    for name, size in product(("contiguous", "zigzag", "striped", "balanced"), (2, 4)):
        placement = named(name)(LENGTH, size, mask)
        spans = placement.spans_by_rank
        met = meets(mask, spans, spans, 3, tile=8)
        blocks = blocks_met(mask, tiled(spans, 8), tiled(spans, 8), 3)
        for r in range(size):
            others = [p for s in range(size) if s != r for p in held(placement, s)]
            wanted = seen[:, :, held(placement, r)].any(2)
            each = wanted[..., others].sum() * (3 // wanted.shape[1]) * (2 // wanted.shape[0])
            assert foreign_keys(mask, placement, r, 3, batch=2) == each, (name, size, r)
            surely = [bool(wanted[..., held(placement, s)].any()) for s in range(size)]
            assert (met[r] | ~torch.tensor(surely)).all(), (name, size, r)
            first = 0
            for s in range(size):
                for tile in torch.tensor(held(placement, s)).split(8):
                    assert (blocks[r, :, first] | ~wanted[..., tile].any(2).any(0)).all()
                    first += 1


def test_who_needs_nothing_is_known() -> None:
    """Where tiles do not reach over the border of what is seen, nobody is said to need more."""
    spans = contiguous(96, 4).spans_by_rank
    assert meets(Causal(), spans, spans, 1, tile=8).int().tolist() == torch.ones(4, 4).tril().int().tolist()
    assert meets(Documents((0, 24, 48, 72)), spans, spans, 1).int().tolist() == torch.eye(4).int().tolist()
    ends = [(Span(0, 24), Span(72, 24)), ()]
    assert meets(Window(5), ends, spans, 1).tolist() == [[True, False, True, True], [False] * 4]
    assert meets(Window(5), [()], [()], 1).tolist() == [[False]]


def test_bytes_that_are_needed() -> None:
    placement = contiguous(64, 4)
    found = needed_bytes(Window(5), placement, 2, kv_heads=3, head_dim=16, dtype=torch.bfloat16, batch=2)
    keys = 5 * 3 * 2
    assert found.forward == keys * 16 * 2 * 2
    assert found.backward == found.forward + keys * 16 * 2 * 4
    assert needed_bytes(Full(), contiguous(9, 1), 0, kv_heads=1, head_dim=4, dtype=torch.float32) == (0, 0)


def test_both_ends_of_an_exchange_agree() -> None:
    draw = Random(0)
    for _ in range(25):
        mask, size = masks.random_mask(draw, LENGTH, batch=2), draw.choice((2, 3, 5))
        placement = named(draw.choice(("contiguous", "zigzag", "striped", "balanced")))(LENGTH, size, mask)
        plans = [needs(mask, placement, 2, r, 16, CPU) for r in range(size)]
        for g, (a, b) in product(range(len(plans[0].heads)), product(range(size), repeat=2)):
            assert plans[a].wants[g][b] == plans[b].gives[g][a], mask
        for r, plan in enumerate(plans):
            for g, at in enumerate(plan.at):
                came = torch.cat(
                    [torch.tensor(held(placement, s))[_given(plans[s], g, r)] for s in range(size)]
                )
                assert came.tolist() == masks.listed(at), (mask, r)
                assert total(at) == sum(plan.wants[g])


def _given(plan: Needs, group: int, user: int) -> Tensor:
    """Which of its tokens the rank whose plan this is gives to `user`."""
    return plan.given[group].split(plan.gives[group])[user]


def test_striped_tokens_are_judged_by_what_they_are() -> None:
    """Bounds of striped tiles reach over everything; the positions themselves tell that planes are apart."""
    grid, placement = Neighborhood((4, 4, 8), (1, 4, 8)), striped(128, 2)
    plan = needs(grid, placement, 1, 0, 16, CPU)
    assert plan.wants == ((64, 64),)
    far = meets(grid, [(Span(0, 32),)], [(Span(32, 32),), (Span(0, 16, 1, 2),)], 1)
    assert far.tolist() == [[False, True]]
