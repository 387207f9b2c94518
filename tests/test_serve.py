"""The server as OpenAI's client, a careless client and an operator find it."""

import asyncio
import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.resources import files
from pathlib import Path
from subprocess import PIPE
from urllib.parse import urlsplit

import aiohttp
import httpx
import openai
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.command_line import command, environment, pocketlm
from tests.serving import CONTEXT, ENDLESS, plain_file, serving, tiny_file
from tests.tiny import tiny_folder

from pocketlm.errors import PocketlmError
from pocketlm.export.gguf import write_gguf
from pocketlm.model.source import load
from pocketlm.run.server import app, tuning
from pocketlm.run.server.admission import admit
from pocketlm.run.server.engine_process import EngineSettings
from pocketlm.run.server.local import LocalModel
from pocketlm.run.server.refusals import RefusalError
from pocketlm.run.server.requests import Chat, Completion, Embedding, parse
from pocketlm.run.server.serve import Serve, _engines, model_name
from pocketlm.run.server.tuning import drafted, tuned

HELLO = [{"role": "user", "content": "Hello there"}]
LAMP = {
    "type": "function",
    "function": {
        "name": "switch_lamp",
        "description": "Switch a lamp on or off",
        "parameters": {
            "type": "object",
            "properties": {"room": {"enum": ["kitchen", "bath"]}, "on": {"type": "boolean"}},
            "required": ["room", "on"],
        },
    },
}
DOOR = {"type": "function", "function": {"name": "open_door", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def model(folder):
    return tiny_file(folder, "small")


@pytest.fixture(scope="module")
def other_model(folder):
    return tiny_file(folder, "large", seed=1)


@pytest.fixture(scope="module")
def server(folder, model, other_model):
    with serving(model, "--compare", other_model, "--context", CONTEXT, cache=folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return server.client()


def ask(client, **options):
    asked = {"model": "small", "messages": HELLO, "max_tokens": 12, "temperature": 0, "logit_bias": ENDLESS} | options
    return client.chat.completions.create(**asked)


def forever(client, **options):
    """Ask for an answer that takes the tiny model seconds, and return its stream once it has begun."""
    stream = ask(client, stream=True, max_tokens=CONTEXT, **options)
    next(stream)
    return stream


def wait_until(holds, seconds=180):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


@contextmanager
def paused(server):
    """Keep the engine from going on, so that what is being answered stays so, however slow this machine is."""
    (engine,) = children(server.process)
    os.kill(engine, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(engine, signal.SIGCONT)


looks_into_proc = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")


def test_the_models_are_listed_and_chosen_by_name(client, other_model):
    assert [model.id for model in client.models.list()] == ["small", "large"]
    large = client.models.retrieve("large")
    assert large.id == "large"
    assert large.meta == {"size": other_model.stat().st_size}  # llama.cpp's name for it, which the page reads
    answers = {name: ask(client, model=name) for name in ("small", "large", "")}
    assert answers["small"].model == "small"
    assert answers["large"].model == "large"
    texts = {name: answer.choices[0].message.content for name, answer in answers.items()}
    assert texts[""] == texts["small"] != texts["large"]
    with pytest.raises(openai.NotFoundError, match="not served here") as caught:
        ask(client, model="gpt-4o")
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_a_stream_carries_the_answer_its_end_and_its_usage(client):
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "length"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "length"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 12
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens > 10
    assert chunks[0].object == "chat.completion.chunk"
    assert whole.object == "chat.completion"


def test_a_stop_word_ends_the_answer_before_it(client):
    whole = ask(client).choices[0].message.content
    stop = whole[len(whole) // 2 :][:2]
    stopped = ask(client, stop=[stop]).choices[0]
    assert stopped.message.content == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"


def test_a_seed_repeats_a_draw(client):
    seeds = (7, 8, -1, 2**32 - 1, 2**63 - 1)
    first, again = (
        [ask(client, temperature=1.5, seed=seed).choices[0].message.content for seed in seeds] for _ in range(2)
    )
    assert first == again
    assert len(set(first)) == len(seeds)
    assert ask(client, temperature=2, top_p=0).choices[0].message.content == ask(client).choices[0].message.content


def test_logprobs_are_those_of_the_tokens(client):
    choice = ask(client, logprobs=True, top_logprobs=3).choices[0]
    tokens = choice.logprobs.content
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 3
        assert token.logprob <= max(top.logprob for top in token.top_logprobs)
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.001
    assert ask(client).choices[0].logprobs is None


@pytest.mark.parametrize("options", [{}, {"top_logprobs": 0}])
def test_tokens_have_no_alternatives_that_nobody_asked_for(client, options):
    choice = ask(client, logprobs=True, **options).choices[0]
    pieces = [chunk.choices[0] for chunk in ask(client, logprobs=True, stream=True, **options)]
    streamed = [token for piece in pieces if piece.logprobs for token in piece.logprobs.content]
    for tokens in (choice.logprobs.content, streamed):
        assert "".join(token.token for token in tokens) == choice.message.content
        assert all(token.logprob < 0 and token.top_logprobs == [] for token in tokens)
    assert pieces[-1].finish_reason == "length"
    asked = parse(Chat, json.dumps(VALID | {"logprobs": True} | options).encode())
    assert asked.for_engine()["top_logprobs"] == 1  # 20 for nothing cost time
    judged = parse(Chat, json.dumps(VALID | {"logprobs": False}).encode()).for_engine(judged=True)
    assert (judged["logprobs"], judged["top_logprobs"]) == (True, 1)
    assert judged["temperature"] == 0, "the threshold was calibrated on the likeliest tokens"
    warm = parse(Chat, json.dumps(VALID | {"temperature": 0.7}).encode()).for_engine(judged=True)
    assert warm["temperature"] == 0.7
    assert "temperature" not in parse(Chat, json.dumps(VALID).encode()).for_engine()


def test_texts_have_probabilities_without_alternatives_too(client):
    options = {"model": "small", "prompt": "def main", "temperature": 0, "logit_bias": ENDLESS, "logprobs": 0}
    whole = client.completions.create(**options).choices[0]
    streamed = [chunk.choices[0].logprobs for chunk in client.completions.create(**options, stream=True)]
    assert "".join(whole.logprobs.tokens) == whole.text
    assert [token for part in streamed if part for token in part.tokens] == whole.logprobs.tokens
    assert all(value < 0 for value in whole.logprobs.token_logprobs)
    assert whole.logprobs.top_logprobs == [{}] * len(whole.logprobs.tokens)


def test_a_schema_is_kept_even_by_a_random_model(client):
    schema = LAMP["function"]["parameters"] | {"additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "lamp", "schema": schema, "strict": True}}
    for seed in range(5):
        answer = ask(client, response_format=form, temperature=1, seed=seed, max_tokens=200, logit_bias={}).choices[0]
        if answer.finish_reason == "stop":  # a random model may fill the rest with blanks
            said = json.loads(answer.message.content)
            assert said["room"] in ("kitchen", "bath")
            assert isinstance(said["on"], bool)
            break
    else:
        pytest.fail("no answer ended")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "switch_lamp"}}])
def test_a_tool_is_called_though_the_template_knows_none(client, stream, choice):
    tools = [LAMP] if choice == "required" else [DOOR, LAMP]
    for seed in range(8):
        options = {
            "tools": tools,
            "tool_choice": choice,
            "max_tokens": 300,
            "temperature": 1,
            "seed": seed,
            "logit_bias": {},
        }
        if stream:
            name, arguments, reason = "", "", None
            for chunk in ask(client, stream=True, **options):
                for call in chunk.choices[0].delta.tool_calls or ():
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
                reason = chunk.choices[0].finish_reason
        else:
            answer = ask(client, **options).choices[0]
            reason = answer.finish_reason
            if reason == "tool_calls":
                (call,) = answer.message.tool_calls
                name, arguments = call.function.name, call.function.arguments
        if reason == "tool_calls":
            assert name == "switch_lamp"
            assert set(json.loads(arguments)) == {"room", "on"}
            return
    pytest.fail("no call ended")


def test_a_conversation_with_a_tool_goes_on(client):
    call = {"id": "1", "type": "function", "function": {"name": "switch_lamp", "arguments": '{"on": true}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "done", "tool_call_id": "1"},
    ]
    plain = ask(client, messages=messages)
    told = ask(client, messages=messages, tools=[LAMP])
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens + 50
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": " there"}]}]
    assert ask(client, messages=parts).choices[0].message == ask(client).choices[0].message


def test_texts_are_continued_with_the_old_api(client):
    options = {"model": "small", "prompt": "def main", "temperature": 0, "logit_bias": ENDLESS}
    whole = client.completions.create(**options, logprobs=2)
    assert whole.usage.completion_tokens == 16  # OpenAI's default here
    logprobs = whole.choices[0].logprobs
    assert "".join(logprobs.tokens) == whole.choices[0].text
    # Tokens that end inside a character come with the next one.
    assert 8 < len(logprobs.top_logprobs) == len(logprobs.token_logprobs) == len(logprobs.text_offset) <= 16
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        assert whole.choices[0].text[offset:].startswith(token)
    chunks = list(client.completions.create(**options, stream=True, logprobs=2))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    parts = [chunk.choices[0].logprobs.tokens for chunk in chunks if chunk.choices[0].logprobs]
    assert [token for part in parts for token in part] == logprobs.tokens


def test_embeddings_are_of_one_length_and_in_order(client):
    def embed(texts, **options):
        made = client.embeddings.create(model="small", input=texts, **options)
        assert [one.index for one in made.data] == list(range(len(made.data)))
        return [one.embedding for one in made.data], made.usage

    both, usage = embed(["print", "while True"])
    (alone,), _ = embed("while True", encoding_format="float")
    assert usage.prompt_tokens > 2
    assert both[1] == pytest.approx(alone, abs=1e-3)
    assert both[0] != pytest.approx(alone, abs=1e-3)
    assert sum(x * x for x in alone) == pytest.approx(1, abs=1e-3)


def test_what_does_not_fit_the_context_is_refused_by_its_name(client):
    words = "word " * CONTEXT
    with pytest.raises(openai.BadRequestError, match=f"maximum context length is {CONTEXT} tokens") as chat:
        ask(client, messages=[{"role": "user", "content": words}])
    with pytest.raises(openai.BadRequestError) as stream:
        ask(client, messages=[{"role": "user", "content": words}], stream=True)
    with pytest.raises(openai.BadRequestError) as text:
        client.completions.create(model="small", prompt=words)
    with pytest.raises(openai.BadRequestError, match="at most 512 tokens here") as embedding:
        client.embeddings.create(model="small", input=words)
    assert {caught.value.code for caught in (chat, stream, text, embedding)} == {"context_length_exceeded"}
    assert [caught.value.param for caught in (chat, text, embedding)] == ["messages", "prompt", "input"]


def test_a_model_without_a_chat_template_goes_on_with_texts_and_does_not_chat(folder):
    with serving(plain_file(folder), cache=folder) as server:
        chat = server.post("/v1/chat/completions", json={"messages": HELLO, "max_tokens": 2})
        refused(chat)
        assert "`plain` has no chat template" in chat.json()["error"]["message"]
        text = server.client().completions.create(model="plain", prompt="def main", max_tokens=2)
        assert text.usage.completion_tokens > 0


# Malformed requests

VALID = {"messages": HELLO, "max_tokens": 2}
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
WRONG = [
    b"",
    b"null",
    b"{",
    b"[]",
    b'"\xff\xfe"',
    b'{"messages": [{"role": "user", "content": "\xc3\x28"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b"[" * 100_000,
    b'{"messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    *(
        json.dumps(VALID | change).encode()
        for change in (
            {"messages": []},
            {"messages": {}},
            {"messages": [{}]},
            {"messages": [{"role": "user"}]},
            {"messages": [{"role": "robot", "content": "x"}]},
            {"messages": [{"role": 5, "content": "x"}]},
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            {"messages": [{"role": "user", "content": None}]},
            {"max_tokens": 0},
            {"max_tokens": -1},
            {"max_tokens": "many"},
            {"max_tokens": 1e99},
            {"temperature": float("nan")},
            {"temperature": -0.1},
            {"temperature": "0.5"},
            {"top_p": 1.5},
            {"stop": ""},
            {"stop": ["x"] * 17},
            {"stop": {"a": 1}},
            {"n": 2},
            {"seed": 2**70},
            {"logit_bias": {"word": 1}},
            {"logit_bias": {"1": 1000}},
            {"top_logprobs": 2},
            {"logprobs": True, "top_logprobs": 21},
            {"stream": "yes"},
            {"stream_options": 3},
            {"tools": [{"type": "function", "function": {"name": "two words"}}]},
            {"tools": [LAMP], "tool_choice": {"type": "function", "function": {"name": "other"}}},
            {"tool_choice": "required"},
            {"tools": [LAMP | {"type": "web_search"}]},
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "frob"}}}]},
            {"response_format": {"type": "xml"}},
            {"response_format": {"type": "json_schema"}},
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "frob"}}}},
            {"model": 3},
            {"frobnicate": True},
        )
    ),
]


