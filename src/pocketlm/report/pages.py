"""The report as a page for people (HTML) and as text (Markdown).

The page is one file: no script, no font, no image from elsewhere, and a content policy that forbids them,
because the answers in it were written by a language model and may be anything.
"""

import json
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from pocketlm.interval import Interval
from pocketlm.report import charts, tables, wording
from pocketlm.report.answers import folded, is_fault
from pocketlm.report.content import Report, UnitCost
from pocketlm.report.verdict import judge

_DRAWN_ROWS = 40  # a mapping with more entries is printed instead


def html_page(report: Report) -> str:
    """Return the report as one HTML page that needs nothing else."""
    return render(
        "report.html.j2",
        report=report,
        drawings=_drawings(report),
        stages=[(stage, [_detail(name, value) for name, value in stage.details.items()]) for stage in report.stages],
    )


def markdown_page(report: Report) -> str:
    """Return the short report in GitHub's Markdown."""
    return render("report.md.j2", report=report)


def render(template: str, **values: Any) -> str:
    """Return a template of this room, filled; only HTML is escaped by itself."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pocketlm.report"),
        autoescape=template.endswith(".html.j2"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"cell": cell, "fence": fence, "size": wording.size, "duration": wording.duration}
    environment.filters |= {"count": wording.count, "percent": wording.percent, "estimate": wording.estimate}
    environment.filters |= {"change": wording.change, "setting": wording.setting, "folded": folded}
    environment.tests["fault"] = is_fault
    report = values["report"]
    return environment.get_template(template).render(
        findings=judge(report),
        measures=tables.measures(report),
        files=tables.files_in_order(report),
        parts=tables.parts(report),
        tasks=tables.tasks(report),
        costs=tables.costs(report),
        failed=[check for check in report.verification if not check.passed],
        stage_measure=wording.stage_measure(report.model.vocabulary),
        **values,
    )


def page(title: str, body: Markup) -> str:
    """Return a page of its own with the report's style: no script, and nothing from elsewhere."""
    head = Markup(
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<title>{}</title><style>{}</style>"
    ).format(title, Markup(style()))
    main = Markup("<main><h1>{}</h1>{}</main>").format(title, body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>{main}</body></html>\n'


def style() -> str:
    """Return the style sheet of the pages."""
    return (resources.files("pocketlm.report") / "templates" / "style.css").read_text(encoding="utf-8")


def cell(text: object) -> str:
    """Return `text` on one line of Markdown, with nothing in it that would be read as markup."""
    line = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    # An underscore between letters or digits, as in Q4_0, is none to Markdown.
    return re.sub(r"([\\`*~\[\]|]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", line)


def fence(text: str, language: str = "text") -> str:
    """Return `text` as a Markdown code block that the text itself cannot close."""
    marks = "`" * (max((len(run) for run in re.findall(r"`+", text)), default=0) + 1)
    marks = max(marks, "```", key=len)
    return f"{marks}{language}\n{text.rstrip()}\n{marks}"


def _drawings(report: Report) -> dict[str, list[tuple[str, Markup]]]:
    """Return the charts of each section with their titles."""
    return {
        "bytes": [("", _bytes(report))] if report.parts else [],
        "damage": _damage(report),
        "sensitivity": _sensitivity(report),
        "quality": _quality(report),
        "speed": _speed(report),
    }


def _bytes(report: Report) -> Markup:
    rows = []
    for label, when in (("original", "before"), ("compressed", "after")):
        values = [getattr(part.bytes, when) for part in report.parts]
        rows.append((label, wording.size(sum(values)), values))
    return charts.stacked(rows, report.budget.bytes, f"budget {report.budget.text}")


def _damage(report: Report) -> list[tuple[str, Markup]]:
    drawings = []
    points = [
        (file.role, [(file.bytes / 1e6, file.perplexity_ratio or Interval(1, 1, 1), file.role)])
        for file in tables.files_in_order(report)
        if file.role == "original" or (file.perplexity_ratio and file.perplexity_ratio.known)
    ]
    if len(points) > 1:
        title = "Perplexity ratio over megabytes, lower and further left is better"
        drawings.append((title, charts.scatter(points, title)))
    if report.waterfall:
        title = f"{wording.stage_measure(report.model.vocabulary)} behind each stage, in brackets its change"
        rows = [(stage.name.replace("_", " "), stage.divergence) for stage in report.waterfall.stages]
        drawings.append((title, charts.waterfall(rows, title)))
    return drawings


def _sensitivity(report: Report) -> list[tuple[str, Markup]]:
    if report.sensitivity is None:
        return []
    alike = f"In {report.sensitivity.format} everywhere"
    stored = "In the formats that they got"
    return [
        (alike, _heat(report.sensitivity.units, "alike", alike)),
        (stored, _heat(report.sensitivity.units, "expected", stored)),
    ]


def _heat(units: Sequence[UnitCost], field: str, title: str) -> Markup:
    rows = []
    for group, members in tables.by_group(units).items():
        costs = [getattr(unit, field) for unit in members]
        cells = [
            (cost, f"{'' if unit.block is None else f'block {unit.block}, '}{group}, {unit.format}: {cost:.2g}")
            for cost, unit in zip(costs, members, strict=True)
        ]
        rows.append((group.replace("_", " "), tables.spread(costs), cells))
    return charts.heat(rows, title)


def _quality(report: Report) -> list[tuple[str, Markup]]:
    drawings = []
    for title, name, reference, scale in (  # the reference is what the original has by definition
        ("Perplexity ratio, lower is better", "perplexity_ratio", 1, 1),
        ("KL in nats, lower is better", "divergence", 0, 1),
        ("Agreement in %, higher is better", "agreement", 1, 100),
    ):
        measured = [(file.role, getattr(file, name)) for file in tables.files_in_order(report)]
        rows = [
            (role, role, item, f"{wording.middle(item, scale)} ({wording.interval(item, scale)})")
            for role, item in measured
            if item is not None
        ]
        if rows:
            drawings.append((title, charts.whiskers(rows, title, reference, scale)))
    return drawings


def _speed(report: Report) -> list[tuple[str, Markup]]:
    files = [file for file in tables.files_in_order(report) if file.speed is not None]
    if not files:
        return []
    drawings = []
    for title, name in (
        ("Decode, tokens/s, higher is better", "decode_tokens_per_second"),
        ("Prefill, tokens/s, higher is better", "prefill_tokens_per_second"),
    ):
        rates = [(file.role, getattr(file.speed, name)) for file in files]
        rows = [(role, role, rate.mean, rate.deviation, wording.rate(rate)) for role, rate in rates]
        drawings.append((title, charts.bars(rows, title)))
    peaks = [(file.role, file.speed.peak_memory_bytes) for file in files if file.speed.peak_memory_bytes]
    if peaks:
        title = "Peak memory, lower is better"
        rows = [(role, role, peak, 0.0, wording.size(peak)) for role, peak in peaks]
        drawings.append((title, charts.bars(rows, title)))
    return drawings


def _detail(name: str, value: Any) -> tuple[str, Markup | str]:
    """Return a detail of a stage as a chart where its shape allows one, as text otherwise."""
    if isinstance(value, dict) and value and len(value) <= _DRAWN_ROWS and all(map(_is_amount, value.values())):
        if all(str(key).isdigit() for key in value):
            return name, charts.columns({str(key): item for key, item in value.items()}, name)
        rows = [("compressed", str(key), item, 0.0, f"{item:,.4g}") for key, item in value.items()]
        return name, charts.bars(rows, name)
    if isinstance(value, list | tuple) and len(value) > 1:
        if all(map(_is_number, value)) and any(isinstance(item, float) for item in value):
            return name, charts.curve(list(enumerate(value, start=1)), name)
        if all(isinstance(item, list | tuple) and len(item) == 2 and all(map(_is_number, item)) for item in value):
            return name, charts.curve([(x, y) for x, y in value], name)
    if _is_number(value):
        return name, f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
    return name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_amount(value: Any) -> bool:
    return _is_number(value) and 0 <= value < float("inf")
