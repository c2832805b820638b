"""Runs as SLURM jobs on two nodes: whole, preempted, cancelled, with a node that dies, as a sweep, and stuck.

`make slurm-test` runs it, on a cluster that it starts; docs/slurm.md has its log.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from longspan.launch.requeue import SCRIPT, STARTS, newest
from longspan.launch.submit import composed, plan, queue
from slurm_cluster import Cluster, cluster, missing, wait_for

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

STEPS = 40
COMMON = (
    "experiment=tiny", "track=none", f"train.steps={STEPS}", "checkpoint.every=20", "eval.final=2",
    "slurm.cpus=1", "slurm.time=20", "slurm.grace_s=60",
)  # fmt: skip
Losses = list[tuple[int, float]]


class Bench:
    """A cluster, and a folder that its jobs share."""

    def __init__(self, slurm: Cluster, folder: Path) -> None:
        self.slurm, self.folder = slurm, folder
        self.began = time.monotonic()

    def submit(self, name: str, *overrides: str) -> tuple[str, Path]:
        """The job's id and its run folder."""
        self.began = time.monotonic()
        given = (*COMMON, f"data.cache={self.folder / 'cache'}", f"run.dir={self.folder / name}", *overrides)
        work = plan(composed(given), datetime.now())
        return queue(work), work.folder

    def until(self, job: str, *states: str) -> dict[str, str]:
        """Waits until a job is in one of these states."""
        wait_for(f"{job} {states}", lambda: self.slurm.job(job)["JobState"] in states)
        return self.slurm.job(job)

    def told(self, scenario: str, what: str) -> None:
        """A row of the log."""
        print(f"| {scenario} | {what} | {time.monotonic() - self.began:.0f} |", flush=True)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with cluster(tmp_path_factory.mktemp("slurm")) as slurm, pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", slurm.env["SLURM_CONF"])
        folder = tmp_path_factory.mktemp("work")
        patch.chdir(folder)
        yield Bench(slurm, folder)


