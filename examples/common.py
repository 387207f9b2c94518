"""What the examples share: reading labelled requests, teaching a small model, and talking to served ones."""

import csv
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from pocketlm.api import Distil, Distillation, distill, load
from pocketlm.cache import stage
from pocketlm.export.gguf import write_gguf
from pocketlm.model.examples import Example, pack_examples
from pocketlm.run.server.calibration import wilson
from pocketlm.steps.quantize import Quantize, quantize

LENGTH = 512  # tokens of a window that examples are packed into
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Served:
    """A running `pocketlm serve`: its process and the address of its API."""

    process: subprocess.Popen
    url: str


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


def drawn(examples: list[Example], count: int) -> list[Example]:
    """Return `count` of the examples in an order that depends on their content alone."""
    return sorted(examples, key=lambda e: hashlib.sha256(f"{e.prompt}\0{e.answer}".encode()).hexdigest())[:count]


def write_examples(examples: list[Example], path: Path) -> Path:
    """Write examples as .jsonl."""
    path.write_text("".join(json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples))
    return path


def taught(teacher: str, student: str, task: Path, epochs: float, rate: float, progress: Progress) -> Path:
    """Return the folder of a student that learnt a task from its teacher, or of the teacher itself fine-tuned.

    Args:
        teacher: A model.
        student: A shape to cut from it, or the teacher again, which then learns the answers alone.
        task: Prompts and answers.
        epochs: Over them.
        rate: The learning rate.
        progress: Called as it goes on.
    """
    alone = student == teacher
    tokens = int(epochs * pack_examples(read_labelled(task, ""), load(teacher).tokenizer, LENGTH).numel())
    how = Distil(tokens=tokens, learning_rate=rate, warm_up=0.05, evaluations=4, cross_entropy=1.0 if alone else 0.5)

    def produce(folder: Path) -> None:
        distill(Distillation(teacher=teacher, student=student, how=how, task=task, out=folder / "made"), progress)

    inputs = {"teacher": load(teacher).origin.sha256, "student": student, "how": asdict(how)}
    inputs |= {"task": hashlib.sha256(task.read_bytes()).hexdigest()}
    return stage("example-taught", inputs, produce).folder / "made" / "hf"


def stored(folder: Path, form: str, task: list[Example], path: Path) -> Path:
    """Write a taught model as a GGUF file with all matrices in one format, its codes chosen on the task's prompts."""
    model = load(str(folder))
    windows = pack_examples(task, model.tokenizer, LENGTH).ids[:32]
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


def share(right: int, count: int) -> str:
    """Return a share in percent with its 95 % interval (Wilson)."""
    if not count:
        return "-"
    low, high = wilson(right, count)
    return f"{right / count:.1%} [{low:.1%}, {high:.1%}]"
