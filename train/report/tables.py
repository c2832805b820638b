"""The tables of a report: results, what happened, settings and versions."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from statistics import median
from typing import Any

from .figures import slowest_ranks
from .story import Story

# Longer values are cut.
LONGEST = 300
# What a table need not repeat, since it stands above.
KNOWN = ("state", "steps", "tokens", "training_seconds")

Rows = Sequence[tuple[str, str]]


def table(rows: Rows, head: tuple[str, str] | None = None) -> str:
    """Names and values; empty if there are none."""
    if not rows:
        return ""
    top = (
        f'<thead><tr><th scope="col">{head[0]}</th><th scope="col">{head[1]}</th></tr></thead>'
        if head
        else ""
    )
    body = "".join(f'<tr><th scope="row">{escape(n)}</th><td>{escape(v)}</td></tr>' for n, v in rows)
    return f"<table>{top}<tbody>{body}</tbody></table>"


def results(story: Story) -> str:
    """What the run found at its end, and its evaluations on the way."""
    plain = {k: v for k, v in story.summary.items() if k not in KNOWN}
    rows = [(name, value) for name, value in flat(plain) if len(value) <= LONGEST]
    html = f'<div class="scroll">{table(rows)}</div>' if rows else ""
    if story.evals:
        names = [n for n in story.evals[-1] if n not in ("time", "kind", "step", "tokens")]
        head = "".join(f'<th scope="col" class="n">{escape(n)}</th>' for n in ("step", *names))
        body = "".join(
            f'<tr><td class="n">{row["step"]:,}</td>'
            + "".join(f'<td class="n">{escape(_short(row.get(n, "")))}</td>' for n in names)
            + "</tr>"
            for row in story.evals
        )
        html += (
            f"<details><summary>Evaluations <small>{len(story.evals)}</small></summary>"
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
            "</details>"
        )
    return html


def happenings(story: Story) -> str:
    """Starts, bad steps and remarks, in the order of time."""
    told = []
    for event in story.events:
        if event["kind"] == "start":
            step, world = event["step"], event.get("world", 1)
            how = f"went on from step {step:,}" if step else "started"
            told.append((event["time"], f"{how} on {world} rank{'s' if world > 1 else ''}"))
        elif event["kind"] == "note":
            told.append((event["time"], event["text"]))
    for fault in story.faults:
        samples = fault.get("samples") or []
        which = f", samples {samples[0]:,} to {samples[-1]:,}" if samples else ""
        loss, norm = _short(fault.get("loss")), _short(fault.get("grad_norm"))
        what = f"step {fault['step']:,}: {fault.get('kind')}, {fault.get('did')}"
        told.append((fault["time"], f"{what} (loss {loss}, gradient norm {norm}{which})"))
    told.sort(key=lambda item: item[0])
    rows = [(f"{datetime.fromtimestamp(at, UTC):%Y-%m-%d %H:%M:%S}", text) for at, text in told]
    return table(rows, ("UTC", "what"))


def ranks(story: Story) -> str:
    """Which rank the others waited for, and how often."""
    found = slowest_ranks(story)
    if not found:
        return ""
    whole = sum(count for _, count in found)
    rank, count = found[0]
    spread = [row["step_s_max"] / row["step_s_median"] for row in story.rows if row.get("step_s_median")]
    times = f"{median(spread):.2f} times as long as the median rank" if spread else "longest"
    return (
        f"<p>Rank {rank} was the busiest in {count} of {whole} intervals ({count / whole:.0%}). The busiest "
        f"rank was busy {times}, in the median interval.</p>"
    )


def config_html(config: Mapping[str, Any]) -> str:
    """All settings, a group at a time; secrets were taken out when the file was written."""
    groups = {name: node for name, node in config.items() if isinstance(node, dict)}
    loose = {name: node for name, node in config.items() if name not in groups}
    html = table(list(flat(loose)))
    for name, node in groups.items():
        rows = list(flat(node))
        target = str(node.get("_target_", "")).rpartition(".")[2]
        told = target or ", ".join(f"{n}={v}" for n, v in rows[:3])[:60]
        html += (
            f"<details><summary>{escape(name)} <small>{escape(told)}</small></summary>{table(rows)}</details>"
        )
    return html


def versions(about: Mapping[str, Any]) -> str:
    """The command, and what ran where."""
    command = about.get("command")
    line = f"<pre>{escape(shlex.join(map(str, command)))}</pre>" if command else ""
    return line + table([item for item in flat({k: v for k, v in about.items() if k != "command"})])


def apart(stories: Sequence[Story]) -> str:
    """The settings in which runs differ, each run's value beside the others'."""
    settings = [dict(flat({k: v for k, v in story.config.items() if k != "run"})) for story in stories]
    names = [
        n
        for n in dict.fromkeys(n for one in settings for n in one)
        if len({one.get(n) for one in settings}) > 1
    ]
    if not names:
        return "<p>All settings are the same.</p>"
    return columns(stories, [(name, [one.get(name, "–") for one in settings]) for name in names])


def columns(stories: Sequence[Story], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A table with a column for each run."""
    head = "".join(f'<th scope="col">{escape(story.name)}</th>' for story in stories)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f"<td>{escape(v)}</td>" for v in values)
        + "</tr>"
        for name, values in rows
    )
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    return f'<div class="scroll"><table>{head}<tbody>{body}</tbody></table></div>'


def flat(node: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and short values."""
    for name, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{before}{name}.")
        else:
            text = _short(value)
            yield f"{before}{name}", text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _short(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.6g}" if isinstance(value, float) else str(value)
