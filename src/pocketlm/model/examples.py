"""A narrow task as prompts and answers, packed into windows in which no example sees another.

window   | prompt answer end | prompt answer end | padding |
places   | 0 1 2 ...         | 0 1 2 ...         | 0 1 ... |
learnt   |        *      *   |        *      *   |         |
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pocketlm.errors import BadInputError
from pocketlm.model.files import json_values
from pocketlm.model.learning import Lessons

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VALIDATION_SHARE = 0.1  # of the examples, which choose the checkpoint


@dataclass(frozen=True)
class Example:
    """One question of a task and the answer that is right."""

    prompt: str
    answer: str


def read_examples(path: Path, answered: bool = True) -> list[Example]:
    """Read a .jsonl file with a `prompt` and, where they are to be there, an `answer` per line.

    Raises:
        BadInputError: It cannot be read, or a line has not both.
    """
    examples = []
    for place, entry in json_values(path):
        try:
            example = Example(entry["prompt"], entry["answer"] if answered else "")
        except (KeyError, TypeError) as error:
            raise BadInputError(
                f'{place}: not an example. Write {{"prompt": "...", "answer": "..."}} on each line'
            ) from error
        texts = isinstance(example.prompt, str) and isinstance(example.answer, str)
        if not texts or not example.prompt or (answered and not example.answer):
            raise BadInputError(f"{place}: `prompt` and `answer` must be text, and not empty")
        examples.append(example)
    if not examples:
        raise BadInputError(f"{path} has no examples. Write one JSON object per line")
    return examples


def split_examples(examples: list[Example]) -> tuple[list[Example], list[Example]]:
    """Return what is learnt and what chooses the checkpoint; an example's content alone decides where it belongs."""

    def chooses(example: Example) -> bool:
        digest = hashlib.sha256(f"{example.prompt}\0{example.answer}".encode()).hexdigest()
        return int(digest[:8], 16) < VALIDATION_SHARE * 2**32

    learnt = [example for example in examples if not chooses(example)]
    choosing = [example for example in examples if chooses(example)]
    if not learnt or not choosing:  # too few to leave it to chance
        cut = max(1, len(examples) // 10)
        return examples[cut:] or examples, examples[:cut]
    return learnt, choosing


def encode_prompt(tokenizer: "PreTrainedTokenizerFast", prompt: str) -> list[int]:
    """Return a prompt's ids, as a chat's first message where the model is one for chats."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return tokenizer(prompt, verbose=False).input_ids


def encode_answer(tokenizer: "PreTrainedTokenizerFast", answer: str) -> list[int]:
    """Return an answer's ids; behind a prompt without a template a space is put in front."""
    text = answer if tokenizer.chat_template else f" {answer}"
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def pack_examples(examples: list[Example], tokenizer: "PreTrainedTokenizerFast", length: int) -> Lessons:
    """Return windows of examples, of which only answers and the ends of turns are learnt.

    Raises:
        BadInputError: An example is longer than a window, or no token ends a turn.
    """
    end = tokenizer.eos_token_id
    if end is None:
        raise BadInputError("The tokenizer has no token that ends a text, so answers cannot be learnt from examples")
    encoded = [_encoded(tokenizer, example, end) for example in examples]
    longest = max(range(len(encoded)), key=lambda index: len(encoded[index][0]))
    if len(encoded[longest][0]) > length:
        raise BadInputError(
            f"An example has {len(encoded[longest][0])} tokens where {length} fit. "
            f"Shorten the one that begins with `{examples[longest].prompt[:40]}`"
        )
    windows: list[list[tuple[list[int], list[bool]]]] = [[]]
    for each in encoded:
        if sum(len(ids) for ids, _ in windows[-1]) + len(each[0]) > length:
            windows.append([])
        windows[-1].append(each)
    columns: list[tuple[list, list, list]] = [_window(window, length, end) for window in windows]
    ids, places, counted = (torch.tensor(column) for column in zip(*columns, strict=True))
    return Lessons(ids, places, counted)


def that_fit(examples: list[Example], tokenizer: "PreTrainedTokenizerFast", length: int) -> list[Example]:
    """Return the examples that a window has room for.

    Raises:
        BadInputError: None does.
    """
    short = [example for example in examples if len(_encoded(tokenizer, example, 0)[0]) <= length]
    if not short:
        raise BadInputError(f"No answer fits into {length} tokens with its prompt. Ask for shorter ones in the prompts")
    return short


def _encoded(tokenizer: "PreTrainedTokenizerFast", example: Example, end: int) -> tuple[list[int], list[bool]]:
    """Return an example's ids, and which of them are learnt."""
    prompt = encode_prompt(tokenizer, example.prompt)
    answer = [*encode_answer(tokenizer, example.answer), end]
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def _window(
    examples: list[tuple[list[int], list[bool]]], length: int, padding: int
) -> tuple[list[int], list[int], list[bool]]:
    missing = length - sum(len(ids) for ids, _ in examples)
    parts = [*examples, ([padding] * missing, [False] * missing)]
    ids = [index for part, _ in parts for index in part]
    places = [place for part, _ in parts for place in range(len(part))]
    return ids, places, [is_learnt for _, learnt in parts for is_learnt in learnt]
