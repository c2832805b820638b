"""The benchmark of the kernels: that it counts, compares and names rightly, and runs without a GPU."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_mask

from benchmarks import exact, figure, kernels, peers, report
from benchmarks.area import area, by_index
from benchmarks.cases import SHAPES, Case, Job, Shape, jobs, masked, volume
from benchmarks.figure import draw
from benchmarks.peers import Contender, Skip, contenders
from benchmarks.report import Both, Entry, Found, Results, Unit, table
from benchmarks.timing import Attempt, CpuClock
from longspan.kernels.attention import attention
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.neighborhood import Neighborhood, brick_order
from longspan.kernels.ordered import BrickByBrick
from longspan.kernels.patterns import Strided
from longspan.kernels.span import positions

CPU = torch.device("cpu")
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
GRID, BRICK = (4, 8, 8), (2, 4, 4)
MASKS: dict[str, Mask] = {
    "full": Full(),
    "causal": Causal(),
    "packed": Documents((0, 50, 211), Causal()),
    "sinks": Window(40) | (First(4) & Causal()),
    "s2/4": Strided(16, 2, 4) & Causal(),
    "bricks": BrickByBrick(Strided(16, 2, 4), (8, 32), (4, 4)),
}
SHAPE = Shape(4, 2, 16)


def case(name: str, tokens: int = 203) -> Case:
    if name == "3d":
        near = Neighborhood(GRID, (2, 8, 4), stride=(2, 4, 2))
        return Case(name, near, 256, SHAPE, "full", torch.float32, brick_order(GRID, BRICK))
    return Case(name, MASKS[name], tokens, SHAPE, "full" if name == "full" else "causal", torch.float32)


CASES = [*map(case, MASKS), case("3d")]
each = pytest.mark.parametrize("case", CASES, ids=lambda x: x.name)


def seen(case: Case) -> Tensor:
    """bool [1, query heads, N, N]."""
    low = lower(case.mask, case.at, case.at, case.shape.kv_heads, CPU)
    every = visible(low).expand(1, case.shape.kv_heads, case.tokens, case.tokens)
    return every.repeat_interleave(case.shape.q_heads // case.shape.kv_heads, 1)


@each
def test_the_area_is_what_the_predicate_says(case: Case) -> None:
    assert area(case.mask, case.at, case.shape.kv_heads, CPU) == seen(case).sum() / case.shape.q_heads


@each
def test_flex_attention_gets_the_same_mask(case: Case) -> None:
    sees = by_index(lower(case.mask, case.at, case.at, case.shape.kv_heads, CPU))
    found = create_mask(peers.mask_mod(sees, 2), 1, case.shape.q_heads, case.tokens, case.tokens, "cpu")
    assert torch.equal(found, seen(case))


@each
def test_the_truth_is_attention_in_float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several pieces; an error in the slice shows, one elsewhere does not."""
    monkeypatch.setattr(exact, "SCORES", 50 * case.tokens * 2)
    inputs = exact.given(case, CPU)
    q, k, v = (x.detach().double().requires_grad_() for x in inputs.leaves)
    out, _ = attention(q, k, v, case.mask, case.at, case.at)
    found = [out.detach(), *torch.autograd.grad(out, (q, k, v), inputs.dout.double())]
    right = exact.truth(case, inputs)
    assert max(exact.errors(case, tuple(found), right).values()) < 1e-12
    found[2][0, 7, -1, 3] += 0.5
    found[1][0, 7, 0, 3] += 0.5
    assert exact.errors(case, tuple(found), right) == pytest.approx({"out": 0, "dq": 0, "dk": 0.5, "dv": 0})
    found[0][0, 9, -1, 0] = float("nan")
    assert str(exact.errors(case, tuple(found), right)["out"]) == "nan"


def entry(name: str, pairs: float, **ms: tuple[float, float]) -> Entry:
    found: dict[str, Found | str] = {
        who.replace("_", "-"): Found(Both(*x), 3, 0.1, None, {"out": 0.0, "dq": 0.0}) for who, x in ms.items()
    }
    return Entry(Case(name, Causal(), 1000, Shape(2, 2, 50), "causal"), pairs, 1.0, found)


