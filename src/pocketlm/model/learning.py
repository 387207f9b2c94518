"""What every training shares: lessons, batches, the learning-rate schedule, and the gradient of one step."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocketlm.model.anatomy import blocks_of
from pocketlm.model.compute import as_forward, fast_forward
from pocketlm.model.matching import Insides, Matching
from pocketlm.model.targets import Targets
from pocketlm.tensors.divergence import (
    Loss,
    Sparse,
    loss_with_gradient,
    mixed,
    sparse_kl_with_gradient,
)

POSITIONS_AT_ONCE = 1024  # logits of so many positions are in memory together, whatever the vocabulary
# Activations of so many tokens are; the gradients of longer batches are summed up. A step of 4 x 512 tokens with a 135M
# teacher took 5.0 GB all at once, 4.5 GB in halves, as fast on two threads, and 3.3 GB one by one, 10 % slower.
TOKENS_AT_ONCE = {"cpu": 1024, "cuda": 4096}
# Losses are computed from the logits of so many positions, so that a CPU's cache holds what comes between: a step of
# 4 x 512 tokens took 0.4 s for it, of 512 positions together 0.75 s and twice the memory.
ROWS_AT_ONCE = {"cpu": 32}
FORWARD_KL = Loss()
CHECKPOINT_PARAMETERS = 400_000_000  # above this, the backward pass recomputes activations to save memory


@dataclass(frozen=True)
class Lessons:
    """Windows of text to learn from.

    Attributes:
        ids: (windows, length) token ids.
        places: (windows, length), each token's place in its own example where a window holds several, which then do
            not see each other; None where a window is one text.
        counted: (windows, length) bool, the tokens whose prediction is learnt; None for all.
        targets: What a teacher said about the windows, to learn from instead of asking it; None to ask.
        own: (windows, length) bool, the tokens that the student wrote itself: the teacher judges what it says there,
            and they are no example of what comes next; None where none is.
    """

    ids: Tensor
    places: Tensor | None = None
    counted: Tensor | None = None
    targets: Targets | None = None
    own: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, rows: slice | list[int]) -> Self:
        values = (getattr(self, each.name) for each in fields(self))
        return type(self)(*(None if value is None else value[rows] for value in values))

    def to(self, device: torch.device) -> Self:
        """Return the same on another device; what is on disk stays there."""
        values = (getattr(self, each.name) for each in fields(self))
        return type(self)(*(value.to(device) if isinstance(value, Tensor) else value for value in values))

    def numel(self) -> int:
        """Return the number of tokens."""
        return self.ids.numel()

    def predicting(self, loss: Loss) -> Tensor | None:
        """Return which positions, flattened, are trained; None where all are, the last of each window included.

        Nobody knows what follows the last one, so that only a teacher can be learnt from there.
        """
        if self.counted is None and not loss.cross_entropy:
            return None
        following = torch.zeros(self.ids.shape, dtype=torch.bool, device=self.ids.device)
        following[:, :-1] = True if self.counted is None else self.counted[:, 1:]
        return following.flatten().nonzero().squeeze(1)

    def following(self, places: Tensor) -> Tensor:
        """Return the token behind each of some positions, flattened; -1 where it is no example."""
        after = (places + 1) % self.numel()
        labels = self.ids.flatten()[after]
        return labels if self.own is None else labels.masked_fill(self.own.flatten()[after], -1)


def positions(batch: Tensor | Lessons, loss: Loss) -> int:
    """Return how many positions of a batch are trained."""
    predicting = batch.predicting(loss) if isinstance(batch, Lessons) else None
    return batch.numel() if predicting is None else len(predicting)


def windows_at_once(ids: Tensor) -> int:
    """Return how many windows, the rows of `ids`, are learnt from at once."""
    return max(1, TOKENS_AT_ONCE.get(ids.device.type, 1) // ids.shape[1])


class Updates:
    """AdamW with the cosine schedule: what to call after each gradient. Gradients are freed.

    Attributes:
        parameters: All that are trained.
    """

    def __init__(self, groups: list[dict[str, Any]], steps: int, warm_up: float) -> None:
        self._peaks = [group["lr"] for group in groups]
        self._steps, self._warm_up, self._factor, self._done = steps, warm_up, 1.0, 0
        self._adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.parameters = [parameter for group in self._adam.param_groups for parameter in group["params"]]

    def __call__(self) -> None:
        """Take one step along the gradients."""
        share = self._factor * cosine(self._done, self._steps, self._warm_up)
        for group, peak in zip(self._adam.param_groups, self._peaks, strict=True):
            group["lr"] = peak * share
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._done += 1

    def weights(self) -> list[Tensor]:
        """Return a copy of what is trained."""
        return [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def put_weights(self, weights: list[Tensor]) -> None:
        """Give the parameters the values of such a copy."""
        for parameter, value in zip(self.parameters, weights, strict=True):
            parameter.copy_(value)

    def state(self) -> dict[str, Any]:
        """Return, without copying, all that the next step depends on besides its batch."""
        weights = [parameter.detach() for parameter in self.parameters]
        return {"weights": weights, "adam": self._adam.state_dict(), "done": self._done, "factor": self._factor}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        self.put_weights(state["weights"])
        self._adam.load_state_dict(state["adam"])
        self._done, self._factor = state["done"], state["factor"]

    def restart(self, weights: list[Tensor], done: int, slower: float) -> None:
        """Go on from other weights as after `done` steps, without momentum, with the learning rate times `slower`."""
        self.put_weights(weights)
        self._adam.zero_grad(set_to_none=True)
        self._adam.state.clear()
        self._done, self._factor = done, self._factor * slower


def cosine(step: int, steps: int, warm_up: float) -> float:
    """Return the learning rate's factor at `step`: a linear rise, then a cosine down to a tenth."""
    rise = max(1, round(warm_up * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


Windows = TypeVar("Windows", Tensor, Lessons)


def batches(windows: Windows, per_step: int, steps: int, seed: int, start: int = 0) -> Iterator[Windows]:
    """Yield `steps` batches of windows; every pass over the text has a new order, all decided by the seed.

    Args:
        windows: Token ids, (windows, length), or lessons.
        per_step: Windows in a batch.
        steps: How many batches there are.
        seed: Of the order.
        start: How many of the batches to leave out at the beginning.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in range(steps):
        while len(order) < per_step:
            order += torch.randperm(len(windows), generator=generator).tolist()
        batch, order = order[:per_step], order[per_step:]
        if step >= start:
            yield windows[batch]


@contextmanager
def recomputing(network: nn.Module) -> Iterator[None]:
    """While open, no block of a large network keeps its activations: the backward pass runs it again."""
    large = sum(parameter.numel() for parameter in network.parameters()) > CHECKPOINT_PARAMETERS
    changed = list(blocks_of(network)) if large else []

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), fast_forward(network.device)  # the second pass has to compute as the first did

    for block in changed:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def distillation_step(
    teacher: nn.Module | None,
    student: nn.Module,
    batch: Tensor | Lessons,
    loss: Loss = FORWARD_KL,
    matched: Matching | None = None,
) -> float:
    """Add the gradient of a loss on one batch to the student; return the loss in nats per trained position.

    The head runs some positions at a time on a detached copy of the hidden states: logits of the whole batch are never
    in memory.

    Args:
        teacher: May have more rows in its head, or fewer, where the rest is padding; None for cross-entropy alone.
        student: Whose gradients are added to.
        batch: (windows, length) token ids, or lessons.
        loss: What is learnt.
        matched: What of the teacher's insides is learnt besides, averaged over all tokens and added to the loss; the
            projections are given their gradients too.
    """
    lessons = batch if isinstance(batch, Lessons) else Lessons(batch)
    at_once = windows_at_once(lessons.ids)
    parts = [lessons[start : start + at_once] for start in range(0, len(lessons), at_once)]
    places = [part.predicting(loss) for part in parts]
    count = sum(part.numel() if each is None else len(each) for part, each in zip(parts, places, strict=True))
    total = 0.0
    for part, each in zip(parts, places, strict=True):
        with matched.noting_teacher(teacher) if matched else nullcontext(Insides()) as theirs:
            judged = _judged_by(teacher, student, part, each, loss)
        noted = matched.noting_student(student) if matched else nullcontext(Insides())
        with recomputing(student), fast_forward(part.ids.device), noted as mine:
            hidden = _read(student, part)
        value, slope = through_head(hidden.detach().flatten(0, 1), each, student.lm_head, judged, count)
        ends, slopes = [hidden], [slope.view_as(hidden)]
        total += value
        if matched:
            value, further, more = matched.distance(mine, theirs, part.places, part.numel() / lessons.numel())
            ends, slopes, total = ends + further, slopes + more, total + value
        torch.autograd.backward(ends, slopes)
    return total


def _read(network: nn.Module, lessons: Lessons) -> Tensor:
    """Return what the head reads, (windows, length, width)."""
    return network.base_model(input_ids=lessons.ids, position_ids=lessons.places, use_cache=False).last_hidden_state


Judged = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""From some of the trained positions and the student's logits there to the loss of each and its gradient by logits."""


@torch.no_grad()
def _judged_by(
    teacher: nn.Module | None, student: nn.Module, lessons: Lessons, places: Tensor | None, loss: Loss
) -> Judged:
    """Return what judges the student's logits: the teacher's on the same text, the tokens that follow, or both."""
    labels = None if places is None else lessons.following(places)
    if lessons.targets is not None and loss.cross_entropy < 1:
        return _judged_by_targets(lessons.targets.read().to(lessons.ids.device), places, labels, loss)
    if teacher is None or loss.cross_entropy == 1:
        return lambda chunk, logits: _loss_in_place(Loss(cross_entropy=1), None, logits, labels[chunk])
    words = min(len(teacher.lm_head.weight), len(student.lm_head.weight))
    reference = as_forward(teacher.lm_head.weight)[:words]
    with fast_forward(lessons.ids.device):
        truth = _read(teacher, lessons).float().flatten(0, 1)
    truth = truth if places is None else truth[places]

    def judged(chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        answers = None if labels is None else labels[chunk]
        return _loss_in_place(loss, as_forward(truth[chunk]) @ reference.T, logits[:, :words], answers)

    return judged


def _loss_in_place(
    loss: Loss, reference: Tensor | None, logits: Tensor, labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `loss_with_gradient`, the gradient in place of the student's logits."""
    values = torch.empty(len(logits), device=logits.device)
    at_once = ROWS_AT_ONCE.get(logits.device.type, len(logits))
    for start in range(0, len(logits), at_once):
        rows = slice(start, start + at_once)
        theirs, answers = (None if each is None else each[rows] for each in (reference, labels))
        values[rows], logits[rows] = loss_with_gradient(loss, theirs, logits[rows], answers)
    return values, logits


def _judged_by_targets(target: Sparse, places: Tensor | None, labels: Tensor | None, loss: Loss) -> Judged:
    places = torch.arange(len(target.lengths), device=target.lengths.device) if places is None else places

    def judged(chunk: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        soft = sparse_kl_with_gradient(target.at(places[chunk]), logits)
        return mixed(soft, logits, None if labels is None else labels[chunk], loss.cross_entropy)

    return judged


@torch.no_grad()
def through_head(
    hidden: Tensor, places: Tensor | None, head: nn.Linear, judged: Judged, count: int
) -> tuple[float, Tensor]:
    """Return the summed loss over `count`, and its gradient by `hidden`; the head is given its own if it learns.

    Args:
        hidden: (tokens, width) of what the head reads.
        places: Which of them are trained; all where None.
        head: The student's.
        judged: The loss and its gradient by some positions' logits, of which there may be fewer than the head has:
            the rest is padding, and learns nothing.
        count: What the sum is divided by.
    """
    weight = as_forward(head.weight)
    trained = hidden if places is None else hidden[places]
    total, slope, slope_of_head = 0.0, torch.empty_like(trained), None
    for start in range(0, len(trained), POSITIONS_AT_ONCE):
        chunk = slice(start, start + POSITIONS_AT_ONCE)
        states = as_forward(trained[chunk])
        values, by_logits = judged(chunk, states @ weight.T)
        by_logits = as_forward(by_logits)
        words = by_logits.shape[1]
        slope[chunk] = by_logits @ weight[:words]
        if head.weight.requires_grad:
            part = by_logits.T @ states
            slope_of_head = part.float() if slope_of_head is None else slope_of_head.add_(part)
        total += values.sum().item()
    slope.div_(count)
    if slope_of_head is not None:
        slope_of_head.div_(count)
        missing = len(weight) - len(slope_of_head)
        add_gradient(head.weight, nn.functional.pad(slope_of_head, (0, 0, 0, missing)) if missing else slope_of_head)
    if places is not None:
        slope = torch.zeros_like(hidden).index_copy_(0, places, slope)
    return total / count, slope


@torch.no_grad()
def held_out_loss(teacher: nn.Module | None, student: nn.Module, text: Tensor | Lessons, loss: Loss) -> float:
    """Return a student's mean loss in nats per trained position; the arguments are those of `distillation_step`."""
    lessons = text if isinstance(text, Lessons) else Lessons(text)
    weight, total, count = as_forward(student.lm_head.weight), 0.0, 0
    for row in range(len(lessons)):
        part = lessons[row : row + 1]
        places = part.predicting(loss)
        judged = _judged_by(teacher, student, part, places, loss)
        with fast_forward(part.ids.device):
            hidden = as_forward(_read(student, part).flatten(0, 1))
        hidden = hidden if places is None else hidden[places]
        for start in range(0, len(hidden), POSITIONS_AT_ONCE):
            chunk = slice(start, start + POSITIONS_AT_ONCE)
            total += judged(chunk, hidden[chunk] @ weight.T)[0].sum().item()
        count += len(hidden)
    return total / count


def add_gradient(parameter: nn.Parameter, slope: Tensor) -> None:
    """Add to a parameter's gradient, where it learns."""
    if parameter.requires_grad:
        parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)
