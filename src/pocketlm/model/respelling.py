"""Teach a model with fewer tokens by one with more: every token that is gone is spelled with those that stayed.

    the teacher reads      the | pocket | book | 's
    the student reads      the | pock · et | book | 's
                                 ^      ^
        first piece: the sum of the teacher's probabilities of all tokens that are spelled with it in front
               later pieces: what stands there

Both read the same text, so at the end of every token of the teacher's the two have read the same, and their
probabilities of what comes next can be compared. Inside a token the teacher has no say.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketlm.model.compute import as_forward, fast_copy, fast_forward
from pocketlm.model.judge import divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.learning import add_gradient, distillation_step, recomputing, windows_at_once
from pocketlm.model.sweep import final_hidden

POSITIONS_AT_ONCE = 512  # logits of so many positions are in memory together, of both vocabularies

Spelling = Sequence[Sequence[int]]
"""The student's ids for each of the teacher's, at least one."""


@dataclass(frozen=True)
class Respeller:
    """A teacher whose student has fewer tokens.

    Attributes:
        model: The teacher.
        spelling: The student's ids for each of its tokens.
    """

    model: LanguageModel
    spelling: Spelling


@dataclass(frozen=True)
class Respelled:
    """A batch as the student reads it, and what it is to predict.

    Attributes:
        ids: (windows, length) of the student's tokens, zeros behind the end of shorter windows.
        places: (predictions,), which positions of `ids`, flattened, predict.
        labels: (predictions,), the piece that follows.
        heard: (predictions,), the teacher's position, flattened, that predicts it; -1 for all but first pieces.
    """

    ids: Tensor
    places: Tensor
    labels: Tensor
    heard: Tensor


def respell(windows: Tensor, spelling: Spelling, room: int) -> Respelled:
    """Spell windows of the teacher's ids, (windows, length), with the student's; all on the windows' device.

    Args:
        windows: What the teacher reads.
        spelling: The student's ids for each of the teacher's.
        room: Tokens of the student's longest context; of a window that is longer in its tokens the end is left out.
    """
    spelled = [[spelling[index] for index in row] for row in windows.tolist()]
    longest = min(room, max(sum(map(len, row)) for row in spelled))
    ids = torch.zeros(len(windows), longest, dtype=torch.int64)
    places, labels, heard = [], [], []
    for line, row in enumerate(spelled):
        pieces = [
            (piece, token if first == 0 else 0) for token, word in enumerate(row) for first, piece in enumerate(word)
        ][:longest]
        ids[line, : len(pieces)] = torch.tensor([piece for piece, _ in pieces])
        for place, (piece, token) in enumerate(pieces[1:]):  # nothing predicts the first one
            places.append(line * longest + place)
            labels.append(piece)
            heard.append(line * windows.shape[1] + token - 1 if token else -1)
    parts = (ids, torch.tensor(places), torch.tensor(labels), torch.tensor(heard))
    return Respelled(*(part.to(windows.device) for part in parts))


@torch.no_grad()
def text_loss(network: nn.Module, text: Respelled) -> float:
    """Return the nats that a text costs a network in all."""
    hidden, total = final_hidden(network, text.ids).flatten(0, 1), 0.0
    for places, labels in zip(text.places.split(POSITIONS_AT_ONCE), text.labels.split(POSITIONS_AT_ONCE), strict=True):
        logits = hidden[places] @ network.lm_head.weight.float().T
        total += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    return total


def original_of(teacher: LanguageModel | Respeller) -> LanguageModel:
    """Return the model behind a teacher."""
    return teacher.model if isinstance(teacher, Respeller) else teacher


def taught_by(
    teacher: LanguageModel | Respeller, student: nn.Module, held_out: Tensor
) -> tuple[Callable[[Tensor], float], Callable[[], float]]:
    """Return what adds a batch's gradient to a student, and what measures it: by forward KL to the teacher.

    Args:
        teacher: Not changed.
        student: With the teacher's tokens, or fewer where that is a `Respeller`.
        held_out: (windows, length) of the teacher's ids, to measure on.
    """
    original = fast_copy(original_of(teacher).network)
    if isinstance(teacher, Respeller):
        spelling = teacher.spelling
        return (
            lambda batch: respelled_step(original, student, batch, spelling),
            lambda: respelled_divergence(original, student, held_out, spelling),
        )
    opinion = judge(teacher.network, held_out)
    return (
        lambda batch: distillation_step(original, student, batch),
        lambda: divergence_of(student, held_out, opinion),
    )


def predictions(teacher: LanguageModel | Respeller, student: nn.Module, batch: Tensor) -> int:
    """Return how many predictions the loss of a batch is a mean over; arguments as of `taught_by`."""
    if isinstance(teacher, Respeller):
        return len(respell(batch, teacher.spelling, student.config.max_position_embeddings).labels)
    return batch.numel()


def respelled_divergence(teacher: nn.Module, student: nn.Module, windows: Tensor, spelling: Spelling) -> float:
    """Return the mean divergence of a student from its teacher in nats per token of the student's.

    KL at first pieces, -log p of what stands there at later ones.

    Args:
        teacher: The original.
        student: With fewer tokens.
        windows: (windows, length) of the teacher's ids.
        spelling: The student's ids for each of the teacher's.
    """
    total, count = 0.0, 0
    for batch in windows.split(1):
        text = respell(batch, spelling, student.config.max_position_embeddings)
        hidden = final_hidden(student, text.ids).flatten(0, 1)
        total += _through_head(teacher, student, batch, hidden, text, spelling, 1)[0]
        count += len(text.labels)
    return total / count


def respelled_step(teacher: nn.Module, student: nn.Module, windows: Tensor, spelling: Spelling) -> float:
    """Add the gradient of `respelled_divergence` on one batch to the student; return the divergence."""
    parts = windows.split(windows_at_once(windows))
    texts = [respell(part, spelling, student.config.max_position_embeddings) for part in parts]
    count, loss = sum(len(text.labels) for text in texts), 0.0
    for part, text in zip(parts, texts, strict=True):
        with recomputing(student), fast_forward(windows.device):
            hidden = student.base_model(input_ids=text.ids, use_cache=False).last_hidden_state
        read = hidden.detach().flatten(0, 1)
        value, slope, slope_of_head = _through_head(teacher, student, part, read, text, spelling, count)
        add_gradient(student.lm_head.weight, slope_of_head)
        hidden.backward(slope.view_as(hidden))
        loss += value
    return loss


@torch.no_grad()
def _through_head(
    teacher: nn.Module,
    student: nn.Module,
    windows: Tensor,
    hidden: Tensor,
    text: Respelled,
    spelling: Spelling,
    count: int,
) -> tuple[float, Tensor, Tensor]:
    """Return the divergence summed over `count`, and its gradients by what the student's head reads, and by the head.

    Args:
        teacher: The original.
        student: With fewer tokens.
        windows: (windows, length) of the teacher's ids.
        hidden: (positions, width) of what the student's head reads.
        text: The same windows as the student reads them.
        spelling: The student's ids for each of the teacher's.
        count: What the sum is divided by.
    """
    truth = final_hidden(teacher, windows).flatten(0, 1)
    first = torch.tensor([word[0] for word in spelling], device=hidden.device)
    # Rows of the embedding that no token has (padding) are no words.
    reference, head = as_forward(teacher.lm_head.weight[: len(first)]), as_forward(student.lm_head.weight)
    total, slope = 0.0, torch.zeros_like(hidden)
    slope_of_head = torch.zeros(head.shape, device=head.device)
    for start in range(0, len(text.labels), POSITIONS_AT_ONCE):
        chunk = slice(start, start + POSITIONS_AT_ONCE)
        states = as_forward(hidden[text.places[chunk]])
        mine = torch.log_softmax((states @ head.T).float(), -1)
        heard = text.heard[chunk]
        said = torch.softmax((as_forward(truth[heard[heard >= 0]]) @ reference.T).float(), -1)
        target = torch.zeros_like(mine)
        target[heard >= 0] = target.new_zeros(len(said), target.shape[1]).index_add_(1, first, said)
        inside = (heard < 0).nonzero().squeeze(1)
        target[inside, text.labels[chunk][inside]] = 1.0
        total += (torch.special.xlogy(target, target) - target * mine).sum().item()
        by_logits = as_forward(mine.exp_().sub_(target).div_(count))
        slope[text.places[chunk]] = (by_logits @ head).to(slope.dtype)
        slope_of_head += by_logits.T @ states
    return total / count, slope, slope_of_head
