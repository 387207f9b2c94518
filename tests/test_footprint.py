"""Budgets of memory and speed: hollow files are of the layout they stand for, and plans keep to what was measured."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.command_line import pocketlm
from tests.conftest import Tiny
from tests.tiny import FAMILIES, tiny_folder

from pocketlm.errors import BadInputError, ImpossibleBudgetError
from pocketlm.export.gguf import write_gguf
from pocketlm.measure.device import figure
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.text import Tokens
from pocketlm.pipeline.plan_stages import costs_here
from pocketlm.pipeline.stages import silent
from pocketlm.plan import footprint
from pocketlm.plan.allocation import unit_options
from pocketlm.plan.budget import Budget, parse_quality, parse_speed
from pocketlm.plan.decide import Wanted, decide
from pocketlm.plan.footprint import Costs, Footprint, measure_costs, measure_file, measure_layout, write_hollow
from pocketlm.plan.search import Damages, Plan, check_running, choose
from pocketlm.plan.sizes import Shape, budget_range, sizes_of
from pocketlm.run.engine import Engine
from pocketlm.tensors.formats import FORMATS


@pytest.mark.parametrize("family", FAMILIES)
def test_a_hollow_file_has_the_bytes_and_types_of_what_it_stands_for_and_runs(family, tiny_model, tmp_path):
    model = tiny_model(family)
    sizes = sizes_of(model)
    shape = Shape(sizes.original.blocks - sizes.anatomy.uniform_blocks, sizes.original.ffn - 32)
    name = next(name for name, group in sizes.groups.items() if group == "ffn_in")
    formats = dict.fromkeys(sizes.group_names, "Q4_0") | {"embedding": "Q8_0", name: "F16"}
    path = tmp_path / "hollow.gguf"
    write_hollow(model, shape, formats, path)
    assert path.stat().st_size == sizes.total(shape, formats)
    types = {tensor.type for tensor in read_gguf(path).tensors.values()}
    assert types >= {"Q4_0", "Q8_0", "F16", "F32"}
    with Engine(path, context=64) as engine:
        assert engine.logits([1, 2, 3]).isfinite().all()


def random_costs(seed: int) -> Costs:
    draws = torch.rand(2, len(FORMATS) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    names = [*FORMATS, "F16"]
    return Costs(512, 1000.0, *({name: 0.5 + value for name, value in zip(names, row, strict=True)} for row in draws))


def test_a_plan_keeps_to_memory_and_speed_as_measured(tiny_model: Tiny):
    sizes, names = sizes_of(tiny_model("llama")), ("Q4_0", "Q5_0", "Q8_0")
    by_format = {name: 1 / FORMATS[name].bits for name in names}
    damages = Damages(formats=dict.fromkeys(sizes.units(sizes.original), by_format))
    costs = random_costs(0)
    free = choose(sizes, damages, Budget("b", 10**9), costs=costs)
    assert {form for form, *_ in free.units.values()} == {"Q8_0"}
    uniform = [costs.of(sizes, sizes.original, dict.fromkeys(sizes.group_names, name)) for name in names]
    (memory, seconds), least = uniform[-1], [min(each[i] for each in uniform) for i in (0, 1)]
    limited = Budget("b", 10**9, memory=int((memory + least[0]) / 2) + 1, speed=2 / (seconds + least[1]))
    plan = choose(sizes, damages, limited, costs=costs)
    found = costs.of(sizes, sizes.original, plan.formats)
    assert found[0] <= limited.memory
    assert found[1] <= 1 / limited.speed * (1 + 1e-6)
    assert free.damage < plan.damage or (memory <= limited.memory and seconds <= 1 / limited.speed)
    with pytest.raises(ImpossibleBudgetError):
        choose(sizes, damages, replace(limited, memory=int(least[0] * 0.9)), costs=costs)


def test_what_a_person_fixed_takes_its_own_memory_and_time(tiny_model: Tiny):
    sizes, free = sizes_of(tiny_model("llama", hidden_size=128)), ("Q4_0", "Q5_0")
    shape, costs = sizes.original, random_costs(2)
    costs = replace(
        costs, **{kind: {n: getattr(costs, kind)[n] for n in (*free, "Q8_0", "F16")} for kind in ("memory", "seconds")}
    )
    damages = dict.fromkeys(sizes.units(shape), dict.fromkeys(free, 0.1))
    key, query = (f"model.layers.0.self_attn.{each}_proj.weight" for each in "kq")
    for fixed, counted in (("Q8_0", "Q8_0"), ("Q1_0", "F16")):  # what was not measured counts as the dearest
        _, options = unit_options(sizes, shape, damages, {query: fixed}, costs)
        for option in options["0.query_key"]:
            expected = costs.of_tensors(sizes, shape, {query: counted, key: option.format})
            assert (option.memory, option.seconds) == pytest.approx(expected)
        assert [option.format for option in options["0.query_key"]] == list(free)


def test_what_no_layout_reaches_is_refused_with_what_would_do(tiny_model: Tiny):
    sizes = sizes_of(tiny_model("llama"))
    costs = random_costs(1)
    memory, seconds = costs.least(sizes, sizes.original)
    check_running(sizes, Budget("b", 0, memory=int(memory) + 1, speed=0.999 / seconds), costs, prune=False)
    with pytest.raises(ImpossibleBudgetError, match=r"of memory cannot be met.*--ram"):
        check_running(sizes, Budget("b", 0, memory=int(memory * 0.99)), costs, prune=False)
    with pytest.raises(ImpossibleBudgetError, match=r"tokens/s cannot be met.*--speed"):
        check_running(sizes, Budget("b", 0, speed=1.01 / seconds), costs, prune=False)


@pytest.mark.parametrize("speed", [0.0123, 0.98, 1.04, 12.7, 347.0])
def test_the_speed_that_is_suggested_can_be_met(speed: float, tiny_model: Tiny):
    sizes, costs = sizes_of(tiny_model("llama")), random_costs(1)
    _, seconds = costs.least(sizes, sizes.original)
    costs = replace(costs, seconds={form: each / seconds / speed for form, each in costs.seconds.items()})
    with pytest.raises(ImpossibleBudgetError) as refused:
        check_running(sizes, Budget("b", 0, speed=2 * speed), costs, prune=False)
    suggested = parse_speed(str(refused.value).partition("--speed ")[2])
    assert 0.9 * speed < suggested <= speed
    check_running(sizes, Budget("b", 0, speed=suggested), costs, prune=False)


def test_speeds_are_read_as_people_write_them():
    assert parse_speed("30tok/s") == parse_speed(" 30 ") == parse_speed("30 tokens/s") == 30
    for wrong in ("fast", "0", "-3", "30MB", "tok/s"):
        with pytest.raises(BadInputError, match="speed"):
            parse_speed(wrong)


def test_a_floor_of_quality_takes_the_fewest_bytes_that_keep_it(tiny_model: Tiny):
    model = tiny_model("llama")
    sizes, names = sizes_of(model), ("Q2_0", "Q4_0", "Q5_0", "Q8_0")
    by_format = {name: 2.0 ** -FORMATS[name].bits / 10 for name in names}
    formats = dict.fromkeys(sizes.units(sizes.original), by_format)
    text, most = Tokens("text", torch.zeros(4, 32, dtype=torch.long), ""), budget_range(sizes)[1]

    def decided(floor: float | None, size: int = most) -> Plan:
        wanted = Wanted(budget=Budget("b", size), prune=False, most_damage=floor)
        return decide(model, wanted, Damages(formats=formats), (text, text), [], 0, silent).plan

    for floor in (0.006, 0.02, 0.1):
        plan = decided(floor)
        assert plan.damage <= floor
        assert decided(None, int(plan.bytes * 0.997)).damage > floor
    with pytest.raises(ImpossibleBudgetError, match="Ask for less --quality") as refused:
        decided(1e-9)
    suggested = parse_quality(str(refused.value).partition("at most ")[2].partition(",")[0])
    assert decided(-math.log(suggested)).damage <= -math.log(suggested)


def test_a_mix_that_no_whole_groups_make_is_found(tiny_model: Tiny):
    """As many weights as one block's FFN reads may be in the larger and faster format, and must be."""
    sizes = sizes_of(tiny_model("llama"))
    units = sizes.units(sizes.original)
    damages = Damages(formats={unit: {"Q4_0": 0.2 if "ffn_in" in unit else 0.1, "Q8_0": 0.1} for unit in units})
    costs = Costs(512, 0.0, dict.fromkeys(("Q4_0", "Q8_0", "F16"), 1.0), {"Q4_0": 2.0, "Q8_0": 1.0, "F16": 1.0})
    slow = dict.fromkeys(sizes.group_names, "Q4_0")
    mix = slow | dict.fromkeys(units["1.ffn_in"], "Q8_0")
    size, (_, seconds) = sizes.total(sizes.original, mix), costs.of(sizes, sizes.original, mix)
    plan = choose(sizes, damages, Budget("b", size, speed=0.9999 / seconds), costs=costs)
    assert plan.bytes <= size
    assert costs.of(sizes, sizes.original, plan.formats)[1] <= seconds * 1.0002
    pairs = {(unit.rpartition(".")[2], form) for unit, (form, *_) in plan.units.items()}
    assert len(pairs) > len(sizes.group_names), "some group has both formats"
    with pytest.raises(ImpossibleBudgetError, match="cannot be met with what was measured"):
        choose(sizes, damages, Budget("b", size - 1000, speed=0.9999 / seconds), costs=costs)


