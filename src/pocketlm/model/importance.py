"""How much each token counts for a linear: how far the model's probabilities move when what it puts out there does.

Second moments of a linear's inputs take every token for as important as any other. But a change of what a linear puts
out is felt at some tokens a hundred times as much as at others: where a channel's gate is shut, or where nothing
attends to, hardly at all.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of
from pocketlm.model.compute import fast_forward, reusing_memory
from pocketlm.model.learning import recomputing, through_head
from pocketlm.model.sweep import HEAD, Importance

# Of the tokens' worth of statistics that counting them unevenly must leave. Squared gradients have a heavy tail: one
# token in a hundred would decide all of what attention reads.
EFFECTIVE = 0.5
HALVINGS = 12  # of the interval that the power is searched in


def token_importance(
    network: nn.Module,
    windows: Tensor,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Importance:
    """Return how much each token counts for the linears that read a space.

    The squared gradient of the model's own loss by what these linears put out, as in GuidedQuant
    (https://arxiv.org/abs/2505.07004), whose groups of output channels are here all that read one space. The loss is
    that of Fisher's information: its gradient by the logits is (diag(√p) - p √pᵀ) ε with random signs ε, whose mean
    square is the Hessian of the KL divergence, diag(p) - p pᵀ; drawn labels have that mean too, and more noise.

    Args:
        network: A causal language model, in eval mode; unchanged afterwards.
        windows: (windows, length) token ids.
        seed: Of the signs.
        progress: Called after each window with how many are done and how many there are.
    """
    count = len(blocks_of(network))
    edges = [*((index, edge) for index in range(count) for edge in anatomy_of(network).edges), (count, HEAD)]
    # All made before the first pass: what is kept from pass to pass between large tensors breaks the memory up that
    # these leave, and 128 windows of SmolLM2-135M took 13 GB.
    squares = {(index, edge.path): windows.new_empty(windows.shape, dtype=torch.float32) for index, edge in edges}
    generator = torch.Generator(windows.device).manual_seed(seed)

    def note(index: int, path: str, slope: Tensor, places: slice = slice(None)) -> None:
        squares[index, path][row, places] = slope.detach().float().square().sum(-1).flatten()

    def judged(places: slice, logits: Tensor) -> tuple[Tensor, Tensor]:
        slope = fisher_gradient(logits.float(), generator)
        note(count, HEAD.path, slope, places)
        return slope.new_zeros(len(slope)), slope

    with _watching_gradients(network, note), recomputing(network), reusing_memory():
        for row, window in enumerate(windows.split(1)):
            with torch.enable_grad(), fast_forward(window.device):
                start = network.get_input_embeddings()(window).detach().requires_grad_(True)
                hidden = network.base_model(inputs_embeds=start, use_cache=False).last_hidden_state
                _, slope = through_head(hidden.detach().flatten(0, 1), None, network.lm_head, judged, 1)
                hidden.backward(slope.view_as(hidden))
            progress(row + 1, len(windows))
    readers: dict[tuple[int, str], list[Tensor]] = {}
    for index, edge in edges:
        readers.setdefault((index, edge.reads), []).append(squares[index, edge.path])
    return {place: _together(parts) for place, parts in readers.items()}


@contextmanager
def _watching_gradients(network: nn.Module, see: Callable[[int, str, Tensor], None]) -> Iterator[None]:
    """While open, call `see` with a block's index, a linear's path and the gradient of its output; no weight learns."""
    learning = [(value, value.requires_grad) for value in network.parameters()]
    network.requires_grad_(False)

    def watch(index: int, path: str, _: nn.Module, __: tuple, slopes: tuple[Tensor, ...]) -> None:
        see(index, path, slopes[0])

    try:
        with ExitStack() as hooks:
            for (index, block), edge in product(enumerate(blocks_of(network)), anatomy_of(network).edges):
                linear = block.get_submodule(edge.path)
                hooks.enter_context(linear.register_full_backward_hook(partial(watch, index, edge.path)))
            yield
    finally:
        for value, learns in learning:
            value.requires_grad_(learns)


def fisher_gradient(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random gradient by logits, (tokens, words), whose mean square is the Hessian of the KL divergence."""
    chances = logits.softmax(-1)
    signs = torch.randint(0, 2, chances.shape, generator=generator, dtype=torch.int8, device=chances.device)
    slope = chances.sqrt().mul_(signs.mul_(2).sub_(1))
    return slope.addcmul_(chances, slope.sum(-1, keepdim=True), value=-1)


def _together(parts: list[Tensor]) -> Tensor:
    """Return one importance for linears that read the same, each of them counting alike."""
    return tempered(torch.stack([part / part.mean().clamp_min(1e-30) for part in parts]).sum(0))


def tempered(weights: Tensor) -> Tensor:
    """Return weights to the highest power up to 1 at which they are worth EFFECTIVE of as many equal ones; mean 1.

    What weights are worth is Kish's effective sample size, (Σ w)² / Σ w².

    Args:
        weights: Not negative.
    """
    if _worth(weights) < EFFECTIVE:
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if _worth(weights**middle) >= EFFECTIVE else (low, middle)
        weights = weights**low
    return weights / weights.mean().clamp_min(1e-30)


def _worth(weights: Tensor) -> float:
    """Return the effective sample size as a share of how many there are."""
    return (weights.mean().square() / weights.square().mean().clamp_min(1e-30)).item()
