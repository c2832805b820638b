"""Mixtures, by layer and by head: still what one device gives, on one placement, and what each part sends."""

from functools import partial
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from cells import Cell, Errors, difference, held, meshed, oracle
from longspan.kernels.heads import PerHead
from longspan.kernels.layers import PerLayer, layered
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Unsupported, Window
from longspan.kernels.patterns import Strided
from longspan.kernels.span import Span
from longspan.models.gpt import GPT
from longspan.parallel.gather import Gather
from longspan.parallel.layout import Layout, positions, shard, unshard
from longspan.parallel.mesh import Mesh
from longspan.parallel.mixed import HeadGroups, Layers
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.single import Single
from longspan.parallel.star import Star
from longspan.parallel.ulysses import Ulysses
from longspan.train.batch import bind
from world import Worlds

RING, S2 = partial(Ring, placement="contiguous"), partial(HeadSharded, block=8)
ON_HEADS = partial(Ring, axis="head", placement="contiguous")
STRIPES = [partial(part, placement="striped") for part in (Gather, HeadSharded)]
MIXED = PerLayer(Strided(8, 1, 4), Full(), 2) & Causal()
SPARSE = Documents((0, 9, 28), inner=(Window(5) | First(2)) & Causal())


def mixtures(size: int) -> list[tuple[HeadGroups, Mask, tuple[int, int]]]:
    """(layout, mask, heads), the first heads with a ring, a gather or Ulysses."""
    ring, heads = meshed(Mesh(ring=size)), meshed(Mesh(head=size))
    masks: list[Mask] = [Causal(), SPARSE, Strided(4, 1, 4) & Causal()]
    dense_first = PerHead((Causal(), *[(Window(5) | First(2)) & Causal()] * 4))
    return [
        *((HeadGroups(ring, first=RING, rest=S2), mask, (8, 2)) for mask in masks),
        (HeadGroups(ring, first=RING, rest=S2, kv_heads=2), dense_first, (5, 5)),
        (HeadGroups(ring, first=STRIPES[0], rest=STRIPES[1], kv_heads=3), masks[2], (4, 4)),
        (HeadGroups(heads, first=Ulysses, rest=ON_HEADS), masks[1], (6, 3)),
        (HeadGroups(heads, first=ON_HEADS, rest=partial(Ulysses, chunks=2), kv_heads=2), Causal(), (5, 5)),
    ]


def head_groups(rank: int, size: int) -> list[tuple[Errors, bool]]:
    """The errors of each mixture, and whether it counted what its parts sent."""
    found = []
    for layout, mask, heads in mixtures(size):
        cell = Cell("", mask, heads, 61)
        got, want = held(layout, cell, layout.place(61, mask)), oracle(cell)
        parts = [part.traffic for part in (layout.first, layout.others)]
        counted = sum(layout.traffic.sent.values()) == sum(sum(t.sent.values()) for t in parts) > 0
        found.append(({name: difference(got[name], want[name]) for name in want}, counted))
    return found


@pytest.mark.parametrize("size", [2, 3])
def test_head_groups_equal_one_device(world: Worlds, size: int) -> None:
    ranks = world(size)(head_groups, size)
    for errors, _ in ranks[0]:
        assert max(errors.values()) <= 1e-10, errors
    # a rank may send nothing where another one does
    assert all(any(found[i][1] for found in ranks) for i in range(len(ranks[0])))


def model(mask: Mask) -> GPT:
    torch.manual_seed(0)
    return GPT(11, 16, 4, 4, 24, kv_heads=2, mask=mask).double()