@pytest.fixture(scope="module")
def whole(bench: Bench) -> Losses:
    """The losses of a run on two nodes that nothing disturbs."""
    job, folder = bench.submit("whole", "slurm.nodes=2")
    assert bench.until(job, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log(folder)
    assert json.loads((folder / "run.json").read_text())["world"] == 2
    found = losses(folder)
    bench.told("two nodes", f"{len(found)} steps, exit code 0")
    return found


def losses(folder: Path) -> Losses:
    """Step and loss of each line of metrics.jsonl; empty before there is one."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(row["step"], row["loss"]) for row in rows]


def log(folder: Path) -> str:
    return "".join(path.read_text() for path in sorted(folder.glob("slurm-*.log")))


def reach(folder: Path, step: int) -> None:
    wait_for(f"step {step}", lambda: len(losses(folder)) >= step)


def from_steps(folder: Path) -> list[int]:
    """The steps that its starts began from."""
    return [int(n) for n in re.findall(r"longspan: (?:goes on from|starts at) step (\d+)", log(folder))]


def test_two_nodes_to_completion(whole: Losses) -> None:
    assert [step for step, _ in whole] == list(range(1, STEPS + 1))


def test_a_signal_saves_requeues_and_goes_on(bench: Bench, whole: Losses) -> None:
    job, folder = bench.submit("preempted", "slurm.nodes=2")
    reach(folder, 10)
    bench.slurm.command("scancel", "--signal=USR1", "--batch", job)
    wait_for("a second start", lambda: len(from_steps(folder)) == 2)
    first, second = from_steps(folder)
    done = bench.until(job, "COMPLETED", "FAILED")
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "1"), log(folder)
    assert "left with exit code 75" in log(folder)
    # where it was, not where the last regular checkpoint is
    assert first == 0 and second >= 10
    assert losses(folder) == whole
    bench.told("signal", f"saved at step {second}, exit code 75, queued again, losses bit-equal")


def test_scancel_saves_and_leaves_nothing_behind(bench: Bench, whole: Losses) -> None:
    job, folder = bench.submit("cancelled", "slurm.nodes=2")
    reach(folder, 10)
    with pytest.raises(ValueError, match=f"job {job} is queued or running there"):
        bench.submit("cancelled", "slurm.nodes=2")
    bench.slurm.command("scancel", job)
    assert bench.until(job, "CANCELLED", "COMPLETED", "FAILED", "PENDING")["Restarts"] == "0"
    wait_for("its processes end", lambda: not bench.slurm.running(folder))
    saved = newest(folder)
    assert saved >= 10 and bench.slurm.job(job)["JobState"] == "CANCELLED"
    bench.told("scancel", f"saved at step {saved}, cancelled, no process left")
    # the folder alone
    again = bench.slurm.command("sbatch", "--parsable", str(folder / SCRIPT))
    assert bench.until(again, "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log(folder)
    assert losses(folder) == whole
    bench.told("... and `sbatch job.sbatch`", f"went on from step {saved}, losses bit-equal")


def test_a_node_that_dies(bench: Bench, whole: Losses) -> None:
    job, folder = bench.submit("killed", "slurm.nodes=2")
    # past a regular checkpoint, which is what is left
    reach(folder, 25)
    bench.slurm.kill_node("n1")
    died = time.monotonic()
    wait_for("the requeue", lambda: bench.slurm.job(job)["Restarts"] != "0")
    noticed = time.monotonic() - died
    bench.slurm.start_node("n1")
    done = bench.until(job, "COMPLETED", "FAILED")
    assert done["JobState"] == "COMPLETED", log(folder)
    assert from_steps(folder)[-1] >= 20 and losses(folder) == whole
    back = f"went on from step {from_steps(folder)[-1]}, losses bit-equal"
    bench.told("killed node", f"queued again after {noticed:.0f} s, {back}")


def test_a_sweep_is_an_array(bench: Bench) -> None:
    job, folder = bench.submit(
        "sweep", "slurm.nodes=1", "parallel=single", "optim.lr=1e-3,3e-3", "train.steps=10"
    )
    for task in "01":
        assert bench.until(f"{job}_{task}", "COMPLETED", "FAILED")["JobState"] == "COMPLETED", log(folder)
    first, second = (losses(folder / task) for task in "01")
    assert len(first) == len(second) == 10 and first != second
    rates = [(folder / task / "config.yaml").read_text() for task in "01"]
    assert "lr: 0.001\n" in rates[0] and "lr: 0.003\n" in rates[1]
    bench.told("sweep", "an array of 2 jobs, a folder each, exit code 0")


def test_hydras_own_launcher_sweeps(bench: Bench) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    bench.began, root = time.monotonic(), bench.folder / "multirun"
    words = [word for word in COMMON if not word.startswith("slurm.")]
    words += ["parallel=single", "optim.lr=1e-3,3e-3", "train.steps=10", f"run.root={root}"]
    words += [
        f"data.cache={bench.folder / 'cache'}",
        "hydra/launcher=slurm",
        "hydra.launcher.cpus_per_task=1",
    ]
    env = bench.slurm.env | {"SUBMITIT_PREEMPT_SIGNAL": "USR1"}
    command = [sys.executable, "-m", "longspan.train", *words, "--multirun"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = (losses(next(root.glob(f"multirun-*/{number}"))) for number in (0, 1))
    assert len(first) == len(second) == 10 and first != second
    bench.told("hydra/launcher=slurm", "an array of 2 jobs by submitit, exit code 0")


def test_bad_input_is_not_queued_again(bench: Bench) -> None:
    job, folder = bench.submit("bad", "slurm.nodes=2", "data=text", "data.path=nowhere")
    done = bench.until(job, "FAILED", "COMPLETED")
    assert (done["JobState"], done["Restarts"], done["ExitCode"]) == ("FAILED", "0", "2:0"), log(folder)
    assert "data.path='nowhere' does not exist" in log(folder)
    bench.told("a path that is not there", "exit code 2, not queued again")


def test_a_job_that_gets_nowhere_stops(bench: Bench) -> None:
    job, folder = bench.submit("stuck", "slurm.nodes=2", "slurm.restarts=1", "checkpoint.every=0")
    for start in (1, 2):
        wait_for("a start", partial(started, folder, start))
        wait_for("a rank", lambda: bool(ranks(bench.slurm, folder)))
        os.kill(ranks(bench.slurm, folder)[0], signal.SIGKILL)
    done = bench.until(job, "FAILED", "COMPLETED")
    assert (done["JobState"], done["Restarts"]) == ("FAILED", "1"), log(folder)
    assert "stopped: no checkpoint after step 0 in 1 restarts" in log(folder)
    assert json.loads((folder / STARTS).read_text())["idle"] == 1
    bench.told(
        "a rank killed at each start, slurm.restarts=1", "queued again once, then exit code 137 and stop"
    )


def started(folder: Path, times: int) -> bool:
    return len(from_steps(folder)) == times


def ranks(slurm: Cluster, folder: Path) -> list[int]:
    """The processes of a run that train."""
    found = []
    for pid in slurm.running(folder):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"longspan.launch.node" not in words and b"--config-path" in words:
            found.append(pid)
    return found
