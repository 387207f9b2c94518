"""Plans: sizes are exact to the byte, the chosen plan is the best there is, and what is refused says why."""

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.conftest import Tiny
from tests.tiny import FAMILIES

from pocketlm.errors import BadInputError, ImpossibleBudgetError, OutOfResourcesError
from pocketlm.export.gguf import write_gguf
from pocketlm.model.anatomy import blocks_of, read_weight, replaced, write_weight
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.sweep import sweep
from pocketlm.model.text import Tokens
from pocketlm.pipeline import planning, preflight
from pocketlm.pipeline.plan_stages import measure_damages
from pocketlm.pipeline.planning import Fit
from pocketlm.pipeline.stages import Texts, gather_texts
from pocketlm.plan.allocation import unit_options
from pocketlm.plan.budget import Budget, highest_quality, parse_quality, parse_size, parse_time, say_bytes
from pocketlm.plan.decide import CODES_FROM, CODES_TIME, Wanted, healing_rate, tuning
from pocketlm.plan.effort import PRESETS
from pocketlm.plan.footprint import Footprint
from pocketlm.plan.recipe import Recipe, check_shapes, from_dict, read_recipe, to_dict, to_yaml
from pocketlm.plan.search import Damages, Plan, candidate_shapes, check_budget, choose, shape_damage
from pocketlm.plan.sensitivity import depth_damage, format_damage, width_damage
from pocketlm.plan.sizes import Shape, Sizes, bits_budget, budget_range, recipe_bytes, sizes_of, smallest_shape
from pocketlm.steps.distil import Distil
from pocketlm.steps.prepare import Prepare
from pocketlm.steps.prune_depth import PruneDepth, prune_depth
from pocketlm.steps.prune_width import PruneWidth, prune_width
from pocketlm.steps.quantize import DAMPING, Quantize, gram_of, quantize
from pocketlm.steps.sparsify import Sparsify
from pocketlm.steps.tune import Tune
from pocketlm.tensors.elimination import gptq
from pocketlm.tensors.formats import FORMATS

every_family = pytest.mark.parametrize("family", FAMILIES)
WINDOWS = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
SCALES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def silent(what: str, done: int, total: int) -> None:
    """Progress that nobody watches; what is done never exceeds what there is."""
    assert 0 <= done <= total, what


def test_a_recipes_own_seed_draws_the_text(tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """So that it gives the same bytes wherever it is run."""
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    model, path = tiny_model("llama"), tmp_path / "recipe.yaml"
    path.write_text(to_yaml(Recipe(steps=(Quantize(formats={"*": "Q8_0"}),), seed=7)))
    texts, _ = planning.prepare(Fit(model="tiny", recipe=path, out=tmp_path / "out"), model, silent)
    drawn = [gather_texts(model, [], seed, silent).calibration.sha256 for seed in (7, 0)]
    assert texts.calibration.sha256 == drawn[0] != drawn[1]


# ---- budgets ----


@given(st.integers(1, 99_999), st.integers(0, 3), st.sampled_from(sorted(SCALES)), st.sampled_from(["", " "]))
def test_sizes_are_read_exactly(digits: int, decimals: int, unit: str, gap: str):
    number = f"{digits / 10**decimals:.{decimals}f}"
    truth = digits * SCALES[unit] // 10**decimals
    for text in (f"{number}{gap}{unit}", f" {number}{gap}{unit.lower()} "):
        if truth:
            assert parse_size(text, 1) == Budget(text.strip(), truth)
        else:
            with pytest.raises(BadInputError, match="is nothing"):
                parse_size(text, 1)


@given(st.integers(1, 10**12), st.integers(1, 1000))
def test_shares_are_of_the_whole(whole: int, share: int):
    if whole * share >= 100:
        assert parse_size(f"{share}%", whole).bytes == whole * share // 100


def test_what_people_write():
    assert parse_size("70MB", 1).bytes == 70_000_000
    assert parse_size("0.5GiB", 1).bytes == 2**29
    assert parse_size(".5 gb", 1).bytes == 500_000_000
    assert parse_size("12345", 1).bytes == 12345
    assert parse_size("2.01MB", 1).bytes == 2_010_000, "as a float it would be a byte less"
    assert parse_size("12.5%", 1000).bytes == 125
    assert parse_size("9" * 400, 1).bytes == int("9" * 400)


@pytest.mark.parametrize(
    "text", ["", "MB", "-5MB", "70 M B", "7O MB", "1e3MB", "70TB", "70M", "5i", "1,5GB", "٧MB", "%"]
)
def test_sizes_that_cannot_be_read(text: str):
    with pytest.raises(BadInputError, match=re.escape(f"Cannot read the size `{text}`. Write it like 70MB")):
        parse_size(text, 100)


@pytest.mark.parametrize("text", ["0", "0MB", "0.4B", "0%", "0.1%"])
def test_sizes_that_are_nothing(text: str):
    with pytest.raises(BadInputError, match=re.escape(f"The size `{text}` is nothing")):
        parse_size(text, 100)


@pytest.mark.parametrize(
    ("text", "seconds"), [("30s", 30), ("5m", 300), ("1.5H", 5400), (" 2 m ", 120), ("0", 0), ("0s", 0), (".5m", 30)]
)
def test_times_are_read(text: str, seconds: float):
    assert parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "5", "-5m", "5 minutes", "m", "1d", "5m30s"])
def test_times_that_cannot_be_read(text: str):
    with pytest.raises(BadInputError, match=re.escape(f"Cannot read the time `{text}`")):
        parse_time(text)


def test_bytes_are_said_in_decimal_units():
    assert [say_bytes(n) for n in (1_500, 1_234_567, 2_345_678_901)] == ["1.5 kB", "1.2 MB", "2.35 GB"]


# ---- recipes ----

