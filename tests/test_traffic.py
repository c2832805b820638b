"""What layouts send: counted at the collectives, on real ranks and on simulated ones, against the needs."""

import json
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import traffic
from benchmarks.cases import Shape
from benchmarks.one_rank import Moved, being, layout, passes
from cells import Cell, build, local
from longspan.kernels.mask import Causal, Documents, Full, Mask, Window
from longspan.kernels.patterns import Anchored, Strided
from longspan.parallel.needs import needed_bytes
from longspan.parallel.placement import contiguous
from longspan.parallel.ring import route
from world import Worlds

PACKED = Documents((0, 1, 14, 50), inner=Causal())
S2 = Strided(4, 1, 4) & Causal()
STAR = Anchored(8, 8, 56) & Causal()
REAL = [
    ("ring/contiguous", Causal()),
    ("ring/zigzag", PACKED),
    ("ring/balanced", PACKED),
    ("gather/contiguous", Window(9)),
    ("gather/balanced", S2),
    ("s2/contiguous", S2),
    ("s2/zigzag", PACKED),
    ("ulysses", S2),
    ("usp/zigzag", Causal()),
    ("star", STAR),
]


class Sent(NamedTuple):
    """Bytes by receiving rank: at the collectives, and by the layout's own counter."""

    really: dict[int, int]
    counted: dict[int, int]


def counted(rank: int, size: int, cells: list[Cell]) -> list[Sent]:
    """A forward and a backward of each cell, with the collectives wrapped."""
    return [_counted(rank, size, cell) for cell in cells]


def _counted(rank: int, size: int, cell: Cell) -> Sent:
    one = build(cell.layout, size)
    assert one.group is not None
    index = {dist.get_global_rank(one.group, r): r for r in range(size)}
    sent: Counter[int] = Counter()
    batch, trade = dist.batch_isend_irecv, dist.all_to_all_single

    def count_batch(operations: list[dist.P2POp]) -> Any:
        for x in operations:
            if x.op is dist.isend:
                sent[index[dist.get_global_rank(x.group, x.group_peer)]] += x.tensor.nbytes
        return batch(operations)

    def count_trade(output: Tensor, input: Tensor, to: list[int], splits: list[int], *, group: Any) -> Any:
        for peer, n in enumerate(splits):
            sent[index[dist.get_global_rank(group, peer)]] += n * input.element_size()
        return trade(output, input, to, splits, group=group)

    one.traffic.reset()
    placement = one.place(cell.length, cell.mask)
    with mock.patch.multiple(dist, batch_isend_irecv=count_batch, all_to_all_single=count_trade):
        local(one, cell, placement)
    own = one.traffic.sent
    return Sent(*({r: n for r, n in x.items() if n and r != rank} for x in (sent, own)))


def test_what_is_counted_is_what_is_sent(world: Worlds) -> None:
    """On real ranks; and the simulation of one rank counts the same."""
    cells = [Cell(name, mask, (4, 2), 61, dtype=torch.float32) for name, mask in REAL]
    found = world(4)(counted, 4, cells)
    simulated = [simulate(r, 4, 61, tuple(REAL), Shape(4, 2, 8), torch.float32) for r in range(4)]
    for i, cell in enumerate(cells):
        for rank, each in enumerate(found):
            assert each[i].really == each[i].counted, (cell, rank)
            passed = simulated[rank][i]
            assert sum(each[i].really.values()) == sum(x.sent for x in passed), (cell, rank)
            assert sum(x.counted for x in passed) == sum(x.sent for x in passed), (cell, rank)
            came = sum(other[i].really.get(rank, 0) for other in found)
            assert came == sum(x.arrived for x in passed), (cell, rank)


@lru_cache
def simulate(
    rank: int, size: int, length: int, jobs: tuple[tuple[str, Mask], ...], shape: Shape, dtype: torch.dtype
) -> list[tuple[Moved, Moved]]:
    with being(rank, size):
        return [passes(layout(name, size, node=2), mask, length, shape, dtype) for name, mask in jobs]


