"""Decide a recipe for a budget: measure what hurts, choose what hurts least."""

import copy
import time
from dataclasses import asdict, dataclass

from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.text import Tokens
from pocketlm.plan.budget import Budget
from pocketlm.plan.recipe import Recipe
from pocketlm.plan.search import Damages, Plan, check_budget, choose, needs_pruning
from pocketlm.plan.sensitivity import Progress, depth_damage, format_damage, width_damage
from pocketlm.plan.sizes import MULTIPLE, Shape, Sizes, sizes_of, smallest_shape
from pocketlm.steps.distil import Distil, distil
from pocketlm.steps.prune_depth import PruneDepth
from pocketlm.steps.prune_width import PruneWidth
from pocketlm.steps.quantize import Quantize

JUDGING_WINDOWS = 2  # of held-out text, on which damages are measured
WIDTH_WINDOWS = 8  # of calibration text, from which narrower FFNs are solved
HEAL_TOKENS = 12_288  # of distillation after pruning where the person gives no time
TIMED_STEPS = 3


@dataclass(frozen=True)
class Decision:
    """A recipe and what it was decided from."""

    recipe: Recipe
    plan: Plan
    damages: Damages


def measure_damages(
    model: LanguageModel,
    sizes: Sizes,
    budget: Budget,
    calibration: Tokens,
    validation: Tokens,
    progress: Progress,
) -> Damages:
    """Measure everything that a plan for `budget` may do; pruning only where formats alone cannot meet it."""
    windows = validation.first(JUDGING_WINDOWS)
    opinion = judge(model.network, windows)
    formats = format_damage(model, sizes, windows, opinion, progress)
    if not needs_pruning(sizes, budget):
        return Damages((), {}, formats)
    floor = smallest_shape(sizes)
    fractions = (7 / 8, 3 / 4, 1 / 2)
    widths = {int(sizes.original.ffn * share) // MULTIPLE * MULTIPLE for share in fractions} | {floor.ffn}
    widths = sorted(width for width in widths if floor.ffn <= width < sizes.original.ffn)
    width = (
        width_damage(model.network, calibration.first(WIDTH_WINDOWS), windows, opinion, widths, progress)
        if widths
        else {}
    )
    most = min(sizes.original.blocks - floor.blocks, _blocks_needed(sizes, budget))
    depth = depth_damage(model.network, windows, opinion, most, progress)
    return Damages(tuple(depth), width, formats)


def _blocks_needed(sizes: Sizes, budget: Budget) -> int:
    """Return how many blocks would have to go if nothing else was pruned."""
    least = {group: sizes.allowed(group)[-1] for group in sizes.group_names}
    whole = sizes.total(sizes.original, least)
    one = whole - sizes.total(Shape(sizes.original.blocks - 1, sizes.original.ffn), least)
    return -(-(whole - budget.bytes) // one)


def decide(
    model: LanguageModel,
    budget: Budget,
    calibration: Tokens,
    validation: Tokens,
    heal_seconds: float | None,
    seed: int,
    progress: Progress,
) -> Decision:
    """Return the recipe that meets a budget with the least expected damage.

    Args:
        model: The original; unchanged afterwards.
        budget: Bytes of the file.
        calibration: Text to solve narrower FFNs on.
        validation: Text that damages are measured on.
        heal_seconds: Time for recovery after pruning, turned into tokens by timing a few steps here and now; a fixed
            number of tokens where None.
        seed: Of everything random in the recipe.
        progress: Called with what is measured, how much is done and how much there is.

    Raises:
        ImpossibleBudgetError: No plan meets the budget.
    """
    sizes = sizes_of(model)
    check_budget(sizes, budget)
    damages = measure_damages(model, sizes, budget, calibration, validation, progress)
    plan = choose(sizes, damages, budget)
    steps: list = []
    if plan.drop:
        steps.append(PruneDepth(drop=plan.drop))
    if plan.shape.ffn != sizes.original.ffn:
        steps.append(PruneWidth(ffn=plan.shape.ffn))
    if steps and heal_seconds != 0:
        tokens = HEAL_TOKENS if heal_seconds is None else _tokens_in(model, calibration, heal_seconds)
        steps.append(Distil(tokens=tokens, seed=seed))
    steps.append(Quantize(formats=plan.formats))
    return Decision(Recipe(steps=tuple(steps), seed=seed), plan, damages)


def _tokens_in(model: LanguageModel, calibration: Tokens, seconds: float) -> int:
    """Return how many tokens of distillation fit into a time on this machine, to two digits."""
    trial = LanguageModel(copy.deepcopy(model.network), model.tokenizer, model.origin)
    config = Distil(tokens=1)
    batch = calibration.first(config.windows_per_step)
    config = Distil(tokens=TIMED_STEPS * batch.numel(), evaluations=1)
    began = time.monotonic()
    distil(model, trial, config, batch, batch[:1])
    tokens = int(0.9 * seconds * config.tokens / (time.monotonic() - began))
    digits = max(0, len(str(tokens)) - 2)
    return max(batch.numel(), tokens // 10**digits * 10**digits)


def as_facts(decision: Decision) -> dict:
    """Return a decision's plan and damages as plain data."""
    return {"plan": asdict(decision.plan), "damages": asdict(decision.damages)}
