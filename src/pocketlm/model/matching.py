"""What a student learns of its teacher's insides, beside what the teacher says.

    teacher   block 1   block 2   block 3   block 4     queries, keys, values: how alike is each token to the others
                           ↑                   ↑                 ↑
                       W₁ · stream         W₂ · stream           │
                           │                   │                 │
    student            block 1             block 2      queries, keys, values

Blocks are mapped evenly. The stream behind each goes through a projection that learns with the student and is thrown
away at the end; relations have no width and need none. They are those of the last blocks.
"""

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of
from pocketlm.model.compute import as_forward, fast_forward
from pocketlm.tensors.insides import projection_onto, relation_divergence, stream_distance

SPACES = ("query", "key", "value", "query_key_value")
SOLVED_ON = 8  # windows on which a projection to another width starts


@dataclass
class Insides:
    """What a pass through a network left on the way.

    Attributes:
        streams: Behind each block that is matched, (windows, length, width).
        attention: Of the last block: queries, keys and values, (windows, length, width of the space).
    """

    streams: list[Tensor] = field(default_factory=list)
    attention: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class Matching:
    """What of the teacher's insides is learnt.

    Attributes:
        hidden_states: Weight of the streams' relative squared distance, averaged over blocks.
        relations: Weight of the divergence of relations, averaged over queries, keys and values.
        blocks: Of the student's blocks, in order, which of the teacher's each is compared with.
        projections: (teacher's width, student's width) for each of these; empty without `hidden_states`.
        heads: Into how many parts queries, keys and values are cut.
    """

    hidden_states: float
    relations: float
    blocks: tuple[int, ...]
    projections: tuple[nn.Parameter, ...]
    heads: tuple[int, int, int]

    def noting_teacher(self, network: nn.Module) -> AbstractContextManager[Insides]:
        """While open, note what is matched of the teacher."""
        return noting(network, self.blocks if self.hidden_states else (), bool(self.relations))

    def noting_student(self, network: nn.Module) -> AbstractContextManager[Insides]:
        """While open, note what is matched of the student."""
        return noting(network, tuple(range(len(self.blocks))) if self.hidden_states else (), bool(self.relations))

    @torch.no_grad()
    def distance(
        self, mine: Insides, theirs: Insides, places: Tensor | None, share: float
    ) -> tuple[float, list[Tensor], list[Tensor]]:
        """Return the weighted distance, and what it depends on with its gradients; projections are given theirs.

        Args:
            mine: Of the student.
            theirs: Of the teacher, on the same windows.
            places: Each token's place in its own example, where a window holds several.
            share: Of these windows in the batch.
        """
        total, slopes = 0.0, []
        weight = share * self.hidden_states / max(1, len(self.projections))
        for projection, stream, truth in zip(self.projections, mine.streams, theirs.streams, strict=True):
            states, matrix = as_forward(stream), as_forward(projection)
            value, slope = stream_distance(states @ matrix.T, truth)
            slope = as_forward(slope.mul_(weight))
            by_matrix = (slope.flatten(0, 1).T @ states.flatten(0, 1)).float()
            projection.grad = by_matrix if projection.grad is None else projection.grad.add_(by_matrix)
            slopes.append((slope @ matrix).to(stream.dtype))
            total += weight * value.item()
        weight = share * self.relations / len(self.heads)
        for vectors, truth, heads in zip(mine.attention, theirs.attention, self.heads, strict=bool(mine.attention)):
            value, slope = relation_divergence(vectors, truth, heads, _seen(vectors, places))
            slopes.append(slope.mul_(weight).to(vectors.dtype))
            total += weight * value.item()
        return total, [*mine.streams, *mine.attention], slopes


def matching(
    teacher: nn.Module, student: nn.Module, hidden_states: float, relations: float, windows: Tensor
) -> Matching:
    """Return what is matched between two networks that read the same tokens.

    Args:
        teacher: The original.
        student: Of any depth and width.
        hidden_states: Weight of the streams.
        relations: Weight of the relations.
        windows: (windows, length) token ids, on whose first ones projections between different widths are solved. Where
            the widths are equal they start as the identity.
    """
    depth, blocks = len(blocks_of(student)), len(blocks_of(teacher))
    mapped = tuple(max(0, round((index + 1) * blocks / depth) - 1) for index in range(depth))
    heads = tuple(
        math.gcd(_heads(teacher, name), _heads(student, name)) for name in ("attention", "key_value", "key_value")
    )
    plain = Matching(hidden_states, relations, mapped, (), heads)
    return replace(plain, projections=_starts(teacher, student, plain, windows)) if hidden_states else plain


@torch.no_grad()
def _starts(teacher: nn.Module, student: nn.Module, plain: Matching, windows: Tensor) -> tuple[nn.Parameter, ...]:
    """Return the projections before they learn."""
    wide, narrow = (network.config.hidden_size for network in (teacher, student))
    if wide == narrow:
        device = student.lm_head.weight.device
        return tuple(nn.Parameter(torch.eye(wide, device=device)) for _ in plain.blocks)
    trial = windows[:SOLVED_ON].to(student.lm_head.weight.device)
    with fast_forward(trial.device), plain.noting_teacher(teacher) as theirs, plain.noting_student(student) as mine:
        for network in (teacher, student):
            network.base_model(input_ids=trial, use_cache=False)
    pairs = zip(mine.streams, theirs.streams, strict=True)
    return tuple(nn.Parameter(projection_onto(x.flatten(0, 1), y.flatten(0, 1))) for x, y in pairs)


@contextmanager
def noting(network: nn.Module, blocks: tuple[int, ...], attention: bool) -> Iterator[Insides]:
    """While open, note what a pass of a network leaves behind some blocks, and in the last one's attention."""
    seen, anatomy, modules = Insides(), anatomy_of(network), blocks_of(network)

    def note_stream(_: nn.Module, __: tuple, out: Tensor | tuple) -> None:
        seen.streams.append(out[0] if isinstance(out, tuple) else out)

    def note_attention(_: nn.Module, __: tuple, out: Tensor) -> None:
        seen.attention.extend(out.chunk(3, -1) if fused else [out])

    paths = [path for space in SPACES for path in anatomy.writers(space)] if attention else []
    fused = len(paths) == 1
    # A deeper student's neighbours may be compared with the same block of the teacher, which is then noted twice.
    with ExitStack() as hooks:
        for index in blocks:
            hooks.enter_context(modules[index].register_forward_hook(note_stream))
        for path in paths:
            hooks.enter_context(modules[-1].get_submodule(path).register_forward_hook(note_attention))
        yield seen


def _heads(network: nn.Module, kind: str) -> int:
    config = network.config
    return getattr(config, f"num_{kind}_heads", None) or config.num_attention_heads


def _seen(vectors: Tensor, places: Tensor | None) -> Tensor:
    """Return whom each token sees, (windows, length, length): itself and what came before it in its example."""
    windows, length = vectors.shape[:2]
    before = torch.ones(length, length, dtype=torch.bool, device=vectors.device).tril().expand(windows, -1, -1)
    if places is None:
        return before
    example = (places == 0).cumsum(-1)
    return before & (example[:, :, None] == example[:, None, :])
