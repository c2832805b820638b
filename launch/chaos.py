"""python -m longspan.launch.chaos [fault ...] [override ...]: real jobs on gloo ranks, disturbed on purpose.

For each fault: what the job does, its exit code, the steps that are lost, the seconds until it trains again,
and whether its losses are those of a run that nothing disturbed. Exit code 1 if one does not do what its row
promises.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..train.entry import BAD_INPUT, FAILED
from ..train.record import write_json
from .chaos_bench import Bench
from .chaos_fault import STRIKES, Fault
from .chaos_files import FILES
from .chaos_outside import OUTSIDE
from .chaos_row import Row, Skipped, table

FAULTS: tuple[Fault, ...] = (*STRIKES, *FILES, *OUTSIDE)


def play(faults: Sequence[Fault], bench: Bench) -> Iterator[Row | Skipped]:
    """What came of each, told as it comes. A fault whose job could not be run at all has a broken row."""
    for fault in faults:
        began = time.monotonic()
        try:
            row = fault.play(fault, bench)
        except RuntimeError as error:
            row = Row(
                fault.name, fault.what, "", -1, "", None, None, None, broken=" ".join(str(error).split())
            )
        print(f"{fault.name} ({time.monotonic() - began:.0f} s): {verdict(row)}", file=sys.stderr, flush=True)
        yield row


def kept(path: Path, row: Row | Skipped) -> None:
    """Puts a row into a file of rows, in the place of an older one of the same fault."""
    told = json.loads(path.read_text()) if path.exists() else {"load": [], "rows": []}
    rows = {old["name"]: old for old in told["rows"]} | {row.name: vars(row)}
    loads = (*told["load"], round(os.getloadavg()[0], 1))
    told = {"machine": machine(), "load": [min(loads), max(loads)]}
    told["rows"] = [rows[fault.name] for fault in FAULTS if fault.name in rows]
    write_json(path, told)


def verdict(row: Row | Skipped) -> str:
    """In a word or two whether it kept what it promises."""
    if isinstance(row, Skipped):
        return f"skipped: {row.why}"
    return f"BROKEN: {row.broken}" if row.broken else "as promised"


def machine() -> str:
    """Where it runs, in words."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{os.cpu_count()} cores, {platform.system()}, {versions}"


def chosen(words: Sequence[str]) -> tuple[list[Fault], list[str]]:
    """The faults and the overrides on a command line. ValueError for a fault that is none."""
    names = [word for word in words if "=" not in word]
    known = {fault.name: fault for fault in FAULTS}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"{unknown[0]} is no fault: take some of {', '.join(known)}")
    return [known[name] for name in names] or list(FAULTS), [word for word in words if "=" in word]


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m longspan.launch.chaos", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="faults (all), and overrides for the jobs")
    parser.add_argument("--list", action="store_true", help="show the faults, and start nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there, or renew them")
    parser.add_argument("--keep", action="store_true", help="leave the run folders, and say where")
    parser.add_argument("--moments", type=int, default=20, help="how often a run is killed in a save")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; 0 if all faults did what they promise, 1 if not, 2 for words that cannot be."""
    given = _parsed(sys.argv[1:] if arguments is None else arguments)
    try:
        faults, overrides = chosen(given.words)
    except ValueError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return BAD_INPUT
    if given.list:
        print("".join(f"{fault.name:<16} {fault.what}\n" for fault in faults), end="")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    rows = []
    try:
        for row in play(faults, Bench(folder, overrides, moments=given.moments)):
            rows.append(row)
            if given.json is not None:
                kept(given.json, row)
    finally:
        if given.keep:
            print(f"the runs: {folder}")
        else:
            shutil.rmtree(folder)
    print(table(rows), end="")
    return FAILED if any(isinstance(row, Row) and row.broken for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
