"""metrics.jsonl over kills and resumes, and a W&B run that holds the same and cannot stop training."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from threading import enumerate as threads_alive
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from longspan.train.lines import Lines
from longspan.train.login import choose_mode
from longspan.train.metrics import Metrics
from longspan.train.progress import Progress
from longspan.train.record import EVENTS, Record, sweep_of
from longspan.train.track import Nothing, Wandb

CONF = Path(__file__).parent.parent / "conf" / "track"


def values(loss: float) -> dict[str, float | int | str]:
    return {"loss": loss, "grad_norm": 1.5, "tokens": 4096, "tokens_per_s": 17e3}


def refuse(constant: str) -> float:
    raise AssertionError(f"{constant} is not JSON")


def lines(path: Path) -> list[dict[str, Any]]:
    """The rows as any strict JSON parser reads them."""
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
    Metrics(path, resume_step=12).close()
    assert path.read_bytes().endswith(b"}\n")
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_metrics_of_a_fresh_start_keep_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for run in range(3):
        metrics = Metrics(path, resume_step=None)
        metrics.write(1, values(run))
        metrics.close()
    kept = {p.name: Metrics.read(p)[0]["loss"] for p in tmp_path.iterdir()}
    assert kept == {"metrics.old-1.jsonl": 0, "metrics.old-2.jsonl": 1, "metrics.jsonl": 2}


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2, is not JSON"):
        Metrics(path, resume_step=3)
    assert path.read_text().count("\n") == 3


@contextmanager
def room(size: int) -> Iterator[None]:
    """No file of this process can be longer than so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_a_full_disk_does_not_take_is_written_later(tmp_path: Path) -> None:
    path, told = tmp_path / "metrics.jsonl", list[str]()
    metrics = Metrics(path, resume_step=None, tell=told.append)
    metrics.write(1, values(1.0))
    with room(path.stat().st_size + 10):
        for step in range(2, 6):
            metrics.write(step, values(float(step)))
            assert [row["step"] for row in lines(path)] == [1]
        # back to a checkpoint, with as little room
        metrics.back(3)
        metrics.write(4, values(40.0))
        assert len(told) == 1
    metrics.write(5, values(50.0))
    metrics.close()
    assert [(row["step"], row["loss"]) for row in lines(path)] == [(1, 1), (2, 2), (3, 3), (4, 40), (5, 50)]
    assert told[0].startswith(f"{path} cannot be written: it took 10 of the ")
    assert told[0].endswith("; training goes on, and its lines wait until it can, up to 10,000")
    assert told[1:] == [f"{path} is written again, with 4 lines that had waited"]
    with room(0):
        metrics.back(2)
    metrics.write(3, values(0.5))
    assert [row["loss"] for row in lines(path)] == [1.0, 2.0, 0.5]


def test_a_disk_that_stays_full_costs_the_oldest_lines(tmp_path: Path) -> None:
    path, told = tmp_path / "lines", list[str]()
    kept = Lines(path, told.append, most=3)
    path.symlink_to("/dev/full")
    for i in range(6):
        kept.add(b"%d\n" % i)
    kept.settle()
    assert told[1:] == [f"{path} lacks 6 lines, which it could not take: No space left on device"]
    path.unlink()
    kept.settle()
    assert path.read_bytes() == b"3\n4\n5\n"
    assert told[2:] == [f"{path} is written again, with 3 lines that had waited; 3 older ones are lost"]
    kept.add(b"6\n")
    kept.settle()
    assert path.read_bytes() == b"3\n4\n5\n6\n" and len(told) == 3


