"""Cutting connections: the masks and the weights are the papers', zeros are where they must be and stay there."""

import json
from itertools import pairwise
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.command_line import pocketlm
from tests.conftest import Tiny
from tests.tiny import FAMILIES, tiny_folder
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.export.gguf import write_gguf
from pocketlm.export.sparse_bitmask import (
    expand,
    linear_names,
    predicted_bytes,
    read_sparse_bitmask,
    squeeze,
    write_sparse_bitmask,
)
from pocketlm.model.anatomy import linears_of, read_weight
from pocketlm.model.language_model import LanguageModel
from pocketlm.plan.recipe import from_dict
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.steps.sparsify import Sparsify, sparsify
from pocketlm.tensors.elimination import gptq, inverse_factor, output_errors
from pocketlm.tensors.formats import FORMATS, Format, pack, round_to_nearest, unpack
from pocketlm.tensors.formats.integer import NAMES, integer_format
from pocketlm.tensors.sparsity import (
    BLOCK,
    METHODS,
    REACH,
    Sparsity,
    magnitude,
    outlier_share,
    owl,
    sparsegpt,
    sparsity_of,
    wanda,
)

WINDOWS = torch.randint(3, 300, (8, 32), generator=torch.Generator().manual_seed(0))
EVERY = {name: integer_format(name, 256) for name in NAMES} | FORMATS
WITH_ZERO = [form for form in EVERY.values() if form.has_zero]
every_method = pytest.mark.parametrize("method", METHODS)
targets = pytest.mark.parametrize("target", [(0.5, None), (0.3, None), (None, "2:4"), (None, "1:4"), (None, "4:8")])


def inputs(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs, (tokens, columns), a few columns far louder than the others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.eye(columns) + 0.5 * torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    x[:, ::11] *= 6
    return x.double()


def weights(rows: int, columns: int, seed: int = 1) -> Tensor:
    return 0.05 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()


# ---- the papers, slowly ----


def by_wanda(weight: Tensor, x: Tensor, sparsity: float, n: int = 0, m: int = 0) -> Tensor:
    """Wanda, algorithm 1: a score for each weight; in each row (or group) the lowest go."""
    pruned = weight.clone()
    for row in range(weight.shape[0]):
        scores = [abs(weight[row, c].item()) * x[:, c].square().sum().sqrt().item() for c in range(weight.shape[1])]
        size = m or len(scores)
        for start in range(0, len(scores), size):
            places = sorted(range(start, start + size), key=lambda c: scores[c])
            for c in places[: m - n if m else round(sparsity * size)]:
                pruned[row, c] = 0
    return pruned


def by_sparsegpt(weight: Tensor, x: Tensor, sparsity: float, n: int = 0, m: int = 0) -> Tensor:
    """SparseGPT, algorithm 1, with the inverse Hessian of the columns that are left made anew for every column."""
    work = weight.clone()
    rows, columns = work.shape
    hessian = x.T @ x
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[c:, c:]) for c in range(columns)]
    keep = torch.ones(rows, columns, dtype=torch.bool)
    for c in range(columns):
        size = m or BLOCK
        if c % size == 0:
            stop = min(c + size, columns)
            scores = {
                (row, j): (work[row, j] ** 2 / inverses[j][0, 0]).item() for row in range(rows) for j in range(c, stop)
            }
            if m:
                for row in range(rows):
                    for j in sorted(range(c, stop), key=lambda j, row=row: scores[row, j])[: m - n]:
                        keep[row, j] = False
            else:
                gone = round(sparsity * rows * stop) - round(sparsity * rows * c)
                for row, j in sorted(scores, key=scores.get)[:gone]:
                    keep[row, j] = False
        for row in range(rows):
            if not keep[row, c]:
                error = work[row, c] / inverses[c][0, 0]
                work[row, c:] -= error * inverses[c][0]
                work[row, c] = 0
    return work


