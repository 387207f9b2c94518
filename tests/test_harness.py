"""lm-evaluation-harness over the engine gives what our own scoring of the same items gives."""

import json
from importlib.util import find_spec

import pytest
from tests.command_line import pocketlm
from tests.tiny import tiny_folder

from pocketlm.errors import BadInputError
from pocketlm.export.gguf import write_gguf
from pocketlm.interval import wilson
from pocketlm.model.source import load
from pocketlm.pipeline.harness import _check_room, _scores, _until
from pocketlm.run.engine import Engine

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{prompt}}}}"
"""
CHOICES = """
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITTEN = """
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
"""
FILTERED = f"""{WRITTEN}
filter_list:
  - {{name: said, filter: [{{function: take_first}}]}}
  - name: found
    filter:
      - {{function: regex, regex_pattern: "(@{{9}})", fallback: nothing of the kind}}
      - {{function: take_first}}
"""
ENDINGS = ("evaluated", "no objects of their own", "names", "in modules")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed")
def test_the_harness_and_our_own_scores_agree(tmp_path):
    folder = tiny_folder("llama", tmp_path / "tiny")
    prompts = [f"{word} {other} of the language are" for word in ("The", "Some", "All") for other in ("rules", "words")]
    rows = [{"prompt": text, "choices": ENDINGS, "answer": place % 4} for place, text in enumerate(prompts)]
    (tmp_path / "choices.jsonl").write_text("\n".join(map(json.dumps, rows)))
    written = [{"prompt": text, "answer": "nothing of the kind"} for text in prompts]
    (tmp_path / "written.jsonl").write_text("\n".join(map(json.dumps, written)))
    (tmp_path / "filtered.jsonl").write_text("\n".join(map(json.dumps, written)))
    kinds = {
        "choices": ("multiple_choice", CHOICES),
        "written": ("generate_until", WRITTEN),
        "filtered": ("generate_until", FILTERED),
    }
    for name, (kind, rest) in kinds.items():
        text = TASK.format(name=f"pocketlm_{name}", data=tmp_path / f"{name}.jsonl", kind=kind) + rest
        (tmp_path / f"pocketlm_{name}.yaml").write_text(text)
    both = ("evaluate", folder, "--reference", folder, "--json")
    tasks = [each for name in kinds for each in ("--harness", tmp_path / f"pocketlm_{name}.yaml")]
    done = pocketlm(*both, *tasks, cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    theirs = {(score["task"], score["metric"]): score for score in json.loads(done.stdout)["tasks"]}
    assert set(theirs) == {
        ("pocketlm_choices", "acc"), ("pocketlm_choices", "acc_norm"), ("pocketlm_written", "exact_match"),
        ("pocketlm_filtered", "exact_match (said)"), ("pocketlm_filtered", "exact_match (found)"),
    }  # fmt: skip
    done = pocketlm(*both, "--task", tmp_path / "choices.jsonl", cache=tmp_path / "cache")
    (ours,) = json.loads(done.stdout)["tasks"]
    for metric in ("acc", "acc_norm"):
        score = theirs["pocketlm_choices", metric]
        assert score["scores"]["model"]["value"] == pytest.approx(ours["scores"]["model"][metric]["value"])
        assert score["difference"] == {"value": 0, "low": 0, "high": 0}
        assert score["items"] == len(prompts)
    assert theirs["pocketlm_written", "exact_match"]["scores"]["model"]["value"] == 0
    for metric, value in (("exact_match (said)", 0), ("exact_match (found)", 1)):
        score = theirs["pocketlm_filtered", metric]
        assert (score["items"], score["scores"]["model"]["value"]) == (len(prompts), value)


def test_a_share_has_wilsons_interval_and_another_mean_the_normal_one():
    samples = [{"acc": 0.0, "chrf": value} for value in (10.0, 20.0) * 50]
    acc, chrf = _scores("t", {"model": {"samples": {"t": [{"metrics": ["acc", "chrf"]} | each for each in samples]}}})
    assert acc.scores["model"] == wilson(0, 100)
    assert acc.scores["model"].high > 0.03  # 0 of 100 is not certainly none
    mean = chrf.scores["model"]
    assert (mean.value, mean.low, mean.high) == pytest.approx((15, 14.015, 15.985), abs=1e-3)


def test_a_task_that_allows_more_tokens_than_the_context_has_cuts_no_question(tiny_model, tmp_path):
    model = tiny_model("llama")
    write_gguf(model, {}, tmp_path / "tiny.gguf")
    questions = [model.tokenizer(text).input_ids for text in ("The names of the language are", "All words of it are")]
    with Engine(tmp_path / "tiny.gguf", context=128) as engine:
        for question in questions:
            short, long = (_until(engine, model.tokenizer, question, {"max_gen_toks": most}) for most in (8, 2048))
            assert short
            assert long.startswith(short.rstrip("\N{REPLACEMENT CHARACTER}"))  # a character may be cut in two


def test_a_question_that_leaves_no_room_for_an_answer_is_refused():
    _check_room("arc", 127, 128)
    with pytest.raises(BadInputError, match="A question of arc has 128 tokens, where it and its answer have 128"):
        _check_room("arc", 128, 128)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("lm_eval"), reason="lm-eval is not installed")
def test_questions_are_put_as_a_chat_where_that_is_asked_for(tmp_path):
    """The right answers are what the model says to questions in its template."""
    folder, rows = tiny_folder("llama", tmp_path / "tiny"), []
    model = load(str(folder))
    write_gguf(model, {}, tmp_path / "tiny.gguf")
    with Engine(tmp_path / "tiny.gguf", context=128) as engine:
        for prompt in ("The names", "All words", "A rule", "Some more"):
            turns = [{"role": "user", "content": prompt}]
            text = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            said = _until(
                engine, model.tokenizer, model.tokenizer(text).input_ids, {"until": ["\n"], "max_gen_toks": 8}
            )
            rows.append({"prompt": prompt, "answer": said})
    assert all(row["answer"] for row in rows)
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = tmp_path / "pocketlm_chat.yaml"
    task.write_text(TASK.format(name=task.stem, data=tmp_path / "chat.jsonl", kind="generate_until") + WRITTEN)
    shares = []
    for options in ((), ("--chat-template",)):
        done = pocketlm("evaluate", folder, "--harness", task, "--json", *options, cache=tmp_path / "cache")
        assert done.returncode == 0, done.stderr
        (score,) = json.loads(done.stdout)["tasks"]
        shares.append(score["scores"]["model"]["value"])
    assert shares[0] < shares[1] == 1
    plain = tiny_folder("gpt2", tmp_path / "plain")
    done = pocketlm("evaluate", plain, "--harness", task, "--chat-template", cache=tmp_path / "cache")
    assert (done.returncode, "The model has no chat template" in done.stderr) == (2, True)


def test_only_the_harness_is_told_of_chat_templates(tmp_path):
    done = pocketlm("evaluate", tmp_path, "--reference", tmp_path, "--chat-template", cache=tmp_path / "cache")
    assert (done.returncode, "--chat-template is for --harness" in done.stderr) == (2, True)


@pytest.mark.skipif(bool(find_spec("lm_eval")), reason="lm-eval is installed")
def test_without_the_harness_its_install_line_is_given(tmp_path):
    folder = tiny_folder("llama", tmp_path / "tiny")
    done = pocketlm("evaluate", folder, "--harness", "arc_easy", cache=tmp_path / "cache")
    assert done.returncode == 6
    assert "pip install 'pocketlm[harness]'" in done.stderr
