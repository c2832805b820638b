"""Submitting: the batch script, the config that ranks read, what is refused, and when a job starts again."""

import datetime
import json
import os
import signal
import subprocess
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir, initialize_config_module
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from longspan.launch import requeue, submit
from longspan.launch.node import exit_code
from longspan.launch.requeue import SCRIPT, Stop, newest
from longspan.launch.slurm import Slurm, rendered
from longspan.launch.submit import CONFIG, Plan, composed, expanded, plan, write
from longspan.train.config import ConfigError, hint, typed
from longspan.train.shelf import Shelf

NOW = datetime.datetime(2026, 1, 2, 3, 4, 5)
TINY = ("experiment=tiny", "track=none", "slurm.nodes=2")


def planned(folder: Path, *overrides: str) -> Plan:
    return plan(composed((*TINY, f"run.dir={folder}", *overrides)), NOW)


def test_the_script_asks_for_what_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = Slurm(
        nodes=4, gpus=8, cpus=96, memory="0", time="2-12:00:00", partition="a,b", account="x", qos="long",
        constraint="h100&ib", reservation="r", grace_s=300, options=["--exclusive", "--mail-type=FAIL"],
        setup=["module load cuda", "export A='b c'"],
    )  # fmt: skip
    script = rendered(asked, tmp_path / "run")
    assert [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")] == [
        *("--job-name=run", "--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=96"),
        *("--mem=0", "--time=2-12:00:00", "--partition=a,b", "--account=x", "--qos=long"),
        *("--constraint=h100&ib", "--reservation=r", f"--output={tmp_path}/run/slurm-%j.log"),
        *(f"--chdir={tmp_path}", "--open-mode=append", "--signal=B:USR1@300", "--requeue"),
        *("--exclusive", "--mail-type=FAIL"),
    ]
    assert "\nmodule load cuda\nexport A='b c'\n" in script and " RANKS=8\n" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_sweep_is_an_array_with_a_folder_for_each(tmp_path: Path) -> None:
    work = planned(tmp_path, "optim.lr=1e-3,3e-3", "seed=choice(1,2)", "slurm.at_once=2")
    assert sorted(work.files) == [f"{i}/{CONFIG}" for i in range(4)] + [SCRIPT]
    assert "#SBATCH --array=0-3%2\n" in work.script and f"{tmp_path}/slurm-%A_%a.log" in work.script
    read = [OmegaConf.create(work.files[f"{i}/{CONFIG}"]) for i in range(4)]
    assert [(c.optim.lr, c.seed) for c in read] == [(1e-3, 1), (1e-3, 2), (3e-3, 1), (3e-3, 2)]
    assert [c.run.dir for c in read] == [f"{tmp_path}/{i}" for i in range(4)]


def test_only_several_values_make_a_sweep() -> None:
    given = ["a=[1,2]", "b='x,y'", "c={d:1,e:2}"]
    assert list(expanded(given)) == [given]
    assert list(expanded(["a=range(1,3)", "~b"])) == [["a=1", "~b"], ["a=2", "~b"]]
    with initialize_config_module("longspan.conf", version_base="1.3"):
        assert list(expanded(["mask=glob(s*,exclude=star*)"])) == [
            ["mask=s2"],
            ["mask=s2_bricks"],
            ["mask=sinks"],
            ["mask=streaming_heads"],
        ]
        for word in ("mask=glob(zz*)", "optim.lr=glob(*)"):
            with pytest.raises(HydraException, match=r"\), which fits none; a sweep lists values, such as"):
                expanded([word])
        with pytest.raises(HydraException, match="a=interval.*Can only enumerate CHOICE .* such as a=a,b"):
            expanded(["a=interval(0,1)"])


def test_ranks_read_what_was_composed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLANTED", "hush")
    given = [
        "experiment=tiny",
        "parallel=usp",
        "mask=s2",
        "engine=fsdp",
        "experiment_name='${oc.env:PLANTED}'",
    ]
    write(plan(composed([*given, "slurm.nodes=2", f"run.dir={tmp_path}"]), NOW))
    # as `python -m longspan.train --config-path FOLDER --config-name job` does
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        read = typed(compose("job"))
        hydra = compose("job", return_hydra_config=True).hydra
    with initialize_config_module("longspan.conf", version_base="1.3"):
        wanted = typed(compose("train", overrides=[*given, f"run.dir={tmp_path}"]))
        plain = compose("train", overrides=given, return_hydra_config=True).hydra
    assert OmegaConf.to_container(read, resolve=True) == OmegaConf.to_container(wanted, resolve=True)
    assert read.experiment_name == "hush" and "hush" not in (tmp_path / CONFIG).read_text()
    # no folder and no log of Hydra's own
    for key in ("run", "output_subdir", "job_logging", "hydra_logging"):
        assert hydra[key] == plain[key]


