"""A world runs functions on ranks, names the rank that failed, and never waits longer than it was told."""

import os
import signal
import time
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist

from world import RankFailed, World, Worlds, run


def total(rank: int, shift: int) -> tuple[int, int, int, torch.Tensor]:
    x = torch.tensor([rank + shift])
    dist.all_reduce(x)
    return os.getpid(), dist.get_rank(), dist.get_world_size(), x


def fail_on(rank: int, bad: int) -> None:
    if rank == bad:
        raise ValueError(f"planted on {rank}")
    dist.barrier()


def fail_everywhere(rank: int) -> None:
    raise ValueError(f"planted on {rank}")


def hang_on(rank: int, bad: int) -> None:
    if rank == bad:
        time.sleep(60)


def die_on(rank: int, bad: int) -> None:
    if rank == bad:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def setting(rank: int, name: str) -> str | None:
    return os.environ.get(name)


def leave_a_setting(rank: int, name: str) -> None:
    os.environ[name] = "left"


def draw(rank: int) -> float:
    return torch.rand(()).item()


def warn(rank: int) -> None:
    warnings.warn("planted warning", UserWarning, stacklevel=1)


def threads(rank: int) -> int:
    return torch.get_num_threads()


def unpicklable(rank: int) -> object:
    return lambda: rank


@pytest.mark.parametrize("size", [1, 2, 3])
def test_results_come_by_rank(world: Worlds, size: int) -> None:
    results = world(size)(total, 10)
    assert [r[1:3] for r in results] == [(rank, size) for rank in range(size)]
    assert all(r[3].item() == 10 * size + sum(range(size)) for r in results)


def test_the_pool_keeps_its_processes(world: Worlds) -> None:
    first, second = ([r[0] for r in world(2)(total, n)] for n in (0, 1))
    assert first == second
    assert len({*first, os.getpid()}) == 3


def test_run_takes_new_processes() -> None:
    first, second = ([r[0] for r in run(2, total, n)] for n in (0, 1))
    assert not set(first) & set(second)


def test_the_failing_rank_is_named_and_the_pool_recovers() -> None:
    with World(3) as three:
        before = three(total, 0)
        began = time.monotonic()
        with pytest.raises(RankFailed, match=r"(?s)fail_on failed on rank 1\n.*planted on 1") as caught:
            three(fail_on, 1)
        assert caught.value.ranks == (1,)
        assert time.monotonic() - began < 5
        after = three(total, 0)
    assert not {r[0] for r in before} & {r[0] for r in after}


def test_all_failing_ranks_are_told() -> None:
    with pytest.raises(RankFailed, match=r"(?s)fail_everywhere failed on ranks 0, 1\n.*planted on 1"):
        run(2, fail_everywhere)


def test_a_hang_is_reported_in_time_with_its_place() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"(?s)hang_on: rank 1 not done after 0.5 s.*in hang_on"):
        run(2, hang_on, 1, timeout=0.5)
    assert time.monotonic() - began < 10


def test_a_dead_rank_is_told_before_those_who_noticed() -> None:
    with pytest.raises(RankFailed, match=r"(?s)failed on .*\nrank 1: .* died with exit code -9") as caught:
        run(2, die_on, 1)
    assert caught.value.ranks[0] == 1


def test_no_process_is_left() -> None:
    pids = [r[0] for r in run(2, total, 0)]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_ranks_see_the_callers_environment(world: Worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_TEST", "set")
    assert world(2)(setting, "WORLD_TEST") == ["set", "set"]
    world(2)(leave_a_setting, "WORLD_TEST")
    monkeypatch.delenv("WORLD_TEST")
    assert world(2)(setting, "WORLD_TEST") == [None, None]


def test_every_call_draws_the_same(world: Worlds) -> None:
    first, second = world(2)(draw), world(2)(draw)
    assert first == second


def test_warnings_are_errors_in_ranks_as_here() -> None:
    with pytest.raises(RankFailed, match="UserWarning: planted warning"):
        run(1, warn)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert run(1, warn) == [None]


def test_cores_are_shared(world: Worlds) -> None:
    cores = len(os.sched_getaffinity(0))
    assert world(1)(threads) == [cores]
    assert world(3)(threads) == [max(1, cores // 3)] * 3


def test_partials_run_and_a_lambda_is_refused_before_any_rank_starts(world: Worlds) -> None:
    assert world(2)(partial(setting, name="WORLD_TEST")) == [None, None]
    with pytest.raises(Exception, match="pickle"), World(2) as two:
        two(lambda rank: rank)


def test_a_result_that_cannot_travel_is_told() -> None:
    with pytest.raises(RankFailed, match=r"(?s)unpicklable failed on rank 0\n.*pickle"):
        run(1, unpicklable)


def test_an_empty_world_is_refused() -> None:
    with pytest.raises(ValueError, match="a world of 0 ranks: size must be at least 1"):
        World(0)