DEPTHS = st.builds(PruneDepth, drop=st.lists(st.integers(0, 40), max_size=5).map(tuple))
WIDTHS = st.builds(PruneWidth, ffn=st.integers(1, 10_000))
HEALING = st.builds(
    Distil,
    tokens=st.integers(1, 10**9),
    learning_rate=st.floats(1e-7, 1.0),
    windows_per_step=st.integers(1, 64),
    warm_up=st.floats(0, 1),
    evaluations=st.integers(1, 20),
    seed=st.integers(0, 2**32),
)
LAST = st.builds(
    Quantize,
    formats=st.dictionaries(
        st.sampled_from(["embedding", "head", "value", "ffn_in", "model.layers.0.*"]),
        st.sampled_from(["F16", *FORMATS]),
    ),
    method=st.sampled_from(["gptq", "rtn"]),
    learned_rounding=st.integers(0, 500),
    seed=st.integers(0, 2**32),
)
TUNING = st.builds(
    Tune,
    tokens=st.integers(1, 10**9),
    train=st.sampled_from(["scales", "weights"]),
    scale_rate=st.floats(1e-7, 1.0),
    code_rate=st.floats(1e-7, 1.0),
)
RECIPES = st.builds(
    lambda steps, last, tuning, seed: Recipe(steps=(*steps, last, *tuning), seed=seed),
    st.lists(st.one_of(DEPTHS, WIDTHS, HEALING), max_size=4),
    LAST,
    st.lists(TUNING, max_size=1),
    st.integers(0, 2**32),
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RECIPES)
def test_a_recipe_survives_yaml(tmp_path: Path, recipe: Recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    again = read_recipe(path)
    assert again == recipe
    assert to_yaml(again) == to_yaml(recipe)
    assert from_dict(to_dict(recipe), "here") == recipe


def test_the_rate_of_healing_grows_with_the_root_of_its_tokens():
    assert [healing_rate(tokens, trimmed=False) for tokens in (1, 12_288, 4 * 12_288, 10**6)] == [
        6e-5,
        6e-5,
        1.2e-4,
        3e-4,
    ]
    assert [healing_rate(tokens, trimmed=True) for tokens in (1, 10**6)] == [2e-4, 3e-4]


def test_codes_learn_in_a_long_tuning_alone():
    short, long = tuning(CODES_FROM - 1, seed=7), tuning(CODES_FROM, seed=7)
    assert (short.train, short.tokens, short.seed) == ("scales", CODES_FROM - 1, 7)
    assert (long.train, long.tokens, long.seed) == ("weights", int(CODES_FROM / CODES_TIME), 7)


LAST_STEP: dict[str, Any] = {"step": "quantize", "formats": {"embedding": "Q8_0"}}
DISTIL: dict[str, Any] = {"step": "distil", "tokens": 5}
TUNE: dict[str, Any] = {"step": "tune", "tokens": 5}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "r.yaml: the file: "),
        ([], "r.yaml: the file: "),
        ({}, "r.yaml: steps: Field required"),
        ({"steps": [LAST_STEP], "sead": 1}, "r.yaml: sead: Unexpected keyword argument"),
        ({"steps": [LAST_STEP | {"bits": 4}]}, "r.yaml: steps.0.quantize.bits: Unexpected keyword argument"),
        (
            {"steps": [{"step": "distil", "tokens": 5, "learning-rate": 1.0}, LAST_STEP]},
            "r.yaml: steps.0.distil.learning-rate: Unexpected keyword argument",
        ),
        ({"steps": [{"step": "distil"}, LAST_STEP]}, "r.yaml: steps.0.distil.tokens: Field required"),
        (
            {"steps": [{"step": "prune_width", "ffn": "wide"}, LAST_STEP]},
            "r.yaml: steps.0.prune_width.ffn: Input should",
        ),
        ({"steps": [{"step": "prune_width", "ffn": 1.5}, LAST_STEP]}, "r.yaml: steps.0.prune_width.ffn: Input should"),
        (
            {"steps": [{"step": "prune_depth", "drop": [1, "x"]}, LAST_STEP]},
            "r.yaml: steps.0.prune_depth.drop.1: Input",
        ),
        (
            {"steps": [LAST_STEP | {"method": "magic"}]},
            "r.yaml: steps.0.quantize.method: Input should be 'descent', 'gptaq', 'gptq' or 'rtn'",
        ),
        ({"steps": [{"step": "shrink"}, LAST_STEP]}, "r.yaml: steps.0: "),
        ({"steps": [{"ffn": 3}, LAST_STEP]}, "r.yaml: steps.0: "),
        (
            {"steps": []},
            "r.yaml: a recipe ends with one `quantize` step, which one `tune` may follow; this one has: none",
        ),
        ({"steps": [{"step": "prune_width", "ffn": 3}]}, "which one `tune` may follow; this one has: prune_width"),
        ({"steps": [LAST_STEP, {"step": "distil", "tokens": 5}]}, "this one has: quantize, distil"),
        ({"steps": [TUNE]}, "this one has: tune"),
        ({"steps": [TUNE, LAST_STEP]}, "this one has: tune, quantize"),
        ({"steps": [LAST_STEP, TUNE, TUNE]}, "this one has: quantize, tune, tune"),
        ({"steps": [LAST_STEP, TUNE | {"train": "all"}]}, "r.yaml: steps.1.tune.train: Input should be 'scales' or"),
        ({"steps": [LAST_STEP, LAST_STEP]}, "this one has: quantize, quantize"),
        ({"steps": [LAST_STEP | {"windows": 0}]}, "`windows` of at least 1 and `learned_rounding` of at least 0"),
        ({"steps": [LAST_STEP | {"learned_rounding": -3}]}, "given: 64, -3"),
        (
            {"steps": [{"step": "prune_width", "ffn": 3, "windows": 0}, LAST_STEP]},
            "r.yaml: `prune_width` needs `windows` of at least 1; given: 0",
        ),
        ({"steps": [{"step": "prune_depth", "drop": [1], "windows": -2}, LAST_STEP]}, "at least 1; given: -2"),
        (
            {"steps": [{"step": "trim_vocabulary", "size": 0}, LAST_STEP]},
            "`trim_vocabulary` needs a `size` of at least 1",
        ),
        (
            {"steps": [LAST_STEP, TUNE | {"warm_up": 5}]},
            "`tune` needs `tokens`, `windows_per_step` and `evaluations` of at least 1 and `warm_up` from 0 to 1",
        ),
        ({"steps": [{"step": "distil", "tokens": 0}, LAST_STEP]}, "given: tokens 0, windows_per_step 4"),
        ({"steps": [DISTIL | {"evaluations": 0}, LAST_STEP]}, "evaluations 0, warm_up 0.1"),
        ({"steps": [DISTIL | {"learning_rate": -1}, LAST_STEP]}, "A learning rate of -1 teaches nothing"),
        ({"steps": [DISTIL | {"temperature": 0}, LAST_STEP]}, "`temperature` above 0, given: 0"),
        ({"steps": [LAST_STEP, TUNE | {"scale_rate": -1}]}, "above 0; given: -1, 0.002"),
        ({"steps": [DISTIL | {"patience": -1}, LAST_STEP]}, "patience -1"),
        ({"steps": [DISTIL | {"adapters": -4}, LAST_STEP]}, "adapters -4"),
        (
            {"steps": [{"step": "trim_vocabulary", "size": 9}, DISTIL | {"on_policy": 0.5}, LAST_STEP]},
            "Across two vocabularies distil has forward KL",
        ),
    ],
)
def test_what_is_not_a_recipe_is_refused_with_the_place(data: object, words: str):
    with pytest.raises(BadInputError, match=re.escape(words)):
        from_dict(data, "r.yaml")


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ((PruneDepth(drop=(99,)),), "Cannot drop block 99"),
        ((PruneDepth(drop=(0,)), PruneDepth(drop=(2,))), "Cannot drop block 2: the model has blocks 0 to 1"),
        ((PruneDepth(drop=(0, 1, 2)),), "Cannot drop all 3 blocks"),
        ((PruneWidth(ffn=10_000),), "Cannot make FFNs 10000 wide"),
        ((PruneWidth(kv_groups=0),), "Cannot keep 0 KV groups"),
    ],
)
def test_shapes_that_a_model_has_not_are_refused_before_any_step(steps: tuple, words: str, tiny_model: Tiny):
    network = tiny_model("llama", num_hidden_layers=3).network
    with pytest.raises(BadInputError, match=words):
        check_shapes(Recipe(steps=(*steps, Quantize(formats={"*": "F16"}))), network)
    check_shapes(Recipe(steps=(PruneDepth(drop=(1,)), Quantize(formats={"*": "F16"}))), network)


