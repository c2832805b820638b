"""Layouts equal one device, leak nothing, and send what the mask needs and no more."""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cells import Cell, build, held, inputs, run_cells
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.patterns import Anchored, Strided
from longspan.kernels.span import Span
from longspan.parallel.layout import shard
from longspan.parallel.mesh import Mesh
from longspan.parallel.placement import Placement, contiguous, named, striped, zigzag
from longspan.parallel.ring import route
from longspan.parallel.single import Single
from world import Worlds

RINGS = ["ring/contiguous", "ring/zigzag", "ring/striped"]
LAYOUTS = [
    *RINGS, "gather/zigzag", "gather1/striped", "ulysses", "ulysses2", "usp/zigzag", "s2/contiguous",
    "s2-4/striped",
]  # fmt: skip
HEADS = [(4, 4), (8, 2), (4, 1), (5, 5)]
LENGTHS = [48, 61, 63]
STARTS = (0, 1, 2, 9, 40)
STARS = [
    Anchored(8, 8, 40) & Causal(),
    Anchored(4, 10, 48) & Causal(),
    Anchored(8, 16, 20) & Causal(),
    Anchored(8, 8, 99),
]


def masks(batch: int) -> list[Mask]:
    plain: list[Mask] = [
        Full(),
        Causal(),
        Window(7, 3),
        Causal() & (Window(5) | First(3)),
        Window(4) & Causal() | First(2),
    ]
    rows = [STARTS, (0, 20, 33, 47, 47)][:batch]
    packed: list[Mask] = [
        Documents(STARTS),
        Documents(tuple(rows), inner=Causal()),
        Documents(STARTS, inner=Causal() & (Window(3) | First(2))),
    ]
    sparse: list[Mask] = [
        Strided(4, 2, 4) & Causal(),
        Strided(4, 1, 2, offset=1),
        Anchored(8, 8, 40) & Causal(),
        Documents(STARTS, inner=Strided(3, 1, 3) & Causal()),
    ]
    return plain + packed + sparse


def cells(size: int) -> list[Cell]:
    """Every mask under every placement; heads, lengths and batches rotate so that each pair of them meets."""
    turns = itertools.cycle(itertools.product(HEADS, LENGTHS, (1, 2)))
    grid: list[Cell] = []
    for layout, i in itertools.product(LAYOUTS, range(len(masks(1)))):
        for _ in range(2 if size == 2 else 1):
            heads, length, batch = next(turns)
            if size < 8 or i % 2 == len(grid) % 2:
                grid.append(Cell(layout, masks(batch)[i], heads, length, batch))
    return grid + [Cell("star", m, heads, 61) for m, heads in zip(STARS, HEADS, strict=True)]


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_layouts_equal_one_device(world: Worlds, size: int) -> None:
    wanted = cells(size)
    for rank, found in enumerate(world(size)(run_cells, wanted, size)):
        bad = [(c, e) for c, e in zip(wanted, found, strict=True) if max(e.values()) > 1e-10]
        assert not bad, f"rank {rank}: {len(bad)} of {len(wanted)} cells, first {bad[0]}"


def test_ring_of_one_equals_one_device(world: Worlds) -> None:
    wanted = [Cell("ring/zigzag", m, (4, 2), 33) for m in masks(1)] + [
        Cell("single", m, (4, 2), 33) for m in masks(1)
    ]
    for cell, error in zip(wanted, world(1)(run_cells, wanted, 1)[0], strict=True):
        assert max(error.values()) <= 1e-10, cell


def test_float32_within_the_promise(world: Worlds) -> None:
    wanted = [
        Cell(layout, m, (8, 2), 61, dtype=torch.float32, head_dim=16) for layout in RINGS for m in masks(1)
    ]
    for found in world(3)(run_cells, wanted, 3):
        for cell, error in zip(wanted, found, strict=True):
            assert max(error["out"], error["lse"]) <= 1e-5, (cell, error)
            assert max(error["dq"], error["dk"], error["dv"]) <= 5e-5, (cell, error)


def bfloat16_errors(rank: int, size: int) -> dict[str, float]:
    cell = Cell("ring/zigzag", Causal(), (8, 2), 256, dtype=torch.bfloat16, head_dim=32)
    return run_cells(rank, [cell], size)[0]


def test_bfloat16_does_not_drift_with_the_ranks(world: Worlds) -> None:
    alone = world(1)(bfloat16_errors, 1)[0]
    for size in (2, 4, 8):
        split = world(size)(bfloat16_errors, size)[0]
        for name, error in split.items():
            # the lse is float32 whatever the inputs are
            most = 1e-6 if name == "lse" else 1.1 * alone[name]
            assert error <= most, f"P={size} {name}: {error:.2e} against {alone[name]:.2e} on one rank"


def leaks(rank: int, size: int) -> list[str]:
    """Changes hidden tokens and compares every bit of what must not see them."""
    wrong = []
    hidden = slice(40, 48)  # the last document: nothing before it may see it
    mask = Documents((0, 11, 40), inner=Causal())
    cell = Cell("", mask, (4, 2), 48, dtype=torch.float32)
    for name in RINGS:
        layout = build(name, size)
        placement = layout.place(cell.length, mask)
        before = held(layout, cell, placement)
        q, k, v, dout, dlse = inputs(cell)
        for value in (1e4, -3e3):
            changed = [q.clone(), k.clone(), v.clone()]
            for x in changed:
                x[:, hidden] = value
            after = _run(layout, changed, dout, dlse, mask, placement)
            seen = {n: (before[n][:, :40], after[n][:, :40]) for n in ("out", "dq", "dk", "dv")}
            wrong += [f"{name} {value} {n}" for n, (a, b) in seen.items() if not torch.equal(a, b)]
    return wrong


