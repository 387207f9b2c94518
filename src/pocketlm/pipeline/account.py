"""What a run says of itself besides its figures: settings, budget, candidates, and notes."""

import math
import time
from collections.abc import Sequence
from pathlib import Path

from pocketlm.model.gguf_file import TYPES, read_gguf
from pocketlm.pipeline.artefact import Run, sensitivity_of
from pocketlm.pipeline.planning import Fit, Planned
from pocketlm.pipeline.proof import Proof
from pocketlm.pipeline.trials import Search, alone_of
from pocketlm.plan.budget import Budget, parse_accuracy, parse_quality, say_bytes
from pocketlm.plan.effort import PRESET
from pocketlm.plan.footprint import ROUNDS, Footprint, measure_file
from pocketlm.plan.recipe import Recipe, learnt_tokens, to_yaml
from pocketlm.report.content import BudgetFacts, LimitFacts, TrialRun
from pocketlm.report.wording import duration


def run_facts(job: Fit, planned: Planned, exported: Path, proof: Proof, began: float, seen: Sequence[str] = ()) -> Run:
    """Return what a report needs to know of a run besides its figures.

    Args:
        job: What was asked for.
        planned: What was done about it.
        exported: The file.
        proof: Its figures.
        began: When the run did, by the monotonic clock.
        seen: What there is to say of tasks whose items were learnt from.
    """
    actual = exported.stat().st_size
    running = measure_file(exported, planned.budget.context) if planned.footprint else None
    asked = planned.budget.bytes if planned.budget.sized else None
    limits, seconds = _limits(job, planned.budget, proof, running), time.monotonic() - began
    text = planned.budget.text
    if job.time:
        limits = (*limits, _time_limit(job.time, seconds))
        text += f", {limits[-1].text}"
    budget = BudgetFacts(text, asked, planned.predicted_bytes, actual, limits)
    kept = [group for group in planned.sizes.group_names if planned.sizes.allowed(group) == ["F16"]]
    notes = _about_original(proof.files["original"])
    notes += [f"{group} stays F16: its rows do not divide by 32" for group in kept]
    if not planned.sizes.anatomy.uniform_blocks:
        notes.append("no blocks were dropped: this family's blocks alternate in kind")
    if planned.engine:
        notes.append(
            f"llama.cpp rounds activations to 8 bits: that alone costs {planned.engine:.4f} nats per token, measured "
            "on a Q8_0 file of the original"
        )
    if job.quality and planned.plan:
        expected = math.exp(-planned.plan.damage - planned.engine)
        notes.append(f"Quality, as exp(-KL): {expected:.3f} was expected of the plan")
    if planned.search:
        floor = planned.wanted is not None and planned.wanted.most_damage is not None
        notes.append(_search_note(planned.search, planned.recipe, floor))
    if running:
        notes.append(_running_note(planned, running))
    notes += seen
    settings = {"data": [str(path) for path in job.data], "heal seconds": job.heal, "size": job.size}
    settings |= {"tune seconds": job.tune, "time": job.time, "tasks": [str(path) for path in job.tasks]}
    limits_and_formats = ("ram", "context", "speed", "quality", "accuracy", "bits", "format", "fixed")
    settings |= {name: getattr(job, name) for name in limits_and_formats if getattr(job, name)}
    if not job.recipe:  # which says all that is done
        settings |= {"method": job.method, "pruning allowed": job.prune, "preset": job.preset or PRESET}
    parts = sensitivity_of(planned.plan, planned.decision.damages) if planned.decision else None
    return Run(
        command=job.command,
        settings=settings,
        seed=planned.recipe.seed,
        budget=budget,
        recipe=to_yaml(planned.recipe),
        notes=tuple(notes),
        trials=tried(planned),
        sensitivity=parts,
        seconds=seconds,
        learnt={"plain": planned.alone.tokens if planned.alone else 0, "compressed": learnt_tokens(planned.recipe)},
    )