CASES = pytest.mark.parametrize(("share", "n", "m"), [(0.5, 0, 0), (0.7, 0, 0), (0.5, 2, 4), (0.5, 4, 8), (0.75, 1, 4)])


@CASES
def test_wanda_is_the_paper_s(share: float, n: int, m: int):
    weight, x = weights(9, 48), inputs(200, 48)
    ours = wanda(weight, (x.T @ x).diagonal().sqrt(), Sparsity(share, m))
    assert torch.equal(ours, by_wanda(weight, x, share, n, m))


@CASES
@pytest.mark.parametrize("columns", [48, 160])
def test_sparsegpt_is_the_paper_s(columns: int, share: float, n: int, m: int):
    """160 columns are more than one block."""
    weight, x = weights(7, columns), inputs(400, columns)
    ours = sparsegpt(weight, inverse_factor(x.T @ x), Sparsity(share, m))
    assert torch.allclose(ours, by_sparsegpt(weight, x, share, n, m), atol=1e-10)


@CASES
def test_what_wanda_removes_can_be_absorbed(share: float, n: int, m: int):
    """Wanda's mask; after every column those to its right are the least-squares answer to all that is gone."""
    weight, x = weights(6, 48), inputs(200, 48)
    ours = METHODS["wanda_absorbed"]([weight], x.T @ x, Sparsity(share, m))[0]
    keep = by_wanda(weight, x, share, n, m) != 0
    hessian = x.T @ x + 0.01 * (x.T @ x).diagonal().mean() * torch.eye(48, dtype=torch.float64)
    for row in range(6):
        slow = weight[row].clone()
        for c in range(48):
            if not keep[row, c]:
                inverse = torch.linalg.inv(hessian[c:, c:])
                slow[c:] -= slow[c] / inverse[0, 0] * inverse[0]
                slow[c] = 0
        assert torch.allclose(ours[row], slow, atol=1e-10)


def test_magnitude_removes_the_smallest_of_the_matrix():
    weight = weights(9, 48)
    threshold = weight.abs().flatten().sort().values[9 * 48 // 2]
    assert torch.equal(magnitude(weight, Sparsity(0.5)), weight * (weight.abs() >= threshold))


def test_kept_weights_absorb_all_that_they_can():
    """SparseGPT's last columns: nothing that is left could make the output error of the damped problem smaller."""
    weight, x = weights(3, 8), inputs(100, 8)
    gram = x.T @ x + 0.01 * (x.T @ x).diagonal().mean() * torch.eye(8, dtype=torch.float64)
    only_first = torch.full((3, 8), 10.0, dtype=torch.float64)
    only_first[:, :4] = weight[:, :4] * 1e-3  # the four on the left are the ones to go, in one group of eight
    pruned = sparsegpt(only_first, inverse_factor(x.T @ x), Sparsity(0.5, 8))
    assert (pruned[:, :4] == 0).all()
    absorbed = torch.linalg.solve(gram[4:, 4:], gram[4:, :4] @ only_first[:, :4].T).T
    assert torch.allclose(pruned[:, 4:], only_first[:, 4:] + absorbed, atol=1e-9)


# ---- properties ----


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(list(METHODS)),
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    share=st.floats(0, 0.99),
)
def test_exactly_so_many_weights_go(method: str, rows: int, columns: int, share: float):
    gram = inputs(60, columns).float()
    (pruned,) = METHODS[method]([weights(rows, columns).float()], gram.T @ gram, Sparsity(share))
    by_row = method.startswith("wanda")
    expected = rows * round(share * columns) if by_row else round(share * rows * columns)
    assert (pruned == 0).sum() == expected


