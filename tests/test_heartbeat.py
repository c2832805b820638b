"""What ranks say of themselves, and the one line about the one that does not answer."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from jobs import config
from longspan.parallel.comm import Traffic, exchange, post
from longspan.train import heartbeat
from longspan.train.agree import PeerError
from longspan.train.heartbeat import REPORT, Hang, Heartbeat, unanswered, watched
from longspan.train.job import check_numbers
from longspan.train.preempt import Preempt
from longspan.train.pulse import Beat, Pulse, hang_line, numbering
from world import Worlds

HERE = socket.gethostname()
FAR = "another-host"
# a process that never was
NOBODY = 2**22 + 7
COLLECTED = time.time()


def beat(rank: int, host: str = FAR, pid: int = 1, step: int = 7, phase: str = "backward", doing: str = "",
         ago: float = 1.0, failed: str = "") -> Beat:  # fmt: skip
    return Beat(rank, host, pid, step, phase, doing, time.time() - ago, failed, numbering())


@pytest.mark.parametrize(
    ("beats", "said"),
    [
        (
            [beat(0, phase="reduce", doing="all-reduce of the loss"), beat(1, ago=40, doing="all-to-all")],
            "rank 1 (another-host, process 1) has not been heard of for 40 s; it was in step 7, backward "
            "(all-to-all); rank 0 in step 7, reduce (all-reduce of the loss)",
        ),
        (
            [beat(0), beat(1, failed="no room"), beat(2)],
            "rank 1 (another-host, process 1) failed: no room; it was in step 7, backward; ranks 0, 2 in "
            "step 7, backward",
        ),
        (
            [beat(0), beat(1, HERE, NOBODY), beat(2), beat(3, step=6, phase="data")],
            f"rank 1 ({HERE}, process {NOBODY}) has died; when last heard of, 1 s before, it was in step "
            f"7, backward; ranks 0, 2 in step 7, backward; rank 3 in step 6, data",
        ),
        (
            [beat(0, phase="reduce"), beat(1, phase="data", ago=9), beat(2, phase="reduce")],
            "all ranks are alive, rank 1 (another-host) furthest behind; ranks 0, 2 in step 7, reduce; "
            "rank 1 in step 7, data",
        ),
        (
            [beat(0, phase="record"), beat(1, phase="agree"), beat(2, step=8, phase="data")],
            f"all ranks are alive, rank 0 ({FAR}) furthest behind; rank 0 in step 7, record; "
            f"rank 1 in step 7, agree; rank 2 in step 8, data",
        ),
        ([beat(0), beat(2), beat(3)], "rank 1 has left no sign; ranks 0, 2-3 in step 7, backward"),
        # who has come to the end is not missed
        (
            [beat(0), beat(1, HERE, NOBODY, phase="end", ago=99)],
            f"all ranks are alive, rank 0 ({FAR}) furthest behind; rank 0 in step 7, backward; "
            f"rank 1 in step 7, end",
        ),
    ],
)
def test_the_line_names_who_is_lost_and_where_the_others_wait(beats: list[Beat], said: str) -> None:
    # they were made when the tests were collected, maybe minutes ago
    late = time.time() - COLLECTED
    beats = [replace(b, at=b.at + late) for b in beats]
    # a file that has not changed since it was written, by a clock that is this one's
    lost = {b.rank: wrong for b in beats[1:] if (wrong := b.lost(time.time() - b.at, 15.0))}
    ranks = max(b.rank for b in beats) + 1
    assert hang_line(beats, lost, 0, ranks) == said
    cause = "Timed out waiting 1000ms"
    alone = not lost and len(beats) == ranks
    assert hang_line(beats, lost, 0, ranks, cause) == (f"{said}; {cause}" if alone else said)


def test_a_stopped_process_is_told_from_a_busy_one() -> None:
    child = os.fork()
    if not child:
        time.sleep(20)
        os._exit(0)
    try:
        found = beat(1, HERE, child, ago=33)
        assert found.lost(99.0, 15.0) == ""
        os.kill(child, signal.SIGSTOP)
        os.waitpid(child, os.WUNTRACED)
        assert found.lost(0.0, 99.0) == (
            "has not been heard of for 33 s, since its process is stopped (SIGCONT lets it go on); it was in "
            "step 7, backward"
        )
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert found.lost(0.0, 99.0) == "has died; when last heard of, 33 s before, it was in step 7, backward"
    # in a container with the machine's name and numbers of its own, it may be alive
    assert replace(found, numbering="another").lost(1.0, 99.0) == ""
    assert replace(found, numbering="").lost(1.0, 99.0) == ""


def test_what_is_no_beat_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rank0.json"
    assert Beat.read(path) is None
    for text in ("", "{", "[]", '{"rank": 0}'):
        path.write_text(text)
        assert Beat.read(path) is None


def test_the_phases_of_a_lap() -> None:
    ticks = iter(range(10))
    pulse = Pulse(lambda: float(next(ticks)))
    for phase in ("data", "forward", "data", "forward"):
        pulse.enter(phase)
    assert pulse.lap() == {"start": 1.0, "data": 2.0, "forward": 1.0}
    assert pulse.lap() == {}


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (RuntimeError("Timed out waiting 1000ms for recv operation to complete"), True),
        (RuntimeError("[...] Connection closed by peer [127.0.0.1]:1"), True),
        (dist.DistBackendError("NCCL"), True),
        (RuntimeError("shape mismatch"), False),
        (RuntimeError("reading the corpus timed out"), False),
        (PeerError("rank 1: Connection closed by peer"), False),
        (ValueError("timed out"), False),
    ],
)
def test_which_errors_are_of_a_collective(error: Exception, is_one: bool) -> None:
    assert unanswered(error) == is_one
    try:
        raise KeyError("behind it") from error
    except KeyError as behind:
        assert unanswered(behind) == is_one


def waiting(rank: int) -> list[str]:
    """What a part of a layout says to the whole while it waits for messages and for an all-to-all."""
    whole, seen = Traffic(), list[str]()
    part, group, x = Traffic(whole, (0, 1)), dist.group.WORLD, torch.zeros(2)
    assert group is not None
    given = {name: getattr(dist, name) for name in ("batch_isend_irecv", "all_to_all_single")}

    def noted(name: str) -> Any:
        def call(*words: Any, **named: Any) -> Any:
            seen.append(whole.doing)
            return given[name](*words, **named)

        return call

    with patch.multiple(dist, **{name: noted(name) for name in given}):
        pending = post(group, [(x[:1], 1 - rank)], [(x[1:], 1 - rank)], part)
        works = [SimpleNamespace(wait=lambda: seen.append(whole.doing)), *pending._works]
        pending._works = works  # type: ignore[assignment]
        pending.wait()
        exchange(group, x, [1, 1], [1, 1], part)
    return [*seen, part.doing]


def test_what_a_transfer_waits_for_is_said_while_it_does(world: Worlds) -> None:
    for rank, said in enumerate(world(2)(waiting)):
        sent = f"sends and receives, ranks [{1 - rank}] of a group of 2"
        assert said == ["", sent, "all-to-all of a group of 2", ""]


def silent(rank: int, folder: Path) -> tuple[str, bool, dict[str, object]]:
    """What rank 0 raises when rank 1 stays away from a collective, and rank 1's file meanwhile."""
    group = dist.new_group([0, 1], timeout=timedelta(seconds=1.5))
    pulse, traffic = Pulse(), Traffic()
    pulse.step = 4
    pulse.enter("data")
    with Preempt() as signals:
        try:
            with watched(folder, pulse, traffic, signals, every_s=0.2, timeout_s=60.0):
                if rank:
                    deadline = time.monotonic() + 20
                    while not (folder / REPORT).exists() and time.monotonic() < deadline:
                        time.sleep(0.05)
                else:
                    pulse.enter("reduce", "all-reduce of the loss")
                    dist.all_reduce(torch.zeros(1), group=group)
        except Hang as error:
            return str(error), error.first, json.loads((folder / "rank1.json").read_text())
    return "", False, json.loads((folder / "rank1.json").read_text())


