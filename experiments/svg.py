"""Curves as inline SVG: the page's style sheet colours them, so that they follow it into dark mode."""

import math
from collections.abc import Mapping
from html import escape

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 22
NUM_COLOURS = 8
MAX_POINTS = 120
LOG_FROM = 50.0  # a curve whose values span more than this factor is drawn over a logarithmic axis

Points = list[tuple[float, float]]


def line_chart(title: str, lines: Mapping[str, Mapping[int, float]]) -> str:
    """Draw scalars over steps, as a `<figure>` with a legend that says their last values.

    Curves of many points are means of neighbours, over a band from the least to the greatest of them. The band and the
    line of number i have the class `ci`, i modulo 8. Values that are not finite are left out, and counted.

    Args:
        title: Stands above the curves.
        lines: Values by step, by name; one without values is left out, and keeps its colour for other charts.
    """
    finite = {
        name: [(float(step), value) for step, value in values.items() if math.isfinite(value)]
        for name, values in lines.items()
    }
    all_points = [point for points in finite.values() for point in points]
    missing = sum(len(values) for values in lines.values()) - len(all_points)
    keys = []
    for number, (name, values) in enumerate(lines.items()):
        if not values:
            continue
        last = list(values.values())[-1]
        keys.append(f'<li><i class="c{number % NUM_COLOURS}"></i>{escape(name)} <b>{short(last)}</b></li>')
    caption = f"<figcaption>{escape(title)}</figcaption>"
    note = f'<p class="note">{missing} values are not finite and not shown.</p>' if missing else ""
    drawing = _drawing(title, list(finite.items()), all_points) if all_points else ""
    return f'<figure class="chart">{caption}{drawing}<ul class="legend">{"".join(keys)}</ul>{note}</figure>'


def _drawing(title: str, lines: list[tuple[str, Points]], all_points: Points) -> str:
    low, high = (bound(y for _, y in all_points) for bound in (min, max))
    is_log = low > 0 and high / low > LOG_FROM
    if is_log:
        low, high = math.log10(low), math.log10(high)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    first, last = (bound(x for x, _ in all_points) for bound in (min, max))
    if first == last:
        first, last = first - 1, last + 1

    def place(x: float, y: float) -> str:
        right = LEFT + (x - first) / (last - first) * (WIDTH - LEFT - RIGHT)
        down = TOP + (high - (math.log10(y) if is_log else y)) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return f"{right:.1f},{down:.1f}"

    marks = []
    levels = log_ticks(low, high) if is_log else ticks(low, high, 4)
    for tick, label in zip(levels, distinct(levels), strict=True):
        y = float(place(first, tick).split(",")[1])
        marks.append(f'<path class="grid" d="M{LEFT} {y}H{WIDTH - RIGHT}"/>')
        marks.append(f'<text x="{LEFT - 5}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    for tick in ticks(first, last, 4):
        if tick == round(tick):  # steps are whole
            x = float(place(tick, 1.0 if is_log else low).split(",")[0])
            anchor = "end" if x > WIDTH - 24 else "middle"
            marks.append(f'<text x="{x}" y="{HEIGHT - 6}" text-anchor="{anchor}">{short(tick)}</text>')
    for number, (name, points) in enumerate(lines):
        if not points:
            continue
        buckets = grouped(points)
        colour = f"c{number % NUM_COLOURS}"
        dashes = ' stroke-dasharray="5 3"' if number >= NUM_COLOURS else ""
        if len(buckets) < len(points):
            upper = [place(bucket[0][0], max(y for _, y in bucket)) for bucket in buckets]
            lower = [place(bucket[0][0], min(y for _, y in bucket)) for bucket in buckets]
            marks.append(f'<polygon class="band {colour}" points="{" ".join(upper + lower[::-1])}"/>')
        middle = [place(bucket[0][0], sum(y for _, y in bucket) / len(bucket)) for bucket in buckets]
        if len(middle) == 1:
            across, down = middle[0].split(",")
            marks.append(f'<circle class="{colour}" cx="{across}" cy="{down}" r="3"/>')
        marks.append(
            f'<polyline class="{colour}"{dashes} points="{" ".join(middle)}"><title>{escape(name)}</title></polyline>'
        )
    label = escape(title + (" (logarithmic)" if is_log else ""), quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(marks)}</svg>'


def grouped(points: Points) -> list[Points]:
    """Cut points into at most `MAX_POINTS` groups of neighbours, one for each point if there are few."""
    size = math.ceil(len(points) / MAX_POINTS)
    return [points[start : start + size] for start in range(0, len(points), size)]


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers from `low` to `high`, about `count` of them."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten whose logarithms lie between `low` and `high`, at most six of them."""
    exponents = range(math.ceil(low), math.floor(high) + 1)
    return [10.0**exponent for exponent in exponents[:: math.ceil(len(exponents) / 6)]]


def distinct(numbers: list[float]) -> list[str]:
    """Numbers in as few characters as tell them apart."""
    labels = [short(number) for number in numbers]
    digits = 4
    while len(set(labels)) < len(labels) and digits < 8:
        labels = [f"{number:.{digits}g}" for number in numbers]
        digits += 1
    return labels


def short(number: float) -> str:
    """A number in few characters: 0.123, 45.6, 1234, 12.3k, 3.4M, 1e-05."""
    if not math.isfinite(number):
        return str(number)
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= max(size, 1e4):
            return f"{number / size:.3g}{unit}"
    return f"{number:.4g}" if abs(number) >= 1000 else f"{number:.3g}"