@settings(deadline=None, max_examples=60)
@given(
    method=st.sampled_from(list(METHODS)),
    rows=st.integers(1, 9),
    groups=st.integers(1, 20),
    kept=st.integers(1, 7),
    gone=st.integers(1, 5),
)
def test_every_group_has_the_pattern(method: str, rows: int, groups: int, kept: int, gone: int):
    size = kept + gone
    x = inputs(60, groups * size).float()
    sparsity = sparsity_of(None, f"{kept}:{size}")
    (pruned,) = METHODS[method]([weights(rows, groups * size).float()], x.T @ x, sparsity)
    assert ((pruned.unflatten(1, (-1, size)) != 0).sum(2) == kept).all()


@every_method
def test_equal_scores_and_silent_inputs_are_no_exception(method: str):
    """The share is exact even where all scores tie."""
    for gram in (torch.zeros(64, 64), torch.eye(64)):
        for sparsity in (Sparsity(0.5), Sparsity(0.5, 4)):
            (pruned,) = METHODS[method]([torch.ones(5, 64)], gram, sparsity)
            assert (pruned == 0).sum() == 160
            assert torch.isfinite(pruned).all()


@every_method
def test_arguments_are_left_alone_and_each_matrix_is_cut_for_itself(method: str):
    x = inputs(300, 64).float()
    first, second = weights(8, 64).float(), 10 * weights(4, 64, seed=2).float()
    before = first.clone()
    both = METHODS[method]([first, second], x.T @ x, Sparsity(0.5))
    assert torch.equal(first, before)
    for weight, cut in zip((first, second), both, strict=True):
        assert torch.equal(METHODS[method]([weight], x.T @ x, Sparsity(0.5))[0], cut)


@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.7), Sparsity(0.5, 4), Sparsity(0.75, 4)])
def test_more_knowledge_of_the_inputs_costs_less(sparsity: Sparsity):
    """On inputs of the same kind that were not seen, too."""
    x, weight = inputs(6000, 256).float(), weights(64, 256).float()
    seen, unseen = x[:3000].T @ x[:3000], x[3000:].T @ x[3000:]
    errors = {
        method: output_errors(weight, METHODS[method]([weight], seen, sparsity)[0], unseen).sum() for method in METHODS
    }
    assert errors["sparsegpt"] < 0.95 * errors["wanda"]
    assert errors["wanda_absorbed"] < errors["wanda"]
    assert errors["wanda"] < 0.8 * errors["magnitude"]


# ---- allocation ----


@settings(deadline=None, max_examples=100)
@given(shares=st.lists(st.floats(0, 0.2), min_size=1, max_size=40), sparsity=st.floats(0, 0.99))
@example(shares=[0.007794646622263148] * 3, sparsity=0.5)  # whose mean is another number
def test_owl_keeps_the_mean_and_spares_outliers(shares: list[float], sparsity: float):
    found = owl(shares, sparsity)
    assert sum(found) / len(found) == pytest.approx(sparsity, abs=1e-9)
    assert all(0 <= value < 1 for value in found)
    assert max(found) - min(found) <= 2 * REACH + 1e-9
    by_outliers = [value for _, value in sorted(zip(shares, found, strict=True))]
    assert all(a >= b - 1e-9 for a, b in pairwise(by_outliers))


def test_owl_is_the_paper_s_formula():
    """Its code: shares scaled to 0 .. 2λ, less their mean, plus what is kept on average."""
    shares = [0.02, 0.05, 0.11, 0.03]
    scaled = [(share - 0.02) / 0.09 * 2 * 0.08 for share in shares]
    kept = [value - sum(scaled) / 4 + 0.4 for value in scaled]
    assert owl(shares, 0.6) == pytest.approx([1 - value for value in kept])


def test_outliers_are_those_beyond_five_times_the_mean():
    scores = [torch.ones(10, 9), torch.full((10, 1), 60.0)]  # mean 6.9
    assert outlier_share(scores) == pytest.approx(0.1)
    assert outlier_share([torch.zeros(3, 3)]) == 0


# ---- the step ----


def zeros_of(model: LanguageModel) -> dict[str, Tensor]:
    return {name: read_weight(linear) == 0 for name, (_, linear) in linears_of(model.network).items()}


