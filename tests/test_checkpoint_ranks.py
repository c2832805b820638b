import contextlib
import errno
import os
import shutil
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from longspan.train.checkpoint import Checkpoints, SaveError
from longspan.train.tensors import TensorSave
from states import State, bits, leaves, loaded, make, save, small_files
from world import Worlds


def sharded(rank: int, size: int, dim: int, seed: int) -> State:
    """As `make`, the weight cut along `dim` over ranks, which leaves some with less or nothing."""
    state = make(seed)
    mesh = init_device_mesh("cpu", (size,))
    state["model"]["weight"] = distribute_tensor(
        state["model"]["weight"], mesh, [Shard(dim)], src_data_rank=None
    )
    return state


def local_bits(state: State) -> list[bytes]:
    state["model"]["weight"] = state["model"]["weight"].to_local()
    return bits(state)


def save_on_ranks(rank: int, size: int, folder: Path) -> list[int]:
    for step, asynchronous in ((1, False), (2, True)):
        checkpoints = Checkpoints(folder, asynchronous=asynchronous)
        checkpoints.save(step, sharded(rank, size, 0, step), {"saved": step, "rank": rank})
        checkpoints.wait()
    return checkpoints.steps()


def load_on_ranks(rank: int, size: int, folder: Path) -> tuple[State | None, list[str]]:
    """Loads into weights cut along the other dimension; the tied tensor stays whole."""
    told: list[str] = []
    state = sharded(rank, size, 1, 5)
    for tensor in leaves(state):
        tensor.zero_()
    extra = Checkpoints(folder, warn=told.append).load("auto", state)
    assert extra is not None
    assert local_bits(state) == local_bits(sharded(rank, size, 1, extra["saved"]))
    return extra, told


def test_checkpoints_move_between_numbers_of_ranks(world: Worlds, tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    assert world(2)(save_on_ranks, 2, two) == [[1, 2]] * 2
    # What all ranks hold was written once, and both wrote.
    written = [path.stat().st_size for path in (two / "step-00000002").glob("*.distcp")]
    save(Checkpoints(one), 2)
    alone = (one / "step-00000002" / "__0_0.distcp").stat().st_size
    assert len(written) == 2 and min(written) > 0 and sum(written) < 1.3 * alone
    assert loaded(two, make(2)) == (bits(make(2)), {"saved": 2, "rank": 0})
    assert world(2)(load_on_ranks, 2, two) == [({"saved": 2, "rank": 0}, [])] * 2
    assert world(4)(load_on_ranks, 4, two) == [({"saved": 2, "rank": 0}, [])] * 4
    assert world(2)(load_on_ranks, 2, one) == [({"saved": 2}, [])] * 2


def test_ranks_agree_on_what_is_damaged(world: Worlds, tmp_path: Path) -> None:
    world(2)(save_on_ranks, 2, tmp_path)
    # Whichever rank hashes it.
    for name in sorted(os.listdir(tmp_path / "step-00000002")):
        folder = tmp_path / name
        shutil.copytree(tmp_path / "step-00000001", folder / "step-00000001")
        shutil.copytree(tmp_path / "step-00000002", folder / "step-00000002")
        path = folder / "step-00000002" / name
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
        (first, told), (second, silent) = world(2)(load_on_ranks, 2, folder)
        assert first == second == {"saved": 1, "rank": 0}
        assert len(told) == 1 and f"step-00000002: {name}" in told[0]
        assert silent == []


def fail_on_one_rank(rank: int, folder: Path) -> list[str]:
    """What each rank is told when only rank 1 cannot write, and when only its extra is bad."""
    told = []
    for asynchronous in (False, True):
        checkpoints = Checkpoints(folder, asynchronous=asynchronous)
        checkpoints.save(1, sharded(rank, 2, 0, 1), {})
        checkpoints.wait()
        with small_files(500) if rank == 1 else contextlib.nullcontext():
            try:
                checkpoints.save(2, sharded(rank, 2, 0, 2), {})
                checkpoints.wait()
            except SaveError as error:
                told.append(str(error))
    try:
        checkpoints.save(3, sharded(rank, 2, 0, 3), {"bad": (1,)} if rank == 1 else {})
    except ValueError as error:
        told.append(str(error))
    checkpoints.save(4, sharded(rank, 2, 0, 4), {})
    checkpoints.wait()
    return told


def test_what_fails_on_one_rank_fails_on_all(world: Worlds, tmp_path: Path) -> None:
    told = world(2)(fail_on_one_rank, tmp_path)
    assert told[0] == told[1]
    refused = "checkpoint 2 could not be saved: rank 1: [Errno 27] File too large"
    assert told[0][:2] == [refused, refused]
    assert told[0][2].startswith("rank 1: extra['bad'] is of type tuple")
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000004"]


def save_in_halves(rank: int, folder: Path) -> State | None:
    """Ranks 0, 1 and ranks 2, 3 save states of their own at the same time."""
    half = rank // 2
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][half]
    checkpoints = Checkpoints(folder / str(half), group=group)
    checkpoints.save(half, make(half), {"half": half})
    return checkpoints.load("auto", make(half))


def full_on_rank_1(rank: int, folder: Path) -> tuple[list[int], list[str]]:
    """Saves three times; at the third, rank 1 finds its disk full, once."""
    told: list[str] = []
    checkpoints = Checkpoints(folder, warn=told.append)
    save(checkpoints, 1)
    save(checkpoints, 2)
    write, full = TensorSave.write, [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))] * rank

    def written(saved: TensorSave, folder: Path) -> list[WriteResult]:
        if full:
            # as torch does
            raise RuntimeError("unexpected pos 64 vs 0") from full.pop()
        return write(saved, folder)

    with patch.object(TensorSave, "write", written):
        save(checkpoints, 3)
    return checkpoints.steps(), told


def test_all_ranks_try_again_when_the_disk_of_one_is_full(world: Worlds, tmp_path: Path) -> None:
    gone = "the disk is full: step-00000001 was deleted for checkpoint 3"
    assert world(2)(full_on_rank_1, tmp_path) == [([2, 3], [gone]), ([2, 3], [])]
    assert loaded(tmp_path, make(3)) == (bits(make(3)), {"saved": 3})


def test_a_group_saves_on_its_own(world: Worlds, tmp_path: Path) -> None:
    assert world(4)(save_in_halves, tmp_path) == [{"half": 0}] * 2 + [{"half": 1}] * 2
    for half in (0, 1):
        assert loaded(tmp_path / str(half), make(half)) == (bits(make(half)), {"half": half})
        assert len(list(tmp_path.glob(f"{half}/step-*/*.distcp"))) == 2
