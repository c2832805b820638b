"""Every engine under every layout trains as one process does; every checkpoint goes on under every engine."""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest

import engine_matrix
from engine_matrix import GOING_ON, REFUSALS, SETTINGS, TRAINING, Cell, cells
from jobs import Once, Ran, assert_same, config, furthest, gone_on, refusal, run, values
from world import Worlds

pytestmark = [
    # DeepSpeed and Megatron call what torch has new names for
    pytest.mark.filterwarnings("ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning"),
]
TEN = "train.steps=10"
HALF = 5
# of losses, relative, in the docs' tables
UNIT, MOST = 1e-7, 20.0
Row = Callable[[str, object], None]
Written = Callable[[str], Path]


def tried(row: Row, table: str, line: str, column: str) -> None:
    """Records which cell it is, so that one that fails is printed as such."""
    for name, value in (("table", table), ("row", line), ("column", column)):
        row(name, value)


def compared(ran: list[Ran], want: list[Ran], row: Row) -> None:
    """Asserts that the runs are the same, and records how far the losses are apart."""
    since = len(want[0].rows) - len(ran[0].rows)
    assert_same(ran, want, since=since)
    apart = furthest(values(ran[0].rows, "loss"), values(want[0].rows[since:], "loss"))
    row("value", f"{apart / UNIT:.1f}")


@pytest.mark.slow
@pytest.mark.parametrize(
    "cell", [c for c in cells() if not c.refused], ids=lambda c: f"{c.engine}-{c.column}".replace(" ", "_")
)
def test_an_engine_trains_under_a_layout_as_one_process(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, record_property: Row, cell: Cell
) -> None:
    package(cell.engine)
    tried(record_property, TRAINING, cell.column, cell.engine)
    cfg = config(data_cache, TEN, *cell.words(tmp_path))
    ran = world(cell.ranks)(run, cfg, tmp_path / "checkpoints")
    want = once(1, "parallel=single", *cell.mask, TEN)
    compared(ran, want, record_property)


@pytest.mark.slow
def test_what_an_engine_cannot_train_is_refused_before_the_first_step(
    world: Worlds, data_cache: str, tmp_path: Path
) -> None:
    package("ZeRO")
    # of each engine one: no layout is asked
    refused = [cell for cell in cells() if cell.refused and cell.layout == "ring"]
    assert len(refused) == 4
    cfgs = [config(data_cache, *cell.words(tmp_path)) for cell in refused]
    for said in world(4)(refusal, *cfgs):
        for cell, text in zip(refused, said, strict=True):
            assert text.startswith(cell.refused), cell


@pytest.mark.slow
def test_the_docs_say_what_is_refused(world: Worlds, data_cache: str) -> None:
    package("ZeRO")
    package("megatron")
    rows = engine_matrix.written(REFUSALS)
    assert rows
    cfgs = [config(data_cache, *words.strip("`").split()) for words, _ in rows]
    for texts in world(2)(refusal, *cfgs):
        said = {at: text for at, text in zip(rows, texts, strict=True)}
        assert said == rows


@pytest.fixture(scope="module")
def checkpoint_of(world: Worlds, data_cache: str, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The checkpoint that a setting leaves after half of the steps, written once."""
    done: dict[str, Path] = {}

    def written(name: str) -> Path:
        if name not in done:
            folder = tmp_path_factory.mktemp("written")
            cfg = config(data_cache, TEN, *SETTINGS[name].words(folder))
            world(SETTINGS[name].ranks)(run, cfg, folder / "checkpoints", HALF)
            done[name] = folder / "checkpoints" / f"step-{HALF:08d}"
        return done[name]

    return written


@pytest.mark.slow
@pytest.mark.parametrize("after", SETTINGS)
@pytest.mark.parametrize("before", SETTINGS)
def test_a_checkpoint_goes_on_under_every_engine(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, checkpoint_of: Written,
    record_property: Row, before: str, after: str,
) -> None:  # fmt: skip
    for name in (before, after):
        package(SETTINGS[name].engine)
    tried(record_property, GOING_ON, before, after)
    cfg = config(data_cache, TEN, f"resume={checkpoint_of(before)}", *SETTINGS[after].words(tmp_path))
    ran = world(SETTINGS[after].ranks)(run, cfg, tmp_path / "checkpoints")
    assert len(ran[0].rows) == 10 - HALF
    want = once(1, "parallel=single", "data.pack=true", TEN)
    compared(ran, want, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ddp, ring 2", "ZeRO 3, s2 2"),
        ("ZeRO 3, s2 2", "megatron, tp 2"),
        ("megatron, tp 2", "fsdp, ring 2"),
        ("fsdp, tp 2 x ring 2", "megatron, ring 2"),
    ],
)
def test_an_average_of_weights_goes_on_too(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, before: str, after: str
) -> None:
    both = TEN, "train.ema=0.9", "eval.every=5"
    for name in (before, after):
        package(SETTINGS[name].engine)
    started, then = (
        (SETTINGS[x].ranks, config(data_cache, *both, *SETTINGS[x].words(tmp_path))) for x in (before, after)
    )
    ran = gone_on(world, tmp_path / "checkpoints", started, then)
    assert_same(ran, once(1, "parallel=single", "data.pack=true", *both), since=HALF)


def package(engine: str) -> None:
    """Skips a test whose engine is not installed."""
    for word, name in (("ZeRO", "deepspeed"), ("megatron", "megatron")):
        if engine.startswith(word) and importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed")


def test_a_cell_that_failed_is_printed_as_failed(tmp_path: Path) -> None:
    said = "".join(
        f'<property name="{name}" value="{value}"/>'
        for name, value in (("table", TRAINING), ("row", "ring 2"), ("column", "ddp"))
    )
    case = "<testcase><properties>{}</properties>{}</testcase>"
    for text, found in (
        (case.format(said, "<failure/>"), "failed"),
        (case.format(f'{said}<property name="value" value="1.5"/>', ""), "1.5"),
        (case.format(f'{said}<property name="value" value="1.5"/>', "<error/>"), "failed"),
    ):
        (tmp_path / "matrix.xml").write_text(f"<testsuite>{text}</testsuite>")
        assert engine_matrix.measured([tmp_path / "matrix.xml"])[TRAINING]["ring 2", "ddp"] == found


def test_the_docs_have_a_line_for_every_cell() -> None:
    """What they do not give is no cell."""
    trained = {(cell.column, cell.engine): cell.refused for cell in cells()}
    both = {TRAINING: trained, GOING_ON: {(x, y): "" for x in SETTINGS for y in SETTINGS}}
    for table, refused in both.items():
        found = engine_matrix.written(table)
        lines, columns = engine_matrix.shape()[table]
        assert list(found) == [(x, y) for x in lines for y in columns], f"write what {engine_matrix.__doc__}"
        for at, value in found.items():
            if refused.get(at):
                assert value == "refused", at
            elif at not in refused:
                assert value == "-", at
            else:
                # in units of 1e-7; neither `failed` nor `-` is a number
                assert 0 <= float(value) <= MOST, at
