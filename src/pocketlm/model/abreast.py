"""Walk through a network that is being cut beside its original, so that what is left can take over what went.

    for pair in abreast(network, windows):
        for path in pair.writers:
            pair.resolve_writer(path, *pair.moments(path))

Both carry the same text: the original's hidden states go through the blocks as they were, the others through the
blocks as the body of the loop left them. A linear is re-solved by least squares on what it reads now, towards what
the residual stream of the original is behind it, so that earlier losses are made good as far as its inputs can tell.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import Anatomy, anatomy_of, blocks_of, read_weight, write_weight
from pocketlm.model.sweep import rehearse, run_block, second_moment
from pocketlm.tensors.reconstruction import solve_towards

DAMPING = 0.03


@dataclass
class Pair:
    """One decoder block and a copy of what it was.

    Attributes:
        index: Position among the original's blocks.
        block: The block to change.
        original: As it was.
        anatomy: Of the family.
        states: What the block reads, (windows, length, width) per batch.
        clean: What the original read.
        goal: What the original's residual stream is behind the block, and behind the dropped blocks that follow.
        keywords: What the model passes to the block beside the states, per batch.
        left: What the block as it was left puts out; there when the walk has gone on.
        touched: Whether the block was changed.
        read: What the original's linears read, by space and batch.
        wrote: What the original's writers of the residual stream put out, by path and batch.
        basis: (old width, new width), the directions of the residual stream that are kept; None for all.
    """

    index: int
    block: nn.Module
    original: nn.Module
    anatomy: Anatomy
    states: list[Tensor]
    clean: list[Tensor]
    keywords: list[dict]
    basis: Tensor | None = None
    goal: list[Tensor] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    touched: bool = False
    read: dict[str, list[Tensor]] = field(default_factory=dict)
    wrote: dict[str, list[Tensor]] = field(default_factory=dict)

    def resolve_readers(self, space: str) -> None:
        """Re-solve what reads the residual stream through a norm, towards what the original's linears put out.

        Args:
            space: That the linears read; their present weights are what they stay near to.
        """
        self.touched = True
        gram, cross = 0, 0
        first, *_ = self.anatomy.readers(space)
        for goal, (inputs, _) in zip(self.read[space], self._arrivals(first), strict=True):
            x = inputs.flatten(0, -2).float()
            gram, cross = gram + second_moment(inputs), cross + goal.flatten(0, -2).float().T @ x
        for path in self.anatomy.readers(space):
            linear, whole = self.block.get_submodule(path), read_weight(self.original.get_submodule(path))
            write_weight(linear, solve_towards(read_weight(linear), gram, whole.float() @ cross, DAMPING))

    def moments(self, path: str) -> tuple[Tensor, Tensor]:
        """Return what re-solving a writer of the residual stream takes: the sums of x xᵀ and of t xᵀ.

        x is what the linear reads now; t is what it would have to put out for the stream to be the original's behind
        it. Where a norm stands between the linear and the stream (Gemma), t is what the original's linear put out.
        Each token is divided by the root mean square of the original's stream, as the norms that read it do: the few
        tokens with huge states would count for all others else.

        Args:
            path: In the block.

        Returns:
            (columns, columns) and (rows, columns), float32.
        """
        bias = self.block.get_submodule(path).bias
        gram, cross = 0, 0
        for batch, (inputs, stream) in enumerate(self._arrivals(path)):
            goal, scale = self._goal(path, batch)
            goal = goal - (0 if self.anatomy.norms_behind else stream) - (0 if bias is None else bias)
            x, t = (inputs.float() / scale).flatten(0, -2), (goal / scale).flatten(0, -2)
            gram, cross = gram + second_moment(x), cross + t.T @ x
        return gram, cross

    def resolve_writer(self, path: str, gram: Tensor, cross: Tensor) -> None:
        """Re-solve a writer of the residual stream with its `moments`, of the channels that it still reads."""
        self.touched = True
        linear = self.block.get_submodule(path)
        write_weight(linear, solve_towards(read_weight(linear), gram, cross, DAMPING))

    @property
    def drifted(self) -> bool:
        """Whether what the block reads differs from what the original read."""
        return self.states is not self.clean

    @property
    def writers(self) -> list[str]:
        """The linears that write the residual stream, in order."""
        return self.anatomy.writers("residual")

    def project(self, x: Tensor) -> Tensor:
        """Return the kept directions of what is in the original's residual stream."""
        return x if self.basis is None else x.float() @ self.basis

    def _goal(self, path: str, batch: int) -> tuple[Tensor, Tensor]:
        """Return what there should be behind a writer, (windows, length, width), and each token's root mean square."""
        position = self.writers.index(path)
        if self.anatomy.norms_behind:
            goal = self.wrote[path][batch].float()
        elif position == len(self.writers) - 1:
            goal = self.goal[batch]
        else:
            goal = self.clean[batch] + sum(self.wrote[writer][batch] for writer in self.writers[: position + 1])
        return self.project(goal), goal.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)

    def _arrivals(self, path: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what a linear reads now, and the residual stream that its output is added to, batch by batch."""
        earlier = self.writers[: self.writers.index(path)] if path in self.writers else []
        for states, keywords in zip(self.states, self.keywords, strict=True):
            with listening(self.block, [path], earlier, stop=True) as (read, wrote), suppress(_Heard):
                run_block(self.block, states, keywords)
            yield read[path], states + sum(wrote[writer].float() for writer in earlier)


class _Heard(Exception):
    """What was wanted of a block was heard; the rest of it need not run."""


@contextmanager
def listening(
    block: nn.Module, readers: list[str], writers: list[str], stop: bool = False
) -> Iterator[tuple[dict, dict]]:
    """While open, keep what some linears of a block read and what others put out, by path; perhaps stop behind it."""
    read: dict[str, Tensor] = {}
    wrote: dict[str, Tensor] = {}

    def hear(path: str, kept: dict[str, Tensor], output: bool):  # noqa: ANN202
        def keep(_: nn.Module, args: tuple[Tensor, ...], out: Tensor | None = None) -> None:
            kept[path] = out if output else args[0]
            if stop and not output:
                raise _Heard

        return keep

    handles = [block.get_submodule(path).register_forward_pre_hook(hear(path, read, False)) for path in readers]
    handles += [block.get_submodule(path).register_forward_hook(hear(path, wrote, True)) for path in writers]
    try:
        yield read, wrote
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def abreast(
    network: nn.Module, windows: Tensor, skip: frozenset[int] = frozenset(), basis: Tensor | None = None
) -> Iterator[Pair]:
    """Yield the decoder blocks of a network in order, each beside a copy of what it was.

    Args:
        network: A causal language model of a known family; the body of the loop changes its blocks.
        windows: (windows, length) token ids.
        skip: Blocks that the network being cut goes without; they are not yielded, and stay where they are.
        basis: (old width, new width), what the residual stream is multiplied by on entry.
    """
    anatomy, start = anatomy_of(network), rehearse(network, windows)
    blocks, clean = list(blocks_of(network)), start.hidden
    states = clean if basis is None else [hidden @ basis for hidden in clean]
    for index, block in enumerate(blocks):
        if index in skip:
            clean = _through(block, clean, start.keywords[index])
            continue
        pair = Pair(index, block, copy.deepcopy(block), anatomy, states, clean, start.keywords[index], basis)
        own = clean = pair.goal = _listen(pair)
        for later in range(index + 1, len(blocks)):
            if later not in skip:
                break
            pair.goal = _through(blocks[later], pair.goal, start.keywords[later])
        yield pair
        same = not pair.drifted and not pair.touched
        states = pair.left = own if same else _through(block, states, pair.keywords)


def _through(block: nn.Module, states: list[Tensor], keywords: list[dict]) -> list[Tensor]:
    return [run_block(block, x, extra) for x, extra in zip(states, keywords, strict=True)]


def _listen(pair: Pair) -> list[Tensor]:
    """Run the original, note what its linears read and wrote, and return its output."""
    spaces = {edge.reads: edge.path for edge in reversed(pair.anatomy.edges) if edge.writes != "residual"}
    pair.read = {space: [] for space in spaces}
    pair.wrote = {path: [] for path in pair.writers}
    out = []
    for states, keywords in zip(pair.clean, pair.keywords, strict=True):
        with listening(pair.original, list(spaces.values()), pair.writers) as (read, wrote):
            out.append(run_block(pair.original, states, keywords))
        for space, path in spaces.items():
            pair.read[space].append(read[path])
        for path in pair.writers:
            pair.wrote[path].append(wrote[path])
    return out


@torch.no_grad()
def stream_moments(network: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second moments of the residual stream, each token scaled to mean square 1 as norms scale it.

    Returns:
        Summed over all that the blocks read, and of what the last norm reads; (width, width) each.
    """
    start, inner = rehearse(network, windows), 0
    states = start.hidden
    for index, block in enumerate(blocks_of(network)):
        norms = [block.get_submodule(path) for path in anatomy_of(network).norms.values()]
        taken: list[Tensor] = []
        handles = [norm.register_forward_pre_hook(partial(_take, taken)) for norm in norms]
        for batch, keywords in enumerate(start.keywords[index]):
            states[batch] = run_block(block, states[batch], keywords)
            inner = inner + sum(second_moment(_scaled(x)) for x in taken)
            taken.clear()
        for handle in handles:
            handle.remove()
    return inner, sum(second_moment(_scaled(x)) for x in states)


def _take(taken: list[Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    taken.append(args[0])


def _scaled(x: Tensor) -> Tensor:
    return x.float() / x.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)


@torch.no_grad()
def resolve_end(network: nn.Module, norm: nn.Module, head: Tensor, last: Pair) -> None:
    """Fit what follows the last block of a narrowed network to the original.

    A head of its own is re-solved towards the original's logits. One that is tied to the embedding stays, and the
    last norm's weights are rescaled, channel by channel, so that what it reads comes closest to the original's.

    Args:
        network: Cut, with its ends narrowed; its last norm and head are changed.
        norm: The last norm as it was.
        head: The head's weights as they were.
        last: The last pair of the walk, whose basis is not None.
    """
    narrow, anatomy = network.get_submodule(anatomy_of(network).final_norm), last.anatomy
    embedding = network.get_input_embeddings()
    tied = network.lm_head.weight is embedding.weight
    gram, cross = 0, 0
    for x, y in zip(last.left, last.goal, strict=True):
        read, wanted = narrow(x).flatten(0, -2).float(), norm(y).flatten(0, -2).float()
        gram, cross = gram + read.T @ read, cross + wanted.T @ read
    if not tied:
        write_weight(network.lm_head, solve_towards(network.lm_head.weight, gram, head @ cross, DAMPING))
        return
    factor = (
        (len(last.basis) / last.basis.shape[1]) ** 0.5 if getattr(embedding, "embed_scale", None) is not None else 1
    )
    ratio = (last.basis.T @ cross).diagonal() / gram.diagonal().clamp_min(1e-30) / factor
    narrow.weight.copy_((narrow.weight + anatomy.norm_offset) * ratio - anatomy.norm_offset)
