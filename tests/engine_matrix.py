"""The cells of engine x layout and of checkpoint x engine, and their tables in docs/engines.md:
`pytest tests/test_engine_matrix.py -o junit_family=xunit1 --junitxml=FILE` measures them, then
`python tests/engine_matrix.py FILE` prints them.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from jobs import S2, STAR, ring, zero

Words = tuple[str, ...]
DOCS = Path(__file__).parent.parent / "docs" / "engines.md"
TRAINING, GOING_ON, REFUSALS = "training", "checkpoints", "refusals"
TP = "parallel.mesh.tp=2"
REPLICATED = ("engine.replicate=true", "parallel.mesh.dp=2", "train.micro_batch=1")
# an engine's words; of ZeRO the stage
ENGINES: dict[str, Words | int] = {
    "ddp": ("engine=ddp",),
    "fsdp": ("engine=fsdp",),
    "HSDP": ("engine=fsdp", *REPLICATED),
    "ZeRO 1": 1,
    "ZeRO 2": 2,
    "ZeRO 3": 3,
    "megatron": ("engine=megatron",),
}
LAYOUTS: dict[str, Words] = {
    "ring": ring("zigzag"),
    "gather": ("parallel=gather",),
    "ulysses": ("parallel=ulysses",),
    "usp": ("parallel=usp",),
    "s2": ("parallel=s2", *S2),
    "star": ("parallel=star", *STAR),
}
WITHOUT_TP = {
    "ddp": "parallel.mesh.tp is 2; engine=ddp holds whole weights",
    "ZeRO": "parallel.mesh.tp is 2; engine=deepspeed splits no layers",
}


class Cell(NamedTuple):
    """A job to train: HSDP on half of the ranks of a sequence, twice. tp: of the ranks, those that share
    layers.
    """

    engine: str
    layout: str
    ranks: int
    tp: int = 1

    @property
    def column(self) -> str:
        return f"{'tp 2 x ' if self.tp > 1 else ''}{self.layout} {self.ranks // self.tp}"

    @property
    def mask(self) -> Words:
        return {"s2": S2, "star": STAR}.get(self.layout, ("data.pack=true",))

    @property
    def refused(self) -> str:
        """What the message begins with; nothing where it trains."""
        return WITHOUT_TP.get(self.engine.split()[0], "") if self.tp > 1 else ""

    def words(self, folder: Path) -> Words:
        """The overrides; a JSON that one of them names is written into `folder`."""
        return (*engine(self.engine, folder), *LAYOUTS[self.layout], *([TP] if self.tp > 1 else []))


class Setting(NamedTuple):
    """What writes a checkpoint and what goes on from it: engine, layout, number of ranks."""

    engine: str
    layout: Words
    ranks: int

    def words(self, folder: Path) -> Words:
        return (*engine(self.engine, folder), *self.layout)


SETTINGS = {
    "ddp 1": Setting("ddp", ("parallel=single",), 1),
    "ddp, ring 2": Setting("ddp", LAYOUTS["ring"], 2),
    "fsdp, ring 2": Setting("fsdp", LAYOUTS["ring"], 2),
    "HSDP 2 x ring 2": Setting("HSDP", LAYOUTS["ring"], 4),
    "fsdp, tp 2 x ring 2": Setting("fsdp", (*LAYOUTS["ring"], TP), 4),
    "ZeRO 1, ulysses 2": Setting("ZeRO 1", LAYOUTS["ulysses"], 2),
    "ZeRO 2, gather 2": Setting("ZeRO 2", LAYOUTS["gather"], 2),
    "ZeRO 3, s2 2": Setting("ZeRO 3", ("parallel=s2",), 2),
    "megatron, ring 2": Setting("megatron", LAYOUTS["ring"], 2),
    "megatron, tp 2": Setting("megatron", ("parallel=single", TP), 2),
}


def engine(name: str, folder: Path) -> Words:
    words = ENGINES[name]
    return zero(words, folder) if isinstance(words, int) else words


def cells() -> list[Cell]:
    """USP needs 4 ranks, and so do replicas and tensor parallelism; both of these would need 8."""
    plain = [
        Cell(name, layout, ranks)
        for name in ENGINES
        for layout in LAYOUTS
        for ranks in (2, 4)
        if ranks == 4 or (layout != "usp" and name != "HSDP")
    ]
    shared = [Cell(name, layout, 4, 2) for name in ENGINES if name != "HSDP" for layout in LAYOUTS]
    return plain + [cell for cell in shared if cell.layout != "usp"]


def measured(paths: Sequence[Path]) -> dict[str, dict[tuple[str, str], str]]:
    """What the tests in JUnit files recorded, by table, row and column; `failed` of one that did not pass."""
    refused = {(cell.column, cell.engine): "refused" for cell in cells() if cell.refused}
    found: dict[str, dict[tuple[str, str], str]] = {TRAINING: refused, GOING_ON: {}}
    for case in (case for path in paths for case in ElementTree.parse(path).iter("testcase")):
        said = {x.attrib["name"]: x.attrib["value"] for x in case.iter("property")}
        if "table" in said:
            passed = case.find("failure") is None and case.find("error") is None
            found[said["table"]][said["row"], said["column"]] = said["value"] if passed else "failed"
    return found


def shape() -> dict[str, tuple[list[str], list[str]]]:
    """Rows and columns of the tables."""
    columns = [
        *(f"{layout} {ranks}" for ranks in (2, 4) for layout in LAYOUTS if (layout, ranks) != ("usp", 2)),
        *(f"tp 2 x {layout} 2" for layout in LAYOUTS if layout != "usp"),
    ]
    return {TRAINING: (columns, list(ENGINES)), GOING_ON: (list(SETTINGS), list(SETTINGS))}


def table(name: str, found: Mapping[tuple[str, str], str]) -> str:
    """Markdown; what was not measured is `-`. Of training a line is a layout, of checkpoints what wrote
    them.
    """
    lines, columns = shape()[name]
    return "\n".join(
        [
            f"| | {' | '.join(columns)} |",
            f"|---|{'---|' * len(columns)}",
            *(f"| {x} | {' | '.join(found.get((x, y), '-') for y in columns)} |" for x in lines),
        ]
    )


def marks(name: str) -> tuple[str, str]:
    return f"<!-- {name}:start -->", f"<!-- {name}:end -->"


def written(name: str) -> dict[tuple[str, str], str]:
    """The table that the docs hold now."""
    start, end = marks(name)
    rows = [
        [word.strip() for word in line.strip().strip("|").split("|")]
        for line in DOCS.read_text().partition(start)[2].partition(end)[0].strip().splitlines()
    ]
    return {(row[0], column): x for row in rows[2:] for column, x in zip(rows[0][1:], row[1:], strict=True)}


def main(files: Sequence[str]) -> None:
    for name, found in measured([Path(file) for file in files]).items():
        start, end = marks(name)
        print(start, table(name, found), end, sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
