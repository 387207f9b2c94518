"""The local search: a mix's KL is shared out as the KL itself says, and no worse mix than the first is taken."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import Tiny

from pocketlm.model.importance import token_importance
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.text import as_tokens
from pocketlm.pipeline.local_search import MOST_CHANGE, best_of, corrected, improve, next_expected, shared_out
from pocketlm.pipeline.stages import Texts, silent
from pocketlm.plan import decide as decide_module
from pocketlm.plan.budget import Budget
from pocketlm.plan.decide import Decision, Wanted, decide, measure_formats
from pocketlm.plan.effort import PRESETS
from pocketlm.plan.footprint import Costs, Footprint
from pocketlm.plan.recipe import Recipe
from pocketlm.plan.search import Damages, Plan, choose
from pocketlm.plan.sizes import Shape, budget_range, sizes_of
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.tensors.formats import FORMATS

GENERATOR = torch.Generator().manual_seed(0)
WINDOWS, HELD_OUT = (torch.randint(3, 300, (rows, 32), generator=GENERATOR) for rows in (8, 4))
TEXTS = Texts(as_tokens("a", WINDOWS), as_tokens("b", HELD_OUT), as_tokens("c", HELD_OUT), {})


def in_16_bits(model: LanguageModel) -> LanguageModel:
    """Round the weights to what a run keeps of them on disk."""
    for parameter in model.network.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def disturb(network: torch.nn.Module, names: list[str], size: float) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name in names:
            weight = network.get_parameter(name)
            weight += size * weight.std() * torch.randn(weight.shape, generator=generator)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_parts_of_a_small_kl_add_up_to_it(family: str, tiny_model: Tiny):
    original, changed = tiny_model(family).network, tiny_model(family).network
    matrices = [name for name, value in original.named_parameters() if value.dim() == 2]
    disturb(changed, matrices, 0.01)
    kl = divergence_of(changed, HELD_OUT, judge(original, HELD_OUT))
    shares = shared_out(original, changed, HELD_OUT)
    assert set(shares) == set(matrices)
    assert sum(shares.values()) == pytest.approx(kl, rel=0.1)
    assert all(value.grad is None for value in changed.parameters())


@pytest.mark.usefixtures("exact")
def test_a_matrix_that_alone_was_changed_has_all_of_it(tiny_model: Tiny):
    original, changed = tiny_model("llama").network, tiny_model("llama").network
    name = "model.layers.1.mlp.down_proj.weight"
    disturb(changed, [name], 0.02)
    kl = divergence_of(changed, HELD_OUT, judge(original, HELD_OUT))
    shares = shared_out(original, changed, HELD_OUT)
    assert shares.pop(name) == pytest.approx(kl, rel=0.1)
    assert set(shares.values()) == {0.0}


def test_corrected_damages_agree_with_what_was_measured():
    plan = Plan(Shape(1, 32), (), {}, 100, 0.3, {"a": ("Q4_0", 50, 0.1), "b": ("Q2_0", 50, 0.2)})
    measured = replace(plan, damage=0.6, units={"a": ("Q4_0", 50, 0.03), "b": ("Q2_0", 50, 0.57)})
    damages = {"a": {"Q4_0": 0.1, "Q2_0": 1.0}, "b": {"Q4_0": 0.1, "Q2_0": 0.2}}
    found = corrected(damages, plan, measured)
    least = 2 / MOST_CHANGE  # twice the damage altogether, and no wild changes of one unit
    assert found["a"] == pytest.approx({"Q4_0": 0.1 * least, "Q2_0": 1.0 * least})
    assert found["b"] == pytest.approx({"Q4_0": 0.285, "Q2_0": 0.57})


def thorough(budget: Budget) -> Wanted:
    return Wanted(budget=budget, effort=PRESETS["best"])


def wrong_decision(model: LanguageModel, budget: Budget) -> Decision:
    """A plan from damages that say nothing about the model."""
    sizes, generator = sizes_of(model), torch.Generator().manual_seed(0)
    damages = {
        unit: {
            name: 2.0**place * (0.05 + torch.rand((), generator=generator).item())
            for place, name in enumerate(sizes.allowed(unit.rpartition(".")[2]))
        }
        for unit in sizes.units(sizes.original)
    }
    found = Damages(formats=damages)
    plan = choose(sizes, found, budget)
    return Decision(Recipe(steps=(Quantize(formats=plan.formats),), seed=0), plan, found, (plan,), 0, 0)


def test_the_best_of_the_measured_mixes_is_taken_and_expected(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    model = in_16_bits(tiny_model("llama"))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    sizes = sizes_of(model)
    budget = Budget("60 kB", sizes.total(sizes.original, dict.fromkeys(sizes.group_names, "Q5_0")))
    first = wrong_decision(model, budget)
    said: list[str] = []
    better = improve(model, thorough(budget), first, TEXTS, lambda what, done, total: said.append(what))
    again = improve(model, thorough(budget), first, TEXTS, lambda *_: pytest.fail("it is in the cache"))
    assert again == better
    kls = better.plan.measured
    assert len(kls) == PRESETS["best"].mixes
    assert better.plan.damage == min(kls) < kls[0]
    assert sum(damage for *_, damage in better.plan.units.values()) == pytest.approx(min(kls))
    assert sum(what.startswith("mix ") for what in said) == len(kls)
    assert better.plan.bytes == sizes.total(sizes.original, better.plan.formats) <= budget.bytes
    assert better.recipe.steps[-1].formats == better.plan.formats
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    once = improve(model, Wanted(budget=budget), first, TEXTS, silent).plan
    assert (once.formats, once.measured) == (first.plan.formats, kls[:1]), "in a hurry the first mix is only measured"
    for decision, kl in ((first, kls[0]), (better, min(kls))):
        stored, step = in_16_bits(tiny_model("llama")), decision.recipe.steps[-1]
        made = quantize(stored, step, WINDOWS, importance=token_importance(stored.network, WINDOWS, step.seed))[0]
        assert divergence_of(made.network, HELD_OUT, judge(model.network, HELD_OUT)) == pytest.approx(kl, rel=0.02)


@pytest.mark.parametrize("wrong", [0.5, 2.0])
def test_a_largest_kl_is_kept_to_by_measuring(
    wrong: float, tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Damages that are said to be half or twice what they are: the file would miss its floor, or waste bytes."""
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    model = in_16_bits(tiny_model("llama"))
    sizes = sizes_of(model)
    formats = measure_formats(model, TEXTS.calibration, TEXTS.validation, silent)
    allowed = sum(by_format["Q5_0"] for by_format in formats.values())
    said = Damages(formats={unit: {n: wrong * kl for n, kl in each.items()} for unit, each in formats.items()})
    wanted = Wanted(budget=Budget("any", budget_range(sizes)[1]), prune=False, most_damage=allowed)
    first = decide(model, wanted, said, (TEXTS.calibration, TEXTS.validation), [], 0, silent)
    found = improve(model, wanted, first, TEXTS, silent).plan
    assert found.damage <= allowed
    assert (found.measured[0] > allowed) == (wrong < 1)
    assert (found.bytes < first.plan.bytes) == (wrong > 1)


