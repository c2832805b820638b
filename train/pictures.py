"""The pictures of a run: loss, loss by position, who holds what and what moves, and the needle map."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .progress import amount, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
# (start, length, run, step) of a span; run and step are None if it is contiguous.
Runs = Sequence[tuple[int, int, int | None, int | None]]

INK, FAINT, EMPTY = "#22303c", "#7c8a97", "#f1f3f5"
BLUE, ORANGE = "#2f6db5", "#d9722e"
# One colour a rank, told apart by most colour-blind readers; from rank 8 on they repeat.
RANKS = ("#2f6db5", "#e08a2e", "#3a9a78", "#c8506a", "#7b62b3", "#6fb4d8", "#a3812d", "#5d6b78")
BITS = "bits per byte"
# Pixel rows to a tile: it divides by the usual numbers of ranks, so that interleaved ranks get equal stripes.
GRAIN = 24


@contextmanager
def styled() -> Iterator[None]:
    """Draws with the settings that all pictures share."""
    import matplotlib

    settings: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 10,
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titlepad": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "grid.color": "#e4e8ec",
        "grid.linewidth": 0.8,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "savefig.dpi": 150,
    }
    with matplotlib.rc_context(settings):
        yield


def loss_curve(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    evals: Sequence[Mapping[str, Any]],
    bounds: Mapping[str, float],
    unit: str = BITS,
) -> Path:
    """Training and held-out loss, in bits per byte or `unit`, against the tokens seen.

    rows, evals: with `tokens` (seen so far) and `bits_per_byte` or, where a token is a byte, `loss` in nats;
    in another unit `loss` as it is. bounds: what others reach on this data, drawn as labelled levels.
    """
    with styled():
        return _save(draw_loss_curve(rows, evals=evals, bounds=bounds, unit=unit), path)


def draw_loss_curve(
    rows: Sequence[Mapping[str, Any]], *, evals: Sequence[Mapping[str, Any]], bounds: Mapping[str, float],
    unit: str = BITS,
) -> Figure:  # fmt: skip
    figure, axes = _canvas(8.0, 4.2)
    tokens, bits = _points(rows, unit)
    axes.plot(tokens, bits, color=BLUE, alpha=0.28, linewidth=0.8, label="_raw")
    axes.plot(tokens, smooth(bits, max(len(bits) // 40, 1)), color=BLUE, linewidth=1.8, label="training")
    at, held_out = _points(evals, unit)
    if len(at):
        label = f"held out, {held_out[-1]:.2f} at the end"
        axes.plot(
            at, held_out, color=ORANGE, marker="o", markersize=4.5, linewidth=1.2, label=label, clip_on=False
        )
    seen = np.concatenate([bits, held_out, list(bounds.values())])
    low, high = (float(seen.min()), float(seen.max())) if len(seen) else (0.0, 8.0)
    axes.set_ylim(max(low - 0.08 * (high - low) - 0.05, 0.0), high + 0.06 * (high - low) + 0.05)
    axes.set_xlim(0, max([*tokens, *at, 1]))
    _levels(axes, bounds)
    axes.set(title="Loss over training", xlabel="tokens seen", ylabel=unit)
    axes.xaxis.set_major_formatter(lambda value, _: amount(value))
    axes.grid(axis="y")
    axes.legend(loc="upper right")
    return figure


def _points(rows: Sequence[Mapping[str, Any]], unit: str) -> tuple[Floats, Floats]:
    """Tokens and loss of the rows that have a finite one."""
    pairs = [(row["tokens"], _bits(row) if unit == BITS else float(row["loss"])) for row in rows]
    array = np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=float).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def _bits(row: Mapping[str, Any]) -> float:
    return float(row["bits_per_byte"] if "bits_per_byte" in row else row["loss"] / math.log(2))


def smooth(values: Floats, reach: int) -> Floats:
    """Means over `reach` neighbours on either side, fewer (but as many on both sides) near the ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    near = np.minimum(reach, np.minimum(index, len(values) - 1 - index))
    return np.asarray((total[index + near + 1] - total[index - near]) / (2 * near + 1))


