"""llama.cpp's own HTTP server, alone in a process: `python -m pocketlm.run.server.engine_process`.

Alone because an engine that crashes must not take the server with it, and because their threads would wait for
each other. It reads its settings as one line of JSON on standard input, says where it listens as one line on
standard output, and ends when standard input does: whoever started it is gone then.
"""

import json
import os
import secrets
import sys
from dataclasses import asdict, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from pocketlm.errors import BadInputError, PocketlmError
from pocketlm.run.header import Header, read_header

if TYPE_CHECKING:
    from xllamacpp import CommonParams

DEFAULT_CONTEXT = 4096


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is started with.

    Attributes:
        path: A GGUF file.
        name: What its answers call the model.
        key: The engine answers only to those who know it.
        slots: Answers that are written at the same time.
        context: Longest prompt and answer of one request in tokens; if None, that of the model but not above 4096.
        threads: CPU threads; the engine's choice, one per physical core, if None.
        cache: How keys and values are stored: f16, q8_0 or q4_0.
        batch: Tokens of a prompt that are read at once; the engine's choice if None.
        draft: A small GGUF file of the same vocabulary that drafts for this one.
    """

    path: str
    name: str
    key: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    slots: int = 4
    context: int | None = None
    threads: int | None = None
    cache: str = "f16"
    batch: int | None = None
    draft: str | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """What an engine says once it answers.

    Attributes:
        address: Where, such as `http://127.0.0.1:40297`.
        context: Tokens of one request.
        chats: Whether the file has a chat template.
        wraps_tools: Whether tools are described to the model in pocketlm's words, its template having none.
    """

    address: str
    context: int
    chats: bool
    wraps_tools: bool


def main() -> None:
    """Start the engine, say so, and wait for the end of standard input."""
    settings = EngineSettings(**json.loads(sys.stdin.readline()))
    try:
        header = read_header(Path(settings.path))
        ready, server = _start(settings, header)
    except PocketlmError as error:
        _say({"error": str(error)})
        os._exit(error.exit_code)
    except RuntimeError:
        _say(
            {
                "error": f"The engine cannot load {settings.path}: the file is damaged, newer than the engine, or a "
                "context of this size does not fit into memory. `pocketlm doctor` shows versions and memory"
            }
        )
        os._exit(2)
    _say(asdict(ready))
    sys.stdin.read()
    del server
    os._exit(0)


def _start(settings: EngineSettings, header: Header) -> tuple[Ready, object]:
    import xllamacpp

    if header.trained_context and (settings.context or 0) > header.trained_context:  # it would be cut without a word
        raise BadInputError(
            f"--context {settings.context:,} is more than {settings.path} was made for. "
            f"Give at most {header.trained_context:,}"
        )
    context = settings.context or min(header.trained_context or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    template = header.chat_template
    wraps_tools = template is not None and "tools" not in template
    parameters = _parameters(settings, header, context)
    if wraps_tools:
        parameters.chat_template = files(__package__).joinpath("tools.jinja").read_text(encoding="utf-8") + template
    server = xllamacpp.Server(parameters)
    return Ready(server.listening_address, context, template is not None, wraps_tools), server


def _parameters(settings: EngineSettings, header: Header, context: int) -> "CommonParams":
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = settings.path
    parameters.model_alias = {settings.name}
    parameters.hostnames, parameters.port = ["127.0.0.1"], 0
    parameters.api_keys = [settings.key]
    parameters.offline, parameters.ui = True, False
    parameters.verbosity = -1  # not even errors: they come back with the answers
    parameters.n_gpu_layers = 0
    parameters.n_parallel, parameters.n_ctx = settings.slots, context * settings.slots
    parameters.fit_params = False  # it would load the file twice to guess at what is known
    parameters.cache_ram_mib = 0  # conversations of other clients are not kept: memory stays what it was
    parameters.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    parameters.embedding = True
    if not header.pools:
        parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    kind = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{settings.cache.upper()}")
    parameters.cache_type_k = parameters.cache_type_v = kind
    if settings.threads:
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = settings.threads
    if settings.batch:
        parameters.n_batch = parameters.n_ubatch = settings.batch
    if settings.draft:
        parameters.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        parameters.speculative.draft.mparams.path = settings.draft
        parameters.speculative.draft.n_gpu_layers = 0
    return parameters


def _say(line: dict) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
