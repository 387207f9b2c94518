"""How much tokens count: the gradients that autograd gives, in the statistics that codes are chosen by."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import Tiny
from tests.tiny import FAMILIES
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of, read_weight
from pocketlm.model.importance import EFFECTIVE, fisher_gradient, tempered, token_importance
from pocketlm.model.sweep import HEAD, sweep
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.tensors.elimination import output_errors
from pocketlm.tensors.formats import unpack

every_family = pytest.mark.parametrize("family", FAMILIES)
WINDOWS = torch.randint(3, 300, (9, 24), generator=torch.Generator().manual_seed(0))  # more than one batch


def test_the_mean_square_of_the_gradient_is_the_hessian_of_the_divergence():
    logits = torch.randn(5, generator=torch.Generator().manual_seed(1)).double()
    draws = fisher_gradient(logits.expand(200_000, -1), torch.Generator().manual_seed(2))
    chances = logits.softmax(0)

    def divergence(other: Tensor) -> Tensor:
        return (chances * (chances.log() - other.log_softmax(0))).sum()

    hessian = torch.autograd.functional.hessian(divergence, logits)
    assert torch.allclose(draws.T @ draws / len(draws), hessian, atol=3e-3)


@given(spread=st.floats(0, 6), seed=st.integers(0, 99))
def test_uneven_weights_keep_half_of_the_tokens_worth(spread: float, seed: int):
    weights = torch.exp(spread * torch.randn(400, generator=torch.Generator().manual_seed(seed)))
    found = tempered(weights)
    worth = (found.sum().square() / found.square().sum() / len(found)).item()
    before = (weights.sum().square() / weights.square().sum() / len(weights)).item()
    assert found.mean().item() == pytest.approx(1, rel=1e-4)
    assert (found[weights.argsort()].diff() >= 0).all()
    if before >= EFFECTIVE:
        assert torch.allclose(found, weights / weights.mean())
    else:
        assert EFFECTIVE - 1e-6 <= worth < EFFECTIVE + 0.01, (
            "but for the rounding of float32, in which it is summed anew"
        )


def gradients_of(network: nn.Module, window: Tensor, generator: torch.Generator) -> dict[tuple[int, str], Tensor]:
    """Return the squared gradient of each linear's output by token, as autograd gives it for the whole model."""
    outputs: dict[tuple[int, str], Tensor] = {}

    def keep(place: tuple[int, str]):
        def hook(_: nn.Module, __: object, output: Tensor) -> None:
            output.retain_grad()
            outputs[place] = output

        return hook

    handles = [
        block.get_submodule(edge.path).register_forward_hook(keep((index, edge.path)))
        for index, block in enumerate(blocks_of(network))
        for edge in anatomy_of(network).edges
    ]
    logits = network(window, use_cache=False).logits
    slope = fisher_gradient(logits[0].detach(), generator)
    logits.backward(slope[None])
    for handle in handles:
        handle.remove()
    squares = {place: output.grad[0].square().sum(-1) for place, output in outputs.items()}
    return squares | {(len(blocks_of(network)), HEAD.path): slope.square().sum(-1)}


@pytest.mark.usefixtures("exact")
@every_family
def test_importance_is_what_autograd_gives(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    learning = [value.requires_grad for value in network.parameters()]
    found = token_importance(network, WINDOWS, seed=5)
    assert [value.requires_grad for value in network.parameters()] == learning
    assert all(value.grad is None for value in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    generator = torch.Generator().manual_seed(5)
    squares = [gradients_of(network, window[None], generator) for window in WINDOWS]
    for index, block in enumerate([*blocks_of(network), None]):
        edges = (HEAD,) if block is None else anatomy_of(network).edges
        for space in {edge.reads for edge in edges}:
            truth = torch.zeros(WINDOWS.shape)
            for edge in edges:
                if edge.reads == space:
                    mine = torch.stack([each[index, edge.path] for each in squares])
                    truth += mine / mine.mean()
            assert torch.allclose(found[index, space], tempered(truth), rtol=5e-3, atol=1e-3)
            assert math.isclose(found[index, space].mean().item(), 1, rel_tol=1e-5)


@pytest.mark.usefixtures("exact")
def test_statistics_count_tokens_by_their_importance(tiny_model: Tiny):
    network = tiny_model("llama").network
    generator = torch.Generator().manual_seed(3)
    linears = {
        (index, edge.reads): block.get_submodule(edge.path)
        for index, block in enumerate(blocks_of(network))
        for edge in anatomy_of(network).edges
    } | {(len(blocks_of(network)), HEAD.reads): network.lm_head}
    counts = {place: torch.rand(WINDOWS.shape, generator=generator) for place in linears}
    read: dict[tuple[int, str], Tensor] = {}

    def reader(place: tuple[int, str]):
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            read[place] = args[0].flatten(0, -2).double()

        return hook

    handles = [linear.register_forward_pre_hook(reader(place)) for place, linear in linears.items()]
    with torch.no_grad():
        network(WINDOWS, use_cache=False)
    for handle in handles:
        handle.remove()
    for layer in sweep(network, WINDOWS, head=True, original=True, importance=counts):
        for space, gram in layer.gram.items():
            x, weights = read[layer.index, space], counts[layer.index, space].flatten().double()
            truth = torch.einsum("t,ti,tj->ij", weights, x, x)
            assert (gram - truth).norm() < 1e-5 * truth.norm()
            assert layer.drift[space].norm() < 1e-4 * truth.norm()  # nothing was changed, so nothing drifts


@pytest.mark.usefixtures("exact")
def test_codes_are_better_where_tokens_count(tiny_model: Tiny):
    """With half of the tokens counting for nothing, the first block's errors on the other half are smaller."""
    formats = dict.fromkeys(("embedding", "query_key", "value", "attention_out", "ffn_in", "ffn_out"), "Q2_0")
    half = torch.zeros(WINDOWS.shape)
    half[:, ::2] = 2.0
    plain = tiny_model("llama")
    network = plain.network
    original = {name: value.clone() for name, value in network.named_parameters()}
    spaces = [(index, space) for index in range(len(blocks_of(network))) for space in anatomy_of(network).inputs]
    counts = dict.fromkeys([*spaces, (len(blocks_of(network)), HEAD.reads)], half)
    layer = next(sweep(network, WINDOWS, importance=counts))
    errors = []
    for importance in (None, counts):
        _, packed, _ = quantize(tiny_model("llama"), Quantize(formats=formats), WINDOWS, importance=importance)
        errors.append(0.0)
        for edge, linear in layer.linears():
            name = layer.parameter_name(edge)
            assert torch.equal(read_weight(linear), original[name])
            error = output_errors(original[name], unpack(packed[name]).decode(), layer.gram[edge.reads])
            errors[-1] += error.sum().item()
    assert errors[1] < 0.97 * errors[0]
