"""Faults of what lies on the disk: damaged checkpoints, full disks, folders that cannot be written, records
that are none.
"""

import json
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..train.checkpoint import EXTRA
from ..train.entry import BAD_INPUT
from ..train.manifest import NAME
from .chaos_bench import EVERY, STEPS, Bench, Promise
from .chaos_fault import Fault
from .chaos_row import Row, Skipped

NO_MOUNT = "it needs the right to mount a small disk"
NAMED = r"skipped a damaged checkpoint: rank \d: \S+ .*"
RECORDS = 300
Damage = Callable[[Path, random.Random], None]


def flipped(path: Path, draw: random.Random) -> None:
    """Turns one bit of a file over."""
    data = bytearray(path.read_bytes())
    at = draw.randrange(8 * len(data))
    data[at // 8] ^= 1 << at % 8
    path.write_bytes(data)


def shortened(path: Path, draw: random.Random) -> None:
    """Cuts a file short."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def missing(path: Path, draw: random.Random) -> None:
    path.unlink()


@dataclass(frozen=True)
class Damaged:
    """Each of the newest checkpoints has one file spoilt, of those that fit a pattern; the one before them
    is whole.
    """

    files: tuple[tuple[str, Damage], ...]

    def __call__(self, fault: Fault, bench: Bench) -> Row:
        draw, count = random.Random(0), len(self.files)
        saved = sorted((bench.whole / "checkpoints").glob("step-*"))[: count + 1]
        run = bench.run(fault.name)
        for path in saved:
            shutil.copytree(path, run / "checkpoints" / path.name)
        for path, (pattern, damage) in zip(saved[1:], self.files, strict=True):
            damage(draw.choice(sorted((run / "checkpoints" / path.name).glob(pattern))), draw)
        rows = (bench.whole / "metrics.jsonl").read_bytes().splitlines(keepends=True)
        (run / "metrics.jsonl").write_bytes(b"".join(rows[: (count + 1) * EVERY]))
        life = bench.life(fault.name)
        told = life.said.count("skipped a damaged checkpoint")
        answer = f"{told} checkpoints are named and skipped, it goes on from the one before"
        row = bench.row(
            fault.name, fault.what, answer,
            [replace(life, struck=life.began, at=life.before + 1)],
            Promise((0,), NAMED, count * EVERY), lost=life.before - life.since,
        )  # fmt: skip
        return row if told == count else replace(row, broken=f"{told} of {count} were named")


@contextmanager
def small_disk(folder: Path, size: int, *options: str) -> Iterator[None]:
    """A disk of `size` bytes at `folder`. PermissionError where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    given = ",".join((f"size={size}", *options))
    mount = ["mount", "-t", "tmpfs", "-o", given, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        raise PermissionError(NO_MOUNT)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def size_of(checkpoint: Path) -> int:
    """Bytes that a checkpoint takes on a disk that is cut into pages."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in checkpoint.iterdir()) + 4096


def disk_full(fault: Fault, bench: Bench) -> Row | Skipped:
    """There is room for two checkpoints, and three should stay."""
    room = int(2.6 * size_of(newest(bench)))
    try:
        with small_disk(bench.run(fault.name) / "checkpoints", room):
            life = bench.life(fault.name, "checkpoint.keep=3")
    except PermissionError as error:
        return Skipped(fault.name, fault.what, str(error))
    answer = "the oldest checkpoint is deleted and the save tried again, training goes on"
    return bench.row(
        fault.name, fault.what, answer, [life], Promise((0,), "the disk is full: step-.* deleted")
    )


def disk_stays_full(fault: Fault, bench: Bench) -> Row | Skipped:
    """There is room for one checkpoint, until the run is started again."""
    folder = bench.run(fault.name) / "checkpoints"
    room = int(1.6 * size_of(newest(bench)))
    try:
        with small_disk(folder, room):
            lives = [bench.life(fault.name)]
            subprocess.run(["mount", "-o", f"remount,size={9 * room}", str(folder)], check=True)
            lives.append(bench.life(fault.name))
    except PermissionError as error:
        return Skipped(fault.name, fault.what, str(error))
    answer = "training goes on without saves and stops at the last one; given room, it starts from the first"
    promise = Promise((BAD_INPUT,), "could not be saved: .*No space left on device", STEPS)
    return bench.row(fault.name, fault.what, answer, lives, promise)


def newest(bench: Bench) -> Path:
    return max((bench.whole / "checkpoints").glob("step-*"))


def read_only(fault: Fault, bench: Bench) -> Row | Skipped:
    try:
        with small_disk(bench.run(fault.name), 1 << 20, "ro"):
            life = bench.life(fault.name)
    except PermissionError as error:
        return Skipped(fault.name, fault.what, str(error))
    answer = "refused before the first step"
    promise = Promise((BAD_INPUT,), r"run.dir=\S* cannot be written: .*", equal=None)
    return bench.row(fault.name, fault.what, answer, [life], promise)


def records(path: Path, bad: int) -> None:
    """JSON lines, `bad` of which are no JSON, in between."""
    draw = random.Random(0)
    lines = [json.dumps({"text": " ".join(draw.choices("abcdefgh", k=200))}) for _ in range(RECORDS)]
    step = RECORDS // bad
    for at in range(bad):
        lines[at * step] = '{"text": "half'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


@dataclass(frozen=True)
class Records:
    """A corpus with `bad` records that are none."""

    bad: int
    answer: str
    promise: Promise

    def __call__(self, fault: Fault, bench: Bench) -> Row:
        path = bench.folder / fault.name / "corpus.jsonl"
        records(path, self.bad)
        life = bench.life(fault.name, "data=text", f"data.path={path}")
        return bench.row(fault.name, fault.what, self.answer, [life], self.promise)


FILES = (
    Fault(
        "bit-flips", "one bit flipped in a checkpoint's tensors, index, extra.json, manifest",
        Damaged((("*.distcp", flipped), (".metadata", flipped), (EXTRA, flipped), (NAME, flipped))),
    ),
    Fault(
        "shards", "a shard of a checkpoint cut short, one missing",
        Damaged((("*.distcp", shortened), ("*.distcp", missing))),
    ),
    Fault("disk-full", "the disk has no room for another checkpoint", disk_full),
    Fault("disk-stays-full", "... and no old one may be deleted", disk_stays_full),
    Fault("read-only", "the run folder cannot be written", read_only),
    Fault(
        "bad-records", "3 of 300 records of the data are broken",
        Records(3, "they are skipped and counted", Promise((0,), r"\b3 bad records", equal=None)),
    ),
    Fault(
        "too-bad", "100 of 300 records of the data are broken",
        Records(100, "refused, with where they stand", Promise((BAD_INPUT,), "error: ", equal=None)),
    ),
)  # fmt: skip
