"""Time the engine on one file, alone in a process: `python -m pocketlm.run.speed FILE` prints a JSON object.

Alone because peak memory belongs to a process, and because an engine that crashes must not take the
measurement with it. The prompt is random tokens, as in llama.cpp's own benchmark; generating starts behind
the prompt, where a real answer starts.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pocketlm.errors import PocketlmError
from pocketlm.run.engine import Engine
from pocketlm.run.llamacpp import CACHE_TYPES

WORKER = (sys.executable, "-m", "pocketlm.run.speed")
_POWER_ZONES = Path("/sys/class/powercap")
_RANDOM_SEED = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """What one process measured; lists have one entry per repeat.

    Attributes:
        engine: The engine's version.
        load_seconds: From the path to a usable model.
        prefill_tokens_per_second: Reading the prompt.
        first_token_seconds: From the prompt to the first token of an answer.
        decode_tokens_per_second: Generating greedily behind the prompt.
        decode_joules: Energy of the processor packages while generating, whoever used it; None where the system
            does not let it be read.
        peak_memory_bytes: The process's peak resident memory, with Python.
        memory_before_bytes: Its resident memory before loading the model.
    """

    engine: str
    load_seconds: float
    prefill_tokens_per_second: list[float]
    first_token_seconds: list[float]
    decode_tokens_per_second: list[float]
    decode_joules: list[float] | None
    peak_memory_bytes: int
    memory_before_bytes: int


def time_file(
    path: Path, threads: int, prompt: int, generate: int, repeat: int, context: int = 0, cache: str = "f16"
) -> Timings:
    """Load `path` and time it, after one warm-up.

    Args:
        path: A GGUF file.
        threads: CPU threads.
        prompt: Tokens to read.
        generate: Tokens to generate after them.
        repeat: How many times.
        context: Tokens to make room for; those of prompt and answer where fewer are given.
        cache: How keys and values are stored: f16, q8_0 or q4_0.

    Raises:
        BadInputError: The engine cannot load the file.
    """
    memory_before = _memory("VmRSS")
    start = time.perf_counter()
    with Engine(path, threads=threads, context=max(context, prompt + generate), cache=cache) as engine:
        load_seconds = time.perf_counter() - start
        draw = random.Random(_RANDOM_SEED)
        tokens = [draw.randrange(engine.vocabulary_size) for _ in range(prompt)]
        _time_once(engine, tokens, generate)
        runs = [_time_once(engine, tokens, generate) for _ in range(repeat)]
    prefill_seconds, decode_seconds, decode_joules = zip(*runs, strict=True)
    return Timings(
        engine=engine.version,
        load_seconds=load_seconds,
        prefill_tokens_per_second=[prompt / seconds for seconds in prefill_seconds],
        first_token_seconds=list(prefill_seconds),
        decode_tokens_per_second=[generate / seconds for seconds in decode_seconds],
        decode_joules=None if None in decode_joules else list(decode_joules),
        peak_memory_bytes=_memory("VmHWM"),
        memory_before_bytes=memory_before,
    )


def _time_once(engine: Engine, tokens: list[int], generate: int) -> tuple[float, float, float | None]:
    """Return seconds of prefill and of decode, and joules of decode."""
    engine.forget()
    start = time.perf_counter()
    token = engine.follow(tokens)
    energy, answered = _package_joules(), time.perf_counter()
    for _ in range(generate):
        token = engine.follow([token])
    seconds = time.perf_counter() - answered
    return answered - start, seconds, _spent(energy, _package_joules())


def _package_joules() -> list[tuple[float, float]] | None:
    """Return (counter, where it starts again) in joules per processor package; None where not readable."""
    zones = []
    try:
        for zone in sorted(_POWER_ZONES.glob("*-rapl:*")):
            # Zones inside a package repeat its energy, and `psys` repeats all of them.
            if (zone / "name").read_text().startswith("package"):
                counter, limit = ((zone / name).read_text() for name in ("energy_uj", "max_energy_range_uj"))
                zones.append((int(counter) / 1e6, int(limit) / 1e6))
    except OSError:
        return None
    return zones or None


def _spent(before: list[tuple[float, float]] | None, after: list[tuple[float, float]] | None) -> float | None:
    if before is None or after is None:
        return None
    return sum((now - then) % limit for (then, limit), (now, _) in zip(before, after, strict=True))


def _memory(field: str) -> int:
    """Return `VmRSS` (now) or `VmHWM` (peak) of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # Not getrusage: on Linux its peak begins with the parent's.
        line = next(line for line in status.read_text().splitlines() if line.startswith(field))
        return int(line.split()[1]) * 1024
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def main() -> None:
    """Measure the file on the command line and print the timings as JSON; errors go to stderr."""
    parser = argparse.ArgumentParser(prog="pocketlm.run.speed")
    parser.add_argument("path", metavar="file", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generate", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--cache", choices=tuple(CACHE_TYPES), default="f16")
    options = parser.parse_args()
    try:
        timings = time_file(**vars(options))
    except PocketlmError as error:
        sys.stderr.write(f"{error}\n")
        raise SystemExit(error.exit_code) from None
    sys.stdout.write(json.dumps(asdict(timings)) + "\n")


if __name__ == "__main__":
    main()
