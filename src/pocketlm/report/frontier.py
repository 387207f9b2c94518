"""Several results of one model beside each other: what each size costs in quality, as data, as text and as a page."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from pocketlm.interval import Interval
from pocketlm.report import charts
from pocketlm.report.content import MeasuredFile, Report
from pocketlm.report.pages import cell, page
from pocketlm.report.tables import against
from pocketlm.report.wording import interval, middle, rate, size, worded

BOUNDS = (1.05, 1.15, 1.5)  # of the perplexity ratio, for which the smallest file is named
HEADS = ("result", "perplexity ratio", "KL, nats per token", "decode, tokens/s", "simpler choice's ratio")
# What the file beside a result is made by (`plain` in the data).
SIMPLER = "the simpler choice: plain rounding, or formats alone where pruning won"


def frontier_data(reports: Mapping[str, Report]) -> dict[str, Any]:
    """Return the figures of each result, those of the simpler choice beside it, and the smallest within each bound."""
    points = [
        {
            "result": name,
            "budget_bytes": report.budget.bytes,
            "bytes": report.product.bytes,
            "perplexity_ratio": _plain_data(report.product.perplexity_ratio),
            "kl": _plain_data(report.product.divergence),
            "decode_tokens_per_second": report.product.speed and report.product.speed.decode_tokens_per_second.mean,
            "tokens": report.product.tokens,
            "plain_bytes": report.file("plain") and report.file("plain").bytes,
            "plain_tokens": report.file("plain") and report.file("plain").tokens,
            "plain_perplexity_ratio": report.file("plain") and _plain_data(report.file("plain").perplexity_ratio),
            "ratio_to_plain": _plain_data(report.perplexity_ratio_to_plain),
            "recipe_seconds": sum(stage.seconds for stage in report.stages),
            "recipe": report.recipe,
        }
        for name, report in reports.items()
    ]
    return {"points": points, "choice": smallest_within(reports)}


def smallest_within(reports: Mapping[str, Report]) -> dict[str, str | None]:
    """Return the smallest result whose perplexity ratio, all of its interval, is within each of BOUNDS."""
    ratios = {name: report.product.perplexity_ratio for name, report in reports.items()}
    known = {name: ratio for name, ratio in ratios.items() if ratio and ratio.known}
    chosen = {}
    for bound in BOUNDS:
        within = [(reports[name].product.bytes, name) for name, ratio in known.items() if ratio.high <= bound]
        chosen[f"{bound:g}"] = min(within)[1] if within else None
    return chosen


def frontier_lines(reports: Mapping[str, Report], refused: Mapping[str, str]) -> list[str]:
    """Return the frontier as lines of text, smallest file first."""
    rows = [HEADS, *_rows(reports)]
    widths = [max(len(row[column]) for row in rows) + 2 for column in range(len(HEADS))]
    lines = ["".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *_advice(reports), *(f"{asked}: {why}" for asked, why in refused.items())]


def frontier_markdown(reports: Mapping[str, Report], refused: Mapping[str, str]) -> str:
    """Return the frontier as Markdown."""
    rows = [HEADS, ("---",) * len(HEADS), *_rows(reports)]
    table = ["| " + " | ".join(text if text == "---" else cell(text) for text in row) + " |" for row in rows]
    name = next(iter(reports.values())).model.name
    rest = [*_advice(reports), *(f"{asked}: {why}" for asked, why in refused.items())]
    return "\n".join([f"# {cell(name)}: quality against size", "", *table, "", *(cell(line) for line in rest), ""])


def frontier_page(reports: Mapping[str, Report], refused: Mapping[str, str]) -> str:
    """Return the frontier as one HTML page that needs nothing else."""
    ours = [(report.product.bytes / 1e6, report.product.perplexity_ratio, name) for name, report in reports.items()]
    plain = {
        (file.bytes / 1e6, file.perplexity_ratio, "")
        for file in (report.file("plain") for report in reports.values())
        if file is not None
    }
    title = (
        "Perplexity over the original's against megabytes of the file, 95 % intervals; named dots are pocketlm's, "
        f"the others {SIMPLER}; lower and further left is better"
    )
    series = [("plain", sorted(plain, key=lambda point: point[0])), ("compressed", ours)]
    picture = charts.scatter([(kind, [p for p in points if p[1] and p[1].known]) for kind, points in series], title)
    table = Markup("<table>{}{}</table>").format(
        _table_row("th", HEADS), Markup("").join(_table_row("td", row) for row in _rows(reports))
    )
    said = [*_advice(reports), *(f"{asked}: {why}" for asked, why in refused.items())]
    paragraphs = Markup('<div class="block">{}</div>').format(
        Markup("").join(Markup("<p>{}</p>").format(s) for s in said)
    )
    name = next(iter(reports.values())).model.name
    figure = Markup('<figure class="block"><figcaption>{}</figcaption>{}</figure>').format(title, picture)
    body = Markup('{}<div class="scroll">{}</div>{}').format(figure, table, paragraphs)
    return page(f"{name}: quality against size", body)


def _table_row(tag: str, texts: tuple[str, ...]) -> Markup:
    """Return a row of a table; what stands in brackets goes below in small letters."""
    cells = []
    for text in texts:
        main, _, aside = text.partition(" (")
        small = Markup("<small>{}</small>").format(aside.removesuffix(")")) if aside else ""
        cells.append(Markup(f"<{tag}>{{}}{{}}</{tag}>").format(main, small))
    return Markup("<tr>{}</tr>").format(Markup("").join(cells))


def _rows(reports: Mapping[str, Report]) -> list[tuple[str, ...]]:
    return [_row(name, report) for name, report in sorted(reports.items(), key=lambda item: item[1].product.bytes)]


def _row(name: str, report: Report) -> tuple[str, ...]:
    product, plain = report.product, report.file("plain")
    speed = rate(product.speed.decode_tokens_per_second) if product.speed else "not measured"
    ratio = worded(product.perplexity_ratio)
    return f"{name} ({size(product.bytes)})", ratio, str(against(product, product.divergence)), speed, _beside(plain)


def _beside(plain: MeasuredFile | None) -> str:
    if plain is None or plain.perplexity_ratio is None:
        return "not measured"
    ratio = plain.perplexity_ratio
    learnt = f", learnt from {plain.tokens:,} tokens" if plain.tokens else ""
    return f"{middle(ratio)} ({interval(ratio)}, {plain.label}{learnt}, {size(plain.bytes)})"


def _plain_data(item: Interval | None) -> dict[str, float] | None:
    return None if item is None or not item.known else vars(item).copy()


def _advice(reports: Mapping[str, Report]) -> list[str]:
    return [
        f"The smallest whose perplexity is within {bound} times the original's, interval included: {name or 'none'}."
        for bound, name in smallest_within(reports).items()
    ]
