"""What is cut is chosen by gradients and by KL on held-out text: both against the obvious way."""

import copy
from itertools import combinations

import pytest
import torch
from tests.conftest import Tiny
from tests.test_steps import WINDOWS, every_family
from torch import Tensor, nn

from pocketlm.model.abreast import abreast
from pocketlm.model.anatomy import anatomy_of, blocks_of, read_weight, write_weight
from pocketlm.model.gradients import gradients_of
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.surgery import drop_blocks, keep_heads
from pocketlm.model.trial import set_apart, trial
from pocketlm.steps.inner_width import kept_for
from pocketlm.steps.prune_width import PruneWidth, prune_width
from pocketlm.tensors.reconstruction import whitened


def halved(block: nn.Module, path: str) -> nn.Module:
    block = copy.deepcopy(block)
    write_weight(block.get_submodule(path), 0.5 * read_weight(block.get_submodule(path)))
    return block


@pytest.mark.usefixtures("exact")
@every_family
def test_gradients_are_those_of_autograd_by_inputs_and_outputs(family: str, tiny_model: Tiny):
    network, windows = tiny_model(family).network, WINDOWS[:2]
    found = gradients_of(network, windows, seed=3)
    assert all(parameter.requires_grad for parameter in network.parameters())
    path = anatomy_of(network).writers("residual")[1]
    linear = blocks_of(network)[1].get_submodule(path)
    shift, heard = {}, {}

    def shifted(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        shift["in"], heard["x"] = torch.zeros_like(args[0], requires_grad=True), args[0].detach()
        return (args[0] + shift["in"],)

    def shifted_out(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        shift["out"] = torch.zeros_like(out, requires_grad=True)
        return out + shift["out"]

    linear.register_forward_pre_hook(shifted)
    linear.register_forward_hook(shifted_out)
    generator, fisher, taylor = torch.Generator().manual_seed(3), 0, 0
    for window in windows.split(1):
        logits = network(window).logits.flatten(0, 1).float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).flatten()
        nn.functional.cross_entropy(logits, drawn, reduction="sum").backward()
        g = shift["out"].grad.flatten(0, 1).double()
        fisher = fisher + g.T @ g
        taylor = taylor + (shift["in"].grad * heard["x"]).flatten(0, 1).double().square().sum(0)
    assert (found[1][path].fisher - fisher).norm() < 1e-3 * fisher.norm()
    assert (found[1][path].taylor - taylor).norm() < 1e-3 * taylor.norm()


@pytest.mark.usefixtures("exact")
@every_family
def test_a_trial_costs_what_the_changed_network_costs(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    path = anatomy_of(network).writers("residual")[1]
    opinion, tried = judge(network, WINDOWS), trial(network, WINDOWS)
    assert tried.divergence(blocks_of(network)[0]) < 1e-6
    first = halved(blocks_of(network)[0], path)
    blocks_of(network)[0] = first
    tried.advance(first)
    second = halved(blocks_of(network)[1], path)
    cost = tried.divergence(second)
    blocks_of(network)[1] = second
    assert cost == pytest.approx(divergence_of(network, WINDOWS, opinion), rel=1e-3)


@pytest.mark.usefixtures("exact")
def test_a_trial_goes_without_the_blocks_that_are_left_out(tiny_model: Tiny):
    network = tiny_model("llama", num_hidden_layers=5).network
    opinion, tried = judge(network, WINDOWS), trial(network, WINDOWS, frozenset({0, 2, 4}))
    assert tried.index == 1
    cost = tried.divergence(blocks_of(network)[1])
    tried.advance(blocks_of(network)[1])
    assert tried.index == 3
    assert tried.divergence(blocks_of(network)[3]) == pytest.approx(cost, rel=1e-5)
    drop_blocks(network, {0, 2, 4})
    assert cost == pytest.approx(divergence_of(network, WINDOWS, opinion), rel=1e-3)


def test_what_changes_are_tried_on_is_not_solved_on():
    solving, trying = set_apart(torch.arange(10).view(5, 2))
    assert (solving.tolist(), trying.tolist()) == ([[0, 1], [2, 3], [4, 5], [6, 7]], [[8, 9]])
    solving, trying = set_apart(torch.arange(4).view(2, 2))
    assert (len(solving), len(trying)) == (2, 1)


@pytest.mark.usefixtures("exact")
def test_of_all_sets_of_heads_the_one_that_costs_the_least_kl_is_kept(tiny_model: Tiny):
    model = tiny_model(
        "llama", hidden_size=96, num_attention_heads=6, num_key_value_heads=3, head_dim=16, num_hidden_layers=1
    )
    network, (solving, trying) = model.network, set_apart(WINDOWS)
    opinion, costs = judge(network, trying), {}
    for groups in combinations(range(3), 2):
        tried = copy.deepcopy(network)
        pair = next(abreast(tried, solving))
        moments = pair.moments("self_attn.o_proj", scaled=False)
        columns = torch.arange(96).view(3, 32)[list(groups)].flatten()
        keep_heads(pair.block, tried, list(groups))
        pair.resolve_writer("self_attn.o_proj", moments, columns)
        costs[groups] = divergence_of(tried, trying, opinion)
    _, report = prune_width(model, PruneWidth(kv_groups=2), WINDOWS)
    assert report.details["kv_groups_kept"] == [list(min(costs, key=costs.__getitem__))]
    assert len(set(costs.values())) == 3


@every_family
def test_channels_are_kept_by_one_of_the_scores(family: str, tiny_model: Tiny):
    model = tiny_model(family)
    _, report = prune_width(model, PruneWidth(ffn=64), WINDOWS)
    scores = {"second order", "second order of the loss", "gradients", "activations"}
    assert len(report.details["channels_by"]) == len(blocks_of(model.network))
    assert set(report.details["channels_by"]) <= scores


@pytest.mark.usefixtures("exact")
def test_aiming_half_the_way_moves_a_matrix_half_as_far(tiny_model: Tiny):
    network = tiny_model("llama").network
    pairs = abreast(network, WINDOWS)
    first = next(pairs)
    write_weight(first.block.mlp.down_proj, 0.5 * read_weight(first.block.mlp.down_proj))
    first.touched = True
    pair, moved = next(pairs), {}
    moments, before = pair.moments("mlp.down_proj"), read_weight(pair.block.mlp.down_proj).clone()
    for share in (0.0, 0.5, 1.0):
        write_weight(pair.block.mlp.down_proj, before)
        pair.resolve_writer("mlp.down_proj", moments, share=share)
        moved[share] = read_weight(pair.block.mlp.down_proj) - before
    assert moved[0.0].abs().max() == 0
    assert moved[1.0].abs().max() > 1e-3
    assert torch.allclose(moved[0.5], 0.5 * moved[1.0], atol=1e-6)


def test_a_whitened_weight_weighs_outputs_by_the_metric():
    generator = torch.Generator().manual_seed(0)
    half, y = torch.randn(12, 12, generator=generator), torch.randn(12, generator=generator)
    metric = half @ half.T
    assert (whitened(metric, 0.0) @ y).square().sum().item() == pytest.approx((y @ metric @ y).item(), rel=1e-4)


def test_channels_whose_outputs_the_loss_ignores_go_first():
    """A metric that sees only half of the outputs keeps the channels that write there."""
    x = torch.randn(400, 8, generator=torch.Generator().manual_seed(1)).double()
    weight = torch.zeros(4, 8).double()
    weight[:2, :4], weight[2:, 4:] = 1.0, 5.0  # the last four channels are louder, and write the last two outputs
    weight += 0.1 * torch.randn(4, 8, generator=torch.Generator().manual_seed(2)).double()
    gram, metric = x.T @ x, torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert kept_for(weight, gram, [4])[4].tolist() == [4, 5, 6, 7]
    assert kept_for(whitened(metric, 1e-6).double() @ weight, gram, [4])[4].tolist() == [0, 1, 2, 3]
