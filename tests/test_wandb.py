"""A W&B run offline, read back from its file: every step once, over restarts too, and nothing that hangs."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imsave

from longspan.train.metrics import Metrics
from longspan.train.wandb_file import last_step, records


def items(found: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in found}


JOBS = """
import math, os, signal, sys, time
from pathlib import Path
from longspan.train.metrics import Metrics
from longspan.train.track import Wandb

def track(name, resume=False, **more):
    (folder := Path(name)).mkdir(exist_ok=resume)
    given = dict(project="tests", entity=None, group="pair", tags=["a", "b"], config={"model": {"width": 64}})
    given |= dict(mode="auto", run_dir=folder, name=name, resume=resume, env=os.environ)
    return folder, Wandb(**given | more)

folder, tracker = track("whole")
metrics = Metrics(folder / "metrics.jsonl", resume_step=None)
for step in range(1, 301):
    row = {"loss": 8 / math.sqrt(step), "grad_norm": 1 / step, "tokens": 64 * step, "tokens_per_s": 1e4}
    metrics.write(step, row)
    tracker.log(step, row)
tracker.picture("dot", Path("dot.png"))
tracker.summary({"bits_per_byte": 3.25})
tracker.finish(0)
print(tracker.mode, tracker.dropped)

# stopped after step 12 and started again from step 8, as part of a sweep, twice
for first, last in ((1, 12), (9, 20), (19, 24)):
    folder, tracker = track("again", resume=first > 1, group=None, sweep="lr", checkpoints=True)
    for step in range(first, last + 1):
        tracker.log(step, {"loss": float(step), "start": first})
        if step % 6 == 0:
            tracker.log(step, {"eval_loss": step / 2})
    tracker.table("evaluations", [{"step": 6, "eval_loss": 3.0}, {"step": 12, "eval_loss": 6.0}])
    (checkpoint := folder / "checkpoints" / f"step-{last:08d}").mkdir(parents=True)
    (checkpoint / "extra.json").write_text("{}")
    tracker.checkpoint(last, checkpoint)
    tracker.checkpoint(last - 1, folder / "checkpoints" / "gone")
    tracker.finish(75)

_, tracker = track("hung")
while tracker._done < 1:
    tracker.log(1, {"loss": 1.0})
    time.sleep(0.02)
import wandb
helper = wandb.setup()._connection._proc._process
os.kill(helper.pid, signal.SIGSTOP)
began = time.monotonic()
tracker.finish(0, timeout=0.5)
print(time.monotonic() - began, helper.pid)
"""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """Two jobs of one who is not logged in; in the second W&B's helper hangs: folder, stdout, stderr."""
    folder = tmp_path_factory.mktemp("jobs")
    imsave(folder / "dot.png", torch.eye(4).numpy())
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "NETRC"))} | {
        "HOME": str(folder)
    }
    command = [sys.executable, "-c", JOBS]
    # The time limit is part of the test: a process that waits for the helper never ends.
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout.split(), done.stderr


def test_wandb_offline_holds_the_losses_of_metrics(jobs: tuple[Path, list[str], str]) -> None:
    folder = jobs[0] / "whole"
    assert jobs[1][:2] == ["offline", "0"]
    number = (folder / "wandb_id.txt").read_text().strip()
    (file,) = folder.glob(f"wandb/offline-run-*/run-{number}.wandb")
    found: dict[str, list[Any]] = {"history": [], "run": [], "summary": []}
    for record in records(file):
        if (kind := record.WhichOneof("record_type")) in found:
            found[kind].append(getattr(record, kind))
    history = [items(row.item) for row in found["history"]]
    config, summary, (run, *_) = dict[str, Any](), dict[str, Any](), found["run"]
    for part in found["run"]:
        config |= items(part.config.update)
    for part in found["summary"]:
        summary |= items(part.update)
    kept = {row["step"]: row["loss"] for row in Metrics.read(folder / "metrics.jsonl")}
    assert [(row["step"], row["loss"]) for row in history] == list(kept.items()) and len(kept) == 300
    assert history[-1]["dot._type"] == "image-file"
    assert [run.project, run.run_group, run.display_name] == ["tests", "pair", "whole"]
    assert list(run.tags) == ["a", "b"] and config["model"] == {"width": 64} and "git" in config
    assert summary["bits_per_byte"] == 3.25


