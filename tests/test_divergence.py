"""Losses and their written-out gradients are those of float64 autograd, alone and through the output head."""

import copy
from typing import get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.conftest import Tiny
from torch import Tensor, nn

from pocketlm.model import learning
from pocketlm.tensors.divergence import Kind, Loss, loss_with_gradient

kinds = st.sampled_from(get_args(Kind))


def obvious(loss: Loss, reference: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """The loss of each position as the formulas have it."""
    p, q = (torch.softmax(logits / loss.temperature, -1) for logits in (reference, other))
    share = loss.teacher_share
    m = share * p + (1 - share) * q

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    divergence = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jensen_shannon": lambda: share * kl(p, m) + (1 - share) * kl(q, m),
        "skewed_kl": lambda: kl(p, m),
    }[loss.kind]() * loss.temperature**2
    hard = nn.functional.cross_entropy(other, labels, reduction="none")
    return (1 - loss.cross_entropy) * divergence + loss.cross_entropy * hard


@settings(max_examples=150, deadline=None)
@example(
    kind="reverse_kl",
    temperature=1.0,
    share=None,
    cross_entropy=0.0,
    positions=6,
    vocabulary=87,
    spread=6.0,
    seed=0,
)
@given(
    kind=kinds,
    temperature=st.sampled_from([1.0, 0.5, 2.0, 4.0]),
    share=st.sampled_from([None, 0.01, 0.3, 0.9]),
    cross_entropy=st.sampled_from([0.0, 0.25, 1.0]),
    positions=st.integers(1, 9),
    vocabulary=st.integers(2, 400),
    spread=st.floats(0.0, 8.0),
    seed=st.integers(0, 10**6),
)
def test_losses_and_gradients_are_those_of_autograd_in_float64(
    kind: Kind,
    temperature: float,
    share: float | None,
    cross_entropy: float,
    positions: int,
    vocabulary: int,
    spread: float,
    seed: int,
):
    generator = torch.Generator().manual_seed(seed)
    reference, other = (spread * torch.randn(positions, vocabulary, generator=generator) for _ in range(2))
    labels = torch.randint(vocabulary, (positions,), generator=generator)
    loss = Loss(kind=kind, temperature=temperature, share=share, cross_entropy=cross_entropy)
    exact = other.double().requires_grad_()
    truth = obvious(loss, reference.double(), exact, labels)
    truth.sum().backward()
    before = other.clone()
    value, slope = loss_with_gradient(loss, reference, other, labels)
    assert torch.equal(other, before)
    # Logarithms of probabilities are off in proportion to their size: of 400 tries 5e-6 at most where the spread is 6.
    scale = max(1.0, temperature**2) * max(1.0, spread)
    assert torch.allclose(value.double(), truth.detach(), rtol=1e-4, atol=2e-5 * scale)
    assert torch.allclose(slope.double(), exact.grad, rtol=1e-3, atol=2e-6 * scale)


@given(kind=kinds, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_a_student_that_says_the_same_has_nothing_to_learn(kind: Kind, seed: int):
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    value, slope = loss_with_gradient(Loss(kind=kind), logits, logits.clone(), None)
    assert value.abs().max() < 1e-5
    assert slope.abs().max() < 1e-6


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("positions", [7, 10_000])
@pytest.mark.parametrize(
    "loss",
    [
        Loss(kind="reverse_kl", temperature=2.0),
        Loss(kind="jensen_shannon", share=0.3),
        Loss(kind="skewed_kl", cross_entropy=0.5),
        Loss(cross_entropy=0.5),
        Loss(cross_entropy=1.0),
    ],
    ids=str,
)
def test_every_loss_is_the_obvious_one_through_the_head(
    loss: Loss, positions: int, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(learning, "POSITIONS_AT_ONCE", positions)
    windows = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(1))
    teacher, student = tiny_model("qwen2").network, tiny_model("qwen2", num_hidden_layers=2).network
    exact = copy.deepcopy(student).double()
    with torch.no_grad():
        reference = copy.deepcopy(teacher).double()(windows, use_cache=False).logits
    guess = exact(windows, use_cache=False).logits
    labels = windows[:, 1:].flatten()
    if loss.cross_entropy:  # nobody knows what follows the last token
        reference, guess = reference[:, :-1], guess[:, :-1]
    else:
        labels = torch.zeros(windows.numel(), dtype=torch.int64)
    truth = obvious(loss, reference.flatten(0, 1), guess.flatten(0, 1), labels).mean()
    truth.backward()
    value = learning.distillation_step(None if loss.cross_entropy == 1 else teacher, student, windows, loss)
    assert value == pytest.approx(truth.item(), rel=1e-4)
    for (name, ours), theirs in zip(student.named_parameters(), exact.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-6, name
