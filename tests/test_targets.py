"""Targets on disk: right on average, the same however often they were interrupted, and as good to learn from."""

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import Tiny
from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model import learning, targets
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.learning import Lessons, distillation_step
from pocketlm.model.targets import Sampling, draw, fitting, open_targets, predicted_bytes, words_of, write_targets
from pocketlm.steps.distil import Distil, distil
from pocketlm.tensors.divergence import Loss, Sparse, sparse_kl_with_gradient

GENERATOR = torch.Generator().manual_seed(0)
WINDOWS, HELD_OUT = (torch.randint(3, 300, (rows, 24), generator=GENERATOR) for rows in (70, 3))


def dense(target: Sparse, vocabulary: int) -> Tensor:
    rows = torch.arange(len(target.lengths)).repeat_interleave(target.lengths)
    return torch.zeros(len(target.lengths), vocabulary).index_put_((rows, target.ids), target.weights)


def some_sparse(positions: int, vocabulary: int, count: int, rest: bool, seed: int) -> Sparse:
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(3 * torch.randn(positions, vocabulary, generator=generator), -1)
    entropy = -torch.special.xlogy(p, p).sum(-1)
    if rest:
        weights, ids = p.topk(count)
        lengths = torch.full((positions,), count)
        return Sparse(lengths, ids.flatten(), weights.flatten(), entropy, (1 - weights.sum(-1)).clamp_min(0))
    lengths, ids, counts = draw(p, count, generator)
    return Sparse(lengths, ids, counts / count, entropy)


@settings(max_examples=100, deadline=None)
@given(
    positions=st.integers(1, 8),
    vocabulary=st.integers(4, 200),
    count=st.integers(1, 60),
    rest=st.booleans(),
    spread=st.floats(0.0, 12.0),
    seed=st.integers(0, 10**6),
)
def test_the_sparse_loss_and_its_gradient_are_those_of_autograd_in_float64(
    positions: int, vocabulary: int, count: int, rest: bool, spread: float, seed: int
):
    target = some_sparse(positions, vocabulary, min(count, vocabulary - 1) if rest else count, rest, seed)
    logits = spread * torch.randn(positions, vocabulary, generator=torch.Generator().manual_seed(seed + 1))
    exact = logits.double().requires_grad_()
    p, said = dense(target, vocabulary).double(), exact.log_softmax(-1)
    if rest:
        known, rest_of_teacher = p > 0, target.rest.double()
        others = torch.where(known, 0.0, said.exp()).sum(-1)
        truth = (torch.xlogy(p, p) - p * said).sum(-1)
        truth = truth + torch.xlogy(rest_of_teacher, rest_of_teacher) - rest_of_teacher * others.log()
    else:
        truth = -(p * said).sum(-1) - target.entropy.double()
    truth.sum().backward()
    value, slope = sparse_kl_with_gradient(target, logits)
    assert torch.allclose(value.double(), truth.detach(), rtol=1e-4, atol=1e-4)
    assert torch.allclose(slope.double(), exact.grad, rtol=1e-3, atol=1e-5)


@settings(max_examples=100, deadline=None)
@given(
    positions=st.integers(1, 8),
    vocabulary=st.integers(2, 300),
    count=st.integers(1, 255),
    spread=st.floats(0.0, 15.0),
    seed=st.integers(0, 10**6),
)
def test_every_token_is_drawn_as_often_as_is_its_due(
    positions: int, vocabulary: int, count: int, spread: float, seed: int
):
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(spread * torch.randn(positions, vocabulary, generator=generator), -1)
    lengths, ids, counts = draw(p, count, generator)
    rows = torch.arange(positions).repeat_interleave(lengths)
    assert len(set(zip(rows.tolist(), ids.tolist(), strict=True))) == len(ids), "no token twice"
    got = torch.zeros(positions, vocabulary).index_put_((rows, ids), counts.float())
    assert torch.equal(got.sum(-1), torch.full((positions,), float(count)))
    assert (got - count * p).abs().max() < 1 + 1e-3, "rounded up or down, never further away"


def test_draws_are_right_on_average():
    p = torch.softmax(2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(0)), -1)
    generator, total = torch.Generator().manual_seed(1), torch.zeros(40)
    for _ in range(4000):
        _, ids, counts = draw(p, 5, generator)
        total[ids] += counts
    error = (total / 20000 - p[0]).abs()
    assert (error < 5 * (p[0] / 20000).sqrt() + 1e-4).all()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("short", [True, False], ids=["two bytes", "three bytes"])
