"""What a run says of itself: its code, speed, lines and pictures, whose data must reach the axes."""

import io
import math
import os
import re
import struct
import subprocess
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from longspan.train import pictures
from longspan.train.checkout import git_state
from longspan.train.meter import Meter, gpt_flops, peak_flops, published_peak
from longspan.train.pictures import RANKS, Runs, owners, raster, smooth, styled
from longspan.train.progress import Progress, amount, duration, size


def test_git_state_tells_commit_and_dirt(tmp_path: Path) -> None:
    env = {**os.environ, "GIT_DIR": "/nowhere"}
    assert git_state(tmp_path, env) == {}
    tree = tmp_path / "tree"
    (tree / "code").mkdir(parents=True)
    (tree / "code" / "a.py").write_text("1")

    def git(*words: str) -> str:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        plain["GIT_CONFIG_GLOBAL"] = os.devnull
        command = ["git", "-C", str(tree), "-c", "user.name=n", "-c", "user.email=e", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, env=plain).stdout.strip()

    git("init", "-q")
    assert git_state(tree / "code", env) == {}
    git("add", "code")
    git("commit", "-qm", "first")
    assert git_state(tree / "code", env) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tree / "code" / "a.py").write_text("2")
    assert git_state(tree / "code", env)["dirty"] is True
    # An installed copy inside somebody's checkout is not that checkout's code.
    (tree / "site").mkdir()
    assert git_state(tree / "site", env) == {}


# the meter


def test_the_meter_leaves_the_first_step_and_pauses_out() -> None:
    now = 0.0
    meter = Meter(peak_flops=1e9, ranks=2, steps=110, start_step=10, clock=lambda: now)
    now += 60.0
    first = meter.update(11, 1200, 1e9)
    assert first["tokens_per_s"] == pytest.approx(20.0) and first["eta_s"] == pytest.approx(99 * 60)
    now += 2.0
    second = meter.update(12, 1000, 1e9)
    assert (second["tokens_per_s"], second["step_s"]) == pytest.approx((500.0, 2.0))
    assert second["mfu"] == pytest.approx(1e9 / 2.0 / 2e9) and second["eta_s"] == pytest.approx(98 * 2.0)
    now += 500.0
    meter.restart()
    for step in range(13, 33):
        now += 4.0
        last = meter.update(step, 1000, 1e9)
    # Twenty steps of 4 s fill the window: the step of 2 s and the pause are out of it.
    assert (last["tokens_per_s"], last["step_s"]) == pytest.approx((250.0, 4.0))
    assert last["mfu"] == pytest.approx(0.125) and last["peak_memory"] > 50 * 2**20
    now += 1.0
    assert meter.update(110, 1, 1.0)["eta_s"] == 0.0


def test_gpt_flops_counts_what_the_mask_shows() -> None:
    # A weight and a visible pair, forward and (twice that) backward.
    assert gpt_flops(1, 1, 1, 1, 1, 0) == 6 and gpt_flops(0, 0, 1, 1, 1, 1) == 12
    tokens, layers, heads, dim = 4096, 2, 4, 16
    causal, window = tokens * (tokens + 1) // 2, 256 * tokens - 255 * 256 // 2
    dense, sparse = (gpt_flops(10**5, tokens, layers, heads, dim, n) for n in (causal, window))
    assert dense - sparse == 12 * layers * heads * dim * (causal - window)


@pytest.mark.parametrize(
    ("name", "dtype", "tf32", "teraflops"),
    [
        ("NVIDIA H200", torch.bfloat16, False, 989.5),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, False, 989.5),
        ("NVIDIA H100 80GB HBM3", torch.float32, True, 494.7),
        ("NVIDIA H100 PCIe", torch.bfloat16, False, 756.0),
        ("NVIDIA A100-SXM4-80GB", torch.float32, False, 19.5),
        ("NVIDIA A10G", torch.bfloat16, False, None),
        ("NVIDIA L40S", torch.bfloat16, False, 362.0),
        ("NVIDIA B200", torch.float16, False, 2250.0),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, False, 165.2),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", torch.bfloat16, False, None),
        ("NVIDIA H100 80GB HBM3", torch.float64, False, None),
    ],
)
def test_published_peaks(name: str, dtype: torch.dtype, tf32: bool, teraflops: float | None) -> None:
    found = published_peak(name, dtype, tf32)
    assert (found and found[0]) == (teraflops and pytest.approx(teraflops * 1e12))