def test_files_that_are_not_recipes(tmp_path: Path):
    with pytest.raises(BadInputError, match=r"Cannot read .*nowhere\.yaml: No such file"):
        read_recipe(tmp_path / "nowhere.yaml")
    path = tmp_path / "broken.yaml"
    for content in (b"steps: [", b"a: b: c", b"caf\xe9: 1", b"\x00"):
        path.write_bytes(content)
        with pytest.raises(BadInputError, match=r"broken\.yaml is not YAML"):
            read_recipe(path)


# ---- sizes ----


def size_cases() -> list[tuple[str, dict[str, Any]]]:
    return [
        *((family, {}) for family in FAMILIES),
        ("llama", {"intermediate_size": 64}),  # as wide as the model: only one of the two is narrowed
        ("llama", {"mlp_bias": True, "attention_bias": True, "tie_word_embeddings": False}),
        ("gpt2", {"n_inner": None}),
    ]


@pytest.mark.parametrize(("family", "changes"), size_cases())
def test_predicted_sizes_are_those_of_the_file(family: str, changes: dict, tiny_model: Tiny, tmp_path: Path):
    sizes = sizes_of(tiny_model(family, **changes))
    uniform = sizes.anatomy.uniform_blocks
    names = sizes.group_names
    mixed = dict(zip(names, itertools.cycle(["Q4_0", "F16", "Q8_0", "Q5_0", "IQ4_NL"]), strict=False))
    cases = [
        (sizes.original, dict.fromkeys(names, "F16")),
        (Shape(sizes.original.blocks - uniform, sizes.original.ffn), dict.fromkeys(names, "Q4_0")),
        (Shape(sizes.original.blocks - 2 * uniform, 32), mixed),
    ]
    for shape, formats in cases:
        model = tiny_model(family, **changes)
        steps = [
            PruneDepth(drop=tuple(range(sizes.original.blocks - shape.blocks))),
            PruneWidth(ffn=shape.ffn),
            Quantize(formats=formats, method="rtn"),
        ]
        model, _ = prune_depth(model, steps[0])
        model, _ = prune_width(model, steps[1], WINDOWS)
        model, packed, _ = quantize(model, steps[2], WINDOWS)
        write_gguf(model, packed, tmp_path / "model.gguf")
        real = (tmp_path / "model.gguf").stat().st_size
        assert sizes.total(shape, formats) == real
        assert recipe_bytes(sizes, Recipe(steps=tuple(steps))) == real
        assert sizes_of(model).total(Shape(shape.blocks, shape.ffn), formats) == real
    assert sizes.total_f16 == sizes.total(*cases[0])


@every_family
def test_the_bytes_of_units_add_up(family: str, tiny_model: Tiny):
    sizes = sizes_of(tiny_model(family))
    generator = torch.Generator().manual_seed(1)
    for shape in (sizes.original, smallest_shape(sizes)):
        damages = {unit: dict.fromkeys(["F16", *FORMATS], 0.0) for unit in sizes.units(shape)}
        base, options = unit_options(sizes, shape, damages, {})
        for _ in range(20):
            picks = {
                unit: choices[torch.randint(len(choices), (), generator=generator)] for unit, choices in options.items()
            }
            formats = {name: picks[unit].format for unit, names in sizes.units(shape).items() for name in names}
            assert base + sum(option.bytes for option in picks.values()) == sizes.total(shape, formats)


