"""What every entry point does around its work: one message for a user's mistake, and an exit code that says
what happened.

Exit codes: 0 done; 1 an error of ours or of the machine, with its traceback; 2 bad input: a setting that
cannot be or a file that cannot be used; 75 stopped by a signal after saving: start again to go on.
"""

import os
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from .agree import PeerError
from .config import hint

FAILED, BAD_INPUT = 1, 2
OTHERS_WAIT_S = 2.0


def entry(work: Callable[[], object], root: str, env: MutableMapping[str, str]) -> None:
    """Runs a function decorated with hydra.main; a config that cannot be composed gets one message with a
    'did you mean'.
    """
    env.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns while it is unset
    env["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them on every rank
    try:
        work()
    except (HydraException, OmegaConfBaseException) as error:
        leave(BAD_INPUT, f"error: {hint(error, sys.argv[1:], root)}", int(env.get("RANK", "0")))


def leave(code: int, message: str, rank: int) -> None:
    """Prints the message and exits. Other ranks than 0 wait first, so that rank 0 speaks for all and torchrun
    ends them; what only they know is told then.
    """
    if rank:
        time.sleep(OTHERS_WAIT_S)
    print(f"longspan: {f'rank {rank}: ' if rank else ''}{message}", file=sys.stderr, flush=True)
    sys.exit(code)


def guarded(work: Callable[[], int], rank: int) -> int:
    """Runs a job: what a user can mend becomes one line and exit code 2, anything else a traceback and exit
    code 1.
    """
    try:
        return work()
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or _ours(error):
            leave(BAD_INPUT, f"error: {_said(error)}", rank)
        traceback.print_exc()
    except PeerError as error:
        leave(FAILED, f"error: {error}", rank)
    except Exception:
        traceback.print_exc()
    sys.stderr.flush()
    # a failed rank may hold collectives that never end: leave without tearing the process group down
    os._exit(FAILED)


def _said(error: BaseException) -> str:
    """An instantiation error's own cause, without Hydra's frame around it."""
    return " ".join(str(error).split())


def _ours(error: BaseException) -> bool:
    """Whether our own code raised it on purpose, not a library somewhere below."""
    trace = traceback.extract_tb(error.__traceback__)
    return bool(trace) and Path(trace[-1].filename).resolve().is_relative_to(
        Path(__file__).resolve().parent.parent
    )
