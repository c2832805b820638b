"""Leaving in time: signals that ask a run to stop, agreed on by all ranks at the end of a step."""

import signal
import socket
from types import FrameType, TracebackType
from typing import Any

import torch.distributed as dist

from .agree import highest

# sysexits' EX_TEMPFAIL, "try again later": what a scheduler's requeue rule looks for.
EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Preempt:
    """Between `with` and its end, SIGTERM, SIGINT and SIGUSR1 only set a flag, which `agreed` reads.

    A run that is told to stop finishes its step, saves and exits with EXIT_PREEMPTED (75), so that a
    scheduler can tell it from a failure and start it again. A second SIGINT raises KeyboardInterrupt, so that
    a user can leave at once. The main thread enters and leaves it; then the handlers from before are back.
    A signal that was held back until then, as launch.node starts its ranks, is heard at once, and ignored
    afterwards: a process that is ending does not die of it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """group: the ranks that must agree, gloo or NCCL; None: all."""
        self._group = group
        self._alone = not dist.is_initialized() or dist.get_world_size(group) == 1
        self._received = 0
        self._interrupted = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Preempt":
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        for number in SIGNALS:
            before = signal.signal(number, self._handle)
            self._before[number] = signal.SIG_IGN if number in held_back else before
        self._ear, self._mouth = socket.socketpair()
        self._mouth.setblocking(False)
        self._before_fd = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        self._before_mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # before the handlers: what comes now may end a process that does not handle it
        signal.pthread_sigmask(signal.SIG_SETMASK, self._before_mask)
        for number, handler in self._before.items():
            # None is a handler that Python did not install and cannot restore.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(self._before_fd)
        self._ear.close()
        self._mouth.close()

    def heard(self, seconds: float) -> int:
        """Waits so long at most for a signal, and returns its number, or 0. For another thread than the main
        one, whose handlers do not run while it waits in a collective.
        """
        self._ear.settimeout(seconds)
        try:
            return max(self._ear.recv(64), default=0)
        except (TimeoutError, BlockingIOError):
            return 0

    def wake(self) -> None:
        """Ends a `heard` that waits."""
        self._mouth.send(b"\0")

    def agreed(self) -> int | None:
        """The number of the signal that any rank got, the highest if several did, or None.

        All ranks call it, once a step, and get the same answer, from one all-reduce of one number.
        """
        if self._alone:
            return self._received or None
        return highest(self._received, self._group) or None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            if self._interrupted:
                raise KeyboardInterrupt
            self._interrupted = True
        self._received = max(self._received, number)
