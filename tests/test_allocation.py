"""Allocation: the exact least damage under a budget, in bytes that the file really has."""

import itertools
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import Tiny
from tests.tiny import FAMILIES

from pocketlm.errors import ImpossibleBudgetError
from pocketlm.export.gguf import write_gguf
from pocketlm.plan.allocation import Limits, Option, as_formats, by_group, solve, unit_options, worthwhile
from pocketlm.plan.budget import Budget
from pocketlm.plan.search import Damages, choose
from pocketlm.plan.sizes import Shape, Sizes, sizes_of
from pocketlm.steps.quantize import Quantize, format_name, quantize

WINDOWS = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
OPTIONS = st.builds(
    lambda pairs: [Option(f"F{i}", size, damage) for i, (size, damage) in enumerate(pairs)],
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 1000).map(lambda n: n / 64)), min_size=1, max_size=4),
)
PROBLEMS = st.lists(OPTIONS, min_size=1, max_size=5).map(lambda units: {f"{i}.x": u for i, u in enumerate(units)})


def total(choice: dict[str, Option]) -> tuple[int, float]:
    return sum(option.bytes for option in choice.values()), sum(option.damage for option in choice.values())


def brute_force(options: dict[str, list[Option]], budget: int) -> float:
    mixes = itertools.product(*options.values())
    return min((sum(o.damage for o in mix) for mix in mixes if sum(o.bytes for o in mix) <= budget), default=math.inf)


@settings(deadline=None, max_examples=150)
@given(PROBLEMS, st.integers(0, 300))
def test_the_solution_is_the_best_by_brute_force(options: dict[str, list[Option]], budget: int):
    best = brute_force(options, budget)
    if best == math.inf:
        with pytest.raises(ImpossibleBudgetError, match="bytes at least"):
            solve(options, Limits(budget))
        return
    chosen = solve(options, Limits(budget))
    assert chosen.keys() == options.keys()
    assert all(option in options[unit] for unit, option in chosen.items())
    size, damage = total(chosen)
    assert size <= budget
    assert damage <= best * 1.0002 + 1e-9


THREE = st.builds(
    lambda rows: [Option(f"F{i}", *row) for i, row in enumerate(rows)],
    st.lists(
        st.tuples(st.integers(1, 60), st.integers(0, 640).map(lambda n: n / 64), *[st.integers(1, 40).map(float)] * 2),
        min_size=1,
        max_size=4,
    ),
)


@settings(deadline=None, max_examples=150)
@given(st.lists(THREE, min_size=1, max_size=4), st.integers(0, 240), st.integers(1, 160), st.integers(1, 160))
def test_memory_and_time_are_kept_to_as_well(units: list[list[Option]], most: int, memory: int, seconds: int):
    options = {f"{i}.x": choices for i, choices in enumerate(units)}
    limits = Limits(most, memory, seconds)

    def fits(mix: Iterable[Option]) -> bool:
        sums = [sum(getattr(option, kind) for option in mix) for kind in ("bytes", "memory", "seconds")]
        return all(used <= limit for used, limit in zip(sums, (most, memory, seconds), strict=True))

    best = min((sum(o.damage for o in mix) for mix in itertools.product(*units) if fits(mix)), default=math.inf)
    if best == math.inf:
        with pytest.raises(ImpossibleBudgetError):
            solve(options, limits)
        return
    chosen = solve(options, limits)
    assert fits(list(chosen.values()))
    assert total(chosen)[1] <= best * 1.0002 + 1e-9


@pytest.mark.parametrize("over", [1, 32, 64])
@pytest.mark.parametrize("budget", [10**6, 60 * 10**6, 10**9, 8 * 10**9])
def test_not_a_byte_over_the_budget_however_large_it_is(budget: int, over: int):
    half = budget // 2
    options = {
        "a": [Option("small", half - 1000, 1.0), Option("large", half, 0.1)],
        "b": [Option("small", half - 1000, 1.0), Option("large", half + over, 0.1)],
    }
    size, damage = total(solve(options, Limits(budget)))
    assert size <= budget
    assert damage == pytest.approx(1.1)
    assert total(solve(options, Limits(budget + over))) == (budget + over, pytest.approx(0.2))


@given(OPTIONS)
def test_only_options_that_another_beats_are_left_out(options: list[Option]):
    kept = worthwhile(options)
    for option in options:
        assert any(k.bytes <= option.bytes and k.damage <= option.damage for k in kept)
    assert all(a.bytes < b.bytes and a.damage > b.damage for a, b in itertools.pairwise(kept))


@pytest.fixture(scope="module")
def sizes(tiny_model: Tiny) -> Sizes:
    return sizes_of(tiny_model("llama"))


def random_damages(sizes: Sizes, seed: int = 0) -> dict[str, dict[str, float]]:
    """Less for larger formats, on the whole, and other numbers for each unit."""
    generator = torch.Generator().manual_seed(seed)
    return {
        unit: {
            name: 2.0**place * (0.01 + 0.01 * torch.rand((), generator=generator).item())
            for place, name in enumerate(sizes.allowed(unit.rpartition(".")[2]))
        }
        for unit in sizes.units(sizes.original)
    }