def test_a_record_goes_on_without_its_disk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Events are stamped when they happen, and each file is told of once."""
    path, began = tmp_path / EVENTS, time.time()
    path.symlink_to("/dev/full")
    record = Record(0, Progress(), None, None, tmp_path)
    record.started(0, 2)
    record.note("one")
    record.note("two")
    path.unlink()
    time.sleep(0.05)
    record.close()
    kinds = [(row["kind"], row.get("text")) for row in lines(path)]
    assert kinds == [("start", None), ("note", "one"), ("note", "two")]
    assert all(began - 0.01 < row["time"] < time.time() - 0.04 for row in lines(path))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("No space left on device") == 1 and "3 lines that had waited" in said


def test_a_log_on_a_full_disk_stops_nobody() -> None:
    told = []
    with pytest.raises(OSError, match="No space left"), open("/dev/full", "w") as out:
        for line in ("one", "two"):
            Progress(out=out).note(line)
            told.append(line)
    assert told == ["one", "two"]


# a wandb that misbehaves


class Fake:
    """A module `wandb` that calls `trouble(what, given)` before it does what it should."""

    Settings = SimpleNamespace
    # the first step that an online run does not hold yet
    starting_step = 0

    def __init__(self, trouble: Callable[[str, dict[str, Any]], object] = lambda *_: None) -> None:
        self.trouble = trouble
        self.inits: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.ended: list[int] = []
        self.torn_down: list[int] = []
        self.teardown = self.torn_down.append

    def setup(self, settings: Any) -> None:
        assert settings.silent and settings.console == "off"

    def init(self, **given: Any) -> Any:
        self.inits.append(given)
        self.trouble("init", given)
        return SimpleNamespace(
            log=self.log, url=None, summary={}, finish=self.ended.append, starting_step=self.starting_step
        )

    def log(self, row: dict[str, Any], step: int) -> None:
        self.trouble("log", row)
        self.rows.append(row)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """offline(fake, ...) is a tracker that talks to that fake. Its thread ends with the test, even where
    `finish` has given it up: else it may import the real wandb over the next test's fake.
    """
    before = set(threads_alive())

    def build(fake: Fake, **more: Any) -> Wandb:
        monkeypatch.setitem(sys.modules, "wandb", fake)
        home = {"HOME": str(tmp_path)}
        given: dict[str, Any] = dict(mode="offline", project="p", entity=None, group=None, tags=[], name="n")
        return Wandb(**given | dict(run_dir=tmp_path, config={}, resume=False, env=home) | more)

    yield build
    for thread in set(threads_alive()) - before:
        thread.join(30)
        assert not thread.is_alive()


@pytest.mark.parametrize("where", ["init", "log"])
def test_a_hanging_wandb_costs_nothing(where: str, offline: Any, caplog: pytest.LogCaptureFixture) -> None:
    release = Event()
    tracker = offline(Fake(lambda what, _: what == where and release.wait(20)), capacity=8)
    began = time.monotonic()
    for step in range(1000):
        tracker.log(step, {"loss": 1.0})
    assert time.monotonic() - began < 1.0
    assert ["is too slow or hangs" in record.message for record in caplog.records] == [True]
    began = time.monotonic()
    tracker.finish(0, timeout=0.3)
    assert 0.25 < time.monotonic() - began < 1.0
    release.set()
    assert tracker.dropped == 1000 and len(caplog.records) == 2
    assert "did not end within 0.3 s, lost 1000 of 1000 records" in caplog.records[1].message


def test_a_raising_wandb_is_told_once_and_counted(offline: Any, caplog: pytest.LogCaptureFixture) -> None:
    def trouble(what: str, given: dict[str, Any]) -> None:
        if what == "log" and given["step"] % 4 == 0:
            raise RuntimeError("no\nroute")

    tracker = offline(fake := Fake(trouble))
    for step in range(1, 101):
        tracker.log(step, {"loss": float(step)})
    tracker.finish(3)
    assert [row["step"] for row in fake.rows] == [step for step in range(1, 101) if step % 4]
    assert tracker.dropped == 25 and fake.ended == [3]
    first, last = [record.message for record in caplog.records]
    assert first.startswith("wandb failed (RuntimeError: no route); training goes on")
    assert "has ended, lost 25 of 100 records" in last


@pytest.mark.parametrize(("works", "lost"), [("offline", 0), ("nowhere", 1)])
def test_a_run_that_cannot_start(
    works: str, lost: int, offline: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def trouble(what: str, given: dict[str, Any]) -> None:
        if what == "init" and given["mode"] != works:
            raise ConnectionError("refused")

    tracker = offline(fake := Fake(trouble), mode="auto", env={"WANDB_API_KEY": "k"})
    tracker.log(1, {"loss": 2.0})
    tracker.finish(0)
    assert [given["mode"] for given in fake.inits] == ["online", "offline"]
    assert len(fake.torn_down) == 1 + lost and len(fake.rows) == 1 - lost and tracker.dropped == lost
    assert len(caplog.records) == 1 + lost
    assert "could not start online (ConnectionError: refused)" in caplog.records[0].message


def test_a_resumed_job_continues_its_run(offline: Any, tmp_path: Path) -> None:
    ids = []
    for resume in (False, True, True, False):
        fake = Fake()
        offline(fake, resume=resume).finish(0)
        ids.append(fake.inits[0]["id"])
        assert fake.inits[0]["resume"] == "allow" and fake.inits[0]["dir"] == str(tmp_path)
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert (tmp_path / "wandb_id.txt").read_text().strip() == ids[3]


def test_what_the_server_holds_is_not_sent_again(offline: Any) -> None:
    fake = Fake()
    fake.starting_step = 12
    tracker = offline(fake, resume=True)
    for step in range(9, 15):
        tracker.log(step, {"loss": float(step)})
    tracker.finish(0)
    assert [row["step"] for row in fake.rows] == [12, 13, 14] and tracker.dropped == 0


def test_a_sweep_is_a_group(offline: Any, tmp_path: Path) -> None:
    for given, told in ((None, ("lr", "lr/n")), ("mine", ("mine", "lr/n"))):
        fake = Fake()
        offline(fake, group=given, sweep="lr").finish(0)
        assert (fake.inits[0]["group"], fake.inits[0]["name"]) == told
    assert sweep_of(tmp_path / "runs" / "lr" / "0", tmp_path / "runs") == "lr"
    assert sweep_of(tmp_path / "runs" / "one", tmp_path / "runs") is None
    assert sweep_of(tmp_path / "elsewhere", tmp_path / "runs") is None


@pytest.mark.parametrize(
    ("env", "file", "text", "chosen"),
    [
        ({}, "other", "", "offline"),
        ({"WANDB_API_KEY": "k"}, "other", "", "online"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "disabled"}, "other", "", "disabled"),
        ({}, ".netrc", "machine api.wandb.ai login user password k", "online"),
        ({}, ".netrc", "machine github.com login user password k", "offline"),
        ({}, ".netrc", "mashine ???", "offline"),
        ({"WANDB_BASE_URL": "https://w.org/"}, "_netrc", "machine w.org password k", "online"),
        ({}, ".config/wandb/settings", "[default]\napi_key = k", "online"),
        ({}, ".config/wandb/settings", "[default]\nproject = k", "offline"),
    ],
)
def test_the_mode_follows_the_login(
    env: dict[str, str], file: str, text: str, chosen: str, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(text)
    env = {"HOME": str(tmp_path), **env}
    assert choose_mode("auto", env) == chosen
    assert choose_mode("offline", env) == "offline"
    assert choose_mode("online", env | {"WANDB_API_KEY": "k"}) == "online"


def test_modes_that_cannot_be_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="track.mode=online needs a login"):
        choose_mode("online", {"HOME": str(tmp_path)})
    with pytest.raises(ValueError, match="track.mode=onlin is unknown: take one of auto, offline"):
        choose_mode("onlin", {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="track.mode=online does nothing with track=none"):
        Nothing(mode="online", run_dir=tmp_path, name="n", config={}, resume=False, env={})


@pytest.mark.parametrize("file", sorted(CONF.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_tracker_takes_the_same_calls(file: Path, tmp_path: Path) -> None:
    tracker = instantiate(OmegaConf.load(file), mode="disabled")(
        run_dir=tmp_path, name="n", config={}, resume=False, env={}
    )
    tracker.log(1, {"loss": 1.0})
    tracker.picture("p", tmp_path / "p.png")
    tracker.table("t", [{"loss": 1.0}])
    tracker.checkpoint(1, tmp_path)
    tracker.summary({"loss": 1.0})
    tracker.finish(0, timeout=0.1)
    assert tracker.mode == "disabled" and os.listdir(tmp_path) == []
