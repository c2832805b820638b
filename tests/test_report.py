"""The report of a run: what it holds, that it stands alone, and that nothing of a run folder breaks it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from omegaconf import OmegaConf

from jobs import config, whole
from longspan.launch.report import merged
from longspan.launch.report import report as command
from longspan.train.config import ConfigError
from longspan.train.diffusion.grids import save_png
from longspan.train.report.album import MOST, pictures_html, shape
from longspan.train.report.chart import Chart, Line, Mark, thinned, ticks
from longspan.train.report.figures import smoothed
from longspan.train.report.holdings import layout_html
from longspan.train.report.overlap import common, timeline_html, united
from longspan.train.report.page import page, write
from longspan.train.report.story import Story
from longspan.train.timeline import ALL, merge
from test_trace import GPU, event
from test_trace import write as write_trace
from world import Worlds

VOID = {"meta", "img", "br"}
NASTY = "<script>alert('x')</script>&\"quoted\""


class Page(HTMLParser):
    """Fails on a tag that is not closed where it should be; collects what a test asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def run(folder: Path, *, steps: int = 60, name: str = "ring") -> Path:
    """A run folder as training leaves it, with a resume, a skipped step and an evaluation made twice."""
    folder.mkdir()
    settings = {
        "experiment_name": name, "seed": 0, "train": {"steps": steps}, "run": {"dir": str(folder)},
        "objective": {"_target_": "longspan.train.objective.next_token.NextToken"},
        "parallel": {"layout": {"_target_": "longspan.parallel.ring.Ring", "axis": NASTY}},
        "track": {"api_key": "<redacted>"},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    rows: list[dict[str, Any]] = [
        {
            "step": s, "loss": 5.0 / s, "grad_norm": 9.0 / s, "tokens": 64 * s, "tokens_per_s": 1e4,
            "mfu": 0.3, "step_s": 0.4, "peak_memory": 2**30, "step_s_max": 0.4, "step_s_median": 0.2,
            "slowest_rank": 1.0,
        }
        for s in range(1, steps + 1)
    ]  # fmt: skip
    rows[30] |= {"loss": "NaN", "grad_norm": "NaN", "skipped": 1}
    (folder / "metrics.jsonl").write_text(lines(*rows))
    events = lines(
        {"time": 1e9, "kind": "start", "step": 0, "world": 2},
        {"time": 1e9 + 5, "kind": "evaluation", "step": 20, "tokens": 1280, "eval_loss": 4.0},
        {"time": 1e9 + 7, "kind": "note", "text": NASTY},
        {"time": 1e9 + 9, "kind": "start", "step": 18, "world": 4},
        {"time": 1e9 + 11, "kind": "evaluation", "step": 20, "tokens": 1280, "eval_loss": 2.5},
    )
    # a kill tore the last line
    (folder / "events.jsonl").write_text(events + '{"time": 1e9, "ki')
    fault = {
        "time": 1e9 + 10, "step": 31, "kind": "nonfinite", "did": "skipped", "loss": "NaN",
        "grad_norm": "NaN", "samples": [60, 61], "ids": [],
    }  # fmt: skip
    (folder / "faults.jsonl").write_text(lines(fault))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": steps}))
    (folder / "summary.json").write_text(json.dumps({"state": "finished", "held_out": {"loss": 1.25}}))
    (folder / "run.json").write_text(json.dumps({"command": ["train", NASTY], "torch": "2.13.0", "world": 4}))
    (folder / "layout.json").write_text(json.dumps(LAYOUT))
    save_png(np.zeros((4, 1, 1, 8, 8), np.float32), folder / "samples-1.png", columns=2)
    return folder


LAYOUT: dict[str, Any] = {
    "title": "ring over 2 ranks", "mask": "Causal()", "length": 4096,
    "tiles": ["2000", "2200", "2210", "2222"],
    "spans": [[[0, 1024, None, None], [3072, 1024, None, None]], [[1024, 2048, None, None]]],
    "sent": [[0, 2048], [1024, 0]],
}  # fmt: skip


def test_a_page_stands_alone_and_holds_the_run(tmp_path: Path) -> None:
    path = write([run(tmp_path / "a")])
    text = path.read_text()
    found = Page(text)
    assert path == tmp_path / "a" / "report.html" and not (tmp_path / "a" / "report.html.part").exists()
    # nothing is loaded from anywhere, nothing runs, and a phone shows it at its own width
    assert {tag for tag, _ in found.tags}.isdisjoint({"script", "link", "iframe", "object"})
    assert all(attrs["src"].startswith("data:") for _, attrs in found.tags if attrs.get("src"))  # type: ignore[union-attr]
    assert "url(" not in text and "@import" not in text and "@media (prefers-color-scheme:dark)" in text
    viewports = [attrs["content"] for tag, attrs in found.tags if attrs.get("name") == "viewport"]
    assert viewports == ["width=device-width,initial-scale=1"]
    assert ("html", {"lang": "en"}) in found.tags
    for words in (
        "Loss", "Gradient norm", "Throughput", "Time of a step", "nats a token", "resume (1)", "fault (1)",
        "went on from step 18 on 4 ranks", "step 31: nonfinite, skipped (loss NaN", "samples 60 to 61",
        "What happened", "2001-09-09 01:46:40", "held_out.loss", "1.25", "2.13.0", "<redacted>",
        "Rank 1 was the busiest in 60 of 60 intervals (100%)", "2.00 times as long",
    ):  # fmt: skip
        assert words in found.text, words
    # what the run's files say is shown, and is no markup
    assert found.text.count(NASTY) == 2 and found.text.count("<script>") == 3
    assert all(attrs.get("alt") for tag, attrs in found.tags if tag == "img")
    assert all(attrs.get("aria-label") for tag, attrs in found.tags if tag == "svg")


def test_values_on_the_way_are_those_of_the_last_start(tmp_path: Path) -> None:
    story = Story.read(run(tmp_path / "a"))
    assert story.held_out("eval_loss") == ([20.0], [2.5])
    assert story.resumes == [18] and len(story.starts) == 2
    steps, losses = story.column("loss")
    assert len(steps) == 59 and 31.0 not in steps and losses[0] == 5.0


def test_a_run_that_has_only_begun_or_failed_has_a_page(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    for path in folder.iterdir():
        if path.name not in ("config.yaml", "status.json"):
            path.unlink()
    (folder / "status.json").write_text(json.dumps({"state": f"failed: {NASTY}", "step": 0}))
    found = Page(page([Story.read(folder)]))
    assert f"failed: {NASTY}" in found.text and "No step has been recorded yet." in found.text
    (folder / "config.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="holds no config.yaml; give the folder of a run"):
        Story.read(folder)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    (folder / "summary.json").write_text('{"a":')
    with pytest.raises(ValueError, match="summary.json is not JSON"):
        Story.read(folder)


def test_two_runs_lie_beside_each_other(tmp_path: Path) -> None:
    one, two = run(tmp_path / "one"), run(tmp_path / "two", steps=40, name="ulysses")
    path = write([one, two])
    found = Page(path.read_text())
    assert path == one / "compared.html"
    assert "one and two" in found.text and "Settings that differ" in found.text
    differ = found.text[found.text.index("Settings that differ") :]
    assert "train.steps" in differ and "experiment_name" in differ and "seed" not in differ
    # the folder of a run always differs
    assert "run.dir" not in differ
    assert f"{one} and {one}" in Page(write([one, one]).read_text()).text


def test_the_command_merges_traces_and_writes_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run(tmp_path / "a")
    (folder / "traces").mkdir()
    write_trace(folder / "traces", 0, GPU)
    # of a rank that was killed as it wrote
    half = folder / "traces" / "rank1.json.gz"
    half.write_bytes((folder / "traces" / "rank0.json.gz").read_bytes()[:60])
    out = tmp_path / "page.html"
    assert command(OmegaConf.create({"run": str(folder), "out": str(out)})) == 0
    lost, *said = capsys.readouterr().out.split("\n")[:3]
    assert lost.startswith(f"left out: {half} is no trace of a rank (EOFError: ")
    assert said == [f"ranks merged: 1, {folder / 'traces' / ALL}", str(out)]
    assert "ui.perfetto.dev" in out.read_text() and merged([folder]) == []
    (other := run(tmp_path / "b") / "traces").mkdir()
    half.replace(other / half.name)
    (line,) = merged([other.parent])
    assert line.startswith(f"ranks merged: none: {other / half.name} is no trace of a rank")
    for wrong in ([], [str(folder)] * 5, 3):
        with pytest.raises(ConfigError, match="it must be the folder of a run, or a list of two to four"):
            command(OmegaConf.create({"run": wrong, "out": None}))


# parts


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 10, 4) == [0, 2.5, 5, 7.5, 10]
    assert ticks(1.3, 5.6, 4) == [2, 4]
    assert ticks(0, 2000, 4) == [0, 500, 1000, 1500, 2000]
    assert ticks(3, 3, 4) == [3]


def test_thinning_keeps_every_spike() -> None:
    y = np.sin(np.arange(10_000) / 500)
    y[7777], y[1234] = 50.0, -50.0
    points = list(thinned(range(10_000), y.tolist()))
    assert len(points) <= 240 and {(7777, 50.0), (1234, -50.0)} <= set(points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert list(thinned([1, 2], [3, 4])) == [(1, 3), (2, 4)]


def heights(html: str, style: str) -> list[float]:
    """The y of each point of the line of that style, 0 at the top and 1000 at the bottom."""
    (path,) = re.findall(rf'<path class="{style}" d="M([^"]+)"', html)
    return [float(point.split()[1]) for point in path.split("L")]


def test_a_curve_is_where_its_values_are() -> None:
    chart = Chart("Loss", "nats", [Line("training", [0, 1, 2], [1.0, 3.0, 2.0])], low=1.0)
    low, high, middle = heights(chart.html(), "a")
    assert low == 1000 and high < 100 and middle == pytest.approx((low + high) / 2, abs=0.1)
    logarithmic = Chart("Norm", "", [Line("norm", [0, 1, 2], [1.0, 100.0, 10.0])], logarithmic=True)
    low, high, middle = heights(logarithmic.html(), "a")
    assert middle == pytest.approx((low + high) / 2, abs=0.1)
    assert Chart("Loss", "nats", [Line("training", [], [])]).html() == ""
    # one value, and values that are all the same, have a place too
    assert "h0" in Chart("Loss", "nats", [Line("training", [5], [2.0])]).html()
    assert set(heights(Chart("Loss", "", [Line("a", [0, 1], [2.0, 2.0])]).html(), "a")) == {500.0}


def test_a_spike_does_not_flatten_the_rest_and_is_told() -> None:
    y = [1.0 + i % 2 for i in range(100)]
    y[50] = 1e6
    html = Chart("Loss", "nats", [Line("training", range(100), y)], [Mark(50, NASTY, "fault")]).html()
    assert "up to 1.0e6, cut off" in html
    assert heights(html, "a")[0] - heights(html, "a")[1] > 300
    assert "&lt;script&gt;" in html and "<script>" not in html


def test_the_layout_shows_who_holds_what() -> None:
    html = layout_html(LAYOUT)
    Page(f"<div>{html}</div>")
    strips = re.search(r'<svg class="strips".*?</svg>', html, re.S)
    assert strips is not None
    widths: dict[str, float] = {}
    for width, colour in re.findall(r'width="([\d.]+)" height="\d+" fill="(#\w+)"', strips[0]):
        widths[colour] = widths.get(colour, 0.0) + float(width)
    assert list(widths.values()) == pytest.approx([50.0, 50.0], abs=0.1)
    assert "rank 0: 2,048 tokens" in html and "rank 1: 2,048 tokens" in html
    assert "2.0 KiB" in html and "3.0 KiB in all" in html and "lets about 59%" in html
    many = LAYOUT | {"spans": [[[64 * i, 64, None, None]] for i in range(64)], "sent": [[1] * 64] * 64}
    assert "and 48 more" in layout_html(many) and "<table" not in layout_html(many)
    assert layout_html({}) == ""
    assert "Nothing travels" in layout_html(LAYOUT | {"sent": [[0, 0], [0, 0]]})


def test_communication_beside_computation_is_hidden(tmp_path: Path) -> None:
    assert united([(5, 6), (0, 2), (1, 3), (3.5, 4)]) == [(0, 3), (3.5, 4), (5, 6)]
    assert united([(0, 3), (3.5, 4), (5, 6)], 0.5) == [(0, 4), (5, 6)]
    assert common([(0, 4), (6, 9)], [(1, 2), (3, 7), (8, 12)]) == [(1, 2), (3, 4), (6, 7), (8, 9)]
    write_trace(tmp_path, 0, [event("step 7", "user_annotation", 0, 100), *GPU])
    path = merge(tmp_path).path
    html = timeline_html(path)
    Page(f"<div>{html}</div>")
    # a product from 40 to 70 and a copy from 35 to 39, a sum from 50 to 80
    assert "Rank 0 computes 34% of the step, communicates 30%, 67% of it beside computation." in html
    assert 'class="a" x="0.00" y="0" width="900.00"' in html and timeline_html(tmp_path / "no") == ""


def test_pictures_have_their_size_and_a_page_has_an_end(tmp_path: Path) -> None:
    png = save_png(np.zeros((4, 1, 1, 8, 8), np.float32), tmp_path / "a.png", columns=2)
    width, height = shape(png.read_bytes())
    assert width == height > 16 and shape(b"GIF89a\x05\x00\x07\x00") == (5, 7) and shape(b"?") == (0, 0)
    (tmp_path / "big.png").write_bytes(b"0" * (MOST + 1))
    html = pictures_html([tmp_path / "big.png", png], tmp_path)
    Page(f"<div>{html}</div>")
    assert f'width="{width}"' in html and "Also in the run folder: big.png" in html and len(html) < MOST


def test_a_run_ends_with_its_report(world: Worlds, data_cache: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = (
        "train.steps=3",
        "eval.every=2",
        "eval.samples=1",
        "eval.final=1",
        "trace.first=2",
        "trace.steps=1",
    )
    cfg = config(data_cache, "parallel=ring", f"run.dir={folder}", *words)
    assert world(2)(whole, cfg) == [0, 0]
    found = Page((folder / "report.html").read_text())
    for section in ("Curves", "Results", "Layout", "Ranks", "What happened", "Settings", "Versions"):
        assert section in found.text
    assert "ring over 2 rank(s)" in found.text and "started on 2 ranks" in found.text
    assert (folder / "traces" / ALL).exists() and "trace of 2 ranks" in found.text
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(
        row["slowest_rank"] in (0.0, 1.0) and row["step_s_max"] >= row["step_s_median"] for row in rows
    )
    story = Story.read(folder)
    assert [row["step"] for row in story.evals] == [2, 3] and story.layout["length"] == cfg.data.context
    shutil.rmtree(folder)


def test_one_huge_value_leaves_the_others_their_means() -> None:
    values = [1.0] * 60
    values[20] = 1e18
    _, means = smoothed("loss", (list(range(60)), values), "a")
    assert means.y[30:] == pytest.approx(values[30:])
