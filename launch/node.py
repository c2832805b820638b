"""python -m longspan.launch.node ... -m longspan.train ...: torchrun that exits as its ranks did, and whose
ranks meet, with --standalone as its first word, where nobody else can reach them.

torchrun itself exits with 1 whatever they say, and a scheduler must tell a run that was stopped and saved
from one that failed; and it listens on all addresses of the machine.
"""

import os
import signal
import socket
import sys
from collections.abc import Iterable

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


def main() -> None:
    """Runs torchrun with the words of the command line."""
    words, store = sys.argv[1:], None
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