@settings(deadline=None, max_examples=40)
@given(data=st.data(), family=st.sampled_from(["llama", "qwen2", "gpt2"]))
def test_a_choice_survives_as_a_recipes_formats(tiny_model: Tiny, data: st.DataObject, family: str):
    sizes = sizes_of(tiny_model(family))
    shape = Shape(data.draw(st.integers(1, 3)), 64)
    names = st.sampled_from(["Q4_0", "Q8_0", "F16", "Q5_0"])
    chosen = {unit: Option(data.draw(names), 0, 0.0) for unit in sizes.units(shape)}
    formats = as_formats(sizes, shape, chosen)
    for unit, tensors in sizes.units(shape).items():
        for tensor in tensors:
            assert format_name(formats, tensor, sizes.groups[tensor]) == chosen[unit].format
    in_groups = [name for name in formats if name in sizes.group_names]
    assert list(formats)[: len(in_groups)] == in_groups, "groups come first, since what comes last counts"


def test_a_uniform_choice_is_written_in_groups_alone(sizes: Sizes):
    chosen = {unit: Option("Q4_0", 0, 0.0) for unit in sizes.units(sizes.original)}
    assert as_formats(sizes, sizes.original, chosen) == dict.fromkeys(sizes.group_names, "Q4_0")


def test_groups_are_the_sums_of_their_units(sizes: Sizes):
    _, options = unit_options(sizes, sizes.original, random_damages(sizes), {})
    groups = by_group(options)
    assert set(groups) == set(sizes.group_names)
    for group, choices in groups.items():
        parts = [u for unit, u in options.items() if unit.rpartition(".")[2] == group]
        for option in choices:
            same = [next(o for o in part if o.format == option.format) for part in parts]
            assert option.bytes == sum(o.bytes for o in same)
            assert option.damage == pytest.approx(sum(o.damage for o in same))


def formats_by_tensor(sizes: Sizes, fixed: dict[str, str], budget: Budget) -> dict[str, str]:
    plan = choose(sizes, Damages(formats=random_damages(sizes)), budget, fixed)
    return {name: format_name(plan.formats, name, group) for name, group in sizes.groups.items()}


@pytest.mark.parametrize(
    ("fixed", "tensors"),
    [
        ({"embedding": "Q8_0"}, ["model.embed_tokens.weight"]),
        ({"model.layers.1.*": "Q5_1"}, ["model.layers.1.self_attn.k_proj.weight", "model.layers.1.mlp.up_proj.weight"]),
        ({"*.down_proj.weight": "F16"}, [f"model.layers.{i}.mlp.down_proj.weight" for i in range(3)]),
        ({"*.k_proj.weight": "Q8_0"}, [f"model.layers.{i}.self_attn.k_proj.weight" for i in range(3)]),
        ({"model.layers.0.mlp.up_proj.weight": "Q8_0"}, ["model.layers.0.mlp.up_proj.weight"]),
    ],
)
def test_fixed_formats_are_honoured(fixed: dict[str, str], tensors: list[str], sizes: Sizes):
    budget = Budget("b", sizes.total(sizes.original, dict.fromkeys(sizes.group_names, "Q5_0")))
    chosen = formats_by_tensor(sizes, fixed, budget)
    (wanted,) = fixed.values()
    assert {chosen[name] for name in tensors} == {wanted}


def test_what_is_fixed_leaves_the_rest_to_choice(sizes: Sizes):
    budget = Budget("b", sizes.total(sizes.original, dict.fromkeys(sizes.group_names, "Q4_0")))
    assert len(set(formats_by_tensor(sizes, {"embedding": "Q8_0"}, budget).values())) > 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "fixed",
    [{}, {"value": "Q8_0", "embedding": "Q4_1"}, {"ffn_out": "IQ4_NL", "FIRST": "Q8_0"}],
    ids=["free", "groups", "a tensor of a group"],
)
def test_a_plans_bytes_are_those_of_the_file(family: str, fixed: dict[str, str], tiny_model: Tiny, tmp_path: Path):
    if family == "gpt2":
        fixed = {"query_key_value" if group == "value" else group: name for group, name in fixed.items()}
    model = tiny_model(family)
    sizes = sizes_of(model)
    first = next(name for name, group in sizes.groups.items() if group == "ffn_out")
    fixed = {first if key == "FIRST" else key: form for key, form in fixed.items()}
    budget = Budget("b", sizes.total(sizes.original, dict.fromkeys(sizes.group_names, "Q5_0")) + 1000)
    plan = choose(sizes, Damages(formats=random_damages(sizes, 2)), budget, fixed)
    assert len(set(plan.formats.values())) > 2, "a mix"
    assert len(plan.formats) > len(sizes.group_names), "blocks that differ"
    model, packed, _ = quantize(model, Quantize(formats=plan.formats, method="rtn"), WINDOWS)
    write_gguf(model, packed, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").stat().st_size == plan.bytes <= budget.bytes
    for unit, tensors in sizes.units(sizes.original).items():
        assert {packed[name].format.name for name in tensors} == {plan.units[unit][0]}


def test_a_talkative_solver_is_not_heard(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Some releases of HiGHS print a line of debugging from native code, which would stand in a person's JSON."""
    import scipy.optimize

    def talkative(*args: object, **kwargs: object) -> object:
        os.write(1, b"tmpSolver.run();\n")
        return milp(*args, **kwargs)

    milp = scipy.optimize.milp
    monkeypatch.setattr(scipy.optimize, "milp", talkative)
    sys.stdout.write("before\n")
    assert solve({"a": [Option("F0", 4, 1.0), Option("F1", 8, 0.5)]}, Limits(8))["a"].format == "F1"
    sys.stdout.write("after\n")
    assert capfd.readouterr().out == "before\nafter\n"