def test_rates_and_ratios() -> None:
    """Each side against its own best peer; ours against our own dense time."""
    dense = entry("causal", 500_000, longspan=(4.0, 20.0), sdpa_flash=(3.0, 8.0), sdpa_cudnn=(2.0, 10.0))
    dense.found["flash-attn"] = "not installed"
    sparse = entry("s2/16", 50_000, longspan=(0.5, 2.5), flex=(1.0, 4.0))
    results = Results({x.case.key: x for x in (dense, sparse)})
    own = sparse.measured()["longspan"]
    # 4 * 2 heads * 50,000 pairs * 50 wide = 2e7 in half a millisecond
    assert sparse.tflops(own) == pytest.approx((0.04, 0.02))
    assert results.over_dense(sparse, own) == (4.0, 3.2)
    assert results.over_dense(dense, dense.measured()["longspan"]) == (0.5, 0.4)
    assert results.of_ideal(sparse, "longspan", own) == pytest.approx((0.8, 0.8))
    assert results.of_ideal(sparse, "flex", sparse.measured()["flex"]) is None
    assert results.of_ideal(dense, "longspan", dense.measured()["longspan"]) is None
    lines = list(table(results, dense, ["longspan", "flash-attn"], Unit()))
    assert lines[0].startswith("causal, 1000 tokens, 2/2x50 heads, bfloat16: 50.00% of all pairs")
    assert lines[2].split()[:4] == ["longspan", "4.000", "0.1", "0.50"]
    assert lines[3].split() == ["flash-attn", "not", "installed"]
    assert lines[4:] == [
        "  longspan is 0.75x sdpa-flash, 0.50x sdpa-cudnn forward; "
        "0.40x sdpa-flash, 0.50x sdpa-cudnn backward"
    ]
    assert Results({sparse.case.key: sparse}).over_dense(sparse, own) is None


def test_the_plan_for_a_gpu_has_everything_once_and_the_goals_first() -> None:
    plan = jobs(torch.device("cuda"))
    assert [str(job.case) for job in plan[:2]] == [
        "full, 32768 tokens, 64/8x128 heads, bfloat16",
        "causal, 32768 tokens, 64/8x128 heads, bfloat16",
    ]
    who = [x.name for x in contenders(torch.device("cuda"))]
    cells = [(job.case.key, x) for job in plan for x in who if x not in job.without and x in (job.only or x)]
    names = {case.name for case in masked(2**13, SHAPES[0])}
    assert names == {"full", "causal", "window", "packed", "sinks", "s2/4", "s2/16", "s2/32", "3d"}
    wanted = len(names) * len(SHAPES) * 4 * len(who)
    assert len(cells) == len(set(cells)) == wanted
    for job in plan:
        yardstick = next(i for i, x in enumerate(plan) if x.case.key == job.case.yardstick)
        assert plan.index(job) >= yardstick or not job.case.sparse


@pytest.mark.parametrize("tokens", [2**13, 2**14, 2**15, 2**16])
def test_no_tile_of_the_video_is_partial(tokens: int) -> None:
    (case,) = (x for x in masked(tokens, SHAPES[0]) if x.name == "3d")
    assert torch.Size(volume(tokens)).numel() == tokens and len(positions(case.at).unique()) == tokens
    low = lower(case.mask, case.at[:4], case.at, 1, CPU)
    tiles = visible(low)[0, 0].expand(-1, tokens)[:128].unflatten(1, (-1, 64))
    assert torch.equal(tiles.any(2).any(0), tiles.all(2).all(0)) and tiles.any()


def small(name: str) -> Job:
    return Job(case(name, 130))


