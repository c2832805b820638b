"""Nobody waits for long: what cannot be served is refused before anything is sent, on all ranks alike, and a
rank that fails fails the others within the timeout of the process group.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from cells import Cell, inputs, meshed, patient
from jobs import ring, wait_for
from longspan.kernels.heads import PerHead
from longspan.kernels.mask import Causal, Documents, Full, Mask, Unsupported, Window
from longspan.kernels.patterns import Anchored, BlockPermutation, Strided
from longspan.kernels.span import Span
from longspan.parallel.gather import Gather
from longspan.parallel.layout import Layout
from longspan.parallel.mesh import Mesh
from longspan.parallel.mixed import HeadGroups
from longspan.parallel.placement import Placement, contiguous, striped, zigzag
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.star import Star
from longspan.parallel.ulysses import Ulysses
from longspan.train.pulse import process_state
from world import RankFailed, Worlds

LAYOUTS: dict[str, Callable[..., Layout]] = {
    "ring": Ring,
    "both ways": partial(Ring, bidirectional=True),
    "gather": Gather,
    "ulysses": partial(Ulysses, axis="ring"),
    "s2": HeadSharded,
    "star": Star,
}
# Layouts with a star in them send before it is its turn, unless it is asked before.
AROUND_STAR: dict[str, Callable[..., Layout]] = {
    "star in ulysses": partial(Ulysses, inner=Star),
    "star beside a ring": partial(HeadGroups, first=Ring, rest=Star),
    "a ring and a star in ulysses": partial(Ulysses, inner=partial(HeadGroups, first=Ring, rest=Star)),
}
STAR = Anchored(8, 8, 40) & Causal()
OF_STAR = Placement(61, ((Span(0, 8), Span(40, 7)), (Span(8, 16), Span(47, 7)), (Span(24, 16), Span(54, 7))))
NEITHER = "which serve every mask"


@dataclass(frozen=True)
class Refused:
    """A cell that must not be served, and what is said. place: None is the layout's own placement."""

    name: str
    layout: str
    mask: Mask
    said: str
    place: Placement | None = None
    error: type[ValueError] = ValueError

    def __str__(self) -> str:
        return f"{self.layout}, {self.name}"


UNSUPPORTED = [
    Refused("no star", "star", Full(), NEITHER),
    Refused("causal", "star", Causal(), NEITHER),
    Refused("window", "star", Window(7), NEITHER),
    Refused("s2", "star", Strided(4, 2, 4) & Causal(), NEITHER),
    Refused("documents", "star", Documents((0, 20), Causal()), NEITHER),
    Refused("stars in documents", "star", Documents((0, 20), STAR), NEITHER),
    Refused("two stars", "star", STAR | Anchored(4, 4, 40), NEITHER),
    Refused("a dense head", "star", PerHead((STAR, Causal())), NEITHER),
    Refused("a star or what lies near", "star", STAR | Window(9), NEITHER),
    Refused("cut within a block", "star", STAR, "the placement of Star.place", contiguous(61, 3)),
    Refused("zigzag", "star", STAR, "the placement of Star.place", zigzag(61, 3)),
    Refused("striped", "star", STAR, "the placement that Star.place gives", striped(61, 3)),
    *(Refused("causal", name, Causal(), NEITHER, OF_STAR) for name in AROUND_STAR),
    *(Refused("a dense head", name, PerHead((STAR, Causal())), NEITHER, OF_STAR) for name in AROUND_STAR),
    *(Refused("zigzag", name, STAR, "the placement of Star.place", zigzag(61, 3)) for name in AROUND_STAR),
]
MISFITS = [
    misfit
    for name in LAYOUTS
    for misfit in (
        Refused("other ranks", name, STAR, "over 4 ranks, but the layout has 3", contiguous(61, 4)),
        Refused("other rows", name, Documents(((0,), (0,)), STAR), "2 rows, but the batch has 1"),
        Refused("other heads", name, PerHead((STAR,) * 3), "3 masks for 2 kv heads", contiguous(61, 3)),
        Refused(
            "beyond the mask", name, BlockPermutation(8, 7), "has 56 positions", contiguous(61, 3)
        ),
    )
    # star says of this mask that there is no star in it, which is tested above
    if (name, misfit.name) != ("star", "beyond the mask")
]  # fmt: skip