def test_a_collective_that_is_not_answered_says_who_is_behind(world: Worlds, tmp_path: Path) -> None:
    (said, first, then), (_, _, after) = world(2)(silent, tmp_path)
    assert said.startswith(
        f"all ranks are alive, rank 1 ({HERE}) furthest behind; rank 0 in step 4, reduce (all-reduce of the "
        f"loss); rank 1 in step 4, data; RuntimeError: "
    )
    assert "Timed out waiting" in said.rpartition("data; ")[2]
    assert first and (tmp_path / REPORT).read_text() == said + "\n"
    assert (then["phase"], after["phase"], after["step"]) == ("data", "end", 4)
    assert set(after) == {"rank", "host", "pid", "step", "phase", "doing", "at", "failed", "numbering"}


@contextmanager
def two_ranks() -> Iterator[None]:
    """This process takes itself for rank 0 of two."""
    with patch.object(dist, "get_rank", lambda: 0), patch.object(dist, "get_world_size", lambda *_: 2):
        yield


def left(folder: Path, failed: str = "", ago: float = 0.0, step: int = 7) -> None:
    """The file that another rank left."""
    folder.mkdir(exist_ok=True)
    found = replace(beat(1, ago=ago, failed=failed, step=step), numbering="")
    part = folder / "left.part"
    part.write_text(json.dumps(vars(found)))
    part.replace(folder / "rank1.json")


