"""The tables of a report, shared by the page, its Markdown and the model card."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pocketlm.interval import Interval
from pocketlm.report.content import MeasuredFile, Report, Speed, UnitCost
from pocketlm.report.wording import MISSING, count, duration, interval, middle, number, percent, rate, size


@dataclass(frozen=True)
class Cell:
    """A value and what stands small beneath it: its interval, mostly."""

    main: str
    aside: str = ""

    def __str__(self) -> str:
        return f"{self.main} ({self.aside})" if self.aside else self.main


@dataclass(frozen=True)
class Row:
    """A measure: its name, its unit, and one cell for each file."""

    name: str
    unit: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class PartRow:
    """A part of the model in words; `color` is its number in the chart, None for the total."""

    color: int | None
    name: str
    parameters: tuple[str, str]
    bytes: tuple[str, str]
    share: str
    formats: str


def files_in_order(report: Report) -> list[MeasuredFile]:
    """Return the measured files: original, plain, compressed."""
    order = ("original", "plain", "compressed")
    return sorted(report.files, key=lambda file: order.index(file.role))


def measures(report: Report) -> list[Row]:
    """Return what was measured, one row a measure and one column a file, in the order of `files_in_order`."""
    files = files_in_order(report)

    def row(name: str, unit: str, cells: list[Cell]) -> Row:
        return Row(name, unit, tuple(cells))

    per_byte = any(file.bits_per_byte is not None for file in files)
    taught = [Cell("-" if file.tokens is None else f"{file.tokens:,}") for file in files]
    return [
        row("Size", "", [Cell(size(file.bytes), f"{file.bytes:,} bytes") for file in files]),
        *([row("Learnt from", "tokens", taught)] if any(file.tokens for file in files) else []),
        *(
            [row("Bits per byte", "lower is better", [_estimate(file.bits_per_byte) for file in files])]
            if per_byte
            else []
        ),
        row(
            "Perplexity",
            "of the original's tokens" if per_byte else "lower is better",
            [_estimate(file.perplexity) for file in files],
        ),
        row("Perplexity ratio", "to the original", [against(file, file.perplexity_ratio) for file in files]),
        row("KL divergence", "nats per token", [against(file, file.divergence) for file in files]),
        row("Agreement", "same first choice", [against(file, file.agreement, 100, "%") for file in files]),
        *(row(name, unit, [_speed(file, say) for file in files]) for name, unit, say in _SPEEDS),
    ]


def _first_token(speed: Speed) -> str:
    first = speed.time_to_first_token_milliseconds
    return MISSING if first is None else f"{number(first, 1 if first < 100 else 0)} ms"


_SPEEDS: tuple[tuple[str, str, Callable[[Speed], str]], ...] = (
    ("Prefill", "tokens/s", lambda speed: rate(speed.prefill_tokens_per_second)),
    ("Decode", "tokens/s", lambda speed: rate(speed.decode_tokens_per_second)),
    ("Time to first token", "", _first_token),
    ("Load time", "", lambda speed: duration(speed.load_seconds)),
    ("Peak memory", "", lambda speed: size(speed.peak_memory_bytes)),
    (
        "Energy",
        "joules per token",
        lambda speed: "not available" if speed.joules_per_token is None else number(speed.joules_per_token, 3),
    ),
)


def _speed(file: MeasuredFile, say: Callable[[Speed], str]) -> Cell:
    return Cell(MISSING if file.speed is None else say(file.speed))


def _estimate(value: Interval | None, scale: float = 1, unit: str = "") -> Cell:
    text = middle(value, scale, unit)
    return Cell(text) if value is None or text == MISSING else Cell(text, interval(value, scale, unit))


def against(file: MeasuredFile, value: Interval | None, scale: float = 1, unit: str = "") -> Cell:
    """Return a figure of a file against the original, or why there is none."""
    if value is None and file.bits_per_byte is not None and file.role != "original":
        return Cell("not available", "another vocabulary")
    return Cell("reference") if file.role == "original" else _estimate(value, scale, unit)


def parts(report: Report) -> list[PartRow]:
    """Return what each part takes before and after, with the total last."""
    total = sum(part.bytes.after for part in report.parts)
    rows = [
        PartRow(
            color=index,
            name=part.name,
            parameters=(count(part.parameters.before), count(part.parameters.after)),
            bytes=(size(part.bytes.before), size(part.bytes.after)),
            share=percent(part.bytes.after / total, 1) if total else "",
            formats=", ".join(part.formats),
        )
        for index, part in enumerate(report.parts)
        if part.bytes.before or part.bytes.after  # a tied head takes nothing
    ]
    sums = {
        (what, when): sum(getattr(getattr(part, what), when) for part in report.parts)
        for what in ("parameters", "bytes")
        for when in ("before", "after")
    }
    rows.append(
        PartRow(
            None,
            "total",
            (count(sums["parameters", "before"]), count(sums["parameters", "after"])),
            (size(sums["bytes", "before"]), size(sums["bytes", "after"])),
            "",
            "",
        )
    )
    return rows


def by_group(units: Sequence[UnitCost]) -> dict[str, list[UnitCost]]:
    """Return parts by the group of their matrices, blocks in order."""
    groups: dict[str, list[UnitCost]] = {}
    for unit in sorted(units, key=lambda unit: -1 if unit.block is None else unit.block):
        groups.setdefault(unit.group, []).append(unit)
    return groups


def spread(values: Sequence[float]) -> str:
    """Return the least and the most of some costs, to four decimals."""
    low, high = (f"{end:.4f}" if end >= 5e-5 else "<0.0001" for end in (min(values), max(values)))
    return low if low == high else f"{low}–{high}"


def costs(report: Report) -> list[tuple[str, str, str, str]]:
    """Return for each group of matrices: its name, its formats, its cost in one format, and as it is stored."""
    if report.sensitivity is None:
        return []
    rows = []
    for group, units in by_group(report.sensitivity.units).items():
        formats = ", ".join(dict.fromkeys(unit.format for unit in units))
        alike, expected = (sum(getattr(unit, field) for unit in units) for field in ("alike", "expected"))
        rows.append((group.replace("_", " "), formats, number(alike, 4), number(expected, 4)))
    return rows


def tasks(report: Report) -> list[tuple[str, tuple[Cell, Cell, Cell], str]]:
    """Return for each task: its name and measure, the two shares and their difference, and what changed in words."""
    rows = []
    for task in report.tasks:
        found = "".join(f"; {fault}: {count}" for fault, count in task.faults.items())
        cells = (
            _estimate(task.original, 100, "%"),
            _estimate(task.compressed, 100, "%"),
            _estimate(task.difference, 100, "%"),
        )
        noise = "within noise" if task.difference.low <= 0 <= task.difference.high else "more than noise"
        said = f"{task.items} items, {task.lost} lost, {task.won} won: {noise}{found}"
        rows.append((f"{task.name}, {task.measure}", cells, said))
    return rows
