"""Escalation between two real servers, and the threshold that calibrates it."""

import json
import math
import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.command_line import pocketlm
from tests.serving import ENDLESS, plain_file, serving, tiny_file

from pocketlm.errors import BadInputError
from pocketlm.run.server.answers import confidence
from pocketlm.run.server.calibration import Judged, choose, is_right, lines, read_examples

HELLO = [{"role": "user", "content": "Hello there"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("escalation")


@pytest.fixture(scope="module")
def small(folder):
    return tiny_file(folder, "small")


@pytest.fixture(scope="module")
def large(folder):
    return tiny_file(folder, "large", seed=1)


@pytest.fixture(scope="module")
def larger(folder, large):
    with serving(large, cache=folder, POCKETLM_API_KEY="secret") as running:
        yield running


def escalating(small, url, threshold, *more, folder):
    arguments = ("--escalate-to", url, "--escalate-model", "large", "--threshold", threshold)
    patient = ("--escalate-timeout", 300)  # of two the last one counts
    return serving(small, *arguments, *patient, *more, cache=folder, POCKETLM_ESCALATE_KEY="secret")


def ask(server, **options):
    asked = {"model": "small", "messages": HELLO, "max_tokens": 12, "temperature": 0, "logit_bias": ENDLESS} | options
    return server.client("secret").chat.completions.create(**asked)


def text(answer):
    return answer.choices[0].message.content


def test_an_empty_answer_of_the_larger_model_is_an_answer(folder, small, larger):
    begins = text(ask(larger, model="large", logit_bias={}))[0]
    with escalating(small, f"{larger.address}/v1", 1.01, folder=folder) as server:
        answer = ask(server, stop=[begins])
    assert answer.pocketlm["answered_by"] == "large"
    assert not text(answer)


YES = {"choices": [{"message": {"content": "yes"}}]}
SAYS_YES = json.dumps(YES).encode()


@contextmanager
def endpoint(answer):
    """An endpoint that says what `answer` returns, a status and a body; its address and a list of what it is asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            status, body = answer()
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{http.server_port}/v1", asked
        finally:
            http.shutdown()


def test_the_larger_model_is_asked_nothing_that_only_the_local_one_understands(folder, small):
    ours = {"top_k": 5, "min_p": 0.1, "repeat_penalty": 1.1}
    with (
        endpoint(lambda: (200, SAYS_YES)) as (url, asked),
        escalating(small, url, 1.01, folder=folder) as server,
    ):
        assert text(ask(server, seed=3, logit_bias={"7": 5}, extra_body=ours)) == "yes"
    options = {"max_tokens": 12, "temperature": 0, "seed": 3, "stream": False}
    assert asked == [{"model": "large", "messages": HELLO} | options]


def test_an_unsure_answer_is_replaced_and_says_by_whom(folder, small, larger):
    with serving(small, cache=folder) as alone:
        local = text(ask(alone))
    theirs = text(ask(larger, model="large"))
    assert local != theirs
    with escalating(small, f"{larger.address}/v1", 1.01, folder=folder) as server:
        answer = ask(server)
        assert text(answer) == theirs
        assert answer.pocketlm["answered_by"] == "large"
        assert answer.pocketlm["escalated"] is True
        assert 0 < answer.pocketlm["confidence"] < 1
        raw = server.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2})
        assert raw.headers["x-pocketlm-answered-by"] == "large"

        chunks = list(ask(server, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == theirs
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
        assert chunks[-2].pocketlm["answered_by"] == "large"
        assert chunks[-1].usage.completion_tokens == 12
        assert server.metric("escalations_total") == 3
        counted = server.get("/metrics").text
        assert 'pocketlm_answer_tokens_total{model="large"} 26.0' in counted  # 12, 2 and 12, paid for elsewhere
        assert 'pocketlm_escalations_total{outcome="failed"} 0.0' in counted
    with escalating(small, f"{larger.address}/v1", 0.0, folder=folder) as server:
        answer = ask(server)
        assert text(answer) == local
        assert answer.pocketlm["answered_by"] == "small"
        assert answer.pocketlm["escalated"] is False
        assert answer.choices[0].logprobs is None
        streamed = list(ask(server, stream=True))
        assert "".join(c.choices[0].delta.content or "" for c in streamed) == local
        probabilities = ask(server, logprobs=True).choices[0].logprobs.content
        assert confidence(
            {"choices": [{"logprobs": {"content": [t.model_dump() for t in probabilities]}}]}, "mean"
        ) == (pytest.approx(answer.pocketlm["confidence"], rel=1e-3))


def test_requests_with_tools_are_judged_too(folder, small, larger):
    """The engine gives their probabilities only where it does not stream."""
    lamp = {"type": "function", "function": {"name": "lamp", "parameters": {"type": "object", "properties": {}}}}
    for threshold, who in ((0.0, "small"), (1.01, "large")):
        with escalating(small, f"{larger.address}/v1", threshold, folder=folder) as server:
            answer = ask(server, tools=[lamp])
            assert answer.pocketlm["answered_by"] == who
            assert 0 < answer.pocketlm["confidence"] < 1
            assert answer.usage.completion_tokens == 12
            assert list(ask(server, tools=[lamp], stream=True))


@pytest.fixture
def silent():
    """An endpoint that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept = []

        def accept():
            while True:
                try:
                    kept.append(listener.accept())
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


def test_a_larger_model_that_is_silent_or_gone_means_the_local_answer_with_a_mark(folder, small, silent):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nobody = f"http://127.0.0.1:{gone.getsockname()[1]}/v1"
    for url in (silent, nobody):
        with escalating(small, url, 1.01, "--escalate-timeout", 0.5, folder=folder) as server:
            for stream in (False, True):
                answer = ask(server, stream=stream)
                mark = list(answer)[-1].pocketlm if stream else answer.pocketlm
                assert mark["answered_by"] == "small"
                assert mark["escalation_failed"]
            assert server.metric("escalations_total") == 2


def test_a_larger_model_that_refuses_is_not_passed_on(folder, small, larger):
    with escalating(small, f"{larger.address}/v2", 1.01, folder=folder) as server:
        mark = ask(server).pocketlm
        assert mark["answered_by"] == "small"
        assert "404" in mark["escalation_failed"]


NONSENSE = [
    b"<html>",
    b"\xff",
    b"3",
    b"[" * 100_000,
    *(
        json.dumps(answer).encode()
        for answer in (
            {},
            {"choices": []},
            {"choices": [3]},
            {"choices": YES["choices"] * 2},
            {"choices": [{"message": "yes"}]},
            {"choices": [{"message": {"content": None}}]},
            {"choices": [{"message": {"content": None, "tool_calls": [3]}}]},
            {"choices": [{"message": {"content": None, "tool_calls": [{"function": 3}]}}]},
            YES | {"usage": 3},
            YES | {"usage": {"completion_tokens": "3"}},
            YES | {"usage": {"prompt_tokens": -3}},
        )
    ),
]


def test_a_larger_model_that_answers_nonsense_is_not_passed_on(folder, small):
    with (
        endpoint(lambda: (200, nonsense)) as (url, asked),
        escalating(small, url, 1.01, "--compare", small, folder=folder) as server,
    ):
        local = text(ask(server, model="small-compared"))
        for nonsense in NONSENSE:
            answer, chunks = ask(server), list(ask(server, stream=True))
            assert text(answer) == "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == local, nonsense
            for mark in (answer.pocketlm, chunks[-1].pocketlm):
                assert mark["answered_by"] == "small"
                assert mark["escalation_failed"] == "The larger model's answer is no chat completion"
        assert len(asked) == 2 * len(NONSENSE)


def test_an_answer_cut_off_inside_a_character_is_streamed_all_the_same(folder, small):
    """JSON can write one as two escapes, of which a larger model's limit may leave the first."""
    half = b'{"choices": [{"message": {"content": "so \\ud83d"}}]}'
    with endpoint(lambda: (200, half)) as (url, _), escalating(small, url, 1.01, folder=folder) as server:
        chunks = list(ask(server, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "so ?"
    assert chunks[-1].pocketlm["answered_by"] == "large"


def test_no_request_fails_when_the_larger_model_is_killed_on_the_way(folder, small, large):
    with (
        serving(large, cache=folder, POCKETLM_API_KEY="secret") as theirs,
        escalating(small, f"{theirs.address}/v1", 1.01, folder=folder) as server,
        ThreadPoolExecutor(6) as pool,
    ):
        before = [pool.submit(ask, server, max_tokens=100) for _ in range(24)]
        for answer in before[:6]:
            answer.result()
        theirs.process.kill()
        after = [pool.submit(ask, server, max_tokens=100) for _ in range(12)]
        early, late = ({answer.result().pocketlm["answered_by"] for answer in part} for part in (before[:6], after))
        assert all(answer.result() for answer in before)
    assert early == {"large"}
    assert late == {"small"}


def test_the_original_it_is_compared_with_is_never_replaced(folder, small, large, larger):
    with escalating(small, f"{larger.address}/v1", 1.01, "--compare", large, folder=folder) as server:
        raw = server.post("/v1/chat/completions", json={"model": "large", "messages": HELLO, "max_tokens": 2})
        assert "pocketlm" not in raw.json()
        assert server.metric("escalations_total") == 0


@pytest.mark.parametrize(("measure", "sure"), [("mean", 0.6), ("min", 0.4)])
def test_an_answer_is_as_sure_as_its_tokens_on_average_or_as_the_least_of_them(measure, sure):
    def of(*probabilities):
        tokens = [{"logprob": math.log(probability)} for probability in probabilities]
        return confidence({"choices": [{"logprobs": {"content": tokens}}]}, measure)

    assert of(0.9, 0.4) == of(0.4, 0.9) == pytest.approx(sure)
    assert of(1, 1) == 1
    assert of() == confidence({"choices": [{"logprobs": None}]}, measure) == confidence({"choices": [{}]}, measure) == 0


def test_served_with_the_least_probability_an_answer_is_judged_by_it(folder, small, larger):
    with escalating(small, f"{larger.address}/v1", 0.0, "--confidence", "min", folder=folder) as server:
        answer = ask(server, logprobs=True)
    logs = [token.logprob for token in answer.choices[0].logprobs.content]
    assert answer.pocketlm["confidence"] == pytest.approx(math.exp(min(logs)))
    assert min(logs) < sum(logs) / len(logs) - 0.01


# Calibration

judgements = st.lists(
    st.builds(
        lambda mean, least, right, theirs: Judged({"mean": mean, "min": least}, right, theirs),
        st.floats(0, 1),
        st.floats(0, 1),
        st.booleans(),
        st.none(),
    ),
    min_size=2,
    max_size=40,
)


@given(judgements, st.floats(0, 1))
def test_the_chosen_threshold_reaches_the_target_and_none_escalates_less(judged, target):
    found = choose(judged, target)

    def mix(threshold):
        kept = [one.right for one in judged if one.confidence[found.measure] >= threshold]
        return (sum(kept) + len(judged) - len(kept)) / len(judged), 1 - len(kept) / len(judged)

    accuracy, escalated = mix(found.chosen.threshold)  # the larger model is always right: one is always found
    assert accuracy == pytest.approx(found.chosen.accuracy)
    assert accuracy >= target
    for one in judged:
        other_accuracy, other_escalated = mix(one.confidence[found.measure])
        assert other_accuracy < target or other_escalated >= escalated - 1e-9
    assert [point.escalated for point in found.curve] == sorted(point.escalated for point in found.curve)
    assert (found.curve[0].escalated, found.curve[-1].escalated) == (0, 1)
    low, high = found.chosen.accuracy_interval
    assert low <= accuracy + 1e-9
    assert high >= accuracy - 1e-9


def test_a_target_that_the_larger_model_misses_is_not_reached():
    judged = [Judged({"mean": 0.5, "min": 0.5}, right=False, larger_right=i > 5) for i in range(20)]
    found = choose(judged, 0.95)
    assert found.chosen is None
    assert found.larger_accuracy == 0.7


@given(st.floats(0.1, 1), st.integers(1, 4))
def test_the_printed_threshold_is_the_chosen_one_and_no_longer_than_it_must_be(low, steps):
    high = low
    for _ in range(steps):
        high = math.nextafter(high, 2)
    judged = [Judged({"mean": level, "min": level}, level == high, None) for level in (low, high)]
    found = choose(judged, 1)
    (printed,) = re.findall(r"^  --threshold (\S+)", "\n".join(lines(found)), re.MULTILINE)
    assert low < float(printed) <= high
    apart = [Judged({"mean": level, "min": level}, level > 0.98, None) for level in (0.97123456, 0.98765432)]
    assert choose(apart, 1).chosen.threshold == 0.98


def test_the_measure_that_ranks_better_is_chosen():
    judged = [Judged({"mean": 0.5, "min": i / 20}, right=i >= 10, larger_right=None) for i in range(20)]
    found = choose(judged, 0.95)
    assert found.measure == "min"
    assert found.ranking == {"mean": 0.5, "min": 1.0}
    assert found.chosen.escalated == 0.45  # one mistake of twenty may stay


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [
        ("Paris.", "paris", True),
        (" Card  arrival\n", "card arrival", True),
        ('{"on": true, "room": "bath"}', '{"room":"bath","on":true}', True),
        ('{"on": false}', '{"on": true}', False),
        ("**New  York**", "new york", True),
        ("(b)", "B", True),
        ("0.5", ".5", True),
        ('{"on": true', '{"on": true}', False),
        ("", "[]", False),
        ("Lyon", "Paris", False),
        ('{"on": 1}', '{"on": true}', False),
        ('{"on": [1.0, null]}', '{"on": [1, null]}', True),
    ],
)
def test_what_counts_as_right(said, answer, right):
    assert is_right(said, ["something else", answer]) is right


@pytest.mark.parametrize(
    "line", ["", "{}", "[]", '{"prompt": "x"}', '{"prompt": 3, "answer": "x"}', '{"prompt": "x", "answer": [3]}', "{"]
)
def test_lines_that_are_no_examples_are_named(tmp_path, line):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "x", "answer": "y"}\n' + line)
    with pytest.raises(BadInputError, match="line 2: (no example|not JSON)" if line else "has 1 examples"):
        read_examples(path)


def test_objects_are_right_answers_too(tmp_path):
    path, lamp = tmp_path / "data.jsonl", {"on": True, "room": "bath"}
    path.write_text("\n".join(json.dumps({"prompt": "lamp on", "answer": answer}) for answer in (lamp, [lamp, "no"])))
    for example in read_examples(path):
        assert is_right('{"room": "bath", "on": true}', example.answers)
        assert not is_right('{"room": "bath", "on": false}', example.answers)
        assert not is_right("room", example.answers)


def test_calibrate_finds_the_answers_that_the_small_model_gets_right(folder, small, large, larger, tmp_path):
    """Right is what the larger model says; the small one is told it now and then by a schema that leaves no choice."""
    examples, words = [], ["yes", "no", "perhaps", "never"]
    for i in range(24):
        form = {"type": "json_schema", "json_schema": {"schema": {"const": words[i % 4]}}}
        free = i % 3 == 0
        example = {"prompt": f"Question {i}?", "answer": "impossible" if free else json.dumps(words[i % 4])}
        examples.append(example | ({} if free else {"response_format": form}))
    data, out = tmp_path / "data.jsonl", tmp_path / "calibration.json"
    data.write_text("\n".join(map(json.dumps, examples)))
    done = pocketlm(
        "calibrate", small, data, "--target-accuracy", 0.9, "-o", out, "--threads", 1, "--context", 512, cache=folder
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["examples"] == 24
    assert found["local_accuracy"] == pytest.approx(2 / 3, abs=0.01)
    assert found["chosen"]["accuracy"] >= 0.9
    assert f"--threshold {found['chosen']['threshold']} --confidence {found['measure']}" in done.stdout
    refused = pocketlm("calibrate", small, tmp_path / "none.jsonl", "-o", out, cache=folder)
    assert refused.returncode == 2
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps(examples[0]) + "\n\n" + json.dumps(examples[1] | {"prompt": "word " * 2000}) + "\n")
    refused = pocketlm(
        "calibrate", small, long, "-o", tmp_path / "no.json", "--threads", 1, "--context", 512, cache=folder
    )
    assert (refused.returncode, "line 3: " in refused.stderr) == (2, True)
    before = data.read_text()
    refused = pocketlm("calibrate", small, data, "-o", data, cache=folder)
    assert "no calibration" in refused.stderr
    assert data.read_text() == before


@pytest.fixture
def failing():
    """An endpoint that says yes until it has been asked as often as `limit` has it, and fails from then on."""
    limit = [5]
    with endpoint(lambda: (200 if len(asked) <= limit[0] else 500, SAYS_YES)) as (url, asked):
        yield url, asked, limit


def questions(data, last="yes"):
    answers = ["yes"] * 11 + [last]
    lines = [json.dumps({"prompt": f"Question {i}?", "answer": answer}) for i, answer in enumerate(answers)]
    data.write_text("\n".join(lines))
    return data


def asking(small, data, url, model="large", *, folder):
    larger = ("--escalate-to", url, "--escalate-model", model, "-o", data.with_name("calibration.json"))
    return pocketlm("calibrate", small, data, *larger, "--threads", 1, "--context", 512, "--slots", 1, cache=folder)


def test_what_was_answered_before_a_failure_is_not_asked_again(folder, small, tmp_path, failing):
    url, asked, limit = failing
    data = questions(tmp_path / "data.jsonl")
    failed = asking(small, data, url, folder=folder)
    assert failed.returncode == 2
    assert "The larger model did not answer" in failed.stderr
    first, limit[0] = prompts(asked)[:5], 100
    asked.clear()
    done = asking(small, data, url, folder=folder)
    assert done.returncode == 0, done.stderr
    assert len(asked) == 7
    assert not set(first) & set(prompts(asked))
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert (found["examples"], found["larger_accuracy"]) == (12, 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"data.jsonl", "calibration.json"}


def prompts(asked):
    return [body["messages"][0]["content"] for body in asked]


def test_what_was_answered_to_other_questions_or_by_another_model_is_asked_again(folder, small, tmp_path, failing):
    url, asked, limit = failing
    data = questions(tmp_path / "data.jsonl")
    assert asking(small, data, url, folder=folder).returncode == 2
    first = prompts(asked)[:5]
    asked.clear()
    assert asking(small, questions(data, last="no"), url, folder=folder).returncode == 2
    assert prompts(asked)[:5] == first
    asked.clear()
    limit[0] = 100
    done = asking(small, data, url, "larger", folder=folder)
    assert done.returncode == 0, done.stderr
    assert len(set(prompts(asked))) == len(asked) == 12
    assert {body["model"] for body in asked} == {"larger"}
    assert json.loads((tmp_path / "calibration.json").read_text())["larger_accuracy"] == pytest.approx(11 / 12)


def test_a_model_that_does_not_chat_is_not_calibrated_and_loses_no_answers_of_another(folder, tmp_path):
    data, out, kept = (tmp_path / name for name in ("data.jsonl", "calibration.json", ".calibration.json.answers"))
    data.write_text(2 * '{"prompt": "x", "answer": "y"}\n')
    kept.write_text('{"model": "another"}\n')
    refused = pocketlm("calibrate", plain_file(folder), data, "-o", out, "--threads", 1, cache=folder)
    assert refused.returncode == 2
    assert "plain.gguf has no chat template" in refused.stderr
    assert kept.read_text() == '{"model": "another"}\n'
    assert set(tmp_path.iterdir()) == {data, kept}


def test_where_the_calibration_cannot_be_written_no_question_is_asked(folder, small, tmp_path):
    for out in (tmp_path, tmp_path / "missing" / "calibration.json"):
        refused = pocketlm("calibrate", small, tmp_path / "none.jsonl", "-o", out, cache=folder)
        assert refused.returncode == 2
        assert f"Cannot write {out}" in refused.stderr