@every_method
@targets
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reaches_its_sparsity(
    family: str, target: tuple[float | None, str | None], method: str, tiny_model: Tiny
):
    model, (share, pattern) = tiny_model(family), target
    others = {
        name: value.clone() for name, value in model.network.named_parameters() if name not in linears_of(model.network)
    }
    model, report = sparsify(model, Sparsify(sparsity=share, pattern=pattern, method=method), WINDOWS)
    sparsity = sparsity_of(share, pattern)
    for zeros in zeros_of(model).values():
        assert abs(zeros.double().mean() - sparsity.share) < 0.01
        if pattern:
            groups = zeros.unflatten(1, (-1, sparsity.group))
            assert (groups.sum(2) == sparsity.gone(sparsity.group)).all()
    for name, value in others.items():
        assert torch.equal(model.network.get_parameter(name), value), "only the linears of blocks are cut"
    blocks = model.network.config.num_hidden_layers
    assert len(report.details["sparsity"]) == len(report.details["output_error"]) == blocks
    assert report.details["share_of_zeros"] == pytest.approx(sparsity.share, abs=0.01)
    assert all(0 < error < 1 for error in report.details["output_error"])
    assert "GGUF" in report.summary
    assert torch.isfinite(model.network(WINDOWS).logits).all()


def test_owl_gives_blocks_different_shares(tiny_model: Tiny):
    model = tiny_model("llama")
    with torch.no_grad():
        model.network.model.layers[1].mlp.up_proj.weight[:, :3] *= 30
    model, report = sparsify(model, Sparsify(sparsity=0.5, allocation="owl"), WINDOWS)
    found = report.details["sparsity"]
    assert found[1] == min(found) < 0.45
    assert sum(found) / 3 == pytest.approx(0.5, abs=1e-3)


@pytest.mark.usefixtures("exact")
def test_later_blocks_see_what_earlier_ones_lost(tiny_model: Tiny):
    """The second block is cut by what the first one, cut already, delivers."""
    whole, name = tiny_model("llama").network, "model.layers.1.self_attn.q_proj.weight"
    cut = sparsify(tiny_model("llama"), Sparsify(sparsity=0.6), WINDOWS)[0].network

    def by_what_reaches_it(network: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            states = network(WINDOWS, output_hidden_states=True).hidden_states[1]
            x = whole.model.layers[1].input_layernorm(states).flatten(0, 1)
        return METHODS["sparsegpt"]([whole.get_parameter(name).detach()], x.T @ x, Sparsity(0.6))[0]

    assert torch.allclose(by_what_reaches_it(cut), cut.get_parameter(name), atol=1e-4)
    assert not torch.allclose(by_what_reaches_it(whole), cut.get_parameter(name), atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"sparsity": 1.0}, "The sparsity is a share of the weights, and 1 is none"),
        ({"sparsity": -0.1}, "and -0.1 is none"),
        ({"sparsity": 0.0}, "and 0 is none. Give one between 0 and 1"),
        ({}, "How many connections go is not said"),
        ({"pattern": "4:2"}, "`4:2` is no pattern"),
        ({"pattern": "4:4"}, "is no pattern"),
        ({"pattern": "0:4"}, "is no pattern"),
        ({"pattern": "half"}, "`half` is no pattern. Give n:m"),
        ({"pattern": "1:5"}, "needs rows that divide by 5; those of model.layers.0.self_attn.q_proj.weight have 64"),
        ({"pattern": "2:4", "sparsity": 0.6}, "The pattern 2:4 makes 0.5 of the weights zero, not 0.6"),
        ({"pattern": "2:4", "allocation": "owl"}, "gives every block the same sparsity"),
        ({"sparsity": 0.5, "method": "luck"}, "Unknown method `luck`"),
        ({"sparsity": 0.5, "allocation": "luck"}, "Unknown allocation `luck`"),
    ],
)
def test_what_makes_no_sense_is_refused_before_the_work(settings: dict, words: str, tiny_model: Tiny):
    model = tiny_model("llama")
    with pytest.raises(BadInputError, match=words):
        sparsify(model, Sparsify(**settings), WINDOWS)
    assert not any(zeros.any() for zeros in zeros_of(model).values())


