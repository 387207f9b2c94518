"""Charts as inline SVG, without scripts.

Positions along x are percentages, so that a chart fills any width and its letters keep their size on a phone.
Colours are CSS classes of the page (`original`, `plain`, `compressed`, `part-0` ...), so both schemes fit.
"""

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup, escape

from pocketlm.interval import Interval

LEAST_SPAN = 0.1  # of a scatter's x, as a share of the largest
NARROWEST = 320  # pixels that a chart is wide on a small phone


def stacked(rows: Sequence[tuple[str, str, Sequence[float]]], limit: float | None, limit_label: str) -> Markup:
    """Draw bars made of parts on one scale, with a line at `limit` where there is one.

    Args:
        rows: Label on the left, label on the right, and the values of the parts.
        limit: The budget, in the unit of the values.
        limit_label: What the line is called.
    """
    longest = max(sum(values) for _, _, values in rows)
    scale = 100 / max(longest, limit or 0.0, 1e-9)
    drawn, headings = [], []
    for index, (left, right, values) in enumerate(rows):
        top = 56 * index
        headings.append(_heading(left, right, top + 15, halo=True))
        start = 0.0
        for part, value in enumerate(values):
            drawn.append(_rectangle(start * scale, value * scale, top + 24, 20, f"part-{part}"))
            start += value
    bottom = 56 * len(rows) - 4
    if limit is not None:
        x = limit * scale
        side = "end" if x > 50 else "start"
        drawn.append(f'<line class="limit" x1="{x:.3f}%" x2="{x:.3f}%" y1="20" y2="{bottom}"/>')
        drawn.append(_small(x, side, bottom + 14, limit_label))
    drawn += headings  # over the line, which may cross one on a narrow screen
    return _picture(drawn, bottom + 20, "Bytes of each part, before and after")


def whiskers(rows: Sequence[tuple[str, str, Interval, str]], title: str, reference: float, scale: float = 1) -> Markup:
    """Draw estimates as dots with their intervals on one axis.

    Args:
        rows: Class, label, estimate and the text of its value. Estimates that are not finite get no dot.
        title: What is measured, for those who cannot see it.
        reference: The value of the original, marked by a line.
        scale: Multiplies all values, as 100 does for percent.
    """
    ends = [scale * end for _, _, item, _ in rows for end in (item.low, item.high) if item.known]
    ticks = nice_ticks(min([*ends, scale * reference]), max([*ends, scale * reference]))
    low, high = ticks[0], ticks[-1]

    def place(value: float) -> float:
        return 1 + 98 * (value - low) / (high - low)

    bottom = 44 * len(rows) + 6
    drawn = [f'<line class="grid" x1="{place(t):.3f}%" x2="{place(t):.3f}%" y1="20" y2="{bottom}"/>' for t in ticks]
    x = place(scale * reference)
    drawn.append(f'<line class="limit" x1="{x:.3f}%" x2="{x:.3f}%" y1="20" y2="{bottom}"/>')
    for index, (kind, label, item, text) in enumerate(rows):
        top = 44 * index
        drawn.append(_heading(label, text, top + 15, halo=True))
        if item.known:
            x, left, right = (place(scale * value) for value in (item.value, item.low, item.high))
            drawn.append(
                f'<line class="whisker {kind}" x1="{left:.3f}%" x2="{right:.3f}%" y1="{top + 31}" '
                f'y2="{top + 31}"/><circle class="{kind}" cx="{x:.3f}%" cy="{top + 31}" r="4.5"/>'
            )
    drawn += _axis([(place(tick), _tick(tick, ticks)) for tick in ticks], bottom + 15)
    return _picture(drawn, bottom + 20, title)


def bars(rows: Sequence[tuple[str, str, float, float, str]], title: str) -> Markup:
    """Draw bars from zero, with a whisker for the deviation.

    Args:
        rows: Class, label, value, deviation (0 for none) and the text of the value.
        title: What is measured, for those who cannot see it.
    """
    longest = max((value + deviation for _, _, value, deviation, _ in rows), default=0) or 1
    drawn = []
    for index, (kind, label, value, deviation, text) in enumerate(rows):
        top = 44 * index
        drawn.append(_heading(label, text, top + 15))
        drawn.append(_rectangle(0, 100 * value / longest, top + 23, 14, kind))
        if deviation:
            left, right = (100 * max(0, value + sign * deviation) / longest for sign in (-1, 1))
            drawn.append(f'<line class="error" x1="{left:.3f}%" x2="{right:.3f}%" y1="{top + 30}" y2="{top + 30}"/>')
    return _picture(drawn, 44 * len(rows), title)


