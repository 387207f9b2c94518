"""What a server says of its answers' tokens, as targets for a student that cuts the answers alike.

answer     The       Ġcapital   Ġis      <end>
said       The 0.9   Ġcapital 0.7 ...             likeliest tokens, the rest as one
learnt     the same                       1.0     where nothing is known: the token itself, as in cross-entropy

Probabilities are learnt only where the student cuts an answer into the very tokens that the server named.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from pocketlm.model.examples import Example, encode_answer
from pocketlm.model.learning import Lessons
from pocketlm.model.targets import Targets, write_opinions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Opinion = list[tuple[str, list[tuple[str, float]]]]
"""For each token of an answer its text, and the texts of the likeliest tokens there with their log-probabilities."""


def ids_by_text(tokenizer: "PreTrainedTokenizerFast") -> dict[str, int]:
    """Return the id of every text that a token alone writes behind others.

    Pieces of characters write none; no text at all is the end of a turn, as llama.cpp's server has it.
    """
    front = tokenizer("a", add_special_tokens=False).input_ids
    texts = tokenizer.batch_decode([[*front, index] for index in range(len(tokenizer))])
    begin = len(tokenizer.decode(front))
    found = {"": tokenizer.eos_token_id}
    for index, text in enumerate(texts):
        if text[begin:] and "\ufffd" not in text:
            found.setdefault(text[begin:], index)
    return found


def understood(
    answer: str, opinion: Opinion, tokenizer: "PreTrainedTokenizerFast", ids: Mapping[str, int]
) -> list[dict[int, float]] | None:
    """Return the probabilities by id at each token of an answer, and at its end where the server said them.

    None where the student cuts it into other tokens.
    """
    named, own = [ids.get(text) for text, _ in opinion], encode_answer(tokenizer, answer)
    if named not in (own, [*own, tokenizer.eos_token_id]):
        return None
    known = [{ids[text]: math.exp(log) for text, log in likeliest if text in ids} for _, likeliest in opinion]
    sums = [max(1.0, sum(each.values())) for each in known]  # a server may round
    return [{index: value / whole for index, value in each.items()} for each, whole in zip(known, sums, strict=True)]


def keep_opinions(
    lessons: Lessons,
    examples: list[Example],
    opinions: Mapping[str, Opinion],
    tokenizer: "PreTrainedTokenizerFast",
    folder: Path,
) -> tuple[Targets, int]:
    """Write what a server said of its answers' tokens, for lessons that were packed from them.

    Args:
        lessons: From `pack_examples`.
        examples: The same examples, in order.
        opinions: By prompt; examples without one, or whose tokens are others, are learnt as plain text.
        tokenizer: The student's.
        folder: To fill.

    Returns:
        The targets, and of how many examples the server's probabilities are learnt.
    """
    ids, spoken, used = ids_by_text(tokenizer), [], 0
    for example in examples:
        plain = [{index: 1.0} for index in (*encode_answer(tokenizer, example.answer), tokenizer.eos_token_id)]
        said = understood(example.answer, opinions.get(example.prompt, []), tokenizer, ids) or []
        used += bool(said)
        spoken += said + plain[len(said) :]
    windows = [_placed(counted, spoken) for counted in lessons.counted]
    return write_opinions(windows, folder, len(tokenizer)), used


def _placed(counted: Tensor, spoken: list[dict[int, float]]) -> list[dict[int, float]]:
    """Return a window's distributions by position: each stands in front of its token. They are taken from `spoken`."""
    window: list[dict[int, float]] = [{} for _ in counted]
    for place in counted.nonzero().flatten().tolist():
        window[place - 1] = spoken.pop(0)
    return window
