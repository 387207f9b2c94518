"""Preparing: scales move between norms and columns, and the model computes what it did."""

from typing import Any

import pytest
import torch
from tests.conftest import Tiny
from tests.tiny import FAMILIES
from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model.anatomy import FAMILIES as ANATOMIES
from pocketlm.model.anatomy import anatomy_of, blocks_of, read_weight, scale_space
from pocketlm.steps.prepare import Prepare, prepare
from pocketlm.tensors.elimination import output_errors
from pocketlm.tensors.formats import FORMATS, round_to_nearest
from pocketlm.tensors.scaling import activation_scale

WINDOWS = torch.randint(3, 300, (4, 32), generator=torch.Generator().manual_seed(0))
SPACES = [(family, space, {}) for family in FAMILIES for space, _ in ANATOMIES[family].scaled_by]
SPACES += [("llama", space, {"mlp_bias": True, "attention_bias": True}) for space in ("attention_in", "mlp_hidden")]


@torch.no_grad()
def logits_of(network: nn.Module) -> Tensor:
    return network(WINDOWS, use_cache=False).logits


def assert_same(after: Tensor, before: Tensor, tolerance: float):
    assert (after - before).abs().max() < tolerance * before.abs().max()


@pytest.mark.parametrize(("family", "space", "changes"), SPACES)
def test_scaling_a_space_keeps_the_logits(family: str, space: str, changes: dict[str, Any], tiny_model: Tiny):
    network = tiny_model(family, **changes).network.double()
    anatomy, generator = anatomy_of(network), torch.Generator().manual_seed(1)
    before, old = logits_of(network), {name: value.clone() for name, value in network.state_dict().items()}
    for block in blocks_of(network):
        width = read_weight(block.get_submodule(anatomy.readers(space)[0])).shape[1]
        scale = torch.rand(width, generator=generator, dtype=torch.float64) * 3 + 0.2
        reader = block.get_submodule(anatomy.readers(space)[-1])
        weight = read_weight(reader).clone()
        scale_space(block, anatomy, space, scale)
        assert torch.allclose(read_weight(reader), weight * scale)
    # Norms compute in float32 whatever the weights are.
    assert_same(logits_of(network), before, 2e-5)
    changed = {name for name, value in network.state_dict().items() if not torch.equal(value, old[name])}
    paths = {*anatomy.readers(space), dict(anatomy.scaled_by)[space]}
    assert changed
    assert all(any(f".{path}." in name for path in paths) for name in changed)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", ["Q4_0", "Q2_0"])
@pytest.mark.parametrize("family", FAMILIES)
def test_preparing_keeps_the_logits(family: str, name: str, tiny_model: Tiny):
    model = tiny_model(family)
    before, calls = logits_of(model.network), []
    blocks, spaces = len(blocks_of(model.network)), len(anatomy_of(model.network).scaled_by)
    patterns = {f"{anatomy_of(model.network).blocks}.*": name}
    model, report = prepare(model, Prepare(formats=patterns), WINDOWS, lambda *done: calls.append(done))
    assert_same(logits_of(model.network), before, 1e-4)
    assert calls == [(i + 1, blocks) for i in range(blocks)]
    assert report.summary.endswith(f"of {blocks * spaces} spaces for their formats")
    assert set(report.details["scale_range"]) == {space for space, _ in anatomy_of(model.network).scaled_by}
    assert max(report.details["scale_range"].values()) > 1.1, "some space was scaled"


def test_spaces_whose_readers_stay_16_bit_are_left_alone(tiny_model: Tiny):
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    formats = {"query_key": "F16", "value": "F16", "ffn_in": "F16", "ffn_out": "Q2_0"}
    model, report = prepare(model, Prepare(formats=formats), WINDOWS)
    changed = {name for name, value in model.network.state_dict().items() if not torch.equal(value, before[name])}
    assert set(report.details["scale_range"]) == {"mlp_hidden"}
    assert changed
    assert all("down_proj" in name or "up_proj" in name for name in changed)


@pytest.mark.parametrize(
    ("formats", "words"),
    [
        ({"ffn_in": "Q4_K"}, "Q4_K needs rows that divide by 256"),
        ({"ffn_inn": "Q4_0"}, "`ffn_inn` is neither a group nor does any tensor's name match it"),
        ({"ffn_in": "Q9"}, "Unknown format `Q9` for `ffn_in`"),
    ],
)
def test_formats_that_cannot_be_are_refused_before_the_work(formats: dict[str, str], words: str, tiny_model: Tiny):
    with pytest.raises(BadInputError, match=words):
        prepare(tiny_model("llama"), Prepare(formats=formats), WINDOWS)


def loud(columns: int, strength: float) -> Tensor:
    """A Gram matrix of inputs with a few columns that are louder than the others."""
    x = torch.randn(500, columns, generator=torch.Generator().manual_seed(2))
    x[:, ::9] *= strength
    return x.T @ x


@pytest.mark.parametrize("name", ["Q2_0", "Q4_0", "Q4_1", "MXFP4", "Q8_0"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 4.0, 100.0])
def test_activation_scales_never_make_rounding_worse(name: str, strength: float):
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(rows, 64, generator=generator) for rows in (20, 30)]  # few enough that all are compared
    form, gram, whole = FORMATS[name], loud(64, strength), torch.cat(weights)

    def error(scale: Tensor) -> float:
        rounded = round_to_nearest(whole * scale, form, gram.diagonal() / scale**2).decode() / scale
        return output_errors(whole, rounded, gram).sum().item()

    scale = activation_scale(weights, gram, form)
    assert scale.shape == (64,)
    assert (scale > 0).all()
    assert scale.max() * scale.min() == pytest.approx(1, rel=1e-3)
    assert error(scale) <= error(torch.ones(64)) * 1.0001
    if strength == 4.0 and name == "Q4_0":
        assert error(scale) < 0.97 * error(torch.ones(64))


def test_activations_alike_give_no_scale():
    scale = activation_scale([torch.randn(16, 64)], 7 * torch.eye(64), FORMATS["Q4_0"])
    assert torch.allclose(scale, torch.ones(64))


def test_activations_that_never_came_give_no_scale():
    scale = activation_scale([torch.randn(16, 64)], torch.zeros(64, 64), FORMATS["Q4_0"])
    assert torch.equal(scale, torch.ones(64))