def columns(values: Mapping[str, float], title: str) -> Markup:
    """Draw one column for each name, such as the damage of each block; a few names are written below."""
    names, highest = list(values), max(values.values(), default=0) or 1
    step = 100 / max(1, len(names))
    every = max(1, math.ceil(len(names) / 8))
    drawn = [_heading("", f"highest {highest:.3g}", 12)]
    for index, (name, value) in enumerate(values.items()):
        height = 84 * value / highest
        drawn.append(_rectangle(index * step + step * 0.12, step * 0.76, 104 - height, height, "compressed"))
        if index % every == 0:
            x = (index + 0.5) * step
            drawn.append(_small(x, "middle", 119, name))
    drawn.append('<line class="grid" x1="0" x2="100%" y1="104.5" y2="104.5"/>')
    return _picture(drawn, 124, title)


def waterfall(rows: Sequence[tuple[str, float]], title: str) -> Markup:
    """Draw how a value came about: each row's bar goes from the value before it to its own; the last begins at zero.

    Args:
        rows: Name, and the value behind it; before the first it is 0.
        title: What is shown, for those who cannot see it.
    """
    highest = max((value for _, value in rows), default=0) or 1
    drawn, before = [], 0.0
    for index, (name, value) in enumerate(rows):
        top, last = 44 * index, index == len(rows) - 1
        said = f"{value:.4f}" if last else f"{value:.4f} ({value - before:+.4f})"
        start, end = sorted((0.0 if last else before, value))
        kind = "compressed" if last else "more" if value >= before else "less"
        drawn.append(_heading(name, said, top + 15, halo=True))
        drawn.append(_rectangle(100 * start / highest, max(0.3, 100 * (end - start) / highest), top + 23, 14, kind))
        if not last:
            x = min(100, 100 * value / highest)
            drawn.append(f'<line class="grid" x1="{x:.3f}%" x2="{x:.3f}%" y1="{top + 37}" y2="{top + 67}"/>')
        before = value
    return _picture(drawn, 44 * len(rows), title)


def heat(rows: Sequence[tuple[str, str, Sequence[tuple[float, str]]]], title: str) -> Markup:
    """Draw a heat map, darker by the root of a value, so that small ones can still be told apart.

    Args:
        rows: Label on the left, label on the right, and the cells: value, and what it is in words.
        title: What is shown, for those who cannot see it.
    """
    highest = max((value for *_, cells in rows for value, _ in cells), default=0) or 1
    drawn = []
    for index, (left, right, cells) in enumerate(rows):
        top, step = 46 * index, 100 / max(1, len(cells))
        drawn.append(_heading(left, right, top + 15))
        for place, (value, words) in enumerate(cells):
            shade = 0.06 + 0.94 * math.sqrt(max(0.0, value) / highest)
            width = step - min(0.4, 0.1 * step)
            drawn.append(
                f'<rect class="compressed" x="{place * step:.3f}%" width="{width:.3f}%" y="{top + 23}" height="16" '
                f'style="fill-opacity:{shade:.3f}"><title>{escape(words)}</title></rect>'
            )
    return _picture(drawn, 46 * len(rows), title)


def grid(values: Sequence[Sequence[float]], framed: Sequence[Sequence[bool]], title: str) -> Markup:
    """Draw a heat map with a column for each row of `values`, darker where a value is higher; some cells framed."""
    highest = max((value for row in values for value in row), default=0) or 1
    step, height, drawn = 100 / max(1, len(values)), 22, [_heading("", f"highest {highest:.3g}", 12)]
    every = max(1, math.ceil(len(values) / 8))
    for index, (row, frames) in enumerate(zip(values, framed, strict=True)):
        for place, (value, frame) in enumerate(zip(row, frames, strict=True)):
            style = f"fill-opacity:{0.08 + 0.92 * max(0.0, value) / highest:.3f}"
            style += ";stroke:currentColor;stroke-width:1.5" if frame else ""
            drawn.append(
                f'<rect class="compressed" x="{(index + 0.06) * step:.3f}%" width="{0.88 * step:.3f}%" '
                f'y="{20 + height * place}" height="{height - 3}" style="{style}"><title>{value:.4g}</title></rect>'
            )
        if index % every == 0:
            drawn.append(_small((index + 0.5) * step, "middle", 34 + height * len(row), str(index)))
    return _picture(drawn, 40 + height * max(map(len, values), default=0), title)


