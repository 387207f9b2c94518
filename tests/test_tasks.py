"""Multiple choice in the engine is what the slow, obvious sum in torch is, and bad rows are named."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.command_line import pocketlm
from tests.tiny import tiny_folder

from pocketlm.errors import BadInputError
from pocketlm.measure.tasks import Item, correct, likelihoods, pair, read_items, wilson

ITEM = Item("The operators of the language are", (" evaluated left to right", " no objects", " names"), 1)


def test_likelihoods_are_the_sums_of_one_token_at_a_time(tiny_model):
    model = tiny_model("llama")
    network = model.network.double()

    def logits(ids):
        with torch.no_grad():
            return network(torch.tensor([ids])).logits[0]

    def encode(text):
        return model.tokenizer(text).input_ids

    expected = []
    for choice in ITEM.choices:
        ids, total = encode(ITEM.prompt), 0.0
        for token in model.tokenizer(choice, add_special_tokens=False).input_ids:
            total += logits(ids)[-1].softmax(-1)[token].log().item()
            ids = [*ids, token]
        expected.append(total)
    assert likelihoods(ITEM, encode, logits, 64) == pytest.approx(expected, rel=1e-9)


def test_per_byte_prefers_the_long_choice():
    item = Item("A", (" ab", " abcdefgh"), 1)
    assert correct(item, [-4.0, -8.0]) == (False, True)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_inside(counts):
    share = wilson(*counts)
    assert 0 <= share.low <= share.value <= share.high <= 1
    assert share.low < share.high


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_a_pair_counts_what_changed(rows):
    paired = pair([old for old, _ in rows], [new for _, new in rows])
    assert paired.difference.value == pytest.approx((paired.won - paired.lost) / len(rows))
    assert paired.within_noise or paired.won != paired.lost


@given(st.text().filter(str.strip), st.lists(st.text().filter(str.strip), min_size=2, unique=True), st.data())
def test_what_is_written_is_read(tmp_path_factory, prompt, choices, data):
    answer = data.draw(st.integers(0, len(choices) - 1))
    path = tmp_path_factory.mktemp("task") / "task.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "choices": choices, "answer": answer}) + "\n")
    (item,) = read_items(path)
    assert (item.prompt, item.answer) == (prompt, answer)
    assert [text.strip() for text in item.choices] == [text.strip() for text in choices]


@pytest.mark.parametrize(
    "row",
    ["{", "[]", '{"prompt": "a", "choices": ["b", "c"]}', '{"prompt": "a", "choices": ["b"], "answer": 0}',
     '{"prompt": "", "choices": ["b", "c"], "answer": 0}', '{"prompt": "a", "choices": ["b", "c"], "answer": 2}'],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row):
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": "c"}\n' + row)
    with pytest.raises(BadInputError, match=r"task\.jsonl, line 2: "):
        read_items(path)


@pytest.mark.slow
def test_a_model_beside_itself_differs_by_nothing(tmp_path):
    folder = tiny_folder("llama", tmp_path / "tiny")
    row = {"prompt": ITEM.prompt, "choices": list(ITEM.choices), "answer": 1}
    (tmp_path / "task.jsonl").write_text(json.dumps(row) + "\n")
    done = pocketlm(
        "evaluate", folder, "--reference", folder, "--task", tmp_path / "task.jsonl", "--json", cache=tmp_path / "cache"
    )
    assert done.returncode == 0, done.stderr
    (result,) = json.loads(done.stdout)
    assert result["scores"]["model"] == result["scores"]["reference"]
    assert (result["paired"]["lost"], result["paired"]["won"]) == (0, 0)


def test_evaluate_without_reference_and_task_says_what_to_give(tmp_path):
    done = pocketlm("evaluate", "demo", cache=tmp_path)
    assert done.returncode != 0
    assert "--task FILE" in done.stderr
