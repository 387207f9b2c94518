"""The stages in front of a recipe: what formats, widths and blocks cost, each measured once, and the plan from them."""

from dataclasses import asdict, replace
from pathlib import Path

import torch

from pocketlm.measure.device import machine
from pocketlm.model.language_model import LanguageModel
from pocketlm.pipeline.cache import is_finished, stage
from pocketlm.pipeline.stages import Progress, Texts
from pocketlm.plan.decide import (
    Decision,
    Wanted,
    decide,
    depth_wanted,
    may_prune,
    measure_depth,
    measure_formats,
    measure_widths,
    read_decision,
    tuning,
)
from pocketlm.plan.footprint import Costs, measure_costs
from pocketlm.plan.pace import tuned_tokens_in
from pocketlm.plan.recipe import Recipe
from pocketlm.plan.search import Damages
from pocketlm.plan.sizes import Sizes, sizes_of


def costs_here(model: LanguageModel, sizes: Sizes, context: int, progress: Progress) -> Costs:
    """Return what each format costs in the engine on this machine; measured once per model and context."""
    inputs = {"model": model.origin.key, "cpu": machine().cpu, "context": context}
    inputs |= {"threads": torch.get_num_threads()}
    done = stage("costs", inputs, lambda folder: asdict(measure_costs(model, sizes, context, progress)))
    return Costs(**done.facts)


def tuned_for(model: LanguageModel, recipe: Recipe, texts: Texts, seconds: float) -> Recipe:
    """Return a recipe that also tunes for a time, turned into tokens once, so that a resumed run does the same."""
    formats = recipe.steps[-1].formats
    inputs = {"formats": formats, "seconds": seconds, **_of_text(model, texts)}
    timed = stage("tune-tokens", inputs, lambda _: tuned_tokens_in(model, texts.calibration, seconds, formats))
    return replace(recipe, steps=(*recipe.steps, tuning(timed.facts, recipe.seed)))


def damages_known(model: LanguageModel, texts: Texts) -> bool:
    """Whether an earlier run measured what each format costs."""
    return is_finished("damage", _of_text(model, texts))


def _of_text(model: LanguageModel, texts: Texts) -> dict[str, str]:
    """Return the hashes of what damages are measured on."""
    return {"model": model.origin.key, **texts.sha256}


def make_plan(model: LanguageModel, wanted: Wanted, texts: Texts, seed: int, progress: Progress) -> Decision:
    """Return the recipe for a budget; the same question is answered from the cache."""
    damages = measure_damages(model, wanted, texts, progress)
    both, documents = (texts.calibration, texts.validation), texts.documents["calibration"]

    def produce(_: Path) -> dict:
        return asdict(decide(model, wanted, damages, both, documents, seed, progress))

    inputs = {"wanted": asdict(wanted), "seed": seed, **_of_text(model, texts)}
    return read_decision(stage("plan", inputs, produce).facts)


def measure_damages(model: LanguageModel, wanted: Wanted, texts: Texts, progress: Progress) -> Damages:
    """Return what each thing that a plan may do costs, measured once per model and text, whatever the budget.

    Of pruning where nearly free formats do not meet the budget. How many blocks may be dropped decides how many are
    tried in each round, so that each such number has a path of its own, whatever was measured before.
    """
    of_text = _of_text(model, texts)
    sizes, both = sizes_of(model), (texts.calibration, texts.validation)
    measured = stage("damage", of_text, lambda folder: {"formats": measure_formats(model, *both, progress)})
    formats = measured.facts["formats"]
    if not may_prune(sizes, wanted):
        return Damages(formats=formats)
    widths = stage("damage-width", of_text, lambda folder: measure_widths(model, *both, progress)).facts
    most, enough = depth_wanted(sizes, wanted, formats)
    key = of_text | {"most": most, "enough": enough}
    path = stage("damage-depth", key, lambda folder: measure_depth(model, both[1], most, enough, progress)).facts
    return Damages(
        depth=tuple((block, kl) for block, kl in path),
        width={int(width): kl for width, kl in widths.items()},
        formats=formats,
    )
