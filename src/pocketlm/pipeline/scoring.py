"""Files on tasks, in the engine: the likeliest choice or label, or the answer that a model writes.

Tasks are much text, so a file is read by its twin where the engine has no fast kernel for its weights.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

from pocketlm.errors import BadInputError
from pocketlm.export.twin import twin
from pocketlm.measure.task_files import Item, Kind, Task
from pocketlm.measure.tasks import Outcome, Pair, TaskResult, chosen, joined, likelihoods, matches, result
from pocketlm.model.examples import encode_answer, encode_prompt
from pocketlm.model.language_model import LanguageModel
from pocketlm.pipeline.stages import Progress
from pocketlm.report.answers import faults
from pocketlm.run.engine import Engine

CONTEXT = 2048  # tokens at most
WRITTEN = 64  # tokens of an answer at most
LEAST_SEEN = 30  # characters of a prompt that is looked for in a text: shorter ones may stand there by chance


def score_tasks(
    subjects: Mapping[str, tuple[Path, LanguageModel]], tasks: Sequence[Task], progress: Progress
) -> list[TaskResult]:
    """Score files on tasks, and compare `model` with `reference` on the same items.

    Args:
        subjects: By role, `reference` and `model`: a GGUF file, and the same model for its tokenizer. A reference
            is not needed.
        tasks: What to score.
        progress: Called after each item.

    Raises:
        BadInputError: An item does not fit the context.
    """
    found = {role: outcomes(*subject, tasks, partial(_said, progress, role)) for role, subject in subjects.items()}
    return [
        result(task.name, task.kind, {role: each[index] for role, each in found.items()})
        for index, task in enumerate(tasks)
    ]


def seen_items(tasks: Sequence[Task], documents: Sequence[str]) -> list[str]:
    """Return what to say of tasks whose items a model has learnt from: their prompts stand in documents as they are."""
    text, found = _one_line(" ".join(documents)) if tasks else "", []
    for task in tasks:
        prompts = [_one_line(item.prompt) for item in task.items]
        seen = sum(len(prompt) >= LEAST_SEEN and prompt in text for prompt in prompts)
        if seen:
            found.append(
                f"{seen} of {len(prompts)} items of {task.name} stand in the text that was learnt from: "
                "its score says less of what is new to the model"
            )
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())


def check_items(model: LanguageModel, tasks: Sequence[Task]) -> None:
    """Refuse items that the model has no room for, before any work.

    Raises:
        BadInputError: There is one; the message says which.
    """
    context, tokenizer = _context(model), model.tokenizer
    for task in tasks:
        # All items have the same labels, and what is too long of a prompt in front of one is left out.
        items = task.items[:1] if task.kind == "labels" else task.items
        for number, item in enumerate(items, 1):
            if task.kind == "written":
                fits = len(encode_prompt(tokenizer, item.prompt)) < context
            else:
                fits = all(before and 0 < len(after) < context for before, after in _pairs(task.kind, item, tokenizer))
            if not fits:
                raise BadInputError(
                    f"Item {number} of the task {task.name} does not fit: prompt and answer have {context:,} tokens "
                    "together. Shorten it, or leave it out"
                )


@contextmanager
def reading(path: Path, model: LanguageModel) -> Iterator[Engine]:
    """Load a GGUF file, or its twin, for tasks.

    Args:
        path: The file.
        model: The same model, for its longest context.
    """
    with twin(path) as quick, Engine(quick, context=_context(model)) as engine:
        yield engine


def _context(model: LanguageModel) -> int:
    return min(CONTEXT, model.network.config.max_position_embeddings)


def _said(progress: Progress, role: str, task: str, done: int, total: int) -> None:
    progress(f"{task}, {role}", done, total)


def outcomes(path: Path, model: LanguageModel, tasks: Sequence[Task], progress: Progress) -> list[list[Outcome]]:
    """Return what a GGUF file does with each item of each task.

    Multiple choice is read as it stands, as lm-evaluation-harness does. Prompts of labels and of written answers are
    put as `pocketlm distill --task` teaches them: as a chat's first message where the model is one for chats.

    Args:
        path: The file.
        model: The same model, for its tokenizer.
        tasks: What to do.
        progress: Called after each item.

    Raises:
        BadInputError: An item does not fit the context.
    """
    found: list[list[Outcome]] = []
    if not tasks:
        return found
    with reading(path, model) as engine:
        for task in tasks:
            found.append([])
            for item in task.items:
                found[-1].append(_outcome(task.kind, item, engine, model.tokenizer))
                progress(task.name, len(found[-1]), len(task.items))
    return found


def _outcome(kind: Kind, item: Item, engine: Engine, tokenizer: Any) -> Outcome:
    if kind == "written":
        said = write(engine, tokenizer, item.prompt)
        wrong = tuple(fault for fault in faults(said) if fault != "broken characters")  # a limit may cut one in two
        return Outcome(matches(said, str(item.answer)), faults=wrong)
    pairs = _pairs(kind, item, tokenizer)
    return chosen(item, [total for total, _ in likelihoods(pairs, engine.continuations, engine.context)])


def _pairs(kind: Kind, item: Item, tokenizer: Any) -> list[Pair]:
    return label_pairs(item, tokenizer) if kind == "labels" else choice_pairs(item, tokenizer)


def choice_pairs(item: Item, tokenizer: Any) -> list[Pair]:
    """Return the ids of a prompt and of each choice, as they stand."""
    return [
        joined(item.prompt, choice, lambda text: tokenizer(text, verbose=False).input_ids) for choice in item.choices
    ]


def label_pairs(item: Item, tokenizer: Any) -> list[Pair]:
    """Return the ids of a prompt and of each label, with the end of a turn where a label begins another.

    Without it the longer one could never be the likelier.
    """
    unclear = any(other.startswith(one) for one, other in permutations(item.choices, 2))
    end = [tokenizer.eos_token_id] if unclear and tokenizer.eos_token_id is not None else []
    prompt = encode_prompt(tokenizer, item.prompt)
    return [(prompt, encode_answer(tokenizer, choice) + end) for choice in item.choices]


def write(engine: Engine, tokenizer: Any, prompt: str) -> str:
    """Return what a model answers, the likeliest token each time, until it ends its turn or at most WRITTEN tokens.

    A model without a chat template goes on with the prompt, up to the end of the line that it begins. What does not fit
    the context goes from the prompt's front: with fewer tokens in the vocabulary a prompt has more.
    """

    def line_ends(said: list[int]) -> bool:
        return not tokenizer.chat_template and "\n" in tokenizer.decode(said).lstrip()

    ids = encode_prompt(tokenizer, prompt)[1 - engine.context :]
    said = engine.generate(ids, WRITTEN, line_ends)
    return tokenizer.decode(said, skip_special_tokens=True)
