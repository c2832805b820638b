"""verify-resume: what it says of runs that went on, and of settings that cannot be."""

from pathlib import Path

import pytest

from longspan.launch.verify_resume import Found, Side, compared, main, verify

Rows = list[dict[str, float]]


def rows(*losses: float, first: int = 1) -> Rows:
    return [
        {
            "step": first + i,
            "loss": x,
            "grad_norm": 2 * x,
            "lr": 1e-3,
            "tokens": 512.0 * (first + i),
            "valid": 510.0,
        }
        for i, x in enumerate(losses)
    ]


def test_the_greatest_difference_of_a_step_counts() -> None:
    whole = rows(5.0, 4.0, 3.0, 2.0)
    same = compared("first to first", 2, rows(3.0, 2.0, first=3), whole)
    assert same == Found("first to first", 2, 4, True, {"loss": 0.0, "grad_norm": 0.0})
    assert same.passed(0.0) and "steps 3 to 4: loss bit-equal" in same.line()
    other = compared("first to second", 2, rows(3.003, 2.0, first=3), whole)
    assert other.apart["loss"] == pytest.approx(1e-3, rel=1e-6)
    assert other.passed(2e-3) and not other.passed(5e-4)
    # a run that goes on as it was may not differ at all
    assert not compared("first to first", 2, rows(3.003, 2.0, first=3), whole).passed(1.0)


def test_other_samples_and_missing_steps_are_wrong_whatever_the_loss() -> None:
    whole = rows(5.0, 4.0, 3.0)
    for got in (rows(4.0, first=2), rows(4.0, 3.0, 2.0, first=2), [], rows(4.0, 3.0, first=1)):
        assert not compared("first to second", 1, got, whole).passed(1.0)
    moved = rows(4.0, 3.0, first=2)
    moved[1]["valid"] = 509.0
    found = compared("first to second", 1, moved, whole)
    assert not found.passed(1.0) and "OTHER SAMPLES" in found.line()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--at", "20", "--", "experiment=tiny"], "a step from 1 to 19 (train.steps is 20)"),
        (["--ranks", "0", "--", "experiment=tiny"], "--ranks 0"),
        (["--", "experiment=tinny"], "tinny"),
    ],
)
def test_settings_that_cannot_be(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_both_ways_between_two_ranks_and_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("experiment=tiny", "train.steps=6", f"run.root={tmp_path}", "eval.final=1", "model.layers=1")
    words = [
        "--ranks",
        "2",
        "--then-ranks",
        "1",
        "--then",
        "parallel=single",
        "--folder",
        str(tmp_path / "runs"),
    ]
    assert main([*words, "--", *job]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "ok    first to first", "ok    first to second", "ok    second to first",
    ]  # fmt: skip
    with pytest.raises(RuntimeError, match="left with 2"):
        wrong = Side("first", 1, (*job, "model.dmi=3"))
        verify(wrong, wrong, 3, tmp_path / "wrong")
