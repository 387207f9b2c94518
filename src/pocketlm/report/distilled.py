"""What came of a distillation, as a page of Markdown."""

from typing import Any


def distilled_page(teacher: str, student: str, made: Any) -> str:
    """Return the page.

    Args:
        teacher: Its name.
        student: As the person gave it.
        made: A `Distilled`: what was done, what the models are worth, and the losses.
    """
    before, after = made.parameters
    lines = [
        f"# {teacher}, distilled",
        "",
        f"Student: `{student}`, {after:,} parameters where the teacher has {before:,}. "
        f"Trained on {made.tokens:,} tokens at {made.details['tokens_per_second']:,.0f} tokens/s.",
        "",
        *(f"- {summary}" for summary in made.summaries),
        "",
        "| model | perplexity | KL to the teacher | first choice kept | bits per byte |",
        "|---|---|---|---|---|",
    ]
    for name, quality in made.qualities.items():
        cells = (quality.perplexity, quality.kl, quality.agreement, quality.bits_per_byte)
        lines.append(f"| {name} | " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(
        [
            *lines,
            "",
            "F16 files read in llama.cpp on text that nothing else has seen; in brackets 95 % intervals, bootstrap",
            "over windows, paired. `loss.csv` has every step.",
            "",
        ]
    )


def _cell(interval: Any) -> str:
    return "" if interval is None else f"{interval.value:.4g} [{interval.low:.4g}, {interval.high:.4g}]"
