"""Recover what pruning lost: the smaller model learns the original's next-token probabilities."""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pocketlm.errors import BadInputError, PocketlmError
from pocketlm.model.anatomy import blocks_of
from pocketlm.model.compute import fast_forward
from pocketlm.model.judge import POSITIONS_AT_ONCE, divergence_of, judge
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.sweep import final_hidden
from pocketlm.steps.report import StepReport
from pocketlm.tensors.divergence import kl_divergence

CHECKPOINT_PARAMETERS = 400_000_000  # above this, the backward pass recomputes activations to save memory


@dataclass(frozen=True, kw_only=True)
class Distil:
    """How the recovery is trained.

    The learning rate is for a few dozen steps from a mildly pruned model: on the demo model with FFNs of 1248 channels,
    8 steps at 6e-5 lowered the held-out KL from 0.087 to 0.084, 2e-5 to 0.085, and 24 steps at 2e-4 raised it.
    """

    step: Literal["distil"] = "distil"
    tokens: int
    """Tokens to train on; the text is repeated where there is less."""
    learning_rate: float = 6e-5
    windows_per_step: int = 4
    warm_up: float = 0.1
    """Share of the steps over which the learning rate rises."""
    evaluations: int = 3
    """How often the held-out divergence is measured; the best of these checkpoints is kept."""
    seed: int = 0


def distil(
    teacher: LanguageModel,
    student: LanguageModel,
    config: Distil,
    windows: Tensor,
    held_out: Tensor,
    progress: Callable[[int, int, float], None] = lambda done, total, loss: None,
) -> tuple[LanguageModel, StepReport]:
    """Train `student` on KL(teacher ‖ student) over full next-token distributions, at temperature 1.

    Logits-only forward KL, as pruned models are best recovered (Minitron, https://arxiv.org/abs/2407.14679). The
    checkpoint with the lowest held-out divergence is kept, and the untrained student is one of the candidates.

    Args:
        teacher: The original; not changed.
        student: Trained in place and returned.
        config: How long and how fast.
        windows: (windows, length) token ids to learn from.
        held_out: (windows, length) token ids to choose the checkpoint by.
        progress: Called after each step with steps done, steps in all, and the loss.

    Raises:
        PocketlmError: The loss is not a number.
    """
    if teacher.network.config.vocab_size != student.network.config.vocab_size:
        raise BadInputError("Teacher and student have different vocabularies, so probabilities cannot be compared")
    if min(config.tokens, config.windows_per_step, len(windows), len(held_out)) < 1:
        raise BadInputError("distil needs `tokens` and `windows_per_step` of at least 1, and some text")
    network = student.network
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    large = sum(parameter.numel() for parameter in trained) > CHECKPOINT_PARAMETERS
    steps = max(1, config.tokens // (config.windows_per_step * windows.shape[1]))
    optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, steps, config.warm_up))
    opinion = judge(teacher.network, held_out)
    held_out_kl = [(0, divergence_of(network, held_out, opinion))]
    best, best_state = held_out_kl[0][1], copy.deepcopy(network.state_dict())
    evaluate_at = {round(steps * (i + 1) / config.evaluations) for i in range(config.evaluations)}
    losses, began = [], time.monotonic()
    for step, batch in enumerate(_batches(windows, config, steps), 1):
        with _recomputing(network) if large else nullcontext():
            loss = _train_step(teacher.network, network, batch)
        if not math.isfinite(loss):
            raise PocketlmError(f"The distillation loss became {loss} at step {step}. Use a lower learning_rate")
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        if step in evaluate_at:
            held_out_kl.append((step, divergence_of(network, held_out, opinion)))
            if held_out_kl[-1][1] < best:
                best, best_state = held_out_kl[-1][1], copy.deepcopy(network.state_dict())
        progress(step, steps, loss)
    network.load_state_dict(best_state)
    speed = steps * batch.numel() / (time.monotonic() - began)
    details = {"losses": losses, "held_out_kl": held_out_kl, "tokens_per_second": round(speed, 1)}
    return student, _report(held_out_kl[0][1], best, details)


def _report(before: float, best: float, details: dict) -> StepReport:
    if best < before:
        summary = f"held-out KL to the original fell from {before:.4f} to {best:.4f} nats per token"
    else:
        summary = "distillation did not lower the held-out KL, so the pruned model is kept as it was"
    return StepReport("distil", summary, details | {"kept": best < before})


def _cosine(step: int, steps: int, warm_up: float) -> float:
    rise = max(1, round(warm_up * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _batches(windows: Tensor, config: Distil, steps: int) -> Iterator[Tensor]:
    """Yield `steps` batches; every pass over the text has a new order, all decided by the seed."""
    generator = torch.Generator().manual_seed(config.seed)
    order: list[int] = []
    for _ in range(steps):
        while len(order) < config.windows_per_step:
            order += torch.randperm(len(windows), generator=generator).tolist()
        batch, order = order[: config.windows_per_step], order[config.windows_per_step :]
        yield windows[batch]


@contextmanager
def _recomputing(network: nn.Module) -> Iterator[None]:
    """While open, no block keeps its activations: the backward pass runs it again."""
    for block in blocks_of(network):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks_of(network):
            del block.forward


def _train_step(teacher: nn.Module, student: nn.Module, batch: Tensor) -> float:
    """Add the gradient of one batch to the student's parameters; return its loss in nats per token."""
    truth = final_hidden(teacher, batch).flatten(0, 1)
    with fast_forward(batch.device):
        hidden = student.base_model(input_ids=batch, use_cache=False).last_hidden_state.flatten(0, 1)
        # The head runs position by position on a detached copy: each chunk's logits are gone after its backward.
        leaf = hidden.detach().requires_grad_()
        total = 0.0
        for start in range(0, len(leaf), POSITIONS_AT_ONCE):
            chunk = slice(start, start + POSITIONS_AT_ONCE)
            with torch.no_grad():
                target = teacher.lm_head(truth[chunk])
            loss = kl_divergence(target, student.lm_head(leaf[chunk])).sum() / len(leaf)
            loss.backward()
            total += loss.item()
    hidden.backward(leaf.grad)
    return total
