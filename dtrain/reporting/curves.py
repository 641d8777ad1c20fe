"""Curves as inline SVG: one chart with the same figure of several runs and phases; colours and sizes are the page's."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from dtrain.reporting.number_text import count_text, figure_text

WIDTH, HEIGHT = 480, 250  # of the chart, in its own units; the page scales it
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 30
_MOST_POINTS = 400  # of a curve; of more, the least and the largest of each stretch are drawn
_MOST_MARKS = 40  # points that get a mark each
_MOST_HINTS = 120  # points that tell their value under the mouse
_LOG_FROM = 100.0  # largest by least value, from which on the axis is logarithmic
_TICKS = 4

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        name: What the mouse is told.
        colour: The number of its colour on the page.
        values: By step; what is not finite leaves a gap.
        style: val, train (dashed) or test (marks alone).
        best: The step of the best value, which gets a ring.
    """

    name: str
    colour: int
    values: Mapping[int, float]
    style: str = "val"
    best: int | None = None


@dataclass(frozen=True)
class _Axes:
    """From steps and values to places on the chart."""

    steps: tuple[float, float]
    low: float
    high: float
    is_log: bool

    def x(self, step: float) -> float:
        first, last = self.steps
        return round(_LEFT + (step - first) / (last - first) * (WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high, value = (math.log10(each) if self.is_log else each for each in (self.low, self.high, value))
        return round(HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM), 1)


def chart(title: str, curves: Sequence[Curve]) -> str:
    """An SVG element with all curves on common axes; '' where no curve has a finite value."""
    axes = _axes(curves)
    if axes is None:
        return ""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" class="chart" data-title="{escape(title)}">',
        f"<title>{escape(title)}</title>",
        *_grid(axes),
        *(part for curve in curves for part in _drawn(curve, axes)),
        "</svg>",
    ]
    return "".join(parts)


def _axes(curves: Sequence[Curve]) -> _Axes | None:
    points = [(step, value) for curve in curves for step, value in curve.values.items() if math.isfinite(value)]
    if not points:
        return None
    steps, values = [step for step, _ in points], [value for _, value in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    is_log = low > 0 and high / low >= _LOG_FROM
    if is_log:
        low, high = low / 1.1, high * 1.1
    else:
        margin = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        low, high = low - margin, high + margin
    return _Axes((first, last if last > first else first + 1), low, high, is_log)


def ticks(low: float, high: float, is_log: bool = False) -> list[float]:
    """Round numbers between two values: 1, 2 or 5 times a power of ten; on a logarithmic axis powers of ten."""
    if is_log:
        powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
        every = max(1, -(-len(powers) // (_TICKS + 1)))
        if len(powers) > 1:
            return [10.0**power for power in powers[::every]]
    rough = (high - low) / _TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * size for factor in (1, 2, 5, 10) if factor * size >= rough)
    first = math.ceil(low / step)
    return [number * step for number in range(first, math.floor(high / step) + 1)]


def _grid(axes: _Axes) -> Iterator[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    for value in ticks(axes.low, axes.high, axes.is_log):
        y = axes.y(value)
        yield f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y}" y2="{y}"/>'
        yield f'<text class="tick" x="{_LEFT - 6}" y="{y + 4}" text-anchor="end">{_tick_text(value)}</text>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>'
    for step in ticks(*axes.steps):
        if step == int(step):
            x = axes.x(step)
            yield f'<line class="axis" x1="{x}" x2="{x}" y1="{bottom}" y2="{bottom + 4}"/>'
            yield f'<text class="tick" x="{x}" y="{bottom + 17}" text-anchor="middle">{count_text(step)}</text>'
    if axes.is_log:
        yield f'<text class="tick" x="{right}" y="{_TOP + 8}" text-anchor="end">log scale</text>'


def _tick_text(value: float) -> str:
    return f"{value:.0e}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.4g}"


def _drawn(curve: Curve, axes: _Axes) -> Iterator[str]:
    stretches = [thinned(stretch) for stretch in _stretches(curve.values)]
    points = [point for stretch in stretches for point in stretch]
    if curve.style != "test":
        path = "".join(
            f"{'L' if number else 'M'}{axes.x(step)} {axes.y(value)}"
            for stretch in stretches
            for number, (step, value) in enumerate(stretch)
        )
        yield f'<path class="curve {curve.style} c{curve.colour}" d="{path}"/>'
    alone = {stretch[0][0] for stretch in stretches if len(stretch) == 1}  # between two gaps: no line shows it
    for number, (step, value) in enumerate(points):
        is_marked = len(points) <= _MOST_MARKS or curve.style == "test" or step in alone
        if is_marked or number % -(-len(points) // _MOST_HINTS) == 0:
            kind = "mark" if is_marked else "hint"
            yield _dot(curve, axes, step, value, kind)
    if curve.best is not None and math.isfinite(curve.values[curve.best]):
        yield _dot(curve, axes, curve.best, curve.values[curve.best], "best")


def _dot(curve: Curve, axes: _Axes, step: float, value: float, kind: str) -> str:
    radius = {"mark": 3.4 if curve.style == "test" else 2.2, "hint": 5, "best": 5.5}[kind]
    told = f"{curve.name}: {figure_text(value)} at step {int(step):,}{' (best)' if kind == 'best' else ''}"
    place = f'cx="{axes.x(step)}" cy="{axes.y(value)}" r="{radius}"'
    return f'<circle class="{kind} c{curve.colour}" {place}><title>{escape(told)}</title></circle>'


def _stretches(values: Mapping[int, float]) -> list[list[Point]]:
    """The points in the order of their steps, cut where a value is not finite."""
    found: list[list[Point]] = [[]]
    for step, value in sorted(values.items()):
        if math.isfinite(value):
            found[-1].append((step, value))
        elif found[-1]:
            found.append([])
    return [stretch for stretch in found if stretch]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most so many points, no peak lost: of each stretch the least and the largest; the first and the last."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = -(-2 * len(points) // _MOST_POINTS)
    kept = {points[0], points[-1]}
    for begin in range(0, len(points), size):
        part = points[begin : begin + size]
        kept |= {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
    return sorted(kept)
