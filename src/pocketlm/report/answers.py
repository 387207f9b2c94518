"""Answers side by side: what a person would notice first about a damaged model, found by rule."""

import re

from pocketlm.report.content import Answer

# A phrase of 8 to 200 characters said three times in a row, or a shorter one nine times.
_LOOP = re.compile(r"(.{8,200}?)\1{2,}|(.{1,7}?)\2{8,}", re.DOTALL)
_SAME = "same as the original"
_OF_ORIGINAL = "original: "
_WORD = re.compile(r"[^\W\d_]+")


def repeats_itself(text: str) -> bool:
    """Return whether `text` is caught in a loop: one phrase over and over, or hardly new groups of words.

    Digits do not count as words, so that a numbered list of the same sentence is found too.
    """
    # A loop must hold a letter or a digit: rules and table borders repeat by right.
    if any(re.search(r"\w", match[1] or match[2]) for match in _LOOP.finditer(text)):
        return True
    words = _WORD.findall(text.lower())
    groups = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    return len(groups) >= 20 and len(set(groups)) < len(groups) / 2


def folded(text: str) -> str:
    """Return a text whose loops are said once, each with how many times it was said: a page shows no screens of one."""

    def once(match: re.Match[str]) -> str:
        found = match[1] or match[2]
        if not re.search(r"\w", found):
            return match[0]
        phrase = found[: (found + found).index(found, 1)]  # what was found may be two or three of them already
        end = phrase[len(phrase.rstrip()) :]
        return f"{phrase.rstrip()} … [{len(match[0]) // len(phrase)} times]{end}"

    return _LOOP.sub(once, text)


def faults(text: str) -> list[str]:
    """Return what is wrong with an answer, in words; an empty list where nothing is found."""
    if not text.strip():
        return ["empty"]
    found = ["repeats itself"] if repeats_itself(text) else []
    return [*found, "broken characters"] if "\ufffd" in text else found


def compare(prompt: str, original: str, compressed: str) -> Answer:
    """Return the two answers with notes: the faults of each, or that they are the same."""
    notes = faults(compressed) + [_OF_ORIGINAL + fault for fault in faults(original)]
    if original.strip() == compressed.strip():
        notes.insert(0, _SAME)
    return Answer(prompt, original, compressed, tuple(notes))


def is_fault(note: str) -> bool:
    """Return whether a note speaks of a fault of the compressed model."""
    return note != _SAME and not note.startswith(_OF_ORIGINAL)
