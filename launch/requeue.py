"""Whether a SLURM job may start, and start again: what the batch script asks with python -m
longspan.launch.requeue start|end FOLDER ...

starts.json in the run folder holds the job, the step of its newest checkpoint when it last started, and how
often it has started in a row without a newer one. Exit code 0 is go on, 1 is stop; either says why.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..train.entry import BAD_INPUT, FAILED
from ..train.record import write_json
from ..train.shelf import Shelf

STARTS = "starts.json"
SCRIPT = "job.sbatch"


class Stop(Exception):
    """The job should not go on; the message says why."""


def start(folder: Path, job: str, most: int, others: list[str]) -> str:
    """Notes that `job` starts in this run folder, and returns what it starts from, in words.

    most: restarts in a row without a newer checkpoint; others: ids of jobs that run here already. Raises Stop
    if the first are used up, or if there are any of the second. A job that was submitted anew counts from 0.
    """
    if others:
        raise Stop(f"job {', '.join(others)} is running in {folder}: two would write over each other")
    before, step = _noted(folder), newest(folder)
    stuck = before is not None and before["job"] == job and step <= before["step"]
    idle = before["idle"] + 1 if before is not None and stuck else 0
    write_json(folder / STARTS, {"job": job, "step": step, "idle": idle})
    if idle > most:
        raise Stop(_used_up(step, most))
    return f"goes on from step {step}" if step else "starts at step 0"


def end(folder: Path, code: int, most: int) -> str:
    """Why the job that left with `code` is queued again, in words. Raises Stop if it would get no further."""
    before, step = _noted(folder), newest(folder)
    if code == BAD_INPUT:
        raise Stop("a setting or a file cannot be used, which another start would not mend")
    if before is not None and step <= before["step"] and before["idle"] >= most:
        raise Stop(_used_up(step, most))
    return f"queued again, to go on from step {step}"


def _used_up(step: int, most: int) -> str:
    return (
        f"no checkpoint after step {step} in {most} restarts (slurm.restarts): mend what the log shows, then "
        f"submit it again"
    )


def newest(folder: Path) -> int:
    """The step of the newest checkpoint in a run folder that has all its files; 0 if there is none."""
    entries = Shelf(folder / "checkpoints", keep=1).entries()
    return max((entry.step for entry in entries if entry.complete), default=0)


def _noted(folder: Path) -> dict[str, Any] | None:
    path = folder / STARTS
    return json.loads(path.read_text()) if path.is_file() else None


def queued(script: Path, states: str = "pending,running,suspended") -> list[str]:
    """The ids of this user's jobs in these states that were made by submitting `script`; an array has one.

    Empty where squeue does not answer.
    """
    asked = ["squeue", "--me", "--noheader", f"--states={states}", "--format=%F %o"]
    try:
        told = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    jobs = (line.split(" ", 1) for line in told.splitlines())
    return sorted({job for job, command in jobs if Path(command) == script})


def main(words: list[str], env: Mapping[str, str]) -> int:
    """Answers the batch script; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m longspan.launch.requeue", description=__doc__)
    parser.add_argument("when", choices=("start", "end"))
    parser.add_argument("folder", type=Path, help="the run folder")
    parser.add_argument("--job", default="", help="the id of the job")
    parser.add_argument("--restarts", type=int, required=True, help="restarts without a newer checkpoint")
    parser.add_argument("--code", type=int, default=FAILED, help="the exit code that the ranks left with")
    given = parser.parse_args(words)
    try:
        if given.when == "end":
            said = end(given.folder, given.code, given.restarts)
        else:
            array = env.get("SLURM_ARRAY_JOB_ID")
            script = (given.folder.parent if array else given.folder) / SCRIPT
            others = set(queued(script, "running,suspended")) - {array or env.get("SLURM_JOB_ID", "")}
            said = start(given.folder, given.job, given.restarts, sorted(others))
    except (Stop, OSError) as error:
        print(f"longspan: stopped: {error}", flush=True)
        return FAILED
    print(f"longspan: {said}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
