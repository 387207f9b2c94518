"""A teacher behind a server that speaks OpenAI's protocol: it answers prompts, and a student learns the answers."""

import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from pocketlm.errors import BadInputError, PocketlmError
from pocketlm.model.examples import Example

KEY = "OPENAI_API_KEY"  # of the environment; sent where it is set
TIMEOUT = 600  # seconds for one answer
ANSWER_TOKENS = 256


def ask(
    url: str,
    prompts: list[str],
    kept: Path,
    model: str = "default",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Example]:
    """Return the server's greedy answers to prompts; those that an earlier run got are not asked for again.

    An answer that was cut off is left out: a student would learn to stop there.

    Args:
        url: Of the server, such as http://localhost:8080/v1.
        prompts: Each is a conversation's first message.
        kept: A file that every answer is added to, as a line of JSON.
        model: The name that the server knows the teacher by.
        progress: Called after each answer with how many are there and how many there will be.

    Raises:
        BadInputError: Nothing answers at the address, or it refuses.
        PocketlmError: An answer cannot be understood.
    """
    answers = {example.prompt: example for example in _kept(kept)}
    with kept.open("a", encoding="utf-8") as file:
        for done, prompt in enumerate(dict.fromkeys(prompts), 1):
            if prompt not in answers:
                answers[prompt] = Example(prompt, _answer(url, prompt, model))
                file.write(json.dumps(vars(answers[prompt])) + "\n")
                file.flush()
            progress(done, len(prompts))
    return [answers[prompt] for prompt in prompts if answers[prompt].answer]


def _kept(path: Path) -> list[Example]:
    """Return the answers in a file; a last line that a kill cut off is taken away."""
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    path.write_text("".join(whole), encoding="utf-8")
    return [Example(**json.loads(line)) for line in whole]


def _answer(url: str, prompt: str, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}
    headers = {"Content-Type": "application/json"}
    if os.environ.get(KEY):
        headers["Authorization"] = f"Bearer {os.environ[KEY]}"
    request = urllib.request.Request(
        f"{url.rstrip('/')}/chat/completions",
        json.dumps(body | {"max_tokens": ANSWER_TOKENS}).encode(),
        headers,
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            choice = json.load(response)["choices"][0]
            return "" if choice.get("finish_reason") == "length" else choice["message"]["content"].strip()
    except urllib.error.HTTPError as error:
        raise BadInputError(
            f"The server at {url} refused ({error.code} {error.reason}). Check the address, and {KEY} if it wants a key"
        ) from error
    except (OSError, ValueError) as error:
        if isinstance(error, json.JSONDecodeError):
            raise PocketlmError(f"The server at {url} did not answer in JSON. Is its address right") from error
        raise BadInputError(
            f"Nothing answers at {url}: {error}. Give an address like http://localhost:8080/v1"
        ) from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise PocketlmError(f"The server at {url} did not answer as a chat. It must speak OpenAI's protocol") from error
