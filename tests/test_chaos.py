"""The chaos command judges what it sees, and its table in the docs is what was measured."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from longspan.launch import chaos
from longspan.launch.chaos_bench import Bench, Life, Promise, came_from, last_step, recovered
from longspan.launch.chaos_files import flipped, shortened
from longspan.launch.chaos_rank import Strike
from longspan.launch.chaos_row import Row, Skipped, read, table

ROOT = Path(__file__).parent.parent
MEASURED = ROOT / "benchmarks" / "results" / "chaos.json"
# killed in step 11 at 100.0 s, started again from step 8
KILLED = Life(
    code=137, said="x\nSignal 9 (SIGKILL) received", since=0, before=0, after=10, struck=100.0, missed=False,
    at=11, began=90.0, passed={step: 90.0 + step for step in range(1, 11)},
)  # fmt: skip
AGAIN = Life(
    code=0, said="  from  step 8", since=8, before=10, after=30, struck=None, missed=False, at=8, began=101.0,
    passed={step: 100.0 + step for step in range(11, 31)},
)  # fmt: skip
PROMISE = Promise((137,), "SIGKILL", 2)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    """Two runs with the same losses, `whole` and `x`, as if they had been made."""
    made = Bench(tmp_path)
    # a cached property, which would start a job
    made.__dict__["whole"] = made.run("whole")
    for name in ("whole", "x"):
        made.run(name).mkdir(parents=True)
        rows = [{"step": s, "loss": 9 - s, "grad_norm": 1.0, "lr": 0.1, "tokens": s} for s in (1, 2)]
        text = "".join(f"{json.dumps(row)}\n" for row in rows)
        (made.run(name) / "metrics.jsonl").write_text(text + '{"step": 3')
    return made


def test_a_row_says_what_was_lost_and_how_long_it_took(bench: Bench) -> None:
    row = bench.row("x", "SIGKILL", "goes on", [KILLED, AGAIN], PROMISE)
    assert row == Row("x", "SIGKILL", "goes on", 137, "Signal 9 (SIGKILL) received", 2, 11.0, True)
    assert "| SIGKILL | goes on: `Signal 9 (SIGKILL) received` | 137 | 2 | 11.0 | yes |\n" in table([row])
    # one that survives is back when the step in which it was struck is there
    survived = replace(KILLED, code=0, passed={**KILLED.passed, 11: 100.5, 12: 101.0})
    assert recovered([survived]) == 0.5
    assert recovered([replace(KILLED, struck=None), AGAIN]) is None
    assert (last_step(bench.run("x")), last_step(bench.run("none"))) == (2, 0)
    assert (came_from("a\n  from        step 12\n"), came_from("from random weights")) == (12, 0)


@pytest.mark.parametrize(
    ("first", "again", "promise", "broken"),
    [
        (replace(KILLED, code=1), AGAIN, PROMISE, "exit code 1 is none of (137,)"),
        (replace(KILLED, said="x"), AGAIN, PROMISE, "nothing that it printed is like 'SIGKILL'"),
        (KILLED, replace(AGAIN, since=4), PROMISE, "6 steps were lost, more than 2"),
        (KILLED, replace(AGAIN, code=1), PROMISE, "started again, it left with 1"),
        (replace(KILLED, missed=True), AGAIN, PROMISE, "the fault did not come"),
        (KILLED, AGAIN, replace(PROMISE, equal=False), "the losses are not those of an undisturbed run"),
    ],
)
def test_a_promise_that_is_not_kept_is_seen(
    bench: Bench, first: Life, again: Life, promise: Promise, broken: str
) -> None:
    row = bench.row("x", "", "", [first, again], promise)
    assert row.broken == broken and f"**{broken}**" in table([row])
    assert chaos.verdict(row) == f"BROKEN: {broken}"


def test_other_losses_are_seen(bench: Bench) -> None:
    path = bench.run("x") / "metrics.jsonl"
    path.write_text(path.read_text().replace('"loss": 7', '"loss": 7.0000001'))
    assert bench.row("x", "", "", [KILLED, AGAIN], PROMISE).broken.startswith("the losses are not those")


def test_a_fault_that_cannot_be_made_says_so() -> None:
    row = Skipped("disk-full", "a full disk", "no mount")
    assert "| a full disk | not tried: no mount | - | - | - | - |\n" in table([row])
    assert read(json.loads(json.dumps([vars(row)]))) == [row]


def test_words_are_faults_and_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    faults, overrides = chaos.chosen(["port", "engine=fsdp", "kill-save"])
    assert [fault.name for fault in faults] == ["port", "kill-save"] and overrides == ["engine=fsdp"]
    assert chaos.chosen([])[0] == list(chaos.FAULTS)
    assert chaos.main(["prot"]) == 2
    assert "prot is no fault: take some of term-launcher, " in capsys.readouterr().err
    assert chaos.main(["--list"]) == 0
    assert capsys.readouterr().out.count("\n") == len(chaos.FAULTS) > 20


def test_a_strike_is_said_in_words() -> None:
    strike = Strike("kill", "save", 3, 1, 0.05, Path("a b"))
    assert Strike.of(strike.words()) == strike
    for act, place in (("kil", "save"), ("kill", "sleep")):
        with pytest.raises(ValueError, match=f"{act} {place}: give one of kill, stop"):
            Strike.of([act, place, "1", "0", "0", "x"])


def test_damage_changes_a_file(tmp_path: Path) -> None:
    path, draw = tmp_path / "file", random.Random(0)
    path.write_bytes(bytes(100))
    flipped(path, draw)
    assert sum(byte.bit_count() for byte in path.read_bytes()) == 1
    shortened(path, draw)
    assert path.stat().st_size < 100


def test_the_docs_show_what_was_measured() -> None:
    told = json.loads(MEASURED.read_text())
    rows = read(told["rows"])
    assert [row.name for row in rows] == [fault.name for fault in chaos.FAULTS]
    assert [row.fault for row in rows] == [fault.what for fault in chaos.FAULTS]
    assert not [row for row in rows if isinstance(row, Skipped) or row.broken]
    page = (ROOT / "docs" / "reliability.md").read_text()
    assert table(rows) in page and told["machine"] in page


@pytest.mark.slow
def test_some_faults_do_what_their_rows_promise(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["usr1-launcher", "kill-backward", "kill-save", "nan-rewind", "bit-flips", "disk-full", "port"]
    told = tmp_path / "rows.json"
    assert chaos.main([*names, "--moments", "2", "--json", str(told)]) == 0, capsys.readouterr()
    rows = read(json.loads(told.read_text())["rows"])
    assert [row.name for row in rows] == names and table(rows) in capsys.readouterr().out
