"""What the numbers say, in words.

A difference counts only where it is larger than its noise: a ratio whose interval holds 1, two intervals
that overlap, or two speeds closer than twice the joint error of their means are called "within noise". Overlap is
a strict test, which may hide a real difference; a paired ratio, where the report has one, is used instead.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pocketlm.errors import VerificationError
from pocketlm.interval import Interval
from pocketlm.report.content import BudgetFacts, MeasuredFile, Rate, Report
from pocketlm.report.wording import interval, middle, number, percent, size

Outcome = Literal["better", "worse", "within noise"]
Tone = Literal["good", "bad", "cost", "even"]  # a cost is what was paid, not a failure

TONES: dict[str, Tone] = {"better": "good", "worse": "bad", "within noise": "even"}
SAME_SIZE = 0.02  # files closer than this are called the same size


@dataclass(frozen=True)
class Finding:
    """One answer: a figure, a word for it, and the sentence that holds up alone."""

    topic: Literal["budget", "quality", "size", "speed", "plain"]
    tone: Tone
    figure: str
    word: str
    aside: str
    sentence: str


def judge(report: Report) -> dict[str, Finding]:
    """Return the findings by topic, in reading order; what was not measured has none.

    Raises:
        BadInputError: The report has no compressed file.
    """
    original, plain, product = report.file("original"), report.file("plain"), report.product
    findings = [_budget(report), _quality(report)]
    if original is not None:
        findings += [_size(original, product), _speed(original, product)]
    if plain is not None:
        findings.append(_plain(report, plain, product))
    return {finding.topic: finding for finding in findings if finding is not None}


def check_budgets_met(reports: Mapping[str, Report]) -> None:
    """Tell whoever calls the program that what was measured, of the file or of the time, is not what was asked for.

    Args:
        reports: By the name of the folder that they are of.

    Raises:
        VerificationError: A part of a budget is missed.
    """
    missed = [f"{name}: {_budget(report).aside}" for name, report in reports.items() if not report.budget.met]
    if missed:
        raise VerificationError(
            f"The file is kept, but measured it misses its budget ({'; '.join(missed)}). Ask with room to spare"
        )


def against_one(ratio: Interval) -> Outcome:
    """Return what a ratio of perplexities says about the file above the line."""
    if not ratio.known:
        return "worse"  # a perplexity that is not finite is a broken model
    if ratio.low <= 1 <= ratio.high:
        return "within noise"
    return "better" if ratio.value < 1 else "worse"


def lower(ours: Interval, other: Interval) -> Outcome:
    """Return whether `ours` is better, lower being better, by more than both intervals."""
    if not (ours.known and other.known):
        return "within noise" if ours.known == other.known else "better" if ours.known else "worse"
    if ours.low <= other.high and other.low <= ours.high:
        return "within noise"
    return "better" if ours.value < other.value else "worse"


def faster(ours: Rate, other: Rate, paired: Interval | None = None) -> Outcome:
    """Return whether `ours` is the higher rate: by the ratio in rounds, else twice the joint error of the means."""
    if paired and paired.known:
        return "within noise" if paired.low <= 1 <= paired.high else "better" if paired.value > 1 else "worse"
    noise = 2 * math.hypot(*(rate.deviation / math.sqrt(rate.runs) for rate in (ours, other)))
    if abs(ours.mean - other.mean) <= noise:
        return "within noise"
    return "better" if ours.mean > other.mean else "worse"


def _budget(report: Report) -> Finding:
    budget, figure = report.budget, size(report.budget.actual_bytes)
    gap = None if budget.bytes is None else budget.bytes - budget.actual_bytes
    measured = "".join(f" Of {limit.text}, measured: {limit.measured}." for limit in budget.limits)
    if budget.met:
        room = "" if gap is None else f", with {size(gap)} to spare" if gap else ", to the byte"
        sentence = f"The file takes {figure} and fits the budget of {budget.text}{room}.{measured}"
        return Finding("budget", "good", figure, "budget met", f"of {budget.text}", sentence)
    over = gap is not None and gap < 0
    by = f" by {size(-gap)}" if over else ""
    missed = [f"{size(-gap)} over {budget.text}"] if over else []
    missed += [f"{limit.measured}, not {limit.text}" for limit in budget.limits if not limit.met]
    sentence = f"The file takes {figure} and misses the budget of {budget.text}{by}.{measured}"
    return Finding("budget", "bad", figure, "budget missed", "; ".join(missed), sentence)


def _quality(report: Report) -> Finding | None:
    ratio, agreement = report.product.perplexity_ratio, report.product.agreement
    if ratio is None:
        return None
    outcome = against_one(ratio)
    if not ratio.known:
        sentence = "Its perplexity is not finite: the file is broken."
    else:
        end = "within noise of no change" if outcome == "within noise" else f"{outcome}, by more than noise"
        sentence = f"Its perplexity is {middle(ratio)} times the original's ({interval(ratio)}): {end}."
    if agreement is not None and agreement.known:
        sentence += (
            f" It makes the original's first choice for {middle(agreement, 100)}% of the tokens "
            f"({interval(agreement, 100)}%)."
        )
    if report.measured_text is not None and not report.measured_text.held_out:
        sentence += " The text was not held out, so this flatters it."
    word = "perplexity within noise" if outcome == "within noise" else f"{outcome} perplexity"
    tone = "bad" if not ratio.known else "cost" if outcome == "worse" else TONES[outcome]
    aside = f"95% interval {interval(ratio)}"
    return Finding("quality", tone, f"×{middle(ratio)}", word, aside, sentence)


def _size(original: MeasuredFile, product: MeasuredFile) -> Finding:
    change = product.bytes / original.bytes - 1
    word = "smaller" if change < 0 else "larger" if change > 0 else "same size"
    figure = percent(abs(change)) if abs(change) >= 0.0995 or not change else percent(abs(change), 1)
    aside = f"{size(original.bytes)} to {size(product.bytes)}"
    sentence = f"It is {figure} {word} than the original: {aside}." if change else f"It keeps its size: {aside}."
    return Finding("size", "good" if change < 0 else "bad" if change > 0 else "even", figure, word, aside, sentence)


def _speed(original: MeasuredFile, product: MeasuredFile) -> Finding | None:
    if original.speed is None or product.speed is None:
        return None
    old, new = original.speed.decode_tokens_per_second, product.speed.decode_tokens_per_second
    paired = product.speed.decode_ratio
    outcome = faster(new, old, paired)
    aside = f"{number(old.mean, 1)} to {number(new.mean, 1)} tokens/s"
    known = paired is not None and paired.known
    times, between = (middle(paired), f" ({interval(paired)})") if known else (number(new.mean / old.mean), "")
    word = {"better": "faster decoding", "worse": "slower decoding", "within noise": "speed within noise"}[outcome]
    measured = f"It writes {number(new.mean, 1)} tokens/s where the original writes {number(old.mean, 1)}"
    ending = {
        "better": f"{times} times as fast{between}",
        "worse": f"slower, {times} times the speed{between}",
        "within noise": f"a difference within noise, {times} times the speed{between}",
    }[outcome]
    return Finding("speed", TONES[outcome], f"×{times}", word, aside, f"{measured}: {ending}.")


def _plain(report: Report, plain: MeasuredFile, product: MeasuredFile) -> Finding | None:
    compared = []  # (what, outcome, our value, the plain value)
    if product.perplexity_ratio is not None and plain.perplexity_ratio is not None:
        paired = report.perplexity_ratio_to_plain
        outcome = against_one(paired) if paired else lower(product.perplexity_ratio, plain.perplexity_ratio)
        compared.append(("perplexity ratio", outcome, product.perplexity_ratio, plain.perplexity_ratio))
    if product.divergence is not None and plain.divergence is not None:
        outcome = lower(product.divergence, plain.divergence)
        compared.append(("divergence", outcome, product.divergence, plain.divergence))
    if not compared:
        return None
    extra = product.bytes / plain.bytes - 1
    outcomes = {outcome for _, outcome, _, _ in compared}
    tone, word, ending = _weigh(outcomes, extra, _plain_fits(report.budget, plain))
    values = ", ".join(
        f"{what} {middle(ours)} against {middle(theirs)} ({outcome})" for what, outcome, ours, theirs in compared
    )
    heft = (
        "the same size"
        if abs(extra) <= SAME_SIZE
        else f"{size(abs(plain.bytes - product.bytes))} {'smaller' if extra > 0 else 'larger'}"
    )
    learnt = ""
    if plain.tokens != product.tokens and None not in (plain.tokens, product.tokens):
        learnt = f"; learnt from {_tokens(plain.tokens)}, the compressed file from {_tokens(product.tokens)}"
    sentence = f"Against {plain.label} ({size(plain.bytes)}, {heft}{learnt}): {values}. {ending}"
    return Finding("plain", tone, heft, word, plain.label, sentence)


def _tokens(count: int) -> str:
    return f"{count:,} tokens" if count else "no tokens"


def _plain_fits(budget: BudgetFacts, plain: MeasuredFile) -> bool | None:
    """Return whether the plain file keeps to the budget: None where that is of more than bytes, not measured of it."""
    if budget.bytes is not None and plain.bytes > budget.bytes:
        return False
    return None if budget.bytes is None or budget.limits else True


def _weigh(outcomes: set[Outcome], extra: float, plain_fits: bool | None) -> tuple[Tone, str, str]:
    """Return tone, word and sentence for the outcomes against the plain file, ours being `extra` larger."""
    if outcomes >= {"better", "worse"}:
        return (
            "even",
            "mixed against plain",
            "The measures disagree, so neither is the better file on these numbers.",
        )
    if "worse" in outcomes:
        if plain_fits is False:
            return (
                "even",
                "plain is better, but does not fit",
                "The plain file is better but does not fit the budget.",
            )
        if plain_fits is None and extra < -SAME_SIZE:
            return "even", "plain is better, but larger", "The plain file is better, and takes more bytes for it."
        fits = ", and it fits the budget" if plain_fits else ""
        return "bad", "loses to plain", f"The plain file is the better choice here{fits}."
    if "better" in outcomes:
        if extra > SAME_SIZE:
            return (
                "even",
                "better than plain, and larger",
                "The compressed file is better, and pays in bytes for it.",
            )
        where = "in fewer bytes" if extra < -SAME_SIZE else "at the same size"
        return "good", "better than plain", f"The compressed file is better, {where}."
    if extra < -SAME_SIZE:
        return "good", "as good as plain, and smaller", "It is as good within noise, in fewer bytes."
    return "even", "no better than plain", "The difference is within noise: the plain way does as well here."
