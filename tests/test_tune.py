"""Learning what is stored: gradients are the obvious ones, and no state is kept that is worse than the start."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.conftest import Tiny
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from pocketlm.errors import BadInputError
from pocketlm.model.anatomy import blocks_of, read_weight
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import Layer, run_block, sweep
from pocketlm.steps.learned_rounding import learn_rounding
from pocketlm.steps.learner import Learner
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.steps.tune import Tune, tune
from pocketlm.tensors.formats import FORMATS, Format, Packed, Quantized, effective, round_to_nearest, unpack
from pocketlm.tensors.formats.integer import integer_format

GENERATOR = torch.Generator().manual_seed(0)
WINDOWS, HELD_OUT = (torch.randint(3, 300, (rows, 32), generator=GENERATOR) for rows in (40, 3))
FORMS = [FORMATS[name] for name in ("Q4_0", "IQ4_NL", "Q5_1", "Q2_K", "Q6_K", "Q4_K", "IQ3_XXS")]
FORMS += [integer_format("int3-g64-asym", 256)]
every_form = pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])


def learner_of(form: Format, codes_too: bool = False, rows: int = 3) -> Learner:
    torch.manual_seed(1)
    linear = nn.Linear(256, rows, bias=False)
    with torch.no_grad():
        linear.weight.mul_(3)
    return Learner(linear, round_to_nearest(linear.weight.detach(), form), codes_too)


# ---- gradients ----


@every_form
def test_the_gradient_of_scales_is_that_of_finite_differences(form: Format):
    learner = learner_of(replace(form, storable=lambda scales: (scales,)))
    start, slope = learner.start, torch.randn(3, 256, generator=GENERATOR)
    learner.module.weight.grad = slope.clone()
    learner.take_gradient()
    assert learner.module.weight.grad is None

    def loss(scales: Tensor) -> float:
        decoded = Quantized(start.format, start.codes, scales, start.steps).decode()
        return (decoded.double() * slope.double()).sum().item()

    truth = torch.zeros(start.scales.shape, dtype=torch.float64)
    for place in range(start.scales.numel()):  # weights are linear in the scales: a large step is exact
        up, down = start.scales.clone(), start.scales.clone()
        up.view(-1)[place] *= 1.5
        down.view(-1)[place] *= 0.5
        truth.view(-1)[place] = loss(up) - loss(down)
    assert (learner.factor.grad - truth).norm() < 1e-4 * truth.norm()


@every_form
def test_the_gradient_of_latent_weights_passes_straight_through(form: Format):
    learner = learner_of(form, codes_too=True)
    slope = torch.randn(3, 256, generator=GENERATOR)
    learner.module.weight.grad = slope.clone()
    learner.take_gradient()
    if form.vector > 1:
        assert learner.latent is None, "codes of a codebook stay"
        return
    start, latent = learner.start, learner.latent.detach().double().requires_grad_()
    a, b = effective(form, start.scales, start.steps)
    level = form.table()[start.codes.long()].double()
    rounded = latent * learner.gap + (level - latent * learner.gap).detach()
    weight = rounded * a.repeat_interleave(form.group, 1)
    if b is not None:
        weight = weight + b.repeat_interleave(form.group, 1)
    assert torch.allclose(weight.float(), start.decode(), atol=1e-5)
    (weight * slope).sum().backward()
    assert (learner.latent.grad - latent.grad).norm() < 1e-4 * latent.grad.norm()


@every_form
def test_latent_weights_start_in_the_cells_of_their_codes(form: Format):
    """Whatever the codes are: GPTQ's are often not the nearest."""
    learner = learner_of(form, codes_too=True)
    other = learner.start.codes.long() + torch.randint(-1, 2, learner.start.codes.shape, generator=GENERATOR)
    moved = replace(learner.start, codes=other.clamp(0, len(form.levels) - 1).to(torch.uint8))
    learner = Learner(learner.module, moved if form.vector == 1 else learner.start, codes_too=True)
    assert torch.equal(learner.quantized().codes, learner.start.codes)
    assert torch.equal(learner.quantized().scales, learner.start.scales)