def test_a_share_beside_the_pattern_that_means_the_same_is_fine():
    assert sparsity_of(0.5, "2:4") == sparsity_of(None, "2:4") == Sparsity(0.5, 4)
    assert sparsity_of(2 / 3, "1:3").gone(3) == 2


# ---- zeros stay zero ----


@pytest.mark.parametrize("form", WITH_ZERO, ids=[form.name for form in WITH_ZERO])
def test_gptq_on_a_mask_keeps_zeros_and_uses_the_others(form: Format):
    weight, x = weights(24, 256).float(), inputs(1000, 256).float()
    gram = x.T @ x
    weight = METHODS["sparsegpt"]([weight], gram, Sparsity(0.5))[0]
    weight[3] = 0
    mask = weight != 0
    chosen = gptq(weight, gram, form, mask=mask)
    decoded = unpack(pack(chosen)).decode()
    assert (decoded[~mask] == 0).all()
    rounded = round_to_nearest(weight, form, gram.diagonal()).decode()
    assert (rounded[~mask] == 0).all()
    assert output_errors(weight, decoded, gram).sum() < output_errors(weight, rounded, gram).sum()


def test_a_mask_that_keeps_all_changes_nothing():
    weight, x, form = weights(9, 64).float(), inputs(300, 64).float(), FORMATS["Q4_0"]
    plain, masked = (gptq(weight, x.T @ x, form, mask=mask) for mask in (None, torch.ones(9, 64, dtype=torch.bool)))
    assert torch.equal(plain.codes, masked.codes)
    assert torch.equal(plain.scales, masked.scales)


def test_which_formats_have_a_zero():
    assert {name for name, form in FORMATS.items() if form.has_zero} == {
        *("TQ1_0", "TQ2_0", "Q2_0", "Q3_K", "MXFP4", "NVFP4", "Q4_0", "Q5_0", "Q6_K", "Q8_0")
    }
    assert all(integer_format(name, 256).has_zero for name in NAMES)
    with pytest.raises(ValueError, match="IQ4_NL has no code that decodes to zero"):
        gptq(torch.ones(2, 32), torch.eye(32), FORMATS["IQ4_NL"], mask=torch.ones(2, 32, dtype=torch.bool))


