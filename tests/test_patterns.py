"""Sparse masks: each means what tests/patterns.py says in plain Python; tiles are never judged wrongly."""

import importlib.util
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from longspan.kernels.attention import attention
from longspan.kernels.cells import kinds
from longspan.kernels.fields import UNLIMITED
from longspan.kernels.heads import Heads, PerHead
from longspan.kernels.layers import layered
from longspan.kernels.lower import lower
from longspan.kernels.mask import Causal, Full, Mask, Range
from longspan.kernels.neighborhood import Frames, FrameTiles, Neighborhood, brick_order
from longspan.kernels.patterns import Anchored, BlockPermutation, Chunks, Shifted, Strided, Tail
from longspan.kernels.span import Span, Spans, bounds, total
from longspan.kernels.tile import classify, listed, tiles
from masks import random_spans
from oracle import check_against_reference, inputs
from patterns import (
    CPU,
    EACH,
    KV_HEADS,
    WHOLE,
    check_classification,
    line,
    random_pattern,
    seen,
    tiled,
    truth,
)

ROOT = Path(__file__).parent.parent
PLACEMENTS: dict[str, Spans] = {
    "contiguous": WHOLE,
    "zigzag": (Span(10, 10), Span(40, 20)),
    "striped": (Span(1, 20, 1, 3),),
    "bricks": brick_order((6, 10), (2, 4)),
    "dilated bricks": brick_order((3, 4, 5), (2, 2, 2), dilation=(1, 2, 2)),
}


@pytest.mark.parametrize("mask", EACH, ids=str)
def test_each_mask_means_what_it_says(mask: Mask) -> None:
    assert torch.equal(seen(mask, WHOLE, WHOLE), truth(mask, WHOLE, WHOLE, KV_HEADS))
    q, k = (Span(3, 20), Span(40, 5)), (Span(1, 19, 1, 3),)
    assert torch.equal(seen(mask, q, k), truth(mask, q, k, KV_HEADS))


@pytest.mark.parametrize("seed", range(100))
def test_compositions_mean_what_their_parts_say(seed: int) -> None:
    draw = Random(seed)
    mask = random_pattern(draw, 60, batch=draw.choice([1, 1, 2]))
    if draw.random() < 0.3:
        mask = mask.heads(draw.choices(range(4), k=KV_HEADS), of=4)
    q, k = random_spans(draw, 60), random_spans(draw, 60)
    assert torch.equal(seen(mask, q, k), truth(mask, q, k, KV_HEADS))
    check_classification(mask, q, k, draw.choice([(4, 4), (7, 3), (5, 16)]))


@pytest.mark.parametrize("mask", EACH, ids=str)
def test_heads_of_one_kind_see_the_same(mask: Mask) -> None:
    for heads in ((0, 1, 2, 3), (3, 0, 3, 1)):
        found, (_, like) = seen(mask.heads(heads, 4), WHOLE, WHOLE), kinds(mask.heads(heads, 4), KV_HEADS)
        for head, kind in enumerate(like if mask.per_head else [0] * KV_HEADS):
            assert torch.equal(found[:, head], found[:, like.index(kind)])
    if mask.per_head and not isinstance(mask, Strided):
        different = {tuple(x.flatten().tolist()) for x in seen(mask, WHOLE, WHOLE)[0]}
        assert len(kinds(mask, KV_HEADS)[0]) == len(different)


def test_without_triton_predicates_still_hold_their_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton is for Linux only; the reference and the CPU do not need it."""
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("stand_in", ROOT / "kernels" / "jit.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.jit(max).fn(2, 3) == 3


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from longspan.kernels.attention import attention, chosen
from longspan.kernels.mask import Causal, Unsupported
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.patterns import Strided
from longspan.kernels.span import Span
at, q = (Span(0, 64),), torch.randn(1, 64, 4, 8)
for mask in (Causal(), Strided(4, 1, 4), Neighborhood((8, 8), 3)):
    found = [attention(q, q, q, mask, at, at, backend=b)[0] for b in ("auto", "reference")]
    torch.testing.assert_close(*found)
try:
    attention(q, q, q, Causal(), at, at, backend="triton")
except Unsupported as error:
    print(error)
"""