IMPOSSIBLE = [
    (Slurm(nodes=0), "slurm.nodes is 0; it must be at least 1"),
    (Slurm(nodes=1, restarts=-1), "slurm.restarts is -1; it must be at least 0"),
    (Slurm(nodes=1, partition="a b"), "slurm.partition is 'a b'; it must be one word"),
    (Slurm(nodes=1, time="2h"), "slurm.time is '2h'; it must be like 90, 12:00:00 or 2-12:00:00"),
    (
        Slurm(nodes=1, gpus=4, ranks=8),
        "slurm.ranks is 8, but a node has slurm.gpus=4 and each rank needs a GPU",
    ),
    (Slurm(nodes=1, options=["exclusive"]), "slurm.options has 'exclusive'; each must be one word, such as"),
    (Slurm(nodes=1, options=["--no-requeue"]), "but longspan submit sets --no-requeue itself"),
    (Slurm(nodes=1, options=["--no-requ"]), "has '--no-requ', but longspan submit sets --no-requeue itself"),
    (Slurm(nodes=1, options=["--sig=USR2"]), "but longspan submit sets --signal itself"),
    (Slurm(nodes=1, options=["--a\nrm"]), "each must be one word"),
    (Slurm(nodes=1, setup=["a\nb"]), "give a list with one line of shell in each"),
]


@pytest.mark.parametrize(("asked", "message"), IMPOSSIBLE, ids=[message for _, message in IMPOSSIBLE])
def test_what_cannot_be_asked_is_refused(asked: Slurm, message: str) -> None:
    with pytest.raises(ValueError) as refused:
        rendered(asked, Path("/runs/x"))
    assert message in str(refused.value)


def test_a_folder_that_a_script_cannot_name_is_refused() -> None:
    for name in ("a b", "a'b", "a#b", "50%j"):
        with pytest.raises(ValueError, match="cannot stand in a batch script: take a folder without spaces"):
            rendered(Slurm(nodes=1), Path("/runs") / name)


REFUSED = [
    (["slurm.nodes=???"], "slurm.nodes has no value: give one with slurm.nodes=..."),
    (["slurm.nodes=two"], "slurm.nodes: Value 'two' of type 'str' could not be converted to Integer"),
    (["+slurm.node=2"], "unknown key 'slurm.node'; did you mean 'slurm.nodes'?"),
    (["slurm.partition=[a,b]"], "slurm.partition: Cannot convert 'ListConfig' to string"),
    (["parallel.mesh.ring=3", "parallel.mesh.dp=1"], "= 3 processes, but 2 were started: start 3"),
    (["train.steps=0"], "train.steps is 0; it must be at least 1"),
    (["resume=never"], "resume=never would refuse the run's own checkpoints"),
    (["slurm.nodes=1,2"], "the jobs of a sweep share a batch script: slurm.* and run.* take one value each"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_refused_before_it_is_queued(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError) as refused:
        planned(tmp_path, *overrides)
    assert message in str(refused.value)


def test_a_secret_does_not_reach_the_folder() -> None:
    cfg = composed((*TINY, "+track.api_key=hush", "+data.tokens='${oc.env:X}'"))[0]
    with pytest.raises(
        ConfigError, match=r"track.api_key looks like a secret.* 'track.api_key=\${oc.env:NAME}'"
    ):
        plan([cfg], NOW)
    nested = {"a": [{"key": "k"}, {"b": {"token": "${oc.env:X}", "hub_token": "t"}}]}
    assert list(submit.secret_values(nested)) == ["a[0].key", "a[1].b.hub_token"]


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("export WANDB_API_KEY=hush", "WANDB_API_KEY"),
        ("cd x; HF_TOKEN='hush hush' tool", "HF_TOKEN"),
        ("tool login --api-key hush", "api_key"),
        ("--export=ALL,DB_PASSWORD=hush", "DB_PASSWORD"),
    ],
)
def test_a_secret_does_not_reach_the_script(line: str, name: str) -> None:
    asked = Slurm(nodes=1, **{"options" if line.startswith("--") else "setup": [line]})  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=rf"slurm.\w+ gives {name} a value .* for all to read: export {name} in"
    ) as said:
        rendered(asked, Path("/runs/x"))
    assert "hush" not in str(said.value)