def refused(response):
    """Whether a response is a 4xx in OpenAI's shape."""
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    assert isinstance(error["type"], str)


@pytest.mark.parametrize("body", WRONG, ids=[body[:60].decode("ascii", "replace") for body in WRONG])
def test_malformed_requests_are_refused_in_openais_shape(server, body):
    refused(server.post("/v1/chat/completions", content=body))


PART = {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"messages": [{"role": "user", "content": [PART]}]}, "messages.0.content.0.type", "Input should be 'text'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "valid string"),
        (
            {"messages": [*HELLO, {"role": "user", "content": "x", "audio": {"id": "1"}}]},
            "messages.1.audio",
            "argument",
        ),
        ({"stop": ["x"] * 17}, "stop", "at most 16 items"),
        ({"stop": ["x", 5]}, "stop.1", "valid string"),
        ({"logit_bias": {"word": 1}}, "logit_bias.word", "match pattern"),
        ({"tool_choice": "frob"}, "tool_choice", "'none', 'auto' or 'required'"),
        ({"tool_choice": {"type": "function", "function": {"name": 5}}}, "tool_choice.function.name", "valid string"),
        ({"modalities": ["text", "audio"]}, "modalities.1", "Input should be 'text'"),
        ({"frobnicate": 0}, "frobnicate", "argument"),
    ],
)
def test_a_refusal_names_the_field_and_what_was_meant_there(change, param, said):
    with pytest.raises(RefusalError) as caught:
        parse(Chat, json.dumps(VALID | change).encode())
    assert caught.value.param == param
    assert said in caught.value.message


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (Chat, {"messages": [{}] * 999}),
        (Chat, VALID | {"tools": [0] * 999}),
        (Completion, {"prompt": [-1] * 999}),
        (Embedding, {"input": [{}] * 999}),
    ],
)
def test_of_a_thousand_wrong_items_one_is_worded(kind, body):
    with pytest.raises(ValidationError) as caught:
        kind.model_validate_json(json.dumps(body))
    assert caught.value.error_count() <= 4, "one for each kind that the list might be of"