@pytest.mark.parametrize("method", ["gptq", "rtn"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_zeros_are_zero_in_the_file(family: str, method: str, tiny_model: Tiny, tmp_path: Path):
    """As llama.cpp's own Python decoder reads the GGUF file."""
    model, _ = sparsify(tiny_model(family), Sparsify(pattern="2:4"), WINDOWS)
    zeros = zeros_of(model)
    groups = ("query_key", "value", "query_key_value", "attention_out", "ffn_in", "ffn_out")
    formats = {each: "Q4_0" for each in groups if family == "gpt2" or each != "query_key_value"}
    if family == "gpt2":
        formats = {each: form for each, form in formats.items() if each not in ("query_key", "value")}
    formats |= {"embedding": "IQ4_NL", "ffn_out": "Q8_0"}
    if not model.network.config.tie_word_embeddings:
        formats["head"] = "IQ4_NL"
    model, packed, _ = quantize(model, Quantize(formats=formats, method=method, keep_zeros=True), WINDOWS)
    for name, where in zeros.items():
        decoded = torch.from_numpy(
            gguf.dequantize(packed[name].rows.numpy(), gguf.GGMLQuantizationType[packed[name].format.name])
        )
        assert (decoded[where] == 0).all()
        assert torch.equal(decoded, read_weight(linears_of(model.network)[name][1]))
    write_gguf(model, packed, tmp_path / "model.gguf")


def test_formats_without_a_zero_and_learned_codes_are_refused(tiny_model: Tiny):
    formats = dict.fromkeys(("query_key", "value", "attention_out", "ffn_in", "embedding"), "Q4_0")
    with pytest.raises(BadInputError, match=r"IQ4_NL has no exact zero: those of model.layers.0.mlp.down_proj.weight"):
        quantize(tiny_model("llama"), Quantize(formats=formats | {"ffn_out": "IQ4_NL"}, keep_zeros=True), WINDOWS)
    config = Quantize(formats=formats | {"ffn_out": "F16"}, keep_zeros=True, learned_rounding=1)
    with pytest.raises(BadInputError, match="Learned rounding does not keep zeros"):
        quantize(tiny_model("llama"), config, WINDOWS)


# ---- recipes ----

CUT = {"step": "sparsify", "pattern": "2:4"}
KEPT = {"step": "quantize", "formats": {}, "keep_zeros": True}


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ([CUT, KEPT | {"keep_zeros": False}], "here: `quantize` would lose the zeros"),
        ([CUT, {"step": "distil", "tokens": 9}, KEPT], "here: `distil` changes every weight"),
        ([CUT, {"step": "prune_width", "ffn": 9}, KEPT], "here: `prune_width` changes every weight"),
        ([CUT, KEPT, {"step": "tune", "tokens": 9, "train": "weights"}], "here: `tune` changes every weight"),
        ([CUT | {"pattern": "4:2"}, KEPT], "`4:2` is no pattern"),
        ([{"step": "sparsify", "sparsity": 0}, KEPT], "The sparsity is a share of the weights, and 0 is none"),
        ([CUT | {"method": "luck"}, KEPT], "here: steps.0.sparsify.method"),
    ],
)
def test_recipes_that_lose_their_zeros_are_refused(steps: list[dict], words: str):
    with pytest.raises(BadInputError, match=words):
        from_dict({"steps": steps}, "here")


def test_recipes_that_keep_their_zeros():
    steps = [
        {"step": "prune_width", "ffn": 9},
        {"step": "distil", "tokens": 9},
        CUT,
        {"step": "prepare", "formats": {}},
        KEPT,
        {"step": "tune", "tokens": 9},
    ]
    assert from_dict({"steps": steps}, "here").steps[2] == Sparsify(pattern="2:4")


