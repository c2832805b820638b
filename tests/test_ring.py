"""The ring: both ways round, what its gradients travel in, what it holds, and when it posts what."""

import itertools
from collections import Counter
from functools import partial
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses import FakeTensorMode

from cells import Cell, Errors, build, difference, held, inputs, local, meshed, oracle
from live import Live
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.patterns import Anchored, Strided
from longspan.parallel import comm, ring
from longspan.parallel.gather import Gather
from longspan.parallel.mesh import Mesh
from longspan.parallel.placement import contiguous
from longspan.parallel.ring import Ring, Wire, route
from longspan.parallel.ulysses import Ulysses
from world import Worlds

PLACEMENTS = ("contiguous", "zigzag", "striped")
HEADS = ((4, 4), (8, 2), (4, 1), (5, 5))
MASKS: list[Mask] = [
    Full(),
    Causal(),
    Window(7, 3),
    Causal() & (Window(5) | First(3)),
    Documents((0, 1, 2, 9, 40), Causal()),
    Strided(4, 2, 4) & Causal(),
]


def both_ways(size: int, placement: str = "zigzag", grad_dtype: Wire = "float32") -> Ring:
    return Ring(meshed(Mesh(ring=size)), placement=placement, bidirectional=True, grad_dtype=grad_dtype)


