"""A student's own words: drawn from what it would say there, judged by the teacher, no example of anything."""

import copy
from pathlib import Path

import pytest
import torch
from tests.conftest import Tiny
from torch import Tensor, nn

from pocketlm.errors import BadInputError
from pocketlm.model import on_policy, training
from pocketlm.model.learning import Lessons, distillation_step
from pocketlm.model.on_policy import in_own_words, joined, with_own_words
from pocketlm.model.targets import Sampling, write_targets
from pocketlm.model.training import LOSSES
from pocketlm.steps.distil import Distil, distil
from pocketlm.tensors.divergence import Loss

GENERATOR = torch.Generator().manual_seed(0)
WINDOWS, HELD_OUT = (torch.randint(3, 300, (rows, 32), generator=GENERATOR) for rows in (24, 3))
EXAMPLES = Lessons(  # prompts of 6, 3 and 9 tokens, answers of 4, 5 and 2; the rest is padding
    WINDOWS[:1],
    torch.tensor([[*range(10), *range(8), *range(11), *range(3)]]),
    torch.tensor([[*[False] * 6, *[True] * 4, *[False] * 3, *[True] * 5, *[False] * 9, *[True] * 2, *[False] * 3]]),
)


def without_doubt(network: nn.Module) -> nn.Module:
    """Return a copy that always says what the network finds likeliest."""
    sure = copy.deepcopy(network)
    sure.config.tie_word_embeddings = False
    sure.lm_head.weight = nn.Parameter(1000 * network.lm_head.weight.detach())
    return sure


