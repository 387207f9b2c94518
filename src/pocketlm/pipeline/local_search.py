"""The local search: the mix that a plan chose is made, its true KL measured and shared out, and solved for again.

    plan ─> make the mix ─> measure its KL ─> share it out among the units ─> solve again ─┐
                 ^─────────────────────────────────────────────────────────────────────────┘

Damages that were measured one at a time do not add up where they are large. Made and measured, a mix says what it
really costs, and one backward pass says which units that comes from. The best mix by its measured KL is taken, or the
smallest that keeps to a KL that a person allowed; what was made of it is kept in the cache, so the run does not make it
again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.model.compute import reusing_memory
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.learning import distillation_step
from pocketlm.pipeline.cache import stage
from pocketlm.pipeline.stages import Progress, Texts, run_recipe
from pocketlm.plan.decide import Decision, Wanted, best_plan, fewest_bytes, read_plan, recipe_of
from pocketlm.plan.search import Damages, Plan
from pocketlm.plan.sizes import Sizes, sizes_of
from pocketlm.steps.quantize import Quantize

ADDITIVE = 0.05  # nats per token up to which damages add up, and no other mix is tried
SHARING_WINDOWS = 4  # of validation text, on which a mix's KL is shared out among its units
FLOOR_MIXES, NEAR = 3, 0.93  # mixes that are made at most for an allowed KL, until one comes so near to it from below
MOST_CHANGE = 4.0  # by what factor a round may correct the damages of one unit, beside what it corrects for all


def improve(model: LanguageModel, wanted: Wanted, decision: Decision, texts: Texts, progress: Progress) -> Decision:
    """Return a decision with the best mix of formats by its measured KL, and that KL as what it expects.

    Plans that prune stay as they are, as what pruning leaves is not known before it is done; so do those of models that
    are in memory in 16 bits.

    Args:
        model: The original; unchanged afterwards.
        wanted: What the person asked for.
        decision: What was decided from damages that were added up.
        texts: Calibration, to quantize with, and validation, to measure the KL on.
        progress: Called as the work goes on.
    """
    alone = next((plan for plan in decision.rivals if not plan.prunes), None)
    if alone is None or model.network.dtype is not torch.float32:
        return decision
    inputs = {"wanted": asdict(wanted), "plan": asdict(alone), "model": model.origin.key, **texts.sha256}

    def produce(folder: Path) -> dict[str, Any]:
        tried = _try_mixes(model, wanted, alone, decision, texts, progress)
        best = best_of(tried, wanted.most_damage)
        return asdict(replace(best, measured=tuple(plan.damage for plan in tried)))

    plan = read_plan(stage("mix", inputs, produce).facts)
    rivals = tuple(plan if rival == alone else rival for rival in decision.rivals)
    if decision.plan != alone:
        return replace(decision, rivals=rivals)
    steps = tuple(
        replace(step, formats=plan.formats) if isinstance(step, Quantize) else step for step in decision.recipe.steps
    )
    return replace(decision, recipe=replace(decision.recipe, steps=steps), plan=plan, rivals=rivals)


def _try_mixes(
    model: LanguageModel,
    wanted: Wanted,
    plan: Plan,
    decision: Decision,
    texts: Texts,
    progress: Progress,
) -> list[Plan]:
    """Return the mixes that were made, in order; `damage` is the measured KL, that of the units adds up to it."""
    allowed, most, sizes = wanted.most_damage, most_mixes(wanted), sizes_of(model)
    windows, measured = texts.validation.windows, decision.damages.formats
    opinion = judge(model.network, windows)

    def make(plan: Plan, number: int) -> Plan:
        recipe = recipe_of(plan, wanted, 0, 0, decision.recipe.seed, wanted.windows(len(decision.rivals)))
        mixed = run_recipe(model, recipe, texts, progress).model.network
        kl = divergence_of(mixed, windows, opinion)
        progress(f"mix {number}: KL {kl:.4f}, {plan.damage:.4f} by parts", number, most)
        corrects = allowed is None and number < most and kl > ADDITIVE
        # What a format does that a person fixed and nothing has measured is said by its share alone.
        guessed = any(form not in {"F16", *measured[unit]} for unit, (form, *_) in plan.units.items())
        shares = shared_out(model.network, mixed, windows[:SHARING_WINDOWS]) if corrects or guessed else {}
        return _with_damages(plan, kl, _by_unit(shares, sizes))

    damages, expected, tried = Damages(formats=measured), [], []  # plans from these prune nothing
    while True:
        expected.append(plan.damage)
        tried.append(make(plan, len(tried) + 1))
        if len(tried) == most or _near(tried[-1].damage, allowed):
            return tried
        budget = wanted.budget
        try:
            if allowed is None:
                damages = Damages(formats=corrected(damages.formats, plan, tried[-1]))
            else:
                found = [(before, mix.damage) for before, mix in zip(expected, tried, strict=True)]
                aim = next_expected(found, (1 + NEAR) / 2 * allowed)
                budget = replace(budget, bytes=fewest_bytes(sizes, damages, wanted, aim))
            plan = best_plan(model, sizes, damages, replace(wanted, budget=budget))
        except ImpossibleBudgetError:
            return tried
        if any(plan.formats == other.formats for other in tried):
            return tried


def most_mixes(wanted: Wanted) -> int:
    """Return how many mixes are made at most."""
    return wanted.effort.mixes if wanted.most_damage is None else FLOOR_MIXES


def _near(kl: float, allowed: float | None) -> bool:
    """Whether a mix with this KL is as good as another one would be."""
    return kl <= ADDITIVE if allowed is None else NEAR * allowed <= kl <= allowed


def next_expected(found: Sequence[tuple[float, float]], aim: float) -> float:
    """Return what a mix should be expected to damage so that it does as much as one aims at.

    Args:
        found: What each mix was expected to damage, and what it does.
        aim: The KL that one wants.
    """
    below = max((pair for pair in found if pair[1] <= aim), key=lambda pair: pair[1], default=(0.0, 0.0))
    above = min((pair for pair in found if pair[1] > aim), key=lambda pair: pair[1], default=None)
    if above is None:
        return below[0] * aim / max(below[1], 1e-30)
    return below[0] + (above[0] - below[0]) * (aim - below[1]) / (above[1] - below[1])


def best_of(tried: Sequence[Plan], allowed: float | None) -> Plan:
    """Return the plan of the lowest measured KL; of those within an allowed one, where there are some, the smallest."""
    keeping = [plan for plan in tried if allowed is not None and plan.damage <= allowed]
    return min(keeping, key=lambda plan: plan.bytes) if keeping else min(tried, key=lambda plan: plan.damage)


def shared_out(original: nn.Module, mixed: nn.Module, windows: Tensor) -> dict[str, float]:
    """Return what each matrix contributes to the KL of a changed network to the original, by parameter name.

    Near the original the KL is a quadratic form of all changes, ½ ΔᵀHΔ with gradient HΔ: half of what a matrix's change
    times its gradient comes to is its part, interplay with the others included. A part can be negative, where one
    change makes up for another.

    Args:
        original: The original.
        mixed: The same network with other weights; its gradients are gone afterwards.
        windows: (windows, length) token ids.
    """
    before = dict(original.named_parameters())
    mixed.requires_grad_(False)
    learning = {name: value for name, value in mixed.named_parameters() if value.dim() == 2}
    for value in learning.values():
        value.requires_grad_(True)
    shares = dict.fromkeys(learning, 0.0)
    with reusing_memory():
        for window in windows.split(1):
            distillation_step(original, mixed, window)
            for name, value in learning.items():
                change = value.detach() - before[name].detach()
                shares[name] += (change * value.grad).sum().item() / (2 * len(windows))
                value.grad = None
    return shares


def _by_unit(shares: Mapping[str, float], sizes: Sizes) -> dict[str, float]:
    units = sizes.units(sizes.original)
    return {unit: sum(shares[name] for name in names) for unit, names in units.items()} if shares else {}


def _with_damages(plan: Plan, kl: float, shares: Mapping[str, float]) -> Plan:
    """Return a plan whose units' damages add up to what was measured, by their shares or as they were."""
    parts = {unit: max(shares.get(unit, damage), 0.0) for unit, (_, _, damage) in plan.units.items()}
    scale = kl / max(sum(parts.values()), 1e-30)
    units = {unit: (form, size, scale * parts[unit]) for unit, (form, size, _) in plan.units.items()}
    return replace(plan, damage=kl, units=units)


def corrected(damages: Mapping[str, Mapping[str, float]], plan: Plan, measured: Plan) -> dict[str, dict[str, float]]:
    """Return damages by unit and format that agree, within MOST_CHANGE, with what a mix was measured to do.

    Args:
        damages: By unit and format, from which the plan was chosen.
        plan: With the damages that it expected of its units.
        measured: The same mix with those that it has.
    """
    result, overall = {}, measured.damage / max(plan.damage, 1e-30)
    for unit, by_format in damages.items():
        expected, found = plan.units[unit][2], measured.units[unit][2]
        relative = found / (overall * expected) if expected > 0 else 1.0
        factor = overall * min(max(relative, 1 / MOST_CHANGE), MOST_CHANGE)
        result[unit] = {form: factor * damage for form, damage in by_format.items()}
    return result