def test_what_is_no_secret_stays_in_the_script() -> None:
    lines = [
        "export HF_TOKEN=$(cat ~/token)", 'export API_KEY="$KEPT"', "MAX_TOKENS=100 tool",
        "module load key/1.2", "export TOKENIZERS_PARALLELISM=false",
    ]  # fmt: skip
    script = rendered(Slurm(nodes=1, setup=lines), Path("/runs/x"))
    assert all(f"\n{line}\n" in script for line in lines)


def test_a_folder_with_another_run_is_refused(tmp_path: Path) -> None:
    base = composed((*TINY, f"run.dir={tmp_path / 'run'}"))[0]

    def variant(key: str, value: object) -> DictConfig:
        cfg = base.copy()
        OmegaConf.update(cfg, key, value)
        return cfg

    write(plan([base], NOW))
    # the same config on other nodes goes on
    write(plan([variant("slurm.nodes", 1)], NOW))
    assert "--nodes=1\n" in (tmp_path / "run" / SCRIPT).read_text()
    with pytest.raises(ValueError, match=r"another config \(train.steps is 20 there and 30 here\): take"):
        write(plan([variant("train.steps", 30)], NOW))
    with pytest.raises(ValueError, match="did not make: take another run.name"):
        write(plan([base, variant("seed", 1)], NOW))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="did not make: take another run.name"):
        write(plan([variant("run.dir", str(tmp_path / "other"))], NOW))


def test_a_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configs = composed((*TINY, f"run.dir={tmp_path / 'run'}"))
    assert submit.submit(configs, dry_run=True) == 0
    assert capsys.readouterr().out.startswith("#!/usr/bin/env bash\n") and not (tmp_path / "run").exists()


