"""A tokenizer with fewer tokens: which ones a text needs most, and the tokenizer that has only those.

Works on the JSON of a fast tokenizer (`tokenizer.backend_tokenizer.to_str()`), here called its state.

Every string must still come back as it did. So whatever spells any string stays: the 256 bytes, as characters of
byte-level BPE or as `<0x00>` to `<0xFF>`; where a tokenizer has neither, every single character.

A token is made of others, which are made of others in turn, and a merged one can only be formed while all of its
parts are there. Removing a token that nothing kept is made of splits each of its occurrences into its parts, so it
costs a token or more for each, and the parts inherit its count. Removing the cheapest such token again and again
therefore keeps the tokens with the largest counts *with* all that they are part of: a sort, no search.
"""

import copy
import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from pocketlm.errors import BadInputError
from pocketlm.model.gguf_tokenizer import BYTE, merge_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# What stands behind a text that does not say: ids are nearly in the order of frequency in the text that the tokenizer
# was made from, and Zipf's law turns ranks into counts. The prior weighs as much as the text itself. With SmolLM2's
# tokenizer cut to a third on 4.5 MB of English web text and books, it makes 1.4 % fewer tokens of Wikipedia and as many
# of text like the calibration's.
PRIOR = 1.0
_CHUNK = 256  # documents that are cut at once
_ALWAYS = "0123456789\u2581"  # digits, and SentencePiece's space

State = dict[str, Any]
Parts = Callable[[str], tuple[str, ...]]


@dataclass(frozen=True)
class Choice:
    """Which tokens to keep.

    Attributes:
        kept: Their ids, ascending; their places are the new ids.
        least: How many tokens must stay whatever the text is.
        counts: How often each id occurs in the text, as the whole vocabulary cuts it.
    """

    kept: list[int]
    least: int
    counts: Counter[int]


def tokens_by_id(state: State) -> dict[int, str]:
    """Return every token of a state, added ones included, in the order of the ids."""
    vocabulary = state["model"]["vocab"]
    ids = (
        vocabulary.items() if isinstance(vocabulary, dict) else ((token, i) for i, (token, _) in enumerate(vocabulary))
    )
    named = {index: token for token, index in ids} | {token["id"]: token["content"] for token in state["added_tokens"]}
    return dict(sorted(named.items()))


def parts_of_tokens(state: State) -> Parts:
    """Return a function from a token to the tokens that it is made of and that must stay with it.

    In BPE these are the two that the last merge joins when the token's own characters are merged in order. As those
    very merges stay, in the same order, the token is formed in the trimmed tokenizer too. In Unigram they are the
    shorter tokens that its characters are cut into best.

    Raises:
        BadInputError: The tokenizer is neither BPE nor Unigram, or marks the parts of words.
    """
    model = state["model"]
    if model["type"] == "Unigram":
        scores = dict(map(tuple, model["vocab"]))
        return cache(lambda token: _best_cut(token, scores))
    if model["type"] != "BPE" or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        raise BadInputError(
            f"The vocabulary of this {model['type']} tokenizer cannot be trimmed: byte-level BPE, SentencePiece's BPE "
            "and Unigram can. Leave the step `trim_vocabulary` out"
        )
    ranks = {pair: rank for rank, pair in reversed(list(enumerate(map(tuple, merge_pairs(state)))))}
    forming: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    for pair in ranks:
        forming["".join(pair)].append(pair)

    @cache
    def parts(token: str) -> tuple[str, ...]:
        pairs = forming.get(token, [])
        if len(pairs) < 2:
            return pairs[0] if pairs else ()
        last = _merged(token, ranks)
        return last if last in pairs else pairs[-1]

    return parts


def _merged(token: str, ranks: dict[tuple[str, ...], int]) -> tuple[str, ...]:
    """Merge a token's characters, best rank first, until two are left or nothing more can be merged."""
    symbols = list(token)
    while len(symbols) > 2:
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(symbols)))
        if rank == len(ranks):
            break
        symbols[place : place + 2] = ["".join(symbols[place : place + 2])]
    return tuple(symbols)


def _best_cut(token: str, scores: dict[str, float]) -> tuple[str, ...]:
    """Return the pieces of a Unigram token with the largest sum of scores, the whole token not being one of them."""
    best: list[tuple[float, tuple[str, ...]]] = [(0.0, ())]
    for end in range(1, len(token) + 1):
        cuts = [
            (best[start][0] + scores[token[start:end]], (*best[start][1], token[start:end]))
            for start in range(end)
            if token[start:end] in scores and (start, end) != (0, len(token))
        ]
        best.append(max(cuts, default=(-math.inf, ())))
    return best[-1][1]


