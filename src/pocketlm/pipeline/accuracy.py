"""A floor of accuracy on a task, as the floor of quality that keeps it.

Accuracy cannot be predicted from damages, so it is measured: formats alone at a few floors of quality, by bisection.
"""

import math
from dataclasses import asdict, replace
from pathlib import Path

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.export.gguf import write_gguf
from pocketlm.measure.task_files import Task
from pocketlm.model.language_model import LanguageModel
from pocketlm.pipeline.cache import stage
from pocketlm.pipeline.local_search import improve
from pocketlm.pipeline.plan_stages import make_plan
from pocketlm.pipeline.scoring import score_tasks
from pocketlm.pipeline.stages import Progress, Texts, run_recipe
from pocketlm.plan.decide import Decision, Wanted
from pocketlm.plan.recipe import to_dict

QUALITIES = (0.99, 0.97, 0.93, 0.85, 0.7, 0.5)  # exp(-KL), one of which is taken


def quality_for(
    model: LanguageModel, wanted: Wanted, engine: float, texts: Texts, task: Task, least: float, progress: Progress
) -> float:
    """Return the lowest of some floors of quality at which formats alone still reach an accuracy on a task.

    Args:
        model: The original; unchanged afterwards.
        wanted: What else the person asks for.
        engine: KL that the engine's 8-bit activations add.
        texts: Calibration and validation.
        task: What to be accurate on.
        least: The accuracy, of 1.
        progress: Called as the work goes on.

    Raises:
        ImpossibleBudgetError: Within what else is asked for, nothing reaches it.
    """
    effort = replace(wanted.effort, windows=wanted.effort.trial_windows)
    alone = replace(wanted, prune=False, effort=effort, heal_seconds=None, tune_seconds=0.0)
    allowed = {q: replace(alone, most_damage=-math.log(q) - engine) for q in QUALITIES}
    decisions = {quality: _decision(model, each, texts, progress) for quality, each in allowed.items()}
    met = [quality for quality in QUALITIES if decisions[quality]]

    def reached(quality: float) -> float:
        return _accuracy(model, allowed[quality], decisions[quality], texts, task, progress)

    if not met:
        raise ImpossibleBudgetError(
            f"An accuracy of {least:g} on {task.name} cannot be met within {wanted.budget.text}: formats alone expect "
            f"less than a quality of {QUALITIES[-1]:g} there. Ask for a larger budget"
        )
    first = reached(met[0])
    if first < least:
        raise ImpossibleBudgetError(
            f"An accuracy of {least:g} on {task.name} cannot be met: within what else is asked for, a file of quality "
            f"{met[0]:g} is right in {first:.3f} of {len(task.items)}. Ask for less --accuracy, or teach the task "
            "first (pocketlm distill --task)"
        )
    enough, too_low = 0, len(met)
    while too_low - enough > 1:
        middle = (enough + too_low) // 2
        enough, too_low = (middle, too_low) if reached(met[middle]) >= least else (enough, middle)
    return met[enough]


def _decision(model: LanguageModel, wanted: Wanted, texts: Texts, progress: Progress) -> Decision | None:
    """Return the fewest bytes for an allowed KL; None where the other budgets do not allow it."""
    try:
        return make_plan(model, wanted, texts, 0, progress)
    except ImpossibleBudgetError:
        return None


def _accuracy(
    model: LanguageModel, wanted: Wanted, decision: Decision, texts: Texts, task: Task, progress: Progress
) -> float:
    # Improved as the run itself will be: a mix as it was planned loses less than it may.
    recipe = improve(model, wanted, decision, texts, progress).recipe

    def produce(folder: Path) -> dict[str, float]:
        made = run_recipe(model, recipe, texts, progress)
        write_gguf(made.model, made.packed, folder / "model.gguf")
        (found,) = score_tasks({"model": (folder / "model.gguf", made.model)}, [task], progress)
        return {"accuracy": getattr(found.scores["model"], found.measure).value}

    inputs = {"model": model.origin.key, "recipe": to_dict(recipe), "task": asdict(task), **texts.sha256}
    accuracy = stage("accuracy", inputs, produce).facts["accuracy"]
    progress(f"accuracy on {task.name}: {accuracy:.3f}", 1, 1)
    return accuracy
