"""The planner: what it refuses, that its words run, that its memory is the dry run's, and that it says what
is true of every plan.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from benchmarks.plan import JOBS, LAYOUTS, agreement
from benchmarks.plan_picture import draw
from longspan.kernels.mask import Causal, Mask, Window
from longspan.launch import plan_cost
from longspan.launch.dryrun import estimate, stood_in
from longspan.launch.ledger import Moved
from longspan.launch.plan import Planning, job_words, plan, planned
from longspan.launch.plan_calibrate import attended, calibrated
from longspan.launch.plan_cost import Machine, compute, timed
from longspan.launch.plan_hardware import Card, assumed, benchmarked
from longspan.launch.plan_job import Candidate, Shape, candidates
from longspan.launch.plan_memory import Need, dry_config, floor, needed
from longspan.launch.plan_report import advice, reasons
from longspan.launch.plan_search import Measure, search
from longspan.launch.plan_traffic import planned as traffic
from longspan.train.config import hint, made, typed
from longspan.train.meter import published_peak

ROOT = Path(__file__).parent.parent
TINY = ("experiment=tiny", "data=mock", "data.vocab=64", "data.context=256", "track=none")
LLAMA = Shape(
    tokens=131072, layers=32, dim=4096, hidden=14336, heads=32, kv_heads=8, head_dim=128,
    parameters=8_030_261_248, matrices=7_504_924_672, masks=((Causal(), 32),),
    precision="bfloat16",
)  # fmt: skip
ONE = Candidate("single", 1, 1, 1, 1, "ddp", "none", 1, 1)


def planning(*words: str) -> DictConfig:
    """The config of a plan."""
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(stood_in(compose("plan", overrides=[*TINY, *words])), Planning)


def hardware(kind: str, name: str) -> DictConfig:
    found = OmegaConf.load(ROOT / "conf" / kind / f"{name}.yaml")
    assert isinstance(found, DictConfig)
    return found


def machine(card: str = "h100", node: int = 8) -> Machine:
    gpu: Card = made(hardware("gpu", card))
    return Machine(gpu, made(hardware("interconnect", "ib400")), node, assumed(gpu, "bfloat16"))


def arithmetic(job: Shape, node: int = 8) -> Measure:
    """Stands for the dry run: the floor, a working set, and traffic in closed form."""

    def measure(way: Candidate) -> Need:
        held = floor(job, way)
        held["activations"] += 20 * job.width * job.dim * way.micro * job.tokens // way.split
        return Need(held, 0, 0, tuple(traffic(job, way, node)))

    return measure


def best_rate(job: Shape, gpus: int, **settings: object) -> float:
    """Tokens a second of the best plan, by arithmetic."""
    node = min(8, gpus)
    cfg = OmegaConf.create(
        {"layouts": None, "engines": None, "memories": None, "micro": 2, "batch": None}
        | {"train": {"precision": "bfloat16", "accumulate": 1}}
        | settings
    )
    ways = list(candidates(cfg, job, gpus, node))
    found = search(job, ways, machine(node=node), arithmetic(job, node), room_gib=74, tries=40, best=1)
    return 1 / found.best[0].per_token(job) if found.best else 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=10", "nodes=4"], "gpus is 10, nodes 4: every machine has as many; nodes can be 1, 2, 5, 10"),
        (["gpus=0"], "gpus is 0; it must be at least 1"),
        (["layouts=[rign]"], "layouts has 'rign'; a plan can be made of gather, ring"),
        (["batch=3", "layouts=[single]", "engines=[ddp]", "gpus=8"], "no way to share 3 sequences of 256"),
    ],
)
def test_a_plan_that_cannot_be_says_why(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        planned(planning(*words), words, arithmetic(LLAMA))


def test_what_a_plan_is_to_find_is_not_given() -> None:
    assert job_words(["experiment=tiny", "gpus=4", "gpu.link_us=3", "+seed=2"]) == [
        "experiment=tiny",
        "+seed=2",
    ]
    for word, instead in (("parallel=ring", "layouts"), ("engine.offload=true", "engines")):
        with pytest.raises(ValueError, match=f"{word}: that is what the plan is to find; .* {instead}="):
            job_words([word])


def test_an_unknown_card_is_answered_with_the_nearest() -> None:
    with pytest.raises(HydraException) as caught:
        planning("gpu=h10")
    assert "did you mean 'gpu=h100'" in hint(caught.value, ["gpu=h10"], "plan")


@pytest.mark.parametrize("name", [p.stem for p in sorted((ROOT / "conf/gpu").glob("*.yaml"))])
def test_a_card_is_as_published(name: str) -> None:
    card: Card = made(hardware("gpu", name))
    for dtype, tflops in ((torch.bfloat16, card.bfloat16_tflops), (torch.float32, card.float32_tflops)):
        known = published_peak(f"NVIDIA {card.name} 80GB", dtype, True)
        assert known is None or known[0] == pytest.approx(1e12 * tflops, rel=1e-3)


def test_a_committed_benchmark_of_the_card_is_taken(tmp_path: Path) -> None:
    gpu: Card = made(hardware("gpu", "h100"))
    assert benchmarked(gpu, "bfloat16", 128, tmp_path) == assumed(gpu, "bfloat16")
    ours = {"longspan": {"tflops": [400, 300]}}
    cases = [
        {"name": "causal", "tokens": 4096, "head_dim": dim, "dtype": "bfloat16", "found": found}
        for dim, found in (
            (64, {"longspan": {"tflops": [1, 2]}}),
            (128, ours),
        )
    ]
    kept = {"device": "NVIDIA H100 80GB HBM3", "versions": {"cuda": "13"}, "settings": {}, "cases": cases}
    (tmp_path / "kernels-h100.json").write_text(json.dumps(kept))
    found = benchmarked(gpu, "bfloat16", 128, tmp_path)
    assert (found.forward, found.backward) == (400e12, 300e12) and "kernels-h100.json" in found.source
    other: Card = made(hardware("gpu", "a100"))
    assert benchmarked(other, "bfloat16", 128, tmp_path) == assumed(other, "bfloat16")


WAYS = [
    replace(ONE, layout="usp", ring=2, head=2, engine="fsdp", memory="long", placement="auto"),
    pytest.param(replace(ONE, engine="fsdp+offload", memory="longest", tp=2), marks=pytest.mark.slow),
    pytest.param(replace(ONE, layout="ulysses", head=4, micro=2), marks=pytest.mark.slow),
    *(
        pytest.param(replace(ONE, layout=name, ring=4, placement="auto"), marks=pytest.mark.slow)
        for name in ("ring", "gather", "s2")
    ),
]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_words_of_a_way_make_that_training(way: Candidate) -> None:
    with initialize_config_module("longspan.conf", version_base="1.3"):
        cfg = typed(compose("train", overrides=[*TINY, *way.overrides()]))
    assert made(cfg.parallel.mesh).degrees(way.world) == way.degrees
    assert cfg.train.micro_batch == way.micro and cfg.engine.get("offload", False) == ("+" in way.engine)


def dried(words: Sequence[str], way: Candidate) -> int:
    return estimate(dry_config([*TINY, *words, *way.overrides(), f"world={way.world}", "rank=1"])).total


def test_memory_is_the_dry_runs() -> None:
    way = replace(ONE, layout="ring", ring=2, engine="fsdp")
    job = replace(LLAMA, tokens=256, layers=2, dim=32, hidden=96, parameters=20_000, precision="float32")
    assert needed(TINY, job, way, 2).total == dried((), way)


@pytest.mark.slow
@pytest.mark.parametrize("memory", ["none", "long", "longest"])
def test_all_layers_follow_from_a_few(memory: str) -> None:
    deep = ("model.layers=12",)
    way = replace(ONE, layout="ring", ring=2, engine="fsdp", memory=memory)
    job = planned(planning(*deep, "gpus=2"), [*TINY, *deep], arithmetic(LLAMA)).job
    found, whole = needed([*TINY, *deep], job, way, 2), dried(deep, way)
    assert found.total == pytest.approx(whole, rel=0.01)
    assert sum(floor(job, way).values()) < whole
    long = needed([*TINY, *deep, "data.context=512"], job, way, 2)
    assert long.total > found.total


def test_what_fits_one_device_is_not_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["gpus=2", f"json={tmp_path / 'plan.json'}", f"figure={tmp_path / 'plan.png'}"]
    cfg = planning(*words)
    job = planned(cfg, [*TINY, *words], arithmetic(LLAMA)).job
    assert (job.layers, job.heads, job.kv_heads, job.tokens) == (2, 4, 2, 256)
    assert plan(cfg, [*TINY, *words], arithmetic(job)) == 0
    said, kept = " ".join(capsys.readouterr().out.split()), json.loads((tmp_path / "plan.json").read_text())
    assert "do not split the sequence" in said and kept["advice"].startswith("do not split")
    assert "torchrun --nproc-per-node 2 -m longspan.train experiment=tiny data=mock" in said
    assert "parallel=single" in kept["best"][0]["overrides"] and "gpus=2" not in kept["best"][0]["command"]
    assert {p["gpus"] for p in kept["curves"]["gpus"]} == {1, 2, 4, 8}
    assert {p["tokens"] for p in kept["curves"]["lengths"]} == {16, 32, 64, 128, 256, 512}
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_a_long_one_is_split_and_the_others_have_reasons() -> None:
    cfg = OmegaConf.create(
        {"layouts": None, "engines": None, "memories": None, "micro": 1, "batch": 1}
        | {"train": {"precision": "bfloat16", "accumulate": 1}}
    )
    ways = list(candidates(cfg, LLAMA, 8, 8))
    found = search(LLAMA, ways, machine(), arithmetic(LLAMA), room_gib=74, tries=30, best=2)
    assert found.best[0].way.split > 1 and "split each sequence over" in advice(found.best[0])
    said = dict(reasons(LLAMA, found))
    assert any("holds 0" in why for way, why in said.items() if "star" in way)
    short = search(LLAMA, ways, machine(), arithmetic(LLAMA), room_gib=16, tries=30, best=2)
    told = [why for _, why in reasons(LLAMA, short)]
    assert any(why.startswith("does not fit by ") and "GiB: " in why for why in told)
    heavy = [way for way in ways if way.engine == "ddp"]
    none = search(LLAMA, heavy, machine(), arithmetic(LLAMA), room_gib=1, tries=30, best=2)
    assert not none.best
    assert any("cannot fit: at least " in v.lost for v in none.losers if v.lost is not None)


def test_more_devices_are_never_slower_and_longer_never_smaller() -> None:
    rates = [best_rate(LLAMA, gpus) for gpus in (8, 16, 32)]
    assert 0 < rates[0] <= rates[1] <= rates[2]
    lengths = [replace(LLAMA, tokens=n) for n in (2**15, 2**17, 2**19)]
    for way in (replace(ONE, layout="ring", ring=8), replace(ONE, memory="long", engine="fsdp_bf16")):
        held = [sum(floor(job, way).values()) for job in lengths]
        assert held == sorted(held) and held[0] < held[-1]


def test_time_is_work_at_its_rate_and_what_it_does_not_hide() -> None:
    on, job = machine(), LLAMA
    way = replace(ONE, layout="ring", ring=8, engine="fsdp_bf16")
    work = compute(job, way, on)
    pairs = job.tokens * (job.tokens + 1) / 2 / 8
    flops = 4 * job.head_dim * job.heads * pairs * job.layers
    calls = job.layers * 2 * 8 * on.rates.call
    ideal = flops / on.rates.forward + 2.5 * flops / on.rates.backward
    assert work.attention == pytest.approx(ideal + calls, rel=0.01)
    again = compute(job, replace(way, memory="long"), on)
    assert again.attention - work.attention == pytest.approx(flops / on.rates.forward + calls / 2, rel=0.01)
    assert again.matrices == pytest.approx(work.matrices * 4 / 3)

    def waits(kind: str, size: float, layout: str = "ring", link: str = "node") -> float:
        sent = [Moved(kind, 8, link, int(size), 0)]
        return timed(job, replace(way, layout=layout), on, sent, 0).layout

    speed = 1e9 * on.card.link_gbs * on.card.link_share
    # a ring's transfers hide behind 7 of its 8 hops, those of gather behind nothing
    free = work.attention * 7 / 8 * speed
    assert waits("send", 0.9 * free) == 0
    assert waits("send", free + speed) == pytest.approx(1.0, rel=0.01)
    assert waits("send", speed, "gather") == pytest.approx(1.0)
    assert waits("all-to-all", speed, link="network") == pytest.approx(450 / 50)


@pytest.mark.slow
def test_what_is_here_can_be_timed() -> None:
    job = planned(planning("gpus=2"), TINY, arithmetic(LLAMA)).job
    found = calibrated(job, 1)
    assert 1e8 < found.matmul < 1e14 and 1e7 < found.forward < 1e14 and 1e7 < found.backward < 1e14
    assert 0 < found.call < 0.5 and "measured here" in found.source


def test_attention_that_is_timed_here_is_taken_as_it_was_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, object]] = []

    def known(job: Shape, mask: Mask, ranks: int, **of: object) -> tuple[float, float]:
        asked.append({"ranks": ranks, **of})
        return 0.1, 0.3

    monkeypatch.setattr(plan_cost, "attended", known)
    on = replace(machine(), attends=True)
    job = replace(LLAMA, tokens=4096)
    way = replace(ONE, layout="ulysses", head=4, micro=2, accumulate=3)
    assert compute(job, way, on).attention == pytest.approx(6 * LLAMA.layers * 0.4)
    assert compute(job, replace(way, memory="long"), on).attention == pytest.approx(6 * LLAMA.layers * 0.5)
    assert asked[0] == {
        "ranks": on.node, "heads": 8, "kv_heads": 2, "ring": 1, "placement": "contiguous", "hops": False,
    }  # fmt: skip
    compute(job, replace(ONE, layout="ring", ring=4), on)
    assert asked[-1]["hops"] and asked[-1]["ring"] == 4 and asked[-1]["placement"] == "zigzag"
    # what would take long is taken at the rates, whatever a rank's share is
    count, slow = len(asked), replace(on, rates=replace(on.rates, forward=1e12))
    assert compute(job, way, slow).attention > 0 and len(asked) > count
    slow = replace(on, rates=replace(on.rates, forward=1e10))
    count = len(asked)
    for split in (way, replace(way, head=1), replace(ONE, layout="ring", ring=8)):
        assert compute(job, split, slow).attention > 0
    assert len(asked) == count


@pytest.mark.slow
def test_a_ways_own_attention_can_be_timed() -> None:
    job = replace(planned(planning("gpus=2"), TINY, arithmetic(LLAMA)).job, tokens=8192)
    few = {"heads": 4, "kv_heads": 2, "placement": "zigzag"}
    whole = attended(job, Causal(), 1, ring=1, hops=False, **few)
    half = attended(job, Causal(), 1, ring=2, hops=True, **few)
    near = attended(job, Window(64, 0), 1, ring=1, hops=False, **few)
    # half of it but for what else the machine does
    assert all(0 < b < 2 * a for a, b in zip(whole, half, strict=True))
    assert near[0] < whole[0] and near[1] < whole[1]


def test_closed_volumes_are_those_of_the_design() -> None:
    kv, q, e, tokens = 8 * 128, 32 * 128, 2, LLAMA.tokens

    def sent(kind: str, **given: object) -> float:
        way = replace(ONE, engine="ddp", **given)  # type: ignore[arg-type]
        return sum(m.bytes for m in traffic(LLAMA, way, 8) if m.kind == kind) / LLAMA.layers

    shard = 2 * kv * tokens / 8
    assert sent("send", layout="ring", ring=8) == pytest.approx(shard * (7 * e * 2 + 8 * 4))
    assert sent("send", layout="gather", ring=8) == pytest.approx(shard * (7 * e * 2 + 7 * 4))
    each = tokens / 8 * 7 / 8
    forward, backward = (2 * q + 2 * kv) * e, q * e + (q + 2 * kv) * 4
    assert sent("all-to-all", layout="ulysses", head=8) == pytest.approx(each * (forward + backward))


def test_the_benchmarks_picture_is_drawn_of_what_was_written(tmp_path: Path) -> None:
    """The committed results: of each job and number of ranks all layouts, measured and predicted."""
    results = ROOT / "benchmarks" / "results"
    ranked = json.loads((results / "plan.json").read_text())
    told = json.loads((results / "plan-published.json").read_text())
    rows = [row for sizes in ranked.values() for found in sizes.values() for row in found["rows"]]
    assert len(rows) == len(JOBS) * 2 * len(LAYOUTS) and all(r["measured"] > 0 < r["predicted"] for r in rows)
    for sizes in ranked.values():
        for found in sizes.values():
            assert agreement(found["rows"]) == (found["pairs_right"], found["pairs_told"])
    draw(ranked, told, tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 20_000
    turned = [{"predicted": a, "measured": b} for a, b in ((1.0, 3.0), (1.02, 1.0), (2.0, 2.0))]
    # 1 and 1.02 are no two predictions; of the others one is in order
    assert agreement(turned) == (1, 2)
