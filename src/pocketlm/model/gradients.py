"""What the loss is sensitive to: gradients behind the matrices that write the residual stream."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of, read_weight
from pocketlm.model.compute import fast_forward

POSITIONS_AT_ONCE = 256  # logits of so many positions are in memory together


@dataclass
class Gradients:
    """Sums over the positions of some text, behind one linear.

    Attributes:
        fisher: (rows, rows) float32, of g gᵀ, where g is the gradient of the loss by what the linear puts out.
        taylor: (columns,) float32, of (x_j (Wᵀ g)_j)²: what the loss would change by, to first order, without column j.
    """

    fisher: Tensor
    taylor: Tensor


def gradients_of(network: nn.Module, windows: Tensor, seed: int = 0) -> list[dict[str, Gradients]]:
    """Return the gradients behind every writer of the residual stream, by block and path in it.

    The loss is the cross-entropy of tokens drawn from what the network itself predicts, so that g gᵀ is its Fisher
    information: to second order the KL of a small change d of what a linear puts out is E[(gᵀ d)²] / 2.

    Args:
        network: Left as it is; only activations have gradients.
        windows: (windows, length) token ids; one window is in memory at a time.
        seed: Of the draws.
    """
    paths = anatomy_of(network).writers("residual")
    found: list[dict[str, Gradients]] = [{} for _ in blocks_of(network)]
    generator = torch.Generator(windows.device).manual_seed(seed)

    def listen(index: int, path: str):  # noqa: ANN202
        def hear(linear: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
            x = args[0].detach().flatten(0, -2).float()

            def add(slope: Tensor) -> None:
                g = slope.flatten(0, -2).float()
                new = Gradients(g.T @ g, (x * (g @ read_weight(linear).float())).square().sum(0))
                old = found[index].get(path)
                found[index][path] = Gradients(old.fisher + new.fisher, old.taylor + new.taylor) if old else new

            out.register_hook(add)

        return hear

    blocks = enumerate(blocks_of(network))
    handles = [b.get_submodule(path).register_forward_hook(listen(i, path)) for i, b in blocks for path in paths]
    try:
        with torch.enable_grad(), _frozen(network):
            for window in windows.split(1):
                with fast_forward(windows.device):
                    hidden = network.base_model(input_ids=window, use_cache=False).last_hidden_state
                hidden.backward(_slope_of_draws(hidden.detach(), network.lm_head, generator))
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def _slope_of_draws(hidden: Tensor, head: nn.Module, generator: torch.Generator) -> Tensor:
    """Return the gradient, by what the head reads, of the summed cross-entropy of tokens drawn from its prediction."""
    states = hidden.flatten(0, -2)
    slope = torch.empty_like(states)
    for start in range(0, len(states), POSITIONS_AT_ONCE):
        part = slice(start, start + POSITIONS_AT_ONCE)
        by_logits = head(states[part]).float().softmax(-1)
        drawn = torch.multinomial(by_logits, 1, generator=generator)
        by_logits.scatter_add_(1, drawn, torch.full_like(drawn, -1, dtype=by_logits.dtype))
        slope[part] = (by_logits @ head.weight.float()).to(slope.dtype)
    return slope.view_as(hidden)


@contextmanager
def _frozen(network: nn.Module) -> Iterator[None]:
    """While open, weights have no gradients, and what the embedding puts out has."""
    learns = {parameter: parameter.requires_grad for parameter in network.parameters()}
    embedding = network.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
    try:
        network.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter, learned in learns.items():
            parameter.requires_grad_(learned)
