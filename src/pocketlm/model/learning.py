"""What every training loop shares: batches, the learning-rate schedule, and the gradient of one distillation step."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocketlm.errors import PocketlmError
from pocketlm.model.anatomy import blocks_of
from pocketlm.model.compute import as_forward, fast_forward, reusing_memory
from pocketlm.model.sweep import final_hidden
from pocketlm.tensors.divergence import kl_with_gradient

POSITIONS_AT_ONCE = 512  # logits of so many positions are in memory together, whatever the vocabulary
CHECKPOINT_PARAMETERS = 400_000_000  # above this, the backward pass recomputes activations to save memory


def cosine(step: int, steps: int, warm_up: float) -> float:
    """Return the learning rate's factor at `step`: a linear rise, then a cosine down to a tenth."""
    rise = max(1, round(warm_up * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def updates(groups: list[dict[str, Any]], steps: int, warm_up: float) -> Callable[[], None]:
    """Return what to call after each of `steps` gradients: AdamW with the cosine schedule; gradients are freed.

    Args:
        groups: `params` and their peak `lr`, as torch's optimizers take them.
        steps: How many there will be.
        warm_up: Share of the steps over which the learning rate rises.
    """
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps, warm_up))

    def update() -> None:
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    return update


def batches(windows: Tensor, per_step: int, steps: int, seed: int) -> Iterator[Tensor]:
    """Yield `steps` batches of windows; every pass over the text has a new order, all decided by the seed."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < per_step:
            order += torch.randperm(len(windows), generator=generator).tolist()
        batch, order = order[:per_step], order[per_step:]
        yield windows[batch]


@contextmanager
def recomputing(network: nn.Module) -> Iterator[None]:
    """While open, no block of a large network keeps its activations: the backward pass runs it again."""
    large = sum(parameter.numel() for parameter in network.parameters()) > CHECKPOINT_PARAMETERS
    changed = list(blocks_of(network)) if large else []
    for block in changed:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in changed:
            del block.forward


def distillation_step(teacher: nn.Module, student: nn.Module, batch: Tensor) -> float:
    """Add the gradient of KL(teacher ‖ student) on one batch to the student; return the loss in nats per token.

    The head runs some positions at a time on a detached copy of the hidden states: logits of the whole batch are never
    in memory.
    """
    truth = final_hidden(teacher, batch).flatten(0, 1)
    with recomputing(student), fast_forward(batch.device):
        hidden = student.base_model(input_ids=batch, use_cache=False).last_hidden_state
    loss, slope = _through_head(truth, teacher.lm_head, hidden.detach().flatten(0, 1), student.lm_head)
    hidden.backward(slope.view_as(hidden))
    return loss


@torch.no_grad()
def _through_head(truth: Tensor, teacher: nn.Linear, hidden: Tensor, student: nn.Linear) -> tuple[float, Tensor]:
    """Return the mean KL of two heads' probabilities and its gradient by `hidden`, (tokens, width).

    The student's head is given its gradient, unless it does not learn.
    """
    reference, head = as_forward(teacher.weight), as_forward(student.weight)
    total, slope, slope_of_head = 0.0, torch.empty_like(hidden), None
    for start in range(0, len(hidden), POSITIONS_AT_ONCE):
        chunk = slice(start, start + POSITIONS_AT_ONCE)
        states = as_forward(hidden[chunk])
        divergence, by_logits = kl_with_gradient(as_forward(truth[chunk]) @ reference.T, states @ head.T)
        by_logits = as_forward(by_logits.div_(len(hidden)))
        slope[chunk] = by_logits @ head
        if student.weight.requires_grad:
            part = by_logits.T @ states
            slope_of_head = part.float() if slope_of_head is None else slope_of_head.add_(part)
        total += divergence.sum().item()
    if slope_of_head is not None:
        add_gradient(student.weight, slope_of_head)
    return total / len(hidden), slope


def add_gradient(parameter: nn.Parameter, slope: Tensor) -> None:
    """Add to a parameter's gradient, where it learns."""
    if parameter.requires_grad:
        parameter.grad = slope if parameter.grad is None else parameter.grad.add_(slope)


@dataclass(frozen=True)
class Training:
    """What came of a training.

    Attributes:
        best: The snapshot with the lowest held-out KL.
        held_out_kl: (step, nats per token) at the start and at each evaluation.
        losses: Nats per token of each step.
        tokens_per_second: Evaluations included.
    """

    best: Any
    held_out_kl: list[tuple[int, float]]
    losses: list[float]
    tokens_per_second: float

    @property
    def lowest(self) -> float:
        """The held-out KL of the best snapshot."""
        return min(kl for _, kl in self.held_out_kl)

    @property
    def details(self) -> dict[str, Any]:
        """The figures for a report."""
        figures = {"losses": self.losses, "held_out_kl": self.held_out_kl}
        return figures | {"tokens_per_second": round(self.tokens_per_second, 1)}


def train(
    windows: Iterator[Tensor],
    steps: int,
    learn: Callable[[Tensor], float],
    held_out_kl: Callable[[], float],
    snapshot: Callable[[], Any],
    evaluations: int,
    progress: Callable[[int, int, float], None],
) -> Training:
    """Run a training and keep its best state; the state before it is one of the candidates.

    Args:
        windows: `steps` batches of (windows, length) token ids.
        steps: How many there are.
        learn: Does one step on a batch and returns its loss.
        held_out_kl: Measures the present state.
        snapshot: Copies the present state.
        evaluations: How often to measure, evenly spread, the last time at the end.
        progress: Called after each step with steps done, steps in all, and the loss.

    Raises:
        PocketlmError: The loss is not a number.
    """
    measured, losses, tokens, began = [(0, held_out_kl())], [], 0, time.monotonic()
    best = snapshot()
    evaluate_at = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    with reusing_memory():
        for step, batch in enumerate(windows, 1):
            loss = learn(batch)
            if not math.isfinite(loss):
                raise PocketlmError(f"The loss became {loss} at step {step}. Use a lower learning rate")
            losses.append(loss)
            tokens += batch.numel()
            if step in evaluate_at:
                measured.append((step, held_out_kl()))
                if measured[-1][1] < min(kl for _, kl in measured[:-1]):
                    best = snapshot()
            progress(step, steps, loss)
    return Training(best, measured, losses, tokens / (time.monotonic() - began))
