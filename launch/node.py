"""python -m longspan.launch.node ... -m longspan.train ...: torchrun that exits as its ranks did.

torchrun itself exits with 1 whatever they say, and a scheduler must tell a run that was stopped and saved
from one that failed.
"""

import signal
import sys
from collections.abc import Iterable

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from ..train.preempt import EXIT_PREEMPTED


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


def main() -> None:
    """Runs torchrun with the words of the command line."""
    try:
        run.main(sys.argv[1:])
    except ChildFailedError as error:
        failures = sorted(error.failures.values(), key=lambda failure: failure.timestamp)
        code = exit_code(failure.exitcode for failure in failures)
        if code != EXIT_PREEMPTED:
            print(error, file=sys.stderr, flush=True)
        sys.exit(code)
    except SignalException as error:
        print(f"longspan: {error}", file=sys.stderr, flush=True)
        sys.exit(128 + int(error.sigval))


if __name__ == "__main__":
    main()