@pytest.mark.slow
def test_without_triton_the_cpu_attends() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "backend='triton' needs Triton, which is not installed; 'reference' does not\n"


def test_the_meaning_by_hand() -> None:
    """The plain Python could share an error with the package; these rows are by hand."""
    two = Strided(block=2, local=1, stride=4)
    assert line(two, 9, 12) == "110000001100"
    assert line(two, 3, 12, h=1, of=2) == "001111000000"
    assert line(Strided(2, 0, 4, offset=1), 9, 12) == "000000110000"
    assert line(Strided(2, 1, 4, dense_heads=1), 3, 6, h=0, of=2) == "111111"
    assert line(Strided(1, 0, 3), 0, 9, h=2, of=3) == "010010010"
    assert line(Anchored(4, 2, 9), 5, 12) == "110011110000"
    assert line(Anchored(4, 2, 9), 9, 12) == "111111111111"
    assert line(Shifted(4, (0, 2)), 2, 8, h=0, of=4) == "11110000"
    assert line(Shifted(4, (0, 2)), 2, 8, h=2, of=4) == "00111100"
    assert line(Shifted(4, (0, 2)), 0, 8, h=3, of=4) == "11000000"
    assert line(BlockPermutation(2, 3), 4, 6, h=1, of=2) == "110000"
    assert line(Frames(3), 4, 8) == "11111100"
    assert line(FrameTiles(2, 2), 3, 10) == "1111110011" and line(FrameTiles(2, 2), 4, 4) == "1111"
    assert line(PerHead((Full(), Tail(3))), 2, 4, h=1, of=2) == "0000"


@pytest.mark.parametrize("mask", EACH, ids=str)
def test_no_tile_is_wrongly_empty_or_full(mask: Mask) -> None:
    for q, k in product(PLACEMENTS.values(), repeat=2):
        check_classification(mask, q, k, (4, 4))
    for size in ((7, 3), (3, 8), (20, 20)):
        check_classification(mask, WHOLE, WHOLE, size)


CONTIGUOUS = [
    *(Tail(13), Heads(1, 3), Strided(4, 2, 8), Strided(2, 0, 4), Anchored(8, 3, 50), Shifted(10, (0, 5))),
    *(
        BlockPermutation(6, 10),
        Frames(7),
        Neighborhood((60,), 7, stride=3),
        Neighborhood((60,), 9, causal=True),
    ),
]


@pytest.mark.parametrize("mask", CONTIGUOUS, ids=str)
def test_contiguous_tiles_are_never_visited_in_vain(mask: Mask) -> None:
    some, _ = classify(mask, *(Range(*bounds(WHOLE, 4)),) * 2, KV_HEADS)
    real, _ = tiled(seen(mask, WHOLE, WHOLE), (4, 4))
    assert torch.equal(some.expand(real.shape), real)


@pytest.mark.parametrize(
    "mask",
    [Strided(8, 2, 4), Strided(8, 1, 8, dense_heads=1), Anchored(8, 16, 48), Shifted(16, (0, 8)), Frames(8)],
    ids=str,
)
@pytest.mark.parametrize("at", [(Span(0, 64),), (Span(8, 32), Span(88, 32))], ids=str)
def test_partial_tiles_are_those_of_the_diagonal(mask: Mask, at: Spans) -> None:
    """Where the tile is as large as the block, and with `Causal`."""
    for transpose in (False, True):
        lists = tiles(mask & Causal(), at, at, KV_HEADS, size=(8, 8), transpose=transpose, device=CPU)
        partial = [(row % lists.rows, column) for row, column, full in listed(lists) if not full]
        assert partial and all(row == column for row, column in partial)


@pytest.mark.parametrize("heads", [(4, 4), (8, 4)], ids=str)
@pytest.mark.parametrize("mask", EACH, ids=str)
def test_the_cpu_backend_equals_the_reference(mask: Mask, heads: tuple[int, int]) -> None:
    at = (WHOLE, WHOLE) if heads[0] == 4 else ((Span(10, 30),), (Span(2, 20, 2, 3), Span(40, 9)))
    given = inputs(total(at[0]), total(at[1]), heads, dtype=torch.float32)
    check_against_reference(mask, at, given)


