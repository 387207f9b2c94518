"""What came of a distillation, as a page of Markdown."""

from typing import Any

from pocketlm.report.pages import cell
from pocketlm.report.wording import four_digits, text_used


def distilled_page(teacher: str, student: str, made: Any) -> str:
    """Return the page.

    Args:
        teacher: Its name.
        student: As the person gave it.
        made: A `Distilled`: what was done, what the models are worth, and the losses.
    """
    before, after = made.parameters
    inputs = made.inputs
    lines = [
        f"# {cell(teacher)}, distilled",
        "",
        f"Student: {cell(student)}, {after:,} parameters where the teacher has {before:,}. "
        f"Trained on {made.tokens:,} tokens at {made.details['tokens_per_second']:,.0f} tokens/s.",
        "",
        *(f"- {cell(summary)}" for summary in made.summaries),
        "",
        "| model | perplexity | KL to the teacher | first choice kept | bits per byte |",
        "|---|---|---|---|---|",
    ]
    for name, quality in made.qualities.items():
        cells = (quality.perplexity, quality.kl, quality.agreement, quality.bits_per_byte)
        lines.append(f"| {name} | " + " | ".join(map(four_digits, cells)) + " |")
    return "\n".join(
        [
            *lines,
            "",
            "F16 files read in llama.cpp on text that nothing else has seen; in brackets 95 % intervals, bootstrap",
            "over windows, paired. `loss.csv` has every step.",
            "",
            f"Text: {cell(text_used(made.text))}. Seed {inputs['settings']['seed']}; the teacher's weights: SHA-256",
            f"{inputs['teacher']['sha256']}. Settings, and what was learnt from, are in `distillation.json`.",
            "",
        ]
    )
