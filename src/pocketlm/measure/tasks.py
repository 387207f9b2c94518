"""Tasks: multiple choice by likelihood, with margins of error, paired against an original."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pocketlm.errors import BadInputError

Z = 1.959964  # of a 95 % interval
RESAMPLES = 2000


@dataclass(frozen=True)
class Item:
    """A prompt, the texts that may follow it (each with its leading space), and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class Share:
    """A share with its 95 % interval; of a difference, the interval of the difference."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """How a model did on a task.

    Attributes:
        count: Items.
        acc: Share of items whose right choice is the likeliest.
        acc_norm: The same by log-likelihood per byte of the choice.
    """

    count: int
    acc: Share
    acc_norm: Share


@dataclass(frozen=True)
class Paired:
    """Two models on the same items, by `acc_norm`.

    Attributes:
        difference: Model minus reference, bootstrap over items.
        lost: Items that only the reference has right.
        won: Items that only the model has right.
    """

    difference: Share
    lost: int
    won: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval of the difference holds 0."""
        return self.difference.low <= 0 <= self.difference.high


@dataclass(frozen=True)
class TaskResult:
    """One task file: scores by model (`reference` first where there is one), and the pair compared."""

    task: str
    scores: dict[str, Score]
    paired: Paired | None


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read a task: JSONL of objects with `prompt`, `choices` and `answer` (index from 0, or the choice itself).

    A choice that begins with no white space, behind a prompt that ends with none, gets a space in front.

    Raises:
        BadInputError: The file cannot be read, or a row is no such object; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInputError(f"Cannot read the task {path}: {problem}") from problem
    items: list[Item] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            items.append(_item(line, f"{path}, line {number}"))
        if len(items) == limit:
            break
    if not items:
        raise BadInputError(f"The task {path} has no items. Write one JSON object a line: prompt, choices, answer")
    return items


def _item(line: str, place: str) -> Item:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise BadInputError(f"{place}: no JSON ({problem})") from problem
    if not isinstance(row, dict):
        raise BadInputError(f"{place}: expected an object with prompt, choices and answer")
    prompt, choices, answer = (row.get(key) for key in ("prompt", "choices", "answer"))
    if not isinstance(prompt, str) or not prompt.strip():
        raise BadInputError(f"{place}: `prompt` must be a text that is not empty")
    texts = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    if not texts or len(choices) < 2 or len(set(choices)) < len(choices):
        raise BadInputError(f"{place}: `choices` must be two or more different texts, none empty")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise BadInputError(f"{place}: `answer` must be one of the choices or its index, from 0 to {len(choices) - 1}")
    spaced = (choice if prompt[-1].isspace() or choice[0].isspace() else f" {choice}" for choice in choices)
    return Item(prompt, tuple(spaced), answer)


def likelihoods(
    item: Item, encode: Callable[[str], list[int]], logits: Callable[[Sequence[int]], Tensor], context: int
) -> list[float]:
    """Return the log-likelihood of each choice behind the prompt, in nats.

    Prompt and choice are cut into tokens together and the prompt's own count is taken off, white space at the
    prompt's end counting as the choice's, as lm-evaluation-harness does (`_encode_pair`). What does not fit the
    context goes from the front.

    Args:
        item: The item.
        encode: Text to token ids.
        logits: Token ids to (tokens, vocabulary).
        context: Longest window in tokens.

    Raises:
        BadInputError: The prompt has no token, or a choice alone does not fit the context.
    """
    prompt = item.prompt.rstrip()
    before = len(encode(prompt))
    found = []
    for choice in item.choices:
        ids = encode(item.prompt + choice)
        scored = len(ids) - before
        if before == 0 or not 0 < scored < context:
            raise BadInputError(
                f"Cannot score the choice {choice[:40]!r} behind {prompt[:40]!r}: "
                f"it takes {scored} tokens, and {context} fit with the prompt. Shorten it"
            )
        ids = ids[-context:]
        rows = logits(ids[:-1])[-scored:].double().log_softmax(-1)
        found.append(rows.gather(1, torch.tensor(ids[-scored:])[:, None]).sum().item())
    return found


def correct(item: Item, sums: Sequence[float]) -> tuple[bool, bool]:
    """Say whether the right choice is the likeliest: by the sums, and by the sums per byte (UTF-8, no first space)."""
    per_byte = [value / len(text.lstrip().encode()) for value, text in zip(sums, item.choices, strict=True)]
    first, normed = (max(range(len(values)), key=values.__getitem__) for values in (sums, per_byte))
    return first == item.answer, normed == item.answer


def wilson(hits: int, count: int) -> Share:
    """Return a share with its Wilson interval (Wilson 1927)."""
    share, spread = hits / count, Z * Z / count
    centre = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / count + spread / count / 4) / (1 + spread)
    return Share(share, min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half)))


def score(hits: Sequence[tuple[bool, bool]]) -> Score:
    """Summarize what `correct` said of each item."""
    plain, normed = (wilson(sum(column), len(hits)) for column in zip(*hits, strict=True))
    return Score(len(hits), plain, normed)


def pair(reference: Sequence[bool], model: Sequence[bool]) -> Paired:
    """Compare two models on the same items, with a bootstrap over items of a fixed seed."""
    change = torch.tensor(model, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    draws = torch.randint(len(change), (RESAMPLES, len(change)), generator=torch.Generator().manual_seed(0))
    low, high = change[draws].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    value = change.mean().item()
    difference = Share(value, min(value, low), max(value, high))
    return Paired(difference, int((change < 0).sum()), int((change > 0).sum()))