@every_family
def test_every_matrix_that_a_shape_has_is_in_one_unit(family: str, tiny_model: Tiny):
    sizes = sizes_of(tiny_model(family))
    units = sizes.units(sizes.original)
    assert sorted(itertools.chain(*units.values())) == sorted(sizes.groups)
    for unit, names in units.items():
        block, _, group = unit.rpartition(".")
        assert {sizes.groups[name] for name in names} == {group}
        assert all(f".{block}." in name for name in names if block)
    if sizes.anatomy.uniform_blocks:
        shorter = sizes.units(Shape(2, 64))
        assert list(shorter) == [unit for unit in units if not unit.startswith("2.")]


def test_bits_per_weight_are_of_the_matrices_alone(tiny_model: Tiny):
    """A file whose matrices are all in one format takes just that format's bits."""
    sizes = sizes_of(tiny_model("qwen2"))
    for name in ("Q4_0", "Q8_0", "F16"):
        bits = 16 if name == "F16" else FORMATS[name].bits
        assert bits_budget(sizes, bits).bytes == sizes.total(sizes.original, dict.fromkeys(sizes.group_names, name))
    assert bits_budget(sizes, 4.25).text == "4.25 bits per weight"
    for bits in (0, -1.5):
        with pytest.raises(BadInputError, match=re.escape(f"--bits {bits:g} is nothing")):
            bits_budget(sizes, bits)


@every_family
def test_every_matrix_belongs_to_one_group(family: str, tiny_model: Tiny):
    sizes = sizes_of(tiny_model(family))
    matrices = {name for name, shape in sizes.shapes.items() if len(shape) == 2}
    assert set(sizes.groups) == matrices - {"transformer.wpe.weight"}, "only GPT-2's positions are not quantized"


def test_groups_whose_rows_do_not_divide_stay_16_bit(tiny_model: Tiny):
    sizes = sizes_of(tiny_model("llama", intermediate_size=100))
    assert sizes.allowed("ffn_out") == ["F16"]
    assert sizes.allowed("ffn_in") == ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "NVFP4", "Q4_0", "IQ4_NL", "MXFP4", "Q2_0"]
    assert sizes.middle("ffn_in") == "IQ4_NL"
    assert sizes.middle("ffn_out") == "F16"
    least, most = budget_range(sizes)
    assert least < most < sizes.total_f16


