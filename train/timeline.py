"""One timeline of all ranks: a process per rank, with its phases, communication and kernels in lanes of their
own, in Chrome's trace-event format (https://ui.perfetto.dev opens it).
"""

import gzip
import heapq
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Event = dict[str, Any]

ALL = "all.json.gz"
# All ranks leave this range within the latency of a message: what clocks of several machines are aligned by.
MEETING = "all ranks meet"
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# The order of the lanes of a rank; a lane's number is its kind's and its place in it.
KINDS = ("phases", "communication", "kernels", "compute", "host")
WIDTH = 100


@dataclass(frozen=True)
class Part:
    """What one rank recorded. events: with `ts` in microseconds after `base`, in nanoseconds of its clock."""

    rank: int
    host: str
    base: int
    events: Sequence[Event]

    @property
    def met(self) -> float | None:
        """When the rank left the meeting."""
        ends = [e["ts"] + e["dur"] for e in self.events if e.get("name") == MEETING and e.get("ph") == "X"]
        return ends[0] if ends else None


@dataclass(frozen=True)
class Merged:
    """A timeline, how many ranks are in it, and in words which files were left out, since they are no traces
    of a rank: one that is killed leaves half a file.
    """

    path: Path
    ranks: int
    left_out: Sequence[str]


def merge(folder: Path) -> Merged:
    """Writes all.json.gz from every rank<r>.json.gz in `folder` that is whole.

    FileNotFoundError if there is no such file; ValueError, with its path, if none is whole.
    """
    parts, left_out = list[Part](), list[str]()
    for path in sorted(folder.glob("rank*.json.gz")):
        try:
            parts.append(read(path))
        except ValueError as error:
            left_out.append(str(error))
    if not parts and left_out:
        raise ValueError(left_out[0])
    if not parts:
        raise FileNotFoundError(f"{folder} holds no rank*.json.gz; trace.first=10 makes a run write them")
    parts.sort(key=lambda part: part.rank)
    whole = {"traceEvents": list(events_of(parts)), "displayTimeUnit": "ms"}
    path = folder / ALL
    part = path.with_name(f"{path.name}.part")
    with gzip.open(part, "wt", compresslevel=5) as file:
        json.dump(whole, file, separators=(",", ":"))
    os.replace(part, path)
    return Merged(path, len(parts), left_out)