def test_what_openais_client_has_read_may_be_sent_back(client):
    first = ask(client)
    said = first.choices[0].message.model_dump()
    assert said.keys() >= {"refusal", "annotations", "audio", "function_call"}
    messages = [*HELLO, said, *HELLO]
    empty = {"reasoning_effort": None, "functions": None, "prediction": None, "modalities": ["text"]}
    answer = ask(client, messages=messages, extra_body=empty)
    assert answer.usage.prompt_tokens > first.usage.prompt_tokens
    again = ask(client, messages=[*HELLO, said | {"annotations": []}, *HELLO])
    assert again.choices[0].message == answer.choices[0].message
    schema = {"type": "json_schema", "json_schema": {"name": "any", "schema": {}}}  # empty, and known
    assert parse(Chat, json.dumps(VALID | {"response_format": schema}).encode()).response_format.json_schema


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    route=st.sampled_from(["chat/completions", "completions", "embeddings"]),
    field=st.sampled_from(["messages", "prompt", "input", "stop", "tools", "response_format", "logit_bias", "user2"]),
    value=ANYTHING,
)
def test_whatever_is_sent_the_server_answers_or_refuses_and_stays_up(server, route, field, value):
    body = json.dumps({"max_tokens": 2} | ({"messages": HELLO} if "chat" in route else {}) | {field: value})
    response = server.post(f"/v1/{route}", content=body.encode("utf-8", "surrogatepass"))
    if response.status_code != 200:
        refused(response)
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Encoding": "gzip"}, 400),
        ({"Host": "[::1"}, 403),
        ({"Origin": "http://[::1"}, 403),
        ({"Authorization": "Bearer \xff\xfe".encode("latin-1")}, 200),
    ],
)
def test_malformed_headers_are_refused_too(server, headers, status):
    response = server.post("/v1/chat/completions", content=json.dumps(VALID), headers=headers)
    assert response.status_code == status
    if status != 200:
        refused(response)
    assert server.get("/health").status_code == 200