def refusals(rank: int, cells: list[Refused]) -> list[str]:
    """What is said to each cell; whatever would be sent fails the test."""
    names = ("batch_isend_irecv", "all_to_all_single", "all_gather", "all_reduce", "broadcast")
    real = {name: getattr(dist, name) for name in names}
    mesh = meshed(Mesh(ring=3))

    def sending(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something is sent")

    for name in names:
        setattr(dist, name, sending)
    said = []
    try:
        for cell in cells:
            layout = (LAYOUTS | AROUND_STAR)[cell.layout](mesh)
            try:
                placement = cell.place or layout.place(61, cell.mask)
                tokens = placement.tokens(rank)
                q, k, v = (x[:, :tokens] for x in inputs(Cell("", cell.mask, (4, 2), 61))[:3])
                layout.attention(q, k, v, cell.mask, placement)
            except ValueError as error:
                kind = "Unsupported" if isinstance(error, Unsupported) else "ValueError"
                said.append(f"{kind}: {error}")
            else:
                said.append("served")
    finally:
        for name in names:
            setattr(dist, name, real[name])
    return said


@pytest.mark.parametrize(("kind", "cells"), [("Unsupported", UNSUPPORTED), ("ValueError", MISFITS)])
def test_refused_on_all_ranks_alike_before_anything_is_sent(
    world: Worlds, kind: str, cells: list[Refused]
) -> None:
    by_rank = world(3)(refusals, cells)
    assert by_rank[0] == by_rank[1] == by_rank[2]
    for cell, said in zip(cells, by_rank[0], strict=True):
        assert said.startswith(kind) and cell.said in said, f"{cell}: {said}"
    # the only layout that may refuse a mask
    assert kind != "Unsupported" or all("star" in cell.layout for cell in cells)


def without_axis(rank: int) -> list[str]:
    said = []
    for layout in LAYOUTS.values():
        try:
            layout(meshed(Mesh(ring=1)), axis="rnig")
        except ValueError as error:
            said.append(str(error))
    return said


def test_an_axis_that_the_mesh_has_not_is_named(world: Worlds) -> None:
    assert world(1)(without_axis)[0] == [
        "parallel.layout.axis is 'rnig'; it can be dp, ring, head, tp"
    ] * len(LAYOUTS)


def failing(rank: int, size: int, name: str, ends: str, timeout: float) -> str:
    """What each rank but 1 is told, once rank 1 has come to its end during a layer of which all are part."""
    group = dist.new_group(list(range(size)), timeout=timedelta(seconds=timeout))
    assert group is not None
    return attended(rank, LAYOUTS[name](DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ring",))), ends)


def attended(rank: int, layout: Layout, ends: str) -> str:
    """See `failing`."""
    placement = layout.place(60, STAR)
    at = slice(0, placement.tokens(layout.rank))
    q, k, v, dout, _ = inputs(Cell("", STAR, (4, 2), 60))
    q, k, v = (x[:, at].clone().requires_grad_() for x in (q, k, v))
    start = time.monotonic()
    try:
        if rank == 1 and ends == "before it":
            raise ArithmeticError("as planned")
        out, _ = layout.attention(q, k, v, STAR, placement)
        if rank == 1 and ends == "between its halves":
            raise ArithmeticError("as planned")
        if rank == 1 and ends == "dead":
            os._exit(7)
        start = time.monotonic()
        out.backward(dout[:, at])
    except (ArithmeticError, RuntimeError) as error:
        if ends == "dead":
            raise
        return f"{type(error).__name__} {time.monotonic() - start:.2f}"
    return "served 0"


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_that_raises_is_waited_for_until_the_timeout(world: Worlds, name: str) -> None:
    found = world(3)(failing, 3, name, "before it", 1.0)
    assert found[1].startswith("ArithmeticError")
    for told in (found[0], found[2]):
        kind, seconds = told.split()
        assert kind == "RuntimeError" and float(seconds) < 4, told


@pytest.mark.parametrize("name", ["ring", "s2"])
def test_a_rank_that_raises_before_its_backward_too(world: Worlds, name: str) -> None:
    found = world(3)(failing, 3, name, "between its halves", 2.0)
    assert found[1].startswith("ArithmeticError")
    for told in (found[0], found[2]):
        kind, seconds = told.split()
        assert kind == "RuntimeError" and float(seconds) < 5, told


def failing_in_part(rank: int, timeout: float) -> str:
    with patient(timeout):
        mesh = Mesh(dp=2, ring=2).build("cpu")
    return attended(rank, Ring(mesh), "before it")


def test_a_rank_that_raises_is_waited_for_as_long_by_a_part_of_the_ranks(world: Worlds) -> None:
    """Of 4 processes 2 and 2 hold a sequence; torch would give their groups half an hour."""
    found = world(4)(failing_in_part, 2.0)
    assert found[1].startswith("ArithmeticError") and found[2] == found[3] == "served 0"
    kind, seconds = found[0].split()
    assert kind == "RuntimeError" and float(seconds) < 6, found[0]


def test_a_rank_that_dies_is_not_waited_for(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("world.GRACE", 20.0)
    start = time.monotonic()
    with pytest.raises(RankFailed) as told:
        world(3)(failing, 3, "ring", "dead", 60.0)
    # all three have told, long before the timeout
    assert told.value.ranks == (1, 0, 2) or told.value.ranks == (1, 2, 0)
    assert "rank 1: the process died with exit code 7" in str(told.value)
    assert time.monotonic() - start < 18


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes in /proc")
def test_a_stopped_rank_is_named_and_the_other_leaves(data_cache: str, tmp_path: Path) -> None:
    run_dir, said, timeout = tmp_path / "run", tmp_path / "said", 6.0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [data_cache, *ring(), f"run.dir={run_dir}", "train.steps=100000", f"timeout_s={timeout}"]
    command = [*torchrun, "-m", "longspan.train", "experiment=tiny", "track=none", "heartbeat_s=1", *words]
    with open(said, "w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
        wait_for(run_dir / "metrics.jsonl", 5, process)
        one, two = (
            json.loads((run_dir / "heartbeat" / f"rank{rank}.json").read_text())["pid"] for rank in (0, 1)
        )
        os.kill(two, signal.SIGSTOP)
        began = time.monotonic()
        while process_state(one) not in ("", "Z") and time.monotonic() < began + 60:
            time.sleep(0.05)
        took = time.monotonic() - began
        # which does not hear SIGTERM: torchrun would kill it after 30 s
        os.kill(two, signal.SIGKILL)
        assert process.wait(60) == 1
    assert timeout - 1 < took < timeout + 5
    lines = [line for line in said.read_text().splitlines() if line.startswith("longspan: ")]
    line = re.compile(
        rf"longspan: (error: )?rank 1 \(\S+, process {two}\) has not been heard of for [4-9] s, since its "
        rf"process is stopped \(SIGCONT lets it go on\); it was in step \d+, .+; rank 0 in step \d+, .+"
    )
    assert len(lines) == 1 and line.fullmatch(lines[0]), lines
    assert lines[0].endswith((run_dir / "heartbeat" / "hang.txt").read_text().strip())
