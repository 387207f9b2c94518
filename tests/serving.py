"""A running `pocketlm serve` for tests: a process of its own, spoken to by OpenAI's own client."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

import httpx
from openai import OpenAI
from tests.command_line import command, environment
from tests.tiny import SPECIALS, tiny_folder, tiny_tokenizer

from pocketlm.export.gguf import write_gguf
from pocketlm.model.source import load

CONTEXT = 16_384
SECONDS = 300  # that anything may take: a busy machine is slow, and slow is not wrong
# A random model ends where it likes; with this bias it goes on as long as it may.
ENDLESS = {str(token): -100 for token in tiny_tokenizer("llama").convert_tokens_to_ids(list(SPECIALS["llama"]))}


def tiny_file(folder: Path, name: str, seed: int = 0) -> Path:
    """Write a tiny random model with a chat template and a long context as a GGUF file."""
    model = load(str(tiny_folder("llama", folder / f"{name}-folder", seed, max_position_embeddings=CONTEXT)))
    path = folder / f"{name}.gguf"
    write_gguf(model, {}, path)
    return path


def plain_file(folder: Path) -> Path:
    """Write a tiny random model without a chat template as a GGUF file."""
    path = folder / "plain.gguf"
    write_gguf(load(str(tiny_folder("gpt2", folder / "plain-folder"))), {}, path)
    return path


@dataclass
class Running:
    """A server: its process, where it is, and OpenAI's client of it, which tries nothing twice."""

    process: subprocess.Popen
    address: str
    said: str
    errors: IO[str]

    def log(self) -> str:
        """Return what the server has said on standard error."""
        self.errors.seek(0)
        return self.errors.read()

    def client(self, key: str = "none") -> OpenAI:
        return OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0, timeout=SECONDS)

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(self.address + path, timeout=SECONDS, **options)

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(self.address + path, timeout=SECONDS, **options)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels; 0 if nothing was counted yet."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.match(rf"pocketlm_{name}[ {{]", line))


@contextmanager
def serving(file: Path, *arguments: object, cache: Path, **more: str) -> Iterator[Running]:
    """Run `pocketlm serve` on a free port until the end of the context; `more` goes to its environment."""
    with TemporaryFile("w+") as log:  # a pipe that nobody reads would fill up and stop the server
        process = subprocess.Popen(
            command("serve", file, "--port", 0, "--threads", 1, *arguments),
            env=environment(cache) | more,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        try:
            said = process.stdout.readline()
            if not said:
                code = process.wait()
                log.seek(0)
                raise RuntimeError(f"the server ended with {code}: {log.read()}")
            yield Running(process, re.search(r"http://\S+", said)[0], said, log)
        finally:
            process.terminate()
            try:
                process.wait(180)
            finally:
                process.kill()
                process.stdout.close()
