"""What SLURM is asked for, and the batch script that asks: launch/slurm.sbatch with the blanks filled in."""

import re
import shlex
import sys
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import chain
from pathlib import Path
from string import Template

from omegaconf import MISSING

from ..train.config import SECRET
from .requeue import SCRIPT

TIME = re.compile(r"\d+|\d+:\d\d|\d+:\d\d:\d\d|\d+-\d+(:\d\d(:\d\d)?)?|UNLIMITED")
# sbatch reads the script's first lines by rules of its own: nothing in them may need quotes
PLAIN = re.compile(r"[\w./:,+&|*()\[\]@=%-]+")
# name=value, --name=value and --name value
GIVEN = re.compile(r"""(?<![\w-])(--[\w-]+|[A-Za-z_]\w*(?==))[= ]("[^"]*"|'[^']*'|[^\s;&|,]+)""")
# what the batch script must decide by itself
OURS = {
    "array", "job-name", "nodes", "ntasks", "ntasks-per-node", "requeue", "no-requeue", "signal", "output",
    "open-mode",
}  # fmt: skip


@dataclass
class Slurm:
    """nodes: how many. gpus, ranks, cpus, memory: of each; gpus=0 has none, ranks=null is one a GPU (or 1),
    memory is text such as 200G, 0 is all. time: limit such as 12:00:00.

    partition, account, qos, constraint, reservation: as sbatch takes them. grace_s: seconds before the time
    limit at which the ranks are told to save. restarts: how many may follow one another without a newer
    checkpoint. at_once: jobs of a sweep that run together. setup: lines of shell before the ranks start.
    options: further options of sbatch. Except nodes and gpus, null leaves it to the cluster.
    """

    nodes: int = MISSING
    gpus: int = 0
    ranks: int | None = None
    cpus: int | None = None
    memory: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    grace_s: int = 120
    restarts: int = 3
    at_once: int | None = None
    setup: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)

    @property
    def on_a_node(self) -> int:
        """Ranks on each node."""
        return self.ranks or self.gpus or 1

    def check(self) -> None:
        """Raises ValueError for what cannot be asked."""
        for name, least in (("nodes", 1), ("gpus", 0), ("ranks", 1), ("cpus", 1), ("grace_s", 1)):
            _at_least(name, getattr(self, name), least)
        _at_least("restarts", self.restarts, 0)
        _at_least("at_once", self.at_once, 1)
        if self.gpus and self.on_a_node > self.gpus:
            raise ValueError(
                f"slurm.ranks is {self.ranks}, but a node has slurm.gpus={self.gpus} and each rank needs a "
                f"GPU: leave slurm.ranks at null"
            )
        if self.time is not None and not TIME.fullmatch(self.time):
            raise ValueError(f"slurm.time is {self.time!r}; it must be like 90, 12:00:00 or 2-12:00:00")
        for name in ("memory", "partition", "account", "qos", "constraint", "reservation"):
            value = getattr(self, name)
            if value is not None and not PLAIN.fullmatch(value):
                raise ValueError(f"slurm.{name} is {value!r}; it must be one word, as sbatch takes it")
        for option in self.options:
            if not option.startswith("--") or not PLAIN.fullmatch(option):
                raise ValueError(f"slurm.options has {option!r}; each must be one word, such as --exclusive")
            # sbatch takes any beginning of a name for it
            given = option[2:].split("=")[0]
            if ours := sorted(name for name in OURS if name.startswith(given)):
                raise ValueError(f"slurm.options has {option!r}, but longspan submit sets --{ours[0]} itself")
        for line in self.setup:
            if "\n" in line:
                raise ValueError(f"slurm.setup has {line!r}; give a list with one line of shell in each")
        for key in ("setup", "options"):
            for name in chain.from_iterable(map(in_the_clear, getattr(self, key))):
                raise ValueError(
                    f"slurm.{key} gives {name} a value that would stand in {SCRIPT} for all to read: export "
                    f"{name} in the shell that submits, which sbatch hands on, or read it from a file "
                    f"({name}=$(cat FILE))"
                )

    def directives(self, name: str, folder: Path, jobs: int) -> list[str]:
        """The options of sbatch for a run folder, or for the `jobs` folders in one of a sweep."""
        together = f"%{self.at_once}" if self.at_once else ""
        given = {
            "job-name": re.sub(r"[^\w.-]", "_", name),
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": self.gpus or None,
            "cpus-per-task": self.cpus,
            "mem": self.memory,
            "time": self.time,
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "reservation": self.reservation,
            "array": f"0-{jobs - 1}{together}" if jobs else None,
            "output": f"{_path(folder)}/slurm-{'%A_%a' if jobs else '%j'}.log",
            "chdir": _path(Path.cwd()),
            "open-mode": "append",
            "signal": f"B:USR1@{self.grace_s}",
        }
        return [f"--{k}={v}" for k, v in given.items() if v is not None] + ["--requeue", *self.options]


def in_the_clear(line: str) -> list[str]:
    """The names in a line of shell that look like a secret's and get a value there that the line itself
    holds.
    """
    given = [(name.lstrip("-").replace("-", "_"), value.strip("'\"")) for name, value in GIVEN.findall(line)]
    plain = [(name, value) for name, value in given if value and not value.isdigit() and "$" not in value]
    return [name for name, value in plain if SECRET.search(name) and "`" not in value]


def _at_least(name: str, value: int | None, least: int) -> None:
    if value is not None and value < least:
        raise ValueError(f"slurm.{name} is {value}; it must be at least {least}")


def _path(path: Path) -> str:
    """A path as the first lines of a batch script take it."""
    text = str(path)
    if not PLAIN.fullmatch(text) or "%" in text:
        raise ValueError(
            f"{text!r} cannot stand in a batch script: take a folder without spaces and signs other than "
            f". _ - + , : = @"
        )
    return text


class Blanks(Template):
    """Blanks are `@name`: the shell has the dollar."""

    delimiter = "@"


def rendered(slurm: Slurm, folder: Path, *, jobs: int = 0) -> str:
    """The batch script of a run folder, or of one that holds those of a sweep of `jobs`. ValueError for
    settings that cannot be.
    """
    slurm.check()
    template = files(__package__).joinpath("slurm.sbatch").read_text()
    return Blanks(template).substitute(
        script=folder / SCRIPT,
        directives="\n".join(f"#SBATCH {option}" for option in slurm.directives(folder.name, folder, jobs)),
        folder=shlex.quote(str(folder)),
        restarts=slurm.restarts,
        grace=slurm.grace_s,
        python=shlex.quote(sys.executable),
        ranks=slurm.on_a_node,
        setup="\n".join(slurm.setup),
    )