def test_routes_methods_and_sizes(server):
    refused(server.get("/v1/nothing"))
    refused(server.get("/v1/models/nothing"))
    assert server.get("/v1/chat/completions").status_code == 405
    large = server.post("/v1/completions", content=b'{"prompt": "' + b"x" * 5_000_000 + b'"}')
    assert large.status_code == 413
    refused(large)


# Who may ask


def test_other_sites_may_not_use_the_server(server):
    body = json.dumps(VALID)
    for headers in ({"Origin": "http://evil.example"}, {"Host": "evil.example"}, {"Origin": "null"}):
        response = server.post("/v1/chat/completions", content=body, headers=headers)
        assert response.status_code == 403
        refused(response)
    own = server.post("/v1/chat/completions", content=body, headers={"Origin": server.address})
    assert own.status_code == 200


def test_the_page_can_reach_nothing_but_the_server(server):
    page = files("pocketlm.run") / "page" / "index.html"
    response = server.get("/")
    assert response.status_code == 200
    assert response.text == page.read_text(encoding="utf-8")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "connect-src 'self'" in policy
    assert "http" not in policy


def test_a_key_is_asked_for(folder, model):
    with serving(model, cache=folder, POCKETLM_API_KEY="open sesame") as server:
        assert server.get("/health").status_code == 200
        assert server.get("/metrics").status_code == 401
        with pytest.raises(openai.AuthenticationError, match="Incorrect API key"):
            ask(server.client("guess"))
        refused(server.get("/v1/models"))
        refused(server.get("/v1/models", headers={"Authorization": "Bearer \xff".encode("latin-1")}))
        assert ask(server.client("open sesame")).usage.completion_tokens == 12


def admitted(method="POST", path="/v1/completions", key=None, local_only=False, draining=False, **headers):
    """Return 200, or the status with which a request is refused."""
    try:
        admit(make_mocked_request(method, path, headers), key, local_only, draining)
    except RefusalError as error:
        return error.status
    return 200


