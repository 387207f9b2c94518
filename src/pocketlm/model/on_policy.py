"""The student's own words as lessons: it goes on from a beginning, and the teacher judges what it says.

    a window of text    | beginning · what follows | beginning · what follows |
    in its own words    | beginning · drawn        | beginning · drawn        |    pieces do not see each other

Text never shows a student its own mistakes (GKD, https://arxiv.org/abs/2306.13649). Of a task's examples the answers
are drawn anew. Only what is drawn is learnt, up to the end of a turn.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketlm.model.learning import Lessons
from pocketlm.model.surgery import as_ids

PIECE = 128  # tokens, half of them drawn: many short ones at once take a fraction of the time of a long one


@dataclass(frozen=True)
class Piece:
    """A stretch of a window: from `begin`, the tokens from `first` to `end` are drawn."""

    row: int
    begin: int
    first: int
    end: int


def with_own_words(
    student: nn.Module, batches: Iterator[Lessons], share: float, seed: int, numbers: Iterable[int]
) -> Iterator[Lessons]:
    """Yield batches in which a share of the windows, the last ones, are in the student's own words.

    Each is drawn when it is asked for, from the student as it is then; the seed, its number and the weights decide it.

    Args:
        student: Who writes.
        batches: Of text or examples.
        share: 0 to 1; where it is no whole number of windows, batches differ by one.
        seed: Of the draws.
        numbers: Of the batches, in order: where several processes train, each has numbers of its own.
    """
    for number, batch in zip(numbers, batches, strict=False):
        count = _until(number + 1, share, len(batch)) - _until(number, share, len(batch))
        kept = len(batch) - count
        drawn = in_own_words(student, batch[kept:], (seed * 1_000_003 + number) % 2**63) if count else batch[:0]
        yield joined(batch[:kept], drawn) if count else batch


def _until(number: int, share: float, windows: int) -> int:
    return math.floor(number * share * windows + 1e-9)


@torch.no_grad()
def in_own_words(student: nn.Module, lessons: Lessons, seed: int) -> Lessons:
    """Return windows whose learnt tokens are drawn by the student, from its own probabilities.

    Args:
        student: Who writes.
        lessons: Examples, of whose answers as many tokens are drawn as they have; or text, which is cut into pieces.
        seed: Of the draws.
    """
    if lessons.counted is None:
        lessons = _cut(lessons.ids)
    pieces = _pieces(lessons)
    ids, own = lessons.ids.clone(), torch.zeros_like(lessons.ids, dtype=torch.bool)
    drawn = _continued(student, [ids[each.row, each.begin : each.first] for each in pieces], pieces, seed)
    for piece, words in zip(pieces, drawn, strict=True):
        here = slice(piece.first, piece.first + len(words))
        ids[piece.row, here], own[piece.row, here] = words, True
    return Lessons(ids, lessons.places, own, own=own)


def joined(text: Lessons, drawn: Lessons) -> Lessons:
    """Return windows of text or examples and windows in the student's own words as one batch."""
    places = torch.arange(text.ids.shape[1], device=text.ids.device).expand_as(text.ids)
    places = places if text.places is None else text.places
    counted = torch.ones_like(text.ids, dtype=torch.bool) if text.counted is None else text.counted
    whole = Lessons(text.ids, places, counted, own=torch.zeros_like(counted))
    names = ("ids", "places", "counted", "own")
    return Lessons(**{name: torch.cat([getattr(part, name) for part in (whole, drawn)]) for name in names})


def _cut(ids: Tensor) -> Lessons:
    """Cut windows of text into pieces of equal length, whose second halves count."""
    length = ids.shape[1]
    piece = length // max(1, length // PIECE)
    places = torch.arange(length, device=ids.device) % piece
    counted = (places >= piece // 2) & (torch.arange(length, device=ids.device) < length // piece * piece)
    return Lessons(ids, places.expand_as(ids), counted.expand_as(ids))


def _pieces(lessons: Lessons) -> list[Piece]:
    """Return the stretches in which something is learnt."""
    found = []
    for row, (places, counted) in enumerate(zip(lessons.places.tolist(), lessons.counted.tolist(), strict=True)):
        begins = [index for index, place in enumerate(places) if place == 0]
        for begin, behind in zip(begins, [*begins[1:], len(places)], strict=True):
            learnt = [index for index in range(begin, behind) if counted[index]]
            if learnt and learnt[0] > begin:
                found.append(Piece(row, begin, learnt[0], learnt[-1] + 1))
    return found


def _continued(student: nn.Module, prompts: list[Tensor], pieces: list[Piece], seed: int) -> list[Tensor]:
    """Draw what follows each prompt: as many tokens as its piece has room for, or up to the end of a turn."""
    if not prompts:
        return []
    ends = as_ids(student.generation_config.eos_token_id)
    width = max(map(len, prompts))
    ids = torch.stack([nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([nn.functional.pad(torch.ones_like(prompt), (width - len(prompt), 0)) for prompt in prompts])
    with torch.random.fork_rng([ids.device] if ids.device.type == "cuda" else []):
        torch.manual_seed(seed)
        written = student.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=max(piece.end - piece.first for piece in pieces),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            repetition_penalty=1.0,
            use_cache=True,
            pad_token_id=ends[0] if ends else 0,
        )
    drawn = []
    for piece, words in zip(pieces, written[:, width:], strict=True):
        words = words[: piece.end - piece.first]
        stops = torch.isin(words, torch.tensor(ends, device=words.device)).nonzero()
        drawn.append(words[: int(stops[0]) + 1] if len(stops) else words)
    return drawn
