"""The one walk through a model that every layer-wise method uses.

    for layer in sweep(network, windows):
        for edge, linear in layer.linears():
            write_weight(linear, gptq(read_weight(linear), layer.gram[edge.reads], form).decode())

The method is the body of the loop. When the body is done the generator goes on: it pushes the text through the
block as the body left it, so the next layer's statistics already contain this layer's error. Only the hidden
states between two blocks are kept.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import Edge, anatomy_of, blocks_of
from pocketlm.model.compute import fast_forward, fast_products

HEAD = Edge("lm_head", "head_in", "vocabulary")
"""The output head as an edge: what the last norm writes, the head reads."""

Importance = Mapping[tuple[int, str], Tensor]
"""How much each token counts for what reads a space, (windows, length) float32 with a mean of 1: by the index of a
block (their number for the head) and the space."""

WINDOWS_AT_ONCE = 8
SWEPT_AT_ONCE = 4  # a sweep is as fast with them as with 8, and takes less memory
PANEL = 256  # columns of second moments that are computed together


@dataclass
class Layer:
    """One stop of the sweep: a decoder block, or the head, with the second moments of what its linears read.

    Attributes:
        name: Its path in the network, such as `model.layers.3`; empty for the head.
        index: Position among the blocks; their number for the head.
        module: The block; for the head, the whole network.
        edges: The linears to visit.
        gram: Per space that is read, (width, width) float32, the sum of x xᵀ over all tokens, each as often as it
            counts.
        drift: Per space, (width, width) float32, the sum of (x̃ - x) xᵀ where x̃ is what the original model has there;
            empty unless asked for. Tokens count as in `gram`.
        states: What the block reads, one (windows, length, width) tensor per batch; empty for the head.
        targets: What the block writes in the original model, likewise; empty unless asked for.
        keywords: What the model passes to the block beside it, per batch.
    """

    name: str
    index: int
    module: nn.Module
    edges: tuple[Edge, ...]
    gram: dict[str, Tensor] = field(default_factory=dict)
    drift: dict[str, Tensor] = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    keywords: list[dict] = field(default_factory=list)

    def linears(self) -> Iterator[tuple[Edge, nn.Module]]:
        """Yield every linear of this stop with its place in the anatomy."""
        for edge in self.edges:
            yield edge, self.module.get_submodule(edge.path)

    def parameter_name(self, edge: Edge) -> str:
        """Return the name of an edge's weight in the network's state."""
        return ".".join(filter(None, (self.name, edge.path, "weight")))


@dataclass
class Rehearsal:
    """Text at the door of the first block.

    Attributes:
        hidden: One (windows, length, width) tensor per batch.
        keywords: Per block and batch, what the model passes beside the hidden states (masks, rotary tables).
    """

    hidden: list[Tensor]
    keywords: list[list[dict]]


@torch.no_grad()
def sweep(
    network: nn.Module,
    windows: Tensor,
    head: bool = False,
    spaces: tuple[str, ...] | None = None,
    original: bool = False,
    importance: Importance | None = None,
) -> Iterator[Layer]:
    """Yield the decoder blocks of a network in order, each with the statistics of its own inputs.

    Args:
        network: A causal language model of a known family, in eval mode.
        windows: (windows, length) token ids.
        head: Whether to stop at the output head too, after the last block.
        spaces: Which spaces to take statistics of; all where None.
        original: Whether to push the text through the unchanged blocks too, for `drift` and `targets`.
        importance: How much each token counts in the statistics; all alike where None.
    """
    anatomy = anatomy_of(network)

    def weights(index: int, batch: int) -> dict[str, Tensor]:
        places = (importance or {}).items()
        return {space: values.split(SWEPT_AT_ONCE)[batch] for (at, space), values in places if at == index}

    hidden_path = rehearse(network, windows, SWEPT_AT_ONCE)
    hidden = hidden_path.hidden
    unchanged = list(hidden) if original else []
    for index, block in enumerate(blocks_of(network)):
        layer = Layer(f"{anatomy.blocks}.{index}", index, block, anatomy.edges)
        layer.states, layer.keywords = hidden, hidden_path.keywords[index]
        for batch, keywords in enumerate(layer.keywords):
            wanted = {}
            if original:
                with watching(layer, spaces or anatomy.inputs, wanted.__setitem__):
                    layer.targets.append(run_block(block, unchanged[batch], keywords))
            add = partial(_add_moments, layer, wanted, weights(index, batch))
            with watching(layer, spaces or anatomy.inputs, add, stop=True), suppress(Heard):
                run_block(block, hidden[batch], keywords)
        yield layer
        unchanged = layer.targets
        for batch, keywords in enumerate(hidden_path.keywords[index]):
            hidden[batch] = run_block(block, hidden[batch], keywords)
    if head:
        norm = network.get_submodule(anatomy.final_norm)
        layer = Layer("", len(blocks_of(network)), network, (HEAD,))
        for batch, states in enumerate(hidden):
            wanted = {HEAD.reads: norm(unchanged[batch])} if original else {}
            _add_moments(layer, wanted, weights(layer.index, batch), HEAD.reads, norm(states))
        yield layer


def run_block(block: nn.Module, states: Tensor, keywords: dict) -> Tensor:
    """Run hidden states, (windows, length, width), through one block."""
    with fast_forward(states.device):
        out = block(states, **keywords)
    return out[0] if isinstance(out, tuple) else out


def run_batches(block: nn.Module, states: list[Tensor], keywords: list[dict]) -> list[Tensor]:
    """Run hidden states, one (windows, length, width) per batch, through one block."""
    return [run_block(block, x, extra) for x, extra in zip(states, keywords, strict=True)]


def second_moment(x: Tensor) -> Tensor:
    """Return the sum of x xᵀ over tokens, (width, width) float32, for x of (..., width)."""
    x = x.flatten(0, -2).float()
    moment = x.new_empty(x.shape[1], x.shape[1])
    for start in range(0, x.shape[1], PANEL):  # the matrix is symmetric: only what is right of the panel's start
        rows = slice(start, start + PANEL)
        moment[rows, start:] = x[:, rows].T @ x[:, start:]
        after = slice(start + PANEL, None)
        moment[after, rows] = moment[rows, after].T
    return moment


@torch.no_grad()
def rehearse(network: nn.Module, windows: Tensor, at_once: int = WINDOWS_AT_ONCE) -> Rehearsal:
    """Run a network with blocks that pass their input through, and note what each block is given.

    No block computes anything; whatever per-layer arguments a family has are collected as the model itself makes
    them. Each stand-in is an attribute that hides the block's own `forward` and is deleted again.
    """
    blocks = blocks_of(network)
    hidden: list[Tensor] = []
    keywords: list[list[dict]] = [[] for _ in blocks]

    def stand_in(index: int):  # noqa: ANN202
        def forward(states: Tensor, *positional: object, **extra: object) -> Tensor:
            if positional and any(value is not None for value in positional):
                raise TypeError(f"Block {index} takes positional arguments besides its hidden states")
            if index == 0:
                hidden.append(states.float())  # the residual stream adds up in float32 whatever the weights are
            keywords[index].append(extra)
            return states

        return forward

    for index, block in enumerate(blocks):
        block.forward = stand_in(index)
    try:
        for batch in windows.split(at_once):
            network.base_model(input_ids=batch, use_cache=False)
    finally:
        for block in blocks:
            del block.forward
    return Rehearsal(hidden, keywords)


class Heard(Exception):
    """What was wanted of a block was heard; the rest of it need not run."""


@contextmanager
def watching(
    layer: Layer, spaces: tuple[str, ...], see: Callable[[str, Tensor], None], stop: bool = False
) -> Iterator[None]:
    """While open, call `see` with each of the given spaces of a layer and what is read there: once, not per linear.

    With `stop` one pass through the block ends behind the last of them, by raising `Heard`.
    """
    first_readers = {edge.reads: edge for edge in reversed(layer.edges) if edge.reads in spaces}
    unseen = set(first_readers)

    def watch(edge: Edge) -> torch.utils.hooks.RemovableHandle:
        def look(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            see(edge.reads, args[0])
            unseen.discard(edge.reads)
            if stop and not unseen:
                raise Heard

        return layer.module.get_submodule(edge.path).register_forward_pre_hook(look)

    with ExitStack() as hooks:
        for edge in first_readers.values():
            hooks.enter_context(watch(edge))
        yield


def _add_moments(layer: Layer, wanted: dict[str, Tensor], weights: dict[str, Tensor], space: str, x: Tensor) -> None:
    """Add what is read at a space, (..., width), to a layer's statistics.

    Args:
        layer: Whose `gram` and `drift` grow.
        wanted: What should be read, by space; empty without `drift`.
        weights: How much each token counts, by space; empty where all count alike.
        space: That is read.
        x: What is read.
    """
    with torch.autocast(x.device.type, enabled=False), fast_products(x.device):  # hooks run inside the pass's autocast
        roots = weights[space].flatten().sqrt()[:, None] if space in weights else None
        read = x.flatten(0, -2).float()
        seen = read if roots is None else roots * read
        layer.gram[space] = layer.gram.get(space, 0) + second_moment(seen)
        if space in wanted:
            away = wanted[space].flatten(0, -2).float() - read
            away = away if roots is None else roots * away
            layer.drift[space] = layer.drift.get(space, 0) + away.T @ seen


@torch.no_grad()
def final_hidden(network: nn.Module, windows: Tensor) -> Tensor:
    """Return what the head reads, (windows, length, width) float32."""
    with fast_forward(windows.device):
        parts = [
            network.base_model(input_ids=batch, use_cache=False).last_hidden_state.float()
            for batch in windows.split(WINDOWS_AT_ONCE)
        ]
    return torch.cat(parts)


@torch.no_grad()
def logits_of(network: nn.Module, tokens: list[int]) -> Tensor:
    """Return the logits behind each token of one window, (tokens, vocabulary) float32."""
    hidden = final_hidden(network, torch.tensor([tokens], device=network.device))[0]
    return hidden @ network.lm_head.weight.float().T