def test_who_stands_still_for_too_long_is_told_while_it_waits(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on NCCL, which ends the process by itself."""
    pulse = Pulse()
    pulse.enter("backward")
    # the other clock is far ahead
    left(tmp_path, ago=-4000)
    with two_ranks(), Preempt() as signals, patch.object(heartbeat, "SILENCE_S", 1.0):
        with watched(tmp_path, pulse, Traffic(), signals, every_s=0.05, timeout_s=0.3):
            wait(lambda: (tmp_path / REPORT).exists())
            # it was told too early
            pulse.enter("reduce")
            wait(lambda: not (tmp_path / REPORT).exists())
            pulse.enter("evaluate")
            time.sleep(0.5)
        assert not (tmp_path / REPORT).exists()
    said = capfd.readouterr().err
    assert (
        said.count("longspan: rank 1 (another-host, process 1) has not been heard of for 1 s; it was in") == 1
    )
    assert said.count("\n") == 1


@pytest.mark.parametrize("ago", [-4000.0, 4000.0])
def test_a_rank_of_another_machine_is_alive_while_its_file_changes(tmp_path: Path, ago: float) -> None:
    """Whatever its clock says."""
    with two_ranks(), Preempt() as signals, patch.object(heartbeat, "SILENCE_S", 0.5):
        mine = Heartbeat(tmp_path, Pulse(), Traffic(), signals, every_s=0.1, timeout_s=60.0)
        left(tmp_path, ago=ago)
        mine.read()
        time.sleep(0.2)
        left(tmp_path, ago=ago, step=8)
        line, first = mine.report("Connection closed by peer")
        assert first and line.startswith("all ranks are alive, ")
        assert line.endswith("; Connection closed by peer")
        time.sleep(0.25)
        began = time.monotonic()
        assert mine.report()[0].startswith("rank 1 (another-host, process 1) has not been heard of for ")
        # it was waited for until it could be told
        assert 0.1 < time.monotonic() - began < 5.0


def test_two_threads_write_one_file(tmp_path: Path) -> None:
    with two_ranks(), Preempt() as signals, patch.object(heartbeat, "suppress", lambda *_: nullcontext()):
        mine = Heartbeat(tmp_path, Pulse(), Traffic(), signals, every_s=0.1, timeout_s=60.0)
        failed = list[OSError]()

        def write() -> None:
            for _ in range(200):
                try:
                    mine.write()
                except OSError as error:
                    failed.append(error)

        threads = [threading.Thread(target=write) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failed


def test_who_waits_for_a_failed_rank_leaves_when_it_is_asked_to(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """torchrun sends SIGTERM to the others and kills them after 30 s; its handler cannot run while the main
    thread waits in a collective.
    """
    pulse, codes = Pulse(), list[int]()
    pulse.enter("backward")
    left(tmp_path, failed="no room")
    with (
        two_ranks(),
        patch.object(heartbeat, "PATIENCE_S", 0.1),
        patch("os._exit", codes.append),
        Preempt() as signals,
        watched(tmp_path, pulse, Traffic(), signals, every_s=0.05, timeout_s=60.0),
    ):
        time.sleep(0.3)
        assert not codes
        os.kill(os.getpid(), signal.SIGTERM)
        wait(lambda: bool(codes))
    assert codes[0] == 1
    assert "longspan: rank 1 (another-host, process 1) failed: no room; it was in" in capfd.readouterr().err


def test_an_error_is_left_for_the_others(tmp_path: Path) -> None:
    pulse = Pulse()
    with (
        two_ranks(),
        Preempt() as signals,
        pytest.raises(ArithmeticError),
        watched(tmp_path, pulse, Traffic(), signals, every_s=5.0, timeout_s=60.0),
    ):
        raise ArithmeticError("as planned")
    found = Beat.read(tmp_path / "rank0.json")
    assert found is not None and found.lost(0.0, 15.0).startswith("failed: ArithmeticError: as planned; ")


def test_without_heartbeats_there_is_no_file_and_less_than_none_is_refused(tmp_path: Path) -> None:
    with (
        Preempt() as signals,
        watched(tmp_path / "a", Pulse(), Traffic(), signals, every_s=0.0, timeout_s=60.0),
    ):
        assert all(thread.name != "heartbeat" for thread in threading.enumerate())
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"^heartbeat_s is -1\.0; it must be at least 0$"):
        check_numbers(config("heartbeat_s=-1"))


def test_a_signal_is_heard_beside_its_handler() -> None:
    with Preempt() as signals:
        assert signals.heard(0.0) == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.heard(1.0) == signal.SIGUSR1 and signals.heard(0.0) == 0
        signals.wake()
        assert signals.heard(1.0) == 0
        assert signals.agreed() == signal.SIGUSR1


def wait(for_: Callable[[], bool]) -> None:
    """Until it is so; 10 s at most."""
    deadline = time.monotonic() + 10
    while not for_():
        assert time.monotonic() < deadline
        time.sleep(0.01)
