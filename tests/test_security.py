"""What SECURITY.md says of payloads, secrets and ports; its table names the tests of the rest."""

import ast
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from jobs import wait_for
from longspan.launch.node import loopback
from longspan.train.checkpoint import Checkpoints
from longspan.train.manifest import NAME, DamagedCheckpoint
from longspan.train.shelf import LATEST
from states import bits, make, save
from test_architecture import ROOT, modules

HUSH = "hush4c1d9f0e77aa52b6308f4c1d9f0e77aa52b6"
TESTED = re.compile(r"`(tests/\w+\.py)`: `(\w+)`")


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_payload_in_a_manifest_or_pointer_does_not_run(tmp_path: Path) -> None:
    """Those in tensors, index and extra: tests/test_checkpoint_damage.py."""
    marker, folder = tmp_path / "bitten", tmp_path / "c"
    checkpoints = Checkpoints(folder, asynchronous=False)
    save(checkpoints, 1)
    payload = pickle.dumps(Payload(marker))
    (folder / LATEST).write_bytes(payload)
    state = make(2)
    assert checkpoints.load("auto", state) == {"saved": 1} and bits(state) == bits(make(1))
    (folder / "step-00000001" / NAME).write_bytes(payload)
    with pytest.raises(DamagedCheckpoint, match="manifest.json is damaged"):
        Checkpoints(folder, warn=lambda line: None).load("auto", state)
    assert not marker.exists()


# calls that may run what a file holds, and arguments that let others do so
CALLS = {
    "eval", "exec", "pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load", "os.system",
    "marshal.loads", "dill.load", "joblib.load",
}  # fmt: skip
ALLOWING = {"trust_remote_code": True, "allow_pickle": True, "weights_only": False, "shell": True}


def doors(module: ast.Module) -> Iterator[str]:
    """The calls in a module that open one."""
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        if (name := ast.unparse(node.func)) in CALLS:
            yield name
        for word in node.keywords:
            if isinstance(word.value, ast.Constant) and ALLOWING.get(word.arg or "", ...) is word.value.value:
                yield f"{name}({word.arg}={word.value.value})"


def test_nothing_that_is_read_may_bring_code() -> None:
    assert [f"{path}: {door}" for path, module in modules(ROOT) for door in doors(module)] == []
    opened = "pickle.load(f)\nf(trust_remote_code=True)\nnp.load(p, allow_pickle=True)\ntorch.load(p)"
    assert len(list(doors(ast.parse(opened)))) == 4
    assert not list(
        doors(ast.parse("np.load(p, allow_pickle=False)\nf(trust_remote_code=False)\nmodel.eval()"))
    )


def test_the_tests_that_security_names_are_there() -> None:
    named = TESTED.findall((ROOT / "SECURITY.md").read_text())
    assert len(named) >= 10
    for path, test in named:
        assert re.search(rf"^def {test}\b", (ROOT / path).read_text(), re.MULTILINE), f"{path}: {test}"


@pytest.mark.slow
def test_a_planted_secret_is_nowhere_in_the_run_folder(data_cache: str, tmp_path: Path) -> None:
    """Nor in what was printed: environment, W&B's offline files, checkpoints and all."""
    words = [
        "experiment=tiny", "parallel=single", "track=wandb", "track.mode=offline", "train.steps=2",
        "eval.final=1", data_cache, "run.dir=run",
    ]  # fmt: skip
    env = os.environ | {"WANDB_API_KEY": HUSH, "HF_TOKEN": HUSH, "MY_PASSWORD": HUSH}
    command = [sys.executable, "-m", "longspan.train", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, check=True)
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files) and len(files) > 15
    assert [path for path in files if HUSH.encode() in path.read_bytes()] == []
    assert HUSH.encode() not in done.stdout + done.stderr


def listening(pids: list[int]) -> set[str]:
    """The addresses, in hex, at which these processes take connections."""
    inodes = set()
    for pid in pids:
        for file in Path(f"/proc/{pid}/fd").iterdir():
            try:
                found = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(file))
            except FileNotFoundError:
                continue
            inodes |= {found[1]} if found else set()
    rows = [
        line.split()
        for name in ("tcp", "tcp6")
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]
    ]
    # state 0A is listening
    return {row[1].split(":")[0] for row in rows if row[3] == "0A" and row[9] in inodes}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_torchrun_is_sent_to_a_store_that_only_this_machine_reaches() -> None:
    before = listening([os.getpid()])
    store, words = loopback()
    port = int(words[-1].removeprefix("--master-port="))
    # as torchrun asks for its own
    theirs = TCPStore("127.0.0.1", port, 1, True, multi_tenant=True)
    theirs.set("key", "value")
    assert store.get("key") == b"value"
    assert listening([os.getpid()]) - before <= {"0100007F"}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_job_on_one_node_listens_on_loopback_only(data_cache: str, tmp_path: Path) -> None:
    job = ["experiment=tiny", "track=none", "train.steps=100000", data_cache, f"run.dir={tmp_path / 'run'}"]
    node = ["-m", "longspan.launch.node", "--standalone", "--nproc-per-node=2", "-m", "longspan.train"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen([sys.executable, *node, *job], stdout=said, stderr=said)
    wait_for(tmp_path / "run" / "metrics.jsonl", 2, process)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = listening([process.pid, *map(int, ranks)])
    time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    # 127.0.0.1, also as IPv6 writes it, and ::1
    assert found and found <= {"0100007F", "0000000000000000FFFF00000100007F", f"{'0' * 24}01000000"}
