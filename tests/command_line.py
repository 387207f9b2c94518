"""The `pocketlm` command as a person calls it: a process of its own, with a cache of its own.

Importing torch and transformers takes longer than most of what is done with tiny models, so each call is forked from a
process that has imported them and nothing of pocketlm. `command` has the words of a call without this shortcut.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models want no more; also of what is forked from
SECONDS = 300  # that a call may take
FORKS = multiprocessing.get_context("forkserver")
FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "gpt2")
FORKS.set_forkserver_preload(
    ["torch", "transformers.models.auto", "transformers.generation"]
    + [f"transformers.models.{family}.modeling_{family}" for family in FAMILIES]
)


def command(*arguments: object) -> list[str]:
    """Return the words that start `pocketlm` with these arguments."""
    return [sys.executable, "-m", "pocketlm", *map(str, arguments)]


def environment(cache: Path) -> dict[str, str]:
    """Return the environment of a run whose cache is the folder `cache`, on one thread."""
    return os.environ | {"POCKETLM_CACHE": str(cache)}


def pocketlm(*arguments: object, cache: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run `pocketlm` with these arguments and nothing on standard input."""
    words = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [Path(folder) / name for name in ("stdout", "stderr")]
        process = FORKS.Process(target=_run, args=(words, environment(cache), cwd or Path.cwd(), streams))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(command(*words), SECONDS)
        return subprocess.CompletedProcess(command(*words), process.exitcode, *(each.read_text() for each in streams))


def _run(words: list[str], variables: dict[str, str], folder: Path, streams: list[Path]) -> None:
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = ["pocketlm", *words]
    runpy.run_module("pocketlm", run_name="__main__")
