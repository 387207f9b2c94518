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
from pocketlm.pipeline.plan_stages import make_plan
from pocketlm.pipeline.scoring import score_tasks
from pocketlm.pipeline.stages import Progress, Texts, run_recipe
from pocketlm.plan.decide import Wanted
from pocketlm.plan.recipe import Recipe, to_dict

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
    recipes = {quality: _recipe(model, alone, engine, texts, quality, progress) for quality in QUALITIES}
    met = [quality for quality in QUALITIES if recipes[quality]]
    if not met:
        raise ImpossibleBudgetError(
            f"An accuracy of {least:g} on {task.name} cannot be met within {wanted.budget.text}: formats alone expect "
            f"less than a quality of {QUALITIES[-1]:g} there. Ask for a larger budget"
        )
    first = _accuracy(model, recipes[met[0]], texts, task, progress)
    if first < least:
        raise ImpossibleBudgetError(
            f"An accuracy of {least:g} on {task.name} cannot be met: the best file within what else is asked for is "
            f"right in {first:.3f} of {len(task.items)}. Ask for less --accuracy, or teach the task first "
            "(pocketlm distill --task)"
        )
    enough, too_low = 0, len(met)
    while too_low - enough > 1:
        middle = (enough + too_low) // 2
        reached = _accuracy(model, recipes[met[middle]], texts, task, progress) >= least
        enough, too_low = (middle, too_low) if reached else (enough, middle)
    return met[enough]


def _recipe(
    model: LanguageModel, wanted: Wanted, engine: float, texts: Texts, quality: float, progress: Progress
) -> Recipe | None:
    """Return the fewest bytes for a quality; None where the other budgets do not allow it."""
    try:
        return make_plan(model, replace(wanted, most_damage=-math.log(quality) - engine), texts, 0, progress).recipe
    except ImpossibleBudgetError:
        return None


def _accuracy(model: LanguageModel, recipe: Recipe, texts: Texts, task: Task, progress: Progress) -> float:
    def produce(folder: Path) -> dict[str, float]:
        made = run_recipe(model, recipe, texts, progress)
        write_gguf(made.model, made.packed, folder / "model.gguf")
        (found,) = score_tasks({"model": (folder / "model.gguf", made.model)}, [task], progress)
        return {"accuracy": getattr(found.scores["model"], found.measure).value}

    inputs = {"model": model.origin.key, "recipe": to_dict(recipe), "task": asdict(task), **texts.sha256}
    accuracy = stage("accuracy", inputs, produce).facts["accuracy"]
    progress(f"accuracy on {task.name}: {accuracy:.3f}", 1, 1)
    return accuracy