def test_a_shard_goes_no_further_than_its_last_user(world: Worlds) -> None:
    shard = 2 * 12 * 2 * 8 * 4  # bytes: k and v, 12 tokens, 2 heads of 8, float32
    cases: list[tuple[Mask, list[int]]] = [
        (Causal(), [3, 2, 1, 0]),
        (Window(5), [1, 1, 1, 0]),
        (Full(), [3, 3, 3, 3]),
        (Documents((0, 12, 24, 36)), [0, 0, 0, 0]),
        (Documents((0, 12, 40), inner=Causal()), [0, 2, 1, 0]),
    ]
    cells = [Cell("ring/contiguous", mask, (4, 2), 48, dtype=torch.float32) for mask, _ in cases]
    found = world(4)(counted, 4, cells)
    for i, (mask, hops) in enumerate(cases):
        assert route(mask, contiguous(48, 4), 2).reach == tuple(hops), mask
        # forward and backward carry the keys; each travelling gradient makes as many hops as its keys did
        assert sum(sum(each[i].really.values()) for each in found) == 3 * shard * sum(hops), mask


# 8 simulated ranks, 8 kv heads of 128 in bfloat16
SHAPE = Shape(32, 8, 128)
TOKEN = 2 * 8 * 128 * 2  # bytes of the keys and values of one token


def both(jobs: list[tuple[str, Mask]], length: int) -> list[tuple[list[Moved], list[Moved]]]:
    """[job]: the forward and the backward passes on 8 ranks."""
    found = [simulate(r, 8, length, tuple(jobs), SHAPE, torch.bfloat16) for r in range(8)]
    return [([each[i][0] for each in found], [each[i][1] for each in found]) for i in range(len(jobs))]


def forward(jobs: list[tuple[str, Mask]], length: int) -> list[list[Moved]]:
    """[job][rank]: the forward passes on 8 ranks."""
    return [found for found, _ in both(jobs, length)]


def arrived(moved: list[Moved]) -> int:
    return sum(x.arrived for x in moved)


def needed(mask: Mask, length: int) -> tuple[int, ...]:
    """Of 8 ranks together, contiguous: forward, backward."""
    kind: Any = {"kv_heads": 8, "head_dim": 128, "dtype": torch.bfloat16}
    each = (needed_bytes(mask, contiguous(length, 8), r, **kind) for r in range(8))
    return tuple(sum(x) for x in zip(*each, strict=True))


def test_s2_sends_what_its_heads_need() -> None:
    length, mask = 2**16, Strided(64, 8, 16) & Causal()
    found = both([("s2/contiguous", mask), ("ring/contiguous", mask)], length)
    for exchange, ring, least in zip(*found, needed(mask, length), strict=True):
        assert arrived(exchange) <= 1.05 * least
        assert 8 * arrived(exchange) <= arrived(ring)


@pytest.mark.parametrize("placement", ["contiguous", "zigzag"])
def test_packed_documents_send_a_tenth_of_the_ring(placement: str) -> None:
    length = 2**17
    mask = Documents(tuple(range(0, length, 1000)), inner=Causal())
    found = both([(f"s2/{placement}", mask), (f"ring/{placement}", mask)], length)
    for exchange, ring, least, times in zip(*found, needed(mask, length), (1, 3), strict=True):
        assert 10 * arrived(exchange) <= arrived(ring)
        if placement == "contiguous":
            # whole blocks of 64 keys: at most 63 tokens more at each of 7 borders
            assert arrived(exchange) <= least + 7 * 63 * TOKEN * times


def test_a_window_sends_its_halo() -> None:
    """Backward fetches it again, and its float32 gradients go home."""
    ((exchange, back),) = both([("s2/contiguous", Window(1023))], 2**16)
    halo = 1024 * TOKEN
    assert [x.arrived for x in exchange] == [0] + 7 * [halo]
    assert [x.arrived for x in back] == [2 * halo] + 6 * [3 * halo] + [halo]


