"""What a run says of itself besides its figures: settings, budget, candidates, and notes."""

import math
from pathlib import Path

from pocketlm.pipeline.artefact import Run, sensitivity_of
from pocketlm.pipeline.planning import Fit, Planned
from pocketlm.pipeline.proof import Proof
from pocketlm.pipeline.trials import Search, alone_of
from pocketlm.plan.budget import parse_accuracy, parse_quality, say_bytes
from pocketlm.plan.footprint import Footprint, measure_file
from pocketlm.plan.recipe import to_yaml
from pocketlm.report.content import BudgetFacts, Estimate, TrialRun


def run_facts(job: Fit, planned: Planned, exported: Path, proof: Proof) -> Run:
    """Return what a report needs to know of a run besides its figures."""
    actual = exported.stat().st_size
    budget = BudgetFacts(planned.budget.text, planned.budget.bytes, planned.predicted_bytes, actual)
    kept = [group for group in planned.sizes.group_names if planned.sizes.allowed(group) == ["F16"]]
    notes = [f"{group} stays F16: its rows do not divide by 32" for group in kept]
    if not planned.sizes.anatomy.uniform_blocks:
        notes.append("no blocks were dropped: this family's blocks alternate in kind")
    if planned.engine:
        notes.append(
            f"llama.cpp rounds activations to 8 bits: that alone costs {planned.engine:.4f} nats per token, measured "
            "on a Q8_0 file of the original"
        )
    reached = proof.quality.qualities["compressed"].kl
    if job.quality and planned.plan and reached:
        expected = math.exp(-planned.plan.damage - planned.engine)
        notes.append(
            f"Quality asked for, as exp(-KL): at least {parse_quality(job.quality):g}; expected {expected:.3f}, "
            f"measured {math.exp(-reached.value):.3f} ({math.exp(-reached.high):.3f} to {math.exp(-reached.low):.3f})"
        )
    if job.accuracy:
        (result,) = proof.tasks
        found = getattr(result.scores["model"], result.measure)
        notes.append(
            f"Accuracy asked for on {result.task}: at least {parse_accuracy(job.accuracy):g}; the file has "
            f"{found.value:.3f} ({found.low:.3f} to {found.high:.3f})"
        )
    if planned.search:
        notes.append(_search_note(planned.search))
    if planned.footprint:
        notes.append(_running_note(planned, measure_file(exported, planned.budget.context)))
    settings = {"data": [str(path) for path in job.data], "heal seconds": job.heal, "size": job.size}
    settings |= {"tune seconds": job.tune, "method": job.method, "pruning allowed": job.prune}
    settings |= {"preset": job.preset, "time": job.time}
    parts = sensitivity_of(planned.plan, planned.decision.damages) if planned.decision else None
    return Run(job.command, settings, job.seed, budget, to_yaml(planned.recipe), tuple(notes), tried(planned), parts)


def tried(planned: Planned) -> tuple[TrialRun, ...]:
    """Return a run's candidates for its report."""
    found = planned.search
    return tuple(
        TrialRun(
            name=trial.plan.describe(),
            bytes=trial.bytes,
            expected_kl=trial.plan.damage,
            kl=trial.kl,
            perplexity_ratio=Estimate(**vars(trial.ratio)),
            tokens=trial.tokens,
            seconds=trial.seconds,
            won=trial is found.winner,
        )
        for trial in (found.trials if found else ())
    )


def _search_note(found: Search) -> str:
    won, names = found.winner, [trial.plan.describe() for trial in found.trials]
    simple = alone_of(found.trials)
    text = f"Built and measured on validation text: {'; '.join(names)}. "
    if simple is None or len(names) == 1:
        text += f"Best: {won.plan.describe()}"
    elif won is simple:
        text += "Formats alone won: nothing that prunes was better by more than noise"
    else:
        ratio = won.against(simple)
        text += f"Best: {won.plan.describe()}, {ratio.value:.3f} of the perplexity of formats alone "
        text += f"({ratio.low:.3f} to {ratio.high:.3f})"
    return text + (f". There was no time for {found.untried} more" if found.untried else "")


def _running_note(planned: Planned, found: Footprint) -> str:
    expected, budget = planned.footprint, planned.budget
    return (
        f"Of {budget.text}, {planned.binding} binds. Memory of the model at {budget.context:,} tokens of context: "
        f"{say_bytes(expected.memory)} expected, {say_bytes(found.memory)} measured on the file; generating: "
        f"{expected.speed:.1f} tokens/s expected, {found.speed:.1f} measured"
    )
