"""Distillation: the loss is the obvious one, training helps or is undone, and a seed decides everything."""

import copy

import pytest
import torch
from tests.conftest import Tiny
from tests.tiny import FAMILIES
from tokenizers import pre_tokenizers
from torch import Tensor, nn

from pocketlm.errors import BadInputError, PocketlmError
from pocketlm.model import judge as judging
from pocketlm.model import learning
from pocketlm.model.anatomy import blocks_of
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.steps.distil import Distil, alike, distil
from pocketlm.steps.prune_depth import PruneDepth, prune_depth

GENERATOR = torch.Generator().manual_seed(0)
WINDOWS, HELD_OUT = (torch.randint(3, 300, (rows, 32), generator=GENERATOR) for rows in (40, 3))


def obvious_kl(teacher: nn.Module, student: nn.Module, windows: Tensor) -> Tensor:
    """Mean KL(teacher ‖ student) over all positions and the whole vocabulary."""
    with torch.no_grad():
        truth = teacher(windows, use_cache=False).logits.log_softmax(-1)
    guess = student(windows, use_cache=False).logits.log_softmax(-1)
    return nn.functional.kl_div(guess, truth, reduction="none", log_target=True).sum(-1).mean()


def damaged(model: LanguageModel, seed: int = 0) -> LanguageModel:
    """Return a copy whose blocks are noisy."""
    network = copy.deepcopy(model.network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in blocks_of(network):
            for parameter in block.parameters():
                parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return LanguageModel(network, model.tokenizer, model.origin)


def held_out_divergence(reference: nn.Module, other: nn.Module, windows: Tensor) -> float:
    return divergence_of(other, windows, judge(reference, windows))


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in network.state_dict().items()}


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("positions", [7, 64, 10_000])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_chunked_loss_and_its_gradient_are_the_obvious_ones(
    family: str, positions: int, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(learning, "POSITIONS_AT_ONCE", positions)
    teacher = tiny_model(family)
    student = damaged(teacher).network
    reference_teacher, reference = copy.deepcopy(teacher.network).double(), copy.deepcopy(student).double()
    truth = obvious_kl(reference_teacher, reference, WINDOWS[:2])
    truth.backward()
    loss = learning.distillation_step(teacher.network, student, WINDOWS[:2])
    assert loss == pytest.approx(truth.item(), rel=1e-4)
    assert all(parameter.grad is None for parameter in teacher.network.parameters())
    for (name, ours), theirs in zip(student.named_parameters(), reference.parameters(), strict=True):
        error = (ours.grad - theirs.grad).norm()
        assert error <= 1e-3 * theirs.grad.norm() + 1e-6, name


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("positions", [5, 256])
def test_the_held_out_divergence_is_the_obvious_one(positions: int, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(judging, "POSITIONS_AT_ONCE", positions)
    teacher = tiny_model("qwen2")
    student = damaged(teacher).network
    with torch.no_grad():
        truth = obvious_kl(teacher.network, student, HELD_OUT).item()
    assert held_out_divergence(teacher.network, student, HELD_OUT) == pytest.approx(truth, rel=1e-4)
    assert held_out_divergence(teacher.network, teacher.network, HELD_OUT) == 0.0


@pytest.mark.parametrize("family", FAMILIES)
def test_training_brings_a_damaged_model_closer_on_text_it_has_not_seen(family: str, tiny_model: Tiny):
    teacher = tiny_model(family)
    before = weights_of(teacher.network)
    student = damaged(teacher)
    at_first = held_out_divergence(teacher.network, student.network, HELD_OUT)
    config = Distil(windows_per_step=2, tokens=40 * 64, learning_rate=3e-4, evaluations=4)
    calls: list[tuple[int, int]] = []
    student, report = distil(
        teacher, student, config, WINDOWS, HELD_OUT, lambda done, total, _: calls.append((done, total))
    )
    after = held_out_divergence(teacher.network, student.network, HELD_OUT)
    assert after < 0.93 * at_first
    assert report.details["kept"]
    assert report.summary.startswith("held-out KL to the original fell from")
    curve = dict(report.details["held_out_kl"])
    assert curve[0] == pytest.approx(at_first)
    assert min(curve.values()) == pytest.approx(after), "the best checkpoint is the one that is returned"
    assert set(curve) == {0, 10, 20, 30, 40}
    assert len(report.details["losses"]) == 40
    assert calls == [(i + 1, 40) for i in range(40)]
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())
    assert not student.network.training


def test_a_pruned_model_recovers(tiny_model: Tiny):
    teacher = tiny_model("llama")
    student, _ = prune_depth(tiny_model("llama"), PruneDepth(drop=(1,)))
    at_first = held_out_divergence(teacher.network, student.network, HELD_OUT)
    student, _ = distil(
        teacher, student, Distil(windows_per_step=2, tokens=30 * 64, learning_rate=3e-4), WINDOWS, HELD_OUT
    )
    assert held_out_divergence(teacher.network, student.network, HELD_OUT) < at_first
    assert student.network.lm_head.weight is student.network.get_input_embeddings().weight, "still tied"


@pytest.mark.parametrize("evaluations", [1, 3])
def test_training_that_does_not_help_is_undone(evaluations: int, tiny_model: Tiny):
    teacher = tiny_model("llama")
    student = tiny_model("llama")  # cannot become any closer
    before = weights_of(student.network)
    config = Distil(windows_per_step=2, tokens=4 * 64, learning_rate=0.1, evaluations=evaluations)
    student, report = distil(teacher, student, config, WINDOWS, HELD_OUT)
    assert not report.details["kept"]
    assert "kept as it was" in report.summary
    assert all(torch.equal(value, before[name]) for name, value in student.network.state_dict().items())


def test_training_that_goes_wrong_at_the_end_keeps_its_best_checkpoint(
    tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    teacher = tiny_model("llama")
    monkeypatch.setattr("pocketlm.model.learning.cosine", lambda step, steps, warm_up: 1.0 if step < 20 else 300.0)
    config = Distil(windows_per_step=2, tokens=30 * 64, learning_rate=3e-4, evaluations=3)
    student, report = distil(teacher, damaged(teacher), config, WINDOWS, HELD_OUT)
    curve = dict(report.details["held_out_kl"])
    assert curve[20] == min(curve.values()) < curve[0]
    assert held_out_divergence(teacher.network, student.network, HELD_OUT) == pytest.approx(curve[20])
    assert all(step > 20 for step, _ in report.details["rollbacks"])
    assert "diverged 4 times" in report.summary


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # GPT-2's config has dropout
def test_the_same_seed_gives_the_same_weights(family: str, tiny_model: Tiny):
    def trained(seed: int) -> dict[str, Tensor]:
        torch.rand(seed + 3)  # what else draws random numbers does not matter
        teacher = tiny_model(family)
        config = Distil(windows_per_step=2, tokens=8 * 64, learning_rate=3e-4, seed=seed)
        return weights_of(distil(teacher, damaged(teacher), config, WINDOWS, HELD_OUT)[0].network)

    first, again, other = trained(1), trained(1), trained(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("rows", [1, 2, 5, 7])
def test_every_pass_shows_each_window_once(rows: int):
    windows = torch.arange(rows)[:, None]
    seen = torch.cat(list(learning.batches(windows, 2, 3 * rows, seed=0))).flatten().tolist()
    assert len(seen) == 6 * rows
    for start in range(0, 6 * rows, rows):
        assert sorted(seen[start : start + rows]) == list(range(rows))


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    rates = [learning.cosine(step, 100, 0.1) for step in range(100)]
    assert rates[9] == max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert 0.1 <= rates[-1] < 0.11
    assert learning.cosine(0, 1, 0.1) == 1.0


def test_a_loss_that_is_not_a_number_stops_with_the_way_out(tiny_model: Tiny):
    teacher, student = tiny_model("llama"), tiny_model("llama")
    with torch.no_grad():
        blocks_of(student.network)[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(PocketlmError, match="loss became nan at step 1"):
        distil(teacher, student, Distil(tokens=256), WINDOWS, HELD_OUT)


def test_models_that_cut_text_differently_into_the_same_tokens_are_refused(tiny_model: Tiny):
    teacher, student = tiny_model("qwen2"), tiny_model("qwen2")
    core = student.tokenizer.backend_tokenizer
    assert alike(teacher, student)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("e", "isolated"), core.pre_tokenizer])
    assert not alike(teacher, student)
    with pytest.raises(BadInputError, match="different vocabularies"):
        distil(teacher, student, Distil(tokens=256), WINDOWS, HELD_OUT)


def test_models_of_different_vocabularies_are_refused(tiny_model: Tiny):
    with pytest.raises(BadInputError, match="different vocabularies"):
        distil(tiny_model("llama"), tiny_model("mistral"), Distil(tokens=256), WINDOWS, HELD_OUT)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_recomputed_activations_give_the_same_weights(family: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch):
    """Above a size, each block runs again in the backward pass; that changes memory and nothing else."""
    runs = []

    def trained() -> dict[str, Tensor]:
        teacher = tiny_model(family)
        student = damaged(teacher)
        count = [0]

        def add(*_: object) -> None:
            count[0] += torch.is_grad_enabled()

        blocks_of(student.network)[1].mlp.register_forward_pre_hook(add)
        config = Distil(windows_per_step=2, tokens=6 * 64, learning_rate=3e-4)
        student, _ = distil(teacher, student, config, WINDOWS, HELD_OUT)
        assert not any("forward" in vars(block) for block in blocks_of(student.network))
        runs.append(count[0])
        return weights_of(student.network)

    kept = trained()
    monkeypatch.setattr(learning, "CHECKPOINT_PARAMETERS", 0)
    recomputed = trained()
    assert runs == [6, 12], "the block ran again in each backward pass"
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_learn_and_are_merged_into_the_stock_shape(family: str, tiny_model: Tiny):
    teacher, student = tiny_model(family), damaged(tiny_model(family))
    names, before = set(weights_of(student.network)), weights_of(student.network)
    at_first = held_out_divergence(teacher.network, student.network, HELD_OUT)
    config = Distil(windows_per_step=2, tokens=60 * 64, learning_rate=1e-3, evaluations=4, adapters=4)
    student, report = distil(teacher, student, config, WINDOWS, HELD_OUT)
    after = held_out_divergence(teacher.network, student.network, HELD_OUT)
    assert after < 0.99 * at_first
    assert after == pytest.approx(min(kl for _, kl in report.details["held_out_kl"]), rel=1e-3)
    assert set(weights_of(student.network)) == names
    changed = {name for name, value in weights_of(student.network).items() if not torch.equal(value, before[name])}
    assert changed
    for name in changed:  # by a matrix of the adapters' rank, and in the blocks' linears alone
        value = weights_of(student.network)[name] - before[name]
        assert value.dim() == 2
        assert torch.linalg.matrix_rank(value, rtol=1e-3) <= 4
    assert all(parameter.requires_grad for parameter in student.network.parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "distil needs a `temperature` above 0, given: 0"),
        ({"cross_entropy": 1.5}, "distil needs a `cross_entropy` from 0 to 1"),
        ({"loss": "jensen_shannon", "share": 1.0}, "`jensen_shannon` needs a `share` between 0 and 1, given: 1.0"),
        ({"loss": "skewed_kl", "share": 0.0}, "`skewed_kl` needs a `share` between 0 and 1, given: 0.0"),
        ({"evaluations": 0}, "`evaluations` of at least 1"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_before_any_work(settings: dict, words: str, tiny_model: Tiny):
    with pytest.raises(BadInputError, match=words):
        distil(tiny_model("llama"), tiny_model("llama"), Distil(tokens=256, **settings), WINDOWS, HELD_OUT)


@pytest.mark.usefixtures("exact")
def test_rows_of_the_embedding_that_no_token_has_do_not_matter(tiny_model: Tiny):
    """A smaller stock model may be padded to another number of rows."""
    teacher = tiny_model("qwen2")
    padded = tiny_model("qwen2", vocab_size=len(teacher.network.lm_head.weight) + 32)
    padded.network.load_state_dict(
        {
            name: nn.functional.pad(value, (0, 0, 0, 32)) if "lm_head" in name or "embed_tokens" in name else value
            for name, value in damaged(teacher).network.state_dict().items()
        }
    )
    same, other = damaged(teacher), padded
    config = Distil(windows_per_step=2, tokens=10 * 64, learning_rate=3e-4)
    curves = [
        distil(teacher, student, config, WINDOWS, HELD_OUT)[1].details["held_out_kl"] for student in (same, other)
    ]
    assert curves[0][-1][1] < curves[0][0][1]
    assert [kl for _, kl in curves[1]] == pytest.approx([kl for _, kl in curves[0]], rel=1e-3)