def said(network: nn.Module, prompt: Tensor, count: int) -> list[int]:
    """Read everything again for each next token; stop behind the end of a turn."""
    ids, ends = prompt.tolist(), network.generation_config.eos_token_id
    for _ in range(count):
        if ids[-1] in ends and len(ids) > len(prompt):
            break
        with torch.no_grad():
            ids.append(int(network(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("kind", ["text", "examples"])
def test_what_is_drawn_follows_what_was_read_in_its_own_piece(
    family: str, kind: str, tiny_model: Tiny, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(on_policy, "PIECE", 10)  # 3 of them and 2 tokens in a window
    network = without_doubt(tiny_model(family).network)
    lessons = Lessons(WINDOWS[:2]) if kind == "text" else EXAMPLES
    found = in_own_words(network, lessons, 0)
    spans = {"text": [(0, 5, 10), (10, 15, 20), (20, 25, 30)], "examples": [(0, 6, 10), (10, 13, 18), (18, 27, 29)]}
    for row in range(len(lessons)):
        expected, drawn = lessons.ids[row].tolist(), [False] * 32
        for begin, first, end in spans[kind]:
            words = said(network, lessons.ids[row, begin:first], end - first)
            expected[first : first + len(words)] = words
            drawn[first : first + len(words)] = [True] * len(words)
        assert found.ids[row].tolist() == expected
        assert found.own[row].tolist() == found.counted[row].tolist() == drawn
    assert not torch.equal(found.ids, lessons.ids)


def test_the_end_of_a_turn_ends_what_counts(tiny_model: Tiny):
    network = without_doubt(tiny_model("llama").network)
    first = said(network, WINDOWS[0, :16], 1)[0]
    network.generation_config.eos_token_id = first
    found = in_own_words(network, Lessons(WINDOWS[:1]), 0)
    assert found.ids[0].tolist() == [*WINDOWS[0, :16].tolist(), first, *WINDOWS[0, 17:].tolist()]
    assert found.counted[0].nonzero().flatten().tolist() == [16]


def test_draws_are_as_likely_as_the_student_finds_them(tiny_model: Tiny):
    network = tiny_model("llama").network
    prompt = WINDOWS[0, :8]
    with torch.no_grad():
        p = network(prompt[None, :4], use_cache=False).logits[0, -1].softmax(-1)
    drawn = in_own_words(network, Lessons(prompt.repeat(2000, 1)), 1).ids[:, 4]
    for token in p.topk(4).indices:
        due = 2000 * p[token]
        assert abs((drawn == token).sum() - due) < 4 * due.sqrt() + 1


@pytest.mark.parametrize(("share", "counts"), [(0.25, [1, 1, 1, 1]), (0.1, [0, 0, 1, 0]), (1.0, [4, 4, 4, 4])])
def test_the_share_is_kept_over_steps_from_wherever_it_goes_on(share: float, counts: list[int], tiny_model: Tiny):
    network, batch = tiny_model("llama").network, Lessons(WINDOWS[:4])
    assert list(with_own_words(network, iter([batch]), share, 2**63 - 1, range(1))), "the largest seed draws too"
    whole = list(with_own_words(network, iter([batch] * 4), share, 5, range(4)))
    assert [0 if each.own is None else int(each.own.any(-1).sum()) for each in whole] == counts
    assert all(
        torch.equal(each.ids[: 4 - count], batch.ids[: 4 - count]) for each, count in zip(whole, counts, strict=True)
    )
    rest = list(with_own_words(network, iter([batch] * 2), share, 5, range(2, 4)))
    assert all(torch.equal(one.ids, other.ids) for one, other in zip(whole[2:], rest, strict=True))
    if share != 0.1:
        assert not torch.equal(whole[0].ids, whole[1].ids), "every step has draws of its own"


@pytest.mark.usefixtures("exact")
def test_own_words_are_judged_by_the_teacher_and_are_no_example(tiny_model: Tiny):
    teacher, student = tiny_model("qwen2").network, tiny_model("qwen2", num_hidden_layers=2).network
    batch = joined(Lessons(WINDOWS[:2]), in_own_words(student, Lessons(WINDOWS[2:4]), 0))
    exact = copy.deepcopy(student).double()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(4):
        with torch.no_grad():
            truth = copy.deepcopy(teacher).double()(batch.ids[row : row + 1]).logits[0, :-1].log_softmax(-1)
        guess = exact(batch.ids[row : row + 1]).logits[0, :-1].log_softmax(-1)
        kl = (truth.exp() * (truth - guess)).sum(-1)
        hard = nn.functional.nll_loss(guess, batch.ids[row, 1:], reduction="none")
        counted = batch.counted[row, 1:]
        values = 0.7 * kl + 0.3 * hard if row < 2 else kl
        total, count = total + values[counted].sum(), count + int(counted.sum())
    (total / count).backward()
    value = distillation_step(teacher, student, batch, Loss(cross_entropy=0.3))
    assert value == pytest.approx((total / count).item(), rel=1e-4)
    for mine, theirs in zip(student.parameters(), exact.parameters(), strict=True):
        assert (mine.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-6


def test_a_training_that_was_stopped_goes_on_to_the_same_weights_with_all_that_learns(
    tiny_model: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Projections and draws included."""
    monkeypatch.setattr(training, "CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(training, "CHECKPOINT_SHARE", 0)
    config = Distil(
        tokens=8 * 96,
        windows_per_step=3,
        learning_rate=1e-3,
        evaluations=2,
        on_policy=0.5,
        hidden_states=0.5,
        relations=0.5,
    )

    def run(folder: Path, stop: int = 0) -> dict[str, Tensor]:
        def progress(done: int, total: int, pace: str) -> None:
            if done == stop:
                raise KeyboardInterrupt

        student = tiny_model("llama", num_hidden_layers=2, hidden_size=32)
        torch.rand(stop + 1)  # what else draws random numbers does not matter
        distil(tiny_model("llama"), student, config, WINDOWS, HELD_OUT, progress, folder)
        return student.network.state_dict()

    whole = run(tmp_path / "whole")
    for stop in (2, 5):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", stop)
    resumed = run(tmp_path / "stopped")
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert (tmp_path / "whole" / LOSSES).read_text() == (tmp_path / "stopped" / LOSSES).read_text()


def test_what_was_kept_on_disk_cannot_judge_new_words(tiny_model: Tiny, tmp_path: Path):
    teacher = tiny_model("llama")
    kept = write_targets(teacher, WINDOWS, tmp_path, Sampling())
    with pytest.raises(BadInputError, match="need the teacher itself"):
        distil(teacher, tiny_model("llama"), Distil(tokens=64, on_policy=0.5), Lessons(WINDOWS, targets=kept), HELD_OUT)
