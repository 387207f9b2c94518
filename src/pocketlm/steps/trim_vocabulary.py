"""Trim the vocabulary: remove tokens that a text hardly needs; what they spelled is spelled with others."""

import copy
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch

from pocketlm.errors import BadInputError
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.surgery import keep_tokens, renumber_tokens, special_ids
from pocketlm.model.vocabulary import Choice, choose_tokens, count_tokens, trim_tokenizer
from pocketlm.steps.report import StepReport

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, kw_only=True)
class TrimVocabulary:
    """How many tokens stay."""

    step: Literal["trim_vocabulary"] = "trim_vocabulary"
    size: int
    """Tokens kept, which are also the rows of the embedding and the head."""


def trim_vocabulary(
    model: LanguageModel, config: TrimVocabulary, documents: Sequence[str]
) -> tuple[LanguageModel, StepReport]:
    """Keep the `config.size` tokens that `documents` need most; rows of the embedding and the head are copied.

    Args:
        model: Changed in place; the result has another tokenizer.
        config: The size.
        documents: Text of the kind that the model will be used on.

    Raises:
        BadInputError: The size is out of range, or the tokenizer is of a kind that cannot be trimmed.
    """
    choice = choose(model, config, documents)
    trimmed = replace(model, tokenizer=trim_tokenizer(model.tokenizer, choice.kept))
    keep_tokens(model.network, choice.kept)
    return trimmed, _report(model.tokenizer, trimmed.tokenizer, choice, documents)


def outline(model: LanguageModel, config: TrimVocabulary, documents: Sequence[str]) -> LanguageModel:
    """Return what `trim_vocabulary` would make, without weights: enough to predict the bytes of its file.

    Raises:
        BadInputError: As for `trim_vocabulary`.
    """
    from transformers import AutoModelForCausalLM

    kept = choose(model, config, documents).kept
    shape, generation = copy.deepcopy(model.network.config), copy.deepcopy(model.network.generation_config)
    renumber_tokens(shape, kept)
    renumber_tokens(generation, kept)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(shape)
    network.generation_config = generation
    return replace(model, network=network, tokenizer=trim_tokenizer(model.tokenizer, kept))


def choose(model: LanguageModel, config: TrimVocabulary, documents: Sequence[str]) -> Choice:
    """Choose the tokens to keep.

    Raises:
        BadInputError: As for `trim_vocabulary`.
    """
    if not any(documents):
        raise BadInputError("trim_vocabulary needs text to choose the tokens by. Give a file with text")
    state = json.loads(model.tokenizer.backend_tokenizer.to_str())
    return choose_tokens(state, documents, needed_ids(model), config.size, model.network.config.vocab_size)


def needed_ids(model: LanguageModel) -> set[int]:
    """Return the ids that must stay: what configs and tokenizer call special, and what a chat is framed with."""
    network, tokenizer = model.network, model.tokenizer
    stated = [*special_ids(network.config).values(), *special_ids(network.generation_config).values()]
    ids = {index for group in stated for index in group} | set(tokenizer.all_special_ids)
    return ids | {index for chat in _chats(tokenizer) for index in tokenizer(chat, add_special_tokens=False).input_ids}


def _chats(tokenizer: "PreTrainedTokenizerFast") -> list[str]:
    """Return what the chat template says around messages of digits: with and without a system's turn."""
    turns = [{"role": role, "content": "0"} for role in ("system", "user", "assistant", "user")]
    chats = []
    for messages in (turns, turns[1:]) if tokenizer.chat_template else ():
        try:
            chats.append(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception:  # templates raise what they like, such as for a role that the model does not know
            continue
    return chats


def _report(
    before: "PreTrainedTokenizerFast", after: "PreTrainedTokenizerFast", choice: Choice, documents: Sequence[str]
) -> StepReport:
    counts = {"before": choice.counts, "after": _recount(after, documents)}
    tokens = {when: count.total() for when, count in counts.items()}
    words = sum(len(document.split()) for document in documents) or 1
    size = sum(len(document.encode()) for document in documents)
    kept = set(choice.kept)
    covered = sum(count for index, count in choice.counts.items() if index in kept) / tokens["before"]
    summary = (
        f"kept {len(kept):,} of {len(before):,} tokens, which are {covered:.2%} of the text's; "
        f"it takes {tokens['after'] / tokens['before'] - 1:.1%} more tokens now"
    )
    details = {
        "kept": len(kept),
        "removed": len(before) - len(kept),
        "least": choice.least,
        "coverage": round(covered, 6),
        "tokens_per_word": {when: round(count / words, 4) for when, count in tokens.items()},
        "bytes_per_token": {when: round(size / count, 4) for when, count in tokens.items()},
    }
    return StepReport("trim_vocabulary", summary, details)


def _recount(tokenizer: "PreTrainedTokenizerFast", documents: Sequence[str]) -> Counter[int]:
    return count_tokens(json.loads(tokenizer.backend_tokenizer.to_str()), documents)
