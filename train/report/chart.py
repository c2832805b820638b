"""Curves as HTML: lines in an SVG that stretches to any width, with letters beside it that do not."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from ..progress import amount

# The drawing is a square of so many units, whatever its size on the page.
SIDE = 1000.0
POINTS = 240
# More than so many times what nearly all values stay below is cut off.
TALL = 3.0


@dataclass(frozen=True)
class Line:
    """x rises. style: classes of the page: a, b, c or d gives the colour, `faint` and `dots` the manner."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "a"


@dataclass(frozen=True)
class Mark:
    """Something that happened at a step. kind: resume or fault."""

    x: float
    text: str
    kind: str


@dataclass(frozen=True)
class Chart:
    """One picture. unit: of y. logarithmic: the y axis, whose values must be positive. low: its lower end,
    where that is not left to the values.
    """

    title: str
    unit: str
    lines: Sequence[Line]
    marks: Sequence[Mark] = ()
    logarithmic: bool = False
    x_name: str = "step"
    low: float | None = None

    def html(self) -> str:
        """A figure; empty if there is nothing to draw."""
        lines = [line for line in self.lines if len(line.x)]
        if not lines:
            return ""
        left, right = _bounds([x for line in lines for x in line.x])
        low, high, cut = self._range([y for line in lines for y in line.y])
        scale = _Scale(left, right, low, high, self.logarithmic)
        grid = "".join(f'<path class="grid" d="M0 {scale.y(t):.1f}H{SIDE:g}"/>' for t in scale.y_ticks())
        marks = "".join(_mark(mark, scale) for mark in self.marks if left <= mark.x <= right)
        drawn = "".join(_path(line, scale) for line in lines)
        ys = "".join(f'<span style="top:{scale.y(t) / 10:.2f}%">{_number(t)}</span>' for t in scale.y_ticks())
        xs = "".join(f'<span style="left:{scale.x(t) / 10:.2f}%">{amount(t)}</span>' for t in scale.x_ticks())
        note = f'<p class="note">up to {_number(cut)}, cut off</p>' if cut else ""
        return (
            f'<figure class="chart"><figcaption><h3>{escape(self.title)}</h3> <span class="unit">'
            f"{escape(self.unit)}</span>{self._legend(lines)}</figcaption>"
            f'<div class="plot"><div class="ys" aria-hidden="true">{ys}</div>'
            f'<svg viewBox="0 0 {SIDE:g} {SIDE:g}" preserveAspectRatio="none" role="img" '
            f'aria-label="{escape(self._said(lines))}">{grid}{marks}{drawn}</svg>'
            f'<div class="xs" aria-hidden="true">{xs}<em>{escape(self.x_name)}</em></div></div>'
            f"{note}</figure>"
        )

    def _range(self, values: Sequence[float]) -> tuple[float, float, float | None]:
        """The ends of the y axis, and the greatest value if it lies beyond."""
        low, high = _bounds(values)
        usual = sorted(values)[int(0.98 * (len(values) - 1))]
        cut = high if len(values) > 50 and high > TALL * usual > 0 and not self.logarithmic else None
        high = 1.2 * usual if cut else high
        if self.logarithmic:
            return low / 1.15, high * 1.15, None
        room = 0.06 * (high - low)
        low = low - room if self.low is None else self.low
        return low, max(high + room, low + 1e-9), cut

    def _legend(self, lines: Sequence[Line]) -> str:
        told = [line for line in lines if "faint" not in line.style]
        kinds = {mark.kind: 0 for mark in self.marks}
        for mark in self.marks:
            kinds[mark.kind] += 1
        keys = [f'<li class="{line.style}">{escape(line.name)}</li>' for line in told if len(told) > 1]
        keys += [f'<li class="mark {kind}">{kind} ({count})</li>' for kind, count in kinds.items()]
        return f'<ul class="legend">{"".join(keys)}</ul>' if keys else ""

    def _said(self, lines: Sequence[Line]) -> str:
        """The picture in words, for those who do not see it."""
        told = (
            f"{line.name}: {_number(line.y[0])} at {self.x_name} {line.x[0]:,.0f}, "
            f"{_number(line.y[-1])} at {self.x_name} {line.x[-1]:,.0f}"
            for line in lines
            if "faint" not in line.style
        )
        return f"{self.title}, {self.unit}. " + "; ".join(told)


@dataclass(frozen=True)
class _Scale:
    left: float
    right: float
    low: float
    high: float
    logarithmic: bool

    def x(self, value: float) -> float:
        return SIDE * (value - self.left) / (self.right - self.left or 1.0)

    def y(self, value: float) -> float:
        if self.logarithmic:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return SIDE * (1 - share)

    def y_ticks(self) -> list[float]:
        if not self.logarithmic:
            return ticks(self.low, self.high, 4)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1,) if self.high / self.low > 300 else (1, 3)
        found = [s * 10.0**p for p in powers for s in steps if self.low <= s * 10.0**p <= self.high]
        return found if len(found) > 1 else ticks(self.low, self.high, 4)

    def x_ticks(self) -> list[float]:
        # a step is whole
        return [t for t in ticks(self.left, self.right, 4) if t == round(t)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def thinned(x: Sequence[float], y: Sequence[float], most: int = POINTS) -> Iterator[tuple[float, float]]:
    """The points, or the least and the greatest of each of `most` / 2 parts, so that no spike is lost."""
    if len(x) <= most:
        yield from zip(x, y, strict=True)
        return
    edges = [round(i * len(x) / (most // 2)) for i in range(most // 2 + 1)]
    for start, end in pairwise(edges):
        part = range(start, end)
        low, high = min(part, key=lambda i: y[i]), max(part, key=lambda i: y[i])
        for i in sorted({low, high}):
            yield x[i], y[i]


def _bounds(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1.0) * 0.05, high + (abs(high) or 1.0) * 0.05)


def _path(line: Line, scale: _Scale) -> str:
    points = [(scale.x(x), min(max(scale.y(y), -20.0), SIDE + 20)) for x, y in thinned(line.x, line.y)]
    if len(points) == 1 or "dots" in line.style:
        # a line of no length with round ends is a dot, also in a drawing that is stretched
        dots = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in points)
        joined = "" if len(points) == 1 else f'<path class="{line.style} thin" d="{_joined(points)}"/>'
        return f'{joined}<path class="{line.style} dot" d="{dots}"/>'
    return f'<path class="{line.style}" d="{_joined(points)}"/>'


def _joined(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _mark(mark: Mark, scale: _Scale) -> str:
    text = escape(mark.text)
    return (
        f'<path class="mark {mark.kind}" d="M{scale.x(mark.x):.1f} 0V{SIDE:g}"><title>{text}</title></path>'
    )


def _number(value: float) -> str:
    """Three figures, as short as they can be."""
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")
    return amount(value) if abs(value) >= 1000 else f"{value:.3g}"