def _run(
    layout: Any,
    qkv: list[torch.Tensor],
    dout: torch.Tensor,
    dlse: torch.Tensor,
    mask: Mask,
    placement: Placement,
) -> dict[str, torch.Tensor]:
    from longspan.parallel.layout import unshard

    q, k, v = (shard(layout, x, placement, 1).requires_grad_() for x in qkv)
    out, lse = layout.attention(q, k, v, mask, placement)
    torch.autograd.backward(
        [out, lse], [shard(layout, dout, placement, 1), shard(layout, dlse, placement, 2)]
    )
    parts = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    return {n: unshard(layout, x, placement, 1) for n, x in parts.items()}


def test_nothing_leaks_between_documents(world: Worlds) -> None:
    assert world(3)(leaks, 3) == [[], [], []]


def counted(rank: int, size: int, mask: Mask, length: int, placement: str) -> dict[str, Any]:
    """Bytes that really went through the collectives, against the layout's own counter."""
    sent: dict[int, int] = {}
    real = dist.batch_isend_irecv

    def counting(operations: list[dist.P2POp]) -> Any:
        for op in operations:
            if op.op is dist.isend:
                sent[op.group_peer] = (
                    sent.get(op.group_peer, 0) + op.tensor.numel() * op.tensor.element_size()
                )
        return real(operations)

    dist.batch_isend_irecv = counting  # type: ignore[assignment]
    try:
        layout = build(f"ring/{placement}", size)
        cell = Cell("", mask, (4, 2), length, dtype=torch.float32)
        held(layout, cell, layout.place(length, mask))
    finally:
        dist.batch_isend_irecv = real
    return {"sent": sent, "own": dict(layout.traffic.sent)}


def test_a_shard_goes_no_further_than_its_last_user(world: Worlds) -> None:
    shard_bytes = 2 * 12 * 2 * 8 * 4  # k and v, 12 tokens, 2 heads of 8, float32
    for mask, hops in (
        (Causal(), [3, 2, 1, 0]),
        (Window(5), [1, 1, 1, 0]),
        (Full(), [3, 3, 3, 3]),
        (Documents((0, 12, 24, 36)), [0, 0, 0, 0]),
    ):
        found = world(4)(counted, 4, mask, 48, "contiguous")
        assert route(mask, contiguous(48, 4), 2).reach == tuple(hops), mask
        assert [f["sent"] for f in found] == [f["own"] for f in found], mask
        # forward and backward carry the keys; each travelling gradient makes as many hops as its keys did
        assert sum(sum(f["sent"].values()) for f in found) == 3 * shard_bytes * sum(hops), mask


def test_placements_hold_every_token_once() -> None:
    for name, length, size in itertools.product(
        ("contiguous", "zigzag", "striped"), (0, 1, 5, 48, 61), (1, 2, 3, 8)
    ):
        placement = named(name)(length, size)
        at = [p for spans in placement.spans_by_rank for s in spans for p in s.positions().tolist()]
        assert sorted(at) == list(range(length)), (name, length, size)


def test_zigzag_balances_causal_work() -> None:
    assert zigzag(4096, 8).imbalance(Causal(), 1) <= 1.01
    assert striped(4096, 8).imbalance(Causal(), 1) <= 1.01
    assert contiguous(4096, 8).imbalance(Causal(), 1) > 1.8


@pytest.mark.parametrize(
    ("mesh", "world_size", "said"),
    [
        (Mesh(dp=1, ring=3), 4, "start 3"),
        (Mesh(ring=3), 4, "multiple of 3"),
        (Mesh(ring=8), 4, "multiple of 8"),
    ],
)
def test_a_world_that_does_not_fit_says_what_would(mesh: Mesh, world_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mesh.degrees(world_size)


def test_auto_takes_what_is_left() -> None:
    assert Mesh(ring="auto").degrees(6) == {"dp": 1, "ring": 6, "head": 1, "tp": 1}
    assert Mesh(ring=2).degrees(6) == {"dp": 3, "ring": 2, "head": 1, "tp": 1}
    assert Mesh(ring="auto", head="auto").degrees(16, node=4) == {"dp": 1, "ring": 4, "head": 4, "tp": 1}


def test_bad_input_is_refused() -> None:
    with pytest.raises(
        ValueError, match="parallel.layout.placement is 'zigzga'; it can be contiguous, zigzag"
    ):
        named("zigzga")
    with pytest.raises(ValueError, match="parallel.mesh.ring is 0"):
        Mesh(ring=0)
    with pytest.raises(ValueError, match="hold 3 tokens, but the sequence has 4"):
        Placement(4, ((Span(0, 3),),))
    with pytest.raises(ValueError, match="has 5 tokens, but the placement is for 4"):
        shard(Single(), torch.zeros(1, 5), contiguous(4, 1), 1)
