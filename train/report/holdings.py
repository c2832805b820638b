"""Who holds what, and what travels: the layout's picture in the colours of the page."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from typing import Any

import numpy as np

from ..pictures import RANKS, owners, raster
from ..progress import size

# More ranks than these are drawn as thin strips, without a table of what each sends.
NAMED, TABLED = 16, 8
BLOCKS = 16


def layout_html(layout: Mapping[str, Any]) -> str:
    """Figures from a layout.json; empty if there is none."""
    if not layout:
        return ""
    owner = owners(layout["spans"], layout["length"])
    ranks = len(layout["spans"])
    return (
        f'<p class="lead">{escape(layout["title"])}, {layout["length"]:,} tokens. '
        f"Mask: <code>{escape(layout['mask'])}</code></p>"
        f'<div class="pair">{_held(owner, ranks, _sent(layout["sent"], ranks))}'
        f"{_mask(owner, layout['tiles'])}</div>"
    )


def colour(rank: int) -> str:
    return RANKS[rank % len(RANKS)]


def _held(owner: Any, ranks: int, sent: str) -> str:
    """A strip for each rank, with what it holds of the sequence in its colour; below it, what travels."""
    drawn = raster(owner, BLOCKS)
    unit = 100 / len(drawn)
    height = 18 if ranks <= NAMED else max(2, 240 // ranks)
    strips = []
    for rank in range(ranks):
        at = height * rank
        strips.append(f'<rect class="empty" x="0" y="{at}" width="100" height="{height - 1}"/>')
        strips += [
            f'<rect x="{first * unit:.2f}" y="{at}" width="{count * unit:.2f}" height="{height - 1}" '
            f'fill="{colour(rank)}"/>'
            for first, count in _runs(drawn == rank)
        ]
    counts = [int(np.count_nonzero(owner == rank)) for rank in range(ranks)]
    names = "".join(
        f'<li><i style="background:{colour(rank)}"></i>rank {rank}: {count:,} tokens</li>'
        for rank, count in enumerate(counts[:NAMED])
    )
    more = f"<li>and {ranks - NAMED} more</li>" if ranks > NAMED else ""
    said = f"{ranks} ranks hold {min(counts):,} to {max(counts):,} tokens each"
    return (
        '<figure class="chart"><figcaption><h3>Who holds what</h3> <span class="unit">from the first '
        f'position to the last</span></figcaption><svg class="strips" style="height:{height * ranks}px" '
        f'viewBox="0 0 100 {height * ranks}" preserveAspectRatio="none" role="img" aria-label="{said}">'
        f'{"".join(strips)}</svg><ul class="ranks">{names}{more}</ul>{sent}</figure>'
    )


def _mask(owner: Any, tiles: Sequence[str]) -> str:
    """Which keys a query may see, in the colour of the rank that holds the query."""
    side = len(tiles)
    rows = raster(owner, side)
    grain = len(rows) // side
    cells = []
    for at, row in enumerate(tiles):
        who = int(rows[at * grain + grain // 2])
        for first, count, kind in _cells(row):
            weight = "" if kind == "2" else ' opacity=".45"'
            fill = colour(who) if who >= 0 else "gray"
            cells.append(f'<rect x="{first}" y="{at}" width="{count}" height="1.02" fill="{fill}"{weight}/>')
    seen = sum(row.count("2") + 0.5 * row.count("1") for row in tiles) / side**2
    return (
        '<figure class="chart"><figcaption><h3>Who sees what</h3> <span class="unit">queries down, keys '
        'across; pale: in part</span></figcaption><svg class="mask" '
        f'viewBox="0 0 {side} {side}" role="img" aria-label="The mask lets about {seen:.0%} of all pairs '
        f'through"><rect class="empty" width="{side}" height="{side}"/>{"".join(cells)}</svg></figure>'
    )


def _sent(sent: Sequence[Sequence[int]], ranks: int) -> str:
    """A table of the bytes from each rank to each, of a layer, both passes."""
    whole = sum(map(sum, sent))
    if not whole:
        return '<p class="note">Nothing travels between ranks in attention.</p>'
    if ranks > TABLED:
        return f'<p class="note">In attention {size(whole)} travel a layer, over all {ranks} ranks.</p>'
    most = max(map(max, sent))
    head = "".join(f'<th scope="col">to {rank}</th>' for rank in range(ranks))
    body = "".join(
        f'<tr><th scope="row">from {rank}</th>'
        + "".join(
            f'<td style="--share:{100 * count / most:.0f}%">{size(count) if count else "–"}</td>'
            for count in row
        )
        + "</tr>"
        for rank, row in enumerate(sent)
    )
    return (
        '<div class="scroll"><table class="heat"><caption>What travels in a layer, both passes: '
        f"{size(whole)} in all</caption><thead><tr><td></td>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _runs(where: Any) -> Iterator[tuple[int, int]]:
    """(first, count) of each run of true values."""
    at = 0
    for value, group in groupby(where.tolist()):
        count = len(list(group))
        if value:
            yield at, count
        at += count


def _cells(row: str) -> Iterator[tuple[int, int, str]]:
    """(first, count, kind) of each run of tiles of a kind that is not empty."""
    at = 0
    for kind, group in groupby(row):
        count = len(list(group))
        if kind != "0":
            yield at, count, kind
        at += count
