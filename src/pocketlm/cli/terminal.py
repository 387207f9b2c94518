"""What the person at the terminal sees: progress while work goes on, and results as lines."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from pocketlm.commands.distillation import Distilled
from pocketlm.commands.inspection import Evaluation, Inspection
from pocketlm.commands.integers import IntegerFolder
from pocketlm.commands.pruning import Pruned
from pocketlm.interval import Interval
from pocketlm.measure.device import Figure, Speeds
from pocketlm.measure.quality import Quality
from pocketlm.measure.tasks import TaskResult
from pocketlm.model.training import LOSSES
from pocketlm.pipeline.harness import HarnessScore
from pocketlm.pipeline.planning import Planned
from pocketlm.plan.budget import say_bytes
from pocketlm.plan.recipe import to_yaml
from pocketlm.plan.search import Plan
from pocketlm.report.content import Report
from pocketlm.report.verdict import judge
from pocketlm.report.wording import four_digits, text_used
from pocketlm.run.server.serve import model_name

SECONDS_BETWEEN_LINES = 10


class Screen:
    """Progress on standard error: a bar with the time left in a terminal, a line now and then elsewhere."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False, emoji=False)  # a name may have `:key:` in it
        self._live = self._console.is_terminal
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._live,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last, self._printed, self._began = "", 0.0, time.monotonic()

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, lines: list[str]) -> None:
        """Print lines above the progress."""
        for line in lines:
            self._console.print(line, markup=False, soft_wrap=True)

    def progress(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` pieces of some work are done."""
        stage = what.partition(" (")[0]
        if self._live:
            if stage not in self._tasks:
                self._tasks[stage] = self._progress.add_task(stage, total=total)
            self._progress.update(self._tasks[stage], description=what, completed=done, total=total)
            return
        now = time.monotonic()
        if stage != self._last or done == total or now - self._printed > SECONDS_BETWEEN_LINES:
            self._console.print(f"[{now - self._began:6.0f} s] {what} {done}/{total}", markup=False, soft_wrap=True)
            self._last, self._printed = stage, now


def plan_lines(planned: Planned) -> list[str]:
    """Say what a run will do."""
    most = f": {planned.budget.bytes:,} bytes" if planned.budget.sized else ""
    lines = [
        f"budget     {planned.budget.text}{most}",
        f"predicted  {planned.predicted_bytes:,} bytes ({say_bytes(planned.predicted_bytes)}, powers of 1000)",
    ]
    if planned.footprint:
        found = planned.footprint
        lines.append(
            f"running    {say_bytes(found.memory)} of memory at {planned.budget.context:,} tokens of context, "
            f"{found.speed:.1f} tokens/s (its layout, measured here); {planned.binding}"
        )
    if planned.plan:
        before, after = planned.sizes.original, planned.plan.shape
        lines += [
            f"shape      {before.blocks} blocks -> {after.blocks}, FFN {before.ffn} -> {after.ffn} channels"
            + (f", {planned.plan.vocabulary:,} tokens kept" if planned.plan.vocabulary else ""),
            f"damage     {planned.plan.damage + planned.engine:.3f} nats per token expected before recovery: "
            f"{planned.plan.damage:.3f} {_how_measured(planned.plan)}, {planned.engine:.3f} by the engine's 8-bit "
            "activations",
        ]
        if planned.decision and len(planned.decision.rivals) > 1:
            lines += ["candidates, each to be built and measured (expected damage before recovery)"]
            lines += [f"  {plan.describe():<40}{plan.damage:.3f}" for plan in planned.decision.rivals]
        lines += ["", *unit_lines(planned.plan.units), ""]
    return [*lines, "recipe", *(f"  {line}" for line in to_yaml(planned.recipe).splitlines())]


def _how_measured(plan: Plan) -> str:
    if not plan.measured:
        return "by measured parts"
    others = [f"{kl:.3f}" for kl in plan.measured if kl != plan.damage]
    return "measured on the whole mix" + (f" (other mixes that were tried: {', '.join(others)})" if others else "")


def unit_lines(units: dict[str, tuple[str, int, float]]) -> list[str]:
    """Lay out which format each part gets, its bytes and its share of the expected KL; blocks alike in one line."""
    whole = sum(damage for *_, damage in units.values()) or 1.0
    rows: dict[tuple[str, str], tuple[list[int], int, float]] = {}
    for unit, (form, size, damage) in units.items():
        block, _, group = unit.rpartition(".")
        blocks, total, share = rows.get((group, form), ([], 0, 0.0))
        rows[group, form] = ([*blocks, int(block)] if block else blocks, total + size, share + damage / whole)
    lines = [f"{'tensors':<18}{'format':<9}{'bytes':>13}{'share of KL':>13}  blocks"]
    for (group, form), (blocks, total, share) in sorted(rows.items()):
        lines.append(f"{group:<18}{form:<9}{total:>13,}{share:>13.1%}  {_ranges(blocks)}")
    return lines


def _ranges(numbers: list[int]) -> str:
    """Return 0, 1, 2, 5 as `0-2 5`."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return " ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def result_lines(report: Report, out: Path) -> list[str]:
    """Say what a run came to."""
    tried = [
        f"{trial.name + ' (chosen)' * trial.won:<40}perplexity x{trial.perplexity_ratio.value:.3f} "
        f"({trial.perplexity_ratio.low:.3f} to {trial.perplexity_ratio.high:.3f}) after {trial.tokens:,} tokens"
        for trial in report.trials
    ]
    return [
        *(["candidates, built and read on validation text:", *tried] if tried else []),
        *(finding.sentence for finding in judge(report).values()),
        f"wrote {out}: open {out / 'report.html'}",
    ]


def integer_lines(made: IntegerFolder, out: Path) -> list[str]:
    """Say what an integer export came to."""
    return [
        f"{made.actual_bytes:,} bytes of weights ({made.predicted_bytes:,} predicted without the header)",
        *quality_lines(made.quality),
        f"wrote {out}: {out / 'model'} loads in transformers and vLLM",
    ]


def pruned_lines(made: Pruned, out: Path) -> list[str]:
    """Say what each step of a pruning chose and what the model behind it is worth."""
    per_byte = made.cuts[0].quality.bits_per_byte is not None
    measure = "bits per byte" if per_byte else "KL (nats/token)"
    lines = [f"{'step':<17}{'parameters':>13}  {'perplexity':<26}{measure:<28}chosen"]
    for cut in made.cuts:
        quality = cut.quality
        cells = four_digits(quality.perplexity), four_digits(quality.bits_per_byte if per_byte else quality.kl)
        lines.append(f"{cut.step:<17}{cut.parameters:>13,}  {cells[0]:<25} {cells[1]:<27} {cut.summary}")
    if per_byte:
        lines.append("the vocabularies differ: there is no KL, and perplexity counts the original's tokens for all")
    if made.bitmask_bytes is not None:
        lines.append(
            f"{out / 'bitmask'} has the weights without their zeros in {made.bitmask_bytes:,} bytes, on disk alone "
            "(compressed-tensors' sparse-bitmask); a GGUF file stores zeros like any other number"
        )
    return [
        *lines,
        "read in llama.cpp on text that no step has seen; in brackets: 95 % intervals, bootstrap over windows, paired",
        *_healing(made),
        f"wrote {out}: {out / 'hf'} loads in transformers, {out / 'model.gguf'} in llama.cpp "
        f"({made.actual_bytes:,} bytes, {made.predicted_bytes:,} predicted); the choices are in {out / 'choices.html'}",
    ]


def _healing(made: Pruned) -> list[str]:
    """Say how much is gone and what heals that; nothing where nothing is gone."""
    removed = 1 - made.cuts[-1].parameters / made.cuts[0].parameters
    gone = [f"{removed:.1%} of the parameters are gone"] if removed > 0 else []
    if any(cut.step == "sparsify" for cut in made.cuts):
        zeros = "distillation would fill the zeros again: --heal lets the model learn before they are made"
        return ["; ".join([*gone, zeros])]
    return [f"{each}: about {made.healing_tokens:,} tokens of distillation usually heal that" for each in gone]


def distilled_lines(made: Distilled, out: Path) -> list[str]:
    """Say what a distillation did and what came of it."""
    before, after = made.parameters
    return [
        *made.summaries,
        *quality_lines(made.qualities),
        f"{made.tokens:,} tokens at {made.details['tokens_per_second']:,.0f} tokens/s; "
        f"{after:,} parameters where the teacher has {before:,}",
        f"wrote {out}: {out / 'hf'} loads in transformers, {out / LOSSES} has every step; "
        f"`pocketlm quantize {out / 'hf'}` makes a small file of it",
    ]


def inspection_lines(found: Inspection) -> list[str]:
    """Lay a model's parts out as a table."""
    lines = [
        f"{found.name}: {found.family}, {found.parameters:,} parameters, {say_bytes(found.bytes)} "
        f"({'tied' if found.tied else 'separate'} embedding and head, "
        f"{'chat template' if found.chat else 'no chat template'}, licence {found.license or 'not stated'})",
        "shape: " + ", ".join(f"{name} {size:,}" for name, size in found.shape.items()),
        "",
        f"{'part':<12}{'parameters':>14}{'bytes':>14}{'share':>8}  stored as",
    ]
    for part in found.parts:
        share = part.bytes / found.bytes
        formats = ", ".join(part.formats)
        lines.append(f"{part.name:<12}{part.parameters:>14,}{part.bytes:>14,}{share:>8.1%}  {formats}")
    lines += ["", f"{'group':<18}{'row length':>11}  formats that fit"]
    for group, (rows, formats) in found.formats.items():
        lines.append(f"{group:<18}{rows:>11}  {', '.join(formats)}")
    least = f"{say_bytes(found.smallest)} ({found.smallest:,} bytes)"
    return [*lines, "", f"fit can meet {least} to {say_bytes(found.largest)}, and less where --data lets tokens go"]


def task_lines(results: list[TaskResult]) -> list[str]:
    """Lay scores on tasks out as a table, 95 % intervals in brackets, in percent."""
    lines = [f"{'task':<20}{'':<12}{'items':>6}  {'acc':<22}acc_norm"]
    for result in results:
        for role, score in result.scores.items():
            normed = "" if score.acc_norm is None else _percent(score.acc_norm)
            found = ", ".join(f"{fault}: {count}" for fault, count in score.faults.items())
            lines.append(
                f"{result.task:<20}{role:<12}{score.count:>6}  {_percent(score.acc):<22}{normed}{found}".rstrip()
            )
        if paired := result.paired:
            verdict = "within noise" if paired.within_noise else "more than noise"
            change = f"{result.measure} {_percent(paired.difference, '+.1f')}: {verdict}"
            lines.append(f"{'':<20}{'difference':<12}{'':>6}  {change}; {paired.lost} items lost, {paired.won} won")
    return [*lines, "in brackets: 95 % intervals (Wilson; the difference is paired, bootstrap over items)"]


def harness_lines(scores: list[HarnessScore]) -> list[str]:
    """Lay scores of lm-evaluation-harness out as a table, 95 % intervals in brackets."""
    lines = [f"{'task':<24}{'metric':<16}{'':<12}{'items':>6}"]
    for score in scores:
        rows = score.scores | ({} if score.difference is None else {"difference": score.difference})
        for role, share in rows.items():
            value = f"{share.value:.4f} ({share.low:.4f} to {share.high:.4f})"
            lines.append(f"{score.task:<24}{score.metric:<16}{role:<12}{score.items:>6}  {value}")
    how = "Wilson of shares, normal of other means; the difference is paired, bootstrap over items"
    return [*lines, f"in brackets: 95 % intervals ({how})"]


def _percent(share: Interval, form: str = ".1f") -> str:
    value, low, high = (format(100 * number, form) for number in (share.value, share.low, share.high))
    return f"{value}% ({low} to {high})"


def quality_lines(qualities: dict[str, Quality]) -> list[str]:
    """Lay qualities out as a table, intervals in brackets."""
    per_byte = any(quality.bits_per_byte for quality in qualities.values())
    head = f"{'':<16}{'perplexity':<26}{'ratio':<26}{'KL (nats/token)':<26}{'agreement':<26}"
    lines = [head + "bits per byte" if per_byte else head]
    for name, quality in qualities.items():
        cells = (quality.perplexity, quality.ratio, quality.kl, quality.agreement, quality.bits_per_byte)
        lines.append(f"{name:<16}" + "".join(f"{four_digits(value):<25} " for value in cells).rstrip())
    if per_byte:
        lines.append("the vocabularies differ: there is no KL, and perplexity counts the reference's tokens for both")
    return [*lines, "in brackets: 95 % intervals, bootstrap over windows, paired"]


def evaluation_lines(made: Evaluation, asked: int) -> list[str]:
    """Lay an evaluation out, with the text that it was made on."""
    fewer = f"; {asked:,} were asked for, it has no more" if made.text.windows < asked else ""
    return [*quality_lines(made.qualities), f"{text_used(made.text)}{fewer}"]


def speed_lines(speeds: Speeds) -> list[str]:
    """Lay speeds out as a table, with how much faster than the first the other files are."""
    heads = ("bytes", "prefill tok/s", "decode tok/s", "first token s", "load s", "memory", "J/token")
    lines = [
        f"{speeds.engine}, {speeds.threads} threads, {speeds.prompt} tokens read, {speeds.generate} generated",
        f"{'file':<32}" + "".join(f"{head:>16}" for head in heads),
    ]
    names = [model_name(file.path) for file in speeds.files]
    for name, file in zip(names, speeds.files, strict=True):
        cells = (
            f"{file.file_bytes:,}",
            _spread(file.prefill, 1),
            _spread(file.decode, 1),
            _spread(file.first_token, 3),
            _spread(file.load_seconds, 2),
            say_bytes(file.memory_bytes.mean),
            _spread(file.joules_per_token, 3) if file.joules_per_token else "not available",
        )
        lines.append(f"{name:<32}" + "".join(f"{cell:>16}" for cell in cells))
    return lines + [
        f"{name} reads {_spread(file.prefill_ratio, 2)} times and writes {_spread(file.decode_ratio, 2)} "
        f"times as fast as {names[0]}"
        for name, file in zip(names[1:], speeds.files[1:], strict=True)
    ]


def _spread(figure: Figure, places: int) -> str:
    return f"{figure.mean:.{places}f} ± {figure.deviation:.{places}f}"


def doctor_lines(found: dict[str, Any]) -> list[str]:
    """Lay facts out, one per line."""
    return [f"{name:<24}{value}" for name, value in found.items()]


def cache_lines(folder: str, kept: list[tuple[str, int]], emptied: bool) -> list[str]:
    """List the stages in the cache."""
    lines = [f"{say_bytes(size):>10}  {name}" for name, size in kept]
    total = say_bytes(sum(size for _, size in kept))
    last = f"deleted {total}" if emptied else f"{total} in {folder}; `pocketlm clean --yes` empties it"
    return [*lines, last]