def read(path: Path) -> Part:
    """The trace of one rank as torch's profiler wrote it. ValueError, with the path, for what is none."""
    try:
        with gzip.open(path, "rt") as file:
            told = json.load(file)
        who = told["longspan"]
        return Part(who["rank"], who["host"], int(told.get("baseTimeNanoseconds", 0)), told["traceEvents"])
    except (OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        raise ValueError(f"{path} is no trace of a rank ({type(error).__name__}: {error})") from error


def events_of(parts: Sequence[Part]) -> Iterator[Event]:
    """The events of all ranks: first the names of ranks and lanes, then the rest as time goes on, from 0."""
    named, timed = list[Event](), list[Event]()
    for part, shift in zip(parts, shifts(parts), strict=True):
        names, events = laned(part)
        named += names
        timed += [event | {"ts": event["ts"] + shift} for event in events]
    timed.sort(key=lambda event: event["ts"])
    start = timed[0]["ts"] if timed else 0.0
    yield from named
    for event in timed:
        yield event | {"ts": round(event["ts"] - start, 3)}


def shifts(parts: Sequence[Part]) -> list[float]:
    """Microseconds to add to each rank's times: clocks of one machine agree, those of others are set by the
    meeting.
    """
    first = parts[0]
    found = []
    for part in parts:
        shift = (part.base - first.base) / 1000
        if part.host != first.host and part.met is not None and first.met is not None:
            shift = first.met - part.met
        found.append(shift)
    return found


def laned(part: Part) -> tuple[list[Event], list[Event]]:
    """The names and the events of a rank: process `rank`, threads by what the events are."""
    device = any(e.get("cat") in DEVICE for e in part.events)
    transfers = any(_transfers(e) for e in part.events)
    lanes: dict[tuple[str, Any], list[Event]] = {}
    memory = []
    for event in part.events:
        if event.get("name") == "[memory]":
            memory.append(_counted(event, part.rank))
        elif event.get("ph") == "X" and (kind := kind_of(event, device, transfers)) is not None:
            # transfers are in flight beside each other, on threads that say nothing
            key = None if kind == "communication" else event["tid"]
            lanes.setdefault((kind, key), []).append(event)
    names, events = _named("process", part.rank, 0, f"rank {part.rank} on {part.host}", part.rank), memory
    for kind in KINDS:
        of_kind = [found for (which, _), found in lanes.items() if which == kind]
        rows = packed(of_kind[0]) if kind == "communication" and of_kind else _longest_first(of_kind)
        for place, row in enumerate(rows):
            lane = KINDS.index(kind) * WIDTH + place
            names += _named("thread", part.rank, lane, kind + (f" {place + 1}" if place else ""), lane)
            events += [_kept(event, part.rank, lane) for event in row]
    return names, events


def kind_of(event: Mapping[str, Any], device: bool, transfers: bool) -> str | None:
    """What an event is, or None for what is told better by another. device: the rank has kernels of a GPU;
    transfers: it has events of the transfers themselves.
    """
    category, name = event.get("cat", ""), event["name"]
    if _transfers(event):
        return "communication"
    if category in DEVICE:
        return "kernels"
    if category == "user_annotation":
        # what asks NCCL for a transfer, which is a kernel
        return None if name.startswith("nccl:") else "phases"
    if category != "cpu_op":
        return None
    if name.startswith("c10d::"):
        return None if transfers else "communication"
    return "host" if device else "compute"


def _transfers(event: Mapping[str, Any]) -> bool:
    name = str(event.get("name", ""))
    if event.get("cat") in DEVICE:
        return name.lower().startswith("nccl")
    return event.get("cat") in ("user_annotation", "cpu_op") and name.startswith("gloo:")


def packed(events: Iterable[Event]) -> list[list[Event]]:
    """The events in as few rows as hold them without overlap."""
    rows: list[list[Event]] = []
    free: list[tuple[float, int]] = []
    for event in sorted(events, key=lambda e: e["ts"]):
        if free and free[0][0] <= event["ts"]:
            _, row = heapq.heappop(free)
        else:
            row = len(rows)
            rows.append([])
        rows[row].append(event)
        heapq.heappush(free, (event["ts"] + event["dur"], row))
    return rows


def _longest_first(rows: list[list[Event]]) -> list[list[Event]]:
    """The thread that trains before those that help it."""
    return sorted(rows, key=lambda row: -sum(e["dur"] for e in row))


def _kept(event: Event, rank: int, lane: int) -> Event:
    shape = {k: v for k, v in event.get("args", {}).items() if k in ("Input Dims", "stream", "Bytes")}
    kept = {name: event[name] for name in ("name", "cat", "ph", "ts", "dur")}
    return kept | {"pid": rank, "tid": lane} | ({"args": shape} if shape else {})


def _counted(event: Event, rank: int) -> Event:
    """A count of bytes, which is drawn as a curve."""
    args = event.get("args", {})
    where = "device" if args.get("Device Type") else "host"
    value = {"bytes": args.get("Total Allocated", 0)}
    return {"name": f"allocated, {where}", "ph": "C", "ts": event["ts"], "pid": rank, "args": value}


def _named(what: str, rank: int, lane: int, name: str, order: int) -> list[Event]:
    """The name of a rank or of a lane, and its place among the others."""
    at = {"ph": "M", "pid": rank, "tid": lane}
    return [
        {"name": f"{what}_name", **at, "args": {"name": name}},
        {"name": f"{what}_sort_index", **at, "args": {"sort_index": order}},
    ]