@pytest.mark.parametrize("shape", [(64, 96), (64, 64)], ids=["oblong", "square"])
def test_gradients_of_a_transposed_linear_are_those_of_a_plain_one(shape: tuple[int, int]):
    """GPT-2 stores weights as (in, out), square ones too."""
    columns, rows = shape
    weight = torch.randn(rows, columns, generator=GENERATOR)
    plain, turned = nn.Linear(columns, rows, bias=False), Conv1D(rows, columns)
    plain.weight.data, turned.weight.data = weight.clone(), weight.T.clone()
    learners = [Learner(module, round_to_nearest(weight, FORMATS["Q4_0"]), True) for module in (plain, turned)]
    x = torch.randn(50, columns, generator=GENERATOR)
    for learner in learners:
        learner.show()
        learner.module(x).square().sum().backward()
        learner.take_gradient()
    assert torch.equal(read_weight(plain), read_weight(turned))
    assert torch.allclose(learners[0].factor.grad, learners[1].factor.grad, rtol=1e-3, atol=1e-2)
    assert torch.allclose(learners[0].latent.grad, learners[1].latent.grad, rtol=1e-3, atol=1e-2)


# ---- end to end ----


def quantized(model: LanguageModel, name: str) -> tuple[LanguageModel, dict[str, Packed]]:
    groups = ["embedding", "attention_out", "ffn_in", "ffn_out"]
    groups += ["query_key_value"] if model.family == "gpt2" else ["query_key", "value"]
    groups += [] if model.network.config.tie_word_embeddings else ["head"]
    model, packed, _ = quantize(model, Quantize(formats=dict.fromkeys(groups, name), method="rtn"), WINDOWS[:4])
    return model, packed


def same_bytes(one: dict[str, Packed], other: dict[str, Packed]) -> bool:
    return all(torch.equal(one[name].rows, other[name].rows) for name in one)


