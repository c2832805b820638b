"""Training: the same losses on every layout, the same again after any stop, and an orderly end."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from corpora import write_documents
from jobs import (
    Kept,
    Ran,
    Row,
    config,
    furthest,
    launch_of,
    probe,
    run,
    together,
    values,
    wait_for,
    whole,
)
from longspan.kernels.mask import Mask
from longspan.models.gpt import GPT
from longspan.parallel.layout import Layout
from longspan.parallel.placement import Placement
from longspan.train import loop as loops
from longspan.train import measure
from longspan.train.batch import Batch, Shard, collate, held
from longspan.train.checkpoint import Checkpoints
from longspan.train.config import made
from longspan.train.data.sample import IGNORE
from longspan.train.job import build, build_model, processes
from longspan.train.loop import Diverged, Loop, State
from longspan.train.preempt import EXIT_PREEMPTED, Preempt
from longspan.train.track import Metrics
from world import RankFailed, Worlds

Once = Callable[..., list[Ran]]
COUNTED = ("step", "lr", "tokens", "valid")
EXACT = (*COUNTED, "loss", "grad_norm")
STEPS = 20
# cells of the first test that are run by `make test-all` alone
MORE = {(2, "contiguous", "unpacked"), (4, "contiguous", "unpacked"), (3, "zigzag", "unpacked")}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"data.cache={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def once(world: Worlds, cache: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Once]:
    """The run of a config on so many ranks, by rank, never done twice."""
    done: dict[tuple[int, tuple[str, ...]], list[Ran]] = {}

    def ran(size: int, *overrides: str) -> list[Ran]:
        if (size, overrides) not in done:
            folder = tmp_path_factory.mktemp("run") / "checkpoints"
            done[size, overrides] = world(size)(run, config(cache, *overrides), folder)
        return done[size, overrides]

    yield ran


def ring(placement: str = "zigzag", *overrides: str) -> tuple[str, ...]:
    return ("parallel=ring", f"parallel.layout.placement={placement}", *overrides)


def assert_same(got: list[Ran], want: list[Ran], *, since: int = 0) -> None:
    """Steps after `since` saw the same sequences, and nothing of them differs but by rounding."""
    left = [t for t in together(want) if t.step >= since]
    assert together(got) == left
    assert len(left) == 2 * (len(want[0].rows) - since)
    for ran in got:
        rows = want[0].rows[since:]
        assert values(ran.rows, "step", "lr", "tokens", "valid").equal(
            values(rows, "step", "lr", "tokens", "valid")
        )
        assert furthest(values(ran.rows, "loss"), values(rows, "loss")) < 2e-6
        assert furthest(values(ran.rows, "grad_norm"), values(rows, "grad_norm")) < 1e-5
        assert_same_tokens(ran.losses, want[0].losses)


def assert_same_tokens(got: Tensor, want: Tensor) -> None:
    worst = (got - want).abs()
    assert worst.max() < 2e-5, f"token {int(worst.amax(0).argmax())} is off by {float(worst.max())} nats"


CELLS = [
    pytest.param(
        size, placement, pack, marks=[pytest.mark.slow] if (size, placement, pack) in MORE else [],
        id=f"{placement} {size} {pack}",
    )
    for pack in ("packed", "unpacked") for placement in ("contiguous", "zigzag") for size in (2, 3, 4)
]  # fmt: skip


@pytest.mark.parametrize(("size", "placement", "pack"), CELLS)
def test_a_ring_trains_as_one_process(once: Once, size: int, placement: str, pack: str) -> None:
    packing = f"data.pack={str(pack == 'packed').lower()}"
    assert_same(once(size, *ring(placement, packing)), once(1, "parallel=single", packing))


CONF = Path(__file__).resolve().parents[1] / "conf"
LAYOUTS = sorted({path.stem for path in (CONF / "parallel").glob("*.yaml")} - {"single", "ring"})
# masks that these layouts are made for, at the size of the test
MASKS = {
    "s2": ("mask=s2", "mask.left.block=16", "mask.left.local=2", "mask.left.stride=2"),
    "star": ("mask=star", "mask.left.block=32", "mask.left.anchor=32", "mask.left.context=192"),
}


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_every_layout_trains_as_one_process(once: Once, parallel: str) -> None:
    short = (*MASKS.get(parallel, ("mask=causal",)), "train.steps=5")
    size = 4 if parallel == "usp" else 2
    assert_same(once(size, f"parallel={parallel}", *short), once(1, "parallel=single", *short))


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, ("parallel=single", "train.accumulate=2")),
        (2, ring("zigzag", "parallel.mesh.dp=2", "parallel.mesh.ring=1")),
        (4, ring("zigzag", "parallel.mesh.dp=2", "parallel.mesh.ring=2")),
        (2, ring("contiguous", "train.accumulate=2")),
    ],
    ids=["accumulate", "dp2 ring1", "dp2 ring2", "ring2 accumulate"],
)
def test_a_step_is_the_same_however_it_is_cut(once: Once, size: int, overrides: tuple[str, ...]) -> None:
    one = once(1, "parallel=single", "data.pack=true")
    assert_same(once(size, *overrides, "train.micro_batch=1"), one)


def test_recomputed_activations_change_nothing(once: Once) -> None:
    kept, again = once(2, *ring("zigzag", "data.pack=true")), once(2, *ring("zigzag", "memory=long"))
    assert values(again[0].rows, *EXACT).equal(values(kept[0].rows, *EXACT))
    assert again[0].losses.equal(kept[0].losses)


def test_bfloat16_trains_like_float32(once: Once) -> None:
    exact = values(once(2, *ring("zigzag", "data.pack=true"))[0].rows, "loss")
    losses = values(once(2, *ring("zigzag", "train.precision=bfloat16"))[0].rows, "loss")
    assert 1e-5 < furthest(losses, exact) < 1e-2


def plain(cfg: DictConfig) -> list[Row]:
    """The same training with nothing but torch: dense masks, its own attention, loss and AdamW."""
    data = made(cfg.data)
    model = build_model(cfg, data, made(cfg.mask))
    assert isinstance(model, GPT)
    flat = [p for n, p in model.named_parameters() if p.ndim < 2 or n == "embed.weight"]
    deep = [p for n, p in model.named_parameters() if p.ndim == 2 and n != "embed.weight"]
    groups = [{"params": deep, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    rows = []
    for step in range(cfg.train.steps):
        batch = collate([data.sample(2 * step + i) for i in range(2)])
        at = torch.arange(data.context)
        document = torch.stack([torch.bucketize(at, torch.tensor(o), right=True) for o in batch.offsets])
        seen = (document[:, :, None] == document[:, None, :]) & (at[:, None] >= at)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, seen: Tensor = seen) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
            return out.transpose(1, 2)

        logits = model.head(model(batch.tokens, at, attend))
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = 2e-3 * ((step + 1) / 5 if step < 5 else 0.1 + 0.9 * (1 + cos(pi * (step - 5) / 15)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        rows.append({"step": step + 1, "loss": loss.item(), "grad_norm": float(norm), "lr": lr})
    return rows


def test_training_is_what_plain_torch_does(once: Once, cache: str) -> None:
    want = plain(config(cache))
    got = once(1, "parallel=single", "data.pack=true")[0].rows
    assert len(want) == len(got) == STEPS
    for name, tolerance in (("step", 0), ("lr", 1e-12), ("loss", 2e-6), ("grad_norm", 2e-5)):
        assert furthest(values(got, name), values(want, name)) <= tolerance
    assert got[-1]["loss"] < got[0]["loss"] - 0.5


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (3, ring("contiguous")),
        (2, ring("zigzag")),
        (4, ring("contiguous", "parallel.mesh.dp=2", "parallel.mesh.ring=2", "train.micro_batch=1")),
        (3, ("parallel=single", "train.micro_batch=2", "train.accumulate=1")),
    ],
    ids=["ring3", "ring2", "dp2 ring2", "dp3"],
)
def test_ranks_with_different_numbers_of_valid_tokens(
    once: Once, cache: str, tmp_path_factory: pytest.TempPathFactory, size: int, layout: tuple[str, ...]
) -> None:
    corpus = tmp_path_factory.getbasetemp() / "corpus"
    if not corpus.exists():
        write_documents(corpus)
    data = ("data=text", f"data.path={corpus}", "data.context=61", "data.pack=false", "data.held_out=0.2")
    short = (*data, "train.steps=6", "optim.warmup=2")
    sequences = 6 if "parallel=single" in layout else 2
    one = once(1, "parallel=single", *short, f"train.micro_batch={sequences}")
    # else the test shows nothing
    labels = torch.stack(
        [torch.from_numpy(made(config(cache, *short).data).sample(i).labels) for i in range(16)]
    )
    counts = torch.stack([(part != IGNORE).sum(1) for part in labels.tensor_split(3, 1)])
    assert (counts[0].gt(0) & counts[2].eq(0)).any() and counts[2].gt(0).any()
    got = once(size, *layout, *short)
    assert together(got) == together(one)
    for ran in got:
        assert furthest(values(ran.rows, "loss", "valid"), values(one[0].rows, "loss", "valid")) < 2e-6
        assert furthest(values(ran.rows, "grad_norm"), values(one[0].rows, "grad_norm")) < 1e-5
        assert_same_tokens(ran.losses, one[0].losses)


def labelled_too_late(layout: Layout, batch: Batch, placement: Placement, device: torch.device) -> Shard:
    """`held` with the fault that design forbids: each rank shifts the tokens that it holds."""
    part = held(layout, batch, placement, device)
    labels = torch.cat((part.tokens[:, 1:], torch.full_like(part.tokens[:, :1], IGNORE)), 1)
    return replace(part, labels=labels)


def first_losses(rank: int, cfg: DictConfig, fault: bool) -> Tensor:
    """`probe` before any training."""
    launch = launch_of(rank)
    with processes(launch, "cpu", 60.0) as device:
        job = build(cfg, launch, device)
        if not fault:
            return probe(job)
        with patch.object(measure, "held", labelled_too_late):
            return probe(job)


def test_a_label_that_is_lost_at_a_shard_border_is_seen(world: Worlds, cache: str) -> None:
    want = world(1)(first_losses, config(cache, "parallel=single"), False)[0]
    cfg = config(cache, *ring("contiguous"))
    right, wrong = (world(2)(first_losses, cfg, fault)[0] for fault in (False, True))
    assert_same_tokens(right, want)
    with pytest.raises(AssertionError, match="token 127 is off by"):
        assert_same_tokens(wrong[:, :-1], want[:, :-1])
    # a mean hardly moves
    assert furthest(wrong.mean(), want.mean()) < 0.02


@pytest.mark.parametrize(
    ("size", "layout"), [(1, ("parallel=single",)), (4, ring())], ids=["single", "ring4"]
)
def test_two_resumes_on_the_same_ranks_are_bit_equal(
    world: Worlds, once: Once, cache: str, tmp_path: Path, size: int, layout: tuple[str, ...]
) -> None:
    straight = once(size, *layout, "data.pack=true")
    cfg = config(cache, *layout, "data.pack=true")
    parts = [world(size)(run, cfg, tmp_path, stop) for stop in (6, 9, 13)]
    for rank, whole_run in enumerate(straight):
        pieces = [part[rank] for part in parts]
        assert [len(p.rows) for p in pieces] == [6, 3, 4]
        rows = [row for p in pieces for row in p.rows]
        assert values(rows, *EXACT).equal(values(whole_run.rows[:13], *EXACT))
        assert [t for p in pieces for t in p.taken] == [t for t in whole_run.taken if t.step < 13]


def test_a_resume_on_other_ranks_goes_on_with_the_same_samples(
    world: Worlds, once: Once, cache: str, tmp_path: Path
) -> None:
    begun = world(2)(run, config(cache, *ring()), tmp_path / "begun", 6)
    assert len(begun[0].rows) == 6
    others = {
        1: ("parallel=single",),
        4: ring("contiguous", "parallel.mesh.dp=2", "parallel.mesh.ring=2", "train.micro_batch=1"),
    }
    for size, layout in others.items():
        shutil.copytree(tmp_path / "begun", tmp_path / str(size))
        rest = world(size)(run, config(cache, *layout), tmp_path / str(size))
        assert_same(rest, once(1, "parallel=single", "data.pack=true"), since=6)


def refused(rank: int, cfg: DictConfig, folder: Path) -> str:
    """What `run` says when it raises a ValueError."""
    with pytest.raises(ValueError) as caught:
        run(rank, cfg, folder)
    return str(caught.value)


def test_other_data_is_refused_on_resume(world: Worlds, cache: str, tmp_path: Path) -> None:
    world(1)(run, config(cache, "parallel=single"), tmp_path, 2)
    for word in ("seed=1", "data.context=128", "data.pack=false"):
        said = world(1)(refused, config(cache, "parallel=single", word), tmp_path)[0]
        assert said.startswith("resume: the data is not the one that the checkpoint was trained on (its hash")


def told(folder: Path) -> list[Row]:
    return Metrics.read(folder / "metrics.jsonl")


def status(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "status.json").read_text())
    return found


def test_killed_at_any_step_and_resumed_twice(world: Worlds, once: Once, cache: str, tmp_path: Path) -> None:
    words = [
        cache,
        "parallel=single",
        "data.pack=true",
        f"run.dir={tmp_path}",
        "checkpoint.every=3",
        "eval.final=2",
    ]
    command = [sys.executable, "-m", "longspan.train", "experiment=tiny", "track=none", *words]
    # one thread, as the ranks of a world have
    environment = os.environ | {"LOCAL_WORLD_SIZE": str(len(os.sched_getaffinity(0)))}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        wait_for(tmp_path / "metrics.jsonl", 5, process)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert 5 <= len(told(tmp_path)) < STEPS
    with pytest.raises(RankFailed, match="died with exit code -9"):
        world(1)(whole, config(*words), (signal.SIGKILL, 0, 13))
    assert 13 <= len(told(tmp_path)) < STEPS and status(tmp_path)["state"] == "running"
    assert world(1)(whole, config(*words)) == [0]
    straight = once(1, "parallel=single", "data.pack=true")[0].rows
    assert values(told(tmp_path), *EXACT).equal(values(straight, *EXACT))
    assert status(tmp_path) == {"state": "finished", "step": STEPS, "exit": 0}


def test_a_signal_to_one_rank_stops_all_after_saving(
    world: Worlds, once: Once, cache: str, tmp_path: Path
) -> None:
    cfg = config(cache, *ring(), f"run.dir={tmp_path}", "eval.final=2")
    assert world(2)(whole, cfg, (signal.SIGUSR1, 1, 4)) == [EXIT_PREEMPTED] * 2 == [75, 75]
    left = status(tmp_path)
    assert left["exit"] == 75 and left["state"] == f"stopped by signal {int(signal.SIGUSR1)}"
    assert left["step"] == len(told(tmp_path)) in range(4, STEPS)
    assert (tmp_path / "checkpoints" / "latest").read_text() == f"step-{left['step']:08}\n"
    assert world(2)(whole, cfg) == [0, 0]
    straight = once(2, *ring("zigzag", "data.pack=true"))[0].rows
    assert values(told(tmp_path), *EXACT).equal(values(straight, *EXACT))
    assert {p.name for p in tmp_path.iterdir()} >= {
        "checkpoints", "config.yaml", "layout.png", "loss.png", "metrics.jsonl", "position.png", "run.json",
        "status.json", "summary.json",
    }  # fmt: skip


def diverge(rank: int, cfg: DictConfig, folder: Path) -> tuple[str, bool, bool, int]:
    """A run that diverges: what it says, whether weights and moments stayed, had never moved, and steps."""
    launch = launch_of(rank)
    with processes(launch, "cpu", 60.0) as device, Preempt() as preempt:
        job = build(cfg, launch, device)
        record = Kept(rank, None)

        def tensors() -> list[Tensor]:
            state = job.engine.save()
            return [x.clone() for x in (*state["model"].values(), *_flat(state["optim"]))]

        first, at_step = tensors(), list[list[Tensor]]()
        with (
            patch.object(loops, "peak_flops", lambda *_: (1e12, "not measured")),
            patch.object(record, "step", lambda *_: at_step.append(tensors())),
        ):
            loop = Loop(job, record, Checkpoints(folder), preempt, State())
            with pytest.raises(Diverged) as caught:
                loop.run()
        return str(caught.value), _same(at_step[-1], tensors()), _same(first, tensors()), len(at_step)


def _flat(state: dict[str, dict[str, Tensor]]) -> list[Tensor]:
    return [x for moments in state.values() for x in moments.values()]


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_diverged_run_stops_and_leaves_the_weights(world: Worlds, cache: str, tmp_path: Path) -> None:
    cfg = config(cache, *ring(), "optim.lr=1e30", "train.clip=0")
    for said, stayed, same_as_first, steps in world(2)(diverge, cfg, tmp_path / "checkpoints"):
        assert said.startswith(f"step {steps + 1}: loss ") and "nan" in said
        assert stayed and not same_as_first and steps >= 1
    assert not list(tmp_path.glob("checkpoints/*"))


def workers(launcher: int) -> list[int]:
    """The processes that torchrun has started, by rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children")
    found = {}
    for pid in map(int, children.read_text().split()):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        ranks = [line[5:] for line in environment if line.startswith(b"RANK=")]
        found.update({int(rank): pid for rank in ranks})
    return [found[rank] for rank in sorted(found)]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds torchrun's workers in /proc")
def test_torchrun_killed_preempted_and_resumed(once: Once, cache: str, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = [cache, *ring("zigzag", "data.pack=true"), f"run.dir={run_dir}", "eval.final=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [
        *torchrun,
        "-m",
        "longspan.train",
        "experiment=tiny",
        "track=none",
        "checkpoint.every=3",
        *words,
    ]
    metrics, said = run_dir / "metrics.jsonl", tmp_path / "said"
    for number, step, rank in ((signal.SIGKILL, 4, 1), (signal.SIGUSR1, 9, 1), (signal.SIGKILL, 14, 0)):
        with open(said, "w") as out, subprocess.Popen(command, stdout=out, stderr=out) as process:
            wait_for(metrics, step, process)
            os.kill(workers(process.pid)[rank], number)
            assert process.wait(60) != 0
        if number == signal.SIGUSR1:
            assert status(run_dir)["exit"] == 75
            assert "stopped by a signal after saving: start it again to go on" in said.read_text()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    straight = once(2, *ring("zigzag", "data.pack=true"))[0].rows
    assert values(told(run_dir), *EXACT).equal(values(straight, *EXACT))
