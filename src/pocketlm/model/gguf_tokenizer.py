"""Tokenizers between GGUF fields and `tokenizers`, such that llama.cpp and transformers cut text alike.

Two kinds exist in the families here. Byte-level BPE (`tokenizer.ggml.model` = `gpt2`) first cuts text into
words by regular expressions, which GGUF only names: `PRE_TOKENIZERS` says what each name means.
SentencePiece-like BPE (`llama`) has no words: spaces become U+2581, pairs merge by the score of the token
that they form, and what is left falls back to bytes.
"""

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from pocketlm.errors import BadInputError
from pocketlm.model.gguf_file import Field, GgufFile, field

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPACE = "\u2581"
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_PADDING = re.compile(r"\[PAD\d+\]")


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut into words: each expression isolates its matches inside the pieces of the one before.

    `ignore_merges`: a word that is a token as a whole is that token, whatever the merges say.
    """

    names: tuple[str, ...]
    expressions: tuple[str, ...]
    ignore_merges: bool = False


# llama.cpp compares ASCII letters only; the (?i:...) of many tokenizer.json files takes U+017F for an s, too.
_ENDINGS = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_ENDINGS_ANY_CASE = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT = r"\p{N}"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

# The first name is the one written. Source: the pre-tokenizer types of llama.cpp's src/llama-vocab.cpp.
PRE_TOKENIZERS = (
    PreTokenizer(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4", "trillion", "granite-docling"), (_GPT2,)),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (_DIGIT, _GPT2),
    ),
    PreTokenizer(
        ("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2"),
        (_WORDS % "{1,3}",),
        ignore_merges=True,
    ),
    PreTokenizer(("dbrx", "smaug-bpe"), (_WORDS % "{1,3}",)),
    PreTokenizer(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "solar-open"), (_WORDS % "",)),
    PreTokenizer(
        ("default",),
        (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    ),
)
_ADDS_START = {"llama-bpe"}  # llama.cpp puts a start token in front unless the file says otherwise

# Tokens on which llama.cpp ends a turn because of their text alone.
_KNOWN_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
    "</s>", "<|eom_id|>", "<EOT>", "<|end_of_text|>", "<end_of_utterance>", "<eos>",
}  # fmt: skip
_END_KEYS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}


# ---- GGUF to tokenizers ----


def tokenizer_from_gguf(file: GgufFile) -> "PreTrainedTokenizerFast":
    """Build the tokenizer that llama.cpp would use for this file.

    Raises:
        BadInputError: The file has no tokenizer, or one of a kind that cannot be rebuilt exactly.
    """
    from transformers import PreTrainedTokenizerFast

    kind, tokens = file.get("tokenizer.ggml.model"), file.get("tokenizer.ggml.tokens")
    if not tokens:
        raise BadInputError(f"{file.path} has no tokenizer: export the model again together with its tokenizer")
    types = file.get("tokenizer.ggml.token_type") or [TokenType.NORMAL] * len(tokens)
    used = len(tokens)
    while types[used - 1] == TokenType.UNUSED and _PADDING.fullmatch(tokens[used - 1]):
        used -= 1  # rows of the embedding beyond the vocabulary
    vocabulary = {token: index for index, token in enumerate(tokens[:used])}
    if len(vocabulary) != used:
        raise BadInputError(f"{file.path} has the same token twice in its vocabulary: the file is damaged")
    try:
        if kind == "gpt2":
            core, adds_start = _byte_level(file, vocabulary)
        elif kind == "llama":
            core, adds_start = _sentencepiece(file, vocabulary, types), True
        else:
            raise BadInputError(
                f"{file.path} has a tokenizer of kind `{kind}`: byte-level BPE (`gpt2`) and "
                "SentencePiece BPE (`llama`) can be read"
            )
    except BadInputError:
        raise
    except Exception as error:  # `tokenizers` raises bare exceptions, such as for a merge of unknown tokens
        raise BadInputError(f"The tokenizer of {file.path} is damaged: {error}") from error
    special = (TokenType.CONTROL, TokenType.UNKNOWN)
    core.add_special_tokens(
        [AddedToken(tokens[i], normalized=False, special=True) for i in range(used) if types[i] in special]
    )
    core.add_tokens(
        [
            AddedToken(tokens[i], normalized=False, special=False)
            for i in range(used)
            if types[i] == TokenType.USER_DEFINED
        ]
    )
    ids = {role: file.get(key) for role, key in _ROLES.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        add_bos_token=file.get("tokenizer.ggml.add_bos_token", adds_start),
        add_eos_token=file.get("tokenizer.ggml.add_eos_token", False),
        chat_template=file.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **{role: tokens[index] for role, index in ids.items() if index is not None and index < used},
    )


def end_ids(file: GgufFile) -> list[int]:
    """Return the ids that end a turn, as the file states them."""
    return list(dict.fromkeys(file.get(key) for key in _END_KEYS if file.get(key) is not None))


def _byte_level(file: GgufFile, vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    name = file.get("tokenizer.ggml.pre", "default")
    found = [entry for entry in PRE_TOKENIZERS if name in entry.names]
    if not found:
        known = ", ".join(entry.names[0] for entry in PRE_TOKENIZERS)
        raise BadInputError(
            f"{file.path} cuts words by the rule `{name}` (tokenizer.ggml.pre), which is not known here "
            f"({known} are): load the original Hugging Face folder instead"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in file.get("tokenizer.ggml.merges", [])]
    core = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=found[0].ignore_merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(expression), "isolated") for expression in found[0].expressions]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    return core, found[0].names[0] in _ADDS_START


def _sentencepiece(file: GgufFile, vocabulary: dict[str, int], types: list[int]) -> Tokenizer:
    scores = file.get("tokenizer.ggml.scores")
    if not scores:
        raise BadInputError(f"{file.path} has a SentencePiece tokenizer without scores: the file is damaged")
    normal = {token: scores[i] for token, i in vocabulary.items() if types[i] == TokenType.NORMAL}
    unknown = next((token for token, i in vocabulary.items() if types[i] == TokenType.UNKNOWN), None)
    core = Tokenizer(
        models.BPE(vocabulary, merges_by_score(normal), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    prefix = file.get("tokenizer.ggml.add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    core.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces
    parts = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prefix else parts)
    return core


def merges_by_score(scores: dict[str, float]) -> list[tuple[str, str]]:
    """Return every pair of tokens that forms a token, best score of the formed token first.

    SentencePiece merges whichever neighbours form the best-scored token; BPE wants the pairs spelled out.
    """
    pairs = [
        (-score, position, token)
        for token, score in scores.items()
        for position in range(1, len(token))
        if token[:position] in scores and token[position:] in scores
    ]
    return [(token[:position], token[position:]) for _, position, token in sorted(pairs)]


# ---- tokenizers to GGUF ----


def tokenizer_fields(tokenizer: "PreTrainedTokenizerFast", vocabulary_size: int, ends: list[int]) -> dict[str, Field]:
    """Return the GGUF fields of a tokenizer.

    Args:
        tokenizer: A fast tokenizer.
        vocabulary_size: Rows of the embedding; tokens beyond are left out, rows without a token are padding.
        ends: The ids that end a turn, the first one foremost.

    Raises:
        BadInputError: llama.cpp has no tokenizer that cuts text this way.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"].get("type") != "BPE":
        raise BadInputError(
            f"llama.cpp has no exact counterpart for this {state['model'].get('type')} tokenizer here: "
            "byte-level BPE and SentencePiece-like BPE can be written as GGUF"
        )
    words = _expressions(state["pre_tokenizer"])
    values = _sentencepiece_fields(state) if words is None else _byte_level_fields(state, words)
    kind = values["tokenizer.ggml.model"]
    tokens, types = _token_list(tokenizer, state, vocabulary_size, sentencepiece=kind == "llama")
    if kind == "llama":
        values["tokenizer.ggml.scores"] = _scores(tokens, merge_pairs(state))
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    values |= _role_ids(tokenizer, vocabulary_size, ends, tokens)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        values["tokenizer.chat_template"] = template
    return {key: field(value) for key, value in values.items() if value != []}