def test_whoever_listens_to_a_network_is_known_by_any_name_there_and_to_its_own_pages_alone():
    assert admitted(Host="192.168.0.5:8080") == admitted(Host="box.lan") == 200
    assert admitted(Host="192.168.0.5:8080", local_only=True) == admitted(Host="box.lan", local_only=True) == 403
    local = ("localhost:8080", "LOCALHOST", "127.0.0.1:1", "[::1]:8080")
    assert [admitted(Host=host, local_only=True) for host in local] == [200] * 4
    assert admitted(Host="box.lan:80", Origin="http://box.lan:80") == 200
    others = ("http://evil.example", "http://box.lan:81", "http://box.lan", "null")
    assert [admitted(Host="box.lan:80", Origin=origin) for origin in others] == [403] * 4


def test_a_key_is_asked_of_all_but_the_page_and_the_health():
    key = {"key": "secret", "Host": "box.lan"}
    assert admitted(**key) == admitted(**key, Authorization="Bearer guess") == 401
    assert admitted("GET", "/metrics", **key) == admitted("GET", "/v1/models", **key) == 401
    assert admitted(**key, Authorization="Bearer secret") == 200
    assert admitted("GET", "/", **key) == admitted("GET", "/health", **key) == 200
    assert admitted(Host="box.lan", Authorization="Bearer guess") == 200


def test_a_server_that_ends_takes_no_new_work_and_still_says_how_it_is():
    assert admitted(Host="box.lan", draining=True) == 503
    assert admitted("GET", "/health", Host="box.lan", draining=True) == 200
    assert admitted(Host="box.lan", draining=True, key="secret") == 401


# Load and trouble


def test_many_clients_get_their_own_answers(server):
    """Each is told by a grammar what to say, so that a lost, wrong or mixed answer shows."""

    def echo(number):
        form = {"type": "json_schema", "json_schema": {"schema": {"const": f"client {number}"}}}
        client, stream = server.client(), number % 2 == 0
        answer = ask(client, response_format=form, max_tokens=100, stream=stream, temperature=1, logit_bias={})
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        assert [json.loads(said) for said in pool.map(echo, range(48))] == [f"client {i}" for i in range(48)]


