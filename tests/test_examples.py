"""Examples of a task: packed so that none sees another, and learnt in their answers alone."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import Tiny
from tests.tiny import FAMILIES

from pocketlm.errors import BadInputError
from pocketlm.model.examples import (
    Example,
    encode_answer,
    encode_prompt,
    pack_examples,
    read_examples,
    split_examples,
)
from pocketlm.model.learning import Lessons, distillation_step, held_out_loss
from pocketlm.steps.distil import Distil, distil
from pocketlm.tensors.divergence import Loss

EXAMPLES = [Example(f"Which number is {number}", "even" if number % 2 == 0 else "odd one") for number in range(40)]
CROSS_ENTROPY = Loss(cross_entropy=1.0)


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_examples_give_the_loss_and_gradient_of_single_ones(family: str, tiny_model: Tiny):
    model = tiny_model(family)
    packed = pack_examples(EXAMPLES[:5], model.tokenizer, 128)
    assert len(packed) < 5
    alone = [pack_examples([example], model.tokenizer, 128) for example in EXAMPLES[:5]]
    answers = [int(lesson.counted.sum()) for lesson in alone]
    expected = sum(
        held_out_loss(None, model.network, lesson, CROSS_ENTROPY) * count
        for lesson, count in zip(alone, answers, strict=True)
    ) / sum(answers)
    assert distillation_step(None, model.network, packed, CROSS_ENTROPY) == pytest.approx(expected, rel=1e-4)
    together = {name: value.grad.clone() for name, value in model.network.named_parameters()}
    model.network.zero_grad()
    ids, places, counted = (torch.cat([getattr(each, name) for each in alone]) for name in ("ids", "places", "counted"))
    distillation_step(None, model.network, Lessons(ids, places, counted), CROSS_ENTROPY)
    for name, value in model.network.named_parameters():
        assert (value.grad - together[name]).norm() <= 1e-3 * value.grad.norm() + 1e-6, name


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_answers_and_their_ends_are_learnt_and_nothing_else(family: str, tiny_model: Tiny):
    tokenizer = tiny_model(family).tokenizer
    lessons = pack_examples(EXAMPLES[:3], tokenizer, 256)
    learnt = lessons.ids[lessons.counted].tolist()
    assert learnt == [
        index
        for example in EXAMPLES[:3]
        for index in (*encode_answer(tokenizer, example.answer), tokenizer.eos_token_id)
    ]
    text = tokenizer.decode(encode_prompt(tokenizer, "Hello"))
    assert ("assistant" in text) == (family == "llama"), "a chat model reads a chat"


@given(count=st.integers(1, 30), length=st.integers(60, 300))
@settings(max_examples=20, deadline=None)
def test_packing_loses_nothing(count: int, length: int, tiny_tokens: list):
    tokenizer = tiny_tokens[0]
    lessons = pack_examples(EXAMPLES[:count], tokenizer, length)
    assert lessons.ids.shape == lessons.places.shape == lessons.counted.shape
    assert lessons.ids.shape[1] == length
    starts = [
        row[place:]
        for row, places in zip(lessons.ids.tolist(), lessons.places.tolist(), strict=True)
        for place in range(length)
        if places[place] == 0
    ]
    for example in EXAMPLES[:count]:
        ids = [*encode_prompt(tokenizer, example.prompt), *encode_answer(tokenizer, example.answer)]
        assert sum(start[: len(ids)] == ids for start in starts) >= 1


@pytest.fixture(scope="module")
def tiny_tokens(tiny_model: Tiny) -> list:
    return [tiny_model("llama").tokenizer]


def test_an_example_longer_than_a_window_is_refused(tiny_model: Tiny):
    with pytest.raises(BadInputError, match=r"tokens where 8 fit. Shorten the one that begins with `Which"):
        pack_examples(EXAMPLES, tiny_model("llama").tokenizer, 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no examples"),
        ("not json", "line 1: not JSON"),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', "line 2: not an example"),
        ('{"prompt": "a", "answer": ""}', "and not empty"),
        ('{"prompt": "", "answer": "b"}', "and not empty"),
        ('["a", "b"]', "not an example"),
    ],
)
def test_files_that_are_no_tasks_are_refused(text: str, message: str, tmp_path: Path):
    path = tmp_path / "task.jsonl"
    path.write_text(text)
    with pytest.raises(BadInputError, match=message):
        read_examples(path)


def test_the_split_is_by_content_and_both_parts_have_something(tmp_path: Path):
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(json.dumps(vars(example)) for example in EXAMPLES))
    examples = read_examples(path)
    assert examples == EXAMPLES
    learnt, choosing = split_examples(examples)
    assert sorted(learnt + choosing, key=str) == sorted(examples, key=str)
    again = split_examples(examples[::-1])
    assert set(again[0]) == set(learnt)
    assert all(split_examples(examples[:2]))


def test_a_task_is_learnt(tiny_model: Tiny):
    model = tiny_model("llama")
    learnt, choosing = (pack_examples(part, model.tokenizer, 128) for part in split_examples(EXAMPLES))
    config = Distil(tokens=60 * 2 * 128, windows_per_step=2, learning_rate=1e-3, cross_entropy=1.0)
    _, report = distil(model, model, config, learnt, choosing)
    curve = [value for _, value in report.details["held_out_kl"]]
    assert min(curve) < 0.5 * curve[0]
