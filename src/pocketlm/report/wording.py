"""Numbers as people read them, with their units. Sizes are decimal: 1 MB is 1,000,000 bytes."""

import math

from pocketlm.interval import Interval
from pocketlm.report.content import Change, Rate, TextUsed

MISSING = "not measured"


def size(count: int | None) -> str:
    """Return bytes with a unit and three significant digits: `69.9 MB`, `812 bytes`."""
    if count is None:
        return MISSING
    if abs(count) < 1000:
        return f"{count} byte{'s' if abs(count) != 1 else ''}"
    number, unit = next(
        (count / scale, unit)
        for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        if abs(count) >= scale * 0.9995 or unit == "kB"
    )
    return f"{_three_digits(number)} {unit}"


def count(number: int) -> str:
    """Return a count with a suffix from ten thousand on: `134.5 M`, `9,216`."""
    for scale, suffix in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= scale * 0.9995:
            return f"{number / (1e3 if suffix == 'k' else scale):.1f} {suffix}"
    return f"{number:,}"


def change(counts: Change) -> str:
    """Return a count before and after, or once where it stayed: `30 to 24`, `1,536`."""
    before, after = (f"{count:,}" for count in (counts.before, counts.after))
    return before if before == after else f"{before} to {after}"


def stage_measure(vocabulary: Change) -> str:
    """Return what the damage behind each stage is measured in: tokens of two vocabularies have no divergence."""
    if vocabulary.before == vocabulary.after:
        return "KL to the original"
    return "The text's cost beyond what it costs the original"


def setting(value: object) -> str:
    """Return a setting as people write it: lists by commas, truth as yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def number(value: float | None, decimals: int = 2) -> str:
    """Return a number with thousands separators; None is what JSON made of a number that was not finite."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"


def percent(fraction: float | None, decimals: int = 0) -> str:
    """Return a fraction as a percentage."""
    if fraction is None:
        return MISSING
    return f"{100 * fraction:.{decimals}f}%"


def interval(estimate: Interval, scale: float = 1, unit: str = "") -> str:
    """Return the interval alone: `1.061–1.105`, `-0.4 to 1.1`."""
    decimals = _decimals(estimate, scale)
    low, high = (number(_times(end, scale), decimals) for end in (estimate.low, estimate.high))
    between = " to " if low.startswith("-") else "–"
    return f"{low}{between}{high}{unit}" if estimate.known else "interval not finite"


def middle(estimate: Interval | None, scale: float = 1, unit: str = "") -> str:
    """Return the value of an estimate, with as many decimals as its interval warrants."""
    if estimate is None:
        return MISSING
    return f"{number(_times(estimate.value, scale), _decimals(estimate, scale))}{unit}"


def worded(value: Interval | None) -> str:
    """Return a value with its interval behind it: `1.083 (1.061–1.105)`."""
    return MISSING if value is None else f"{middle(value)} ({interval(value)})"


def four_digits(value: Interval | None) -> str:
    """Return a value with its interval in four digits each: `1.083 [1.061, 1.105]`; nothing where there is none."""
    return "" if value is None else f"{value.value:.4g} [{value.low:.4g}, {value.high:.4g}]"


def estimate(value: Interval) -> str:
    """Return a value with its interval: `1.083 [1.061–1.105]`."""
    return f"{middle(value)} [{interval(value)}]"


def rate(value: Rate | None) -> str:
    """Return a mean and its deviation: `139.2 ± 2.1`."""
    if value is None:
        return MISSING
    decimals = 0 if value.mean >= 1000 else 1
    return f"{number(value.mean, decimals)} ± {number(value.deviation, decimals)}"


def duration(seconds: float | None) -> str:
    """Return a time in the two largest units that matter: `0.41 s`, `48 s`, `4 min 12 s`, `1 h 03 min`."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.2f} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(whole / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def text_used(text: TextUsed) -> str:
    """Return which text it was: `12 windows of 512 tokens, wiki.txt, sha256 0f3a…`, the hash in full."""
    return f"{text.windows:,} windows of {text.window_length:,} tokens, {text.name}, sha256 {text.sha256}"


def _three_digits(value: float) -> str:
    decimals = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:.{decimals}f}"


def _times(value: float | None, scale: float) -> float | None:
    return None if value is None else value * scale


def _decimals(estimate: Interval, scale: float) -> int:
    """Return how many decimals show the half width of the interval to a third of itself, 4 at most."""
    if not estimate.known or estimate.high == estimate.low:
        return 2
    half = abs(estimate.high - estimate.low) / 2 * scale
    return min(4, max(0, math.ceil(-math.log10(half / 3))))
