"""metrics.jsonl over kills and resumes, W&B that cannot stop training, the meter, and what is shown."""

import io
import json
import logging
import math
import os
import re
import resource
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from longspan.train.meter import Meter, gpt_flops, peak_flops, published_peak
from longspan.train.progress import Progress, amount, duration, size
from longspan.train.track import Metrics, Nothing, Wandb, choose_mode, git_state

CONF = Path(__file__).parent.parent / "conf" / "track"


def values(loss: float) -> dict[str, float | int | str]:
    return {"loss": loss, "grad_norm": 1.5, "tokens": 4096, "tokens_per_s": 17e3}


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows as any strict JSON parser reads them."""

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_metrics_are_json_whatever_the_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, resume_step=None)
    losses = [0.1 + 0.2, math.nan, math.inf, -math.inf]
    for step, loss in enumerate(losses, 1):
        metrics.write(step, values(loss))
        # Every line is there as soon as it is written: nothing waits in a buffer for a kill.
        assert len(lines(path)) == step
    metrics.close()
    assert [row["loss"] for row in lines(path)] == [losses[0], "NaN", "Infinity", "-Infinity"]
    assert str([row["loss"] for row in Metrics.read(path)]) == str(losses)
    assert set(lines(path)[0]) == {"step", *values(0.0)}


def test_metrics_refuse_what_would_break_the_file(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl", resume_step=None)
    metrics.write(3, values(1.0))
    with pytest.raises(ValueError, match="step 3 of metrics.jsonl comes after 3"):
        metrics.write(3, values(1.0))
    with pytest.raises(ValueError, match="step 4 of metrics.jsonl lacks grad_norm, tokens"):
        metrics.write(4, {"loss": 1.0, "tokens_per_s": 1.0})
    with pytest.raises(ValueError, match="metric loss is a Tensor"):
        metrics.write(4, values(torch.tensor(1.0)))  # type: ignore[arg-type]
    metrics.close()
    assert [row["step"] for row in Metrics.read(tmp_path / "metrics.jsonl")] == [3]


def test_metrics_of_a_killed_run_go_on_without_a_step_twice(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    reached = [7, 9, 12]
    for resume, last in zip([None, 4, 8], reached, strict=True):
        metrics = Metrics(path, resume_step=resume)
        for step in range((resume or 0) + 1, last + 1):
            metrics.write(step, values(step + last / 100))
        metrics.close()
        with path.open("ab") as torn:
            torn.write(b'{"step": 13, "loss": 1.')
    assert [row["step"] for row in Metrics.read(path)] == list(range(1, 13))
    # Each step's value is that of the run that reached it last.
    assert [row["loss"] for row in Metrics.read(path)][3:9] == [4.07, 5.09, 6.09, 7.09, 8.09, 9.12]
    assert Metrics(path, resume_step=12).path.read_bytes().endswith(b"}\n")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_metrics_of_a_fresh_start_keep_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for run in range(3):
        metrics = Metrics(path, resume_step=None)
        metrics.write(1, values(run))
        metrics.close()
    assert {p.name: Metrics.read(p)[0]["loss"] for p in tmp_path.iterdir()} == {
        "metrics.old-1.jsonl": 0,
        "metrics.old-2.jsonl": 1,
        "metrics.jsonl": 2,
    }


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2, is not JSON"):
        Metrics(path, resume_step=3)
    assert path.read_text().count("\n") == 3


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path, resume_step=None)
    metrics.write(1, values(1.0))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, hard))
    try:
        with pytest.raises(OSError, match="took 10 of the .* bytes of step 2: disk full"):
            metrics.write(2, values(2.0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    metrics.write(3, values(3.0))
    metrics.close()
    assert [row["step"] for row in lines(path)] == [1, 3]


# wandb itself, offline


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format behind a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    block, head = 32768, struct.Struct("<IHB")
    data = path.read_bytes()
    assert data[:4] == b":W&B"
    at, parts = 7, b""
    while at + head.size <= len(data):
        if block - at % block < head.size:
            at += block - at % block
            continue
        checksum, length, kind = head.unpack_from(data, at)
        part = data[at + head.size : at + head.size + length]
        at += head.size + length
        if kind == 0:
            continue
        assert zlib.crc32(part, zlib.crc32(bytes([kind]))) == checksum
        # A record is whole (1), or a first (2), middle (3) and last (4) part.
        parts = part if kind in (1, 2) else parts + part
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record


def items(found: Any) -> dict[str, Any]:
    return {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in found}


OFFLINE = """
import math, os, sys
from pathlib import Path
from longspan.train.track import Metrics, Wandb
folder = Path(sys.argv[1])
metrics = Metrics(folder / "metrics.jsonl", resume_step=None)
tracker = Wandb(
    mode="auto", project="tests", entity=None, group="pair", tags=["a", "b"], run_dir=folder, name="a run",
    config={"model": {"width": 64}}, resume=False, env=os.environ,
)
for step in range(1, 301):
    row = {"loss": 8 / math.sqrt(step), "grad_norm": 1 / step, "tokens": 64 * step, "tokens_per_s": 1e4}
    metrics.write(step, row)
    tracker.log(step, row)