def test_qualities_are_read_as_people_write_them():
    assert parse_quality("0.95") == parse_quality(" 95% ") == 0.95
    for wrong in ("1", "0", "95", "good", "-0.5"):
        with pytest.raises(BadInputError, match="quality"):
            parse_quality(wrong)


def test_a_file_is_measured_within_the_positions_that_it_has(tiny_model: Tiny, tmp_path):
    """GPT-2 learns each position, and the engine ends the process beyond the last; this one has 256."""
    path = tmp_path / "gpt2.gguf"
    write_gguf(tiny_model("gpt2"), {}, path)
    assert measure_file(path, 2048, rounds=1).speed > 0


def test_what_is_promised_is_the_usual_speed_and_formats_are_compared_at_their_best(
    tiny_model: Tiny, tmp_path, monkeypatch
):
    def timed(files, worker, **_):
        found = SimpleNamespace(memory_bytes=figure([9, 7, 8]), decode=figure([50.0, 10.0, 20.0]))
        return SimpleNamespace(files=[found])

    monkeypatch.setattr(footprint, "measure_speed", timed)
    monkeypatch.setattr("pocketlm.plan.sizes.FORMATS", {"Q4_0": FORMATS["Q4_0"]})
    model = tiny_model("llama")
    sizes, path = sizes_of(model), tmp_path / "model.gguf"
    write_gguf(model, {}, path)
    formats = dict.fromkeys(sizes.group_names, "Q4_0")
    assert measure_file(path, 128) == measure_layout(model, sizes.original, formats, 128) == Footprint(8, 20.0)
    costs = measure_costs(model, sizes, 128, silent)
    assert costs.of(sizes, sizes.original, formats)[1] == pytest.approx(1 / 50, rel=0.01)


