"""A model with fewer tokens learns from one with more: the targets, the loss and its gradient, against obvious ones."""

import copy
from dataclasses import replace

import pytest
import torch
from tests.conftest import Tiny
from torch import Tensor, nn

from pocketlm.model.gguf_tokenizer import BYTE
from pocketlm.model.learning import TOKENS_AT_ONCE, distillation_step
from pocketlm.model.respelling import Respeller, respell, respelled_divergence, respelled_step
from pocketlm.model.vocabulary import spellings
from pocketlm.plan.sizes import sizes_of
from pocketlm.steps.distil import Distil, distil
from pocketlm.steps.quantize import Quantize, quantize
from pocketlm.steps.trim_vocabulary import TrimVocabulary, trim_vocabulary
from pocketlm.steps.tune import Tune, tune

TEXT = ["The small models went to market, and number 42 came back again.\n\n"] * 40
SIZE = 330
POSITIONS = 24


@pytest.fixture(params=["llama", "mistral", "gemma3_text"])
def pair(request: pytest.FixtureRequest, tiny_model: Tiny):
    """Byte-level BPE, and SentencePiece's, where a character that is gone is spelled by its bytes."""
    teacher, student = tiny_model(request.param), tiny_model(request.param)
    student, _ = trim_vocabulary(student, TrimVocabulary(size=SIZE), TEXT)
    return teacher, student, spellings(teacher.tokenizer, student.tokenizer)


def as_bytes(token: str) -> bytes:
    return bytes([int(token[3:5], 16)]) if BYTE.fullmatch(token) else token.encode()


def windows_of(teacher, count=3):
    words = "Paragraph: models, markets; small pockets hold numbers like 1,234 and déjà vu. " * 9
    ids = teacher.tokenizer(words, add_special_tokens=False).input_ids
    return torch.tensor(ids[: count * POSITIONS]).reshape(count, POSITIONS)


def obvious(teacher: nn.Module, student: nn.Module, windows: Tensor, spelling: list[tuple[int, ...]]) -> Tensor:
    """Window by window, prediction by prediction, token by token, in float64."""
    losses = []
    for row in windows:
        said = torch.softmax(teacher(row[None]).logits[0, :, : len(spelling)].double(), -1)  # without padding
        pieces = [piece for token in row.tolist() for piece in spelling[token]]
        mine = torch.log_softmax(student(torch.tensor([pieces])).logits[0].double(), -1)
        place = 0
        for position, token in enumerate(row.tolist()):
            for number, piece in enumerate(spelling[token]):
                if place:
                    target = torch.zeros(mine.shape[1], dtype=torch.float64)
                    if number == 0:
                        for index, word in enumerate(spelling):
                            target[word[0]] += said[position - 1, index]
                    else:
                        target[piece] = 1
                    losses.append((torch.special.xlogy(target, target) - target * mine[place - 1]).sum())
                place += 1
    return torch.stack(losses).mean()


def test_every_token_is_spelled_with_what_it_is_made_of(pair):
    teacher, student, spelling = pair
    before, after = teacher.tokenizer, student.tokenizer
    assert len(spelling) == len(before)
    gone = 0
    for index, pieces in enumerate(spelling):
        tokens = after.convert_ids_to_tokens(list(pieces))
        assert b"".join(map(as_bytes, tokens)) == as_bytes(before.convert_ids_to_tokens(index))
        gone += tokens != [before.convert_ids_to_tokens(index)]
    assert gone == len(before) - SIZE


def test_a_respelled_window_says_the_same(pair):
    teacher, student, spelling = pair
    windows = windows_of(teacher)
    text = respell(windows, spelling, 256)
    for row, ids in zip(windows, text.ids, strict=True):
        pieces = [piece for token in row.tolist() for piece in spelling[token]]
        assert ids[: len(pieces)].tolist() == pieces
        assert not ids[len(pieces) :].any()
        assert student.tokenizer.decode(pieces) == teacher.tokenizer.decode(row)
    flat = text.ids.flatten()
    assert torch.equal(flat[text.places + 1], text.labels)
    heard = text.heard >= 0
    following = windows.flatten()[text.heard[heard] + 1]
    assert [spelling[token][0] for token in following.tolist()] == text.labels[heard].tolist()
    assert len(text.labels) == sum(len(spelling[token]) for token in windows.flatten().tolist()) - len(windows)


