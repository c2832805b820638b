"""The dry run: what it says of memory and traffic, against real steps; and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.memory import CASES, composed, dry, measured, row, step
from longspan.launch.dryrun import dryrun, estimate
from longspan.launch.ledger import HOST, Ledger, Moved
from longspan.models.vdit import VideoDiT
from longspan.train.job import Launch, build, processes
from world import Worlds

TINY = ("experiment=tiny", "data=mock", "data.vocab=64", "data.context=256", "track=none")
FAST = ("longest",)
SPLIT = [
    ("parallel=ring", "parallel.layout.placement=zigzag"),
    pytest.param(("parallel=ulysses", "engine=fsdp"), marks=pytest.mark.slow),
    pytest.param(("parallel=s2", "mask=s2", "engine=fsdp", "memory=long"), marks=pytest.mark.slow),
    pytest.param(("parallel=single", "engine=fsdp", "parallel.mesh.tp=2"), marks=pytest.mark.slow),
    pytest.param(("parallel=gather", "engine=fsdp", "engine.offload=true"), marks=pytest.mark.slow),
    pytest.param(("parallel=star", "mask=star", "memory.optimizer=host"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[] if c in FAST else pytest.mark.slow) for c in CASES]
)
def test_memory_is_within_a_tenth_of_what_the_allocator_gave(case: str) -> None:
    found = row(case, 1024)
    assert 0.9 <= found.ratio <= 1.1, found


def stepped(rank: int, overrides: tuple[str, ...]) -> tuple[list[Moved], int]:
    """What a real step of this rank sent, and the most bytes that it held."""
    train = composed(overrides)
    launch = Launch(rank, 2, rank, 2)
    with processes(launch, "cpu", 60.0) as device:
        job = build(train, launch, device)
        for number in range(2):
            # in the second, DDP tells all ranks how it has laid its buckets
            step(job, number)
        with Ledger(node=2) as ledger:
            step(job, 2)
        sent = ledger.moved()
    return sent, measured(train, launch)


@pytest.mark.parametrize("overrides", SPLIT, ids=lambda x: x[0])
def test_two_ranks_send_and_hold_what_it_says(world: Worlds, overrides: tuple[str, ...]) -> None:
    real = world(2)(stepped, (*TINY, *overrides))
    for rank, (sent, most) in enumerate(real):
        found = estimate(dry((*TINY, *overrides, "world=2", f"rank={rank}")))
        assert found.sent == sent and sent
        # when what is on its way is freed depends on when it arrives; here all memory is the host's
        assert 0.8 <= (found.total + found.host) / most <= 1.2


def test_sharded_weights_are_a_share(tmp_path: Path) -> None:
    whole, quarter = (
        estimate(dry((*TINY, "parallel=ring", f"engine={engine}", "world=4"))) for engine in ("ddp", "fsdp")
    )
    for name in ("parameters", "optimizer"):
        assert quarter.peak[name] == pytest.approx(whole.peak[name] / 4, rel=0.02)
    assert whole.tokens == quarter.tokens == 512 and whole.flops == quarter.flops > 0


def test_what_rests_in_host_memory_is_not_on_the_device() -> None:
    fsdp = ("engine=fsdp", "engine.offload=true"), ("parameters", "gradients", "optimizer")
    ddp = ("engine=ddp", "memory.optimizer=host"), ("optimizer",)
    for words, away in (fsdp, ddp):
        found = estimate(dry((*TINY, "parallel=ring", *words, "world=4")), flops=False)
        assert set(found.resting) == set(away) and not set(found.peak) & set(away)
        held = found.resting | found.peak
        share = found.parameters * 4 / (4 if "engine=fsdp" in words else 1)
        for name in ("parameters", "gradients"):
            assert held[name] == share if name in away else name in found.peak
        # two moments of each weight, and what the update of one needs besides
        assert 2 * share <= held["optimizer"] <= 2.4 * share
        assert found.host == sum(found.resting.values())


@pytest.mark.slow
def test_bfloat16_weights_are_half_of_float32(tmp_path: Path) -> None:
    for engine in ("ddp", "fsdp"):
        whole, half = (
            estimate(dry((*TINY, "parallel=ring", f"engine={engine}", "world=2", f"memory.weights={dtype}")))
            for dtype in ("float32", "bfloat16")
        )
        assert half.peak["parameters"] == whole.peak["parameters"] / 2
        assert half.parameters == whole.parameters


def test_a_job_of_many_ranks_needs_none_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "found.json"
    split = ("parallel=usp", "engine=fsdp", "world=64", "parallel.mesh.dp=4", f"json={path}")
    assert dryrun(dry((*TINY, *split))) == 0
    kept, said = json.loads(path.read_text()), capsys.readouterr().out
    assert kept["world"] == 64 and kept["total"] == sum(kept["peak"].values())
    assert kept["mesh"]["dp"] == 4 and "memory of rank 0 of 64" in said and "all-to-all" in said


LATENTS = {
    "dit_xl_2": (("model.dim=24", "model.layers=2", "model.heads=2", "train.micro_batch=2"), 8, 8 * 2 * 256),
    "vdit_1b_720p": (
        ("model.dim=24", "model.layers=2", "model.heads=2", "model.hidden=48", "model.size=[3,12,16]"),
        8, 3 * 6 * 8,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LATENTS)
def test_latents_that_are_not_there_are_made_up(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, world, tokens = LATENTS[name]
    words = f"experiment={name}", "track=none", *small, f"world={world}"
    assert dryrun(dry((*words, f"json={tmp_path}/found.json"))) == 0
    assert "the data is made up" in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["tokens"] == tokens and {m["kind"] for m in found["sent"]} >= {"all-gather"}
    if name == "vdit_1b_720p":
        # texts of all their words, though nothing of them is real
        model = VideoDiT([3, 12, 16], [1, 2, 2], 16, 24, 2, 2, 48, text_dim=4096)
        assert found["flops"] == 6 * model.macs(text=512)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "world", "parameters"), [("dit_xl_2", 8, 675_129_632), ("vdit_1b_720p", 32, 1_418_996_800)]
)
def test_presets_for_clusters_run_dry(name: str, world: int, parameters: int) -> None:
    found = estimate(dry((f"experiment={name}", "track=none", f"world={world}")))
    # all but the frozen table of positions
    assert 0.999 * parameters < found.parameters <= parameters and found.total < 80 * 2**30


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("rank=3", "rank is 3; with world=1 it must be less"),
        ("world=0", "world is 0; it must be at least 1"),
        ("memory_gib=0.0001", "memory_gib is 0.0001, and a rank needs 0.0 GiB: .* most of them activations"),
        ("parallel.mesh.tp=2", "start a multiple of 2"),
        ("engine=deepspeed", "engine=deepspeed looks into its tensors, .* take engine=fsdp"),
        ("engine=megatron", "engine=megatron looks into its tensors, .* take engine=fsdp"),
    ],
)
def test_a_job_that_cannot_run_says_why(word: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dryrun(dry((*TINY, "parallel=single", word)))


@pytest.mark.parametrize(("node", "link"), [(2, "network"), (4, "node")])
def test_traffic_is_what_each_layer_needs_over_which_link(node: int, link: str) -> None:
    split = ("parallel=ring", "mask=full", "parallel.layout.placement=contiguous", "engine=fsdp", "world=4")
    found = estimate(dry((*TINY, *split, f"node={node}", "rank=1")))
    sent = {(m.kind, m.link): m.bytes for m in found.sent}
    # 2 layers, 2 sequences of 64 tokens here, keys and values of 2 heads of 8, 3 hops: forward, again in the
    # backward, and float32 gradients that go one hop further, home
    shard = 2 * 2 * 64 * 2 * 2 * 8 * 4
    assert sent["send", link] == shard * (3 + 3 + 3)
    weights = found.parameters * 4
    assert sent["reduce-scatter", link] == pytest.approx(weights * 3 / 4, rel=0.01)
    # the blocks' weights are gathered again in the backward
    assert weights * 3 / 4 < sent["all-gather", link] < 2 * weights * 3 / 4


def test_the_ledger_knows_when_bytes_come_and_go() -> None:
    with Ledger(wide=7) as ledger:
        x = torch.ones(4, requires_grad=True)
        y = x * 2
        logits = y[:, None] * torch.ones(7)
        assert (ledger.now["activations"], ledger.now["logits"]) == (16 + 16 + 28, 4 * 28)
        with ledger.during(HOST):
            away = y.detach().clone()
        ledger.name([x], "parameters")
        assert ledger.now["parameters"] == 16 and ledger.now[HOST] == 16
        before = ledger.total()
        del logits, away
        # autograd held the factor of seven
        assert before - ledger.total() == 4 * 28 + 28 and ledger.host == 16
        storage = x.untyped_storage()
        net = nn.Linear(8, 8)
        net.weight.untyped_storage().resize_(0)
        assert ledger.total() == before - 4 * 28 - 28 + 8 * 4 and storage.nbytes() == 16
    assert ledger.most >= before
