"""Bad steps: told on all ranks alike, and answered as the policy says."""

import json
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import pytest
from omegaconf import DictConfig

from bad_steps import Plant, faults, planted, went, whole_bad
from jobs import EXACT, Kept, config, joined, launch_of, ring, values, zero
from longspan.train.checkpoint import Checkpoints, SaveError
from longspan.train.config import ConfigError
from longspan.train.guard import Faults, Guard
from longspan.train.job import build
from longspan.train.loop import Loop, State
from longspan.train.metrics import Metrics
from longspan.train.preempt import Preempt
from test_oracles import needs
from world import Worlds

EIGHT = ("train.steps=8", "checkpoint.every=3", "eval.final=2")
SKIP, REWIND = "guard.nonfinite=skip", "guard.nonfinite=rewind"
SINGLE = ("parallel=single", *EIGHT)
BAD = 8  # the first sample of step 5


def assert_skipped(world: Worlds, cfg: DictConfig, folder: Path, plant: Plant) -> None:
    """Step 5 is bad on one rank: nothing changes on any, and the run goes on."""
    ran = world(2)(went, cfg, folder, [plant])
    for one in ran:
        assert one.stopped == "" and (one.skipped, one.rewound) == (1, 0)
        assert [row["step"] for row in one.rows] == [*range(1, 9)]
        assert [row.get("skipped", 0) for row in one.rows] == [0, 0, 0, 0, 1, 0, 0, 0]
        # bit for bit, with the optimizer's state and the average
        assert one.digests[4] == one.digests[5] != one.digests[6]
        assert all(row["grad_norm"] < 1e3 for row in one.rows if row["step"] != 5)
        assert not one.rows[4]["grad_norm"] < 1e3
    assert values(ran[0].rows[:4] + ran[0].rows[5:], *EXACT).equal(
        values(ran[1].rows[:4] + ran[1].rows[5:], *EXACT)
    )
    (row,) = faults(folder)
    assert row["step"] == 5 and row["kind"] == "nonfinite" and row["did"] == "skipped"
    assert row["samples"] == [BAD, BAD + 1] and row["ids"] == [BAD, BAD + 1]
    assert [bool(documents) for documents in row["documents"]] == [True, True]
    assert (row["loss"] == "NaN") == (plant.what == "loss") and row["grad_norm"] in ("NaN", "Infinity")


@pytest.mark.parametrize(
    ("engine", "what"),
    [
        ("ddp", "loss"),
        pytest.param("fsdp", "gradient", marks=pytest.mark.slow),
        pytest.param("ddp", "gradient", marks=pytest.mark.slow),
        pytest.param("fsdp", "loss", marks=pytest.mark.slow),
    ],
)
def test_a_bad_step_on_one_rank_is_skipped_on_all(
    world: Worlds, data_cache: str, tmp_path: Path, engine: str, what: str
) -> None:
    cfg = config(data_cache, *ring(), *EIGHT, f"engine={engine}", SKIP, "train.ema=0.9")
    assert_skipped(world, cfg, tmp_path, Plant(BAD, what=what))


@pytest.mark.slow
@needs("deepspeed", "deepspeed")
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_bad_step_is_skipped_by_deepspeed(
    world: Worlds, data_cache: str, tmp_path: Path, stage: int, what: str
) -> None:
    cfg = config(data_cache, *ring(), *EIGHT, *zero(stage, tmp_path), SKIP)
    assert_skipped(world, cfg, tmp_path, Plant(BAD, what=what))


