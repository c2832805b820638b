"""Hydra's multirun: each job in a process of its own, since a process group is made once a process."""

import subprocess
import sys

from .entry import BAD_INPUT, leave
from .job import Launch


def one_job(launch: Launch, overrides: list[str], folder: str) -> None:
    """Runs one job of the sweep and waits for it; a job that fails ends the sweep with its exit code."""
    if launch.world > 1:
        leave(
            BAD_INPUT,
            "error: --multirun starts its own processes: use python -m longspan.train, not torchrun",
            launch,
        )
    mine = [] if any(o.startswith(("run.dir=", "run.name=")) for o in overrides) else [f"run.dir={folder}"]
    done = subprocess.run([sys.executable, "-m", "longspan.train", *overrides, *mine], check=False)
    if done.returncode:
        sys.exit(done.returncode)
