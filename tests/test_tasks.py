"""Tasks in the engine are what the slow, obvious sum in torch is, and bad rows are named."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.command_line import pocketlm
from tests.tiny import tiny_folder

from pocketlm.errors import BadInputError
from pocketlm.export.gguf import write_gguf
from pocketlm.interval import wilson
from pocketlm.measure.task_files import Item, Task, read_task
from pocketlm.measure.tasks import Outcome, chosen, joined, likelihoods, matches, pair, result
from pocketlm.model.examples import encode_answer, encode_prompt
from pocketlm.pipeline.artefact import task_score
from pocketlm.pipeline.scoring import check_items, label_pairs, seen_items, write
from pocketlm.run.engine import Engine

ITEM = Item("The operators of the language are", (" evaluated left to right", " no objects", " names"), 1)


def test_items_that_were_learnt_from_are_counted():
    asked = replace(ITEM, prompt="Which of the planets has the most moons?\nAnswer:")
    short = replace(ITEM, prompt="planets")
    task, other = Task("planets", "choices", (asked, short, ITEM)), Task("other", "choices", (ITEM,))
    text = ["The planets. Which of the\n  planets has the most moons? Answer: Saturn", "More."]
    (note,) = seen_items([task, other], text)
    assert note.startswith("1 of 3 items of planets stand in the text")


def last_row(network, ids):
    with torch.no_grad():
        return network(torch.tensor([ids])).logits[0, -1]


def one_token_at_a_time(network, before, after):
    """The log-likelihood of `after` behind `before`, the slow way."""
    total, ids = 0.0, list(before)
    for token in after:
        total += last_row(network, ids).log_softmax(-1)[token].item()
        ids.append(token)
    return total


def whole_windows(network):
    def read(before, endings):
        with torch.no_grad():
            return [network(torch.tensor([[*before, *ending]])).logits[0, len(before) - 1 : -1] for ending in endings]

    return read


def test_likelihoods_are_the_sums_of_one_token_at_a_time(tiny_model):
    model = tiny_model("llama")
    network = model.network.double()
    encode = lambda text: model.tokenizer(text).input_ids  # noqa: E731
    pairs = [joined(ITEM.prompt, choice, encode) for choice in ITEM.choices]
    for (before, after), choice in zip(pairs, ITEM.choices, strict=True):
        assert before + after == encode(ITEM.prompt) + model.tokenizer(choice, add_special_tokens=False).input_ids
    expected = [one_token_at_a_time(network, *each) for each in pairs]
    found = likelihoods(pairs, whole_windows(network), 64)
    assert [total for total, _ in found] == pytest.approx(expected, rel=1e-9)
    before, after = pairs[0][0], []
    while len(after) < 3:
        after.append(int(last_row(network, before + after).argmax()))
    assert [greedy for _, greedy in likelihoods([(before, after)], whole_windows(network), 64)] == [True]
    assert not any(greedy for _, greedy in found)
    most = max(len(after) for _, after in pairs) + 3  # prompts then lose their beginnings
    expected = [one_token_at_a_time(network, before[len(after) - most :], after) for before, after in pairs]
    found = likelihoods(pairs, whole_windows(network), most)
    assert [total for total, _ in found] == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])  # Gemma's window of 8 tokens must survive going back
def test_the_engine_reads_a_prompt_once_and_scores_every_ending_the_same(tiny_model, tmp_path, family):
    model = tiny_model(family)
    write_gguf(model, {}, tmp_path / "tiny.gguf")
    before = model.tokenizer(ITEM.prompt + ", as everybody knows who has read so far in the manual,").input_ids
    endings = [model.tokenizer(choice, add_special_tokens=False).input_ids for choice in ITEM.choices]
    with Engine(tmp_path / "tiny.gguf", context=128) as engine:
        found = engine.continuations(before, endings)
        apart = [engine.logits([*before, *ending])[len(before) - 1 : -1] for ending in endings]
    for one, other, ending in zip(found, apart, endings, strict=True):
        assert one.shape == (len(ending), engine.vocabulary_size)
        torch.testing.assert_close(one, other, rtol=0, atol=0.05 * other.std().item())


@pytest.mark.slow
def test_the_engine_generates_the_likeliest_token_each_time(tiny_model, tmp_path):
    model = tiny_model("llama")
    write_gguf(model, {}, tmp_path / "tiny.gguf")
    prompt = encode_prompt(model.tokenizer, ITEM.prompt)
    with Engine(tmp_path / "tiny.gguf", context=len(prompt) + 9) as engine:
        said = engine.generate(prompt, 64, lambda ids: False)
        assert 0 < len(said) <= 9
        assert engine.generate(prompt, 2, lambda ids: False) == said[:2]
        assert engine.generate(prompt, 9, lambda ids: True) == said[:1]
        ended = len(said) < 9
        for count, token in enumerate(said):
            row = last_row(model.network, prompt + said[:count])
            assert row[token] > row.max() - 0.05 * row.std()  # the engine rounds
            assert not engine.ends_generation(token)
        rest = last_row(model.network, prompt + said)
        assert not ended or engine.ends_generation(int(rest.argmax()))


@pytest.mark.slow
def test_a_model_without_a_template_writes_a_line(tiny_model, tmp_path):
    model = tiny_model("gpt2")
    write_gguf(model, {}, tmp_path / "tiny.gguf")
    with Engine(tmp_path / "tiny.gguf", context=128) as engine:
        for prompt in ("The operators", "A name is", "a", "In Python,", "1"):
            said = write(engine, model.tokenizer, prompt).lstrip()
            assert "\n" not in said.removesuffix("\n"), prompt


def test_an_item_without_room_is_named_before_any_work(tiny_model):
    model = tiny_model("llama")
    for kind, long in (("written", Item("word " * 5000, (), "b")), ("choices", Item("a", (" b", " c" * 5000), 0))):
        fine = Item("a", long.choices and (" b", " c"), long.answer)
        check_items(model, [Task("t", kind, (fine, fine))])
        with pytest.raises(BadInputError, match="Item 2 of the task t does not fit"):
            check_items(model, [Task("t", kind, (fine, long))])


def test_per_byte_prefers_the_long_choice():
    outcome = chosen(Item("A", (" ab", " abcdefgh"), 1), [-4.0, -8.0])
    assert (outcome.right, outcome.normed) == (False, True)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        (" Paris.\nQ: What", "paris", True),
        ("“Paris”", "“Paris”", True),
        ("**New  York**", "new york", True),
        ("Paris, France", "Paris", False),
        ("", "Paris", False),
        ("1.\n2.", "1\n2", False),
        ("one\ntwo\nthree", "One\nTwo", True),
        ("ﬁne", "fine", True),
        ("", "[]", False),
        ("[]", "[]", True),
        ("5", ".5", False),
        ("0.5.", " .5", True),
    ],
)
def test_written_answers_match_but_for_case_spaces_and_marks(said, answer, right):
    assert matches(said, answer) is right


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_and_stays_inside(counts):
    share = wilson(*counts)
    assert 0 <= share.low <= share.value <= share.high <= 1
    assert share.low < share.high


def test_wilsons_interval():
    found = [(share.low, share.high) for share in (wilson(95, 100), wilson(0, 10))]
    assert found == [pytest.approx((0.8883, 0.9785), abs=1e-4), pytest.approx((0.0, 0.2775), abs=1e-4)]


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
    task = read_task(path)
    (item,) = task.items
    assert (task.kind, item.prompt, item.answer) == ("choices", prompt, answer)
    assert [text.strip() for text in item.choices] == [text.strip() for text in choices]


def test_a_label_that_begins_another_is_scored_with_the_end_of_its_turn(tiny_model):
    tokenizer = tiny_model("llama").tokenizer
    clear, unclear = Item("a", ("yes", "no"), 0), Item("a", ("card", "card lost", "no"), 0)
    assert all(after[-1] != tokenizer.eos_token_id for _, after in label_pairs(clear, tokenizer))
    for (before, after), label in zip(label_pairs(unclear, tokenizer), unclear.choices, strict=True):
        assert before == encode_prompt(tokenizer, "a")
        assert after == [*encode_answer(tokenizer, label), tokenizer.eos_token_id]


def test_a_report_has_what_a_task_is_judged_by():
    before = [Outcome(True, True), Outcome(True, False), Outcome(False, True), Outcome(False, False)]
    after = [Outcome(False, True), Outcome(False, False), Outcome(False, False), Outcome(False, False)]
    found = task_score(result("arc", "choices", {"reference": before, "model": after}))
    assert (found.measure, found.items, found.lost, found.won) == ("acc_norm", 4, 1, 0)
    assert (found.original.value, found.compressed.value, found.difference.value) == (0.5, 0.25, -0.25)
    written = [Outcome(True), Outcome(False, faults=("empty",)), Outcome(False, faults=("empty",))]
    found = task_score(result("capitals", "written", {"reference": written[:1] * 3, "model": written}))
    assert (found.measure, found.lost, found.faults) == ("acc", 2, {"empty": 2})


LAYOUTS = {
    "arc": (
        {"query": "Question: Why?", "choices": ["So.", "It is.", "So."], "gold": 1},
        Item("Question: Why?\nAnswer:", (" So.", " It is.", " So."), 1),
    ),
    "piqa": (
        {"query": "Question: dresser\n", "choices": ["a", "b"], "gold": 0},
        Item("Question: dresser\nAnswer:", (" a", " b"), 0),
    ),
    "openbookqa": (
        {"query": "Predators eat", "choices": ["grass", "bunnies"], "gold": 1},
        Item("Predators eat", (" grass", " bunnies"), 1),
    ),
    "hellaswag": (
        {"activity_label": "Shaving", "ctx_a": "A man [header] sits.", "ctx_b": "he", "ctx": "A man sits. he",
         "endings": ["is up [title] Stop", "is down"], "label": "1"},
        Item("Shaving: A man sits. He", (" is up. Stop", " is down"), 1),
    ),
    "written": ({"prompt": "2 + 2 =", "answer": "4"}, Item("2 + 2 =", (), "4")),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_common_layouts_are_known(tmp_path, name):
    row, item = LAYOUTS[name]
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row))
    assert read_task(tmp_path / f"{name}.jsonl").items == (item,)


def test_the_choices_of_a_classification_are_the_labels_of_the_whole_file(tmp_path):
    rows = [{"prompt": text, "label": label} for text, label in (("a", "no"), ("b", "yes"), ("c", "maybe"))]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = read_task(tmp_path / "task.jsonl", limit=2)
    assert task.kind == "labels"
    assert task.items == (Item("a", ("maybe", "no", "yes"), 1), Item("b", ("maybe", "no", "yes"), 2))
    (tmp_path / "task.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(BadInputError, match="single label"):
        read_task(tmp_path / "task.jsonl")


@pytest.mark.parametrize(
    "row",
    ["{", "[]", '{"prompt": "a", "choices": ["b", "c"]}', '{"prompt": "a", "choices": ["b"], "answer": 0}',
     '{"prompt": "", "choices": ["b", "c"], "answer": 0}', '{"prompt": "a", "choices": ["b", "c"], "answer": 2}',
     '{"prompt": "a", "choices": ["b", "b", "c"], "answer": 0}', '{"prompt": "a", "answer": "c"}',
     '{"ctx": "a", "endings": ["b", "c"], "label": "d"}', '{"ctx": "a", "endings": ["b", "c"], "label": "²"}',
     '{"prompt": "a\\ud800", "answer": "b"}', "[" * 100_000],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row):
    path = tmp_path / "task.jsonl"
    path.write_text('{"prompt": "a", "choices": ["b", "c"], "answer": "c"}\n' + row)
    with pytest.raises(BadInputError, match=r"task\.jsonl, line 2: "):
        read_task(path)


@pytest.mark.slow
def test_tasks_of_every_kind_as_a_person_scores_them(tmp_path, tiny_model):
    folder = tiny_folder("llama", tmp_path / "tiny")
    tokenizer = tiny_model("llama").tokenizer
    row = {"prompt": ITEM.prompt, "choices": list(ITEM.choices), "answer": 1}
    network, before = tiny_model("llama").network.double(), encode_prompt(tokenizer, ITEM.prompt)
    names = [text.strip() for text in ITEM.choices]
    names.sort(key=lambda name: -one_token_at_a_time(network, before, encode_answer(tokenizer, name)))
    labels = [{"prompt": ITEM.prompt, "label": name} for name in (names[0], *names)]  # the likeliest twice
    (tmp_path / "choices.jsonl").write_text(json.dumps(row))
    (tmp_path / "labels.jsonl").write_text("\n".join(map(json.dumps, labels)))
    (tmp_path / "written.jsonl").write_text(json.dumps({"prompt": ITEM.prompt, "answer": "nothing of the kind"}))
    tasks = [part for name in ("choices", "labels", "written") for part in ("--task", tmp_path / f"{name}.jsonl")]
    done = pocketlm("evaluate", folder, "--reference", folder, *tasks, "--json", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)["tasks"]
    assert [(found["kind"], found["measure"]) for found in results] == [
        ("choices", "acc_norm"), ("labels", "acc"), ("written", "acc"),
    ]  # fmt: skip
    for found in results:
        assert found["scores"]["model"] == found["scores"]["reference"]
        assert (found["paired"]["lost"], found["paired"]["won"]) == (0, 0)
    assert len(set(names)) == 3
    assert results[1]["scores"]["model"]["acc"]["value"] == pytest.approx(2 / 4), "the likeliest label is right"
    assert results[0]["scores"]["model"]["count"] == 1
    assert results[2]["scores"]["model"]["acc"]["value"] == 0
    assert results[2]["scores"]["model"]["acc_norm"] is None
