"""What a fault did to a run, and the table of it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

HEAD = ("fault", "what happens", "exit code", "steps lost", "seconds to recover", "losses as undisturbed")
LONGEST = 230
# what torch's logs put before what they say
STAMP = re.compile(r"^[EWI]\d{4} [\d:.]+ \d+ \S+\] ")


@dataclass(frozen=True)
class Row:
    """One fault. answer: what the run does about it, as promised; code: exit code of the start that was
    struck; said: the line that it printed about it.

    lost: steps that had to be done again, or whose update was left out. seconds: from the fault to a step
    that was not there before, with the new start, if one was needed. equal: whether all losses are, bit for
    bit, those of a run that nothing disturbed; None where they cannot be. broken: what was promised and did
    not happen. None elsewhere: there is no such number.
    """

    name: str
    fault: str
    answer: str
    code: int
    said: str
    lost: int | None
    seconds: float | None
    equal: bool | None
    broken: str = ""

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        line = f": `{self.said.replace('|', '/')}`" if self.said else ""
        equal = {None: "does not apply", True: "yes", False: "no"}[self.equal]
        happened = f"**{self.broken}**" if self.broken else f"{self.answer}{line}"
        return (self.fault, happened, str(self.code), _or_none(self.lost), _or_none(self.seconds), equal)


@dataclass(frozen=True)
class Skipped:
    """A fault that cannot be made here, and why."""

    name: str
    fault: str
    why: str

    def cells(self) -> tuple[str, ...]:
        return (self.fault, f"not tried: {self.why}", *["-"] * 4)


def _or_none(number: float | None) -> str:
    if number is None:
        return "-"
    return str(number) if isinstance(number, int) else f"{number:.1f}"


def table(rows: Iterable[Row | Skipped]) -> str:
    """The rows in Markdown."""
    lines = [HEAD, ("---",) * len(HEAD), *(row.cells() for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def read(rows: Iterable[dict[str, Any]]) -> list[Row | Skipped]:
    """What `vars` made of rows."""
    return [Skipped(**row) if "why" in row else Row(**row) for row in rows]


def shortened(line: str, folder: str) -> str:
    """One line of an output without the folder that it names, and without ends that say no more."""
    line = " ".join(STAMP.sub("", line).replace(f"{folder}/", "").split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