def _about_original(file: Path) -> list[str]:
    """Say what the file is that all is compared with, where it is a quantized one."""
    types = {tensor.type for tensor in read_gguf(file).tensors.values()}
    quantized = sorted(kind for kind in types if TYPES[kind].block > 1)
    if not quantized:
        return []
    return [
        f"The original is itself a quantized file ({', '.join(quantized)}): losses and ratios are to that file, "
        "and come on top of what it lost to the model that it was made from"
    ]


def _limits(job: Fit, budget: Budget, proof: Proof, running: Footprint | None) -> tuple[LimitFacts, ...]:
    """Return what was asked for besides bytes, each beside what was measured of the file."""
    limits = []
    if running and budget.memory:
        text = f"{say_bytes(budget.memory)} of memory at {budget.context:,} tokens of context"
        limits.append(LimitFacts(text, say_bytes(running.memory), running.memory <= budget.memory))
    if running and budget.speed:
        limits.append(LimitFacts(f"{budget.speed:g} tokens/s", f"{running.speed:.1f}", running.speed >= budget.speed))
    kl = proof.quality.qualities["compressed"].kl
    if job.quality and kl:
        floor = parse_quality(job.quality)
        value, low, high = (math.exp(-each) for each in (kl.value, kl.high, kl.low))
        limits.append(LimitFacts(f"quality {floor:g}", f"{value:.3f} ({low:.3f} to {high:.3f})", value >= floor))
    if job.accuracy:
        (result,), floor = proof.tasks, parse_accuracy(job.accuracy)
        found = getattr(result.scores["model"], result.measure)
        measured = f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
        limits.append(LimitFacts(f"accuracy {floor:g} on {result.task}", measured, found.value >= floor))
    return tuple(limits)


def _time_limit(asked: float, took: float) -> LimitFacts:
    """Return a person's time beside what all but the writing of the report took."""
    text = duration(asked).removesuffix(" 00 s").removesuffix(" 00 min")
    over = f" ({duration(took - asked)} over)" if took > asked else ""
    return LimitFacts(f"{text} of time", duration(took) + over, took <= asked)


def tried(planned: Planned) -> tuple[TrialRun, ...]:
    """Return a run's candidates for its report."""
    found = planned.search
    return tuple(
        TrialRun(
            name=trial.plan.describe(),
            bytes=trial.bytes,
            expected_kl=trial.plan.damage,
            kl=trial.kl,
            perplexity_ratio=trial.ratio,
            tokens=trial.tokens,
            seconds=trial.seconds,
            won=trial is found.winner,
        )
        for trial in (found.trials if found else ())
    )


def _search_note(found: Search, recipe: Recipe, floor: bool) -> str:
    won, names = found.winner, [trial.plan.describe() for trial in found.trials]
    simple = alone_of(found.trials)
    text = f"Built and measured on validation text: {'; '.join(names)}. "
    if simple is None or len(names) == 1:
        text += f"Best: {won.plan.describe()}"
    elif floor:
        text += f"The smallest that keeps the floor of quality, or else what lost least: {won.plan.describe()}"
    elif won is simple:
        text += "Formats alone won: nothing that prunes was better by more than noise"
    else:
        ratio = won.against(simple)
        text += f"Best: {won.plan.describe()}, {ratio.value:.3f} of the perplexity of formats alone "
        text += f"({ratio.low:.3f} to {ratio.high:.3f}) after {won.tokens:,} and {simple.tokens:,} tokens. "
        text += f"The file has learnt from {learnt_tokens(recipe):,}, formats alone beside it from no more"
    return text + (f". There was no time for {found.untried} more" if found.untried else "")


def _running_note(planned: Planned, found: Footprint) -> str:
    expected, budget = planned.footprint, planned.budget
    return (
        f"Of {budget.text}, {planned.binding}. Memory of the model at {budget.context:,} tokens of context: "
        f"{say_bytes(expected.memory)} expected, {say_bytes(found.memory)} measured on the file; generating: "
        f"{expected.speed:.1f} tokens/s expected, {found.speed:.1f} measured, each the middle of {ROUNDS} runs"
    )
