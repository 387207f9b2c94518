"""Decide a recipe for a budget: measure what hurts, choose what hurts least, and what else is worth a try."""

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.model.judge import judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.text import Tokens
from pocketlm.plan.budget import Budget, highest_quality, say_bytes
from pocketlm.plan.effort import PRESETS, Effort
from pocketlm.plan.footprint import Costs, Footprint, measure_layout
from pocketlm.plan.pace import tokens_in, tuned_tokens_in
from pocketlm.plan.recipe import Recipe
from pocketlm.plan.search import Damages, Plan, candidate_shapes, choose
from pocketlm.plan.sensitivity import Progress, depth_damage, format_damage, vocabulary_damage, width_damage
from pocketlm.plan.sizes import (
    MULTIPLE,
    VOCABULARIES,
    Shape,
    Sizes,
    budget_range,
    recipe_bytes,
    sizes_of,
    smaller_vocabularies,
    smallest_shape,
)
from pocketlm.steps.distil import Distil
from pocketlm.steps.prune_depth import PruneDepth
from pocketlm.steps.prune_width import PruneWidth
from pocketlm.steps.quantize import Quantize, with_fixed
from pocketlm.steps.trim_vocabulary import TrimVocabulary, outline
from pocketlm.steps.tune import Tune

JUDGING_WINDOWS = 2  # of held-out text, on which damages are measured
FORMAT_WINDOWS = 16  # of calibration text, from which the codes of every format are chosen
WIDTH_WINDOWS = 8  # of calibration text, from which narrower FFNs are solved
LEARNING_RATE, RATE_TOKENS, HIGHEST_RATE = 6e-5, 12_288, 3e-4  # of healing: grows with the root of its tokens
NEW_TOKENS_RATE = 2e-4  # at least, where words are spelled in pieces that the model has hardly seen
# What fewer tokens cost, in nats a token, times the tokens to learn from: less of that teaches all weights nothing.
# With 32,768 of 49,152 tokens (0.5 % of a text spelled anew) 166,000 took the held-out KL from 0.146 to 0.144; with
# 16,384 (4.8 %) 130,000 took off a third of 0.6 to 0.7.
SPELLING_NATS = 40_000
# From so many tokens on, scales learn less than codes and scales in the same time, which is that of fewer tokens: on a
# line through what `Tune` names. One step took 1.13 to 1.15 times as long alone, a training beside other work 1.2.
CODES_FROM, CODES_TIME = 131_072, 1.2
EVALUATION_TOKENS = 24_576  # for each measuring of a training, four at most: it takes as long as to learn from 2,048
TRIES = 4  # of a layout whose measured memory and speed keep to the budget, each aimed a little lower


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a person asks for.

    Attributes:
        budget: What the device allows.
        costs: Of formats in the engine, where the budget is about memory or speed.
        prune: Whether parts may be removed.
        fixed: Formats by group or pattern that are not up for choice.
        method: How codes are chosen.
        effort: How many plans are worth a try, and from how many tokens a model learns.
        vocabulary: Whether the text is a person's own, so that tokens may be chosen by it.
        heal_seconds: Time for recovery after pruning, turned into tokens by timing a few steps when the plan is made;
            as many tokens as the effort says where None.
        tune_seconds: Time for tuning after quantizing, turned into tokens likewise.
        most_damage: The largest KL that the plan may expect; its bytes are the fewest for that. None for any.
        engine: KL that the engine's 8-bit activations add to what a plan expects.
    """

    budget: Budget
    costs: Costs | None = None
    prune: bool = True
    fixed: dict[str, str] = field(default_factory=dict)
    method: str = "descent"
    effort: Effort = PRESETS["fast"]
    vocabulary: bool = False
    heal_seconds: float | None = None
    tune_seconds: float = 0.0
    most_damage: float | None = None
    engine: float = 0.0

    def windows(self, candidates: int) -> int:
        """Return the windows of calibration text to quantize with, while so many candidates are tried."""
        return self.effort.windows if candidates < 2 else self.effort.trial_windows


@dataclass(frozen=True)
class Decision:
    """What to do, and what it was decided from.

    Attributes:
        recipe: Of the plan that is expected to be best.
        plan: That plan.
        damages: What was measured.
        rivals: All plans worth a try, that one among them: formats alone first, then by expected damage.
        heal: Tokens that a pruned model learns from.
        tune: Tokens that scales and norms learn from in any case.
    """

    recipe: Recipe
    plan: Plan
    damages: Damages
    rivals: tuple[Plan, ...]
    heal: int
    tune: int


_DECISION, _PLAN = TypeAdapter(Decision), TypeAdapter(Plan)


def measure_formats(
    model: LanguageModel, calibration: Tokens, validation: Tokens, progress: Progress
) -> dict[str, dict[str, float]]:
    """Return the damage of every unit in every format; it does not depend on the budget."""
    return format_damage(model, sizes_of(model), calibration.first(FORMAT_WINDOWS), validation.windows, progress)


def measure_widths(
    model: LanguageModel, calibration: Tokens, validation: Tokens, progress: Progress
) -> dict[int, float]:
    """Return the damage of some narrower FFNs; it does not depend on the budget."""
    sizes, windows = sizes_of(model), validation.first(JUDGING_WINDOWS)
    floor, whole = smallest_shape(sizes).ffn, sizes.original.ffn
    widths = {int(whole * share) // MULTIPLE * MULTIPLE for share in (7 / 8, 3 / 4, 1 / 2)} | {floor}
    widths = sorted(width for width in widths if floor <= width < whole)
    if not widths:
        return {}
    opinion = judge(model.network, windows)
    return width_damage(model.network, calibration.first(WIDTH_WINDOWS), windows, opinion, widths, progress)


def measure_depth(
    model: LanguageModel, validation: Tokens, most: int, enough: float, progress: Progress
) -> list[tuple[int, float]]:
    """Return the damage of dropping blocks: `most` at most, up to a damage of `enough`."""
    windows = validation.first(JUDGING_WINDOWS)
    return depth_damage(model.network, windows, judge(model.network, windows), most, progress, enough)


def may_prune(sizes: Sizes, wanted: Wanted) -> bool:
    """Whether something may be removed, and nearly free formats alone do not meet the budget."""
    return wanted.prune and not nearly_free_fits(sizes, wanted.budget, wanted.costs, sizes.original)


def depth_wanted(sizes: Sizes, wanted: Wanted, formats: dict[str, dict[str, float]]) -> tuple[int, float]:
    """Return how many blocks are worth a try, and the damage at which no more are.

    As many as would have to go if nothing else was done beyond nearly free formats. Where only one plan is built,
    removing blocks must be expected to cost less than the best mix of formats alone.
    """
    most = sizes.original.blocks - smallest_shape(sizes).blocks
    for gone in range(1, most):
        shape = Shape(sizes.original.blocks - gone, sizes.original.ffn)
        if nearly_free_fits(sizes, wanted.budget, wanted.costs, shape):
            most = gone
            break
    if wanted.effort.candidates > 1:
        return most, math.inf
    try:
        alone = choose(sizes, Damages(formats=formats), wanted.budget, wanted.fixed, wanted.costs)
    except ImpossibleBudgetError:
        return most, math.inf
    return most, alone.damage


def nearly_free_fits(sizes: Sizes, budget: Budget, costs: Costs | None, shape: Shape) -> bool:
    """Whether a shape keeps to a budget in formats that cost nearly nothing: then nothing needs to be removed."""
    formats = {group: sizes.middle(group) for group in sizes.group_names}
    if sizes.total(shape, formats) > budget.bytes:
        return False
    if costs is None:
        return True
    memory, seconds = costs.of(sizes, shape, formats)
    return memory <= (budget.memory or memory) and seconds * (budget.speed or 0) <= 1


def decide(
    model: LanguageModel,
    wanted: Wanted,
    damages: Damages,
    texts: tuple[Tokens, Tokens],
    documents: Sequence[str],
    seed: int,
    progress: Progress,
) -> Decision:
    """Return the recipe that meets a budget with the least expected damage, and the plans that may turn out better.

    Args:
        model: The original; unchanged afterwards.
        wanted: What the person asks for.
        damages: What each thing that a plan may do costs.
        texts: Calibration, to take statistics on, and validation, that damages are measured on.
        documents: Calibration as text, to choose tokens by.
        seed: Of everything random in the recipe.
        progress: Called with what is measured, how much is done and how much there is.

    Raises:
        ImpossibleBudgetError: No plan meets the budget.
    """
    sizes = sizes_of(model)
    calibration, validation = texts
    if wanted.most_damage is not None:
        fewest = fewest_bytes(sizes, damages, wanted, wanted.most_damage)
        wanted = replace(wanted, budget=replace(wanted.budget, bytes=fewest))
    try:
        plans, refusal = _kinds(model, sizes, damages, wanted), None
    except ImpossibleBudgetError as error:
        plans, refusal = [], error
    if wanted.vocabulary and wanted.effort.candidates > 1 and (damages.depth or damages.width):
        windows, counts = validation.first(JUDGING_WINDOWS), smaller_vocabularies(model)
        damages = replace(damages, vocabulary=vocabulary_damage(model, documents, windows, counts, progress))
        plans += _trimmed(model, damages, wanted, documents)
    if not plans:
        raise refusal
    plans.sort(key=lambda plan: plan.damage)
    if wanted.most_damage is not None:
        plans = [plan for plan in plans if plan.damage <= wanted.most_damage] or plans[:1]
    alone = [plan for plan in plans if not plan.prunes]
    others = [plan for plan in plans if plan.prunes]
    rivals = (*alone, *others[: wanted.effort.candidates - len(alone)])
    heal = wanted.effort.tokens
    if wanted.heal_seconds is not None:
        heal = tokens_in(model, calibration, wanted.heal_seconds) if wanted.heal_seconds else 0
    formats = plans[0].formats
    tune = tuned_tokens_in(model, calibration, wanted.tune_seconds, formats) if wanted.tune_seconds else 0
    recipe = recipe_of(plans[0], wanted, heal, tune, seed, wanted.windows(len(rivals)))
    return Decision(recipe, plans[0], damages, rivals, heal, tune)


def recipe_of(plan: Plan, wanted: Wanted, heal: int, tune: int, seed: int, windows: int) -> Recipe:
    """Return the steps of a plan.

    Args:
        plan: What to do.
        wanted: What the person asks for.
        heal: Tokens to learn from. After pruning all weights do; where the effort says so, scales and norms of what was
            quantized learn from half of them, or from all where nothing was pruned or too few teach new spellings.
        tune: Tokens that scales and norms learn from in any case; codes too, see `tuning`, where they are many.
        seed: Of everything random.
        windows: Of calibration text, for the statistics of quantizing.
    """
    steps: list = []
    if plan.vocabulary:
        steps.append(TrimVocabulary(size=plan.vocabulary))
    if plan.drop:
        steps.append(PruneDepth(drop=plan.drop))
    if plan.narrower:
        steps.append(PruneWidth(ffn=plan.shape.ffn))
    if wanted.effort.tunes and wanted.prune:
        share = heal // 2
        if not (plan.drop or plan.narrower) and share * plan.spelling < SPELLING_NATS:
            share = heal
        heal, tune = heal - share, max(tune, share)
    if steps and heal:
        rate = healing_rate(heal, trimmed=plan.vocabulary is not None)
        steps.append(Distil(tokens=heal, learning_rate=rate, evaluations=_evaluations(heal), seed=seed))
    quantize = Quantize(formats=plan.formats, method=wanted.method, windows=windows, seed=seed)
    steps.append(quantize)
    if tune and not quantize.rounds_nothing:
        steps.append(tuning(tune, seed))
    return Recipe(steps=tuple(steps), seed=seed)


def tuning(tokens: int, seed: int) -> Tune:
    """Return what takes as long as scales and norms that learn from so many tokens: codes learn too if it is long."""
    if tokens < CODES_FROM:
        return Tune(tokens=tokens, evaluations=_evaluations(tokens), seed=seed)
    tokens = int(tokens / CODES_TIME)
    return Tune(tokens=tokens, train="weights", evaluations=_evaluations(tokens), seed=seed)


def healing_rate(tokens: int, trimmed: bool) -> float:
    """Return the learning rate of healing from so many tokens; higher for few where the vocabulary was trimmed."""
    rate = min(HIGHEST_RATE, LEARNING_RATE * max(1.0, (tokens / RATE_TOKENS) ** 0.5))
    return max(rate, NEW_TOKENS_RATE) if trimmed else rate


def _evaluations(tokens: int) -> int:
    return max(1, min(4, tokens // EVALUATION_TOKENS))


def most_candidates(wanted: Wanted) -> int:
    """Return how many plans are built at most: whole, with fewer blocks, narrower FFNs, both, and with fewer tokens."""
    return min(wanted.effort.candidates, 4 + len(VOCABULARIES) * wanted.vocabulary)


def _kinds(model: LanguageModel, sizes: Sizes, damages: Damages, wanted: Wanted) -> list[Plan]:
    """Return the best plan of each kind that fits: formats alone, fewer blocks, narrower FFNs, both.

    Raises:
        ImpossibleBudgetError: No kind fits.
    """
    if wanted.effort.candidates == 1:
        return [best_plan(model, sizes, damages, wanted)]
    whole, kinds = sizes.original, {}
    for shape in candidate_shapes(sizes, len(damages.depth)):
        kinds.setdefault((shape.blocks != whole.blocks, shape.ffn != whole.ffn), []).append(shape)
    plans, refusal = [], None
    for shapes in kinds.values():
        try:
            plans.append(best_plan(model, sizes, damages, wanted, shapes))
        except ImpossibleBudgetError as error:
            refusal = error
    if not plans:
        raise refusal
    return plans


def _trimmed(model: LanguageModel, damages: Damages, wanted: Wanted, documents: Sequence[str]) -> list[Plan]:
    """Return the best plan with each smaller vocabulary; where none fits, there is none."""
    plans = []
    for count, damage in damages.vocabulary.items():
        sizes = sizes_of(outline(model, TrimVocabulary(size=count), documents))
        with suppress(ImpossibleBudgetError):
            plan = choose(sizes, damages, wanted.budget, wanted.fixed)
            plans.append(replace(plan, vocabulary=count, spelling=damage, damage=plan.damage + damage))
    return plans


def best_plan(
    model: LanguageModel, sizes: Sizes, damages: Damages, wanted: Wanted, shapes: list[Shape] | None = None
) -> Plan:
    """Return the best plan of some shapes whose layout, measured in the engine, keeps to memory and speed.

    Raises:
        ImpossibleBudgetError: None does.
    """
    asked = aimed = wanted.budget
    for _ in range(TRIES):
        plan = choose(sizes, damages, aimed, wanted.fixed, wanted.costs, shapes)
        if wanted.costs is None:
            return plan
        found = measure_layout(model, plan.shape, plan.formats, asked.context)
        if _keeps_to(found, asked):
            return replace(plan, footprint=found)
        memory = aimed.memory and int(aimed.memory * min(1.0, asked.memory / found.memory) * 0.995)
        speed = aimed.speed and aimed.speed * max(1.0, asked.speed / found.speed) * 1.005
        aimed = replace(aimed, memory=memory, speed=speed)
    raise ImpossibleBudgetError(
        f"{asked.text} cannot be met with what was measured: the nearest layout takes {say_bytes(found.memory)} of "
        f"memory and writes {found.speed:.1f} tokens/s. On a busy machine speed is noise: try again, or ask for less"
    )


def fewest_bytes(sizes: Sizes, damages: Damages, wanted: Wanted, most_damage: float) -> int:
    """Return the fewest bytes, to a part in a thousand, whose best plan expects at most so much damage."""
    low, high = budget_range(sizes, prune=bool(damages.depth or damages.width))[0] - 1, wanted.budget.bytes
    least = choose(sizes, damages, wanted.budget, wanted.fixed, wanted.costs).damage
    if least > most_damage:
        raise ImpossibleBudgetError(
            f"{wanted.budget.text} cannot be met: the best plan expects a KL of {least + wanted.engine:.4f}, "
            f"{most_damage + wanted.engine:.4f} are allowed. Ask for less --quality, at most "
            f"{highest_quality(least + wanted.engine)}, or for a larger budget"
        )
    while high - low > high // 1000:
        middle = (low + high) // 2
        try:
            fits = choose(sizes, damages, replace(wanted.budget, bytes=middle), wanted.fixed, wanted.costs).damage
        except ImpossibleBudgetError:
            fits = most_damage + 1
        low, high = (low, middle) if fits <= most_damage else (middle, high)
    return high


def _keeps_to(found: Footprint, budget: Budget) -> bool:
    return found.memory <= (budget.memory or found.memory) and found.speed >= (budget.speed or 0)


def uniform_recipe(sizes: Sizes, form: str, fixed: dict[str, str], method: str, seed: int) -> Recipe:
    """Return the recipe that stores every matrix in one format, but for those that a person fixed.

    Raises:
        BadInputError: The format is unknown or does not fit a tensor; other formats are never taken silently.
    """
    formats = with_fixed(dict.fromkeys(sizes.group_names, form.upper()), fixed)
    recipe = Recipe(steps=(Quantize(formats=formats, method=method, seed=seed),), seed=seed)
    recipe_bytes(sizes, recipe)
    return recipe


def read_decision(facts: object) -> Decision:
    """Return a decision that was written as plain data."""
    return _DECISION.validate_python(facts)


def read_plan(facts: object) -> Plan:
    """Return a plan that was written as plain data."""
    return _PLAN.validate_python(facts)
