"""Traces of all ranks in one timeline, what is said when memory runs out, and which rank others wait for."""

import gzip
import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

from jobs import config
from longspan.parallel.comm import Traffic, exchange, post
from longspan.train import straggler
from longspan.train.agree import Ranks
from longspan.train.job import check_numbers
from longspan.train.out_of_memory import Held, OutOfMemory, advice, explained, measured
from longspan.train.pulse import Pulse
from longspan.train.straggler import OFTEN, Stragglers, busy
from longspan.train.timeline import ALL, MEETING, merge, packed
from longspan.train.trace import Tracer
from world import Worlds

Event = dict[str, Any]


def event(name: str, category: str, ts: float, dur: float, tid: int = 1) -> Event:
    return {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": tid, "ts": ts, "dur": dur}


def write(folder: Path, rank: int, events: Sequence[Event], host: str = "a", base: int = 0) -> None:
    told = {
        "baseTimeNanoseconds": base, "longspan": {"rank": rank, "host": host}, "traceEvents": list(events),
    }  # fmt: skip
    with gzip.open(folder / f"rank{rank}.json.gz", "wt") as file:
        json.dump(told, file)


def read(path: Path) -> tuple[dict[tuple[int, int], str], list[Event]]:
    """The lanes by rank and number, and the events in them, of a merged trace."""
    with gzip.open(path, "rt") as file:
        events = json.load(file)["traceEvents"]
    named = [e for e in events if e["ph"] == "M"]
    lanes = {(e["pid"], e["tid"]): e["args"]["name"] for e in named if e["name"] == "thread_name"}
    return lanes, [e for e in events if e["ph"] != "M"]


GPU = [
    event("forward", "user_annotation", 0, 90),
    event("aten::mm", "cpu_op", 5, 20),
    event("c10d::allreduce_", "cpu_op", 30, 5),
    event("nccl:all_reduce", "user_annotation", 30, 5),
    event("sm90_xmma_gemm", "kernel", 40, 30, tid=7),
    event("ncclDevKernel_AllReduce", "kernel", 50, 30, tid=20),
    event("Memcpy HtoD", "gpu_memcpy", 35, 4, tid=7),
    {"ph": "s", "id": 1, "cat": "ac2g", "name": "ac2g", "pid": 7, "tid": 1, "ts": 41.0},
    {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler", "pid": "Spans", "tid": "x", "ts": 0.0, "dur": 99},
]


def test_kernels_transfers_and_the_host_have_lanes_of_their_own(tmp_path: Path) -> None:
    write(tmp_path, 0, GPU)
    made = merge(tmp_path)
    lanes, events = read(made.path)
    assert (made.path.name, made.ranks, made.left_out) == (ALL, 1, [])
    found = {e["name"]: lanes[e["pid"], e["tid"]] for e in events}
    assert found == {
        "forward": "phases", "aten::mm": "host", "sm90_xmma_gemm": "kernels", "Memcpy HtoD": "kernels",
        "ncclDevKernel_AllReduce": "communication",
    }  # fmt: skip


def test_clocks_of_one_machine_are_kept_and_those_of_others_meet(tmp_path: Path) -> None:
    meeting = event(MEETING, "user_annotation", 100, 50)
    write(tmp_path, 0, [meeting, event("aten::mm", "cpu_op", 200, 10)], base=1_790_857_026_000_000_000)
    # 3 us later on the same clock
    write(tmp_path, 1, [meeting, event("aten::mm", "cpu_op", 200, 10)], base=1_790_857_026_000_003_000)
    # another machine, a day ahead, which was late at the meeting but left it with the others
    far = [event(MEETING, "user_annotation", 140, 10), event("aten::mm", "cpu_op", 207, 10)]
    write(tmp_path, 2, far, host="b", base=1_790_943_426_000_000_000)
    _, events = read(merge(tmp_path).path)
    at = {(e["pid"], e["name"]): e["ts"] for e in events}
    assert at[0, MEETING] == 0.0
    assert [at[rank, "aten::mm"] for rank in range(3)] == [100.0, 103.0, 107.0]
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)


def test_transfers_that_overlap_do_not_share_a_lane() -> None:
    spans = [(0, 10), (2, 3), (5, 9), (10, 4), (11, 1), (30, 1)]
    rows = packed([event("gloo:send", "user_annotation", ts, dur) for ts, dur in spans])
    assert len(rows) == 3 and sum(map(len, rows)) == len(spans)
    for row in rows:
        assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in zip(row, row[1:], strict=False))


