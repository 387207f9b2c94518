"""Talk to a GGUF file: one answer, a stream of pieces, or a conversation in the terminal."""

import queue
import secrets
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from pocketlm.errors import BadInputError
from pocketlm.run.header import check_is_gguf, read_header

if TYPE_CHECKING:
    from xllamacpp import Server

Message = dict[str, str]  # "role" ("system", "user" or "assistant") and "content"

CONTEXT = 4096  # tokens of the longest conversation
LONGEST_ANSWER = 1024  # tokens; small models can repeat themselves without end
SEEDS = 2**32 - 1  # from 0 on; the next one is llama.cpp's LLAMA_DEFAULT_SEED, with which it draws anew each time
_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


@dataclass(frozen=True, slots=True)
class Reply:
    """A finished answer.

    Attributes:
        text: All of it.
        finish_reason: `stop` where the model ended it, `length` where the limit or the context did.
        tokens: Tokens generated.
        tokens_per_second: Of generating, without reading the prompt, as the engine timed it.
    """

    text: str
    finish_reason: str
    tokens: int
    tokens_per_second: float


def has_chat_template(path: Path) -> bool:
    """Whether the file says how a conversation is written for its model."""
    return bool(read_header(path).chat_template)


@contextmanager
def serving(path: str | Path, threads: int | None = None, context: int = 4096) -> Iterator["Server"]:
    """Load a GGUF file into llama.cpp's server, on the CPU, silent, for this process alone.

    Args:
        path: A GGUF file.
        threads: CPU threads; the engine's choice (one per physical core) if None.
        context: Longest conversation in tokens, question and answer.

    Raises:
        BadInputError: The file is no GGUF file, or the engine cannot load it.
    """
    import xllamacpp

    check_is_gguf(Path(path))
    settings = xllamacpp.CommonParams()
    settings.model.path = str(path)
    settings.n_ctx = context
    settings.n_parallel = 1
    settings.n_gpu_layers = 0
    settings.verbosity = -1  # not even errors: they come back with the answers
    settings.warmup = False
    settings.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    # The server also listens on a local port. Nobody is meant to use it, so nobody is told the key.
    settings.api_keys = [secrets.token_urlsafe(32)]
    if threads:
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise BadInputError(
            f"The engine cannot load {path}: the file is damaged, newer than the engine, or a context of "
            f"{context} tokens does not fit into memory. `pocketlm doctor` shows versions and memory"
        ) from error
    try:
        yield server
    finally:
        del server  # its destructor ends the engine's threads


def stream(
    server: "Server",
    messages: list[Message] | str,
    *,
    max_tokens: int | None = None,
    greedy: bool = False,
    seed: int | None = None,
) -> Generator[str, None, Reply]:
    """Generate an answer piece by piece; closing the generator stops the engine.

    Args:
        server: What `serving` gives.
        messages: A conversation; or a plain text to go on with, for a model without a chat template.
        max_tokens: Longest answer; as long as the context if None.
        greedy: Take the likeliest token each time.
        seed: Of the draws; the same seed gives the same answer. Any whole number.

    Yields:
        The answer's text, a few characters at a time.

    Returns:
        The finished answer.

    Raises:
        BadInputError: The engine refuses the request, for example a conversation longer than the context.
    """
    request: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        # A prompt read from the cache rounds differently from one read afresh.
        "cache_prompt": seed is None and not greedy,
        "max_tokens": -1 if max_tokens is None else max_tokens,
    }
    if greedy:
        request["temperature"] = 0
    if seed is not None:
        request["seed"] = seed % SEEDS
    if isinstance(messages, str):
        generate, request["prompt"] = server.handle_completions, messages
    else:
        generate, request["messages"] = server.handle_chat_completions, messages

    text, finish_reason, timings = [], "stop", {}
    for chunk in _chunks(generate, request):
        timings = chunk.get("timings", timings)
        for choice in chunk["choices"]:
            finish_reason = choice["finish_reason"] or finish_reason
            piece = choice["text"] if "text" in choice else choice["delta"].get("content")
            if piece:
                text.append(piece)
                yield piece
    return Reply(
        text="".join(text),
        finish_reason=finish_reason,
        tokens=timings.get("predicted_n", 0),
        tokens_per_second=timings.get("predicted_per_second", 0.0),
    )