def trained(rank: int, size: int) -> tuple[Errors, dict[str, int], dict[str, int]]:
    """Errors of hidden states and gradients of a model whose layers differ; calls and messages of each
    layout.
    """
    ring: DeviceMesh = meshed(Mesh(ring=size))
    calls: dict[str, int] = {}
    layout = Layers(ring, most=S2, rest=RING, every=2)
    for part in (layout.most, layout.rest):
        counted(part, calls)
    tokens = torch.arange(61)[None] * 7 % 11
    weights = torch.randn(1, 61, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = []
    for one in (Single(), layout):
        gpt, placement = model(MIXED), one.place(61, Documents((0, 25, 33), inner=MIXED))
        local, at = shard(one, tokens, placement, 1), positions(one, placement)
        hidden = gpt(local, at, bind(one, placement), offsets=(0, 25, 33))
        (hidden * shard(one, weights, placement, 1)).sum().backward()
        whole = {"hidden": unshard(one, hidden.detach(), placement, 1)}
        found.append(whole | {name: summed(one, p.grad) for name, p in gpt.named_parameters()})
    errors = {name: difference(found[1][name], found[0][name]) for name in found[0]}
    return errors, calls, {type(x).__name__: x.traffic.messages for x in (layout, layout.most, layout.rest)}


def counted(layout: Layout, calls: dict[str, int]) -> None:
    real, name = layout.attention, type(layout).__name__

    def attention(*args: Any, **settings: Any) -> Any:
        calls[name] = calls.get(name, 0) + 1
        return real(*args, **settings)

    layout.attention = attention  # type: ignore[method-assign]


def summed(layout: Layout, x: torch.Tensor | None) -> torch.Tensor:
    """A parameter's gradient over the ranks of a sequence."""
    assert x is not None
    if layout.group is not None:
        torch.distributed.all_reduce(x, group=layout.group)
    return x


@pytest.mark.parametrize("size", [2, 3])
def test_layers_that_differ_train_as_on_one_device(world: Worlds, size: int) -> None:
    for errors, calls, messages in world(size)(trained, size):
        assert max(errors.values()) <= 1e-10, errors
        assert calls == {"HeadSharded": 2, "Ring": 2}
        assert messages["Layers"] == messages["HeadSharded"] + messages["Ring"] > 0


def test_layouts_take_turns_as_masks_do(world: Worlds) -> None:
    turns = world(1)(turns_of)[0]
    assert turns == ["HeadSharded", "HeadSharded", "Ring"]
    masks = layered(PerLayer(Window(3), Full(), 3), 8, 2)
    assert [turns[i % 3] == "Ring" for i in range(8)] == [m == Full() for m in masks]


def turns_of(rank: int) -> list[str]:
    return [type(x).__name__ for x in Layers(meshed(Mesh()), most=S2, rest=RING, every=3).turns()]


def refusals(rank: int) -> list[str]:
    """What is said of mixtures that cannot be, before anything is sent."""
    ring, both, said = meshed(Mesh(ring=4)), meshed(Mesh(ring=2, head=2)), []
    star = partial(Layers, ring, most=Star, rest=RING)
    zigzag = HeadGroups(ring, first=Ring, rest=S2, kv_heads=2)
    q = torch.zeros(1, 2, 2, 8)
    for attempt in (
        lambda: Layers(ring, most=S2, rest=Ring).place(61, Causal()),
        lambda: zigzag.place(61, Causal()),
        lambda: star().place(61, Causal()),
        lambda: Layers(both, most=S2, rest=partial(Ring, axis="head")),
        lambda: HeadGroups(both, first=Ring, rest=partial(Ulysses, inner=RING)),
        lambda: Layers(ring, most=S2, rest=RING, every=0),
        lambda: HeadGroups(ring, first=RING, rest=S2, kv_heads=0),
        lambda: zigzag.attention(q, q, q, Causal(), Ring(ring, placement="contiguous").place(8, Causal())),
        lambda: Layers(ring, most=S2, rest=RING).attention(q, q, q, Causal(), S2(ring).place(8, Causal())),
    ):
        try:
            attempt()
        except ValueError as error:
            said.append(f"{'Unsupported: ' * isinstance(error, Unsupported)}{error}")
    return said


def test_mixtures_that_cannot_be_are_refused_on_all_ranks_alike(world: Worlds) -> None:
    said = world(4)(refusals)
    assert said[0] == said[1] == said[2] == said[3]
    starts = [
        "Unsupported: parallel.layout mixes HeadSharded and Ring, which place 61 tokens differently",
        "Unsupported: parallel.layout mixes Ring and HeadSharded, which place 61 tokens differently",
        "Unsupported: parallel=star serves masks that hold one Anchored",
        "Unsupported: parallel.layout mixes HeadSharded and Ring, which split a sequence over different",
        "Unsupported: parallel.layout mixes Ring and Ulysses, which split a sequence over different",
        "parallel.layout.every is 0; it must be at least 1",
        "parallel.layout.kv_heads is 0; it must be at least 1",
        "parallel.layout.kv_heads is 2, but there are 2 kv heads; it must be from 1 to 1",
        "Unsupported: parallel.layout.every is 4, but what attends does not say which layer it is",
    ]
    assert len(said[0]) == len(starts)
    assert [text[: len(start)] for text, start in zip(said[0], starts, strict=True)] == starts


def test_each_layer_has_its_mask_wherever_it_stands() -> None:
    mask = Documents((0, 9), PerLayer(Strided(4, 1, 6), PerHead((Full(), Window(3))), 3) & Causal())
    most = [Documents((0, 9), Strided(4, 1, 6, offset=i) & Causal()) for i in (0, 1, 2, 0)]
    rest = Documents((0, 9), PerHead((Full(), Window(3))) & Causal())
    assert layered(mask, 6, 2) == (most[0], most[1], rest, most[2], most[3], rest)
    both = PerLayer(Window(3), First(2), 2)
    at = (Span(0, 20),)
    seen = [visible(lower(m, at, at, 1, torch.device("cpu"))) for m in (both, Window(3) | First(2))]
    assert seen[0].equal(seen[1])
    assert not both.shift_invariant and not both.per_head and PerLayer(MIXED, Full(), 2).per_head


def test_layers_that_leave_blocks_unseen_are_refused() -> None:
    # with `rest` in the third of four layers the others have three of the four offsets that they need
    sparse = PerLayer(Strided(4, 1, 8), Window(3), 4)
    with pytest.raises(ValueError, match="2 of 2 kv heads in 3 layers leave 2 of every 8 blocks unseen"):
        layered(sparse, 4, 2)
    assert len(layered(PerLayer(Strided(4, 1, 8), Full(), 4), 4, 2)) == 4
    # no layer is the fourth of two
    with pytest.raises(ValueError, match="2 of 2 kv heads in 2 layers leave 4 of every 8 blocks unseen"):
        layered(PerLayer(Strided(4, 1, 8), Full(), 4), 2, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "PerLayer.every is 0; it must be an integer from 1"),
        ({"rest": Causal().heads([0], 1)}, "PerLayer.rest is Bound.*; it must be a mask that is not bound"),
        ({"most": 3}, "PerLayer.most is 3; it must be a mask"),
    ],
)
def test_masks_by_layer_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerLayer(**({"most": Window(3), "rest": Full()} | settings))
