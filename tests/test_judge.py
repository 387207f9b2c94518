"""The original's opinion: one product with the head gives the divergence that both distributions give."""

import pytest
import torch
from tests.conftest import Tiny

from pocketlm.model import judge as judging
from pocketlm.model.judge import judge
from pocketlm.model.sweep import final_hidden

WINDOWS = torch.arange(40).reshape(2, 20)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("same_head", [True, False])
@pytest.mark.parametrize("size", [1e-3, 0.1, 3.0])
def test_the_divergence_is_that_of_both_distributions_in_float64(
    same_head: bool, size: float, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(judging, "POSITIONS_AT_ONCE", 7)  # in pieces, the last one shorter
    network, generator = tiny_model("llama").network, torch.Generator().manual_seed(2)
    opinion = judge(network, WINDOWS)
    hidden, head = final_hidden(network, WINDOWS).flatten(0, 1), network.lm_head.weight.detach()
    changed = hidden + size * torch.randn(hidden.shape, generator=generator)
    their_head = head if same_head else head + 0.1 * torch.randn(head.shape, generator=generator)
    ours = (hidden.double() @ head.double().T).log_softmax(-1)
    theirs = (changed.double() @ their_head.double().T).log_softmax(-1)
    expected = (ours.exp() * (ours - theirs)).sum(-1).mean().item()
    assert opinion.divergence(changed, their_head) == pytest.approx(expected, rel=2e-3, abs=2e-7)


@pytest.mark.usefixtures("exact")
def test_the_original_is_no_distance_from_itself(tiny_model: Tiny):
    network = tiny_model("qwen2").network
    found = judge(network, WINDOWS).divergence(final_hidden(network, WINDOWS).flatten(0, 1), network.lm_head.weight)
    assert found == pytest.approx(0, abs=1e-6)