def _chunks(generate: Callable[[dict, Callable], None], request: dict[str, Any]) -> Iterator[dict]:
    # The engine calls back and swallows what its callback raises, Ctrl-C too. So it runs on a thread of its
    # own, and the callback does nothing but hand over the chunk and say whether to stop.
    chunks: queue.SimpleQueue[dict | None] = queue.SimpleQueue()
    stop = threading.Event()

    def hand_over(chunk: dict) -> bool:
        chunks.put(chunk)
        return stop.is_set()

    def work() -> None:
        try:
            generate(request, hand_over)
        except Exception as error:  # whatever the engine raises belongs to the thread that asked
            chunks.put({"error": {"message": str(error)}})
        finally:
            chunks.put(None)

    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    try:
        while (chunk := chunks.get()) is not None:
            if "error" in chunk:
                raise BadInputError(f"The engine refuses the request: {chunk['error']['message']}")
            yield chunk
    finally:
        stop.set()
        worker.join()


def complete(
    server: "Server",
    messages: list[Message] | str,
    *,
    max_tokens: int | None = None,
    greedy: bool = False,
    seed: int | None = None,
) -> Reply:
    """Generate an answer and return it whole; arguments and errors are those of `stream`."""
    pieces = stream(server, messages, max_tokens=max_tokens, greedy=greedy, seed=seed)
    return _follow(pieces, lambda piece: None)


def _follow(pieces: Generator[str, None, Reply], show: Callable[[str], None]) -> Reply:
    while True:
        try:
            show(next(pieces))
        except StopIteration as end:
            return end.value


def chat_loop(
    path: str | Path,
    system: str | None = None,
    *,
    threads: int | None = None,
    greedy: bool = False,
    seed: int | None = None,
) -> None:
    """Hold a conversation in the terminal until the person leaves.

    Where standard input is no terminal, each line is a question and only the answers are printed.

    Args:
        path: A GGUF file.
        system: The first message, about how to answer.
        threads: CPU threads; the engine's choice if None.
        greedy: Take the likeliest token each time.
        seed: Of the draws.

    Raises:
        BadInputError: The file cannot be used; or, where input is no terminal, the engine refuses a question.
    """
    console = Console(highlight=False, emoji=False)  # answers are printed as they are, `:key:` too
    interactive = sys.stdin.isatty()
    questions = _questions(console, interactive)
    # Where there is nothing to ask, no engine is started.
    asked = [] if interactive else list(islice(questions, 1))
    if not interactive and not asked:
        return
    with serving(path, threads, CONTEXT) as server:
        chatty = has_chat_template(Path(path))
        opening: list[Message] = [{"role": "system", "content": system}] if system and chatty else []
        conversation, replies = list(opening), []
        if interactive:
            console.print(f"[bold]{escape(Path(path).name)}[/] [dim]{_HELP}[/]")
        if not chatty:
            Console(stderr=True).print("[dim]This model has no chat template: it goes on with your text[/]")
        for question in chain(asked, questions):
            if question == "/exit":
                break
            if question == "/reset":
                conversation = list(opening)
                continue
            conversation.append({"role": "user", "content": question})
            prompt = conversation if chatty else question
            pieces = stream(server, prompt, max_tokens=LONGEST_ANSWER, greedy=greedy, seed=seed)
            reply = _answer(console, pieces, interactive)
            replies.append(reply)
            if reply.text:
                conversation.append({"role": "assistant", "content": reply.text})
            else:
                conversation.pop()
    if interactive:
        _print_speed(console, replies)


def _answer(console: Console, pieces: Generator[str, None, Reply], interactive: bool) -> Reply:
    """Print an answer as it comes; one that is stopped or refused counts as far as it went."""
    said: list[str] = []

    def show(piece: str) -> None:
        said.append(piece)
        sys.stdout.write(piece)  # rich would make spaces of tabs
        sys.stdout.flush()

    finish_reason = "stopped"
    try:
        return _follow(pieces, show)
    except KeyboardInterrupt:
        if not interactive:
            raise
    except BadInputError as error:
        if not interactive:
            raise
        finish_reason = "refused"
        console.print(f"[red]{escape(str(error))}[/]. /reset starts afresh")
    finally:
        console.print()
    return Reply("".join(said), finish_reason, tokens=0, tokens_per_second=0.0)


def _questions(console: Console, interactive: bool) -> Iterator[str]:
    while True:
        try:
            line = console.input("[bold cyan]>[/] ") if interactive else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        except UnicodeDecodeError as error:
            raise BadInputError(f"The questions are not UTF-8 ({error.reason}). Save them as UTF-8") from error
        if not line and not interactive:
            return
        if question := line.removeprefix("\ufeff").strip():  # some editors put a mark before the first
            yield question


def _print_speed(console: Console, replies: list[Reply]) -> None:
    tokens = sum(reply.tokens for reply in replies)
    seconds = sum(reply.tokens / reply.tokens_per_second for reply in replies if reply.tokens_per_second)
    if seconds:
        console.print(f"[dim]{tokens} tokens, {tokens / seconds:.0f} tokens/s[/]")