tracker.picture("dot", Path(sys.argv[2]))
tracker.summary({"bits_per_byte": 3.25})
tracker.finish(0)
assert tracker.dropped == 0 and tracker.mode == "offline"
"""


def python(code: str, *arguments: str | Path, home: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Runs `code` where nobody is logged in."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "NETRC"))}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(
        command, env=env | {"HOME": str(home)} | more, capture_output=True, text=True, timeout=60
    )


def test_wandb_offline_holds_the_losses_of_metrics(tmp_path: Path) -> None:
    from matplotlib.image import imsave

    imsave(tmp_path / "dot.png", torch.eye(4).numpy())
    done = python(OFFLINE, tmp_path, tmp_path / "dot.png", home=tmp_path)
    # Quiet: W&B adds nothing to what the trainer prints.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert (tmp_path / "wandb_id.txt").read_text().strip() == re.search(r"run-(\w+)\.wandb", file.name)[1]  # type: ignore[index]
    history, config, summary, run = [], {}, {}, None
    for record in wandb_records(file):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            history.append(items(record.history.item))
        elif kind == "run":
            run = record.run
            config |= items(record.run.config.update)
        elif kind == "summary":
            summary |= items(record.summary.update)
    kept = {row["step"]: row["loss"] for row in Metrics.read(tmp_path / "metrics.jsonl")}
    assert {row["step"]: row["loss"] for row in history if "loss" in row} == kept
    assert len(kept) == 300
    assert run is not None
    assert (run.project, run.run_group, run.display_name, list(run.tags)) == (
        "tests",
        "pair",
        "a run",
        ["a", "b"],
    )
    assert config["model"] == {"width": 64} and "git" in config
    assert summary["bits_per_byte"] == 3.25
    assert any("dot" in row for row in history)


HUNG = """
import os, signal, sys, time
from pathlib import Path
from longspan.train.track import Wandb
tracker = Wandb(
    mode="offline", project="tests", entity=None, group=None, tags=[], run_dir=Path(sys.argv[1]), name="hung",
    config={}, resume=False, env=os.environ,
)
while tracker._done < 1:
    tracker.log(1, {"loss": 1.0})
    time.sleep(0.05)
