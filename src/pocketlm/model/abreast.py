"""Walk through a network that is being cut beside its original, so that what is left can take over what went.

    for pair in abreast(network, windows):
        for path in pair.writers:
            pair.resolve_writer(path, pair.moments(path))

Both carry the same text: the original's hidden states go through the blocks as they were, the others through the
blocks as the body of the loop left them. A linear is re-solved by least squares on what it reads now, towards what
the residual stream of the original is behind it, so that earlier losses are made good as far as its inputs can tell.
What makes the channels of an FFN can be re-solved towards the same, along the slopes of what stands in between.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import Anatomy, anatomy_of, blocks_of, read_weight, write_weight
from pocketlm.model.compute import as_forward, fast_forward
from pocketlm.model.surgery import entrance
from pocketlm.model.sweep import Heard, rehearse, run_batches, run_block, second_moment
from pocketlm.tensors.gauss_newton import Tangent, solve_changes
from pocketlm.tensors.reconstruction import Moments, solve_missing, solve_readers

DAMPINGS = (0.03, 0.1, 0.3, 1.0, 3.0)
# In a narrower stream all of what is missing and a choice of damping was worse than half of what earlier blocks lost
# and one damping: perplexity on wikitext-2 43.8 (16 windows of C4) against 39.6 (32 windows), dense 19.9.
NARROW_DAMPINGS = (0.1,)
NARROW_SHARE = 0.5


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
        read: What the original's linears read, by space and batch; nothing in a whole stream.
        wrote: What the original's writers of the residual stream put out, by path and batch, as far as it is wanted.
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
        """Re-solve what reads a narrowed stream through a norm, towards what the original's linears put out."""
        self.touched = True
        paths = self.anatomy.readers(space)
        seen = Sums()
        for wanted, (inputs, _) in zip(self.read[space], self._arrivals(paths[0]), strict=True):
            seen.add(inputs.float(), wanted.float())
        for path in paths:
            linear, whole = self.block.get_submodule(path), read_weight(self.original.get_submodule(path)).float()
            weight = read_weight(linear).float()
            # Both see the same tokens: what is missing is the original's output less the present one's.
            parts = [Moments(part.gram, whole @ part.cross - weight @ part.gram) for part in seen.parts]
            write_weight(linear, weight + solve_missing(*parts, NARROW_DAMPINGS).float())

    @torch.no_grad()
    def moments(self, path: str) -> tuple[Moments, Moments]:
        """Return what a writer of the residual stream reads now and what is missing behind it.

        Missing is what the stream of the original has behind the writer, less the stream that the pruned path has.
        Where a norm stands between the linear and the stream (Gemma), it is what the original's linear put out, less
        the present output. In a narrower stream each token is divided by the root mean square of the original's stream,
        as the norms that read it do: else the few tokens with huge states, which fewer directions cannot hold, would
        count for all others (hidden size 512 of the reference model: perplexity 49.7 instead of 43.4). In a whole
        stream tokens as they are did better: FFNs of 1,152 channels 40.2 instead of 41.7, 24 blocks 50.0, not 50.7.

        Args:
            path: In the block, before its columns are cut.

        Returns:
            Of the text to solve on and of the text that is held back.
        """
        sums = Sums()
        for batch, (inputs, stream) in enumerate(self._arrivals(path)):
            missing, scale = self._missing(path, batch, inputs, stream)
            sums.add(inputs.float() / scale, missing)
        return sums.parts

    def resolve_writer(self, path: str, moments: tuple[Moments, Moments], keep: Tensor | None = None) -> None:
        """Re-solve a writer of the residual stream on the columns that it has left.

        What it still reads comes closest to what it put out, and then to what is missing besides.

        Args:
            path: In the block; its columns are cut already.
            moments: From before.
            keep: The columns that are left; all where None.
        """
        self.touched = True
        linear = self.block.get_submodule(path)
        weight = read_weight(linear).float()
        if keep is not None:
            taught, held = moments
            whole = self.project_rows(read_weight(self.original.get_submodule(path)).float())
            weight = solve_readers(whole, taught.gram + held.gram, keep)
            solved = torch.zeros_like(whole)
            solved[:, keep] = weight
            # What is missing now: what was, and what the cut columns put out that the others do not.
            lost = whole - solved
            moments = tuple(Moments(part.gram, part.cross + lost @ part.gram).of(keep) for part in moments)
        dampings = DAMPINGS if self.basis is None else NARROW_DAMPINGS
        write_weight(linear, weight + solve_missing(*moments, dampings).float())

    @torch.no_grad()
    def resolve_channels(self) -> bool:
        """Re-solve what makes the channels of the FFN, and then what reads them, towards what is missing behind it.

        Returns:
            Whether anything was gained on text held back; else nothing is changed.
        """
        path = self.writers[-1]
        space = next(edge.reads for edge in self.anatomy.edges if edge.path == path)
        makers, reader = self.anatomy.writers(space), self.block.get_submodule(path)
        changes = solve_changes(read_weight(reader).float(), list(self._tangents(makers, path)))
        if not any(change.any() for change in changes):
            return False
        for maker, change in zip(makers, changes, strict=True):
            linear = self.block.get_submodule(maker)
            write_weight(linear, read_weight(linear).float() + change.float())
        self.resolve_writer(path, self.moments(path))
        return True

    def _tangents(self, makers: list[str], path: str) -> Iterator[Tangent]:
        """Yield what a writer's output depends on through what makes its channels, batch by batch."""
        for batch, (inputs, stream) in enumerate(self._arrivals(makers[0])):
            channels, slopes = self._channels(makers, path, inputs)
            missing, scale = self._missing(path, batch, channels, stream)
            flat = (each.flatten(0, -2) for each in (inputs, missing, *(slope / scale for slope in slopes)))
            inputs, missing, *slopes = map(as_forward, flat)
            yield Tangent(inputs, tuple(slopes), missing)

    def _channels(self, makers: list[str], path: str, inputs: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the channels that a linear reads, and how fast each changes with what each of its makers puts out."""
        leaves: dict[str, Tensor] = {}

        def cut(maker: str, _: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
            leaves[maker] = out.detach().requires_grad_()
            return leaves[maker]

        ffn = self.block.get_submodule(makers[0].rpartition(".")[0])
        heard = listening(self.block, [path], [], stop=True)
        with ExitStack() as hooks:
            for maker in makers:
                hooks.enter_context(self.block.get_submodule(maker).register_forward_hook(partial(cut, maker)))
            with torch.enable_grad(), fast_forward(inputs.device), heard as (read, _), suppress(Heard):
                ffn(inputs)
        channels, ones = read[path], torch.ones_like(read[path])
        return channels.detach(), torch.autograd.grad(channels, [leaves[maker] for maker in makers], ones)

    def _missing(self, path: str, batch: int, inputs: Tensor, stream: Tensor) -> tuple[Tensor, Tensor | float]:
        """Return what is missing behind a writer, and by what each token was divided, as `moments` says."""
        with fast_forward(inputs.device):  # rounded as the original's output is: that is nothing to make good
            output = self.block.get_submodule(path)(inputs).float()
        behind, before = self._wanted(path, batch)
        added_to = 0 if self.anatomy.norms_behind else stream
        if self.basis is None:
            return behind - output - added_to, 1.0
        scale = behind.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
        behind, before = behind.float() @ self.basis, before.float() @ self.basis
        if not self.anatomy.norms_behind:
            behind = behind - (1 - NARROW_SHARE) * (before - stream)
        return (behind - output - added_to) / scale, scale

    def project_rows(self, weight: Tensor) -> Tensor:
        """Return the kept directions of what a writer of the residual stream puts out, (rows, columns)."""
        return weight if self.basis is None else self.basis.T @ weight

    @property
    def drifted(self) -> bool:
        """Whether what the block reads differs from what the original read."""
        return self.states is not self.clean

    @property
    def writers(self) -> list[str]:
        """The linears that write the residual stream, in order."""
        return self.anatomy.writers("residual")

    def _wanted(self, path: str, batch: int) -> tuple[Tensor, Tensor]:
        """Return what the original has behind a writer and before it.

        Behind the last writer of a block dropped blocks that follow count too.
        """
        position = self.writers.index(path)
        before = self.clean[batch] + sum(self.wrote[writer][batch] for writer in self.writers[:position])
        if self.anatomy.norms_behind:
            behind = self.wrote[path][batch].float()
        elif position == len(self.writers) - 1:
            behind = self.goal[batch]
        else:
            behind = before + self.wrote[path][batch]
        return behind, before

    def _arrivals(self, path: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield what a linear reads now, and the stream with all that was written before it, batch by batch.

        Where norms stand behind the writers, that is not the stream, and nobody asks.
        """
        paths = [edge.path for edge in self.anatomy.edges]
        earlier = [writer for writer in self.writers if paths.index(writer) < paths.index(path)]
        for states, keywords in zip(self.states, self.keywords, strict=True):
            with listening(self.block, [path], earlier, stop=True) as (read, wrote), suppress(Heard):
                run_block(self.block, states, keywords)
            yield read[path], states + sum(wrote[writer].float() for writer in earlier)


@dataclass
class Sums:
    """Sums over tokens, a quarter of each batch apart from the others."""

    parts: tuple[Moments, Moments] | None = None

    def add(self, x: Tensor, t: Tensor) -> None:
        """Add tokens: what is read and what is missing, (windows, length, columns) and (windows, length, rows)."""
        x, t = x.flatten(0, -2), t.flatten(0, -2)
        cut = 3 * len(x) // 4
        new = [(second_moment(part), wanted.T @ part) for part, wanted in ((x[:cut], t[:cut]), (x[cut:], t[cut:]))]
        before = [(part.gram, part.cross) for part in self.parts] if self.parts else [(0, 0)] * 2
        self.parts = tuple(Moments(a + c, b + d) for (a, b), (c, d) in zip(before, new, strict=True))


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
                raise Heard

        return keep

    with ExitStack() as hooks:
        for path in readers:
            hooks.enter_context(block.get_submodule(path).register_forward_pre_hook(hear(path, read, False)))
        for path in writers:
            hooks.enter_context(block.get_submodule(path).register_forward_hook(hear(path, wrote, True)))
        yield read, wrote


@torch.no_grad()
def abreast(
    network: nn.Module, windows: Tensor, skip: frozenset[int] = frozenset(), basis: Tensor | None = None
) -> Iterator[Pair]:
    """Yield the decoder blocks of a network in order, each beside a copy of what it was.

    Args:
        network: A causal language model of a known family; the body of the loop changes its blocks.
        windows: (windows, length) token ids.
        skip: Blocks that the network being cut goes without; they are not yielded, and stay where they are.
        basis: (old width, new width), the directions of the residual stream that are kept; all where None.
    """
    anatomy, start = anatomy_of(network), rehearse(network, windows)
    blocks, clean = list(blocks_of(network)), start.hidden
    states = clean if basis is None else [hidden @ entrance(network, basis) for hidden in clean]
    for index, block in enumerate(blocks):
        if index in skip:
            clean = run_batches(block, clean, start.keywords[index])
            continue
        pair = Pair(index, block, copy.deepcopy(block), anatomy, states, clean, start.keywords[index], basis)
        own = clean = pair.goal = _listen(pair)
        for later in range(index + 1, len(blocks)):
            if later not in skip:
                break
            pair.goal = run_batches(blocks[later], pair.goal, start.keywords[later])
        yield pair
        same = not pair.drifted and not pair.touched
        states = pair.left = own if same else run_batches(block, states, pair.keywords)
        # Whoever has the loop still holds this pair while the next one is listened to.
        pair.states, pair.clean, pair.read, pair.wrote = [], [], {}, {}


def _listen(pair: Pair) -> list[Tensor]:
    """Run the original, note of what its linears read and wrote what is wanted, and return its output."""
    edges = () if pair.basis is None else reversed(pair.anatomy.edges)  # what reads a whole stream is left alone
    spaces = {edge.reads: edge.path for edge in edges if edge.writes != "residual"}
    writers = pair.writers if pair.anatomy.norms_behind else pair.writers[:-1]  # behind the last is the block's output
    pair.read = {space: [] for space in spaces}
    pair.wrote = {path: [] for path in writers}
    out = []
    for states, keywords in zip(pair.clean, pair.keywords, strict=True):
        with listening(pair.original, list(spaces.values()), writers) as (read, wrote):
            out.append(run_block(pair.original, states, keywords))
        for space, path in spaces.items():
            pair.read[space].append(read[path])
        for path in writers:
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
        with ExitStack() as hooks:
            for norm in norms:
                hooks.enter_context(norm.register_forward_pre_hook(partial(_take, taken)))
            for batch, keywords in enumerate(start.keywords[index]):
                states[batch] = run_block(block, states[batch], keywords)
                inner = inner + sum(second_moment(_scaled(x)) for x in taken)
                taken.clear()
    return inner, sum(second_moment(_scaled(x)) for x in states)


def _take(taken: list[Tensor], _: nn.Module, args: tuple[Tensor, ...]) -> None:
    taken.append(args[0])


def _scaled(x: Tensor) -> Tensor:
    return x.float() / x.float().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
