"""What the examples share: reading labelled requests, teaching a small model, and talking to served ones."""

import asyncio
import csv
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import httpx

from pocketlm.api import Distil, Distillation, distill, load
from pocketlm.export.gguf import write_gguf
from pocketlm.interval import wilson
from pocketlm.model.examples import Example, pack_examples
from pocketlm.pipeline.cache import stage
from pocketlm.pipeline.stages import gather_texts, silent
from pocketlm.steps.quantize import Quantize, quantize

LENGTH = 512  # tokens of a window that examples are packed into
TASK_WINDOWS, TEXT_WINDOWS = 32, 12  # that codes are chosen on
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Served:
    """A running `pocketlm serve`: its process and the address of its API."""

    process: subprocess.Popen
    url: str


@dataclass(frozen=True)
class Reply:
    """What a server answered.

    Attributes:
        status: Of HTTP.
        text: The answer; empty where there is none.
        seconds: From the request to its last byte.
        mark: Who answered and how sure it was, where the server may escalate.
    """

    status: int
    text: str
    seconds: float
    mark: dict[str, Any]


def read_labelled(path: Path, question: str, part: str = "train") -> list[Example]:
    """Read requests with their labels: .jsonl of prompt and answer, .csv with `utterance` and `intent`, or clinc150.

    Args:
        path: The file.
        question: Put in front of each request of a file that has bare requests.
        part: Of clinc150's data_full.json; its requests outside all intents are left out.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [Example(line["prompt"], line["answer"]) for line in lines]
    if path.suffix == ".csv":
        pairs = [(row["utterance"], row["intent"]) for row in csv.DictReader(text.splitlines())]
    else:
        pairs = json.loads(text)[part]
    return [Example(f"{question}\n{said}", label.replace("_", " ")) for said, label in pairs]


class Prompted(Protocol):
    """A prompt with the answer that is right."""

    prompt: str
    answer: str


Asked = TypeVar("Asked", bound=Prompted)


def drawn(examples: list[Asked], count: int) -> list[Asked]:
    """Return `count` of the examples in an order that depends on their content alone."""
    return sorted(examples, key=lambda e: hashlib.sha256(f"{e.prompt}\0{e.answer}".encode()).hexdigest())[:count]


def write_examples(examples: list[Example], path: Path) -> Path:
    """Write examples as .jsonl."""
    lines = (json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def taught(teacher: str, student: str, task: Path, epochs: float, how: Distil, progress: Progress) -> Path:
    """Return the folder of a student that learnt a task.

    Args:
        teacher: A model.
        student: A shape to cut from it, or the teacher again.
        task: Prompts and answers.
        epochs: Over them, which is how many tokens `how` gets.
        how: Its `cross_entropy` is the weight of the answers beside the teacher's opinion; 1 is the answers alone.
        progress: Called as it goes on.
    """
    model = load(teacher)
    packed = pack_examples(read_labelled(task, ""), model.tokenizer, LENGTH)
    how = replace(how, tokens=int(epochs * packed.numel()), warm_up=0.05)

    def produce(folder: Path) -> None:
        distill(Distillation(teacher=teacher, student=student, how=how, task=task, out=folder / "made"), progress)

    inputs = {"teacher": model.origin.key, "student": student, "how": asdict(how)}
    inputs |= {"task": hashlib.sha256(task.read_bytes()).hexdigest()}
    return stage("example-taught", inputs, produce).folder / "made" / "hf"


def stored(source: str, form: str, task: list[Example], path: Path) -> Path:
    """Write a model as a GGUF file with all matrices in one format, its codes chosen on a task's prompts and answers.

    Where there is no task, they are chosen on text that the model writes itself.
    """
    model = load(source)
    if task:
        windows = pack_examples(task, model.tokenizer, LENGTH).ids[:TASK_WINDOWS]
    else:
        windows = gather_texts(model, [], 0, silent).calibration.windows[:TEXT_WINDOWS]
    model, packed, _ = quantize(model, Quantize(formats={"*": form}), windows)
    write_gguf(model, packed, path)
    return path


@contextmanager
def served(file: Path, *options: object) -> Iterator[Served]:
    """Run `pocketlm serve` on a free port while the context is open."""
    command = [sys.executable, "-m", "pocketlm", "serve", str(file), "--port", "0", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        said = process.stdout.readline()
        found = re.search(r"http://\S+", said)
        if found is None:
            raise RuntimeError(f"the server of {file} did not start (exit code {process.wait()})")
        yield Served(process, f"{found[0]}/v1")
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


async def ask_all(
    url: str, bodies: list[dict[str, Any]], at_once: int, halfway: Callable[[], None] = lambda: None
) -> list[Reply]:
    """Ask a server for chat completions, some at a time; `halfway` is called when half of them were asked."""
    gate, asked = asyncio.Semaphore(at_once), 0

    async with httpx.AsyncClient(timeout=300) as client:

        async def one(body: dict[str, Any]) -> Reply:
            nonlocal asked
            async with gate:
                asked += 1
                if asked == len(bodies) // 2:
                    halfway()
                began = time.monotonic()
                response = await client.post(f"{url}/chat/completions", json=body)
                seconds, answer = time.monotonic() - began, response.json()
            said = answer["choices"][0]["message"]["content"] if response.status_code == 200 else ""
            return Reply(response.status_code, said or "", seconds, answer.get("pocketlm", {}))

        return await asyncio.gather(*map(one, bodies))


def share(right: int, count: int) -> str:
    """Return a share in percent with its 95 % interval (Wilson)."""
    if not count:
        return "-"
    found = wilson(right, count)
    return f"{found.value:.1%} [{found.low:.1%}, {found.high:.1%}]"
