"""Learned rounding, block by block: codes and scales that make the block's output what it was."""

import torch
from torch import Tensor, nn

from pocketlm.model.learning import Updates
from pocketlm.model.sweep import Layer, run_block
from pocketlm.steps.learner import Learner, learning_groups
from pocketlm.tensors.formats import Quantized

CODE_RATE = 0.03  # in gaps between two levels
SCALE_RATE = 5e-4  # relative to the scale
WARM_UP = 0.05  # of the iterations
WINDOWS_PER_STEP = 2


def learn_rounding(
    layer: Layer, starts: dict[nn.Module, Quantized], iterations: int, seed: int, importance: Tensor | None = None
) -> dict[nn.Module, Quantized]:
    """Return codes and scales with a lower error of the block's output than those to start from.

    As in SignRound (https://arxiv.org/abs/2309.05516) rounding passes gradients straight through, the loss is the mean
    squared error of the block's output (to the original model's where the sweep has that), each token counting by what
    it matters to the model's own output, or else divided by its mean square, as the norms that read it do. The start is
    GPTQ's codes; kept is what has the lowest loss on all windows of the start, the middle and the end.

    Args:
        layer: A block with the weights it had; its weights are changed.
        starts: What each of its linears would store.
        iterations: Steps of AdamW.
        seed: Of the order of windows.
        importance: (windows, length), how much each token of the block's output counts.
    """
    windows = [
        (states[i : i + 1], _of_window(keywords, i, len(states)))
        for states, keywords in zip(layer.states, layer.keywords, strict=True)
        for i in range(len(states))
    ]
    with torch.no_grad():
        whole = [target.float().split(1) for target in layer.targets]
        targets = [target for batch in whole for target in batch] or [
            run_block(layer.module, states, keywords).float() for states, keywords in windows
        ]
        if importance is None:
            importance = torch.cat([1 / target.square().mean(-1).clamp_min(1e-12) for target in targets])
        weights = (importance / importance.mean()).split(1)
    with torch.enable_grad():
        learners = {linear: Learner(linear, start, codes_too=True) for linear, start in starts.items()}
        return _learn(layer.module, windows, list(zip(targets, weights, strict=True)), learners, iterations, seed)


def _learn(
    block: nn.Module,
    windows: list[tuple[Tensor, dict]],
    goals: list[tuple[Tensor, Tensor]],
    learners: dict[nn.Module, Learner],
    iterations: int,
    seed: int,
) -> dict[nn.Module, Quantized]:
    parameters = list(block.parameters())
    wanted = [parameter.requires_grad for parameter in parameters]
    block.requires_grad_(False)
    for linear in learners:
        linear.weight.requires_grad_(True)
    update = Updates(learning_groups(list(learners.values()), SCALE_RATE, CODE_RATE), iterations, WARM_UP)
    generator = torch.Generator().manual_seed(seed)

    def show() -> dict[nn.Module, Quantized]:
        return {linear: learner.show() for linear, learner in learners.items()}

    def error_on(window: int) -> Tensor:
        (states, keywords), (target, weight) = windows[window], goals[window]
        return ((run_block(block, states, keywords).float() - target).square().mean(-1) * weight).mean()

    @torch.no_grad()
    def error_on_all() -> float:
        return torch.stack([error_on(window) for window in range(len(windows))]).mean().item()

    best, lowest = show(), error_on_all()
    for step in range(1, iterations + 1):
        for pick in torch.randint(len(windows), (WINDOWS_PER_STEP,), generator=generator).tolist():
            error_on(pick).backward()
        for learner in learners.values():
            learner.take_gradient()
        update()
        now = show()
        if step in (iterations // 2, iterations) and (error := error_on_all()) < lowest:
            best, lowest = now, error
    for parameter, value in zip(parameters, wanted, strict=True):
        parameter.requires_grad_(value)
    return best


def _of_window(keywords: dict, index: int, count: int) -> dict:
    """Return a batch's keyword arguments for one of its windows: what is there per window is cut."""

    def cut(value: object) -> object:
        if isinstance(value, Tensor) and value.dim() and value.shape[0] == count and count > 1:
            return value[index : index + 1]
        return tuple(cut(item) for item in value) if isinstance(value, tuple) else value

    return {name: cut(value) for name, value in keywords.items()}