@pytest.mark.usefixtures("exact")
def test_a_context_that_the_teachers_tokens_fill_holds_the_beginning_in_the_students(tiny_model: Tiny):
    """A GPT-2 has no position behind its last one."""
    teacher = tiny_model("gpt2", n_positions=POSITIONS)
    student, _ = trim_vocabulary(tiny_model("gpt2", n_positions=POSITIONS), TrimVocabulary(size=SIZE), TEXT)
    spelling, windows = spellings(teacher.tokenizer, student.tokenizer), windows_of(teacher)
    whole, text = respell(windows, spelling, 256), respell(windows, spelling, POSITIONS)
    assert whole.ids.shape[1] > POSITIONS
    assert torch.equal(text.ids, whole.ids[:, :POSITIONS])
    read = [ids[: POSITIONS - 1].tolist() for ids in whole.ids]  # what is behind the end is no prediction
    assert len(text.labels) == sum(map(len, read))
    before = respelled_divergence(teacher.network, student.network, windows, spelling)
    assert respelled_step(teacher.network, student.network, windows, spelling) == pytest.approx(before, rel=1e-4)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("positions", [7, 1000])
def test_the_divergence_and_its_gradient_are_the_obvious_ones(pair, positions, monkeypatch):
    monkeypatch.setattr("pocketlm.model.respelling.POSITIONS_AT_ONCE", positions)
    monkeypatch.setitem(TOKENS_AT_ONCE, "cpu", positions)  # fewer than a window has: one at a time
    teacher, student, spelling = pair
    windows = windows_of(teacher)
    reference = copy.deepcopy(student.network).double()
    truth = obvious(copy.deepcopy(teacher.network).double(), reference, windows, spelling)
    truth.backward()
    assert respelled_divergence(teacher.network, student.network, windows, spelling) == pytest.approx(
        truth.item(), rel=1e-4
    )
    assert respelled_step(teacher.network, student.network, windows, spelling) == pytest.approx(truth.item(), rel=1e-4)
    for (name, ours), theirs in zip(student.network.named_parameters(), reference.parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-3 * theirs.grad.norm() + 1e-6, name


@pytest.mark.usefixtures("exact")
def test_where_no_token_is_gone_it_is_plain_distillation(tiny_model: Tiny):
    teacher, student = tiny_model("qwen2"), tiny_model("qwen2")
    with torch.no_grad():
        for parameter in student.network.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    windows = torch.randint(0, 300, (2, 16), generator=torch.Generator().manual_seed(1))
    same = [(index,) for index in range(teacher.network.config.vocab_size)]
    ours = respelled_divergence(teacher.network, student.network, windows, same)
    whole = distillation_step(teacher.network, student.network, windows)
    with torch.no_grad():
        truth, mine = (m.network(windows).logits[:, -1].double().log_softmax(-1) for m in (teacher, student))
    last = (truth.exp() * (truth - mine)).sum(-1).sum().item()
    assert ours == pytest.approx((whole * windows.numel() - last) / (windows.numel() - len(windows)), rel=1e-4)


def test_distilling_across_vocabularies_comes_nearer_to_the_teacher(pair):
    teacher, student, spelling = pair
    windows = windows_of(teacher, 8)
    config = Distil(tokens=8 * POSITIONS * 6, learning_rate=3e-3, windows_per_step=4)
    _, report = distil(Respeller(teacher, spelling), student, config, windows, windows[:4])
    (_, before), *_, (_, after) = report.details["held_out_kl"]
    assert after < 0.9 * before
    assert report.details["kept"]


def test_what_is_stored_of_a_model_with_fewer_tokens_is_tuned_towards_the_original(pair):
    teacher, student, spelling = pair
    words, held_out = windows_of(teacher, 3), windows_of(teacher, 2)
    formats = dict.fromkeys(sizes_of(student).group_names, "Q2_0")
    whole = replace(student, network=copy.deepcopy(student.network))
    rounded, packed, _ = quantize(student, Quantize(formats=formats, method="rtn"), torch.zeros(1, 8, dtype=torch.long))
    before = respelled_divergence(teacher.network, rounded.network, held_out, spelling)
    config = Tune(tokens=40 * words.numel(), windows_per_step=3, scale_rate=3e-3, evaluations=2)
    tuned, stored, report = tune(Respeller(teacher, spelling), whole, packed, config, (words, held_out))
    after = respelled_divergence(teacher.network, tuned.network, held_out, spelling)
    assert after < 0.95 * before
    assert report.details["held_out_kl"][0][1] == pytest.approx(before, rel=1e-3)
    assert all(stored[name].shape == packed[name].shape for name in packed)