@looks_into_proc
def test_the_queue_is_bounded_and_a_client_that_leaves_makes_room(folder, model):
    with (
        serving(model, "--slots", 1, "--queue", 1, "--context", CONTEXT, cache=folder) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        client = server.client()
        first = forever(client)
        with paused(server):
            second = pool.submit(ask, client)
            wait_until(lambda: server.metric("waiting") == 1)
            with pytest.raises(
                openai.RateLimitError, match="busy: 1 answers are being written and 1 requests wait"
            ) as full:
                ask(client)
            assert int(full.value.response.headers["Retry-After"]) >= 1
            assert not second.done()
            first.close()
            wait_until(lambda: server.metric("clients_left_total") == 1)
        assert second.result().usage.completion_tokens == 12

        with paused(server):  # not a stream this time
            with asked_by_hand(server, {"messages": HELLO, "max_tokens": CONTEXT, "logit_bias": ENDLESS}):
                wait_until(lambda: server.metric("running") == 1)
            wait_until(lambda: server.metric("clients_left_total") == 2)
        assert ask(client).usage.completion_tokens == 12
        assert server.metric("running") == server.metric("waiting") == 0


@contextmanager
def asked_by_hand(server, body):
    """Send a chat request, and leave without reading the answer."""
    where, content = urlsplit(server.address), json.dumps(body).encode()
    with socket.create_connection((where.hostname, where.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        yield


@looks_into_proc
def test_told_to_end_the_server_finishes_what_it_accepted(folder, model):
    with serving(model, "--slots", 2, cache=folder) as server, ThreadPoolExecutor(8) as pool:
        client = server.client()
        with paused(server):
            answers = [pool.submit(ask, client, max_tokens=200) for _ in range(8)]
            wait_until(lambda: (server.metric("running"), server.metric("waiting")) == (2, 6))
            server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: ends(server))
        assert [answer.result().usage.completion_tokens for answer in answers] == [200] * 8
        assert server.process.wait(180) == 0
        with pytest.raises(openai.APIConnectionError):
            ask(client)


@looks_into_proc
def test_told_twice_to_end_the_server_does_not_wait(folder, model):
    with serving(model, cache=folder) as server:
        (engine,) = children(server.process)
        os.kill(engine, signal.SIGSTOP)  # the answer would never end
        with asked_by_hand(server, {"messages": HELLO}):
            wait_until(lambda: server.metric("running") == 1)
            server.process.send_signal(signal.SIGINT)
            wait_until(lambda: ends(server))
            with pytest.raises(subprocess.TimeoutExpired):
                server.process.wait(1)
            server.process.send_signal(signal.SIGINT)
            assert server.process.wait(40) == 0  # seconds; the engine takes 5 of them before it is killed


@looks_into_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_end_while_a_model_loads_the_server_does(folder, model, number):
    server = subprocess.Popen(
        command("serve", model, "--port", 0), env=environment(folder), stdout=PIPE, stderr=PIPE, text=True
    )
    engines = []

    def an_engine_is_there():
        programs = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children(server)}
        engines.extend(pid for pid, program in programs.items() if b"engine_process" in program)
        return engines

    try:
        wait_until(an_engine_is_there)
        os.kill(engines[0], signal.SIGSTOP)  # it would never have loaded
        server.send_signal(number)
        assert server.wait(40) == 0  # seconds; the engine takes 5 of them before it is killed
        assert server.communicate() == ("", "")
        wait_until(lambda: not Path(f"/proc/{engines[0]}/exe").exists())
    finally:
        server.kill()
        for engine in engines:
            with suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
        server.communicate()


def ends(server):
    """Whether a server takes no new connection any more, or says that it is ending."""
    try:
        return server.get("/health").json()["status"] == "ending"
    except httpx.TransportError:
        return True


@looks_into_proc
def test_an_engine_that_dies_is_started_again(folder, model, tmp_path):
    file, away = tmp_path / "small.gguf", tmp_path / "away"
    file.write_bytes(model.read_bytes())
    with serving(file, "--context", CONTEXT, cache=folder) as server:
        client = server.client()
        stream = forever(client)
        (engine,) = children(server.process)
        file.rename(away)  # until it is back the engine cannot be, so that nothing here is a race
        os.kill(engine, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="engine is not running"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="engine is not running"):
            ask(client)
        assert server.get("/health").status_code == 503
        away.rename(file)
        wait_until(lambda: server.get("/health").status_code == 200)
        assert ask(client).usage.completion_tokens == 12
        assert server.metric("engine_starts") >= 2
        (engine,) = children(server.process)
        server.process.kill()  # even then the engine does not stay behind
        wait_until(lambda: not Path(f"/proc/{engine}/exe").exists())


@looks_into_proc
def test_whatever_keeps_an_engine_from_starting_it_is_tried_again(model, monkeypatch, capfd):
    """The machine has no memory for a process, then something else speaks in the engine's place and goes on living."""
    start, talk = asyncio.create_subprocess_exec, "import sys; print('hello', flush=True); sys.stdin.read()"
    trouble = iter([OSError(errno.ENOMEM, "Cannot allocate memory"), (sys.executable, "-c", talk)])

    async def troubled(*words, **options):
        match next(trouble, words):
            case OSError() as error:
                raise error
            case other:
                return await start(*other, **options)

    async def until_it_is_up():
        local = LocalModel(EngineSettings(str(model), "small", slots=1, context=256, threads=1), queue=0)
        try:
            await local.start()
            monkeypatch.setattr(asyncio, "create_subprocess_exec", troubled)
            local._process.kill()
            while local.starts < 3 or not local.ready:
                assert not local._watching.done()
                await asyncio.sleep(0.05)
            return await local.answer("/v1/completions", {"prompt": "x", "max_tokens": 2})
        finally:
            await local.stop()

    assert asyncio.run(asyncio.wait_for(until_it_is_up(), 180))["choices"]
    said = capfd.readouterr().err
    assert "the engine does not start: [Errno 12] Cannot allocate memory. It is tried again" in said
    assert "the engine does not start: Expecting value" in said


def test_a_client_that_sends_or_takes_nothing_holds_no_place(model, monkeypatch):
    """Else it would keep a slot, and the end of the server, for as long as it likes."""
    monkeypatch.setattr(app, "_PATIENCE", 0.5)
    endless = json.dumps({"messages": HELLO, "stream": True, "max_tokens": CONTEXT, "logit_bias": ENDLESS}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n"

    async def two_clients(listener):
        local = LocalModel(EngineSettings(str(model), "small", slots=1, context=CONTEXT, threads=1), queue=0)
        service = app.Service([local], None, local_only=True, escalation=None)
        runner = web.AppRunner(app.application(service), handler_cancellation=True)
        try:
            await local.start()
            await runner.setup()
            await web.SockSite(runner, listener).start()
            sends, slow = await asyncio.open_connection(*listener.getsockname())
            slow.write(head % 100 + b"{")
            assert b"408 Request Timeout" in await sends.read()
            with socket.create_connection(listener.getsockname()) as takes:
                takes.sendall(head % len(endless) + endless)
                while not local.line.running:
                    await asyncio.sleep(0.01)
                while local.line.running:
                    await asyncio.sleep(0.05)
                assert service.metrics.left.labels("/v1/chat/completions")._value.get() == 1
                await service.idle.wait()
            slow.close()
        finally:
            await runner.cleanup()
            await local.stop()

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that it is full soon
        listener.bind(("127.0.0.1", 0))
        asyncio.run(asyncio.wait_for(two_clients(listener), 180))


@pytest.mark.parametrize(("words", "variable"), [(("--api-key", ""), "secret"), ((), "")], ids=["option", "variable"])
def test_an_empty_key_is_no_key(words, variable, model, tmp_path, monkeypatch):
    monkeypatch.setenv("POCKETLM_API_KEY", variable)
    done = pocketlm("serve", model, *words, cache=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "The key is empty, so anyone would be let in" in done.stderr


NOTE_CONNECTIONS = """
import sys
def note(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        where = arguments[-1]
    elif event == "socket.getaddrinfo":
        where = arguments[0]
    else:
        return
    with open({log!r}, "a") as log:
        log.write(f"{{event}} {{where}}\\n")
sys.addaudithook(note)
"""


@looks_into_proc
def test_nothing_leaves_the_machine(folder, model, tmp_path):
    """Every process of the server writes down where Python connects to; what the engine does, the kernel tells."""
    log = tmp_path / "connections"
    (tmp_path / "sitecustomize.py").write_text(NOTE_CONNECTIONS.format(log=str(log)))
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    with serving(model, cache=folder, PYTHONPATH=path) as server:
        client = server.client()
        for stream in (False, True):
            answer = ask(client, stream=stream)
            list(answer)
        client.embeddings.create(model="small", input="x")
        everyone = [server.process.pid, *children(server.process)]
        assert len(everyone) == 2
        peers = {peer for pid in everyone for peer in connected_to(pid)}
    lines = log.read_text().splitlines()
    assert any(line.startswith("socket.connect ('127.0.0.1'") for line in lines)  # the log works: the engine
    assert all("127.0.0.1" in line or "localhost" in line for line in lines), lines
    assert peers <= {"127.0.0.1"}


def connected_to(pid):
    """Return the addresses that a process has connections to, as the kernel lists them."""
    inodes = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    for table in ("tcp", "udp", "tcp6", "udp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[2].split(":")
            if fields[9] in inodes and int(port, 16):
                raw = bytes.fromhex(address)
                last = raw[-4:][::-1]
                yield socket.inet_ntoa(last)


def test_half_an_event_of_an_engine_that_died_is_not_passed_on():
    class Client:
        read = b""

        async def write(self, data):
            self.read += data

    async def pieces():
        yield b'data: {"a": 1}\n\ndata: {"cho'
        yield b'ices": 2}\n'
        yield b'\ndata: {"choi'
        raise aiohttp.ClientPayloadError

    client = Client()
    asyncio.run(app._pass_on(pieces(), client))
    first, second, last = client.read.removesuffix(b"\n\n").split(b"\n\n")
    assert (first, second) == (b'data: {"a": 1}', b'data: {"choices": 2}')
    assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "engine_down"


# Before it serves


def test_what_cannot_be_served_is_said_in_a_line(folder, model, tmp_path):
    damaged, other = tmp_path / "damaged.gguf", tmp_path / "other.gguf"
    damaged.write_bytes(model.read_bytes()[:-60_000])
    other.write_bytes(b"PK\3\4" + bytes(100))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, message in (
            ((damaged, "--port", 0), "cannot load"),
            ((other, "--port", 0), "is not a GGUF file"),
            ((tmp_path / "none.gguf", "--port", 0), "No such file"),
            ((model, "--port", port), "Give another --port"),
            ((model, "--port", 0, "--host", "192.0.2.1"), "Give another --host"),  # of no machine: RFC 5737
            ((model, "--port", 0, "--host", "x" * 64), "it is no name of a host. Give another --host"),
            ((model, "--port", 0, "--context", CONTEXT + 1), "Give at most 16,384"),
            ((model, "--escalate-to", "https://x/v1"), "--escalate-model and (to serve) --threshold together"),
        ):
            done = pocketlm("serve", *arguments, cache=folder)
            assert done.returncode == 2, done.stderr
            assert message in done.stderr
            assert done.stderr.count("\n") == 1
            assert done.stdout == ""


def test_a_file_of_a_run_is_named_after_its_folder(tmp_path, monkeypatch):
    (tmp_path / "p70" / "inside").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "p70" / "inside")
    names = [model_name(Path(path)) for path in ("../model.gguf", "model.gguf", "../other.gguf")]
    assert names == ["p70", "inside", "other"]


def test_of_two_files_of_one_name_neither_is_called_the_original(tmp_path):
    names = [settings.name for settings in _engines(Serve(tmp_path / "one.gguf", tmp_path / "b" / "one.gguf"))]
    assert names == ["one", "one-compared"]


def test_a_missing_package_names_the_line_that_installs_it(folder, model):
    program = "import sys; sys.modules['aiohttp'] = None; from pocketlm.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program, *command("serve", model)[3:]],
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 6
    assert "pip install 'pocketlm[serve]'" in done.stderr


@pytest.mark.slow
def test_threads_cache_and_batch_are_chosen_by_measuring(folder, model):
    arguments = command("serve", model, "--port", 0, "--context", 256, "--auto")
    process = subprocess.Popen(arguments, env=environment(folder), stdout=PIPE, stderr=PIPE, text=True)
    try:
        assert "http://" in process.stdout.readline()
    finally:
        process.terminate()
    said = process.communicate(timeout=180)[1]
    assert [line.split()[0] for line in said.splitlines()] == ["threads", "cache", "batch"]
    assert re.search(r"^cache .*: (q8_0|f16)$", said, re.MULTILINE)
    assert re.search(r"^batch .*: (128|512|2048)$", said, re.MULTILINE)


def test_an_engine_that_dies_while_it_is_measured_is_said_in_a_line(model, monkeypatch):
    start = LocalModel.start

    async def start_and_die(local):
        await start(local)
        local._process.kill()

    monkeypatch.setattr(LocalModel, "start", start_and_die)
    settings = EngineSettings(str(model), "small", context=256, threads=1)
    for measuring in (tuned(settings, print), drafted(settings, model, print)):
        with pytest.raises(PocketlmError, match=r"Measuring .*small\.gguf failed: the engine died"):
            asyncio.run(measuring)


WRITTEN = {1: 50, 2: 98, 4: 100, "q8_0": 97.5, "f16": 100}  # tokens/s, by threads and by cache
READ = {None: 0, 512: 97, 2048: 100}


@pytest.fixture
def measured(monkeypatch):
    """Make `tuned` choose on a machine with these speeds, and return what it timed, what it chose and what it said."""

    def choose(speeds=(), threads=None, cores=4):
        timed, said, known = [], [], WRITTEN | READ | dict(speeds)

        async def time(settings):
            timed.append(settings)
            return known[settings.batch], known.get(settings.threads, 0) * known[settings.cache]

        monkeypatch.setattr(tuning, "_speeds", time)
        monkeypatch.setattr(tuning.os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
        return timed, asyncio.run(tuned(EngineSettings("a.gguf", "a", threads=threads), said.append)), said

    return choose


@pytest.mark.parametrize(
    ("speeds", "chosen"),
    [
        ({}, (2, "q8_0", 512)),
        ({2: 96}, (4, "q8_0", 512)),
        ({1: 97, 2: 200}, (2, "q8_0", 512)),
        ({"q8_0": 96}, (2, "f16", 512)),
        ({"q8_0": 0}, (2, "f16", 512)),
        ({512: 96}, (2, "q8_0", 2048)),
    ],
)
def test_what_takes_less_is_chosen_where_it_is_as_fast_or_nearly(speeds, chosen, measured):
    timed, found, said = measured(speeds)
    assert (found.threads, found.cache, found.batch) == chosen
    assert [one.threads for one in timed] == [1, 2, 4, *[chosen[0]] * 4]
    assert [one.cache for one in timed] == ["f16"] * 3 + ["q8_0", "f16"] + [chosen[1]] * 2
    assert [one.batch for one in timed] == [None] * 5 + [512, 2048]
    assert [line.rsplit(": ", 1)[1] for line in said] == [str(each) for each in chosen]


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 3, 6])])
def test_one_thread_two_half_and_all_are_measured(cores, counts, measured):
    timed, _, _ = measured(cores=cores)
    assert [one.threads for one in timed if one.cache == "f16" and not one.batch][:-1] == counts


