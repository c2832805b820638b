"""What every entry point does around its work: one message for a user's mistake, and an exit code that says
what happened.

Exit codes: 0 done; 1 an error of ours or of the machine, with its traceback; 2 bad input: a setting that
cannot be or a file that cannot be used; 75 stopped by a signal after saving: start again to go on; 130 left
at once by a second SIGINT. docs/reliability.md says which of them ask for a new start.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, MutableMapping
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from .agree import PeerError, one_line
from .config import hint
from .guard import Diverged
from .heartbeat import Hang
from .job import Launch
from .out_of_memory import OutOfMemory
from .preempt import EXIT_PREEMPTED

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
OTHERS_WAIT_S = 2.0


def entry(work: Callable[[], object], root: str, env: MutableMapping[str, str]) -> None:
    """Runs a function decorated with hydra.main; a config that cannot be composed gets one message with a
    'did you mean'.
    """
    env.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9 warns while it is unset
    env.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler tells stderr that it starts and stops
    env["HYDRA_FULL_ERROR"] = "1"  # Hydra hands its errors over instead of printing them on every rank
    try:
        work()
    except (HydraException, OmegaConfBaseException) as error:
        leave(BAD_INPUT, f"error: {hint(error, sys.argv[1:], root)}", Launch.of(env))


def leave(code: int, message: str, launch: Launch) -> NoReturn:
    """Prints the message and exits. Other ranks than 0 wait first, so that rank 0 speaks for all and torchrun
    ends them; what only they know is told then.
    """
    if launch.rank:
        time.sleep(OTHERS_WAIT_S)
    who = f"rank {launch.rank}: " if launch.rank else ""
    print(f"longspan: {who}{message}", file=sys.stderr, flush=True)
    _tell_torchrun(launch, message)
    sys.exit(code)


def guarded(work: Callable[[], int], launch: Launch) -> int:
    """Runs a job: what a user can mend becomes one line and exit code 2, anything else a traceback and exit
    code 1.
    """
    try:
        code = work()
        if code == EXIT_PREEMPTED:
            _tell_torchrun(launch, "stopped by a signal after saving: start it again to go on")
        return code
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) or _ours(error):
            leave(BAD_INPUT, f"error: {_said(error)}", launch)
        traceback.print_exc()
        _tell_torchrun(launch, one_line(error))
    except (PeerError, Diverged, OutOfMemory) as error:
        leave(FAILED, f"error: {error}", launch)
    except Hang as error:
        # one rank speaks for all that wait
        if error.first:
            print(f"longspan: error: {error}", file=sys.stderr)
        _tell_torchrun(launch, str(error))
    except KeyboardInterrupt:
        # the second Ctrl-C: a save that is still being written must not hold anybody back
        os._exit(INTERRUPTED)
    except Exception as error:
        traceback.print_exc()
        _tell_torchrun(launch, one_line(error))
    sys.stderr.flush()
    # a failed rank may hold collectives that never end: leave without tearing the process group down
    os._exit(FAILED)


def _tell_torchrun(launch: Launch, message: str) -> None:
    """Leaves the message where torchrun looks for the cause that its own report ends with."""
    path = (launch.env or {}).get("TORCHELASTIC_ERROR_FILE")
    if path:
        told = {"message": message, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": told}))


def _said(error: BaseException) -> str:
    """An instantiation error's own cause, without Hydra's frame around it."""
    return " ".join(str(error).split())


def _ours(error: BaseException) -> bool:
    """Whether our own code raised it on purpose, not a library somewhere below."""
    trace = traceback.extract_tb(error.__traceback__)
    return bool(trace) and Path(trace[-1].filename).resolve().is_relative_to(
        Path(__file__).resolve().parent.parent
    )