def test_a_floor_beside_a_limit_of_memory_is_kept_to_by_measuring_too(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    monkeypatch.setattr(decide_module, "measure_layout", lambda *_: Footprint(10, 10.0))
    model = in_16_bits(tiny_model("llama"))
    sizes = sizes_of(model)
    formats = measure_formats(model, TEXTS.calibration, TEXTS.validation, silent)
    allowed = sum(by_format["Q5_0"] for by_format in formats.values())
    half = Damages(formats={unit: {n: kl / 2 for n, kl in each.items()} for unit, each in formats.items()})
    every = dict.fromkeys(("F16", *FORMATS), 1.0)
    wanted = Wanted(
        budget=Budget("any", budget_range(sizes)[1], memory=10**9, context=64),
        costs=Costs(64, 0.0, every, every),
        prune=False,
        most_damage=allowed,
    )
    first = decide(model, wanted, half, (TEXTS.calibration, TEXTS.validation), [], 0, silent)
    found = improve(model, wanted, first, TEXTS, silent).plan
    assert found.measured[0] > allowed >= found.damage
    assert found.footprint == Footprint(10, 10.0)


def test_a_format_that_nobody_measured_has_its_share_of_the_damage(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ternary numbers are taken where a person says so alone, and break more than all else together."""
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    model = in_16_bits(tiny_model("llama", intermediate_size=256))
    sizes, fixed = sizes_of(model), {"ffn_out": "TQ2_0"}
    formats = measure_formats(model, TEXTS.calibration, TEXTS.validation, silent)
    assert "TQ2_0" not in formats["0.ffn_out"]
    wanted = Wanted(budget=Budget("any", budget_range(sizes, False, fixed)[1]), prune=False, fixed=fixed)
    first = decide(model, wanted, Damages(formats=formats), (TEXTS.calibration, TEXTS.validation), [], 0, silent)
    ternary = [unit for unit in first.plan.units if unit.endswith("ffn_out")]
    assert all(first.plan.units[unit][2] >= max(formats[unit].values()) for unit in ternary)
    found = improve(model, wanted, first, TEXTS, silent).plan
    assert sum(found.units[unit][2] for unit in ternary) > 0.9 * found.damage > 0
    expected = [first.plan.units[unit][2] / first.plan.damage for unit in ternary]
    shares = [found.units[unit][2] / found.damage for unit in ternary]
    assert shares != pytest.approx(expected, rel=0.01), "measured, not guessed"


def test_what_to_expect_is_read_off_between_two_mixes():
    assert next_expected([(0.1, 0.12)], 0.06) == pytest.approx(0.05)
    assert next_expected([(0.1, 0.12)], 0.24) == pytest.approx(0.2)
    assert next_expected([(0.1, 0.12), (0.2, 0.4), (0.3, 0.9)], 0.26) == pytest.approx(0.15)


@pytest.mark.parametrize(("allowed", "taken"), [(0.25, 80), (0.35, 70), (0.1, 90), (None, 90)])
def test_the_smallest_mix_within_an_allowed_kl_is_taken_or_the_best(allowed: float | None, taken: int):
    tried = [Plan(Shape(1, 32), (), {}, size, kl, {}) for size, kl in ((100, 0.22), (80, 0.24), (90, 0.2), (70, 0.3))]
    assert best_of(tried, allowed).bytes == taken


def test_plans_that_prune_stay_as_they_are(tiny_model: Tiny):
    model = tiny_model("llama")
    budget = Budget("60 kB", 60_000)
    decision = wrong_decision(model, Budget("all", 10**9))
    cut = replace(decision.plan, shape=Shape(2, 64), drop=(1,))
    pruned = replace(decision, plan=cut, rivals=(cut,))
    assert improve(model, thorough(budget), pruned, TEXTS, silent) is pruned


def test_formats_alone_are_improved_where_pruning_is_expected_to_be_better(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    model = in_16_bits(tiny_model("llama"))
    sizes = sizes_of(model)
    budget = Budget("60 kB", sizes.total(sizes.original, dict.fromkeys(sizes.group_names, "Q5_0")))
    alone = wrong_decision(model, budget)
    cut = replace(alone.plan, shape=Shape(2, 64), drop=(1,))
    both = replace(alone, plan=cut, rivals=(alone.plan, cut))
    found = improve(model, thorough(budget), both, TEXTS, silent)
    assert (found.plan, found.recipe, found.rivals[1]) == (cut, both.recipe, cut)
    assert found.rivals[0] == improve(model, thorough(budget), alone, TEXTS, silent).plan
    assert found.rivals[0].damage == min(found.rivals[0].measured)
