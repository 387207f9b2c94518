"""The sweep sees what the model sees: for every family its statistics are those of ordinary forward passes."""

from collections import defaultdict

import pytest
import torch
from tests.conftest import Tiny
from tests.tiny import FAMILIES
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of, read_weight, write_weight
from pocketlm.model.sweep import HEAD, final_hidden, rehearse, sweep

every_family = pytest.mark.parametrize("family", FAMILIES)
WINDOWS = torch.randint(3, 300, (11, 24), generator=torch.Generator().manual_seed(0))  # more than one batch


@torch.no_grad()
def hooked_grams(network: nn.Module, windows: Tensor) -> dict[str, Tensor]:
    """Return x xᵀ over all tokens by the path of the linear that reads x, from plain forward passes in float64."""
    grams: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))

    def watch(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].flatten(0, -2).double()
            grams[name] = grams[name] + x.T @ x

        return module.register_forward_pre_hook(add)

    linears = {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    handles = [watch(name, module) for name, module in linears.items()]
    for window in windows:
        network(window[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return grams


def assert_close(ours: Tensor, truth: Tensor):
    assert ours.dtype == torch.float32
    assert (ours - truth).norm() < 1e-5 * truth.norm()


@pytest.mark.usefixtures("exact")
@every_family
def test_an_idle_sweep_sees_what_the_model_sees(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    truth = hooked_grams(network, WINDOWS)
    visited = []
    for layer in sweep(network, WINDOWS, head=True):
        for edge, linear in layer.linears():
            path = ".".join(filter(None, (layer.name, edge.path)))
            visited.append(path)
            assert network.get_submodule(path) is linear
            assert dict(network.named_parameters(remove_duplicate=False))[layer.parameter_name(edge)] is linear.weight
            assert_close(layer.gram[edge.reads], truth[path])
    assert sorted(visited) == sorted(truth), "every linear of the network is visited once"
    assert set(layer.gram) == {"head_in"}
    assert layer.index == len(blocks_of(network))


@pytest.mark.usefixtures("exact")
@every_family
def test_later_layers_see_the_errors_of_earlier_ones(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    before = hooked_grams(network, WINDOWS)
    generator = torch.Generator().manual_seed(1)
    seen = {}
    for layer in sweep(network, WINDOWS, head=True):
        reads = layer.edges[0].reads  # what enters the block: nothing in the block itself changes it
        seen[".".join(filter(None, (layer.name, layer.edges[0].path)))] = layer.gram[reads]
        for _, linear in layer.linears():
            weight = read_weight(linear)
            if layer.name:
                write_weight(linear, weight + 0.1 * torch.randn(weight.shape, generator=generator))
    after = hooked_grams(network, WINDOWS)
    for path, gram in seen.items():
        assert_close(gram, after[path])
    last = list(seen)[-1]
    assert (before[last] - after[last]).norm() > 0.01 * before[last].norm()


@torch.no_grad()
def read_by(network: nn.Module, path: str) -> Tensor:
    """Return what a linear reads, (tokens, width) float64, from plain forward passes."""
    seen = []
    handle = network.get_submodule(path).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].flatten(0, -2).double())
    )
    for window in WINDOWS:
        network(window[None], use_cache=False)
    handle.remove()
    return torch.cat(seen)


@pytest.mark.usefixtures("exact")
@every_family
def test_the_drift_is_what_the_original_model_reads_there_less_what_is_read(family: str, tiny_model: Tiny):
    network, original = tiny_model(family).network, tiny_model(family).network
    generator = torch.Generator().manual_seed(1)
    drifts, targets = {}, []
    for layer in sweep(network, WINDOWS, head=True, original=True):
        path = ".".join(filter(None, (layer.name, layer.edges[0].path)))
        drifts[path] = layer.drift[layer.edges[0].reads]
        targets = layer.targets or targets
        for _, linear in layer.linears():
            weight = read_weight(linear)
            if layer.name:
                write_weight(linear, weight + 0.1 * torch.randn(weight.shape, generator=generator))
    first, *later = drifts
    assert not drifts[first].any(), "before the first block nothing has changed"
    for path in later:
        now = read_by(network, path)
        truth = (read_by(original, path) - now).T @ now
        assert (drifts[path] - truth).norm() < 1e-4 * truth.norm()
    normed = original.get_submodule(anatomy_of(original).final_norm)(torch.cat(targets).flatten(0, 1))
    assert torch.allclose(normed.double(), read_by(original, HEAD.path), atol=1e-4)


@pytest.mark.usefixtures("exact")
@every_family
def test_the_final_hidden_state_is_what_the_head_reads(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    with torch.no_grad():
        logits = network(WINDOWS, use_cache=False).logits
    hidden = final_hidden(network, WINDOWS)
    assert hidden.shape == (*WINDOWS.shape, 64)
    assert torch.allclose(network.lm_head(hidden), logits, atol=1e-4)


@every_family
def test_a_sweep_in_the_hardwares_precision_sees_almost_the_same(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    truth = hooked_grams(network, WINDOWS)
    for layer in sweep(network, WINDOWS, head=True):
        edge = layer.edges[-1]
        gram = layer.gram[edge.reads]
        path = ".".join(filter(None, (layer.name, edge.path)))
        assert (gram - truth[path]).norm() < 0.03 * truth[path].norm()


@every_family
def test_only_the_wanted_spaces_are_measured(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    for layer in sweep(network, WINDOWS[:2], spaces=("mlp_hidden",)):
        assert set(layer.gram) == {"mlp_hidden"}
        assert layer.gram["mlp_hidden"].shape == (128, 128)
    assert HEAD not in layer.edges, "no head unless asked for"


@every_family
def test_a_sweep_leaves_no_trace(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    before = {name: value.clone() for name, value in network.state_dict().items()}
    for _ in sweep(network, WINDOWS[:2], head=True):
        pass
    for _ in sweep(network, WINDOWS[:2]):
        break  # even where it is not walked to the end
    assert_untouched(network)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def assert_untouched(network: nn.Module):
    for block in blocks_of(network):
        assert "forward" not in vars(block)
    assert not any(module._forward_pre_hooks for module in network.modules())


@every_family
def test_forward_is_restored_when_the_model_raises(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    unknown_token = torch.full((2, 8), network.config.vocab_size)
    with pytest.raises(IndexError):
        next(sweep(network, unknown_token))
    assert_untouched(network)
    assert torch.isfinite(network(WINDOWS[:1]).logits).all()


def test_hooks_are_removed_when_a_block_raises(tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    network = tiny_model("llama").network

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(blocks_of(network)[1].mlp.act_fn, "forward", fail)
    walk = sweep(network, WINDOWS[:2])
    next(walk)
    with pytest.raises(RuntimeError, match="no memory"):
        next(walk)
    assert_untouched(network)


@every_family
def test_a_rehearsal_computes_no_block(family: str, tiny_model: Tiny):
    network = tiny_model(family).network
    ran = []
    for block in blocks_of(network):
        for part in block.children():
            part.register_forward_hook(lambda *_: ran.append(1))
    rehearsal = rehearse(network, WINDOWS)
    assert not ran
    assert [len(hidden) for hidden in rehearsal.hidden] == [8, 3]
    assert all(len(batches) == 2 for batches in rehearsal.keywords)
    assert anatomy_of(network).inputs == ("attention_in", "attention_out", "mlp_in", "mlp_hidden")


@every_family
def test_what_nobody_reads_is_not_computed(family: str, tiny_model: Tiny):
    network, computed = tiny_model(family).network, []
    last = anatomy_of(network).edges[-1].path
    for block in blocks_of(network):
        block.get_submodule(last).register_forward_hook(lambda *_: computed.append(1))
    for layer in sweep(network, WINDOWS[:3]):
        assert len(computed) == layer.index, "the pass for statistics ends before the last linear, the other does not"