@pytest.mark.slow
@needs("megatron", "megatron-core")
@pytest.mark.parametrize("layout", [ring(), ("parallel=single", "parallel.mesh.tp=2")], ids=["ring", "tp"])
def test_a_bad_step_is_skipped_by_megatron(
    world: Worlds, data_cache: str, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    cfg = config(data_cache, *layout, *EIGHT, "engine=megatron", SKIP)
    assert_skipped(world, cfg, tmp_path, Plant(BAD, what="gradient"))


ENGINES = [
    "ddp",
    pytest.param("fsdp", marks=pytest.mark.slow),
    pytest.param(2, marks=[pytest.mark.slow, needs("deepspeed", "deepspeed")]),
    pytest.param(3, marks=[pytest.mark.slow, needs("deepspeed", "deepspeed")]),
    pytest.param("megatron", marks=[pytest.mark.slow, needs("megatron", "megatron-core")]),
]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_rewound_run_is_one_that_never_saw_the_bad_samples(
    world: Worlds, data_cache: str, tmp_path: Path, engine: str | int
) -> None:
    chosen = (f"engine={engine}",) if isinstance(engine, str) else zero(engine, tmp_path)
    cfg = config(data_cache, *ring(), *EIGHT, *chosen, REWIND)
    ran = world(2)(went, cfg, tmp_path / "bad", [Plant(BAD)])
    # stopped at the checkpoint, and on with the sample after the bad ones
    world(2)(went, cfg, tmp_path / "good", [], 3)
    never = world(2)(went, cfg, tmp_path / "good", [], None, BAD + 2)
    for one, other in zip(ran, never, strict=True):
        assert one.stopped == "" and (one.skipped, one.rewound) == (0, 1)
        assert [row["step"] for row in one.rows] == [*range(1, 9)]
        assert values(one.rows[3:], *EXACT).equal(values(other.rows, *EXACT))
        assert one.digests[8] == other.digests[8]
    (row,) = faults(tmp_path / "bad")
    assert row["step"] == 5 and row["did"] == "rewound to 3"
    assert ran[0].notes[0].startswith("step 5: loss nan, ")
    assert ran[0].notes[0].endswith("rewound to 3, and on from sample 10")


def test_a_run_is_recorded_with_its_bad_steps(world: Worlds, data_cache: str, tmp_path: Path) -> None:
    words = (SKIP, "guard.spike=rewind", "guard.window=4", "report=false")
    cfg = config(data_cache, *ring(), *EIGHT, *words, f"run.dir={tmp_path}")
    plants = [Plant(BAD), Plant(BAD + 4, what="spike")]
    assert world(2)(whole_bad, cfg, plants) == [0, 0]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["skipped_steps"], summary["rewinds"]) == (1, 1)
    assert [row["did"] for row in faults(tmp_path)] == ["skipped", "rewound to 6"]
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[4])["loss"] == "NaN" and json.loads(lines[4])["skipped"] == 1
    rows = Metrics.read(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [*range(1, 9)]
    assert [row["step"] for row in rows if "skipped" in row] == [5]
    assert max(row["loss"] for row in rows if row["step"] != 5) < 10
    assert (tmp_path / "loss.png").exists()


def alone(world: Worlds, folder: Path, data_cache: str, *words: str, plants: list[Plant]) -> Any:
    return world(1)(went, config(data_cache, *SINGLE, *words), folder, plants)[0]


def bad(*steps: int, what: str = "loss") -> list[Plant]:
    """Plants in these steps, as they are when none before was rewound."""
    return [Plant(2 * (step - 1), 0, what) for step in steps]


@pytest.mark.parametrize("what", ["spike", pytest.param("steep", marks=pytest.mark.slow)])
def test_a_spike_of_loss_or_norm_changes_nothing(
    world: Worlds, data_cache: str, tmp_path: Path, what: str
) -> None:
    words = ("guard.spike=skip", "guard.window=4", "train.clip=0")
    # the first is no spike yet: two good steps must be there
    ran = alone(world, tmp_path, data_cache, *words, plants=bad(2, 6, what=what))
    assert ran.skipped == 1 and ran.digests[5] == ran.digests[6] != ran.digests[7]
    # what the last step took is known by phase
    assert set(ran.phases) == {"data", "forward", "backward", "reduce", "optimizer"}
    assert all(seconds > 0 for seconds in ran.phases.values())
    (row,) = faults(tmp_path)
    assert (row["step"], row["kind"], row["did"]) == (6, "spike", "skipped")
    usual = median(one["grad_norm"] for one in ran.rows[1:5])
    assert f"{usual:.4g} in the median of 4 good steps (guard.factor=3.0)" in ran.notes[0]
    # those of good steps are in the checkpoint, so that a resumed run tells as a whole one would
    extra = json.loads((tmp_path / "checkpoints" / "step-00000008" / "extra.json").read_text())
    assert extra["good"] == [[row["loss"], row["grad_norm"]] for row in ran.rows[3:] if "skipped" not in row]
    assert extra["skipped"] == 1


@pytest.mark.slow
def test_a_spike_is_nothing_unless_it_is_asked_for(world: Worlds, data_cache: str, tmp_path: Path) -> None:
    ran = alone(world, tmp_path, data_cache, "guard.window=4", plants=bad(6, what="spike"))
    assert ran.skipped == 0 and ran.stopped == "" and not (tmp_path / "faults.jsonl").exists()


@pytest.mark.slow
def test_a_spike_stops_it_if_that_is_asked_for(world: Worlds, data_cache: str, tmp_path: Path) -> None:
    words = ("guard.spike=stop", "guard.window=4")
    ran = alone(world, tmp_path, data_cache, *words, plants=bad(6, what="spike"))
    assert ran.stopped.startswith("step 6: loss ")
    assert ran.stopped.endswith("guard.spike is stop; skip or rewind would go on")
    assert [(row["kind"], row["did"]) for row in faults(tmp_path)] == [("spike", "stopped")]


def test_without_a_checkpoint_there_is_no_way_back(world: Worlds, data_cache: str, tmp_path: Path) -> None:
    ran = alone(world, tmp_path, data_cache, REWIND, plants=bad(2))
    assert ran.stopped.endswith("there is no checkpoint to go back to yet")
    assert [(row["kind"], row["did"]) for row in faults(tmp_path)] == [("nonfinite", "stopped")]


@pytest.mark.slow
def test_a_run_that_came_from_a_path_goes_back_to_it(world: Worlds, data_cache: str, tmp_path: Path) -> None:
    """Not to the newest checkpoint of its folder, which may be of the run that it left."""
    alone(world, tmp_path, data_cache, plants=[])
    path = tmp_path / "checkpoints" / "step-00000003"
    words = (REWIND, f"resume={path}")
    for folder in (tmp_path, tmp_path / "another"):
        # 5 before there is a checkpoint of its own, and 8 after that of 6
        plants = [Plant(BAD, 0), Plant(BAD + 8, 0)]
        ran = alone(world, folder, data_cache, *words, plants=plants)
        assert ran.stopped == "" and [row["step"] for row in ran.rows] == [4, 5, 6, 7, 8]
        did = [row["did"] for row in faults(folder)]
        assert did == ["rewound to 3", "rewound to 6"]


@pytest.mark.slow
def test_a_bad_first_step_that_is_saved_counts_no_update(
    world: Worlds, data_cache: str, tmp_path: Path
) -> None:
    words = (SKIP, "checkpoint.every=1")
    whole = alone(world, tmp_path / "whole", data_cache, *words, plants=bad(1))
    for stop in (1, None):
        ran = world(1)(went, config(data_cache, *SINGLE, *words), tmp_path / "parts", bad(1), stop)[0]
    assert values(ran.rows, *EXACT).equal(values(whole.rows[1:], *EXACT))
    assert ran.digests[8] == whole.digests[8]


def failing(rank: int, cfg: DictConfig, folder: Path) -> tuple[list[str], list[int], int]:
    """A run whose first save fails in the thread: its notes, its checkpoints, and how often one counted."""
    counted, tried, write = list[Guard](), list[Any](), Checkpoints._write

    def writing(self: Checkpoints, save: Any) -> None:
        tried.append(save)
        if len(tried) == 1:
            raise SaveError("no room")
        write(self, save)

    with (
        joined(rank) as device,
        Preempt() as preempt,
        planted(rank, []),
        patch.object(Checkpoints, "_write", writing),
        patch.object(Guard, "saved", lambda self: counted.append(self)),
    ):
        job, record = build(cfg, launch_of(rank), device), Kept(rank, None)
        checkpoints = Checkpoints(folder)
        Loop(job, record, checkpoints, preempt, State(), folder).run()
        return record.notes, checkpoints.steps(), len(counted)


@pytest.mark.parametrize("steps", [4, 5])
def test_a_save_that_fails_beside_training_is_no_checkpoint_and_costs_no_other(
    world: Worlds, data_cache: str, tmp_path: Path, steps: int
) -> None:
    """Of step 4, whether that is the last or not."""
    cfg = config(data_cache, "parallel=single", f"train.steps={steps}", "checkpoint.every=4")
    ((notes, there, counted),) = world(1)(failing, cfg, tmp_path)
    assert notes == ["checkpoint failed, training goes on: no room"]
    assert there == [steps] and counted == 1


@pytest.mark.slow
@pytest.mark.parametrize("policy", [SKIP, REWIND])
def test_so_many_in_a_row_and_no_more(world: Worlds, data_cache: str, tmp_path: Path, policy: str) -> None:
    ran = alone(world, tmp_path, data_cache, policy, "guard.most=2", plants=bad(4, 5, 6, 7))
    assert ran.stopped.endswith("3 bad steps in a row, and guard.most is 2")
    assert (ran.skipped, ran.rewound) == ((2, 0) if policy == SKIP else (0, 2))
    assert [row["did"] for row in faults(tmp_path)][-1] == "stopped"


def test_what_is_answered_to_bad_steps_one_after_the_other() -> None:
    guard, good = Guard(nonfinite="skip", spike="rewind", most=2), list[list[float]]()
    assert [guard.answer("nonfinite")[0] for _ in range(3)] == ["skip", "skip", "stop"]
    guard.passed(1.0, 1.0, good)
    for _ in range(2):
        assert guard.answer("spike") == ("rewind", "")
        guard.passed(1.0, 1.0, good)
    assert guard.answer("spike")[0] == "stop"
    guard.passed(1.0, 1.0, good)
    guard.saved()
    assert guard.answer("spike") == ("rewind", "") and len(good) == 4


@pytest.mark.slow
def test_rewinds_without_a_new_checkpoint_come_to_an_end(
    world: Worlds, data_cache: str, tmp_path: Path
) -> None:
    # step 5 is bad each time, and step 4 before it is good
    plants = [Plant(at, 0) for at in (8, 12, 16)]
    ran = alone(world, tmp_path, data_cache, REWIND, "guard.most=2", plants=plants)
    said = "guard.most is 2, and so many rewinds were made since the last new checkpoint"
    assert ran.stopped.endswith(said)
    assert [row["did"] for row in faults(tmp_path)] == ["rewound to 3", "rewound to 3", "stopped"]


def judged(rank: int) -> list[str | None]:
    """What is said of steps whose norms differ from rank to rank."""
    guard, good = Guard(spike="stop", window=4), [[1.0, 1.0], [1.0, 1.0]]
    norms = [(1.0, 2.9), (2.9, 3.1), (3.1, float("nan"))]
    return [guard.judged(1.0, norm[rank], good) for norm in norms]


def test_ranks_that_see_different_norms_say_the_same(world: Worlds) -> None:
    assert world(2)(judged) == [[None, "spike", "nonfinite"]] * 2


def test_a_full_disk_stops_nobody(tmp_path: Path) -> None:
    assert Faults(tmp_path / "none" / "faults.jsonl").write({"step": 1}).endswith("No such file or directory")
    file = Faults(tmp_path / "faults.jsonl")
    assert file.write({"step": 1, "loss": float("inf")}) == file.write({"step": 2, "loss": 1.0}) == ""
    assert [row["loss"] for row in faults(tmp_path)] == ["Infinity", 1.0]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("guard.nonfinite=off", "guard.nonfinite is 'off'; it must be 'stop' or 'skip' or 'rewind'"),
        ("guard.factr=2", "unknown key 'guard.factr'; did you mean 'guard.factor'?"),
    ],
)
def test_what_cannot_be_is_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(f"+{word}" if "factr" in word else word)
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"nonfinite": "off"}, "guard.nonfinite is 'off'; it can be stop, skip, rewind"),
        ({"spike": "no"}, "guard.spike is 'no'; it can be off, stop, skip, rewind"),
        ({"factor": 1.0}, "guard.factor is 1.0; it must be more than 1"),
        ({"window": 1}, "guard.window is 1, guard.most 5; window must be at least 2, most at least 1"),
        ({"most": 0}, "guard.window is 50, guard.most 0; window must be at least 2, most at least 1"),
    ],
)
def test_a_guard_refuses_what_it_cannot_be(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Guard(**given)
    assert str(caught.value) == said