def curve(points: Sequence[tuple[float, float]], title: str) -> Markup:
    """Draw y over x as a line, its first and last values written at its ends."""
    finite = [point for point in points if all(map(math.isfinite, point))]
    xs, ys = [x for x, _ in finite] or [0.0], [y for _, y in finite] or [0.0]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    path = " ".join(
        f"{1000 * (x - left) / ((right - left) or 1):.1f},{100 - 100 * (y - low) / ((high - low) or 1):.1f}"
        for x, y in finite
    )
    drawn = [
        _heading(f"{ys[0]:.4g}", f"{ys[-1]:.4g}", 12),
        '<line class="grid" x1="0" x2="100%" y1="124.5" y2="124.5"/>',
        '<svg x="0" y="22" width="100%" height="100" viewBox="0 0 1000 100" preserveAspectRatio="none" '
        f'overflow="visible"><polyline class="curve" points="{path}"/></svg>',
    ]
    drawn += _axis([(0, f"{left:,.6g}"), (100, f"{right:,.6g}")], 139)
    return _picture(drawn, 144, title)


def scatter(series: Sequence[tuple[str, Sequence[tuple[float, Interval, str]]]], title: str) -> Markup:
    """Draw estimates over x with their intervals, a name beside each dot.

    Args:
        series: Class, and (x, estimate, name or nothing) of each point.
        title: What is shown, for those who cannot see it.
    """
    points = [(kind, *point) for kind, each in series for point in each]
    left, right = min((x for _, x, *_ in points), default=0), max((x for _, x, *_ in points), default=1)
    if right - left < LEAST_SPAN * abs(right):  # files for one budget: a few bytes are no distance
        left, right = (1 - LEAST_SPAN / 2) * left, (1 + LEAST_SPAN / 2) * right
    across = nice_ticks(left, right)
    upwards = nice_ticks(
        min((y.low for *_, y, _ in points), default=0), max((y.high for *_, y, _ in points), default=1)
    )
    height = 260

    def place(x: float, y: float) -> tuple[float, float]:
        inside = (x - across[0]) / (across[-1] - across[0]), (y - upwards[0]) / (upwards[-1] - upwards[0])
        return 8 + 84 * inside[0], height - 10 - (height - 20) * inside[1]

    drawn = []
    for tick in upwards:
        y = place(across[0], tick)[1]
        drawn.append(f'<line class="grid" x1="8%" x2="100%" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(_small(0, "start", y + 4, _tick(tick, upwards)))
    for _, x, item, name in points:  # below the dots, which a halo would cut
        if name:
            left, middle = place(x, item.value)
            needed = 41 + 6.5 * len(name)  # pixels of the name, and of the ticks that it must not run into
            side = 'dx="-9" text-anchor="end"' if left / 100 * NARROWEST > needed else 'dx="9"'
            drawn.append(f'<text class="small halo" x="{left:.3f}%" {side} y="{middle + 4:.1f}">{escape(name)}</text>')
    for kind, x, item, _ in points:
        left, middle = place(x, item.value)
        ends = [place(x, end)[1] for end in (item.low, item.high)]
        drawn.append(
            f'<line class="error" x1="{left:.3f}%" x2="{left:.3f}%" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
            f'<circle class="{kind}" cx="{left:.3f}%" cy="{middle:.1f}" r="5"/>'
        )
    drawn += [_small(place(tick, upwards[0])[0], "middle", height + 12, _tick(tick, across)) for tick in across]
    return _picture(drawn, height + 18, title)


def nice_ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Return round, evenly spaced values that enclose `low` and `high`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _tick(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    decimals = next((n for n in range(9) if abs(round(step, n) - step) < step * 1e-6), 9)
    return f"{value:.{decimals}f}"


def _heading(left: str, right: str, y: float, halo: bool = False) -> str:
    extra = " halo" if halo else ""
    return (
        f'<text class="label{extra}" x="0" y="{y:g}">{escape(left)}</text>'
        f'<text class="value{extra}" x="100%" y="{y:g}" text-anchor="end">{escape(right)}</text>'
    )


def _rectangle(x: float, width: float, y: float, height: float, kind: str) -> str:
    return f'<rect class="{kind}" x="{x:.3f}%" y="{y:g}" width="{max(0, width):.3f}%" height="{height:g}"/>'


def _axis(labels: Sequence[tuple[float, str]], y: float) -> list[str]:
    """Return the labels of an axis; the outer two stay inside the picture."""
    last = len(labels) - 1
    ends = {0: (0.0, "start"), last: (100.0, "end")}
    return [_small(*ends.get(index, (x, "middle")), y, text) for index, (x, text) in enumerate(labels)]


def _small(x: float, anchor: str, y: float, text: str) -> str:
    return f'<text class="small" x="{x:.3f}%" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _picture(drawn: Sequence[str], height: float, title: str) -> Markup:
    return Markup(
        f'<svg class="chart" role="img" aria-label="{escape(title)}" width="100%" height="{height:g}">'
        + "".join(drawn)
        + "</svg>"
    )