def closure(tokens: Iterable[str], parts: Parts) -> set[str]:
    """Return tokens with all that they are made of."""
    closed: set[str] = set()
    waiting = list(tokens)
    while waiting:
        token = waiting.pop()
        if token not in closed:
            closed.add(token)
            waiting += parts(token)
    return closed


def indispensable(state: State) -> set[str]:
    """Return the tokens without which some string would be lost or read otherwise: bytes, characters, added ones."""
    model, tokens = state["model"], set(tokens_by_id(state).values())
    kept = {token["content"] for token in state["added_tokens"]} | {model.get("unk_token")}
    if model["type"] == "Unigram" and model["unk_id"] is not None:
        kept.add(model["vocab"][model["unk_id"]][0])
    if model.get("byte_fallback"):
        kept |= {token for token in tokens if BYTE.fullmatch(token)} | set(_ALWAYS)
    else:
        # Byte-level BPE has its 256 bytes as characters. A character that occurs in longer tokens only keeps those.
        single = {token for token in tokens if len(token) == 1}
        kept |= single | (set() if is_byte_level(state) else {token for token in tokens if set(token) - single})
    return kept & tokens


def is_byte_level(state: State) -> bool:
    """Whether text becomes bytes, written as characters, before it is cut."""
    return '"ByteLevel"' in json.dumps([state["normalizer"], state["pre_tokenizer"]])


def choose_tokens(
    state: State, documents: Sequence[str], needed: Collection[int], size: int, rows: int | None = None
) -> Choice:
    """Choose the `size` tokens to keep: those needed, then those that the text needs most.

    Args:
        state: The tokenizer.
        documents: The text.
        needed: Ids that must stay besides the indispensable ones; those without a token are ignored.
        size: How many tokens stay.
        rows: Of the embedding; tokens beyond cannot be kept. As many as there are tokens where None.

    Raises:
        BadInputError: `size` is more than there are, or fewer than the least that can be kept.
    """
    names = {index: token for index, token in tokens_by_id(state).items() if rows is None or index < rows}
    ids = {token: index for index, token in names.items()}
    parts = parts_of_tokens(state)
    always = indispensable(state) | {names[index] for index in needed if index in names}
    least = closure(always & set(ids), parts)
    if not len(least) <= size <= len(ids):
        raise BadInputError(
            f"Cannot trim the vocabulary to {size:,} tokens: it has {len(ids):,}, and {len(least):,} must stay (bytes, "
            f"special tokens, what the chat template says). Give {len(least):,} to {len(ids):,}"
        )
    counts = count_tokens(state, documents)
    wholes = with_wholes(Counter({names[index]: count for index, count in counts.items() if index in names}), parts)
    prior = PRIOR * counts.total() / math.log(len(ids) + 1)
    order = sorted(ids, key=lambda token: (-wholes[token] - prior / (ids[token] + 1), ids[token]))
    kept = sorted(ids[token] for token in _fill(order, least, parts, size))
    return Choice(kept, len(least), counts)


def _fill(order: Iterable[str], least: Collection[str], parts: Parts, size: int) -> set[str]:
    """Return `least` and the first tokens of `order`, each with its parts, `size` in all."""
    chosen = set(least)
    for token in order:
        missing = closure([token], parts) - chosen
        if len(chosen) + len(missing) <= size:
            chosen |= missing
    return chosen


def count_tokens(state: State, documents: Sequence[str]) -> Counter[int]:
    """Return how often each id occurs in the text."""
    tokenizer = Tokenizer.from_str(json.dumps(state))
    counts = Counter[int]()
    for start in range(0, len(documents), _CHUNK):
        batch = list(documents[start : start + _CHUNK])
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def with_wholes(counts: Counter[str], parts: Parts) -> Counter[str]:
    """Return how often each token occurs, alone or inside a token that it is part of."""
    total = Counter(counts)
    by_length: dict[int, set[str]] = defaultdict(set)
    for token in total:
        by_length[len(token)].add(token)
    for length in range(max(by_length, default=0), 1, -1):
        for token in by_length[length]:
            for part in parts(token):  # shorter, so its turn comes later
                total[part] += total[token]
                by_length[len(part)].add(part)
    return total