def both_ways_errors(rank: int, size: int, cells: list[Cell]) -> list[Errors]:
    """cell.layout: the placement, or 'usp' for such rings under two ranks of heads."""
    found = []
    for cell in cells:
        layout: Any = both_ways(size, "zigzag" if cell.layout == "usp" else cell.layout)
        if cell.layout == "usp":
            mesh = meshed(Mesh(head=2, ring=size // 2))
            layout = Ulysses(mesh, inner=partial(Ring, bidirectional=True))
        got, want = held(layout, cell, layout.place(cell.length, cell.mask)), oracle(cell)
        found.append({name: difference(got[name], want[name]) for name in want})
    return found


@pytest.mark.parametrize("size", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_both_ways_round_equal_one_device(world: Worlds, size: int) -> None:
    """What tests/test_matrix.py has not, which takes such rings at every size: 7 tokens, and USP."""
    turns = itertools.cycle(zip(HEADS, (7, 48, 61, 7), strict=True))
    pairs = list(itertools.product(PLACEMENTS, MASKS))
    wanted = [Cell(where, m, *next(turns)) for where, m in pairs[::5]]
    wanted += [Cell("usp", m, (8, 2), 61) for m in MASKS[1::4]]
    for cell, error in zip(wanted, world(size)(both_ways_errors, size, wanted)[0], strict=True):
        assert max(error.values()) <= 1e-10, (cell, error)


def sent_keys(rank: int, size: int, mask: Mask, length: int) -> tuple[dict[int, int], int, int]:
    """Bytes by receiver and posts of a forward, counted at the collective, and by the layout itself."""
    sent: Counter[int] = Counter()
    posts = 0
    real = dist.batch_isend_irecv

    def counting(operations: Any) -> Any:
        nonlocal posts
        posts += 1
        for op in operations:
            if op.op is dist.isend:
                sent[op.group_peer] += op.tensor.numel() * op.tensor.element_size()
        return real(operations)

    layout = both_ways(size, "contiguous")
    placement = layout.place(length, mask)
    q, k, v = (
        x[:, : placement.tokens(rank)]
        for x in inputs(Cell("", mask, (2, 2), length, dtype=torch.float32))[:3]
    )
    dist.batch_isend_irecv = counting  # type: ignore[assignment]
    try:
        layout.attention(q.contiguous(), k.contiguous(), v.contiguous(), mask, placement)
    finally:
        dist.batch_isend_irecv = real
    return dict(sent), posts, sum(layout.traffic.sent.values())


def test_each_way_a_shard_goes_no_further_than_its_last_user(world: Worlds) -> None:
    shard = 2 * 12 * 2 * 8 * 4  # k and v, 12 tokens, 2 heads of 8, float32
    for mask, there, back in (
        (Full(), [2] * 5, [2] * 5),
        (Causal(), [2, 2, 2, 1, 0], [2, 2, 0, 0, 0]),
        (Window(5), [1, 1, 1, 1, 0], [0] * 5),
        (Window(0, 5), [0] * 5, [0, 1, 1, 1, 1]),
        (Documents((0, 12, 24, 36, 48)), [0] * 5, [0] * 5),
    ):
        found = world(5)(sent_keys, 5, mask, 60)
        placement = contiguous(60, 5)
        assert route(mask, placement, 2, 1, 2).reach == tuple(there), mask
        assert route(mask, placement, 2, -1, 2).reach == tuple(back), mask
        assert sum(sum(sent.values()) for sent, _, _ in found) == shard * sum(there + back), mask
        for rank, (sent, posts, own) in enumerate(found):
            assert sum(sent.values()) == own and set(sent) <= {(rank + 1) % 5, (rank - 1) % 5}
            # half as many rounds as ranks, a post each way
            assert posts <= 4


def wire_errors(rank: int, size: int) -> dict[tuple[torch.dtype, Wire], Errors]:
    found = {}
    dtypes, wires = (torch.float32, torch.bfloat16), get_args(Wire)
    for dtype, wire in itertools.product(dtypes, wires):
        layout = Ring(meshed(Mesh(ring=size)), grad_dtype=wire)
        cell = Cell("", Causal(), (8, 2), 256, dtype=dtype, head_dim=32)
        got, want = held(layout, cell, layout.place(256, cell.mask)), oracle(cell)
        found[dtype, wire] = {name: difference(got[name], want[name]) for name in want}
    return found


@pytest.mark.parametrize(
    ("size", "float32", "bfloat16"), [(2, 1.1e-3, 1.15), (4, 2.2e-3, 1.45), (8, 3.7e-3, 2.0)]
)
def test_what_gradients_in_bfloat16_cost(world: Worlds, size: int, float32: float, bfloat16: float) -> None:
    """As the docstring of Ring says. float32: the greatest relative error of dk and dv of float32 inputs;
    bfloat16: how many times that of a float32 wire it is, of bfloat16 inputs.
    """
    found = world(size)(wire_errors, size)[0]
    for dtype in (torch.float32, torch.bfloat16):
        exact, rounded = (found[dtype, wire] for wire in get_args(Wire))
        assert all(rounded[name] == exact[name] for name in ("out", "lse", "dq"))
        for name in ("dk", "dv"):
            most = float32 if dtype == torch.float32 else bfloat16 * exact[name]
            assert most / 2 < rounded[name] < most, (dtype, name, rounded[name], exact[name])
            assert exact[name] < 5e-5 or dtype == torch.bfloat16


def live_shards(rank: int, size: int, kind: str) -> tuple[list[float], float, int]:
    """Beside the inputs: how many storages of a key shard's size (k and v together) are alive at most in
    forward and in backward, all bytes in the inputs' dtype in shards, and the bytes of everything.
    """
    mesh, cell = meshed(Mesh(ring=size)), Cell("", Full(), (24, 8), 32 * size, 1, torch.bfloat16, 64)
    if kind.startswith("gather"):
        layout: Any = Gather(mesh, heads_at_once=int(kind[6:]))
    else:
        layout = Ring(mesh, bidirectional=kind == "both")
    placement = layout.place(cell.length, cell.mask)
    q, k, v, dout = (x[:, :32].contiguous() for x in inputs(cell)[:4])
    shard = 2 * k.numel() * k.element_size()
    for x in (q, k, v):
        x.requires_grad_()
    with Live() as forward:
        out, _ = layout.attention(q, k, v, cell.mask, placement)
    with Live() as backward:
        out.backward(dout)
    halves = forward, backward
    alike = [x.counts[torch.bfloat16, shard] for x in halves]
    return alike, max(x.most[torch.bfloat16] for x in halves) / shard, max(x.most[None] for x in halves)


def test_a_ring_holds_two_key_shards(world: Worlds) -> None:
    """Counted by a hook on every operator, as storages of bfloat16 of the size of a shard's keys and values;
    gradients are float32. Everything that is alive at a time does not grow with the ranks.
    """
    few, many = (world(size)(live_shards, size, "one")[0] for size in (4, 8))
    assert few[0] == many[0] == [2, 2]
    assert few[2] == many[2]
    assert world(8)(live_shards, 8, "both")[0][0] == [4, 4]


def test_gathering_some_heads_at_a_time_holds_as_much_less(world: Worlds) -> None:
    every, four, one = (world(8)(live_shards, 8, f"gather{n}")[0][1] for n in (0, 4, 1))
    # the own shard, to be sent, and all 8, which arrive where they stay
    assert every <= 9.1 and four <= 0.6 * every and one <= 0.3 * every, (every, four, one)


def order(rank: int, size: int, kind: str, backward: bool) -> list[str]:
    """What the ring does, as it does it: a transfer is named by its turn among its kind."""
    log: list[str] = []
    counts: Counter[str] = Counter()
    names: dict[int, str] = {}
    module: Any = ring
    real = {name: getattr(module, name) for name in ("post", "forward", "backward")}
    wait = comm.Pending.wait

    def posting(group: Any, sends: Any, receives: Any, traffic: Any) -> Any:
        pending = real["post"](group, sends, receives, traffic)
        if sends or receives:
            kind = "keys" if (*sends, *receives)[0][0].dtype == torch.bfloat16 else "gradients"
            counts[kind] += 1
            names[id(pending)] = f"{kind} {counts[kind]}"
            log.append(f"post {kind} {counts[kind]}")
        return pending

    def waiting(self: Any) -> None:
        if id(self) in names:
            log.append(f"have {names.pop(id(self))}")
        wait(self)

    def working(name: str) -> Any:
        def work(*args: Any, **kwargs: Any) -> Any:
            log.append(f"{name} {counts[name]}")
            counts[name] += 1
            return real[name](*args, **kwargs)

        return work

    layout: Any = Ring(meshed(Mesh(ring=size)), bidirectional=kind == "both")
    if kind == "usp":
        layout = Ulysses(meshed(Mesh(head=2, ring=size // 2)), inner=Ring)
    cell = Cell("", Full(), (2, 2), 32, 1, torch.bfloat16)
    placement = layout.place(32, cell.mask)
    q, k, v, dout = (x[:, : 32 // size].contiguous().requires_grad_() for x in inputs(cell)[:4])
    module.post, module.forward, module.backward = posting, working("forward"), working("backward")
    comm.Pending.wait = waiting  # type: ignore[method-assign]
    try:
        out, _ = layout.attention(q, k, v, cell.mask, placement)
        if backward:
            log.clear()
            counts.clear()
            out.backward(dout)
    finally:
        module.post, module.forward, module.backward = real.values()
        comm.Pending.wait = wait  # type: ignore[method-assign]
    return log


# One way round 4 ranks; both ways, the first 2 hops and the second 1; one way round the 2 rings of USP.
FORWARD = {
    "one": [
        ["post keys 1", "forward 0", "have keys 1"],
        ["post keys 2", "forward 1", "have keys 2"],
        ["post keys 3", "forward 2", "have keys 3"],
        ["forward 3"],
    ],
    "both": [
        ["post keys 1", "post keys 2", "forward 0", "have keys 1", "have keys 2"],
        ["post keys 3", "forward 1", "forward 2", "have keys 3"],
        ["forward 3"],
    ],
    "usp": [["post keys 1", "forward 0", "have keys 1"], ["forward 1"]],
}
BACKWARD = {
    "one": [
        ["post keys 1", "backward 0", "have keys 1"],
        ["post keys 2", "backward 1", "post gradients 1", "have keys 2"],
        ["post keys 3", "backward 2", "have gradients 1", "post gradients 2", "have keys 3"],
        ["backward 3", "have gradients 2", "post gradients 3", "have gradients 3"],
    ],
    "both": [
        ["post keys 1", "post keys 2", "backward 0", "have keys 1", "have keys 2"],
        ["post keys 3", "backward 1", "post gradients 1", "backward 2", "post gradients 2", "have keys 3"],
        ["backward 3", "have gradients 1", "post gradients 3", "have gradients 2", "have gradients 3"],
    ],
    "usp": [
        ["post keys 1", "backward 0", "have keys 1"],
        ["backward 1", "post gradients 1", "have gradients 1"],
    ],
}


@pytest.mark.parametrize("kind", FORWARD)
def test_the_next_transfer_is_posted_before_the_work_and_awaited_after_it(world: Worlds, kind: str) -> None:
    """The gradient of a shard is awaited after the work on it, and its next hop posted before other work."""
    for backward, hops in ((False, FORWARD[kind]), (True, BACKWARD[kind])):
        for log in world(4)(order, 4, kind, backward):
            assert log == [*itertools.chain(*hops)]


def always(answer: bool, group: dist.ProcessGroup, x: Tensor) -> bool:
    return answer


def by_way_of_the_host(rank: int, size: int, cells: list[Cell]) -> list[tuple[bool, bool]]:
    """Each cell once plainly and once as if gloo could not read the tensors: same bits, same bytes."""
    found, real = [], comm.staged
    for cell in cells:
        results, sent = [], []
        for staged in (False, True):
            comm.staged = partial(always, staged)
            layout = build(cell.layout, size)
            results.append(local(layout, cell, layout.place(cell.length, cell.mask)))
            sent.append(dict(layout.traffic.sent))
        comm.staged = real
        same = all(torch.equal(results[0][name], results[1][name]) for name in results[0])
        found.append((same, sent[0] == sent[1] != {}))
    return found


def test_tensors_that_gloo_cannot_read_travel_by_way_of_the_host(world: Worlds) -> None:
    """On the CPU too, where nothing needs it."""
    star = Anchored(8, 8, 40) & Causal()
    names = ("ring/zigzag", "gather/zigzag", "ulysses", "usp/zigzag", "s2/contiguous", "star")
    cells = [Cell(name, star, (4, 2), 61, dtype=torch.bfloat16) for name in names]
    for found in world(2)(by_way_of_the_host, 2, cells):
        assert found == [(True, True)] * len(cells)


def which_are_staged(rank: int) -> list[bool]:
    group = meshed(Mesh(ring=1)).get_group("ring")
    with FakeTensorMode():
        return [comm.staged(group, torch.empty(1, device=x)) for x in ("cpu", "cuda")]


def test_only_device_tensors_on_gloo_are_staged(world: Worlds) -> None:
    assert world(1)(which_are_staged) == [[False, True]]
