"""What two results of `fit` differ in: rows of a measure and its value in each."""

from collections.abc import Iterator

from pocketlm.model.parts import PARTS
from pocketlm.report.content import MeasuredFile, Report
from pocketlm.report.wording import MISSING, count, rate, size, worded

Row = tuple[str, str, str]


def differences(first: Report, second: Report) -> list[Row]:
    """Return (measure, first, second) in reading order, also of what is alike."""
    one, other = dict(_facts(first)), dict(_facts(second))
    return [(name, one.get(name, MISSING), other.get(name, MISSING)) for name in one | other]


def cautions(first: Report, second: Report) -> list[str]:
    """Return why figures of two results may not be compared, if they may not."""
    said = []
    if first.model.sha256 != second.model.sha256:
        said.append("The originals differ, so ratios to them and KL cannot be compared")
    texts = [report.measured_text and report.measured_text.sha256 for report in (first, second)]
    if texts[0] != texts[1]:
        said.append("Quality was measured on different texts")
    if first.machine != second.machine:
        said.append("Speed was measured on different machines")
    if first.recipe == second.recipe:
        said.append("Both have the same recipe")
    return said


def _facts(report: Report) -> Iterator[tuple[str, str]]:
    file, model = report.product, report.model
    yield "original", model.name
    yield "file", f"{file.bytes:,} bytes"
    yield "parameters", count(model.parameters.after)
    yield "blocks", str(model.blocks.after)
    yield "FFN channels", str(model.ffn_width.after)
    yield "tokens", f"{model.vocabulary.after:,}"
    by_name = {part.name: part for part in report.parts}
    for name in PARTS:
        part = by_name.get(name)
        yield name, MISSING if part is None else f"{size(part.bytes.after)} {' '.join(part.formats)}".strip()
    yield from _quality(file)
    for task in report.tasks:
        yield f"{task.name}, {task.measure}", worded(task.compressed)
    speed = file.speed
    yield "decode, tokens/s", rate(speed and speed.decode_tokens_per_second)
    yield "prefill, tokens/s", rate(speed and speed.prefill_tokens_per_second)
    yield "peak memory", MISSING if speed is None else size(speed.peak_memory_bytes)
    yield "steps", ", ".join(stage.name for stage in report.stages)


def _quality(file: MeasuredFile) -> Iterator[tuple[str, str]]:
    for name, item in (
        ("perplexity", file.perplexity),
        ("perplexity ratio", file.perplexity_ratio),
        ("KL, nats per token", file.divergence),
        ("first choice kept", file.agreement),
        ("bits per byte", file.bits_per_byte),
    ):
        yield name, worded(item)
