"""`serve --auto` and `serve --draft`: settings of the engine, chosen by measuring it here with the very file."""

import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from pocketlm.errors import BadInputError, PocketlmError
from pocketlm.model.gguf_file import read_gguf
from pocketlm.run.server.engine_process import EngineSettings
from pocketlm.run.server.local import LocalModel
from pocketlm.run.server.refusals import RefusalError

READ, WRITTEN = 512, 32  # tokens of the prompt and of the answer that are timed
TIMES = 2  # that each is timed, of which the best counts: other work on the machine only slows it
WITHIN = 0.97  # of the best speed is as good: then what takes fewer threads or less memory is chosen
BATCHES = (512, 2048)  # from the engine's own on: an embedding must fit into one
QUESTIONS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "How do I boil an egg?",
)
ANSWER = 64  # tokens

Say = Callable[[str], None]


async def tuned(settings: EngineSettings, say: Say) -> EngineSettings:
    """Return settings with the threads, the type of the cache of keys and values, and the batch that serve best here.

    The cache becomes q8_0 where that is as fast, since it takes half the memory and costs next to nothing in quality;
    nothing coarser is ever chosen by itself.

    Args:
        settings: What is fixed; threads stay where they are given.
        say: Told what was measured.
    """
    if settings.threads is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        counts = sorted({1, 2, cores // 2, cores} & set(range(1, cores + 1)))
        speeds = {count: (await _speeds(replace(settings, threads=count)))[1] for count in counts}
        settings = replace(settings, threads=_first_good(speeds))
        say(f"threads  {_table(speeds)} tokens/s written: {settings.threads}")
    kinds = {kind: (await _speeds(replace(settings, cache=kind)))[1] for kind in ("q8_0", "f16")}
    settings = replace(settings, cache=_first_good(kinds))
    say(f"cache    {_table(kinds)} tokens/s written: {settings.cache}")
    batches = {batch: (await _speeds(replace(settings, batch=batch)))[0] for batch in BATCHES}
    settings = replace(settings, batch=_first_good(batches))
    say(f"batch    {_table(batches)} tokens/s read: {settings.batch}")
    return settings


async def drafted(settings: EngineSettings, draft: Path, say: Say) -> EngineSettings:
    """Return settings with a small model that drafts, if that is clearly faster here; else without.

    Raises:
        BadInputError: The draft's vocabulary is another.
    """
    tokens = [read_gguf(path).get("tokenizer.ggml.tokens") for path in (Path(settings.path), draft)]
    if tokens[0] != tokens[1]:
        raise BadInputError(
            f"{draft} has another vocabulary than {settings.path}, so it cannot draft for it. "
            "Take a model that was cut or distilled from the same original"
        )
    with_draft = replace(settings, draft=str(draft))
    alone, together = await _answering(settings), await _answering(with_draft)
    better = alone < WITHIN * together  # else it would take memory for what another measurement may not show
    say(
        f"draft    {alone:.1f} tokens/s alone, {together:.1f} with {draft.name} drafting: "
        + ("it drafts" if better else "it is not used")
    )
    return with_draft if better else settings


def _first_good(speeds: dict) -> int | str:
    """Return the first in order that is as fast as the fastest, or nearly."""
    return next(name for name, speed in speeds.items() if speed >= WITHIN * max(speeds.values()))


def _table(speeds: dict) -> str:
    return ", ".join(f"{name}: {speed:.1f}" for name, speed in speeds.items())


async def _speeds(settings: EngineSettings) -> tuple[float, float]:
    """Return tokens per second of reading a prompt and of writing behind it; 0 where the engine refuses."""
    best = 0.0, 0.0
    try:
        async with _running(settings) as model:
            count = max(1, min(READ, model.ready.context - WRITTEN - 1))
            for turn in range(TIMES):
                prompt = [(7 * turn + 13 * place) % 97 + 3 for place in range(count)]  # other tokens: nothing is reused
                body = {"prompt": prompt, "max_tokens": WRITTEN, "temperature": 0, "ignore_eos": True}
                async with model.post("/v1/completions", body) as response:
                    timings = (await response.json())["timings"]
                found = timings["prompt_per_second"], timings["predicted_per_second"]
                best = max(best[0], found[0]), max(best[1], found[1])
    except BadInputError:
        if settings.cache == "f16":  # some heads are too narrow for a coarser cache; the file itself must load
            raise
    return best


async def _answering(settings: EngineSettings) -> float:
    """Return tokens per second of real answers: how much a draft saves depends on what is said."""
    best = 0.0
    async with _running(settings) as model:
        for _ in range(TIMES):
            began, written = time.monotonic(), 0
            for question in QUESTIONS:
                body = {"prompt": question, "max_tokens": ANSWER, "temperature": 0, "cache_prompt": False}
                answer = await model.answer("/v1/completions", body)
                written += answer["usage"]["completion_tokens"]
            best = max(best, written / (time.monotonic() - began))
    return best


@asynccontextmanager
async def _running(settings: EngineSettings) -> AsyncIterator[LocalModel]:
    """Run an engine to measure it; what it would tell a client becomes an error for the person who serves."""
    model = LocalModel(replace(settings, slots=1), queue=0)
    try:
        await model.start()
        yield model
    except RefusalError as error:
        why = "the engine died" if error.code == "engine_down" else error.message
        raise PocketlmError(f"Measuring {settings.path} failed: {why}. Serve it without --auto and --draft") from error
    finally:
        await model.stop()