def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plan: list[Job], *given: str) -> tuple[int, Any]:
    """Exit status and JSON of a run."""
    monkeypatch.setattr(kernels, "jobs", lambda device: plan)
    status = kernels.main(["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path), *given])
    return status, json.loads((tmp_path / "kernels-cpu.json").read_text())


def test_the_command_measures_writes_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, written = command(monkeypatch, tmp_path, [small("causal"), small("s2/4"), small("packed")])
    assert status == 0 and written["dropped"] == []
    assert [x["name"] for x in written["cases"]] == ["causal", "s2/4", "packed"]
    assert written["versions"]["torch"] == torch.__version__ and written["settings"]["statistic"] == "least"
    for one in written["cases"]:
        assert one["found"].keys() == {"longspan", "sdpa", "reference"}
        for name, found in one["found"].items():
            assert min(found["ms"]) > 0 and found["rounds"] >= (1 if name == "reference" else 3)
            assert 0 < max(found["errors"].values()) < 1e-4
            rate = 4e-9 * 4 * one["pairs"] * 16 / found["ms"][0]
            assert found["tflops"][0] == pytest.approx(rate)
    assert written["cases"][1]["found"]["longspan"]["over_dense"] is not None
    assert (tmp_path / "kernels-cpu.png").read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "s2/4, 130 tokens, 4/2x16 heads, float32" in printed and "kernels-cpu.json" in printed


def test_what_there_is_no_time_for_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = [small("causal"), Job(case("full", 20_000)), small("packed")]
    _, written = command(monkeypatch, tmp_path, plan, "--budget", "60")
    assert [x["name"] for x in written["cases"]] == ["causal", "packed"]
    assert written["dropped"] == ["full, 20000 tokens, 4/2x16 heads, float32, longspan sdpa reference"]
    assert f"no time for {written['dropped'][0]}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--budget 0.5 s is too short for any case"):
        command(monkeypatch, tmp_path, plan, "--budget", "0.5")
    with pytest.raises(SystemExit, match="--case 'cuasal' is in none of: causal, 130 tokens"):
        command(monkeypatch, tmp_path, plan, "--case", "cuasal")


def broken(case: Case, inputs: exact.Given) -> Attempt:
    raise RuntimeError("out of luck\nwith details")


def absent(case: Case, inputs: exact.Given) -> Attempt:
    raise Skip("not installed")


@pytest.mark.parametrize(("ours", "status"), [(peers.ours("cpu"), 0), (broken, 1)])
def test_who_fails_stands_in_the_table(
    ours: Callable[[Case, exact.Given], Attempt], status: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """And the others are measured all the same; if it is us, the command fails."""
    who = Contender("longspan", ours), Contender("sdpa", broken), Contender("natten", absent, "natten")
    monkeypatch.setattr(kernels, "contenders", lambda device: (*who, Contender("reference", peers.reference)))
    found = command(monkeypatch, tmp_path, [small("causal")])
    assert found[0] == status and found[1]["versions"]["natten"] is None
    row = found[1]["cases"][0]["found"]
    assert row["sdpa"] == "failed: RuntimeError: out of luck" and row["natten"] == "not installed"
    assert row["reference"]["ms"][0] > 0 and isinstance(row["longspan"], str) is bool(status)
    printed = capsys.readouterr()
    assert "with details" in printed.err and ("FAILED causal, 130 tokens" in printed.out) is bool(status)


def test_missing_packages_are_said_to_be() -> None:
    with pytest.raises(Skip, match="^not installed$"):
        peers.load("no_such_package.of.this.name")
    for build in (peers.flash_attn, peers.linear, peers.natten):
        with pytest.raises(Skip):
            build(case("s2/4"), exact.given(case("s2/4"), CPU))


def test_natten_gets_its_tokens_in_the_order_of_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stand-in returns the values it was given: they must come back in the order of the case."""
    fake: Any = ModuleType("natten")

    def na3d(q: Tensor, k: Tensor, v: Tensor, **kinds: Any) -> Tensor:
        assert q.shape == (1, *GRID, 2, 16) and kinds["kernel_size"] == (2, 8, 4)
        rows = q.detach()[0, 0, 0, :, 0, 0]
        assert torch.equal(rows, inputs.q.detach()[0, positions(one.at).argsort()[:8], 0, 0])
        return v + 0 * (q + k)

    fake.na3d = na3d
    monkeypatch.setitem(sys.modules, "natten", fake)
    one = Case("3d", case("3d").mask, 256, Shape(2, 2, 16), "full", torch.float32, case("3d").order)
    inputs = exact.given(one, CPU)
    out, dq, _, dv = peers.natten(one, inputs).result()
    assert torch.equal(out, inputs.v) and torch.equal(dv, inputs.dout) and not dq.any()


def test_times_are_of_the_two_halves() -> None:
    leaf = torch.zeros(1, requires_grad=True)

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            time.sleep(0.02)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dout: Tensor) -> Tensor:
            time.sleep(0.06)
            return dout

    attempt = Attempt(lambda: Slow.apply(leaf), (leaf,) * 3, torch.ones(1))
    forward, backward = CpuClock().time(attempt)()
    assert 20 <= forward < 60 <= backward


def test_the_figure_of_dense_cases_alone(tmp_path: Path) -> None:
    one = entry("causal", 500_000, longspan=(4.0, 20.0))
    content = report.document(Results({one.case.key: one}), CPU, contenders(CPU), {})
    assert draw(content, tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_a_figure_is_drawn_again_from_its_json(tmp_path: Path) -> None:
    for name in ("kernels-cpu.json", *(p.name for p in RESULTS.glob("kernels-nvidia*.json"))):
        (tmp_path / name).write_text((RESULTS / name).read_text())
        figure.main([str(tmp_path / name)])
        assert (tmp_path / name).with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