def merge_pairs(state: dict[str, Any]) -> list[list[str]]:
    """Return the merges of a BPE tokenizer in order, whichever way its JSON spells them."""
    return [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in state["model"]["merges"]]


def _byte_level_fields(state: dict[str, Any], expressions: tuple[str, ...]) -> dict[str, Any]:
    normalizer = state["normalizer"]
    # NFC is left out by llama.cpp for every model that asks for it; composed text is the same either way.
    if normalizer is not None and normalizer["type"] != "NFC":
        raise BadInputError(f"llama.cpp has no `{normalizer['type']}` normalizer for byte-level BPE tokenizers")
    ignore_merges = bool(state["model"].get("ignore_merges"))
    for entry in PRE_TOKENIZERS:
        if (entry.expressions, entry.ignore_merges) == (expressions, ignore_merges):
            return {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": entry.names[0],
                "tokenizer.ggml.merges": [" ".join(pair) for pair in merge_pairs(state)],
            }
    known = ", ".join(entry.names[0] for entry in PRE_TOKENIZERS)
    raise BadInputError(
        "The tokenizer cuts words by rules that have no name here: "
        f"{' then '.join(expressions) or 'none at all'}, ignore_merges {ignore_merges}. Known are {known}"
    )


def _expressions(state: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Return a pre-tokenizer as its regular expressions, None where it is not byte-level."""
    steps = state["pretokenizers"] if state and state["type"] == "Sequence" else [state] if state else []
    if not any(step["type"] == "ByteLevel" for step in steps):
        return None
    expressions = []
    for step in steps:
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            expressions += [_GPT2] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            expressions.append(_DIGIT)
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) in (
            ("Isolated", False),
            ("Removed", True),
        ):
            pattern = step["pattern"].get("Regex") or re.escape(step["pattern"]["String"])
            expressions.append(pattern.replace(_ENDINGS_ANY_CASE, _ENDINGS))
        else:
            raise BadInputError(f"llama.cpp has no counterpart for the pre-tokenizer step {json.dumps(step)}")
    return tuple(expressions)


def _sentencepiece_fields(state: dict[str, Any]) -> dict[str, Any]:
    normalizer, words = state["normalizer"], state["pre_tokenizer"]
    steps = normalizer["normalizers"] if normalizer and normalizer["type"] == "Sequence" else [normalizer]
    kinds = [step["type"] for step in steps if step]
    spaced = words is not None and words["type"] == "Metaspace"
    if not state["model"].get("byte_fallback") or not (spaced or "Replace" in kinds):
        raise BadInputError(
            "The tokenizer is neither byte-level nor SentencePiece-like with byte fallback: "
            "llama.cpp has no exact counterpart for it"
        )
    if set(kinds) - {"Replace", "Prepend"} or (words and words["type"] not in ("Metaspace", "Split")):
        raise BadInputError(f"llama.cpp has no counterpart for the tokenizer's steps {', '.join(kinds)}, {words}")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": "Prepend" in kinds or (spaced and words["prepend_scheme"] != "never"),
    }


def _token_list(
    tokenizer: "PreTrainedTokenizerFast", state: dict[str, Any], vocabulary_size: int, sentencepiece: bool
) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocabulary_size)]
    types = [int(TokenType.UNUSED)] * vocabulary_size
    added = {token["id"]: token for token in state["added_tokens"]}
    unknown = state["model"].get("unk_token") if sentencepiece else None
    formed = {left + right for left, right in merge_pairs(state)} if sentencepiece else set()
    for token, index in tokenizer.get_vocab().items():
        if index >= vocabulary_size:  # such as Gemma 3's image token, which text-only models have no row for
            continue
        tokens[index], types[index] = token, int(TokenType.NORMAL)
        if token == unknown:
            types[index] = int(TokenType.UNKNOWN)
        elif index in added and added[index]["special"]:
            types[index] = int(TokenType.CONTROL)
        elif index in added and token not in formed:
            # llama.cpp prints these as they are, so their spaces must be spaces.
            tokens[index] = token.replace(SPACE, " ") if sentencepiece else token
            types[index] = int(TokenType.USER_DEFINED)
        elif sentencepiece and BYTE.fullmatch(token):
            types[index] = int(TokenType.BYTE)
    return tokens, types


def _scores(tokens: list[str], pairs: list[list[str]]) -> list[float]:
    best: dict[str, float] = {}
    for rank, (left, right) in enumerate(pairs):
        best.setdefault(left + right, -float(rank))
    # What no merge forms must never win over what one does.
    return [best.get(token, -float(len(pairs)) if len(token) > 1 else 0.0) for token in tokens]


def _role_ids(
    tokenizer: "PreTrainedTokenizerFast", vocabulary_size: int, ends: list[int], tokens: list[str]
) -> dict[str, int | bool]:
    values: dict[str, int | bool] = {}
    for role, key in _ROLES.items():
        index = getattr(tokenizer, f"{role}_id")
        if index is not None and index < vocabulary_size:
            values[key] = index
    # llama.cpp ends on three stated ids and on well-known texts: the stated places go to the others first.
    ends = [index for index in dict.fromkeys(ends) if index < vocabulary_size]
    ordered = ends[:1] + sorted(ends[1:], key=lambda index: tokens[index] in _KNOWN_ENDS)
    lost = [tokens[index] for index in ordered[len(_END_KEYS) :] if tokens[index] not in _KNOWN_ENDS]
    if lost:
        raise BadInputError(
            f"The model ends its turns with {len(ends)} different tokens; GGUF has room for three, and "
            f"llama.cpp would not stop at {', '.join(lost)}: shorten eos_token_id in generation_config.json"
        )
    values |= dict(zip(_END_KEYS, ordered, strict=False))
    plain = tokenizer("a").input_ids
    values["tokenizer.ggml.add_bos_token"] = bool(plain) and plain[0] == tokenizer.bos_token_id
    values["tokenizer.ggml.add_eos_token"] = len(plain) > 1 and plain[-1] == tokenizer.eos_token_id
    return values