def test_the_peak_of_a_cpu_is_measured() -> None:
    began = time.monotonic()
    peak, source = peak_flops(torch.device("cpu"), torch.float32)
    assert time.monotonic() - began < 1.0
    assert source == "measured matmul peak on this machine"
    # Not above what any core does, and at least what one timed matmul reaches.
    a = torch.ones(384, 384)
    took = time.perf_counter()
    _ = a @ a
    assert 0.2 * 2 * 384**3 / (time.perf_counter() - took) < peak < 1e14


# what is shown


def show(out: io.StringIO, *, rank: int = 0, every_s: float = 0.0, last: int = 12) -> list[str]:
    figures = dict(tokens_per_s=17234.0, mfu=0.314, peak_memory=1.5 * 2**30, eta_s=3725.0)
    with Progress(rank=rank, every_s=every_s, out=out) as progress:
        progress.start({"model": "gpt [bold]", "run folder": "/" + "x" * 60, "data": "many words " * 20})
        for step in range(1, last + 1):
            progress.step(step, last, {**figures, "loss": 10.0 / step})
        progress.note("checkpoint [bold] at 100%")
        progress.summary({"held-out": "3.11 bits per byte"})
    return out.getvalue().splitlines()


def test_plain_lines_suit_a_log() -> None:
    shown = show(io.StringIO())
    text = "\n".join(shown)
    assert text.isprintable() or not re.search(r"[^\x20-\x7e\n]", text)
    assert max(map(len, shown)) <= 110
    assert all(
        part in text for part in ("gpt [bold]", "x" * 60, "checkpoint [bold] at 100%", "3.11 bits per byte")
    )
    steps = [line for line in shown if line.startswith("step")]
    assert steps[-1] == "step 12/12  loss  0.8333   17.2k tok/s  MFU 31.4%  mem  1.5 GiB  ETA 1:02:05"
    assert len(steps) == 12 and len({len(line) for line in steps}) == 1


def test_plain_lines_are_few() -> None:
    steps = [line for line in show(io.StringIO(), every_s=60.0) if line.startswith("step")]
    assert [line[:10] for line in steps] == ["step  1/12", "step 12/12"]


