"""Text as windows of token ids, split once into what teaches, what chooses and what judges.

documents --hash--> calibration (teaches: statistics, distillation)
                    validation  (chooses: plans, best checkpoints)
                    test        (judges: the figures of the report; nothing else ever sees it)
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.model.files import json_values, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WINDOW = 512  # tokens per window, also the length that perplexity is measured on
PIECE = 4000  # characters after which a long text is cut at the next paragraph
LEAST_WINDOWS = {"test": 4, "validation": 4, "calibration": 1}  # a spread over fewer says little of the noise
ENOUGH = 80  # words of text per token of a window: all splits of so many documents have some, nearly always
SHARES = {"test": 0.15, "validation": 0.10}  # of the documents; calibration has the rest


@dataclass(frozen=True)
class Tokens:
    """Windows of token ids.

    Attributes:
        name: Where the text came from.
        windows: (windows, length) int64.
        sha256: Of the ids.
    """

    name: str
    windows: Tensor
    sha256: str

    def first(self, count: int) -> Tensor:
        """Return the first `count` windows, or all there are."""
        return self.windows[:count]


@dataclass(frozen=True)
class Corpus:
    """Documents and the split that each one belongs to."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of all the text."""
        return hashlib.sha256("\0".join(self.documents).encode()).hexdigest()

    def split(self, wanted: str) -> list[str]:
        """Return the documents of one split, from all files mixed.

        A document's content alone decides where it belongs, and its place.
        """
        mixed = sorted(self.documents, key=lambda document: self._places[document] * 1e6 % 1)
        return [document for document in mixed if _split_of(self._places[document]) == wanted]

    @cached_property
    def _places(self) -> dict[str, float]:
        return {document: _place_of(document) for document in self.documents}

    def tokens(self, wanted: str, tokenizer: "PreTrainedTokenizerFast", limit: int, length: int = WINDOW) -> Tokens:
        """Return up to `limit` windows of one split.

        Raises:
            BadInputError: The split has less than its least number of windows.
        """
        windows = pack_windows(self.split(wanted), tokenizer, limit, length)
        check_length(self, wanted, windows, length)
        return as_tokens(f"{self.name} ({wanted})", windows)


def check_length(corpus: Corpus, part: str, windows: Tensor, length: int) -> None:
    """Refuse a text of which a part is too short to teach anything or to judge by.

    Raises:
        BadInputError: It has less than its least number of windows; the message says how much text it takes.
    """
    least = LEAST_WINDOWS[part]
    if len(windows) < least:
        raise BadInputError(
            f"The text `{corpus.name}` is too short: its {part} part has less than {least * length} tokens. "
            f"Give at least {ENOUGH * length} words with --data"
        )


def as_tokens(name: str, windows: Tensor) -> Tokens:
    """Name windows of ids and hash them."""
    return Tokens(name, windows, hashlib.sha256(windows.numpy().tobytes()).hexdigest())


def _place_of(document: str) -> float:
    """Return a number from 0 to 1 that depends on the content alone."""
    return int(hashlib.sha256(document.encode()).hexdigest()[:12], 16) / 2**48


def _split_of(place: float) -> str:
    if place < SHARES["test"]:
        return "test"
    return "validation" if place < SHARES["test"] + SHARES["validation"] else "calibration"