def test_sampled_targets_have_the_teachers_gradient_on_average(
    short: bool, tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(targets, "SHORT_IDS", 65536 if short else 16)
    monkeypatch.setattr(learning, "POSITIONS_AT_ONCE", 17)
    teacher, student = tiny_model("llama"), tiny_model("llama", num_hidden_layers=2).network
    # Targets know tokens alone; so that the live loss does too, there is no padding.
    words = len(teacher.tokenizer)
    for network in (teacher.network, student):
        network.lm_head.weight = nn.Parameter(network.lm_head.weight[:words].detach().clone())

    def gradient(lessons: Lessons, asked: nn.Module | None) -> tuple[float, Tensor]:
        student.zero_grad()
        loss = distillation_step(asked, student, lessons)
        return loss, student.lm_head.weight.grad.clone()

    live_loss, live = gradient(Lessons(WINDOWS[:2]), teacher.network)
    losses, errors, total = [], [], torch.zeros_like(live)
    for seed in range(30):
        kept = write_targets(teacher, WINDOWS[:2], tmp_path / str(seed), Sampling(count=20), seed)
        loss, slope = gradient(Lessons(WINDOWS[:2], targets=kept), None)
        losses.append(loss)
        errors.append(((slope - live).norm() / live.norm()).item())
        total += slope
    away = ((total / 30 - live).norm() / live.norm()).item()
    alone = sum(errors) / len(errors)
    assert away < 1.3 * alone / 30**0.5, "errors of independent seeds cancel"
    spread = torch.tensor(losses).std().item()
    assert sum(losses) / 30 == pytest.approx(live_loss, abs=4 * spread / 30**0.5 + 1e-3)


@pytest.mark.usefixtures("exact")
def test_top_targets_are_a_lower_bound_of_the_divergence(tiny_model: Tiny, tmp_path: Path):
    teacher, student = tiny_model("llama"), tiny_model("llama", num_hidden_layers=2).network
    truth = divergence_of(student, WINDOWS[:2], judge(teacher.network, WINDOWS[:2]))
    bounds = []
    for count in (1, 20, 255):
        kept = write_targets(teacher, WINDOWS[:2], tmp_path / str(count), Sampling(kind="top", count=count))
        bounds.append(learning.held_out_loss(None, student, Lessons(WINDOWS[:2], targets=kept), Loss()))
    assert 0 < bounds[0] < bounds[1] < bounds[2] < 1.001 * truth
    assert bounds[2] > 0.98 * truth


@pytest.mark.parametrize("kind", ["sampled", "top"])
def test_what_was_interrupted_goes_on_and_is_the_same(
    kind: str, tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    teacher = tiny_model("qwen2")
    sampling = Sampling(kind=kind, count=9)
    whole = write_targets(teacher, WINDOWS, tmp_path / "whole", sampling)
    honest, calls = targets.opinion, []

    def interrupted(*arguments: object) -> dict[str, Tensor]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(targets, "opinion", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_targets(teacher, WINDOWS, tmp_path / "halted", sampling)
    with pytest.raises(BadInputError, match="no finished targets"):
        open_targets(tmp_path / "halted")
    seen = []
    write_targets(teacher, WINDOWS, tmp_path / "halted", sampling, progress=lambda done, total: seen.append(done))
    assert len(calls) == 4, "the shard that was there is not made again"
    assert seen == [32, 64, 70]
    index = [json.loads((tmp_path / name / targets.INDEX).read_text()) for name in ("whole", "halted")]
    assert index[0] == index[1]
    again = open_targets(tmp_path / "halted")
    assert len(again) == len(whole) == 70
    some = [69, 0, 33]
    for mine, theirs in zip(vars(again[some].read()).values(), vars(whole[some].read()).values(), strict=True):
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)


def test_a_damaged_file_is_noticed(tiny_model: Tiny, tmp_path: Path):
    write_targets(tiny_model("llama"), WINDOWS[:2], tmp_path, Sampling(count=5))
    path = next(tmp_path.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(BadInputError, match="damaged or missing"):
        open_targets(tmp_path)


def test_the_size_is_predicted_and_small(tiny_model: Tiny, tmp_path: Path):
    teacher = tiny_model("llama")
    sampling = fitting(words_of(teacher), "sampled")
    predicted = predicted_bytes(teacher, WINDOWS, sampling)
    kept = write_targets(teacher, WINDOWS, tmp_path, sampling)
    actual = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) / WINDOWS.numel()
    assert predicted == pytest.approx(actual, rel=0.1)
    assert kept.read().lengths.float().mean() < sampling.count


@pytest.mark.parametrize("kind", ["sampled", "top"])
def test_rows_of_padding_are_no_tokens(kind: str, tiny_model: Tiny, tmp_path: Path):
    """A teacher is sure of rows that are padding, which its student does not have."""
    teacher, words = tiny_model("qwen2"), len(tiny_model("qwen2").tokenizer)
    head = teacher.network.lm_head.weight
    assert words < len(head)
    head.data[words:] = 3 * head.data[: len(head) - words]
    kept = write_targets(teacher, WINDOWS[:2], tmp_path, Sampling(kind=kind, count=20)).read()
    assert kept.ids.max() < words
    if kind == "sampled":
        assert torch.allclose(kept.weights.sum(), torch.tensor(2.0 * WINDOWS.shape[1]))
    student = tiny_model("qwen2", vocab_size=words, num_hidden_layers=2).network
    assert distillation_step(None, student, Lessons(WINDOWS[:2], targets=open_targets(tmp_path))) > 0


@pytest.mark.parametrize("sampling", [Sampling(count=256), Sampling(kind="top", count=10**6), Sampling(count=0)])
def test_more_than_there_is_cannot_be_kept(sampling: Sampling, tiny_model: Tiny, tmp_path: Path):
    with pytest.raises(BadInputError, match="give 1 to"):
        write_targets(tiny_model("llama"), WINDOWS, tmp_path, sampling)


def test_learning_from_disk_ends_near_learning_from_the_teacher(tiny_model: Tiny, tmp_path: Path):
    teacher, start = tiny_model("llama"), tiny_model("llama", num_hidden_layers=2)
    kept = write_targets(teacher, WINDOWS, tmp_path, Sampling(count=40))
    config = Distil(tokens=150 * 4 * 24, learning_rate=1e-3)
    ends = []
    for windows in (WINDOWS, Lessons(WINDOWS, targets=kept)):
        student = copy.deepcopy(start.network)
        model = type(start)(student, start.tokenizer, start.origin)
        _, report = distil(teacher, model, config, windows, HELD_OUT)
        ends.append(report.details["held_out_kl"][-1][1])
        before = report.details["held_out_kl"][0][1]
    assert ends[0] < 0.85 * before
    assert ends[1] == pytest.approx(ends[0], rel=0.03)
