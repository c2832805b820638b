"""Ulysses: which heads go where, what it sends, what it holds in rounds, and on which axes."""

import time
from collections import Counter
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import product
from typing import NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from cells import Cell, difference, errors, held, inputs, meshed, oracle, ran
from live import Live
from longspan.kernels.mask import Causal, Full, Mask
from longspan.kernels.patterns import Strided
from longspan.parallel.layout import shard
from longspan.parallel.mesh import Mesh
from longspan.parallel.mixed import HeadGroups
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.ulysses import InnerLayout, Share, Ulysses, shares
from world import Worlds


@pytest.mark.parametrize(
    ("heads", "size", "found"),
    [
        # one or two a rank, each with its own kv head
        ((12, 12), 8, [(1, 1), (2, 2), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1), (2, 2)]),
        # a rank's heads may look at two kv heads
        ((12, 6), 8, [(1, 1), (2, 2), (1, 1), (2, 1), (1, 1), (2, 2), (1, 1), (2, 1)]),
        ((5, 5), 2, [(2, 2), (3, 3)]),
        ((5, 1), 2, [(2, 1), (3, 1)]),
        # fewer kv heads than ranks, and fewer heads than ranks
        ((8, 2), 4, [(2, 1)] * 4),
        ((2, 1), 4, [(0, 0), (1, 1), (0, 0), (1, 1)]),
    ],
)
def test_shares_of_heads(heads: tuple[int, int], size: int, found: list[tuple[int, int]]) -> None:
    got = shares(*heads, size)
    assert [(len(s.q), len(s.kv)) for s in got] == found
    assert [h for s in got for h in s.q] == list(range(heads[0]))
    each = heads[0] // heads[1]
    for s in got:
        assert list(s.kv) == sorted({h // each for h in s.q})


def test_heads_of_unequal_groups_take_a_call_for_each_kv_head() -> None:
    even, uneven = Share(range(0, 4), range(0, 2)), Share(range(1, 4), range(0, 2))
    assert even.calls(2) == [(slice(0, 2), slice(0, 4))]
    assert uneven.calls(2) == [(slice(0, 1), slice(0, 1)), (slice(1, 2), slice(1, 3))]
    assert Share(range(0), range(0)).calls(2) == []


UNEVEN = {
    8: [Cell("ulysses", Causal(), heads, 61) for heads in ((12, 12), (12, 6), (12, 2))]
    + [Cell("ulysses2", Causal(), (12, 6), 61), Cell("usp/zigzag", Causal(), (5, 5), 61)],
    2: [Cell(name, Causal(), (5, kv), 61) for name in ("ulysses", "ulysses2") for kv in (5, 1)],
}


@pytest.mark.parametrize("size", UNEVEN)
def test_heads_that_do_not_divide_by_the_ranks(world: Worlds, size: int) -> None:
    for cell, *ranks in zip(UNEVEN[size], *world(size)(ran, UNEVEN[size], size), strict=True):
        assert max(errors(cell, ranks).values()) <= 1e-10, cell


def sent(rank: int, size: int, heads: tuple[int, int], chunks: int) -> list[dict[int, int]]:
    """Bytes to each rank in forward and in backward, at the collective."""
    count: Counter[int] = Counter()
    real = dist.all_to_all_single

    def counting(output: Tensor, input: Tensor, to: list[int], splits: list[int], *, group: object) -> object:
        count.update({r: n * input.element_size() for r, n in enumerate(splits) if r != rank})
        return real(output, input, to, splits, group=group)

    layout = Ulysses(meshed(Mesh(head=size)), chunks=chunks)
    cell = Cell("", Full(), heads, 12 * size, dtype=torch.bfloat16)
    placement, found = layout.place(cell.length, cell.mask), []
    q, k, v, dout = (shard(layout, x, placement, 1).requires_grad_() for x in inputs(cell)[:4])
    with mock.patch.object(dist, "all_to_all_single", counting):
        out, _ = layout.attention(q, k, v, cell.mask, placement)
        found.append(dict(count))
        count.clear()
        out.backward(dout)
        found.append(dict(count))
    return found


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("heads", [(8, 2), (4, 1), (4, 4), (2, 2)])
def test_no_kv_head_goes_where_it_is_not_used(world: Worlds, heads: tuple[int, int], chunks: int) -> None:
    """Bytes between each two of 4 ranks are the fewest: a kv head's tokens go once to each rank that has a
    query head of its, however few kv heads there are.
    """
    size, row = 4, 12 * 8
    rounds = 1 if heads[1] == 1 else chunks
    n, each = heads[1] // rounds, heads[0] // heads[1]
    forward, backward = torch.zeros(size, size, dtype=torch.int64), torch.zeros(size, size, dtype=torch.int64)
    own = shares(n * each, n, size)
    for a, b in product(range(size), repeat=2):
        # in bfloat16 q, k and v to the rank of the heads, and from there out and the float32 lse
        there = row * 2 * (len(own[b].q) + 2 * len(own[b].kv))
        forward[a, b] = rounds * (there + len(own[a].q) * (row * 2 + 12 * 4))
        # dout and delta, and float32 gradients home; q, k, v and lse once more where they were not kept
        back = len(own[b].q) * (row * 2 + 12 * 4) + row * 4 * (len(own[a].q) + 2 * len(own[a].kv))
        backward[a, b] = rounds * (back + (there + len(own[b].q) * 12 * 4) * (rounds > 1))
    for rank, found in enumerate(world(size)(sent, size, heads, chunks)):
        for got, want in zip(found, (forward, backward), strict=True):
            want[rank, rank] = 0
            assert [got.get(r, 0) for r in range(size)] == want[rank].tolist()


def most_held(rank: int, size: int, chunks: int) -> list[int]:
    """The most bytes of tensors of all tokens alive at a time in forward, between, and in backward."""
    layout = Ulysses(meshed(Mesh(head=size)), chunks=chunks)
    cell = Cell("", Causal(), (16, 8), 106, 1, torch.float32, 16)
    placement = layout.place(cell.length, cell.mask)
    q, k, v, dout = (shard(layout, x, placement, 1).requires_grad_() for x in inputs(cell)[:4])

    def traded(x: Tensor) -> bool:
        return x.is_floating_point() and (x.ndim == 1 or cell.length in x.shape)

    with Live(traded) as forward:
        out, _ = layout.attention(q, k, v, cell.mask, placement)
        # gloo's threads let go of what they sent a moment after it has arrived
        dist.barrier()
        time.sleep(0.2)
        kept = sum(size for _, size in forward.alive.values())
    with Live(traded) as backward:
        out.backward(dout)
    return [forward.most[None], kept, backward.most[None]]


def test_rounds_bound_what_is_held(world: Worlds) -> None:
    """By a hook on every operator: whatever spans all tokens, and what arrived, with the kernels' own."""
    once, four = (world(2)(most_held, 2, chunks) for chunks in (1, 4))
    for a, b in zip(once, four, strict=True):
        assert b[1] == 0 < a[1]
        for whole, part in ((a[0], b[0]), (a[2], b[2])):
            assert 0.1 * whole <= part <= 0.4 * whole, (a, b)


class Named(NamedTuple):
    """An inner layout on the axis `far`, and the mask that it goes with."""

    inner: Callable[[DeviceMesh], InnerLayout]
    mask: Mask


FAR = partial(Ring, axis="far", placement="contiguous"), partial(HeadSharded, axis="far", block=4)
INNER = (
    Named(FAR[0], Strided(4, 1, 4) & Causal()),
    Named(FAR[1], Strided(4, 1, 4) & Causal()),
    Named(partial(HeadGroups, first=FAR[0], rest=FAR[1]), Causal()),
)


@lru_cache
def axes(size: int) -> DeviceMesh:
    return init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("far", "near"))


def on_other_axes(rank: int, size: int) -> list[float]:
    """The greatest error of each inner layout, in one round and in two."""
    found = []
    for one, chunks in product(INNER, (1, 2)):
        layout = Ulysses(axes(size), axis="near", inner=one.inner, chunks=chunks)
        cell = Cell("", one.mask, (8, 8), 61)
        got, want = held(layout, cell, layout.place(cell.length, cell.mask)), oracle(cell)
        found.append(max(difference(got[name], want[name]) for name in want))
    return found


def test_axes_may_have_any_names(world: Worlds) -> None:
    """And any layout may be the inner one: what it keeps is made again in rounds."""
    assert max(world(4)(on_other_axes, 4)[0]) <= 1e-10


def misplaced(rank: int, size: int) -> list[str]:
    said = []
    for axis, inner in (("near", partial(Ring, axis="near")), ("far", partial(Ring, axis="near"))):
        with pytest.raises(ValueError) as error:
            Ulysses(axes(size), axis=axis, inner=inner)
        said.append(str(error.value))
    return said


def test_axes_that_do_not_fit_are_named(world: Worlds) -> None:
    for same, swapped in world(4)(misplaced, 4):
        assert "both 'near'" in same
        assert "axis is 'far'" in swapped and "attends over near" in swapped and "far, near" in swapped