def at(mask: Mask, length: int, kv_heads: int = 2) -> Any:
    whole = (Span(0, length),)
    return lambda: lower(mask, whole, whole, kv_heads, CPU)


BAD: list[tuple[Any, str]] = [
    (lambda: layered(Strided(4, 1, 16).heads((0, 1), 2), 1, 2), "blocks unseen"),
    (lambda: Tail(1.5), "Tail.start is 1.5; it must be an integer from 0 to"),  # type: ignore[arg-type]
    (lambda: Tail(-1), "Tail.start is -1; it must be an integer from 0 to"),
    (lambda: Strided(0, 1, 4), "Strided.block is 0; it must be an integer from 1"),
    (lambda: Strided(4, -1, 4), "Strided.local is -1; it must be an integer from 0"),
    (lambda: Strided(4, 1, 0), f"Strided.stride is 0; it must be an integer from 1 to {UNLIMITED // 2}"),
    (lambda: Strided(4, 1, 4, dense_heads=-1), "Strided.dense_heads is -1"),
    (lambda: Strided(4, 1, 4, offset=UNLIMITED), f"Strided.offset is {UNLIMITED}"),
    (lambda: Strided(4.0, 1, 4), "Strided.block is 4.0; it must be an integer"),  # type: ignore[arg-type]
    (lambda: Anchored(8, -2, 3), "Anchored.anchor is -2"),
    (lambda: Chunks(0), "Chunks.chunk is 0"),
    (lambda: Shifted(8, ()), r"Shifted.shifts is \(\); it must be a list of integers from 0"),
    (lambda: Shifted(8, (0, -4)), r"Shifted.shifts is \(0, -4\)"),
    (at(Shifted(8, (0, 2, 4)), 9), "Shifted.shifts has 3 shifts for 2 kv heads; give at most 2"),
    (lambda: BlockPermutation(4, 0), "BlockPermutation.blocks is 0"),
    (at(BlockPermutation(4, 2), 9), "BlockPermutation.* has 8 positions, 0 to 7, but is asked for 8"),
    (lambda: Frames(0), "Frames.tokens is 0"),
    (lambda: FrameTiles(4, 0), "FrameTiles.every is 0"),
    (lambda: Heads(-1, 2), "Heads.start is -1"),
    (lambda: PerHead(Causal()), "PerHead.masks is Causal"),  # type: ignore[arg-type]
    (lambda: brick_order((4, 4), (2.0, 2)), "brick is"),  # type: ignore[arg-type]
    (lambda: brick_order((4, 4), (2, 2), 1.5), "dilation 1.5 for the grid"),  # type: ignore[arg-type]
    (lambda: PerHead(()), r"PerHead.masks is \(\); it must hold a mask for each kv head"),
    (lambda: PerHead((Full().heads([0], 2), Full())), "none bound to heads"),
    (at(PerHead((Full(), Causal(), Full())), 9), "PerHead.masks has 3 masks for 2 kv heads; give 2"),
    (lambda: Neighborhood((), 1), r"Neighborhood.grid is \(\)"),
    (lambda: Neighborhood((2, 2, 2, 2), 1), "must have 1 to 3 axes"),
    (lambda: Neighborhood((4, 0), 1), r"Neighborhood.grid is \(4, 0\)"),
    (
        lambda: Neighborhood((8, 8), (3, 3, 3)),
        r"window is \(3, 3, 3\); .* one for each of 2 axes",
    ),
    (lambda: Neighborhood((8, 8), 3, causal=1), "causal is .*; it must be true or false"),  # type: ignore[arg-type]
    (
        lambda: Neighborhood((8, 4), 5),
        "window 5, dilation 1, stride 1 on an axis of 4; it must",
    ),
    (lambda: Neighborhood((9,), 5, dilation=2), "window 5, dilation 2, stride 1 on an axis of 9"),
    (lambda: Neighborhood((9,), 3, stride=4), "window 3, dilation 1, stride 4"),
    (lambda: Neighborhood((9,), 3, dilation=0), "dilation 0"),
    (at(Neighborhood((3, 3), 2), 10), "has 9 positions, 0 to 8, but is asked for 9"),
    (lambda: brick_order((4, 4), (2,)), r"brick is \(2,\) and dilation 1 for the grid \(4, 4\)"),
    (lambda: brick_order((4, 4), (2, 0)), "integer of at least 1 for each of its 1 to 3 axes"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_what_makes_no_sense_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def child(*arguments: str, **variables: str) -> str:
    """What tests/predicate_child.py prints."""
    path = os.pathsep.join(filter(None, [*sys.path, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "predicate_child.py", *arguments],
        env=os.environ | {"PYTHONPATH": path, **variables}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    return done.stdout


def test_predicates_in_triton_equal_torch() -> None:
    assert child(TRITON_INTERPRET="1") == ""


@pytest.mark.parametrize(
    "architecture", ["90", *(pytest.param(x, marks=pytest.mark.slow) for x in ("80", "100"))]
)
def test_predicates_compile(architecture: str) -> None:
    assert child(architecture) == ""


@pytest.mark.parametrize("parts", [1, 2, 4], ids="heads split in {}".format)
@pytest.mark.parametrize("heads", [(8, 8), (8, 4), (8, 2)], ids=str)
def test_the_heads_of_all_layers_see_the_whole_context(heads: tuple[int, int], parts: int) -> None:
    """Through the door, the query heads in groups and the kv heads on several ranks, each bound to its own:
    with even weights and a value of its own for each key, what comes out says what was seen.
    """
    (hq, hk), n, layers, parts = heads, 24, 8 // heads[1], min(parts, heads[1])
    whole = (Span(0, n),)
    seen = torch.zeros(layers, hq, n, n, dtype=torch.bool)
    for layer, mask in enumerate(layered(Strided(2, 1, 8), layers, hk)):
        for part in range(parts):
            own_kv, own = (range(part * h // parts, (part + 1) * h // parts) for h in (hk, hq))
            q, k = torch.zeros(1, n, len(own), n), torch.zeros(1, n, len(own_kv), n)
            v = torch.eye(n)[None, :, None].expand(k.shape)
            out, _ = attention(q, k, v, mask.heads(own_kv, hk), whole, whole)
            seen[layer, own] = out[0].transpose(0, 1) > 0
    # query heads of a group see the same; without any one of the groups something is left unseen
    groups = seen.view(layers * hk, hq // hk, n, n)
    assert (groups == groups[:, :1]).all() and groups.any(0).all()
    for i in range(len(groups)):
        assert not torch.cat((groups[:i], groups[i + 1 :])).any(0).all()


LONG = """
import resource, sys, time, torch
from longspan.kernels.mask import Causal
from longspan.kernels.patterns import Strided
from longspan.kernels.span import Span
from longspan.kernels.tile import tiles
at, cpu = (Span(0, int(sys.argv[1])),), torch.device("cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for mask in (Causal(), Strided(128, 4, 16) & Causal(), Strided(64, 8, 16) & Causal()):
    began = time.process_time()
    kept = [tiles(mask, at, at, 8, size=(128, 128), transpose=x, device=cpu) for x in (False, True)]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(time.process_time() - began, used / 2**20)
"""


def building(tokens: int) -> list[list[float]]:
    """Seconds of one core and GiB beyond what torch needs, for causal and S2 in blocks of 128 and of 64."""
    done = subprocess.run(
        [sys.executable, "-c", LONG, str(tokens)], capture_output=True, text=True, timeout=300, check=True
    )
    return [[float(x) for x in row.split()] for row in done.stdout.splitlines()]


@pytest.mark.slow
def test_lists_of_a_million_tokens() -> None:
    (causal, _), (strided, memory), (fine, most) = building(2**20)
    assert causal < 1 and strided < 3 and memory < 1, (causal, strided, memory)
    # twice as many blocks as tiles: every tile beside the far ones is partial
    assert fine < 6 and most < 1.5, (fine, most)


def test_lists_of_a_hundred_thousand_tokens() -> None:
    """The same at an eighth of the length, with a sixty-fourth of the pairs of tiles."""
    (causal, _), (strided, memory), (fine, most) = building(2**17)
    assert causal < 0.5 and strided < 0.5 and fine < 0.5, (causal, strided, fine)
    assert memory < 0.1 and most < 0.2, (memory, most)