def pack_windows(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerFast", limit: int, length: int = WINDOW
) -> Tensor:
    """Return (windows, length) ids: documents end to end, each closed by end-of-text, none padded.

    Windows start with the beginning-of-text token where the tokenizer adds one by itself (Gemma needs it).
    """
    start = [tokenizer.bos_token_id] if adds_beginning(tokenizer) else []
    closing = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    body = length - len(start)
    stream: list[int] = []
    for document in documents:
        stream += tokenizer(document, add_special_tokens=False, verbose=False).input_ids + closing
        if len(stream) >= limit * body:
            break
    count = min(limit, len(stream) // body)
    windows = [start + stream[i * body : (i + 1) * body] for i in range(count)]
    return torch.tensor(windows, dtype=torch.int64).reshape(count, length)


def encode_from_start(tokenizer: "PreTrainedTokenizerFast", text: str) -> list[int]:
    """Return a text's ids behind a token that starts a document, so that its first token is predicted too.

    That token is the beginning-of-text token where the tokenizer has one, else the end-of-text token.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return [start or 0, *tokenizer(text, add_special_tokens=False, verbose=False).input_ids]


def plain_pieces(
    windows: Tensor, readers: list["PreTrainedTokenizerFast"], tokenizer: "PreTrainedTokenizerFast", longest: int
) -> list[str]:
    """Return the text of each window, shortened until it is at most `longest` tokens for every reader.

    Args:
        windows: (windows, length) ids of `tokenizer`; special tokens and cut characters at the ends are left out.
        readers: Who will read the texts.
        tokenizer: Whose ids the windows hold.
        longest: Tokens, the one in front included.
    """
    texts = []
    for row in windows.tolist():
        text = tokenizer.decode(row, skip_special_tokens=True).strip("\ufffd")
        while (needed := max(len(encode_from_start(reader, text)) for reader in readers)) > longest:
            text = text[: len(text) * longest // (needed + 1)]
        texts.append(text)
    return [text for text in texts if text]


def adds_beginning(tokenizer: "PreTrainedTokenizerFast") -> bool:
    """Whether the tokenizer puts a beginning-of-text token before a text by itself."""
    ids = tokenizer("a").input_ids
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def python_topics() -> Corpus:
    """Return the text that every machine has: the topics of Python's own help system."""
    from pydoc_data.topics import topics

    return Corpus("pydoc_data.topics", tuple(piece for text in topics.values() for piece in _pieces(text)))


def read_corpus(paths: list[Path], tokenizer: "PreTrainedTokenizerFast | None" = None) -> Corpus:
    """Read text files (.txt, .md and the like) and .jsonl files (a `text`, or chat `messages`, per line).

    Args:
        paths: Of the files.
        tokenizer: By whose chat template `messages` become the text that the model meets; their words alone where it
            has none.

    Raises:
        BadInputError: A file is missing, empty, not UTF-8, or a line of a .jsonl file has neither field, or messages
            that the template does not take.
    """
    documents = [piece for path in paths for text in _texts(path, tokenizer) for piece in _pieces(text)]
    return Corpus(", ".join(path.name for path in paths), tuple(documents))


def _texts(path: Path, tokenizer: "PreTrainedTokenizerFast | None") -> list[str]:
    content = text_of(path)
    if not content.strip():
        raise BadInputError(f"{path} is empty. Give a file with text")
    if path.suffix.lower() != ".jsonl":
        return [content]
    return [_text_of_entry(entry, place, tokenizer) for place, entry in json_values(path)]


def _text_of_entry(entry: Any, place: str, tokenizer: "PreTrainedTokenizerFast | None") -> str:
    if isinstance(entry, dict) and isinstance(entry.get("text"), str):
        return entry["text"]
    messages = entry.get("messages") if isinstance(entry, dict) else None
    if isinstance(messages, list) and all(isinstance(message, dict) for message in messages):
        return _text_of_chat(messages, place, tokenizer)
    raise BadInputError(f"{place}: neither a `text` nor `messages`. Name the text field `text`")


def _text_of_chat(messages: list[dict], place: str, tokenizer: "PreTrainedTokenizerFast | None") -> str:
    """Return a chat as the model meets it: what has no words, such as a tool call, is left out."""
    said = [{"role": str(each.get("role", "user")), "content": _words_of(each.get("content"))} for each in messages]
    said = [each for each in said if each["content"]]
    if not said or tokenizer is None or not tokenizer.chat_template:
        return "\n\n".join(each["content"] for each in said)
    try:
        return tokenizer.apply_chat_template(said, tokenize=False)
    except Exception as error:  # templates raise what they like
        raise BadInputError(
            f"{place}: the model's chat template does not take these `messages` ({error}). "
            "Give roles that it knows, in their order, or the words as `text`"
        ) from error


def _words_of(content: object) -> str:
    """Return the text of a chat message: a string, parts of which some are text, or nothing (a tool call)."""
    if isinstance(content, list):
        return "\n\n".join(_words_of(part.get("text")) for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _pieces(text: str) -> list[str]:
    """Cut a text into pieces of PIECE to twice as many characters, so that it can be split; nothing is lost.

    The cut is at a paragraph's end, else at a line's, else at a word's.
    """
    pieces = []
    while len(text) > 2 * PIECE:
        ends = (text.find(mark, PIECE, 2 * PIECE) + len(mark) for mark in ("\n\n", "\n", " "))
        end = next((end for end in ends if end > PIECE), 2 * PIECE)
        pieces.append(text[:end])
        text = text[end:]
    return [piece for piece in (*pieces, text) if piece.strip()]