def test_a_run_that_is_started_again_has_every_step_once(jobs: tuple[Path, list[str], str]) -> None:
    folder = jobs[0] / "again"
    number = (folder / "wandb_id.txt").read_text().strip()
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 3 and {file.name for file in files} == {f"run-{number}.wandb"}
    told = [(record.WhichOneof("record_type"), record) for file in files for record in records(file)]
    rows = [items(record.history.item) for kind, record in told if kind == "history"]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == list(range(1, 25)) and len(rows) == len(steps)
    # each step is that of the start that reached it first: W&B takes nothing back
    assert [row["start"] for row in rows] == [1] * 12 + [9] * 8 + [19] * 4
    assert [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row] == [
        (6, 3.0), (12, 6.0), (18, 9.0), (24, 12.0),
    ]  # fmt: skip
    runs = [record.run for kind, record in told if kind == "run"]
    assert {(run.run_id, run.run_group, run.display_name) for run in runs} == {(number, "lr", "lr/again")}
    assert last_step(folder / "wandb", number) == 24 and last_step(folder / "wandb", "other") == -1


def test_checkpoints_are_references_and_evaluations_tables(jobs: tuple[Path, list[str], str]) -> None:
    folder = jobs[0] / "again"
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    found = [record for record in records(files[0])]
    logged = [r.artifact for r in found if r.WhichOneof("record_type") == "artifact"]
    (artifact,) = [each for each in logged if each.type == "checkpoint"]
    assert set(artifact.aliases) == {"latest", "step-12"}
    (entry,) = artifact.manifest.contents
    assert entry.path == "step-00000012/extra.json" and not entry.local_path
    assert entry.ref == (folder / "checkpoints" / "step-00000012" / "extra.json").absolute().as_uri()
    assert json.loads(artifact.metadata) == {"step": 12}
    last = items([r for r in found if r.WhichOneof("record_type") == "history"][-1].history.item)
    assert last["evaluations._type"] == "table-file" and last["evaluations.nrows"] == 2


def test_a_torn_file_of_wandb_ends_where_it_is_torn(
    jobs: tuple[Path, list[str], str], tmp_path: Path
) -> None:
    (file,) = (jobs[0] / "whole").glob("wandb/offline-run-*/*.wandb")
    data = file.read_bytes()
    torn = tmp_path / "offline-run-1-abc" / "run-abc.wandb"
    torn.parent.mkdir()
    for cut in (len(data) - 3, len(data) // 2, 40_000):
        torn.write_bytes(data[:cut])
        whole = [r for r in records(torn)]
        assert whole == [r for r in records(file)][: len(whole)]
    assert 0 < last_step(tmp_path, "abc") < 300
    torn.write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="run-abc.wandb is no file of W&B's"):
        list(records(torn))
    assert last_step(tmp_path, "abc") == -1


def lives(pid: str) -> bool:
    """Whether the process runs or is stopped; dead, but not yet reaped by its new parent, does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_hung_wandb_helper_does_not_keep_the_process(jobs: tuple[Path, list[str], str]) -> None:
    seconds, helper = jobs[1][2:]
    assert float(seconds) < 1.5
    deadline = time.monotonic() + 10
    while (alive := lives(helper)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive
    # And W&B printed nothing of its own, neither here nor for the job that went well.
    warning = r"wandb did not end within 0\.5 s, lost \d+ of \d+ records; metrics.jsonl has everything\n"
    assert re.fullmatch(warning, jobs[2])
