"""A teacher behind a server that speaks OpenAI's protocol: it answers prompts, and says how likely its words were."""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

from pocketlm.errors import BadInputError, PocketlmError
from pocketlm.model.files import json_lines

KEY = "POCKETLM_REMOTE_KEY"  # of the environment: one for other servers must not reach this one
TIMEOUT = 600  # seconds for one answer
ANSWER_TOKENS = 256
SHOWN, REASON = 60, 300  # characters of a prompt and of a server's words in a message
LIKELIEST = 14  # tokens whose probabilities are asked for; OpenAI gives up to 20
REFUSED = (400, 404, 422, 501)  # what servers say that give no probabilities


@dataclass(frozen=True)
class Answer:
    """What a server answered.

    Attributes:
        prompt: What it was asked.
        answer: Its words; empty where they were cut off.
        opinion: For each token of the answer its text, and the texts of the likeliest tokens there with their
            log-probabilities; None where the server gives none.
    """

    prompt: str
    answer: str
    opinion: list | None = None


def ask(
    url: str,
    model: str | None,
    prompts: list[str],
    kept: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Answer]:
    """Return the server's greedy answers to prompts; those that an earlier run got are not asked for again.

    An answer that was cut off is left out: a student would learn to stop there.

    Args:
        url: Of the server, such as http://localhost:8080/v1.
        model: Whom to ask there; whom the server chooses where None.
        prompts: Each is a conversation's first message.
        kept: A file that every answer is added to, as a line of JSON.
        progress: Called after each answer with how many are there and how many there will be.

    Raises:
        BadInputError: Nothing answers at the address, or it refuses.
        PocketlmError: An answer cannot be understood.
    """
    answers, probabilities = {answer.prompt: answer for answer in read_answers(kept)}, True
    with kept.open("a", encoding="utf-8") as file:
        for done, prompt in enumerate(dict.fromkeys(prompts), 1):
            if prompt not in answers:
                answers[prompt], probabilities = _answer(url, model, prompt, probabilities)
                file.write(json.dumps(vars(answers[prompt])) + "\n")
                file.flush()
            progress(done, len(prompts))
    return [answers[prompt] for prompt in prompts if answers[prompt].answer]


def read_answers(path: Path) -> list[Answer]:
    """Return the answers in a file that may not be there."""
    return [Answer(**line) for line in json_lines(path)]


def served_model(url: str) -> dict[str, Any] | None:
    """Return what tells the server's model from others, the first that it lists; None without a list or a server.

    That is its name, `id`, and what llama.cpp and `pocketlm serve` say of the file, such as its size, as `meta`.
    """
    try:
        with urllib.request.urlopen(_request(url, "models"), timeout=TIMEOUT) as response:
            first = json.load(response)["data"][0]
        return {"id": str(first["id"]), "meta": first.get("meta")}
    except (OSError, ValueError, http.client.HTTPException, KeyError, IndexError, TypeError):
        return None  # what asks the questions says what is wrong


def _answer(url: str, model: str | None, prompt: str, probabilities: bool) -> tuple[Answer, bool]:
    """Return the answer to a prompt, and whether the server takes questions for probabilities."""
    named = {"model": model} if model else {}
    body = named | {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "max_tokens": ANSWER_TOKENS}
    more = {"logprobs": True, "top_logprobs": LIKELIEST} if probabilities else {}
    try:
        with urllib.request.urlopen(_request(url, "chat/completions", body | more), timeout=TIMEOUT) as response:
            return _read(prompt, json.load(response)["choices"][0]), probabilities
    except urllib.error.HTTPError as error:
        if probabilities and error.code in REFUSED:
            return _answer(url, model, prompt, probabilities=False)
        raise BadInputError(
            f"The server at {url} refused the prompt `{shorten(prompt, SHOWN)}` ({error.code} {_reason(error)}). "
            f"Check the address, and the variable {KEY} if it wants a key"
        ) from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        if isinstance(error, json.JSONDecodeError):
            raise PocketlmError(f"The server at {url} did not answer in JSON. Is its address right") from error
        raise BadInputError(
            f"Nothing answers at {url}: {error}. Give an address like http://localhost:8080/v1"
        ) from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise PocketlmError(f"The server at {url} did not answer as a chat. It must speak OpenAI's protocol") from error


def _reason(error: urllib.error.HTTPError) -> str:
    """Return why a server refused, in its own words where it has some."""
    try:
        return shorten(str(json.load(error)["error"]["message"]), REASON)
    except (OSError, ValueError, http.client.HTTPException, KeyError, TypeError):
        return error.reason


def _request(url: str, path: str, body: dict[str, Any] | None = None) -> urllib.request.Request:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url.rstrip('/')}/{path}", data, {"Content-Type": "application/json"})
    if os.environ.get(KEY):
        request.add_unredirected_header("Authorization", f"Bearer {os.environ[KEY]}")
    return request


def _read(prompt: str, choice: dict[str, Any]) -> Answer:
    if choice.get("finish_reason") == "length":
        return Answer(prompt, "")
    content = choice["message"]["content"]
    said = (choice.get("logprobs") or {}).get("content") or []
    opinion = [
        [each["token"], [[other["token"], other["logprob"]] for other in each.get("top_logprobs") or [each]]]
        for each in said
    ]
    return Answer(prompt, content.strip(), opinion or None)
