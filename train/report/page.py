"""The report of a run: one HTML file that needs nothing else, neither a network nor a script."""

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from ..record import write_whole
from ..timeline import ALL
from ..trace import FOLDER
from .album import pictures_html
from .figures import curves, key_figures
from .holdings import layout_html
from .overlap import timeline_html
from .story import Story
from .style import CSS
from .tables import apart, columns, config_html, happenings, ranks, results, versions

NAME, COMPARED = "report.html", "compared.html"


def write(folders: Sequence[Path], out: Path | None = None) -> Path:
    """The report of one run, or of several beside each other, as report.html or compared.html of the first
    run's folder, or as `out`. OSError if it cannot be written, FileNotFoundError for a folder without a run,
    ValueError for a damaged file.
    """
    stories = [Story.read(Path(folder)) for folder in folders]
    if len({story.name for story in stories}) < len(stories):
        stories = [replace(story, title=str(story.folder)) for story in stories]
    path = out or stories[0].folder / (NAME if len(stories) == 1 else COMPARED)
    write_whole(path, page(stories))
    return path


def page(stories: Sequence[Story]) -> str:
    """The whole document."""
    title = " and ".join(story.name for story in stories)
    body = _alone(stories[0]) if len(stories) == 1 else _beside(stories)
    command = f"longspan report run={','.join(str(s.folder) for s in stories)}"
    if len(stories) > 1:
        command = f"longspan report 'run=[{','.join(str(s.folder) for s in stories)}]'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} · longspan</title><style>{CSS}</style></head>\n<body><main>"
        f"{body}<footer><p>Written by longspan. To write it anew:</p><pre>{escape(command)}</pre></footer>"
        "</main></body></html>\n"
    )


def _alone(story: Story) -> str:
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(beside)}</small></dd></div>"
        for name, value, beside in key_figures(story)
    )
    parts = (
        ("Curves", _curves([story])),
        ("Results", results(story)),
        ("Layout", layout_html(story.layout)),
        ("Ranks", ranks(story) + _trace(story)),
        ("Pictures", pictures_html(story.pictures(), story.folder)),
        ("What happened", happenings(story)),
        ("Settings", config_html(story.config)),
        ("Versions", versions(story.about)),
    )
    return f'{_header(story)}<dl class="tiles">{tiles}</dl>{_sections(parts)}'


def _beside(stories: Sequence[Story]) -> str:
    names = " and ".join(escape(story.name) for story in stories)
    tiles = [{n: ", ".join(filter(None, told)) for n, *told in key_figures(s)} for s in stories]
    order = dict.fromkeys(name for one in tiles for name in one)
    figures = columns(stories, [(name, [one.get(name, "–") for one in tiles]) for name in order])
    parts = (
        ("Figures", figures),
        ("Curves", _curves(stories)),
        ("Settings that differ", apart(stories)),
        *((f"Layout of {story.name}", layout_html(story.layout)) for story in stories),
    )
    return f"<header><h1>{names}</h1></header>{_sections(parts)}"


def _header(story: Story) -> str:
    state = story.state
    failed = state.startswith("failed")
    kind = "bad" if failed else "good" if state == "finished" else ""
    alert = f'<p class="alert">{escape(state)}</p>' if failed else ""
    return (
        f'<header><h1>{escape(story.name)}</h1><p><span class="state {kind}">'
        f'{"failed" if failed else escape(state)}</span><span class="lead">'
        f"{escape(str(story.config.get('experiment_name', '')))}</span></p>{alert}</header>"
    )


def _curves(stories: Sequence[Story]) -> str:
    drawn = "".join(chart.html() for chart in curves(stories))
    return f'<div class="pair">{drawn}</div>' if drawn else "<p>No step has been recorded yet.</p>"


def _trace(story: Story) -> str:
    path = story.folder / FOLDER / ALL
    if not path.exists():
        return ""
    return timeline_html(path) + (
        f"<p>A timeline of all ranks is in <code>{escape(str(path))}</code>; "
        '<a href="https://ui.perfetto.dev">ui.perfetto.dev</a> opens it.</p>'
    )


def _sections(parts: Sequence[tuple[str, str]]) -> str:
    """Those that hold anything."""
    return "".join(f"<section><h2>{escape(name)}</h2>{html}</section>" for name, html in parts if html)
