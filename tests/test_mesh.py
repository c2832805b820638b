"""Which degrees a mesh takes, who is in its groups, and how long they wait."""

import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from cells import meshed, patient
from longspan.parallel.mesh import Degree, Heads, Mesh, joined, patience
from longspan.parallel.ring import Ring
from longspan.parallel.ulysses import Ulysses
from longspan.train.agree import Ranks
from world import ORPHAN, Worlds

AXES = ("dp", "ring", "head", "tp")


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
    assert Mesh(head="auto").degrees(16, 8, Heads(32, 8))["head"] == 16


@pytest.mark.parametrize(
    ("world_size", "node", "heads", "tp", "head"),
    [
        # the kv heads are dealt out evenly
        (64, 8, Heads(64, 8), 1, 8), (64, 8, Heads(28, 4), 1, 4), (12, 12, Heads(24, 6), 1, 6),
        (32, 4, Heads(64, 8), 1, 4), (8, 8, Heads(14, 2), 1, 2),
        # no degree does that: the query heads
        (8, 8, Heads(8, 1), 1, 8), (6, 6, Heads(14, 7), 1, 2), (12, 12, Heads(15, 5), 1, 3),
        # nor that
        (8, 8, Heads(5, 5), 1, 1),
        # head x tp divides the node
        (64, 8, Heads(64, 8), 2, 4), (64, 8, Heads(64, 8), 8, 1), (18, 6, Heads(64, 8), 1, 2),
        (24, 6, Heads(12, 12), 2, 3), (8, 4, None, 2, 2), (12, 4, Heads(12, 12), 3, 1),
        # more than a node would take, and at most 8
        (16, 1, Heads(16, 16), 1, 1), (16, 16, Heads(16, 16), 1, 8), (16, None, Heads(16, 16), 1, 8),
    ],
)  # fmt: skip
def test_auto_head_beside_a_ring_suits_heads_and_node(
    world_size: int, node: int | None, heads: Heads | None, tp: int, head: int
) -> None:
    found = Mesh(ring="auto", head="auto", tp=tp).degrees(world_size, node, heads)
    assert found == {"dp": 1, "ring": world_size // (head * tp), "head": head, "tp": tp}


@pytest.mark.parametrize(
    ("dp", "world_size", "heads", "found"),
    [
        ("auto", 16, Heads(12, 4), 8),
        ("auto", 8, Heads(12, 4), 8),
        ("auto", 9, Heads(2, 1), 1),
        (1, 16, Heads(12, 4), 16),
    ],
)
def test_auto_head_alone_leaves_no_rank_without_heads_if_dp_can_take_it(
    dp: Degree, world_size: int, heads: Heads, found: int
) -> None:
    degrees = Mesh(dp=dp, head="auto").degrees(world_size, None, heads)
    assert degrees == {"dp": world_size // found, "ring": 1, "head": found, "tp": 1}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="parallel.mesh.ring is 0"):
        Mesh(ring=0)


@pytest.mark.parametrize(
    ("env", "node"),
    [
        ({}, 1),
        ({"LOCAL_WORLD_SIZE": "4", "SLURM_NTASKS_PER_NODE": "1"}, 4),
        ({"SLURM_NTASKS_PER_NODE": "8"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, 8),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x4)", "SLURM_NTASKS_PER_NODE": "8"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "6(x2),4"}, 2),
        # a script that runs once, inside of an allocation for more
        ({"SLURM_NTASKS_PER_NODE": "8", "WORLD_SIZE": "1"}, 1),
    ],
)
def test_the_node_is_what_torchrun_or_else_slurm_says(env: dict[str, str], node: int) -> None:
    pytest.importorskip("omegaconf")
    from longspan.train.job import Launch

    assert Launch.of({"WORLD_SIZE": "16"} | env).local_world == node


def members(rank: int, mesh: Mesh) -> dict[str, list[int]]:
    """Who is with this rank along each axis, and along ring and head."""
    built = meshed(mesh)
    group = joined(built, ("ring", "head"))
    assert joined(built, ("ring", "head")) is group
    if built["ring"].size() * built["head"].size() > 1:
        assert Ulysses(built, inner=Ring).group is group
    groups = {axis: built.get_group(axis) for axis in AXES} | {"both": group}
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


@pytest.mark.parametrize(
    ("mesh", "of_rank_2"),
    [
        (Mesh(ring=2, head=2), {"dp": [2], "ring": [0, 2], "head": [2, 3], "tp": [2], "both": [0, 1, 2, 3]}),
        (Mesh(dp=2, ring=2), {"dp": [0, 2], "ring": [2, 3], "head": [2], "tp": [2], "both": [2, 3]}),
        (Mesh(head=2, tp=2), {"dp": [2], "ring": [2], "head": [0, 2], "tp": [2, 3], "both": [0, 2]}),
    ],
)
def test_the_inner_axes_hold_neighbours(world: Worlds, mesh: Mesh, of_rank_2: dict[str, list[int]]) -> None:
    """Neighbours are on one machine: torchrun and srun count its processes in a row."""
    by_rank = world(4)(members, mesh)
    assert by_rank[2] == of_rank_2
    for name in (*AXES, "both"):
        # each rank is in its group, whose members agree on it
        assert all(r in found[name] for r, found in enumerate(by_rank))
        assert all(by_rank[peer][name] == found[name] for found in by_rank for peer in found[name])


def test_three_axes(world: Worlds) -> None:
    by_rank = world(8)(members, Mesh(dp=2, ring=2, head=2))
    assert by_rank[5] == {"dp": [1, 5], "ring": [5, 7], "head": [4, 5], "tp": [5], "both": [4, 5, 6, 7]}
    assert by_rank[2]["both"] == [0, 1, 2, 3]


def waits(rank: int) -> list[Any]:
    with patient(77):
        mesh = Mesh(dp=2, ring=2).build("cpu")
        apart = Ranks(mesh.get_group("ring"))
    return [*(patience(mesh.get_group(axis)) for axis in AXES), patience(apart._group), patience()]


def test_every_group_waits_as_long_as_that_of_all(world: Worlds) -> None:
    assert world(4)(waits) == [[timedelta(seconds=77)] * 5 + [ORPHAN]] * 4


def prepared(rank: int) -> tuple[list[str], str]:
    """Whose data was opened where, when the first rank takes longer to prepare it than a step may wait."""
    from omegaconf import OmegaConf

    from longspan.train import job

    opened: list[str] = []

    def slow(_: Any) -> str:
        opened.append("opened")
        if rank == 0 and len(opened) == 1:
            time.sleep(2.5)
        return f"data of {rank}"

    with patient(1), pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "made", slow)
        data = job.open_data(OmegaConf.create({"data": {}}), job.Launch(rank, 2, rank, 2), Ranks())
    return opened, data


def test_a_first_tokenization_may_take_longer_than_a_step(world: Worlds) -> None:
    pytest.importorskip("omegaconf")
    twice = ["opened"] * 2
    assert world(2)(prepared) == [(twice, "data of 0"), (twice[1:], "data of 1")]