@pytest.mark.slow
def test_costs_are_measured_in_the_engine_once(tiny_model: Tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    monkeypatch.setattr("pocketlm.plan.sizes.FORMATS", {name: FORMATS[name] for name in ("Q4_0", "Q8_0")})
    model = tiny_model("llama")
    costs = costs_here(model, sizes_of(model), 128, silent)
    assert costs.memory.keys() == costs.seconds.keys() == {"F16", "Q4_0", "Q8_0"}
    assert all(value >= 0 for value in (costs.base, *costs.memory.values(), *costs.seconds.values()))
    monkeypatch.setattr("pocketlm.plan.footprint.measure_layout", None)
    assert costs_here(model, sizes_of(model), 128, silent) == costs


@pytest.mark.slow
def test_the_command_refuses_at_once_and_fits_memory(tmp_path):
    folder = tiny_folder("llama", tmp_path / "model")
    refused = pocketlm("fit", folder, "--speed", "fast", "-o", tmp_path / "out", cache=tmp_path)
    assert refused.returncode == 2
    refused = pocketlm("fit", folder, "--ram", "1kB", "--context", 64, "-o", tmp_path / "out", cache=tmp_path)
    assert refused.returncode == 3
    assert "The smallest change that fits: --ram" in refused.stderr
    asked = ("--ram", "1GB", "--context", 64, "--quality", 0.9, "--preset", "fast", "--heal", "0", "--json")
    done = pocketlm("fit", folder, *asked, "-o", tmp_path / "out", cache=tmp_path)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    notes = " ".join(report["notes"])
    assert "of memory at 64 tokens of context" in notes
    assert "measured on the file" in notes
    assert "the engine has no other for such heads" in notes
    budget = report["budget"]
    assert budget["bytes"] is None, "no size was asked for"
    assert [limit["text"] for limit in budget["limits"]] == ["1.00 GB of memory at 64 tokens of context", "quality 0.9"]
    assert budget["met"] == all(limit["met"] for limit in budget["limits"])
    assert done.returncode == (0 if budget["met"] else 4), done.stderr