def _levels(axes: Axes, bounds: Mapping[str, float]) -> None:
    """Horizontal lines, labelled at the right of the axes; labels that would overlap move apart."""
    low, high = axes.get_ylim()
    gap = 0.045 * (high - low)
    place = -math.inf
    for name, value in sorted(bounds.items(), key=lambda item: item[1]):
        place = max(value, place + gap)
        axes.axhline(value, color=FAINT, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.annotate(
            f"{name} {value:.2f}",
            (1.0, value),
            (1.012, (place - low) / (high - low)),
            xycoords=("axes fraction", "data"),
            textcoords="axes fraction",
            va="center",
            color=FAINT,
            fontsize=9,
            annotation_clip=False,
        )


def loss_by_position(
    positions: Sequence[int], values: Sequence[float], path: Path, *, shard_edges: Sequence[int]
) -> Path:
    """Loss (bits per byte) of buckets of positions in the context, on a logarithmic axis.

    positions: the len(values) + 1 edges of the buckets; shard_edges: positions where a rank's share ends.
    """
    with styled():
        return _save(draw_loss_by_position(positions, values, shard_edges=shard_edges), path)


def draw_loss_by_position(
    positions: Sequence[int], values: Sequence[float], *, shard_edges: Sequence[int]
) -> Figure:
    if len(positions) != len(values) + 1:
        raise ValueError(f"{len(values)} values need {len(values) + 1} bucket edges, not {len(positions)}")
    figure, axes = _canvas(8.0, 3.8)
    # Position 0 has no place on a logarithmic axis: the first bucket starts at half its end.
    edges = [max(positions[0], positions[1] / 2), *positions[1:]]
    axes.set_xscale("log", base=2)
    axes.stairs(values, edges, color=BLUE, linewidth=2.0, baseline=None)
    axes.set_xlim(edges[0], edges[-1])
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    axes.set_ylim(low - 0.15 * (high - low) - 0.05, high + 0.15 * (high - low) + 0.05)
    borders = [edge for edge in sorted(set(shard_edges)) if edges[0] < edge < edges[-1]]
    for edge in borders:
        axes.axvline(edge, color=ORANGE, linewidth=0.9, linestyle=(0, (4, 3)))
    if borders:
        _remark(axes, borders[0], f"shard border{'s'[: len(borders) - 1]}", left=True, inside=True)
    axes.set(title="Loss by position in the context", xlabel="position", ylabel="bits per byte")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(axis="y")
    return figure


def layout_picture(
    path: Path, *, spans_by_rank: Sequence[Runs], length: int, tiles: Ints, sent: Ints, title: str, mask: str
) -> Path:
    """The mask by the rank that owns the query, the positions each rank holds, and what moves between ranks.

    tiles: [n, n], queries by keys over the whole context: 0 empty, 1 partial, 2 full.
    sent: [P, P], bytes that the rank of the row sends to the rank of the column in a layer.
    """
    with styled():
        figure = draw_layout(spans_by_rank, length, tiles, sent=sent, title=title, mask=mask)
        return _save(figure, path)


def draw_layout(
    spans_by_rank: Sequence[Runs], length: int, tiles: Ints, *, sent: Ints, title: str, mask: str
) -> Figure:
    ranks = len(spans_by_rank)
    if sent.shape != (ranks, ranks) or tiles.shape != (len(tiles), len(tiles)):
        raise ValueError(
            f"{ranks} ranks need sent [P, P] and tiles [n, n], not {sent.shape} and {tiles.shape}"
        )
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11.5, 4.3), layout="constrained")
    figure.suptitle(title, x=0.008, ha="left", fontsize=12, fontweight="bold")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1.0, 1.15, 1.0])
    owner = owners(spans_by_rank, length)
    _draw_mask(left, owner, tiles, mask)
    _draw_holdings(middle, owner, ranks)
    _draw_traffic(right, sent)
    return figure


