"""Scores on tasks: by likelihood or by what a model writes, with margins of error, paired against an original."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.interval import Interval, wilson
from pocketlm.measure.quality import bootstrap
from pocketlm.measure.task_files import Item, Kind
from pocketlm.model.bare import bare


@dataclass(frozen=True)
class Outcome:
    """What a model did with an item.

    Attributes:
        right: Whether its likeliest choice, or what it wrote, is right.
        normed: The same by log-likelihood per byte of the choice; None of what it wrote.
        faults: What is wrong with what it wrote, whatever it says: `empty`, `repeats itself`.
    """

    right: bool
    normed: bool | None = None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """How a model did on a task.

    Attributes:
        count: Items.
        acc: Share of items whose right choice is the likeliest, or whose answer is the right one.
        acc_norm: The same by log-likelihood per byte of the choice; None where answers are written.
        faults: Of written answers, how many have which fault.
    """

    count: int
    acc: Interval
    acc_norm: Interval | None
    faults: dict[str, int]


@dataclass(frozen=True)
class Paired:
    """Two models on the same items.

    Attributes:
        difference: Model minus reference, bootstrap over items.
        lost: Items that only the reference has right.
        won: Items that only the model has right.
    """

    difference: Interval
    lost: int
    won: int

    @property
    def within_noise(self) -> bool:
        """Whether the interval of the difference holds 0."""
        return self.difference.low <= 0 <= self.difference.high


@dataclass(frozen=True)
class TaskResult:
    """One task file.

    Attributes:
        task: Its name.
        kind: Of its items.
        measure: What the task is judged by: `acc_norm` of multiple choice, `acc` of all else.
        scores: By model, `reference` first where there is one.
        paired: The two compared by `measure`.
    """

    task: str
    kind: Kind
    measure: str
    scores: dict[str, Score]
    paired: Paired | None


Pair = tuple[list[int], list[int]]
"""The ids of a prompt and those of what follows it."""


def joined(prompt: str, choice: str, encode: Callable[[str], list[int]]) -> Pair:
    """Cut prompt and choice into tokens together, as lm-evaluation-harness does (`_encode_pair`).

    The prompt's own count of tokens is taken off, white space at its end counting as the choice's.
    """
    before = len(encode(prompt.rstrip()))
    ids = encode(prompt + choice)
    return ids[:before], ids[before:]


Continuations = Callable[[Sequence[int], Sequence[Sequence[int]]], list[Tensor]]
"""Ids of a prompt and of its endings to logits before each token of each ending, (tokens, vocabulary)."""


def likelihoods(pairs: Sequence[Pair], read: Continuations, context: int) -> list[tuple[float, bool]]:
    """Return each ending's log-likelihood behind its prompt, in nats, and whether all its tokens are the likeliest.

    Equal prompts are read once. What does not fit the context goes from the prompt's front.

    Args:
        pairs: The ids of both.
        read: What reads them.
        context: Longest window in tokens.

    Raises:
        BadInputError: A prompt has no token, or an ending has none or does not fit the context.
    """
    endings: dict[tuple[int, ...], list[int]] = {}
    for index, (before, after) in enumerate(pairs):
        if not before or not 0 < len(after) < context:
            raise BadInputError(
                f"Cannot score a choice of {len(after)} tokens behind a prompt of {len(before)}: each needs one at "
                f"least, and {context} fit together. Shorten it"
            )
        endings.setdefault(tuple(before[-(context - len(after)) :]), []).append(index)
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    for before, indices in endings.items():
        for index, logits in zip(indices, read(before, [pairs[index][1] for index in indices]), strict=True):
            rows, after = logits.double().log_softmax(-1), torch.tensor(pairs[index][1])
            greedy = bool((rows.argmax(-1) == after).all())
            found[index] = rows.gather(1, after[:, None]).sum().item(), greedy
    return found


def chosen(item: Item, sums: Sequence[float]) -> Outcome:
    """Say whether the right choice is the likeliest: by the sums, and by the sums per byte (UTF-8, no first space)."""
    per_byte = [value / len(text.lstrip().encode()) for value, text in zip(sums, item.choices, strict=True)]
    first, normed = (max(range(len(values)), key=values.__getitem__) for values in (sums, per_byte))
    return Outcome(first == item.answer, normed == item.answer)


def matches(said: str, answer: str) -> bool:
    """Whether a model wrote the answer: its first lines, as many as the answer has, but for case, spaces and marks."""
    count = len(answer.strip().splitlines())
    return bare("\n".join(said.strip().splitlines()[:count])) == bare(answer)


def score(outcomes: Sequence[Outcome]) -> Score:
    """Summarize what a model did with each item of a task, which are of one kind."""
    count = len(outcomes)
    normed = [outcome.normed for outcome in outcomes if outcome.normed is not None]
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    return Score(
        count,
        wilson(sum(outcome.right for outcome in outcomes), count),
        wilson(sum(normed), count) if normed else None,
        {fault: faults.count(fault) for fault in dict.fromkeys(faults)},
    )


def result(task: str, kind: Kind, outcomes: dict[str, list[Outcome]]) -> TaskResult:
    """Summarize a task by model, and compare the model with the reference where there is one."""
    measure = "acc_norm" if kind == "choices" else "acc"
    hits = {
        role: [bool(outcome.normed if measure == "acc_norm" else outcome.right) for outcome in each]
        for role, each in outcomes.items()
    }
    paired = pair(hits["reference"], hits["model"]) if "reference" in hits else None
    return TaskResult(task, kind, measure, {role: score(each) for role, each in outcomes.items()}, paired)


def pair(reference: Sequence[float], model: Sequence[float]) -> Paired:
    """Compare two models on the same items, with a bootstrap over items of a fixed seed."""
    change = torch.tensor(model, dtype=torch.float64) - torch.tensor(reference, dtype=torch.float64)
    return Paired(bootstrap(change), int((change < 0).sum()), int((change > 0).sum()))
