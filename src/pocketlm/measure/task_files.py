"""Task files: JSONL in our own fields or in those of common benchmarks, read into one kind of item."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pocketlm.errors import BadInputError
from pocketlm.model.files import json_values

Kind = Literal["choices", "labels", "written"]
FIELDS = "prompt with choices and answer, with label, or with answer alone"
TASK_ITEMS = 500  # of each task at most, where a run scores its file


@dataclass(frozen=True)
class Item:
    """A question.

    Attributes:
        prompt: What an answer follows.
        choices: The texts that may follow; none where the model writes the answer itself. Of multiple choice each has
            its leading space.
        answer: The index of the right choice, or the text that is right.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | str


@dataclass(frozen=True)
class Task:
    """A file of items of one kind: multiple choice, labels that are the same for all items, or written answers."""

    name: str
    kind: Kind
    items: tuple[Item, ...]


def read_task(path: Path, limit: int | None = None) -> Task:
    """Read a task: JSONL of objects that all have the same fields.

    - `prompt`, `choices`, `answer` (index from 0, or the choice itself): multiple choice. A choice that begins with no
      white space, behind a prompt that ends with none, gets a space in front.
    - `prompt`, `label`: classification; the choices are all labels of the file.
    - `prompt`, `answer` (a text): the model writes, and must write exactly that.
    - `query`, `choices`, `gold`, as llm-foundry lays out ARC, PIQA, OpenBookQA and COPA: multiple choice. A query that
      begins with `Question:` is followed by a line with `Answer:`.
    - `activity_label`, `ctx`, `endings`, `label`: HellaSwag's own, cleaned as lm-evaluation-harness does
      (`hellaswag/utils.py`).

    Args:
        path: The file.
        limit: Items to take from the front; labels are still those of the whole file.

    Raises:
        BadInputError: The file cannot be read, or a row is no such object; the message names the line.
    """
    rows = [(place, _row(entry, place)) for place, entry in json_values(path)]
    if not rows:
        raise BadInputError(f"The task {path} has no items. Write one JSON object a line: {FIELDS}")
    kind = _kind(rows[0][1])
    for place, row in rows:
        if _kind(row) != kind:
            raise BadInputError(f"{place}: the rows before it have other fields. Give each kind of item its own file")
    labels = tuple(sorted({row["label"] for _, row in rows})) if kind == "labels" else ()
    if len(labels) == 1:
        raise BadInputError(f"The task {path} has a single label, {labels[0]!r}: every model would be right")
    return Task(path.stem, kind, tuple(_item(row, labels, place) for place, row in rows[:limit]))


def _row(row: Any, place: str) -> dict[str, Any]:
    """Return the object of a line in our own fields."""
    match row:
        case {"query": str(query), "choices": _, "gold": answer}:
            ending = "\nAnswer:" if query.startswith("Question:") else ""
            row = {"prompt": query.rstrip() + ending, "choices": row["choices"], "answer": answer}
        case {"ctx": str(context), "endings": [*endings], "label": answer}:
            title = f"{row['activity_label']}: " if row.get("activity_label") else ""
            match row:  # the second half of a context begins a sentence of its own
                case {"ctx_a": str(first), "ctx_b": str(second)}:
                    context = f"{first} {second.capitalize()}"
            choices = [_plain(ending) if isinstance(ending, str) else ending for ending in endings]
            answer = int(answer) if str(answer).isdecimal() else answer
            row = {"prompt": _plain(title + context), "choices": choices, "answer": answer}
    if not isinstance(row, dict) or "prompt" not in row or not {"label", "answer"} & row.keys():
        raise BadInputError(f"{place}: expected an object of {FIELDS}")
    prompt, label = row["prompt"], row.get("label", " ")
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInputError(f"{place}: `prompt` must be a text that is not empty")
    if _kind(row) == "labels" and not (isinstance(label, str) and label.strip()):
        raise BadInputError(f"{place}: `label` must be a text that is not empty")
    return row


def _plain(text: str) -> str:
    """Return a text of HellaSwag without the marks that WikiHow left in it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def _kind(row: dict[str, Any]) -> Kind:
    return "choices" if "choices" in row else "labels" if "label" in row else "written"


def _item(row: dict[str, Any], labels: tuple[str, ...], place: str) -> Item:
    prompt, choices, answer = row["prompt"], row.get("choices"), row.get("answer")
    if labels:
        return Item(prompt, labels, labels.index(row["label"]))
    if choices is None:
        if not isinstance(answer, str) or not answer.strip():
            raise BadInputError(f"{place}: `answer` must be a text that is not empty, or an index beside `choices`")
        return Item(prompt, (), answer)
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not texts or len(set(choices)) < 2:
        raise BadInputError(f"{place}: `choices` must be two or more texts, none empty and not all the same")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise BadInputError(f"{place}: `answer` must be one of the choices or its index, from 0 to {len(choices) - 1}")
    if choices.count(choices[answer]) > 1:  # of the wrong ones, ARC repeats some
        raise BadInputError(f"{place}: the right choice, {choices[answer][:40]!r}, is there more than once")
    spaced = (choice if prompt[-1].isspace() or choice[0].isspace() else f" {choice}" for choice in choices)
    return Item(prompt, tuple(spaced), answer)