def owners(spans_by_rank: Sequence[Runs], length: int) -> Ints:
    """[length], the rank that holds each position, -1 where none does."""
    owner = np.full(length, -1)
    for rank, spans in enumerate(spans_by_rank):
        for start, count, run, step in spans:
            index = np.arange(count)
            offset = index if run is None or step is None else index // run * step + index % run
            owner[start + offset] = rank
    return owner


def raster(owner: Ints, blocks: int) -> Ints:
    """[blocks * GRAIN], who holds what, in order.

    In a block where ranks interleave more finely than can be drawn, their shares of it stand side by side.
    """
    edges = np.linspace(0, len(owner), blocks + 1)
    parts = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        part = owner[int(low) : max(math.ceil(high), int(low) + 1)]
        if np.count_nonzero(np.diff(part)) > GRAIN // 3:
            part = np.sort(part)
        parts.append(part[((np.arange(GRAIN) + 0.5) * len(part) / GRAIN).astype(int)])
    return np.concatenate(parts)


def _colours(owner: Ints) -> Floats:
    """[..., 3], the colours of ranks; -1 is grey."""
    from matplotlib.colors import to_rgb

    table = np.array([to_rgb(colour) for colour in (*RANKS, EMPTY)])
    return np.asarray(table[np.where(owner < 0, len(RANKS), owner % len(RANKS))])


def _draw_mask(axes: Axes, owner: Ints, tiles: Ints, mask: str) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Patch

    colour = _colours(raster(owner, len(tiles)))[:, None, :]  # [rows, 1, 3]
    weight = np.choose(np.repeat(tiles, GRAIN, axis=0), [0.0, 0.45, 1.0])[..., None]  # [rows, n, 1]
    ground = np.where(weight > 0, 1.0, np.array(to_rgb(EMPTY)))
    axes.imshow(
        weight * colour + (1 - weight) * ground,
        extent=(0, len(owner), len(owner), 0),
        interpolation="nearest",
        aspect="auto",
    )
    # A longer title would run into the next panel's.
    short = mask if len(mask) <= 32 else f"{mask[:31]}…"
    axes.set(title=f"mask: {short}", xlabel="key", ylabel="query, in its rank's colour")
    axes.set_box_aspect(1)
    _position_axis(axes.xaxis, len(owner))
    _position_axis(axes.yaxis, len(owner))
    keys = [Patch(color="#5d6b78", label="seen whole"), Patch(color="#b9c1c8", label="seen in part")]
    axes.legend(handles=keys, loc="upper right", fontsize=8.5, handlelength=1.0, handleheight=1.0)


def _draw_holdings(axes: Axes, owner: Ints, ranks: int) -> None:
    blocks = 16
    drawn = raster(owner, blocks)
    interleaved = np.count_nonzero(np.diff(owner)) > blocks * GRAIN // 3
    half = min(0.38, 0.08 + 0.1 * ranks)
    for rank in range(ranks):
        strip = np.where((drawn == rank)[None, :, None], _colours(np.array([rank])), 1.0)
        extent = (0, len(owner), rank + half, rank - half)
        axes.imshow(strip, extent=extent, interpolation="nearest", aspect="auto")
        axes.plot([0, len(owner)], [rank + half, rank + half], color="#dde2e7", linewidth=0.8)
        held = f"{np.count_nonzero(owner == rank):,}"
        axes.text(1.02, rank, held, transform=axes.get_yaxis_transform(), va="center", fontsize=8.5)
    axes.set(title="who holds what" + (" (stripes drawn coarser)" if interleaved else ""), xlabel="position")
    axes.set(xlim=(0, len(owner)), ylim=(ranks - 0.5, -0.5))
    axes.text(
        1.02, -0.5, "tokens", transform=axes.get_yaxis_transform(), va="bottom", fontsize=8.5, color=FAINT
    )
    axes.set_box_aspect(1 / 1.15)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    _position_axis(axes.xaxis, len(owner))