def test_what_is_no_trace_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="trace.first=10 makes a run write them"):
        merge(tmp_path)
    write(tmp_path, 0, GPU)
    write(tmp_path, 11, GPU)
    whole = (tmp_path / "rank0.json.gz").read_bytes()
    # killed as it wrote, before it wrote, something else, and damaged later
    bad = (whole[:60], b"", gzip.compress(b"[]"), whole[:40] + bytes(40) + whole[80:])
    for rank, content in enumerate(bad, 1):
        (tmp_path / f"rank{rank}.json.gz").write_bytes(content)
    made = merge(tmp_path)
    assert made.ranks == 2 and {e["pid"] for e in read(made.path)[1]} == {0, 11}
    assert len(made.left_out) == len(bad)
    for rank, line in enumerate(made.left_out, 1):
        assert line.startswith(f"{tmp_path}/rank{rank}.json.gz is no trace of a rank (")
    for rank in (0, 11):
        (tmp_path / f"rank{rank}.json.gz").unlink()
    with pytest.raises(ValueError, match="rank1.json.gz is no trace of a rank"):
        merge(tmp_path)


def traced(rank: int, folder: Path) -> list[str]:
    """Four steps of which the second and third are traced: messages, an all-to-all, products, a sum."""
    pulse, notes, traffic = Pulse(), list[str](), Traffic()
    tracer = Tracer(folder, Ranks(), pulse, notes.append, first=2, steps=2)
    group, x = dist.group.WORLD, torch.ones(64, 64, requires_grad=True)
    assert group is not None
    for number in range(1, 5):
        with tracer.step(number):
            pulse.enter("forward")
            came = torch.empty(4096)
            post(group, [(x.detach().reshape(-1), 1 - rank)], [(came, 1 - rank)], traffic).wait()
            y = (x @ x + came.view(64, 64)).sum()
            pulse.enter("backward")
            y.backward()
            exchange(group, torch.ones(8), [4, 4], [4, 4], traffic)
            pulse.enter("reduce")
            dist.all_reduce(x.grad)
            pulse.enter("record")
    tracer.close()
    return notes


def test_a_trace_of_ranks_that_talk_is_one_timeline(world: Worlds, tmp_path: Path) -> None:
    notes = world(2)(traced, tmp_path)
    assert all(len(each) == 1 and "trace of 2 ranks" in each[0] for each in notes)
    lanes, events = read(tmp_path / "traces" / ALL)
    assert {rank for rank, _ in lanes} == {0, 1} == {e["pid"] for e in events}
    assert {"phases", "communication", "compute"} <= set(lanes.values())
    for rank in (0, 1):
        mine = [e for e in events if e["pid"] == rank]
        of = {kind: [e for e in mine if lanes[rank, e["tid"]].split()[0] == kind] for kind in lanes.values()}
        # only the steps that were asked for, their phases inside them
        steps = [e for e in of["phases"] if e["name"].startswith("step ")]
        assert [e["name"] for e in steps] == ["step 2", "step 3"]
        forwards = [e for e in of["phases"] if e["name"] == "forward"]
        for step, phase in zip(steps, forwards, strict=True):
            assert step["ts"] <= phase["ts"] and phase["ts"] + phase["dur"] <= step["ts"] + step["dur"]
        sent = [e["name"] for e in of["communication"]]
        assert sum("all_reduce" in name for name in sent) >= 2 and any("all_to_all" in name for name in sent)
        assert any("send" in name for name in sent) and any("recv" in name for name in sent)
        assert any(e["name"] == "aten::mm" for e in of["compute"])
    # clocks agree: the sums of both ranks overlap
    first, second = (
        [e for e in events if e["pid"] == rank and "all_reduce" in e["name"]][-1] for rank in (0, 1)
    )
    assert first["ts"] < second["ts"] + second["dur"] and second["ts"] < first["ts"] + first["dur"]
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)


def test_a_trace_that_cannot_be_written_stops_nothing(tmp_path: Path, world: Worlds) -> None:
    (tmp_path / "traces").write_text("")
    (notes,) = world(1)(alone, tmp_path)
    assert len(notes) == 1 and notes[0].startswith("no trace was written, training goes on: rank 0: ")
    (notes,) = world(1)(alone, tmp_path, None)
    assert notes == []


def alone(rank: int, folder: Path, first: int | None = 1) -> list[str]:
    notes: list[str] = []
    tracer = Tracer(folder, Ranks(), Pulse(), notes.append, first=first, steps=1)
    with tracer.step(1):
        torch.ones(2).sum()
    return notes