@pytest.mark.parametrize("kind", ["scales", "weights"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_tuning_brings_the_model_closer_on_text_it_has_not_seen(family: str, kind: str, tiny_model: Tiny):
    teacher = tiny_model(family)
    original = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    rounded, packed = quantized(tiny_model(family), "Q2_0")
    student, opinion = tiny_model(family), judge(teacher.network, HELD_OUT)
    before = divergence_of(rounded.network, HELD_OUT, opinion)
    config = Tune(tokens=30 * 4 * 32, train=kind, scale_rate=3e-3, code_rate=0.02, evaluations=3)
    calls: list[tuple[int, int]] = []
    student, stored, report = tune(
        teacher, student, packed, config, (WINDOWS, HELD_OUT), lambda done, total, _: calls.append((done, total))
    )
    after = divergence_of(student.network, HELD_OUT, opinion)
    curve = dict(report.details["held_out_kl"])
    assert after < 0.95 * before
    assert curve[0] == pytest.approx(before, rel=1e-3)
    assert after == pytest.approx(min(curve.values()), rel=1e-3), "the best state is the one that is returned"
    assert set(curve) == {0, 10, 20, 30}
    assert calls == [(i + 1, 30) for i in range(30)]
    for name, tensor in stored.items():
        assert torch.equal(unpack(tensor).decode(), read_weight(student.network.get_submodule(name[: -len(".weight")])))
    same_codes = all(torch.equal(unpack(stored[name]).codes, unpack(packed[name]).codes) for name in packed)
    assert same_codes == (kind == "scales")
    vectors = [name for name, value in student.network.named_parameters() if value.dim() == 1]
    assert any(not torch.equal(student.network.get_parameter(name), original[name]) for name in vectors)
    assert all(parameter.requires_grad for parameter in student.network.parameters())
    assert all(torch.equal(value, original[name]) for name, value in teacher.network.state_dict().items())


@pytest.mark.parametrize(("kind", "name"), [("scales", "Q8_0"), ("weights", "Q8_0"), ("weights", "IQ4_NL")])
def test_tuning_that_does_not_help_is_undone(kind: str, name: str, tiny_model: Tiny):
    teacher = tiny_model("llama")
    rounded, packed = quantized(tiny_model("llama"), name)
    student, before = tiny_model("llama"), rounded.network.state_dict()
    config = Tune(tokens=4 * 4 * 32, train=kind, scale_rate=0.5, code_rate=20.0, evaluations=2)
    student, stored, report = tune(teacher, student, packed, config, (WINDOWS, HELD_OUT))
    curve = dict(report.details["held_out_kl"])
    assert min(curve.values()) == curve[0]
    assert same_bytes(stored, packed)
    assert all(torch.equal(value, before[name]) for name, value in student.network.state_dict().items())


@pytest.mark.parametrize("kind", ["scales", "weights"])
def test_a_tuning_that_was_stopped_ends_in_the_same_bytes(
    kind: str, tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pocketlm.model.training.CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr("pocketlm.model.training.CHECKPOINT_SHARE", 0)
    _, packed = quantized(tiny_model("llama"), "Q2_0")
    done: list[int] = []

    def tuned(folder: Path, stop_after: int | None = None) -> tuple[dict[str, Tensor], dict[str, Packed]]:
        def progress(step: int, total: int, pace: str) -> None:
            done.append(step)
            if step == stop_after:
                raise KeyboardInterrupt

        config = Tune(tokens=8 * 4 * 32, train=kind, scale_rate=3e-3, evaluations=2)
        text = WINDOWS, HELD_OUT
        student, stored, _ = tune(tiny_model("llama"), tiny_model("llama"), packed, config, text, progress, folder)
        return student.network.state_dict(), stored

    whole, stored = tuned(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        tuned(tmp_path / "stopped", stop_after=6)
    done.clear()
    again, stored_again = tuned(tmp_path / "stopped")
    assert done[0] == 6, "what was done before the stop is not done again"
    assert same_bytes(stored, stored_again)
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_norms_are_restored_with_the_best_state(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    """The best state is in the middle: neither the norms of the start nor those of the end."""
    teacher = tiny_model("llama")
    monkeypatch.setattr("pocketlm.model.learning.cosine", lambda step, steps, warm_up: 1.0 if step < 20 else 1e6)
    student, packed = quantized(tiny_model("llama"), "Q2_0")
    norm = "model.layers.1.input_layernorm.weight"
    start = student.network.get_parameter(norm).detach().clone()
    config = Tune(tokens=30 * 4 * 32, scale_rate=3e-3, evaluations=3)
    seen: list[Tensor] = []
    student, _, report = tune(
        teacher,
        student,
        packed,
        config,
        (WINDOWS, HELD_OUT),
        lambda *_: seen.append(student.network.get_parameter(norm).detach().clone()),
    )
    curve = dict(report.details["held_out_kl"])
    assert curve[20] == min(curve.values()) < curve[0]
    assert report.details["rollbacks"]
    assert torch.equal(student.network.get_parameter(norm), seen[19])
    assert not torch.equal(seen[19], start)
    after = divergence_of(student.network, HELD_OUT, judge(teacher.network, HELD_OUT))
    assert after == pytest.approx(curve[20], rel=1e-3)


def test_a_seed_decides_the_bytes(tiny_model: Tiny):
    def tuned(seed: int) -> dict[str, Packed]:
        torch.rand(seed + 3)  # what else draws random numbers does not matter
        student, packed = quantized(tiny_model("llama"), "Q4_0")
        config = Tune(tokens=6 * 2 * 32, windows_per_step=2, scale_rate=3e-3, evaluations=3, seed=seed)
        return tune(tiny_model("llama"), student, packed, config, (WINDOWS, HELD_OUT))[1]

    first, again, other = tuned(1), tuned(1), tuned(2)
    assert same_bytes(first, again)
    assert not same_bytes(first, other)


def test_nothing_to_tune_is_refused(tiny_model: Tiny):
    student, packed = quantized(tiny_model("llama"), "Q8_0")
    for config, stored, windows in (
        (Tune(tokens=0), packed, WINDOWS),
        (Tune(tokens=64), {}, WINDOWS),
        (Tune(tokens=64), packed, WINDOWS[:0]),
    ):
        with pytest.raises(BadInputError, match="tune needs"):
            tune(tiny_model("llama"), student, stored, config, (windows, HELD_OUT))


# ---- learned rounding ----


def first_layer(network: nn.Module) -> Layer:
    return next(sweep(network, WINDOWS[:10]))  # a whole batch and a part of one


def starts_of(layer: Layer, name: str) -> dict[nn.Module, Quantized]:
    return {linear: round_to_nearest(read_weight(linear), FORMATS[name]) for _, linear in layer.linears()}


@torch.no_grad()
def block_errors(
    original: nn.Module, layer: Layer, choices: dict[nn.Module, Quantized], counts: Tensor | None = None
) -> float:
    """Mean squared error of the block's output, from whole batches; tokens count alike relative to their size."""
    places = {linear: edge.path for edge, linear in layer.linears()}
    changed = copy.deepcopy(original)
    for linear, choice in choices.items():
        module, decoded = changed.get_submodule(places[linear]), choice.decode()
        module.weight.copy_(decoded.T if isinstance(module, Conv1D) else decoded)
    batches = list(zip(layer.states, layer.keywords, strict=True))
    wanted = torch.cat([run_block(original, states, extra) for states, extra in batches])
    found = torch.cat([run_block(changed, states, extra) for states, extra in batches])
    counts = 1 / wanted.square().mean(-1) if counts is None else counts
    return ((found - wanted).square().mean(-1) * counts / counts.mean()).mean().item()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["Q2_0", "Q4_0", "Q4_1"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_learned_rounding_lowers_the_error_of_the_block(family: str, name: str, tiny_model: Tiny):
    network = tiny_model(family).network
    layer = first_layer(network)
    original, starts = copy.deepcopy(layer.module), starts_of(layer, name)
    learned = learn_rounding(layer, starts, 40, seed=0)
    assert learned.keys() == starts.keys()
    before, after = (block_errors(original, layer, each) for each in (starts, learned))
    assert after < 0.9 * before
    assert any(not torch.equal(learned[linear].codes, starts[linear].codes) for linear in starts)


@pytest.mark.usefixtures("exact")
def test_learned_rounding_serves_the_tokens_that_count(tiny_model: Tiny):
    original, errors = copy.deepcopy(first_layer(tiny_model("llama").network).module), []
    counts = torch.full(WINDOWS[:10].shape, 0.01)
    counts[::2] = 1.0
    for importance in (None, counts):
        layer = first_layer(tiny_model("llama").network)
        learned = learn_rounding(layer, starts_of(layer, "Q2_0"), 40, 0, importance)
        errors.append(block_errors(original, layer, learned, counts))
    assert errors[1] < errors[0]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("iterations", [0, 1, 6])
def test_learned_rounding_never_ends_worse_than_it_began(
    iterations: int, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pocketlm.steps.learned_rounding.CODE_RATE", 5.0)
    monkeypatch.setattr("pocketlm.steps.learned_rounding.SCALE_RATE", 0.5)
    layer = first_layer(tiny_model("llama").network)
    original, starts = copy.deepcopy(layer.module), starts_of(layer, "Q8_0")
    learned = learn_rounding(layer, starts, iterations, seed=0)
    for linear, start in starts.items():
        assert torch.equal(learned[linear].codes, start.codes)
        assert torch.equal(learned[linear].scales, start.scales)
    assert block_errors(original, layer, learned) == block_errors(original, layer, starts)


def test_learned_rounding_leaves_what_learns_as_it_was(tiny_model: Tiny):
    network = tiny_model("llama").network
    block = blocks_of(network)[0]
    for index, parameter in enumerate(block.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    norm = block.input_layernorm.weight.detach().clone()
    layer = first_layer(network)
    learn_rounding(layer, starts_of(layer, "Q4_0"), 2, seed=0)
    assert [parameter.requires_grad for parameter in block.parameters()] == [i % 2 == 0 for i in range(9)]
    assert all(parameter.grad is None for parameter in block.parameters())
    assert torch.equal(block.input_layernorm.weight, norm)


def test_a_recipe_with_learned_rounding_stores_what_the_network_has(tiny_model: Tiny):
    groups = ("embedding", "query_key", "value", "attention_out", "ffn_in", "ffn_out")
    stored = []
    for iterations in (0, 8, 8):
        formats = dict.fromkeys(groups, "Q2_0") | {"model.layers.1.*": "F16"}
        config = Quantize(formats=formats, learned_rounding=iterations, seed=3)
        model, packed, _ = quantize(tiny_model("llama"), config, WINDOWS[:8])
        for name, tensor in packed.items():
            module = model.network.get_submodule(name[: -len(".weight")])
            assert torch.equal(unpack(tensor).decode(), read_weight(module))
        stored.append(packed)
    assert same_bytes(stored[1], stored[2])
    assert not same_bytes(stored[0], stored[1])
