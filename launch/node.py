"""python -m longspan.launch.node ... -m longspan.train ...: torchrun that exits as its ranks did, and whose
ranks meet, with --standalone as its first word, where nobody else can reach them. It gives its ranks SIGUSR1.

torchrun itself exits with 1 whatever they say, and a scheduler must tell a run that was stopped and saved
from one that failed; it listens on all addresses of the machine, and dies of SIGUSR1.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

from torch.distributed import DistError, TCPStore, run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..train.preempt import EXIT_PREEMPTED

HERE, LOOPBACK = "127.0.0.1", "lo"
WAITING = 2048  # connections that the system holds until they are answered


def exit_code(codes: Iterable[int]) -> int:
    """What stands for the exit codes of a node's ranks, the first that failed first; a signal that killed
    one is -number, and 128 + number here.

    When one leaves, torchrun ends the others with SIGTERM, which may have saved or said the cause before.
    """
    codes = list(codes)
    if EXIT_PREEMPTED in codes:
        return EXIT_PREEMPTED
    first = next((code for code in codes if code != -signal.SIGTERM), codes[0])
    return first if first >= 0 else 128 - first


def loopback() -> tuple[TCPStore, list[str]]:
    """A store that this machine alone can reach, to be held while torchrun runs in this process, and the
    words that send torchrun there.
    """
    with socket.socket() as door:
        door.bind((HERE, 0))
        door.listen(WAITING)
        port = door.getsockname()[1]
        # both are multi-tenant: asked for a store at this port, torchrun gets this one, and opens none
        store = TCPStore(
            HERE, port, 1, True, wait_for_workers=False, multi_tenant=True, master_listen_fd=door.detach()
        )
    return store, ["--nnodes=1", "--node-rank=0", f"--master-addr={HERE}", f"--master-port={port}"]


def children(pid: int) -> list[int]:
    """The processes that a process has started and that are there; none where there is no /proc."""
    found: list[int] = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        # a thread that has just ended has none
        with suppress(OSError):
            found += map(int, path.read_text().split())
    return found


@contextmanager
def passed_on(number: signal.Signals) -> Iterator[None]:
    """Meanwhile this process gives the signal to those that it has started, or else to the first that it will
    start; afterwards it ignores it.

    They are started with the signal held back: one that is not ready for it yet neither dies of it nor loses
    it, but hears it when it listens (`Preempt`). For the main thread of a process that ends with it.
    """
    ear, mouth = os.pipe()
    os.set_blocking(mouth, False)

    def work() -> None:
        # some thread must let it in
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        while came := os.read(ear, 64):
            if number not in came:
                continue
            while not (started := children(os.getpid())):
                time.sleep(0.1)
            for pid in started:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)

    # handlers run in the main thread, which may be waiting for something; the number is written at once
    signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
    signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    Thread(target=work, name="signals", daemon=True).start()
    try:
        yield
    finally:
        # Python takes its handlers away before it ends, and the process would die of one that comes late
        signal.signal(number, signal.SIG_IGN)


def main() -> None:
    """Runs torchrun with the words of the command line."""
    with passed_on(signal.SIGUSR1):
        run_torchrun(sys.argv[1:])


def run_torchrun(words: list[str]) -> None:
    """Runs it, and exits as its ranks did if they failed."""
    store = None
    try:
        if words[:1] == ["--standalone"]:
            store, there = loopback()
            words[:1] = there
            if LOOPBACK in (name for _, name in socket.if_nameindex()):
                # else gloo listens at the address of the host's name
                os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
        run.main(words)
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        code = exit_code(failure.exitcode for failure in failures)
        if code != EXIT_PREEMPTED:
            print(error, file=sys.stderr, flush=True)
        sys.exit(code)
    except SignalException as error:
        print(f"longspan: {error}", file=sys.stderr, flush=True)
        sys.exit(128 + int(error.sigval))
    except DistError as error:
        sys.exit(f"longspan: error: the ranks cannot meet: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