def trimmed_state(state: State, kept: Sequence[int]) -> State:
    """Return the state of a tokenizer that has only the tokens `kept`, ids ascending, numbered from 0.

    A merge stays where both parts and the whole do; the order of merges and all scores are as they were.

    Raises:
        BadInputError: Something in the tokenizer names tokens in a way that is not known here.
    """
    names = tokens_by_id(state)
    place = {index: position for position, index in enumerate(kept)}
    staying = {names[index] for index in kept}
    cut = copy.deepcopy(state)
    model = cut["model"]
    if model["type"] == "BPE":
        model["vocab"] = {token: place[index] for token, index in model["vocab"].items() if index in place}
        model["merges"] = [
            list(pair) for pair in merge_pairs(state) if staying.issuperset(pair) and "".join(pair) in staying
        ]
    else:
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in place]
        model["unk_id"] = place.get(model["unk_id"])
    cut["added_tokens"] = [token | {"id": place[token["id"]]} for token in cut["added_tokens"] if token["id"] in place]
    if cut["padding"]:
        cut["padding"]["pad_id"] = place.get(cut["padding"]["pad_id"], 0)
    _renumber_processor(cut["post_processor"], place)
    return cut


def _renumber_processor(processor: State | None, place: dict[int, int]) -> None:
    """Bring the ids in a post-processor, which puts start and end tokens around a text, in line."""
    kind = processor["type"] if processor else "ByteLevel"
    if kind == "Sequence":
        for step in processor["processors"]:
            _renumber_processor(step, place)
    elif kind == "TemplateProcessing":
        for entry in processor["special_tokens"].values():
            entry["ids"] = [place[index] for index in entry["ids"]]
    elif kind != "ByteLevel":
        raise BadInputError(
            f"The tokenizer's post-processor `{kind}` is not known to vocabulary trimming: "
            "leave the step `trim_vocabulary` out"
        )


def spellings(before: "PreTrainedTokenizerFast", after: "PreTrainedTokenizerFast") -> list[tuple[int, ...]]:
    """Return how a trimmed tokenizer spells each token of the one that it was cut from: ids by id.

    Args:
        before: The tokenizer with all tokens.
        after: What `trim_tokenizer` made of it.
    """
    state = json.loads(before.backend_tokenizer.to_str())
    parts, place = parts_of_tokens(state), after.get_vocab()

    @cache
    def spelled(token: str) -> tuple[int, ...]:
        if token in place:
            return (place[token],)
        made_of = parts(token) or (tuple(token) if len(token) > 1 else byte_tokens(token))
        return tuple(piece for part in made_of for piece in spelled(part))

    return [spelled(token) for token in tokens_by_id(state).values()]


def byte_tokens(character: str) -> tuple[str, ...]:
    """Return SentencePiece's tokens of a character's bytes, which never go, for where it has no token itself."""
    return tuple(f"<0x{byte:02X}>" for byte in character.encode())


def trim_tokenizer(tokenizer: "PreTrainedTokenizerFast", kept: Sequence[int]) -> "PreTrainedTokenizerFast":
    """Return a tokenizer that has only the tokens `kept`, ids ascending, numbered from 0; all else is as it was.

    Raises:
        BadInputError: Something in the tokenizer names tokens in a way that is not known here.
    """
    from transformers import PreTrainedTokenizerFast

    state = json.loads(tokenizer.backend_tokenizer.to_str())
    names = tokens_by_id(state)
    cut = json.dumps(trimmed_state(state, kept), ensure_ascii=False)
    # A tokenizer's other settings are its own business: it writes them and reads them back beside the new state.
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(cut, encoding="utf-8")
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        settings.pop("added_tokens_decoder", None)  # old ids; tokenizer.json has the new ones
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
        trimmed = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    wrong = [names[old] for new, old in enumerate(kept) if trimmed.convert_tokens_to_ids(names[old]) != new]
    if wrong or len(trimmed) != len(kept):
        raise BadInputError(
            f"The tokenizer numbers its tokens in an order that does not survive trimming (such as `{wrong[0]}`): "
            "leave the step `trim_vocabulary` out"
            if wrong
            else "The tokenizer adds tokens of its own when it is loaded: leave the step `trim_vocabulary` out"
        )
    return trimmed