@pytest.mark.parametrize("rank", [1, 7])
def test_other_ranks_show_nothing(rank: int) -> None:
    assert show(io.StringIO(), rank=rank) == []


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("columns", "bar"), [(200, True), (80, False)])
def test_a_terminal_gets_a_bar(columns: int, bar: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    text = "\n".join(show(Terminal()))
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert ("━" in plain) == bar and "\x1b[" in text
    assert (
        "step 12/12" in plain and "loss  0.8333   17.2k tok/s  MFU 31.4%  mem  1.5 GiB  ETA 1:02:05" in plain
    )
    assert "gpt [bold]" in plain and "checkpoint [bold] at 100%" in plain and "3.11 bits per byte" in plain
    # The cursor is hidden while the bar runs, and back at the end, also when that is an error.
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") >= 0
    with pytest.raises(KeyError), Progress(out=(out := Terminal())) as progress:
        progress.step(1, 2, {"loss": 1.0})
        raise KeyError
    assert out.getvalue().rfind("\x1b[?25h") > out.getvalue().rfind("\x1b[?25l") >= 0


def test_units() -> None:
    assert [amount(n) for n in (0, 999.4, 999.6, 17234)] == ["0", "999", "1k", "17.2k"]
    assert [amount(n) for n in (1e6, 2.5e9)] == ["1M", "2.5G"]
    assert [size(n) for n in (0, 1023, 1024, 1.5 * 2**30)] == ["0 B", "1023 B", "1.0 KiB", "1.5 GiB"]
    assert [duration(s) for s in (0, 65, 3725, 36000)] == ["0:00", "1:05", "1:02:05", "10:00:00"]


# the pictures

ROWS = [{"step": i, "tokens": 100 * i, "loss": math.log(2) * (3 + 5 / i)} for i in range(1, 81)]
EVALS = [{"tokens": 4000, "bits_per_byte": 3.6}, {"tokens": 8000, "bits_per_byte": 3.3}]


def zigzag(length: int, ranks: int) -> list[Runs]:
    n = length // (2 * ranks)
    return [[(r * n, n, None, None), (length - (r + 1) * n, n, None, None)] for r in range(ranks)]


def striped(length: int, ranks: int) -> list[Runs]:
    return [[(r, length // ranks, 1, ranks)] for r in range(ranks)]


def causal(n: int) -> Any:
    return np.tril(np.full((n, n), 2)) - np.eye(n, dtype=int)


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def layout(ranks: int, sent: Any) -> Figure:
    with styled():
        return pictures.draw_layout(
            zigzag(4096, ranks),
            4096,
            causal(32),
            sent=sent,
            title="t",
            mask="Documents(inner=Causal()) & " * 4,
        )


def test_every_picture_is_a_png_of_its_size(tmp_path: Path) -> None:
    accuracy = np.array([[0.9, 0.1], [1.0, np.nan]])
    held: dict[str, Any] = dict(
        spans_by_rank=zigzag(4096, 2), length=4096, tiles=causal(32), mask="m", title="t"
    )
    held["sent"] = 1 - np.eye(2, dtype=int)
    tried: dict[str, Any] = dict(depths=[0, 1], lengths=[64, 128], accuracy=accuracy, trained=64)
    made = {
        pictures.loss_curve(ROWS, tmp_path / "loss.png", evals=EVALS, bounds={"lzma": 1.6}): (1200, 630),
        pictures.loss_by_position([0, 16, 64], [3.5, 3.1], tmp_path / "at.png", shard_edges=[32]): (
            1200,
            570,
        ),
        pictures.layout_picture(tmp_path / "layout.png", **held): (1725, 645),
        pictures.needle_map(tmp_path / "needle.png", **tried): (690, 450),
    }
    assert {path.name for path in made} == set(os.listdir(tmp_path))
    for path, shape in made.items():
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:]) == shape
        pixels = imread(path)[..., :3]
        # Neither blank nor all ink: most of it is paper, and there are more colours than one line needs.
        assert 0.3 < np.mean(np.all(pixels == 1, axis=-1)) < 0.99
        colours = (pixels * 255).astype(int) @ np.array([65536, 256, 1])
        assert len(np.unique(colours)) > 50


def test_the_loss_curve_is_in_bits_against_tokens() -> None:
    rows = [*ROWS, {"step": 81, "tokens": 8100, "loss": math.nan}]
    with styled():
        figure = pictures.draw_loss_curve(rows, evals=EVALS, bounds={"order 1": 3.45, "lzma": 1.6})
    axes: Any = figure.axes[0]
    raw, means, held_out, *levels = axes.get_lines()
    assert raw.get_xdata()[-1] == 8000 and raw.get_ydata() == pytest.approx([3 + 5 / i for i in range(1, 81)])
    assert np.ptp(np.diff(means.get_ydata())) < np.ptp(np.diff(raw.get_ydata()))
    assert (list(held_out.get_xdata()), list(held_out.get_ydata())) == ([4000, 8000], [3.6, 3.3])
    assert sorted(line.get_ydata()[0] for line in levels) == [1.6, 3.45]
    assert sorted(texts(axes)) == ["lzma 1.60", "order 1 3.45"]
    low, high = axes.get_ylim()
    assert low < 1.6 and high > 8
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "training",
        "held out, 3.30 at the end",
    ]


def test_labels_of_levels_do_not_overlap() -> None:
    bounds = {"a": 1.6, "b": 1.61, "c": 1.62, "d": 2.0, "e": 3.45}
    with styled():
        figure = pictures.draw_loss_curve(ROWS, evals=[], bounds=bounds)
    boxes = extents(figure, [*figure.axes[0].texts])
    assert len(boxes) == 5
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)


def extents(figure: Figure, artists: list[Any]) -> list[Any]:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return [artist.get_window_extent(canvas.get_renderer()) for artist in artists]


def test_a_run_without_steps_still_has_a_picture(tmp_path: Path) -> None:
    assert pictures.loss_curve([], tmp_path / "loss.png", evals=[], bounds={}).stat().st_size > 1000


def test_smoothing_keeps_lines_straight_and_ends_fixed() -> None:
    line = np.arange(50.0)
    assert smooth(line, 7) == pytest.approx(line)
    spike = np.eye(1, 21, 10)[0]
    assert smooth(spike, 2) == pytest.approx(np.convolve(spike, np.full(5, 0.2), "same"))


def test_loss_by_position_marks_shards() -> None:
    with styled():
        figure = pictures.draw_loss_by_position(
            [0, 16, 64, 256], [4.0, 3.5, 3.25], shard_edges=[0, 64, 128, 256]
        )
        with pytest.raises(ValueError, match="3 values need 4 bucket edges, not 3"):
            pictures.draw_loss_by_position([0, 1, 2], [1.0, 2.0, 3.0], shard_edges=[])
    axes: Any = figure.axes[0]
    (stairs,) = axes.patches
    assert list(stairs.get_data().values) == [4.0, 3.5, 3.25]
    assert list(stairs.get_data().edges) == [8, 16, 64, 256]
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [64, 128]
    assert axes.get_xscale() == "log" and texts(axes) == ["shard borders"]