def test_without_slurm_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ValueError, match="sbatch is not found: submit where SLURM is, or see the script with"
    ):
        submit.queue(planned(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def save(folder: Path, step: int) -> None:
    """A whole checkpoint, as far as its manifest says."""
    shelf = Shelf(folder / "checkpoints", keep=9)
    temporary = shelf.temporary(str(step))
    temporary.mkdir(parents=True)
    shelf.publish(temporary, step, {})


def test_restarts_without_progress_are_counted(tmp_path: Path) -> None:
    assert requeue.start(tmp_path, "7", 2, []) == "starts at step 0"
    for idle in (1, 2):
        assert requeue.end(tmp_path, 75, 2) == "queued again, to go on from step 0"
        requeue.start(tmp_path, "7", 2, [])
        assert json.loads((tmp_path / requeue.STARTS).read_text())["idle"] == idle
    with pytest.raises(Stop, match="no checkpoint after step 0 in 2 restarts"):
        requeue.end(tmp_path, 1, 2)
    # SLURM may queue it again by itself
    with pytest.raises(Stop, match="no checkpoint after step 0 in 2 restarts"):
        requeue.start(tmp_path, "7", 2, [])
    save(tmp_path, 5)
    assert newest(tmp_path) == 5 and requeue.end(tmp_path, 1, 2) == "queued again, to go on from step 5"
    assert requeue.start(tmp_path, "7", 2, []) == "goes on from step 5"
    assert json.loads((tmp_path / requeue.STARTS).read_text()) == {"job": "7", "step": 5, "idle": 0}


def test_a_new_submission_counts_anew(tmp_path: Path) -> None:
    requeue.start(tmp_path, "7", 0, [])
    with pytest.raises(Stop):
        requeue.start(tmp_path, "7", 0, [])
    assert requeue.start(tmp_path, "8", 0, []) == "starts at step 0"


def test_bad_input_and_company_stop_a_job(tmp_path: Path) -> None:
    with pytest.raises(Stop, match="which another start would not mend"):
        requeue.end(tmp_path, 2, 9)
    with pytest.raises(Stop, match="job 3, 4 is running in .*: two would write over each other"):
        requeue.start(tmp_path, "7", 9, ["3", "4"])


def test_a_torn_checkpoint_is_no_progress(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save(tmp_path, 8)
    (tmp_path / "checkpoints/step-00000008/manifest.json").write_text("{")
    assert newest(tmp_path) == 5


@pytest.mark.parametrize(
    ("codes", "code"),
    [([1, 2], 1), ([-15, 2], 2), ([-15, 75], 75), ([-15, -9], 137), ([-15], 143), ([75], 75)],
)
def test_a_node_exits_as_its_ranks_did(codes: list[int], code: int) -> None:
    assert exit_code(codes) == code


# Stands for a command of SLURM's: notes how it was called. srun runs until it is signalled, as ranks do.
STUB = """#!/bin/bash
words=$*
echo "$(basename "$0") ${words%%$'\\n'*}" >> "$CALLS"
if [[ $(basename "$0") == srun ]]; then
  trap 'kill $!; exit 75' USR1
  /bin/sleep 20 &
  echo up >> "$CALLS"
  wait $!
  exit 9
fi
if [[ $(basename "$0") == squeue && -e $BUSY ]]; then
  rm "$BUSY"
  exit 1
fi
[[ "$*" != *"--jobs=$RUNNING "* ]] || echo "job $RUNNING runs"
[[ "$*" != "show hostnames"* ]] || printf 'n3\\nn4\\n'
[[ "$*" != "show node n3" ]] || echo "NodeName=n3 NodeAddr=10.0.0.3 Port=1"
"""


@pytest.mark.parametrize("running", ["7_2", "cancelled"])
def test_the_script_forwards_the_signal_and_queues_itself_again(tmp_path: Path, running: str) -> None:
    folder, stubs, calls = tmp_path / "run", tmp_path / "stubs", tmp_path / "calls"
    stubs.mkdir()
    for name in ("srun", "scontrol", "squeue", "python", "sleep"):
        (stubs / name).write_text(STUB)
        (stubs / name).chmod(0o755)
    script = rendered(Slurm(nodes=2, ranks=4, setup=[f"PYTHON={stubs}/python"]), folder)
    env = {
        "PATH": f"{stubs}:{os.environ['PATH']}", "CALLS": str(calls), "SLURM_JOB_ID": "8",
        "SLURM_JOB_NODELIST": "n[3-4]", "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_RESTART_COUNT": "1", "SLURM_CPUS_PER_TASK": "5", "RUNNING": running,
        "BUSY": str(tmp_path / "busy"),
    }  # fmt: skip
    (tmp_path / "busy").touch()
    batch = subprocess.Popen(["bash", "-c", script], env=env, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 20
    while time.monotonic() < until and not (calls.exists() and "\nup\n" in calls.read_text()):
        time.sleep(0.02)
    batch.send_signal(signal.SIGUSR1)
    said, _ = batch.communicate(timeout=20)
    assert batch.returncode == 75 and "job 7_2 on n[3-4], restart 1," in said
    called = [line for line in calls.read_text().splitlines() if not line.startswith("sleep 3")]
    assert called[0] == f"python -m longspan.launch.requeue start {folder}/2 --job 7_2 --restarts 3"
    assert called[1:3] == ["scontrol show hostnames n[3-4]", "scontrol show node n3"]
    assert called[3].startswith("srun --ntasks-per-node=1 --cpus-per-task=5 --kill-on-bad-exit=0 --wait=120 ")
    # the first answer is none
    asked = "squeue --noheader --jobs=7_2 --states=running"
    assert called[4:8] == ["up", asked, "sleep 1", asked]
    ended = f"python -m longspan.launch.requeue end {folder}/2 --code 75 --restarts 3"
    assert called[8:] == ([ended, "scontrol requeue 7_2"] if running == "7_2" else [])


def test_hydras_launcher_composes_or_names_the_extra() -> None:
    def launcher() -> dict[str, object]:
        with initialize_config_module("longspan.conf", version_base="1.3"):
            found = compose("train", overrides=["hydra/launcher=slurm"], return_hydra_config=True)
        return dict(found.hydra.launcher)

    if find_spec("submitit") is None:
        with pytest.raises(HydraException) as missing:
            launcher()
        said = hint(missing.value, ["hydra/launcher=slurm"], "train")
        assert said.endswith("hydra-submitit-launcher is not installed: pip install 'longspan[slurm]'")
        names = ("submitit_folder", "timeout_min", "nodes", "tasks_per_node", "max_num_timeout")
        theirs = dict.fromkeys((*names, "signal_delay_s", "array_parallelism"), 0)
        ConfigStore.instance().store(group="hydra/launcher", name="submitit_slurm", node=theirs)
    assert launcher()["max_num_timeout"] == 3
