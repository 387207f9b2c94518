"""Attention in slices computes what attention does."""

from pathlib import Path

import pytest
import torch
from tests.conftest import Tiny
from tests.tiny import FAMILIES
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from pocketlm.model.attention import SLICE, SLICED, attend
from pocketlm.model.language_model import save
from pocketlm.model.learning import distillation_step

RANDOM = torch.Generator().manual_seed(0)


def by_hand(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """Attend in float64, one head after another."""
    sharing, length = query.shape[1] // key.shape[1], query.shape[2]
    behind = torch.ones(length, length, dtype=torch.bool).triu(1)
    heads = []
    for head in range(query.shape[1]):
        q, k, v = (part.double() for part in (query[:, head], key[:, head // sharing], value[:, head // sharing]))
        heads.append((q @ k.mT * scaling).masked_fill(behind, -torch.inf).softmax(-1) @ v)
    return torch.stack(heads, 2)


@pytest.mark.parametrize("length", [SLICE + 1, 2 * SLICE, 3 * SLICE - 7])
@pytest.mark.parametrize("heads", [3, 6])
@pytest.mark.parametrize("scaling", [0.125, 1.0])
def test_slices_and_their_gradients_are_those_of_attention(length: int, heads: int, scaling: float):
    shapes = ((2, heads, length, 16), (2, 3, length, 16), (2, 3, length, 16))
    given = [torch.randn(shape, generator=RANDOM, requires_grad=True) for shape in shapes]
    found, _ = attend(nn.Identity(), *given, None, scaling=scaling)
    expected = by_hand(*given, scaling)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)
    pull = torch.randn(found.shape, generator=RANDOM)
    for ours, theirs in zip(
        torch.autograd.grad((found * pull).sum(), given),
        torch.autograd.grad((expected * pull).sum(), given),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_mask_is_heeded():
    given = [torch.randn(2, 3, 2 * SLICE, 16, generator=RANDOM) for _ in range(3)]
    mask = torch.zeros(2, 1, 2 * SLICE, 2 * SLICE).masked_fill(torch.rand(2 * SLICE, generator=RANDOM) < 0.3, -100.0)
    expected, _ = sdpa_attention_forward(nn.Identity(), *given, mask)
    assert attend(nn.Identity(), *given, mask)[0].equal(expected)
    assert not attend(nn.Identity(), *given, None)[0].allclose(expected, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_compute_the_same_with_and_without(tiny_model: Tiny, family: str):
    network = tiny_model(family).network
    assert network.config._attn_implementation == SLICED
    tokens = torch.randint(3, 300, (2, 2 * SLICE + 5), generator=RANDOM)
    with torch.no_grad():
        sliced = network(tokens).logits
        network.set_attn_implementation("sdpa")
        torch.testing.assert_close(sliced, network(tokens).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_training_is_the_same_with_and_without(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch, recomputes: bool, dtype: torch.dtype, near: float
):
    monkeypatch.setattr("pocketlm.model.compute.forward_dtype", lambda device_type: dtype)
    if recomputes:  # as large models do
        monkeypatch.setattr("pocketlm.model.learning.CHECKPOINT_PARAMETERS", 0)
    teacher, tokens = tiny_model("llama").network, torch.randint(3, 300, (2, 2 * SLICE + 5), generator=RANDOM)
    slopes = []
    for way in (SLICED, "sdpa"):
        student = tiny_model("llama", seed=1).network
        student.set_attn_implementation(way)
        distillation_step(teacher, student, tokens)
        slopes.append(torch.cat([parameter.grad.flatten() for parameter in student.parameters()]))
    assert (slopes[0] - slopes[1]).norm() < near * slopes[1].norm()


def test_a_saved_model_does_not_ask_for_slices(tiny_model: Tiny, tmp_path: Path):
    save(tiny_model("llama"), tmp_path / "saved")
    assert SLICED not in (tmp_path / "saved" / "config.json").read_text()