def _position_axis(axis: Any, length: int) -> None:
    axis.set_ticks([length * part // 4 for part in range(5)])
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_tick_params(labelsize=8.5)


def _draw_traffic(axes: Axes, sent: Ints) -> None:
    most, ranks = int(sent.max()), len(sent)
    power = min(int(math.log(max(most, 1), 1024)), 4)
    unit = ("bytes", "KiB", "MiB", "GiB", "TiB")[power]
    shown = sent / 1024**power
    digits = 0 if power == 0 or most >= 100 * 1024**power else 1 if most >= 10 * 1024**power else 2
    axes.imshow(
        shown, cmap=_ramp("#ffffff", "#cfdff0", BLUE), vmin=0, vmax=max(1.1 * float(shown.max()), 1.0)
    )
    for source, target in np.ndindex(sent.shape):
        value = float(shown[source, target])
        tone = "white" if value > 0.75 * shown.max() else INK if value else FAINT
        text = f"{value:.{digits}f}" if value else "–"
        axes.text(
            target, source, text, ha="center", va="center", color=tone, fontsize=10 if ranks <= 4 else 8
        )
    whole = f"{size(int(sent.sum()))} a layer, all ranks" if most else "nothing moves"
    axes.set(title=f"what moves, {unit} a layer" if most else "what moves")
    axes.set(xlabel=f"to rank\n{whole}", ylabel="from rank")
    axes.set_xticks(range(ranks))
    axes.set_yticks(range(ranks))
    axes.set_xticks(np.arange(ranks + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(ranks + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#dde2e7", linewidth=1.0)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def needle_map(
    path: Path, *, depths: Sequence[float], lengths: Sequence[int], accuracy: Floats, trained: int
) -> Path:
    """Retrieval accuracy [len(depths), len(lengths)], 0..1, NaN where nothing was tried.

    depths: where in the context the needle lay, 0 (start) .. 1 (end); trained: length of training sequences.
    """
    with styled():
        return _save(draw_needle_map(depths, lengths, accuracy, trained=trained), path)


def draw_needle_map(
    depths: Sequence[float], lengths: Sequence[int], accuracy: Floats, *, trained: int
) -> Figure:
    if accuracy.shape != (len(depths), len(lengths)):
        raise ValueError(f"accuracy {accuracy.shape} must be [{len(depths)} depths, {len(lengths)} lengths]")
    figure, axes = _canvas(max(4.6, 2.6 + 0.75 * len(lengths)), max(3.0, 1.7 + 0.42 * len(depths)))
    image = axes.imshow(
        accuracy, cmap=_ramp("#f6efe3", "#bcd3ea", BLUE, "#1c4a80"), vmin=0, vmax=1, aspect="auto"
    )
    for row, column in np.ndindex(accuracy.shape):
        value = float(accuracy[row, column])
        tone = "white" if value > 0.5 else INK
        axes.text(
            column,
            row,
            f"{value:.2f}" if math.isfinite(value) else "–",
            ha="center",
            va="center",
            color=tone,
            fontsize=9,
        )
    border = sum(length <= trained for length in lengths) - 0.5
    axes.axvline(border, color=ORANGE, linewidth=2.0)
    _remark(axes, border, f"trained at {trained:,}", left=border > 0.6, inside=False)
    axes.set_title("Retrieval by depth and length", pad=22)
    axes.set(xlabel="context, tokens", ylabel="depth of the needle")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, label="accuracy", shrink=0.9)
    bar.outline.set_visible(False)
    return figure


def _remark(axes: Axes, x: float, text: str, *, left: bool, inside: bool) -> None:
    """A few words at the top end of a vertical line, on its left or right, inside or above the axes."""
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    place |= {"ha": "right" if left else "left", "va": "top" if inside else "bottom"}
    shift = (-4 if left and inside else 0, -2 if inside else 4)
    axes.annotate(text, (x, 1.0), shift, color=ORANGE, fontsize=9, **place)


def _ramp(*colours: str) -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("ramp", colours)


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    # No pyplot: it keeps figures alive and picks a window system.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, format="png")
    return path
