import os
import signal

import pytest

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