def test_threads_that_were_given_are_not_measured(measured):
    timed, found, said = measured(threads=4)
    assert {one.threads for one in [*timed, found]} == {4}
    assert [line.split()[0] for line in said] == ["cache", "batch"]


@pytest.mark.parametrize(("together", "used"), [(98.0, False), (102.0, False), (104.0, True)])
def test_a_draft_is_used_only_where_it_is_faster_by_more_than_a_measurement_varies(model, monkeypatch, together, used):
    async def answering(engine):
        return together if engine.draft else 100.0

    monkeypatch.setattr(tuning, "_answering", answering)
    said = []
    chosen = asyncio.run(drafted(EngineSettings(str(model), "small"), model, said.append))
    assert chosen.draft == (str(model) if used else None)
    assert said[0].endswith("it drafts" if used else "it is not used")


@pytest.mark.slow
def test_a_draft_changes_no_answer_and_is_used_only_where_it_helps(folder, model):
    with serving(model, "--context", 512, cache=folder) as alone:
        said = ask(alone.client()).choices[0].message.content
    with serving(model, "--context", 512, "--draft", model, cache=folder) as drafting:
        assert ask(drafting.client()).choices[0].message.content == said
        log = drafting.log()
    assert re.search(r"draft +[\d.]+ tokens/s alone, [\d.]+ with .* drafting: it (drafts|is not used)", log)
    other = file_of_another_vocabulary(folder)
    refused = pocketlm("serve", model, "--port", 0, "--draft", other, cache=folder)
    assert refused.returncode == 2
    assert "another vocabulary" in refused.stderr


def file_of_another_vocabulary(folder):
    path = folder / "other-vocabulary.gguf"
    write_gguf(load(str(tiny_folder("qwen2", folder / "qwen2"))), {}, path)
    return path