@pytest.mark.slow
def test_a_recipe_runs_to_a_file_with_zeros(tmp_path: Path):
    folder = tiny_folder("llama", tmp_path / "model")
    groups = ("embedding", "query_key", "value", "attention_out", "ffn_in", "ffn_out")
    steps = [CUT, {"step": "prepare", "formats": dict.fromkeys(groups, "Q4_0")}]
    steps += [KEPT | {"formats": dict.fromkeys(groups, "Q4_0")}, {"step": "tune", "tokens": 512}]
    (tmp_path / "recipe.yaml").write_text(json.dumps({"steps": steps}))
    arguments = ("fit", folder, "--recipe", tmp_path / "recipe.yaml", "-o", tmp_path / "out", "--json")
    done = pocketlm(*arguments, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert "gets no smaller" in json.dumps(report["stages"])
    for tensor in gguf.GGUFReader(tmp_path / "out" / "model.gguf").tensors:
        if "ffn" in tensor.name and "norm" not in tensor.name:
            decoded = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
            assert ((decoded.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all()


# ---- bitmasks ----


def by_hand(tensors: dict[str, Tensor], stem: str) -> Tensor:
    """Decode the documented layout, a bit at a time."""
    rows, columns = tensors[f"{stem}.shape"].tolist()
    weight = torch.zeros(rows, columns, dtype=torch.bfloat16)
    for row in range(rows):
        place = int(tensors[f"{stem}.row_offsets"][row])
        for column in range(columns):
            if int(tensors[f"{stem}.bitmask"][row, column // 8]) >> (column % 8) & 1:
                weight[row, column] = tensors[f"{stem}.compressed"][place]
                place += 1
    return weight


@settings(deadline=None, max_examples=50)
@given(rows=st.integers(1, 9), columns=st.integers(1, 40), seed=st.integers(0, 99), share=st.floats(0, 1))
def test_bitmasks_hold_any_matrix(rows: int, columns: int, seed: int, share: float):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).bfloat16()
    weight[torch.rand(rows, columns, generator=generator) < share] = 0
    parts = squeeze(weight)
    assert torch.equal(expand(parts), weight)
    assert torch.equal(by_hand({f"x.{end}": part for end, part in parts.items()}, "x"), weight)
    size = sum(part.nbytes for part in parts.values())
    assert predicted_bytes({"x": (rows, columns)}, {"x": int((weight == 0).sum())}) == size


def test_the_library_unpacks_the_same_bits():
    """Of compressed-tensors' sparse decoder its helper is left."""
    helpers = pytest.importorskip("compressed_tensors.utils.helpers")
    weight = magnitude(weights(5, 21).float(), Sparsity(0.5))
    assert torch.equal(helpers.unpack_bitmasks(squeeze(weight)["bitmask"], [5, 21]), weight != 0)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text"])
@pytest.mark.parametrize("target", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=["anywhere", "2:4"])
def test_the_folder_holds_the_cut_model_in_the_predicted_bytes(
    family: str, target: dict, tiny_model: Tiny, tmp_path: Path
):
    model, _ = sparsify(tiny_model(family), Sparsify(**target), WINDOWS)
    write_sparse_bitmask(model, tmp_path / "out", target.get("pattern"))
    file = tmp_path / "out" / "model.safetensors"
    tensors, weights_there = load_file(file), read_sparse_bitmask(file)
    truth = {name: value.detach().bfloat16() for name, value in model.network.named_parameters()}
    assert weights_there.keys() == truth.keys()
    assert all(torch.equal(weights_there[name], value) for name, value in truth.items())
    name = linear_names(model)[-1]
    assert torch.equal(by_hand(tensors, name.removesuffix(".weight")), truth[name])
    shapes = {name: tuple(value.shape) for name, value in truth.items()}
    zeros = {name: int((truth[name] == 0).sum()) for name in linear_names(model)}
    predicted = predicted_bytes(shapes, zeros)
    assert predicted == sum(tensor.nbytes for tensor in tensors.values())
    assert predicted < predicted_bytes(shapes, {}) == sum(value.nbytes for value in truth.values())
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert stated["format"] == "sparse-bitmask"
    assert stated["sparsity_structure"] == target.get("pattern", "unstructured")
    assert stated["global_sparsity"] == pytest.approx(0.6 if "sparsity" in target else 0.5, abs=0.01)


def test_the_library_knows_the_configuration(tiny_model: Tiny, tmp_path: Path):
    config = pytest.importorskip("compressed_tensors.config")
    model, _ = sparsify(tiny_model("llama"), Sparsify(pattern="2:4"), WINDOWS)
    write_sparse_bitmask(model, tmp_path / "out", "2:4")
    stated = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["sparsity_config"]
    assert config.BitmaskConfig(**stated).sparsity_structure == "2:4"


def test_models_that_bitmasks_cannot_help_are_refused(tiny_model: Tiny, tmp_path: Path):
    with pytest.raises(BadInputError, match="Too few weights are zero"):
        write_sparse_bitmask(tiny_model("llama"), tmp_path / "out")
    with pytest.raises(BadInputError, match="no linears of torch"):
        write_sparse_bitmask(tiny_model("gpt2"), tmp_path / "out")
    with pytest.raises(BadInputError, match="exists already"):
        write_sparse_bitmask(tiny_model("llama"), tmp_path)