def test_owners_follow_the_spans() -> None:
    assert list(owners(zigzag(8, 2), 8)) == [0, 0, 1, 1, 1, 1, 0, 0]
    assert list(owners(striped(8, 4), 8)) == [0, 1, 2, 3] * 2
    # Runs of two every five, one position that nobody holds.
    assert list(owners([[(0, 4, 2, 5)], [(2, 2, None, None), (7, 2, None, None)]], 9)) == [
        0,
        0,
        1,
        1,
        -1,
        0,
        0,
        1,
        1,
    ]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("place", [zigzag, striped])
def test_a_raster_gives_every_rank_its_share(place: Any, ranks: int) -> None:
    length = 96 * ranks
    drawn = raster(owners(place(length, ranks), length), 8)
    assert np.bincount(drawn, minlength=ranks) / len(drawn) == pytest.approx(
        np.full(ranks, 1 / ranks), abs=0.02
    )


def test_the_layout_colours_queries_by_their_rank() -> None:
    figure = layout(2, np.array([[0, 3 * 2**20], [2**19, 0]]))
    mask, holdings, traffic = figure.axes
    image = np.asarray(mask.get_images()[0].get_array())

    def pixel(query: float, key: float) -> Any:
        return image[int(query * image.shape[0]), int(key * image.shape[1])]

    assert pixel(0.2, 0.01) == pytest.approx(to_rgb(RANKS[0])) == pixel(0.9, 0.5)
    assert pixel(0.4, 0.01) == pytest.approx(to_rgb(RANKS[1])) == pixel(0.6, 0.3)
    # A key in the future is seen by nobody; a tile on the diagonal is drawn paler than a full one.
    assert pixel(0.2, 0.8) == pytest.approx(to_rgb(pictures.EMPTY)) == pixel(0.5, 0.99)
    assert (
        np.all(pixel(0.4, 0.4) >= pixel(0.4, 0.01)) and pixel(0.4, 0.4).sum() > pixel(0.4, 0.01).sum() + 0.3
    )
    index = ((np.arange(384) + 0.5) * 4096 / 384).astype(int)
    for strip, row in zip(
        holdings.get_images(), owners(zigzag(4096, 2), 4096)[None] == [[0], [1]], strict=True
    ):
        drawn = np.any(np.asarray(strip.get_array())[0] != 1.0, axis=-1)
        assert np.array_equal(drawn, row[index])
    assert texts(holdings) == ["2,048", "2,048", "tokens"]
    # From rank 0 (row) to rank 1 (column).
    assert {text.get_position(): text.get_text() for text in traffic.texts}[1, 0] == "3.00"
    assert texts(traffic) == ["–", "3.00", "0.50", "–"]
    assert "MiB" in traffic.get_title(loc="left") and "3.5 MiB a layer" in traffic.get_xlabel()


@pytest.mark.parametrize("ranks", [1, 2, 5, 8])
def test_the_layout_is_legible(ranks: int) -> None:
    sent = np.random.default_rng(ranks).integers(1, 999 * 2**20, (ranks, ranks)) * (
        1 - np.eye(ranks, dtype=int)
    )
    figure = layout(ranks, sent)
    traffic = figure.axes[2]
    boxes = extents(figure, [*traffic.texts, *figure.axes[1].texts])
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    cell = traffic.transData.transform([(0, 0), (1, 1)])
    assert max(box.width for box in boxes[: ranks**2]) < 0.95 * (cell[1, 0] - cell[0, 0])
    titles = extents(figure, [axes._left_title for axes in figure.axes])  # type: ignore[attr-defined]
    assert not any(a.overlaps(b) for a, b in combinations(titles, 2))


def test_a_layout_of_other_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"2 ranks need sent \[P, P\] and tiles \[n, n\], not \(3, 3\)"):
        layout(2, np.zeros((3, 3), dtype=int))


@pytest.mark.parametrize("trained", [1024, 2048])
def test_the_needle_map_marks_what_was_trained(trained: int) -> None:
    accuracy = np.array([[1.0, 0.75, 0.25], [0.5, np.nan, 0.0]])
    with styled():
        figure = pictures.draw_needle_map([0.0, 0.5], [256, 1024, 4096], accuracy, trained=trained)
        with pytest.raises(ValueError, match=r"accuracy \(2, 3\) must be \[3 depths, 2 lengths\]"):
            pictures.draw_needle_map([0, 0.5, 1], [1, 2], accuracy, trained=1)
    axes: Any = figure.axes[0]
    assert texts(axes) == ["1.00", "0.75", "0.25", "0.50", "–", "0.00", f"trained at {trained:,}"]
    assert [line.get_xdata()[0] for line in axes.get_lines()] == [1.5]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "1,024", "4,096"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0%", "50%"]
    shown = axes.get_images()[0].get_array()
    assert shown is not None and np.array_equal(np.ma.filled(shown, np.nan), accuracy, equal_nan=True)