import wandb
helper = wandb.setup()._connection._proc._process
os.kill(helper.pid, signal.SIGSTOP)
began = time.monotonic()
tracker.finish(0, timeout=0.5)
print(time.monotonic() - began, helper.pid)
"""


def test_a_hung_wandb_helper_does_not_keep_the_process(tmp_path: Path) -> None:
    began = time.monotonic()
    done = python(HUNG, tmp_path, home=tmp_path)
    assert time.monotonic() - began < 20
    seconds, helper = done.stdout.split()
    assert done.returncode == 0 and float(seconds) < 1.5
    assert re.fullmatch(r"wandb did not end within 0\.5 s, lost 0 of \d+ records; .*\n", done.stderr), (
        done.stderr
    )
    with pytest.raises(ProcessLookupError):
        os.kill(int(helper), signal.SIGKILL)


# a wandb that misbehaves


class Fake:
    """A module `wandb` whose calls do what the test says."""

    def __init__(self, *, init: Any = None, log: Any = None) -> None:
        self.inits: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.ended: int | None = None
        self.torn_down = 0
        self._init, self._log = init, log

    def init(self, **given: Any) -> Any:
        self.inits.append(given)
        if self._init is not None:
            self._init(given)
        return SimpleNamespace(log=self.log, url=None, summary={}, finish=self.finish)

    def log(self, row: dict[str, Any], step: int) -> None:
        if self._log is not None:
            self._log(row)
        self.rows.append(row)

    def finish(self, exit_code: int) -> None:
        self.ended = exit_code

    def teardown(self, exit_code: int) -> None:
        self.torn_down += 1

    def setup(self, settings: Any) -> None:
        self.quiet = settings.silent and settings.console == "off"

    Settings = SimpleNamespace


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """offline(fake, ...) is a tracker that talks to that fake."""

    def build(fake: Fake, **more: Any) -> Wandb:
        monkeypatch.setitem(sys.modules, "wandb", fake)
        given: dict[str, Any] = {"mode": "offline", "project": "p", "entity": None, "group": None, "tags": []}
        given |= {
            "run_dir": tmp_path,
            "name": "n",
            "config": {},
            "resume": False,
            "env": {"HOME": str(tmp_path)},
        }
        return Wandb(**given | more)

    return build


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_hanging_wandb_costs_nothing(where: str, offline: Any, caplog: pytest.LogCaptureFixture) -> None:
    release = Event()
    fake = Fake(**{where: lambda _: release.wait(20)})
    tracker = offline(fake, capacity=8)
    began = time.monotonic()
    for step in range(1000):
        tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    assert [r.message for r in caplog.records if "is too slow or hangs" in r.message] == [
        caplog.records[0].message
    ]
    began = time.monotonic()
    tracker.finish(0, timeout=0.3)
    assert 0.25 < time.monotonic() - began < 1.0
    release.set()
    assert tracker.dropped == 1000 and len(caplog.records) == 2
    assert "did not end within 0.3 s, lost 1000 of 1000 records" in caplog.records[1].message


def test_a_raising_wandb_is_told_once_and_counted(offline: Any, caplog: pytest.LogCaptureFixture) -> None:
    def log(row: dict[str, Any]) -> None:
        if row["step"] % 4 == 0:
            raise RuntimeError("no\nroute")

    fake = Fake(log=log)
    tracker = offline(fake)
    for step in range(1, 101):
        tracker.log(step, {"loss": float(step)})
    tracker.finish(3)
    assert [row["step"] for row in fake.rows] == [step for step in range(1, 101) if step % 4]
    assert tracker.dropped == 25 and fake.ended == 3 and fake.quiet
    first, last = [record.message for record in caplog.records]
    assert first.startswith("wandb failed (RuntimeError: no route); training goes on")
    assert "has ended, lost 25 of 100 records" in last


def test_a_run_that_cannot_start_online_is_recorded_offline(
    offline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def init(given: dict[str, Any]) -> None:
        if given["mode"] == "online":
            raise ConnectionError("refused")

    fake = Fake(init=init)
    tracker = offline(fake, mode="auto", env={"WANDB_API_KEY": "k"})
    tracker.log(1, {"loss": 2.0})
    tracker.finish(0)
    assert [given["mode"] for given in fake.inits] == ["online", "offline"] and fake.torn_down == 1
    assert tracker.mode == "offline" and tracker.dropped == 0 and fake.rows == [{"step": 1, "loss": 2.0}]
    assert [record.message[:44] for record in caplog.records] == [
        "wandb could not start online (ConnectionErro"
    ]


def test_a_run_without_wandb_trains(offline: Any, caplog: pytest.LogCaptureFixture) -> None:
    def init(_: dict[str, Any]) -> None:
        raise ImportError("No module named 'wandb'")

    tracker = offline(Fake(init=init))
    tracker.log(1, {"loss": 2.0})
    tracker.finish(0)
    assert tracker.dropped == 1 and len(caplog.records) == 2


def test_a_resumed_job_continues_its_run(offline: Any, tmp_path: Path) -> None:
    ids = []
    for resume in (False, True, True, False):
        fake = Fake()
        offline(fake, resume=resume).finish(0)
        ids.append(fake.inits[0]["id"])
        assert fake.inits[0]["resume"] == "allow" and fake.inits[0]["dir"] == str(tmp_path)
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert (tmp_path / "wandb_id.txt").read_text().strip() == ids[3]


@pytest.mark.parametrize(
    ("mode", "env", "files", "chosen"),
    [
        ("auto", {}, {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, {}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, {}, "disabled"),
        ("auto", {}, {".netrc": "machine api.wandb.ai login user password k"}, "online"),
        ("auto", {}, {".netrc": "machine github.com login user password k"}, "offline"),
        ("auto", {}, {".netrc": "mashine ???"}, "offline"),
        (
            "auto",
            {"WANDB_BASE_URL": "https://w.org/"},
            {".netrc": "machine w.org login u password k"},
            "online",
        ),
        ("auto", {}, {".config/wandb/settings": "[default]\napi_key = k"}, "online"),
        ("auto", {}, {".config/wandb/settings": "[default]\nproject = k"}, "offline"),
        ("offline", {"WANDB_API_KEY": "k"}, {}, "offline"),
        ("online", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, {}, "online"),
    ],
)
def test_the_mode_follows_the_login(
    mode: Any, env: dict[str, str], files: dict[str, str], chosen: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert choose_mode(mode, {"HOME": str(tmp_path), **env}) == chosen


def test_modes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="track.mode=online needs a login"):
        choose_mode("online", {"HOME": str(tmp_path)})
    with pytest.raises(ValueError, match="track.mode=onlin is unknown: take one of auto, offline"):
        choose_mode("onlin", {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="track.mode=online does nothing with track=none"):
        Nothing(mode="online", run_dir=tmp_path, name="n", config={}, resume=False, env={})


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_tracker_takes_the_same_calls(file: Path, tmp_path: Path) -> None:
    cfg = OmegaConf.load(file)
    assert "mode" in cfg
    tracker = instantiate(cfg, mode="disabled")(run_dir=tmp_path, name="n", config={}, resume=False, env={})
    tracker.log(1, {"loss": 1.0})
    tracker.picture("p", tmp_path / "p.png")
    tracker.summary({"loss": 1.0})
    tracker.finish(0, timeout=0.1)
    assert tracker.mode == "disabled" and os.listdir(tmp_path) == []


def test_git_state_tells_commit_and_dirt(tmp_path: Path) -> None:
    env = {**os.environ, "GIT_DIR": "/nowhere"}
    assert git_state(tmp_path, env) == {}
    tree = tmp_path / "tree"
    (tree / "code").mkdir(parents=True)
    (tree / "code" / "a.py").write_text("1")

    def git(*words: str) -> str:
        who = [
            "-c",
            "user.name=n",
            "-c",
            "user.email=e",
            "-c",
            "commit.gpgsign=false",
            "-c",
            "core.hooksPath=/dev/null",
        ]
        command = ["git", "-C", str(tree), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    assert git_state(tree / "code", env) == {}
    git("add", "code")
    git("commit", "-qm", "first")
    assert git_state(tree / "code", env) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tree / "code" / "a.py").write_text("2")
    assert git_state(tree / "code", env)["dirty"] is True
    # An installed copy inside somebody's checkout is not that checkout's code.
    (tree / "site").mkdir()
    assert git_state(tree / "site", env) == {}


# the meter


def test_the_meter_leaves_the_first_step_and_pauses_out() -> None:
    now = 0.0
    meter = Meter(peak_flops=1e9, ranks=2, steps=110, start_step=10, clock=lambda: now)
    now += 60.0
    first = meter.update(11, 1200, 1e9)
    assert first["tokens_per_s"] == pytest.approx(20.0) and first["eta_s"] == pytest.approx(99 * 60)
    now += 2.0
    second = meter.update(12, 1000, 1e9)
    assert (second["tokens_per_s"], second["step_s"]) == pytest.approx((500.0, 2.0))
    assert second["mfu"] == pytest.approx(1e9 / 2.0 / 2e9) and second["eta_s"] == pytest.approx(98 * 2.0)
    now += 500.0
    meter.restart()
    for step in range(13, 33):
        now += 4.0
        last = meter.update(step, 1000, 1e9)
    # Twenty steps of 4 s fill the window: the step of 2 s and the pause are out of it.
    assert (last["tokens_per_s"], last["step_s"]) == pytest.approx((250.0, 4.0))
    assert last["mfu"] == pytest.approx(0.125) and last["peak_memory"] > 50 * 2**20
    now += 1.0
    assert meter.update(110, 1, 1.0)["eta_s"] == 0.0


def test_gpt_flops_counts_what_the_mask_shows() -> None:
    # One layer, one head of size 1: a matmul with a weight and the two attention products, thrice their forward.
    assert gpt_flops(1, 1, 1, 1, 1, 0) == 6 and gpt_flops(0, 0, 1, 1, 1, 1) == 12
    tokens, layers, heads, dim = 4096, 2, 4, 16
    causal, window = tokens * (tokens + 1) // 2, 256 * tokens - 255 * 256 // 2
    dense, sparse = (gpt_flops(10**5, tokens, layers, heads, dim, n) for n in (causal, window))
    assert dense - sparse == 12 * layers * heads * dim * (causal - window)


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "teraflops"),
    [
        ("NVIDIA H200", torch.bfloat16, False, 989.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.5),
        ("NVIDIA H100 80GB HBM3", torch.float32, True, 494.7),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756.0),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5),
        ("NVIDIA A10", torch.bfloat16, False, 125.0),
        ("NVIDIA A10G", torch.bfloat16, False, None),
        ("NVIDIA L40S", torch.bfloat16, False, 362.0),
        ("NVIDIA L4", torch.bfloat16, False, 121.0),
        ("NVIDIA B200", torch.float16, False, 2250.0),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, False, 165.2),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, False, None),
        ("NVIDIA H100 80GB HBM3", torch.float64, False, None),
    ],
)
def test_published_peaks(name: str, dtype: torch.dtype, tf32: bool, teraflops: float | None) -> None:
    found = published_peak(name, dtype, tf32)
    assert (found and found[0]) == (teraflops and pytest.approx(teraflops * 1e12))


def test_the_peak_of_a_cpu_is_measured() -> None:
    began = time.monotonic()
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert time.monotonic() - began < 1.0
    assert source == "measured matmul peak on this machine"
    # Not above what any core does, and at least what one timed matmul reaches.
    a = torch.ones(384, 384)
    took = time.perf_counter()
    _ = a @ a
    assert 0.2 * 2 * 384**3 / (time.perf_counter() - took) < peak < 1e14


# what is shown


def show(out: io.StringIO, *, rank: int = 0, every_s: float = 0.0, last: int = 12) -> list[str]:
    figures = {
        "loss": 2.5,
        "tokens_per_s": 17234.0,
        "mfu": 0.314,
        "peak_memory": 1.5 * 2**30,
        "eta_s": 3725.0,
    }
    with Progress(rank=rank, every_s=every_s, out=out) as progress:
        progress.start({"model": "gpt [bold]", "run folder": "/" + "x" * 60, "data": "many words " * 20})
        for step in range(1, last + 1):
            progress.step(step, last, {**figures, "loss": 10.0 / step})
        progress.note("checkpoint saved at 100%")
        progress.summary({"held-out": "3.11 bits per byte"})
    return out.getvalue().splitlines()


def test_plain_lines_suit_a_log() -> None:
    shown = show(io.StringIO())
    text = "\n".join(shown)
    assert text.isprintable() or not re.search(r"[^\x20-\x7e\n]", text)
    assert max(map(len, shown)) <= 110
    assert all(
        part in text for part in ("gpt [bold]", "x" * 60, "checkpoint saved at 100%", "3.11 bits per byte")
    )
    steps = [line for line in shown if line.startswith("step")]
    assert steps[-1] == "step 12/12  loss  0.8333   17.2k tok/s  MFU 31.4%  mem  1.5 GiB  ETA 1:02:05"
    assert len(steps) == 12 and len({len(line) for line in steps}) == 1


def test_plain_lines_are_few() -> None:
    steps = [line for line in show(io.StringIO(), every_s=60.0) if line.startswith("step")]
    assert [line[:10] for line in steps] == ["step  1/12", "step 12/12"]


@pytest.mark.parametrize("rank", [1, 7])
def test_other_ranks_show_nothing(rank: int) -> None:
    assert show(io.StringIO(), rank=rank) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "bar"), [(200, True), (80, False)])
def test_a_terminal_gets_a_bar(columns: int, bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "\n".join(show(Terminal()))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert ("━" in plain) == bar and "\x1b[" in text
    assert (
        "step 12/12" in plain and "loss  0.8333   17.2k tok/s  MFU 31.4%  mem  1.5 GiB  ETA 1:02:05" in plain
    )
    assert "gpt [bold]" in plain and "checkpoint saved at 100%" in plain and "3.11 bits per byte" in plain
    # The cursor is hidden while the bar runs, and back at the end.
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0


def test_units() -> None:
    assert [amount(n) for n in (0, 999.4, 999.6, 17234, 1e6, 2.5e9)] == [
        "0",
        "999",
        "1k",
        "17.2k",
        "1M",
        "2.5G",
    ]
    assert [size(n) for n in (0, 1023, 1024, 1.5 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB"]
    assert [duration(s) for s in (0, 65, 3725, 36000)] == ["0:00", "1:05", "1:02:05", "10:00:00"]


def test_warnings_reach_stderr_without_any_logging_set_up() -> None:
    # What tells of a dead tracker must not depend on somebody having configured logging.
    assert logging.lastResort is not None and logging.lastResort.level <= logging.WARNING