def test_the_ring_passes_no_shard_beyond_its_last_user() -> None:
    shard = 2**13 * TOKEN
    # documents over the borders of ranks 0 and 1, 2 and 3, and one over ranks 5 to 7
    packed = Documents((0, 8000, 9000, 20000, 30000, 33000, 40960, 45000, 65000), inner=Causal())
    jobs: list[tuple[str, Mask]] = [("ring/contiguous", Window(1023)), ("ring/contiguous", packed)]
    window, documents = both(jobs, 2**16)
    assert [x.sent for x in window[0]] == 7 * [shard] + [0]
    # a shard goes on as before, and the float32 gradient of the one that came goes back
    assert [x.sent for x in window[1]] == [shard] + 6 * [3 * shard] + [2 * shard]
    reach = route(packed, contiguous(2**16, 8), 8).reach
    last = [(0, 1), (1, 2), (2, 3), (3, 4), (4, 4), (5, 7), (6, 7), (7, 7)]
    assert list(reach) == [r - s for s, r in last]
    assert [arrived(x) for x in documents] == [shard * sum(reach), 3 * shard * sum(reach)]


def test_star_sends_anchor_and_tail_whatever_the_context() -> None:
    """Doubling the context changes nothing; doubling the tail doubles what it sends."""

    def moved(context: int, tail: int) -> tuple[int, ...]:
        mask = Anchored(1024, 1024, context) & Causal()
        (star,) = both([("star", mask)], context + tail)
        return tuple(sum(x.sent for x in side) for side in star)

    short, long, twice = moved(2**15, 2**10), moved(2**16, 2**10), moved(2**15, 2**11)
    assert short == long
    anchor = 7 * 1024 * TOKEN
    # the tail's queries to 7 others, out and lse in float32 back
    row = 32 * (128 * 2 + 128 * 4 + 4)
    # queries, upstream gradients, lse and delta to the others, float32 dq back
    back = 32 * (2 * 128 * 2 + 2 * 4 + 128 * 4)
    for i, (anchors, tail) in enumerate(((anchor, row), (3 * anchor, back))):
        assert short[i] == anchors + 2**10 * 7 * tail
        assert twice[i] == anchors + 2**11 * 7 * tail


def test_held_keys() -> None:
    """Two shards in the ring, its own copy and the one that comes; the gather its own copy and what it needs,
    the exchange also what others need.
    """
    jobs: list[tuple[str, Mask]] = [
        ("ring/contiguous", Causal()),
        ("gather/contiguous", Causal()),
        ("s2/contiguous", Window(1023)),
    ]
    ring, gather, exchange = forward(jobs, 2**16)
    shard = 2**13 * TOKEN
    assert max(x.held for x in ring) <= 2.02 * shard
    assert max(x.held for x in gather) <= 9.1 * shard
    assert max(x.held for x in exchange) <= 3.3 * shard


def test_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(traffic, "LENGTHS", {2: (2**14,)})
    monkeypatch.setattr(traffic, "LAYOUTS", ("ring/contiguous", "s2/contiguous", "star"))
    for given in ([], ["--redraw"]):
        monkeypatch.setattr("sys.argv", ["traffic", "--out", str(tmp_path), *given])
        traffic.main()
        assert (tmp_path / "traffic.png").read_bytes()[:4] == b"\x89PNG"
        (tmp_path / "traffic.png").unlink()
    found = json.loads((tmp_path / "traffic.json").read_text())["rows"]
    sent = {(row["mask"], row["layout"]): row["forward"] for row in found}
    assert len(sent) == 6 * 2 + 1 and {row["sampled"] for row in found} == {2}
    for mask in ("window 1024", "S2 stride 16", "documents of 1000"):
        one = sent[mask, "s2/contiguous"]
        assert one["needed"] <= one["sent"] <= 1.1 * one["needed"], mask
    assert sent["causal", "ring/contiguous"]["sent"] == 2**13 * TOKEN / 2
    assert "| 2 | 16k | star | star |" in capsys.readouterr().out
