"""python -m longspan.launch.verify_resume --ranks 2 --then-ranks 4 --then parallel=usp -- experiment=tiny"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.errors import HydraException

from ..train.shelf import LATEST

# of these nothing may differ: which samples a step took, and how far it went with them
EXACT = ("lr", "tokens", "valid")
CLOSE = ("loss", "grad_norm")


@dataclass(frozen=True)
class Side:
    """One way to run the job: over so many ranks, with these overrides."""

    name: str
    ranks: int
    words: tuple[str, ...]


@dataclass(frozen=True)
class Found:
    """A run that went on from step `since` of another, against the one that it left."""

    name: str
    since: int
    steps: int
    exact: bool  # learning rate and tokens of each step are the same
    apart: dict[str, float]  # greatest relative difference of a step's value

    def passed(self, tolerance: float) -> bool:
        """Whether nothing differs by more: nothing at all, where a run went on as it was."""
        left, right = self.name.split(" to ")
        tolerance = 0.0 if left == right else tolerance
        return self.exact and all(x <= tolerance for x in self.apart.values())

    def line(self) -> str:
        apart = ", ".join(f"{name} {'bit-equal' if x == 0 else f'{x:.1e}'}" for name, x in self.apart.items())
        order = "" if self.exact else "; OTHER SAMPLES OR LEARNING RATES"
        return f"{self.name}: steps {self.since + 1} to {self.steps}: {apart}{order}"


def verify(first: Side, second: Side, at: int, folder: Path) -> list[Found]:
    """Runs the job whole on both sides, and from step `at` of each on the other one and on itself.

    Raises:
        RuntimeError: A run failed; its output is in `folder`.
    """
    sides = [first] if first == second else [first, second]
    whole = {side.name: _run(side, at, folder / side.name) for side in sides}
    found = []
    for left, right in [(first, first), *zip(sides, sides[::-1], strict=True)][: 2 * len(sides) - 1]:
        name = f"{left.name} to {right.name}"
        target = folder / name.replace(" ", "-")
        step = f"step-{at:08d}"
        shutil.copytree(folder / left.name / "checkpoints" / step, target / "checkpoints" / step)
        (target / "checkpoints" / LATEST).write_text(f"{step}\n")
        found.append(compared(name, at, _run(right, at, target), whole[left.name]))
    return found


def compared(
    name: str, since: int, got: Sequence[dict[str, float]], want: Sequence[dict[str, float]]
) -> Found:
    """The rows of the steps after `since` of a run that went on, beside those of the one it left."""
    after = [row for row in want if row["step"] > since]
    exact = [r["step"] for r in got] == [r["step"] for r in after] and all(
        a[key] == b[key] for a, b in zip(got, after, strict=False) for key in EXACT
    )
    apart = {
        key: max((_apart(a[key], b[key]) for a, b in zip(got, after, strict=False)), default=0.0)
        for key in CLOSE
    }
    return Found(name, since, int(after[-1]["step"]) if after else since, exact, apart)


def _apart(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b) / (abs(b) or 1.0)


def _run(side: Side, every: int, folder: Path) -> list[dict[str, float]]:
    folder.mkdir(parents=True, exist_ok=True)
    words = [
        *side.words, f"run.dir={folder}", "resume=auto", "train.log_every=1", f"checkpoint.every={every}",
        "checkpoint.keep=1000", "track=none",
    ]  # fmt: skip
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(side.ranks)]
    command = [sys.executable, *(start if side.ranks > 1 else []), "-m", "longspan.train", *words]
    with (folder / "output.txt").open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = (folder / "output.txt").read_text().strip().splitlines()[-12:]
        raise RuntimeError("\n".join([f"{' '.join(command)} left with {code}:", *last]))
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if "loss" in row]


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m longspan.launch.verify_resume",
        description="Trains a job whole and from a checkpoint in its middle, both ways between two settings.",
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes of the first setting")
    parser.add_argument("--then-ranks", type=int, help="processes of the second; by default the same")
    parser.add_argument("--then", nargs="*", default=[], metavar="WORD", help="overrides of the second alone")
    parser.add_argument("--at", type=int, help="the step to go on from; by default the middle")
    parser.add_argument("--folder", type=Path, help="where the runs stay; by default they are deleted")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="greatest relative difference that passes"
    )
    parser.add_argument("words", nargs="+", metavar="OVERRIDE", help="of both, as longspan.train takes them")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line for each way; 0 if all passed, 1 if not, 2 for settings that cannot be."""
    given = _parsed(sys.argv[1:] if arguments is None else arguments)
    ranks = given.then_ranks or given.ranks
    first = Side("first", given.ranks, tuple(given.words))
    second = Side("second", ranks, (*given.words, *given.then))
    if (first.ranks, first.words) == (second.ranks, second.words):
        second = first
    try:
        with initialize_config_module("longspan.conf", version_base="1.3"):
            steps = compose("train", overrides=list(second.words)).train.steps
    except HydraException as error:
        print(f"verify_resume: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    if not isinstance(steps, int):
        print(f"verify_resume: train.steps is {steps}; give a number of steps", file=sys.stderr)
        return 2
    if given.folder is not None and given.folder.exists() and any(given.folder.iterdir()):
        print(f"verify_resume: --folder {given.folder} is not empty; give a new one", file=sys.stderr)
        return 2
    at = steps // 2 if given.at is None else given.at
    if min(first.ranks, second.ranks) < 1 or not 0 < at < steps:
        print(
            f"verify_resume: --ranks {given.ranks}, --then-ranks {ranks}, --at {at}: give at least one rank, "
            f"and a step from 1 to {steps - 1} (train.steps is {steps})",
            file=sys.stderr,
        )
        return 2
    with tempfile.TemporaryDirectory() as temporary:
        try:
            found = verify(first, second, at, given.folder or Path(temporary))
        except RuntimeError as error:
            print(f"verify_resume: {error}", file=sys.stderr)
            return 1
    for each in found:
        print(("ok    " if each.passed(given.tolerance) else "WRONG ") + each.line())
    return 0 if all(each.passed(given.tolerance) for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