def test_formats_that_fit_only_some_widths_are_allowed_only_there(tiny_model: Tiny):
    sizes = sizes_of(tiny_model("llama", intermediate_size=256))
    assert {"Q4_K", "Q2_0"} < set(sizes.allowed("ffn_out"))
    small = ["Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "MXFP4"]
    assert sizes.allowed("ffn_out", Shape(3, 96)) == small
    assert set(sizes.allowed("ffn_out", Shape(3, 64))) == {*small, "NVFP4", "Q2_0"}


@pytest.mark.parametrize("width", [128, 256])
def test_the_smallest_file_can_be_made(width: int, tiny_model: Tiny):
    """Formats of large blocks fit the original's width, but not the narrowest."""
    sizes = sizes_of(tiny_model("llama", intermediate_size=width))
    shape = smallest_shape(sizes)
    smallest = {group: sizes.allowed(group, shape)[-1] for group in sizes.group_names}
    assert budget_range(sizes)[0] == sizes.total(shape, smallest)


def test_a_smaller_shape_has_no_format_whose_damage_the_original_cannot_show(tiny_model: Tiny):
    sizes = sizes_of(tiny_model("llama", intermediate_size=172))
    assert sizes.allowed("ffn_out") == sizes.allowed("ffn_out", smallest_shape(sizes)) == ["F16"]


def test_recipes_that_do_not_fit_a_model_are_refused_before_the_work(tiny_model: Tiny):
    sizes = sizes_of(tiny_model("llama"))
    all_groups = dict.fromkeys(sizes.group_names, "Q4_0")
    narrow = Recipe(steps=(PruneWidth(ffn=100), Quantize(formats=all_groups)))
    with pytest.raises(
        BadInputError, match=r"Q4_0 needs rows that divide by 32; those of \S+down_proj.weight have 100 weights"
    ):
        recipe_bytes(sizes, narrow)
    prepared = Recipe(steps=(Prepare(formats={"ffn_in": "Q4_9"}), Quantize(formats=all_groups)))
    with pytest.raises(BadInputError, match="Q4_9"):
        recipe_bytes(sizes, prepared)
    zeros = Recipe(steps=(Sparsify(sparsity=0.5), Quantize(formats=all_groups | {"value": "Q2_K"}, keep_zeros=True)))
    with pytest.raises(BadInputError, match="Q2_K"):
        recipe_bytes(sizes, zeros)
    with pytest.raises(BadInputError, match="The recipe gives no format for `value`"):
        recipe_bytes(sizes, Recipe(steps=(Quantize(formats={k: v for k, v in all_groups.items() if k != "value"}),)))


def test_heads_follow_from_groups_step_by_step(tiny_model: Tiny, tmp_path: Path):
    model = tiny_model("llama", num_attention_heads=4, num_key_value_heads=2)
    sizes, formats = sizes_of(model), dict.fromkeys(sizes_of(model).group_names, "F16")
    steps = PruneWidth(heads=2), PruneWidth(kv_groups=1), Quantize(formats=formats)
    for step in steps[:2]:
        model, _ = prune_width(model, step, WINDOWS)
    assert model.network.config.num_attention_heads == 1
    write_gguf(model, {}, tmp_path / "model.gguf")
    assert recipe_bytes(sizes, Recipe(steps=steps)) == (tmp_path / "model.gguf").stat().st_size


# ---- the search ----


@pytest.fixture(scope="module")
def sizes(tiny_model: Tiny) -> Sizes:
    return sizes_of(tiny_model("llama"))


def random_damages(sizes: Sizes, seed: int) -> Damages:
    generator = torch.Generator().manual_seed(seed)

    def number() -> float:
        return torch.rand((), generator=generator).item()

    formats = {
        unit: {name: number() / 10 for name in sizes.allowed(unit.rpartition(".")[2])}
        for unit in sizes.units(sizes.original)
    }
    return Damages(((1, number()),), {32: 1 + number(), 64: number()}, formats)


def equal_damages(sizes: Sizes, names: tuple[str, ...]) -> dict[str, dict[str, float]]:
    return {unit: dict.fromkeys(names, 0.01) for unit in sizes.units(sizes.original)}


def brute_force(sizes: Sizes, damages: Damages, budget: int) -> tuple[float, Shape | None]:
    """Least damage, and its shape, over every block count, width and format per group, files as predicted."""
    best: tuple[float, Shape | None] = (math.inf, None)
    known = {**damages.width, 128: 0.0}
    known[96] = ((math.sqrt(known[64]) + math.sqrt(known[128])) / 2) ** 2
    for blocks, ffn in itertools.product((2, 3), (32, 64, 96, 128)):
        gone, depth = ("1.", damages.depth[0][1]) if blocks == 2 else ("-", 0.0)
        for mix in itertools.product(*map(sizes.allowed, sizes.group_names)):
            formats = dict(zip(sizes.group_names, mix, strict=True))
            if sizes.total(Shape(blocks, ffn), formats) <= budget:
                rounding = sum(
                    by_format[formats[unit.rpartition(".")[2]]]
                    for unit, by_format in damages.formats.items()
                    if not unit.startswith(gone)
                )
                best = min(best, (known[ffn] + depth + rounding, Shape(blocks, ffn)), key=lambda pair: pair[0])
    return best


@pytest.mark.parametrize("seed", range(3))
def test_the_shape_is_the_best_by_brute_force_and_blocks_may_differ(
    seed: int, sizes: Sizes, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pocketlm.plan.sizes.FORMATS", {name: FORMATS[name] for name in ("Q4_0", "Q8_0")})
    damages = random_damages(sizes, seed)
    least, most = budget_range(sizes)
    gains = []
    for share in (0.0, 0.1, 0.35, 0.6, 1.0):
        budget = Budget("b", int(least + share * (most - least)))
        plan = choose(sizes, damages, budget)
        by_groups, shape = brute_force(sizes, damages, budget.bytes)
        assert plan.shape == shape
        assert plan.damage <= by_groups * 1.0002
        assert plan.bytes == sizes.total(plan.shape, plan.formats) <= budget.bytes
        assert plan.drop == ((1,) if plan.shape.blocks == 2 else ())
        assert set(plan.formats) >= set(sizes.group_names)
        rounding = sum(damage for _, _, damage in plan.units.values())
        assert plan.damage == pytest.approx(shape_damage(sizes, damages, shape) + rounding)
        gains.append(by_groups - plan.damage)
    assert gains[0] == pytest.approx(0, abs=1e-6), "the smallest file leaves no choice"
    assert max(gains) > 0.01


def test_dropped_blocks_leave_the_damages_of_the_others_in_place(sizes: Sizes):
    """What was block 2 is block 1 when block 1 is gone: each keeps the formats that are best for it."""
    formats = equal_damages(sizes, ("Q4_0", "Q8_0"))
    for unit, by_format in formats.items():
        by_format["Q4_0"] = 9.0 if unit == "2.ffn_in" else 0.0
        by_format["Q8_0"] = 9.0 if unit == "1.ffn_in" else 0.001
    small = sizes.total(Shape(2, 128), dict.fromkeys(sizes.group_names, "Q4_0"))
    budget = sizes.total(sizes.original, dict.fromkeys(sizes.group_names, "Q4_0")) - 1
    plan = choose(sizes, Damages(((1, 0.5),), {}, formats), Budget("b", budget))
    assert plan.shape == Shape(2, 128)
    assert {unit for unit, (name, *_) in plan.units.items() if name == "Q8_0"} == {"1.ffn_in"}
    assert plan.damage == pytest.approx(0.501)
    assert small < plan.bytes <= budget


def test_a_larger_budget_is_never_worse(sizes: Sizes):
    damages = random_damages(sizes, 5)
    least, most = budget_range(sizes)
    budgets = [Budget("b", least + i * (most - least) // 12) for i in range(13)]
    plans = [choose(sizes, damages, budget) for budget in budgets]
    assert all(after.damage <= before.damage * 1.0002 for before, after in itertools.pairwise(plans))
    assert plans[0].bytes == least


def test_nothing_is_pruned_that_was_not_measured(sizes: Sizes):
    """No width was measured: narrower FFNs are unknown, not free. No depth was measured: no block goes."""
    formats = equal_damages(sizes, ("Q8_0", "IQ4_NL"))
    tight = Budget("b", sizes.total(Shape(2, 128), dict.fromkeys(sizes.group_names, "IQ4_NL")))
    plan = choose(sizes, Damages(((1, 0.5),), {}, formats), tight)
    assert plan.shape == Shape(2, 128)
    narrow = Budget("b", sizes.total(Shape(3, 64), dict.fromkeys(sizes.group_names, "IQ4_NL")))
    assert choose(sizes, Damages((), {64: 0.5}, formats), narrow).shape == Shape(3, 64)
    assert choose(sizes, Damages(((1, 9.0),), {64: 0.5}, formats), narrow).shape == Shape(3, 64)
    with pytest.raises(ImpossibleBudgetError, match="cannot be met with what was measured and fixed"):
        choose(sizes, Damages(formats=formats), tight)


def test_pruning_is_measured_once_and_only_where_nearly_free_formats_do_not_fit(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path))
    model = tiny_model("llama", num_hidden_layers=6)
    sizes, text = sizes_of(model), Tokens("text", WINDOWS, "")
    texts, said = Texts(text, text, text, {}), []

    def measured(budget: int, preset: str = "balanced", prune: bool = True) -> Damages:
        said.clear()
        wanted = Wanted(budget=Budget("b", budget), prune=prune, effort=PRESETS[preset])
        return measure_damages(model, wanted, texts, lambda what, *_: said.append(what))

    nearly_free = sizes.total(sizes.original, {group: sizes.middle(group) for group in sizes.group_names})
    none = measured(nearly_free)
    assert (none.depth, none.width) == ((), {})
    assert measured(nearly_free - 1, prune=False) == none
    assert not said, "formats are measured once"
    small = measured(nearly_free * 2 // 3)
    assert len(small.depth) > 1
    assert small.width
    assert any("dropping" in what for what in said)
    again, asked = measured(nearly_free * 2 // 3), list(said)
    assert (again, asked) == (small, []), "the same question is answered from the cache"
    larger = measured(nearly_free - 1)
    assert larger == replace(small, depth=small.depth[:1])
    assert {what.split(" of ")[0] for what in said} == {"damage"}
    assert not any("formats" in what or "FFN" in what for what in said)
    hurried = measured(nearly_free - 1, "fast")
    assert hurried.depth == small.depth[:1]
    assert not any("FFN" in what for what in said)


def recipe_for(plan: Plan) -> Recipe:
    width = (PruneWidth(ffn=plan.shape.ffn),) if plan.narrower else ()
    return Recipe(steps=(PruneDepth(drop=plan.drop), *width, Quantize(formats=plan.formats)))


def test_fixed_formats_are_kept_whatever_they_cost(sizes: Sizes):
    damages = random_damages(sizes, 6)
    damages = replace(damages, depth=(), width={})
    _, most = budget_range(sizes)
    fixed = {"model.layers.0.mlp.*": "Q8_0", "embedding": "Q2_0", "ffn_out": "Q5_1"}
    plan = choose(sizes, damages, Budget("b", most), fixed)
    chosen = {unit: name for unit, (name, *_) in plan.units.items()}
    assert chosen["embedding"] == "Q2_0"
    assert chosen["0.ffn_in"] == "Q8_0"
    assert [chosen[f"{i}.ffn_out"] for i in range(3)] == ["Q5_1"] * 3, "of several that match the last one counts"
    assert recipe_bytes(sizes, Recipe(steps=(Quantize(formats=plan.formats),))) == plan.bytes
    free = choose(sizes, damages, Budget("b", most))
    for unit, (_, size, damage) in plan.units.items():
        if unit not in ("embedding", "0.ffn_in") and not unit.endswith("ffn_out"):
            assert (size, damage) == free.units[unit][1:]


@pytest.mark.parametrize("budget", [150_000, 165_000, 200_000])
def test_whole_blocks_may_be_fixed_and_the_shape_still_be_chosen(budget: int, sizes: Sizes):
    """What has no choice counts in full, whatever format its group takes elsewhere."""
    fixed = {"model.layers.0.*": "F16", "model.layers.1.*": "F16"}
    plan = choose(sizes, random_damages(sizes, 6), Budget("b", budget), fixed)
    assert recipe_bytes(sizes, recipe_for(plan)) == plan.bytes <= budget


@pytest.mark.parametrize("missing", [1, 1000, 10**5])
def test_an_impossible_budget_is_refused_with_the_range_and_a_budget_that_works(missing: int, sizes: Sizes):
    least, most = budget_range(sizes)
    text = f"{max(1, least - missing)}B"
    with pytest.raises(ImpossibleBudgetError) as refusal:
        check_budget(sizes, parse_size(text, 1))
    message = str(refusal.value)
    assert message.startswith(text)
    assert f"{say_bytes(least)} ({least:,} bytes) to {say_bytes(most)}" in message
    suggested = parse_size(re.search(r"--size (\S+)", message)[1], 1)
    check_budget(sizes, suggested)
    assert suggested.bytes < least + 10_000
    assert choose(sizes, random_damages(sizes, 1), suggested).bytes <= suggested.bytes


def test_what_fits_has_the_formats_that_are_not_up_for_choice(sizes: Sizes):
    fixed = {"embedding": "Q8_0", "model.layers.1.mlp.*": "F16"}
    free, (least, most) = budget_range(sizes, prune=False), budget_range(sizes, False, fixed)
    assert free[0] < least
    assert most > free[1], "16 bits are not up for choice, but can be asked for"
    with pytest.raises(ImpossibleBudgetError) as refusal:
        check_budget(sizes, Budget("so much", free[0]), False, fixed)
    suggested = parse_size(re.search(r"--size (\S+)", str(refusal.value))[1], 1)
    damages = replace(random_damages(sizes, 1), depth=(), width={})
    assert choose(sizes, damages, suggested, fixed).bytes <= suggested.bytes


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (Fit(model="demo"), "Give a budget with --size"),
        (Fit(model="demo", format="q4_0", method="typo"), "Unknown method `typo`. Known: descent, gptaq, gptq, rtn"),
        (Fit(model="demo", accuracy="0.9", time=600.0), "leave --time out, or that"),
        (Fit(model="demo", size="1MB", time=600.0, preset="fast"), "--time is for --preset balanced or best"),
        (Fit(model="demo", size="1MB", time=600.0, heal=0.0), "--time is for --preset balanced or best"),
        (Fit(model="demo", size="1MB", context=64), "give --ram too"),
    ],
)
def test_jobs_that_cannot_be_are_refused_before_any_work(job: Fit, words: str):
    with pytest.raises(BadInputError, match=re.escape(words)):
        planning.check_job(job)


def test_a_quality_that_the_engine_alone_misses_is_refused_before_anything_is_measured(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(planning, "engine_damage", lambda *_: 0.005)
    monkeypatch.setattr(planning, "make_plan", lambda *_: pytest.fail("nothing can be met"))
    job = Fit(model="tiny", quality="0.996", out=tmp_path / "out", preset="fast")
    with pytest.raises(ImpossibleBudgetError, match=r"alone cost 0\.0050.* 0\.0040 are allowed") as refused:
        planning.prepare(job, tiny_model("llama"), silent)
    suggested = parse_quality(str(refused.value).partition("at most ")[2])
    assert suggested == 0.995
    assert planning._most_damage(suggested, 0.005) > 0


@pytest.mark.parametrize("kl", [1e-6, 0.005, 0.3, 9.0, 30.0])
def test_the_highest_quality_that_is_named_is_kept_to(kl: float):
    assert kl <= -math.log(parse_quality(highest_quality(kl))) < kl + 2e-4 + 1e-3 * kl


def test_only_what_is_near_its_limit_binds(sizes: Sizes):
    plan = Plan(sizes.original, (), {}, 900, 0.09, {}, footprint=Footprint(memory=50, speed=20.0))

    def binding(most_damage: float | None = None, **limits: Any) -> str:
        budget = Budget("b", 1000, **limits)
        wanted = Wanted(budget=budget, most_damage=most_damage)
        return planning.Planned(Recipe(steps=()), budget, 900, sizes, plan, engine=0.01, wanted=wanted).binding

    assert binding(memory=100) == "size binds"
    assert binding(memory=100, sized=False) == "no limit binds", "half of the memory is unused"
    assert binding(memory=100, sized=False, most_damage=0.09) == "quality binds"
    assert binding(memory=100, sized=False, most_damage=0.2) == "no limit binds"
    assert binding(memory=51, most_damage=0.09, sized=False) == "quality binds"
    assert binding(memory=51, most_damage=0.2) == "memory binds"
    assert binding(speed=19.5, sized=False) == "speed binds"


def test_what_only_quantizes_wants_no_room_to_learn(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    for steps, trains in (([LAST_STEP], False), ([LAST_STEP, TUNE], True), ([DISTIL, LAST_STEP], True)):
        path.write_text(to_yaml(from_dict({"steps": steps}, "here")))
        assert planning._trains(Fit(model="demo", recipe=path)) == trains


def test_codes_learn_only_where_memory_has_room_for_them(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    model = tiny_model("llama")
    scales, codes = (Recipe(steps=(Quantize(formats={}), Tune(tokens=5, train=kind))) for kind in ("scales", "weights"))
    for copies, enough in ((7, True), (6, False)):
        free = SimpleNamespace(memory_available_bytes=copies * 4 * model.parameters)
        monkeypatch.setattr(preflight, "machine", lambda free=free: free)
        planning._check_tuning(model, scales)
        if enough:
            planning._check_tuning(model, codes)
        else:
            with pytest.raises(OutOfResourcesError, match="--preset balanced"):
                planning._check_tuning(model, codes)


def test_a_floor_of_quality_may_take_what_a_person_asked_for(sizes: Sizes, tiny_model: Tiny):
    every = dict.fromkeys(sizes.group_names, "F16")
    job = Fit(model="tiny", quality="0.9", fixed=tuple(every.items()), prune=False)
    model = tiny_model(sizes.family)
    budget = planning._budget(job, model, sizes)
    check_budget(sizes, budget, False, every)
    assert budget.bytes == sizes.total_f16


def test_shapes_go_down_to_half_the_blocks_and_a_quarter_of_the_width(sizes: Sizes, tiny_model: Tiny):
    assert candidate_shapes(sizes, 5) == [Shape(n, width) for n in (2, 3) for width in (32, 64, 96, 128)]
    assert candidate_shapes(sizes, 0) == [Shape(3, width) for width in (32, 64, 96, 128)]
    gemma = sizes_of(tiny_model("gemma3_text"))
    assert {shape.blocks for shape in candidate_shapes(gemma, 5)} == {7}
    odd = sizes_of(tiny_model("llama", intermediate_size=100))
    assert [shape.ffn for shape in candidate_shapes(odd, 0)] == [32, 64, 96, 100]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.floats(0, 10), min_size=3, max_size=3))
def test_damages_between_measured_widths_rise_as_the_width_falls(sizes: Sizes, measured: list[float]):
    wide = replace(sizes, original=Shape(4, 256))
    known = dict(zip((32, 96, 192), sorted(measured, reverse=True), strict=True))
    damages = Damages(((2, 0.25), (1, 0.4)), known, {})
    curve = [shape_damage(wide, damages, Shape(4, width)) for width in range(32, 257, 32)]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(curve))
    assert curve[-1] == 0
    for width, kl in known.items():
        assert shape_damage(wide, damages, Shape(4, width)) == pytest.approx(kl)
        assert shape_damage(wide, damages, Shape(3, width)) == pytest.approx(kl + 0.25)
        assert shape_damage(wide, damages, Shape(2, width)) == pytest.approx(kl + 0.4)


# ---- measured damage ----


def divergence(original: torch.nn.Module, other: torch.nn.Module) -> float:
    """Mean KL between two networks, the obvious way."""
    with torch.no_grad():
        truth, guess = (network(WINDOWS, use_cache=False).logits.log_softmax(-1) for network in (original, other))
    return (truth.exp() * (truth - guess)).sum(-1).mean().item()


@pytest.mark.usefixtures("exact")
@every_family
def test_the_judge_measures_the_divergence(family: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("pocketlm.model.judge.POSITIONS_AT_ONCE", 23)  # in pieces, the last one shorter
    original, other = tiny_model(family).network, tiny_model(family).network
    opinion = judge(original, WINDOWS)
    assert divergence_of(other, WINDOWS, opinion) == 0
    with torch.no_grad():
        read_weight(blocks_of(other)[0].mlp.get_submodule("c_proj" if family == "gpt2" else "down_proj")).mul_(1.5)
        other.get_input_embeddings().weight.mul_(1.01)
    assert divergence_of(other, WINDOWS, opinion) == pytest.approx(divergence(original, other), rel=1e-3)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_damage_of_depth_is_that_of_dropping_the_blocks(family: str, tiny_model: Tiny):
    depth = {"n_layer": 6} if family == "gpt2" else {"num_hidden_layers": 6}
    original = tiny_model(family, **depth).network
    path = depth_damage(original, WINDOWS, judge(original, WINDOWS), 3, silent)
    gone: list[int] = []
    for block, damage in path:
        candidates = [index for index in range(1, 5) if index not in gone]
        costs = {}
        for index in candidates:
            pruned, _ = prune_depth(tiny_model(family, **depth), PruneDepth(drop=(*gone, index)))
            costs[index] = divergence(original, pruned.network)
        assert block == min(costs, key=costs.get), "the cheapest block goes first"
        assert damage == pytest.approx(costs[block], rel=1e-3)
        gone.append(block)
    assert len(path) == 3
    opinion = judge(original, WINDOWS)
    assert depth_damage(original, WINDOWS, opinion, 3, silent, enough=path[0][1]) == path[:1], "more is not asked for"
    assert depth_damage(original, WINDOWS, opinion, 3, silent, enough=path[0][1] * 1.001) == path[:2]


@pytest.mark.usefixtures("exact")
@every_family
def test_the_damage_of_width_is_that_of_removing_the_channels(family: str, tiny_model: Tiny):
    original = tiny_model(family).network
    before = {name: value.clone() for name, value in original.state_dict().items()}
    damage = width_damage(original, WINDOWS, WINDOWS, judge(original, WINDOWS), [64, 128], silent)
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert damage[128] < 0.01 * damage[64]
    pruned, _ = prune_width(tiny_model(family), PruneWidth(ffn=64), WINDOWS)
    # The real step solves each block on what the narrowed blocks before it deliver, so it may do better.
    assert damage[64] == pytest.approx(divergence(original, pruned.network), rel=0.6)


def stored(network: torch.nn.Module, form: str, units: list[str], sizes: Sizes) -> None:
    """Store units in a format, codes by GPTQ on the statistics of the network as it is."""
    names = {name for unit in units for name in sizes.units(sizes.original)[unit]}
    weights = {}
    for layer in sweep(network, WINDOWS, head=True):
        for edge, linear in layer.linears():
            if linear is getattr(network, "lm_head", None) and sizes.tied:
                name = sizes.embedding
            else:
                name = layer.parameter_name(edge)
            if name in names:
                gram = gram_of(layer, edge, network)
                weights[linear] = gptq(read_weight(linear), gram, FORMATS[form], DAMPING).decode().bfloat16().float()
    for linear, weight in weights.items():
        linear.weight.data.copy_(weight.T if type(linear).__name__ == "Conv1D" else weight)


@pytest.mark.usefixtures("exact")
@every_family
def test_the_damage_of_formats_is_that_of_storing_each_unit(
    family: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pocketlm.plan.sensitivity.SOME_WINDOWS", len(WINDOWS))
    model = tiny_model(family)
    sizes = sizes_of(model)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    damage = format_damage(model, sizes, WINDOWS, WINDOWS, silent)
    assert all(torch.equal(value, before[name]) for name, value in model.network.state_dict().items())
    assert list(damage) == list(sizes.units(sizes.original))
    factors, shared = [], []
    for unit, by_format in damage.items():
        group = unit.rpartition(".")[2]
        assert list(by_format) == sizes.allowed(group)
        coarse, middle = sizes.allowed(group)[-1], sizes.middle(group)
        assert 0 < by_format["Q8_0"] < 0.1 * by_format["Q5_0"] < 0.1 * by_format[middle] < 0.1 * by_format[coarse]
        if unit in ("0.ffn_in", "2.attention_out", "1.query_key", "1.query_key_value", "0.value", "head"):
            other = tiny_model(family).network
            stored(other, coarse, [unit], sizes)
            (factors if unit == "head" else shared).append(by_format[coarse] / divergence(model.network, other))
    for group in ("ffn_out", "value", "head"):
        units = [unit for unit in damage if unit.rpartition(".")[2] == group]
        if units:
            other = tiny_model(family).network
            stored(other, sizes.middle(group), units, sizes)
            together = sum(damage[unit][sizes.middle(group)] for unit in units)
            factors.append(together / divergence(model.network, other))
    # One factor for everything: what all groups at once cost over the sum of each.
    assert factors == pytest.approx([factors[0]] * len(factors), rel=0.05)
    assert shared == pytest.approx([factors[0]] * len(shared), rel=0.5), "shared out, not measured alone"
    assert 0.5 < factors[0] < 2


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_the_damage_of_the_embedding(family: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    """Tied, it is the head too; looked up only, it is rounded, and each format is measured."""
    model = tiny_model(family)
    sizes = sizes_of(model)
    monkeypatch.setattr("pocketlm.plan.sensitivity.SOME_WINDOWS", len(WINDOWS))
    damage = format_damage(model, sizes, WINDOWS, WINDOWS, silent)["embedding"]
    for name in ("Q4_0", "Q2_0"):
        formats = dict.fromkeys(sizes.group_names, "F16") | {"embedding": name}
        other, _, _ = quantize(tiny_model(family), Quantize(formats=formats), WINDOWS)
        # What is not measured is carried over, and need only be near.
        assert damage[name] == pytest.approx(
            divergence(model.network, other.network), rel=0.5 if sizes.tied else 0.02
        )  # fmt: skip


def test_rows_that_no_block_divides_stay_16_bit_at_no_damage(tiny_model: Tiny):
    model = tiny_model("llama", intermediate_size=100)
    damage = format_damage(model, sizes_of(model), WINDOWS, WINDOWS, silent)
    assert [damage[f"{i}.ffn_out"] for i in range(3)] == [{"F16": 0.0}] * 3
    assert "F16" not in damage["0.ffn_in"]


def test_weights_that_lie_on_a_grid_already_are_no_error(tiny_model: Tiny):
    """A model that was decoded from Q4_0 loses nothing in Q4_0."""
    model = tiny_model("llama")
    for block in blocks_of(model.network):
        weight = read_weight(block.self_attn.v_proj)
        codes = (weight * 20).round().clamp(-8, 7)
        codes[:, ::32] = -8  # as quantizers do, the largest weight of a block lies on the longer side
        write_weight(block.self_attn.v_proj, codes / 16)
    damage = format_damage(model, sizes_of(model), WINDOWS, WINDOWS, silent)
    for i in range(3):
        assert damage[f"{i}.value"]["Q4_0"] == pytest.approx(0, abs=1e-6)
        assert damage[f"{i}.value"]["Q2_0"] > 1e-3
    assert all(math.isfinite(kl) for by_format in damage.values() for kl in by_format.values())


def test_replaced_weights_come_back_even_after_an_error(tiny_model: Tiny):
    network = tiny_model("llama").network
    linear = blocks_of(network)[0].mlp.up_proj
    before = linear.weight.detach().clone()

    def fail() -> None:
        with replaced({linear: torch.zeros_like(before)}):
            assert (linear.weight == 0).all()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert torch.equal(linear.weight, before)