@pytest.mark.parametrize(("name", "value"), [("trace.first", 0), ("trace.steps", 0)])
def test_steps_that_cannot_be_traced_are_refused(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}; it must be at least 1"):
        check_numbers(config(f"{name}={value}"))


# memory runs out


FULL = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
)


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_running_out_of_memory_is_one_line_that_helps(error: Exception, tmp_path: Path) -> None:
    cfg = config("train.micro_batch=4", "parallel=ring")
    model = nn.Linear(256, 256)
    model(torch.ones(1, 256)).sum().backward()
    with pytest.raises(OutOfMemory) as caught, explained(cfg, tmp_path, model):
        raise error
    said = str(caught.value)
    assert "\n" not in said and said.startswith("out of memory, ") and str(error) in said
    assert "parameters 257.0 KiB, gradients 257.0 KiB" in said
    order = [
        "memory=long ",
        "memory=longest ",
        "train.micro_batch=2 train.accumulate=",
        "ranks on the sequence",
    ]
    assert [said.index(word) for word in order] == sorted(said.index(word) for word in order)
    assert "(now 4 and" in said and "recompute=none" in said
    # its frames, which hold the activations, are let go
    assert error.__traceback__ is None


def test_other_errors_pass_through(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="^shapes differ$"), explained(config(), tmp_path):
        raise RuntimeError("shapes differ")


def test_advice_begins_with_what_takes_most_and_leaves_out_what_is_done() -> None:
    said = advice(config("train.micro_batch=1"), "optimizer")
    assert said.startswith("Change, in this order: 1. engine=fsdp (now ddp") and "micro_batch" not in said
    assert "engine=fsdp" not in advice(config(), "activations")
    longest = advice(config("memory=longest", "engine=fsdp", "train.micro_batch=1"), "optimizer")
    assert "memory=" not in longest and longest.startswith("Change, in this order: 1. more ranks")
    held = Held(3 * 2**30, {"parameters": 2**29, "activations": 2**31, "gradients": 0}, "cuda:0")
    assert held.words() == "3.0 GiB at most on cuda:0: activations 2.0 GiB, parameters 512.0 MiB"
    assert held.most == "activations"
    assert measured(None, 10).parts == {"parameters": 0, "gradients": 0, "the rest": 10}


# ranks that are slow


def spin(seconds: float) -> None:
    end = busy() + seconds
    while busy() < end:
        pass


def test_waiting_is_not_being_busy() -> None:
    began = busy()
    time.sleep(0.05)
    slept = busy() - began
    spin(0.05)
    assert slept < 0.04 and busy() - began >= 0.05 + slept


def slowed(rank: int, slow: str, more: float) -> tuple[list[dict[str, float]], list[str]]:
    """On a clock of its own, a phase takes rank 1 so many seconds more than the 2 s of the others."""
    pulse, told, now = Pulse(), list[str](), 0.0
    clock = SimpleNamespace(perf_counter=lambda: now)
    with patch.object(straggler, "busy", lambda: now), patch.object(straggler, "time", clock):
        stragglers = Stragglers(Ranks(), pulse, told.append)
        rows = []
        for _ in range(OFTEN + 3):
            for phase in ("data", "forward", "record"):
                pulse.enter(phase)
                now += 2.0 + more * (rank == 1 and phase == slow)
            rows.append(stragglers.compared())
    return rows, told


@pytest.mark.parametrize("slow", ["forward", "data", "record"])
def test_the_busiest_rank_is_known(slow: str, world: Worlds) -> None:
    ranks = world(2)(slowed, slow, 1.0)
    assert all(found == ranks[0] for found in ranks)
    rows, told = ranks[0]
    # what is not a part of a step does not count
    late = slow != "record"
    most = {"step_s_max": 4.0 + late, "step_s_median": 4.0, "slowest_rank": float(late)}
    # the first interval lacks what came before it
    assert rows[1:] == [most] * (len(rows) - 1)
    assert told == []


def test_a_rank_that_stays_behind_is_told_once(world: Worlds) -> None:
    for rows, told in world(2)(slowed, "forward", 2.0):
        assert {row["slowest_rank"] for row in rows} == {1.0}
        (line,) = told
        assert line.startswith("rank 1 on ") and "is busy 1.5 times as long as the median rank" in line
        assert "(6 s a step against 4 s), most of it in forward:" in line


def test_one_rank_has_nobody_to_wait_for(world: Worlds) -> None:
    ((rows, told),) = world(1)(slowed, "forward", 2.0)
    assert rows == [{}] * len(rows) and told == []
