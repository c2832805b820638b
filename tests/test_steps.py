"""The benchmark of whole training steps: that both sides compute the same, and that it counts rightly."""

import json
import time
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import pytest
import torch

from benchmarks import steps
from benchmarks.steps import Bench, Case, Row
from confs import composed, made
from longspan.kernels.mask import Mask
from longspan.kernels.neighborhood import Neighborhood
from longspan.models.dit import DiT
from longspan.models.gpt import GPT
from longspan.models.vdit import VideoDiT

CPU = torch.device("cpu")


def image() -> DiT:
    return DiT((8, 8), 2, 1, 32, 2, 2, 3)


def clip(mask: Mask | None = None) -> VideoDiT:
    return VideoDiT((4, 8, 8), (1, 2, 2), 1, 32, 2, 2, 64, text_dim=8, mask=mask)


def text() -> GPT:
    return GPT(vocab=40, dim=32, layers=2, heads=4, hidden=64, kv_heads=2, predecessor=False)


CASES = (
    Case("image", image, 16, 3),
    Case("clip", clip, 64, 1, memory="long"),
    Case("text", text, 48, 2, memory="longest"),
)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(CPU, time.perf_counter() + 600, torch.float32, rounds=2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_ours_and_torchs_attention_give_the_same_loss_and_gradients(case: Case) -> None:
    found = []
    for who in ("longspan", "sdpa"):
        torch.manual_seed(0)
        model, loss = steps.prepared(replace(case, who=who), CPU)
        for p in model.parameters():
            # zero gates would hide the attention
            torch.nn.init.normal_(p, std=0.1)
        value = loss()
        value.backward()
        found.append((value.detach(), [p.grad for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_bricks_change_the_order_and_nothing_else() -> None:
    near = Neighborhood((4, 4, 4), (3, 3, 3), stride=(1, 2, 2))
    case = Case("near", partial(clip, near), 64, 1)
    bricked = replace(case, bricks=((4, 4, 4), (1, 2, 2), (1, 1, 1)))
    out, orders = [], []
    for one in (case, bricked):
        torch.manual_seed(0)
        model = clip(near)
        torch.nn.init.normal_(model.head.head.weight)
        attend, at = steps.attending(one, model)
        x = torch.randn(1, 64, prod(model.patch), generator=torch.Generator().manual_seed(1))[:, at]
        words = torch.ones(1, 3, 8)
        y = model(x, at, torch.ones(1), None, attend, text=words)
        out.append(y[:, at.argsort()])
        orders.append(at.tolist())
    assert orders[0] != orders[1]
    torch.testing.assert_close(out[0], out[1])


def test_a_row_says_time_work_and_share_of_the_peak(bench: Bench) -> None:
    row = steps.measured(CASES[0], bench)
    assert row.seconds is not None and row.mfu is not None and row.rounds == 2
    assert row.flops == 6 * 3 * image().macs()
    assert row.mfu == pytest.approx(row.flops / row.seconds / bench.peak)
    assert "samples/s" in row.text() and "MFU" in row.text()


def test_text_counts_causal_pairs_and_the_tied_table_once() -> None:
    model = text()
    weights = sum(p.numel() for p in model.parameters())
    visible = 2 * 48 * 49 // 2
    assert steps.useful(CASES[2]) == 6 * weights * 96 + 12 * 2 * 4 * 8 * visible


def test_a_model_that_fails_leaves_a_row_that_says_so(bench: Bench) -> None:
    def full() -> GPT:
        raise torch.OutOfMemoryError("no room\nfor it")

    row = steps.measured(Case("full", full, 8, 1), bench)
    assert row.failed == "OutOfMemoryError: no room" and row.seconds is None
    assert row.text().endswith("no room")


def test_lengths_double_until_memory_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def at_most(case: Case, bench: Bench) -> Row:
        row = Row(str(case), case.name, case.who, case.memory, case.tokens, case.batch)
        most = {"none": 16, "long": 64, "checkpointing": 8}[case.memory]
        return replace(row, failed="full") if case.tokens > most else replace(row, seconds=1e-3, mfu=0.0)

    monkeypatch.setattr(steps, "measured", at_most)
    monkeypatch.setattr("gc.collect", lambda: 0)
    rows = list(steps.longest(bench, Case("text", text, 8, 1), ("none", "long")))
    fits = {(r.who, r.memory): r.tokens for r in rows if r.seconds is not None}
    assert fits == {
        ("longspan", "none"): 16, ("longspan", "long"): 64,
        ("transformers", "checkpointing"): 8, ("sdpa", "checkpointing"): 8,
    }  # fmt: skip
    assert all(r.failed == "full" for r in rows if r.seconds is None)


def test_each_has_a_share_of_the_time_and_says_where_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take four times as long for twice the length, on a clock of their own."""
    now = [0.0]

    def slow(case: Case, bench: Bench) -> Row:
        seconds = (case.tokens / 8) ** 2
        now[0] += 2 * seconds
        return replace(steps.blank(case), seconds=seconds, mfu=0.0)

    monkeypatch.setattr(steps, "measured", slow)
    monkeypatch.setattr("gc.collect", lambda: 0)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    bench = Bench(CPU, 400.0, torch.float32, peak=1.0)
    rows = list(steps.longest(bench, Case("text", text, 8, 1), ("none", "long")))
    ends = {(r.who, r.memory): r for r in rows}
    assert len(ends) == 4 and all(r.failed == steps.LATE for r in ends.values())
    assert now[0] < 400 and min(r.tokens for r in ends.values()) >= 32


def test_transformers_is_measured_at_the_same_shape(bench: Bench) -> None:
    pytest.importorskip("transformers")
    model, _ = steps.prepared(replace(CASES[2], who="transformers"), CPU)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in text().parameters())
    row = steps.measured(replace(CASES[2], who="transformers"), bench)
    assert row.seconds is not None and row.flops == steps.useful(CASES[2])


def test_the_models_are_the_published_ones() -> None:
    with torch.device("meta"):
        counts = [sum(p.numel() for p in case.build().parameters()) for case in steps.cases()]
        counts.append(sum(p.numel() for p in steps.llama().parameters()))
    assert set(counts) >= {675_129_632, 1_418_996_800, 1_235_814_400}


def test_the_command_writes_what_it_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "cases", lambda: iter(CASES[:1]))
    assert steps.main(["--device", "cpu", "--case", "image", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "steps-cpu.json").read_text())
    assert found["rows"][0]["model"] == "image" and found["rows"][0]["seconds"] > 0
    with pytest.raises(SystemExit, match="is in none of: image; Llama"):
        steps.main(["--device", "cpu", "--case", "nothing", "--out", str(tmp_path)])


def test_the_presets_are_those_of_the_configs() -> None:
    """Where the benchmark runs there may be no Hydra, so it says them again."""
    for name, preset in steps.PRESETS.items():
        assert made(composed("experiment=tiny", "parallel=single", f"memory={name}").memory) == preset
