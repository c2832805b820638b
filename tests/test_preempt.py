import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

import pytest

from longspan.launch.node import children, passed_on
from longspan.train.preempt import EXIT_PREEMPTED, SIGNALS, Preempt
from world import Worlds


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_sets_the_flag_and_the_old_handler_comes_back(number: signal.Signals) -> None:
    got: list[int] = []
    old = signal.signal(number, lambda number, frame: got.append(number))
    try:
        with Preempt() as preempt:
            assert preempt.agreed() is None
            os.kill(os.getpid(), number)
            # It stays set: the run may ask again.
            assert [preempt.agreed(), preempt.agreed()] == [number, number]
        assert got == []
        os.kill(os.getpid(), number)
        assert got == [number]
    finally:
        signal.signal(number, old)


def test_the_second_interrupt_lets_a_user_leave() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(KeyboardInterrupt), Preempt() as preempt:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert preempt.agreed() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_the_exit_code_asks_to_try_again() -> None:
    assert EXIT_PREEMPTED == os.EX_TEMPFAIL


def told(rank: int, at: dict[int, dict[int, int]]) -> list[int | None]:
    """What a rank hears in four steps; `at` says which rank gets which signal before which step."""
    heard = []
    with Preempt() as preempt:
        for step in range(4):
            if step in at.get(rank, {}):
                os.kill(os.getpid(), at[rank][step])
            heard.append(preempt.agreed())
    return heard


def test_all_ranks_agree_when_one_was_told(world: Worlds) -> None:
    usr1, term = int(signal.SIGUSR1), int(signal.SIGTERM)
    assert world(2)(told, {}) == [[None] * 4] * 2
    assert world(2)(told, {1: {1: usr1}}) == [[None, usr1, usr1, usr1]] * 2
    assert world(2)(told, {0: {2: usr1}, 1: {1: usr1, 3: term}}) == [[None, usr1, usr1, term]] * 2


def ready_late(gate: tuple[int, int]) -> int:
    """A rank that takes its time to start, and then waits for a signal: its exit code."""
    # as in a program that was started, and not forked
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    os.close(gate[1])
    os.read(gate[0], 1)
    with Preempt() as preempt:
        # it lets in what the main thread lets in now
        Thread(target=time.sleep, args=(20,), daemon=True).start()
        end = time.monotonic() + 10
        while preempt.agreed() is None and time.monotonic() < end:
            time.sleep(0.01)
        code = EXIT_PREEMPTED if preempt.agreed() == signal.SIGUSR1 else 1
    os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.02)
    return code


def launcher(gate: tuple[int, int]) -> int:
    """Two ranks, and what they have in common; 1 if a program that knows of no signal does not live."""
    with passed_on(signal.SIGUSR1):
        if subprocess.run(["sh", "-c", "kill -USR1 $$"], check=False).returncode:
            return 1
        ranks = [forked(lambda: ready_late(gate)) for _ in range(2)]
        os.close(gate[1])
        codes = {os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks}
    os.kill(os.getpid(), signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
    return codes.pop() if len(codes) == 1 else 1


def forked(work: Callable[[], int]) -> int:
    """A process that does this and exits with what it gives."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return pid


def held_back(pid: int) -> bool:
    """Whether SIGUSR1 waits for this process."""
    told = Path(f"/proc/{pid}/status").read_text()
    return bool(int(told.split("ShdPnd:")[1].split()[0], 16) >> (signal.SIGUSR1 - 1) & 1)


def until(fact: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not fact():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_launcher_tells_its_ranks_even_before_they_listen() -> None:
    gate = os.pipe()
    pid = forked(lambda: launcher(gate))
    try:
        until(lambda: len(children(pid)) == 2)
        ranks = children(pid)
        os.kill(pid, signal.SIGUSR1)
        until(lambda: all(map(held_back, ranks)))
        os.write(gate[1], b"go")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == EXIT_PREEMPTED
    finally:
        # ranks that still wait for it go on
        for end in gate:
            os.close(end)
