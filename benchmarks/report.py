"""What was measured, beside what it is held against: as a table, and as JSON."""

import json
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .cases import OURS, Case, Shape
from .peers import DENSE, Contender

Key = tuple[str, int, Shape, torch.dtype]


class Unit(NamedTuple):
    """In which rates are shown: so many of it are a TFLOP/s."""

    name: str = "TFLOP/s"
    factor: float = 1.0


UNITS = {"cuda": Unit(), "cpu": Unit("GFLOP/s", 1e3)}


class Both(NamedTuple):
    """A number for the forward pass and one for the backward."""

    forward: float
    backward: float


@dataclass(frozen=True)
class Found:
    """One contender at one case. `first`: seconds until the first result, with compilation and lists."""

    ms: Both
    rounds: int
    first: float
    gib: float | None
    errors: dict[str, float]


@dataclass(frozen=True)
class Entry:
    """One case. `pairs`: visible (query, key) pairs, averaged over heads; `lists_ms`: building all lists."""

    case: Case
    pairs: float
    lists_ms: float
    found: dict[str, Found | str] = field(default_factory=dict)

    def measured(self) -> dict[str, Found]:
        return {name: x for name, x in self.found.items() if isinstance(x, Found)}

    def tflops(self, found: Found) -> Both:
        """Over the visible pairs: 4 * heads * pairs * head_dim operations forward, 2.5 times that back."""
        operations = 4e-9 * self.case.shape.q_heads * self.pairs * self.case.shape.head_dim
        return Both(operations / found.ms.forward, 2.5 * operations / found.ms.backward)


@dataclass
class Results:
    """All entries so far, and what there was no time for."""

    entries: dict[Key, Entry] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)

    def over_dense(self, entry: Entry, found: Found) -> Both | None:
        """How many times faster than the best dense peer at the same length and shape, forward and backward
        each.
        """
        dense = self.entries.get(entry.case.yardstick)
        peers = [x.ms for name, x in dense.measured().items() if name in DENSE] if dense else []
        if not peers:
            return None
        best = Both(*(min(x) for x in zip(*peers, strict=True)))
        return Both(*(a / b for a, b in zip(best, found.ms, strict=True)))

    def of_ideal(self, entry: Entry, name: str, found: Found) -> Both | None:
        """Of the speed that its own dense time, times the share of the dense area, would be."""
        dense = self.entries.get(entry.case.yardstick)
        own = dense.found.get(name) if dense else None
        if not dense or not isinstance(own, Found) or not entry.case.sparse:
            return None
        share = entry.pairs / dense.pairs
        return Both(*(share * a / b for a, b in zip(own.ms, found.ms, strict=True)))

    def failures(self) -> list[str]:
        """Cases in which our own kernels gave no result."""
        return [
            f"{entry.case}: {entry.found[name]}"
            for entry in self.entries.values()
            for name in OURS
            if isinstance(entry.found.get(name), str)
        ]


def table(results: Results, entry: Entry, names: Iterable[str], unit: Unit) -> Iterator[str]:
    """Lines on one case: forward, then backward."""
    share = entry.pairs / entry.case.tokens**2
    yield f"{entry.case}: {share:.2%} of all pairs, lists in {entry.lists_ms:.1f} ms"
    side = "".join(f"{word:>9}" for word in ("ms", unit.name, "x dense", "of ideal"))
    rest = "".join(f"{word:>9}" for word in ("GiB", "error", "of grads", "first s"))
    yield f"  {'':<14}{side}  |{side}  |{rest}"
    for name in names:
        found = entry.found[name]
        text = found if isinstance(found, str) else _row(results, entry, name, unit.factor)
        yield f"  {name:<14}{text}"
    yield from _speed(entry)


def _speed(entry: Entry) -> Iterator[str]:
    """One line: how many times faster our own kernels are than each of the others at this case."""
    measured = entry.measured()
    own = next((measured[name] for name in OURS if name in measured), None)
    others = {name: x.ms for name, x in measured.items() if x is not own}
    if own is None or not others:
        return
    sides = (
        ", ".join(f"{ms[i] / own.ms[i]:.2f}x {name}" for name, ms in others.items()) for i in (0, 1)
    )  # fmt: skip
    yield "  longspan is {} forward; {} backward".format(*sides)


def _row(results: Results, entry: Entry, name: str, factor: float) -> str:
    found = entry.measured()[name]
    held = results.over_dense(entry, found), results.of_ideal(entry, name, found)
    columns = found.ms, entry.tflops(found), *held
    sides = zip(*(x or (None, None) for x in columns), strict=True)
    text = "  |".join(
        _cell(ms, ".3f") + _cell(rate and rate * factor, ".1f") + _cell(times, ".2f") + _cell(ideal, ".0%")
        for ms, rate, times, ideal in sides
    )
    error, *grads = found.errors.values()
    rest = (found.gib, ".2f"), (error, ".1e"), (max(grads), ".1e"), (found.first, ".1f")
    return f"{text}  |{''.join(_cell(*x) for x in rest)}"


def _cell(number: float | None, form: str) -> str:
    return f"{'-' if number is None else format(number, form):>9}"


def document(results: Results, device: torch.device, contenders: Iterable[Contender], settings: Any) -> Any:
    """All of it, for JSON: forward and backward as pairs, times in ms and s, memory in GiB."""
    return {
        "device": device_name(device),
        "versions": versions(device, [x.package for x in contenders if x.package]),
        "settings": settings,
        "cases": [_case(results, entry) for entry in results.entries.values()],
        "dropped": results.dropped,
    }


def _case(results: Results, entry: Entry) -> dict[str, Any]:
    case = entry.case
    return {
        "name": case.name,
        "mask": repr(case.mask),
        "tokens": case.tokens,
        **case.shape._asdict(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "pairs": entry.pairs,
        "lists_ms": entry.lists_ms,
        "found": {
            name: found
            if isinstance(found, str)
            else {
                **asdict(found),
                "tflops": entry.tflops(found),
                "over_dense": results.over_dense(entry, found),
                "of_ideal": results.of_ideal(entry, name, found),
            }
            for name, found in entry.found.items()
        },
    }


def versions(device: torch.device, packages: Iterable[str]) -> dict[str, str | None]:
    """Of everything that was measured, torch and these packages; None: not installed."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def device_name(device: torch.device) -> str:
    """As its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def slug(device: torch.device) -> str:
    """For a file's name: a GPU's own, or cpu."""
    name = device_name(device) if device.type == "cuda" else "cpu"
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def save(path: Path, content: Any) -> None:
    """As JSON; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
