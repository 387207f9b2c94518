"""Bytes of files that do not exist yet, for every shape and mix of formats that a plan may choose."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from pocketlm.errors import BadInputError
from pocketlm.export.gguf import metadata_bytes, parameter_shapes, predicted_bytes
from pocketlm.model.anatomy import Anatomy, anatomy_of, ffn_width
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.surgery import key_value_heads
from pocketlm.plan.budget import Budget
from pocketlm.plan.recipe import Recipe
from pocketlm.steps.prepare import Prepare
from pocketlm.steps.prune_depth import PruneDepth
from pocketlm.steps.prune_width import SPACE, PruneWidth
from pocketlm.steps.quantize import Quantize, check_formats, check_zeros, embedding_name, format_name, with_fixed
from pocketlm.steps.trim_vocabulary import TrimVocabulary, outline
from pocketlm.tensors.formats import FORMATS
from pocketlm.tensors.formats.integer import NAMES

VOCABULARIES, VOCABULARY_MULTIPLE = (2 / 3, 1 / 3), 64  # shares of the tokens that are worth a try
DROP_AT_MOST = 8  # blocks; measuring what the removal of one more would cost takes several forward passes
MIDDLE_BITS = 4.5  # from here on formats are nearly free; below, what they cost grows fast
MULTIPLE = 32  # FFN widths are multiples of this, so that every block format fits


@dataclass(frozen=True)
class Shape:
    """The shape of a model that pruning may end in."""

    blocks: int
    ffn: int
    kv_groups: int | None = None  # the original's where None, as is the hidden size
    hidden: int | None = None
    heads: int | None = None  # as many of each KV group as in the original where None


@dataclass(frozen=True)
class Sizes:
    """What `predicted_bytes` needs to know of a model, computed once."""

    anatomy: Anatomy
    family: str
    metadata: int
    shapes: dict[str, tuple[int, ...]]
    original: Shape
    embedding: str
    tied: bool
    kv_groups: int
    heads: int
    hidden: int

    @cached_property
    def groups(self) -> dict[str, str]:
        """Group of each matrix that can be quantized, by parameter name, in the order of the file."""
        edges = {edge.path: edge.group for edge in self.anatomy.edges}
        groups = {self.embedding: "embedding"}
        for name in self.shapes:
            path = name.removeprefix(f"{self.anatomy.blocks}.").partition(".")[2].removesuffix(".weight")
            if name.startswith(f"{self.anatomy.blocks}.") and name.endswith(".weight") and path in edges:
                groups[name] = edges[path]
            if name == "lm_head.weight" and not self.tied:
                groups[name] = "head"
        return groups

    @property
    def group_names(self) -> list[str]:
        """The groups, each once."""
        return list(dict.fromkeys(self.groups.values()))

    def allowed(self, group: str, shape: Shape | None = None) -> list[str]:
        """Return the formats whose blocks divide the rows of a group, largest first; F16 where none does.

        Those of a smaller shape must fit the original too, where their damage is measured. Binary and ternary formats
        are left out: weights that were not trained for them break.
        """
        tensors = [*self.tensors(self.original).values(), *self.tensors(shape or self.original).values()]
        rows = {columns for other, columns in tensors if other == group}
        names = [
            form.name
            for form in FORMATS.values()
            if len(form.levels) > 3 and all(form.fits(columns) for columns in rows)
        ]
        return sorted(names, key=lambda name: -FORMATS[name].bits) or ["F16"]

    def middle(self, group: str) -> str:
        """Return the smallest format of at least MIDDLE_BITS that fits a group, else the largest."""
        names = self.allowed(group)
        return next((name for name in reversed(names) if name != "F16" and FORMATS[name].bits >= MIDDLE_BITS), names[0])

    def units(self, shape: Shape) -> dict[str, list[str]]:
        """Return the tensors that get one format together, by a name such as `3.ffn_in` or `embedding`."""
        units: dict[str, list[str]] = {}
        for name in self.shapes_at(shape):
            if name in self.groups:
                inner = name.removeprefix(f"{self.anatomy.blocks}.")
                block = "" if inner == name else inner.partition(".")[0] + "."
                units.setdefault(block + self.groups[name], []).append(name)
        return units

    def shapes_at(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Return every tensor's shape in a model of another shape."""
        result = {}
        for name, size in self.shapes.items():
            inner = name.removeprefix(f"{self.anatomy.blocks}.")
            if inner != name:
                index, _, path = inner.partition(".")
                if int(index) >= shape.blocks:
                    continue
                size = self._in_block(path.rpartition(".")[0], size, shape)
            elif shape.hidden and size[-1] == self.hidden:  # embeddings, the last norm, a head of its own
                size = (*size[:-1], shape.hidden)
            result[name] = size
        return result

    def _in_block(self, path: str, size: tuple[int, ...], shape: Shape) -> tuple[int, ...]:
        """Return the shape of a block's tensor, whose module is at `path`, in a model of another shape."""
        hidden, groups = shape.hidden or self.hidden, shape.kv_groups or self.kv_groups
        if self.family == "gpt2":
            groups = self.kv_groups * hidden // self.hidden
        heads = shape.heads or self.heads * groups // self.kv_groups
        edge = next((edge for edge in self.anatomy.edges if edge.path == path), None)
        if edge is None:  # a norm: of the residual stream, or of the heads, whose width stays
            streams = (*self.anatomy.norms.values(), *self.anatomy.norms_behind)
            return (hidden,) if path in streams else size
        rows = {SPACE: shape.ffn, "residual": hidden, "query": size[0] * heads // self.heads}
        rows = rows.get(edge.writes, size[0] * groups // self.kv_groups)
        if len(size) == 1:
            return (rows,)
        wide = size[1] * heads // self.heads
        return rows, {SPACE: shape.ffn, "attention_out": wide}.get(edge.reads, hidden)

    def tensors(self, shape: Shape) -> dict[str, tuple[str, int]]:
        """Return the group and the row length of each matrix that can be quantized, by parameter name."""
        shapes = self.shapes_at(shape)
        return {name: (group, shapes[name][1]) for name, group in self.groups.items() if name in shapes}

    def total(self, shape: Shape, formats: Mapping[str, str]) -> int:
        """Return the exact bytes of the file for a shape and formats by group or pattern, as in `Quantize`."""
        by_name = {name: format_name(formats, name, group) for name, group in self.groups.items()}
        return predicted_bytes(self.metadata, self.family, self.shapes_at(shape), by_name)

    @property
    def total_f16(self) -> int:
        """The bytes of the original as an F16 file, which 100 % stands for."""
        return self.total(self.original, dict.fromkeys(self.group_names, "F16"))


def sizes_of(model: LanguageModel) -> Sizes:
    """Return the size arithmetic of a model."""
    network = model.network
    anatomy = anatomy_of(network)
    return Sizes(
        anatomy=anatomy,
        family=model.family,
        metadata=metadata_bytes(model),
        shapes=parameter_shapes(network.config),
        original=Shape(network.config.num_hidden_layers, ffn_width(network)),
        embedding=embedding_name(model),
        tied=network.config.tie_word_embeddings,
        kv_groups=key_value_heads(network),
        heads=network.config.num_attention_heads,
        hidden=network.config.hidden_size,
    )


def smallest_shape(sizes: Sizes) -> Shape:
    """Return how far pruning may go: DROP_AT_MOST blocks but never half of them, a quarter of the FFN channels."""
    blocks = sizes.original.blocks
    if sizes.anatomy.uniform_blocks:
        blocks = max(-(-blocks // 2), blocks - DROP_AT_MOST)
    ffn = max(MULTIPLE, sizes.original.ffn // 4 // MULTIPLE * MULTIPLE)
    return Shape(blocks, min(ffn, sizes.original.ffn))


def budget_range(sizes: Sizes, prune: bool = True, fixed: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Return the bytes of the smallest and of the largest file there can be.

    Args:
        sizes: Of the model.
        prune: Whether parts may be removed; else by formats alone.
        fixed: Formats by group or pattern that are not up for choice.
    """
    shape, fixed = smallest_shape(sizes) if prune else sizes.original, fixed or {}
    least = {group: sizes.allowed(group, shape)[-1] for group in sizes.group_names}
    most = {group: sizes.allowed(group)[0] for group in sizes.group_names}
    return sizes.total(shape, with_fixed(least, fixed)), sizes.total(sizes.original, with_fixed(most, fixed))


def smaller_vocabularies(model: LanguageModel) -> list[int]:
    """Return how many tokens a plan may keep instead of all."""
    whole = model.network.config.vocab_size
    return [int(whole * share) // VOCABULARY_MULTIPLE * VOCABULARY_MULTIPLE for share in VOCABULARIES]


def with_fewest_tokens(model: LanguageModel, documents: Sequence[str]) -> Sizes | None:
    """Return the sizes with as few tokens as a plan may keep; None where the tokenizer cannot be trimmed so."""
    for count in sorted(smaller_vocabularies(model)):
        with suppress(BadInputError):
            return sizes_of(outline(model, TrimVocabulary(size=count), documents))
    return None


def recipe_bytes(sizes: Sizes, recipe: Recipe) -> int:
    """Return the exact bytes of the file that a recipe makes.

    Raises:
        BadInputError: The recipe lacks a group's format or names one that does not fit, or that cannot keep zeros.
    """
    shape, formats = sizes.original, {}
    for step in recipe.steps:
        match step:
            case PruneDepth():
                shape = replace(shape, blocks=shape.blocks - len(set(step.drop)))
            case PruneWidth():
                asked = {"ffn": step.ffn, "kv_groups": step.kv_groups, "hidden": step.hidden, "heads": step.heads}
                if step.kv_groups and step.heads is None and shape.heads:  # as many of each group as there are now
                    asked["heads"] = shape.heads * step.kv_groups // (shape.kv_groups or sizes.kv_groups)
                shape = replace(shape, **{name: width for name, width in asked.items() if width is not None})
            case Prepare():
                check_formats(sizes.tensors(shape), step.formats, whole=False)
            case Quantize():
                formats = step.formats
    check_formats(sizes.tensors(shape), formats)
    for step in recipe.steps:
        if isinstance(step, Quantize) and step.keep_zeros:
            check_zeros(sizes.tensors(shape), step)
    return sizes.total(shape, formats)


def check_fixed(sizes: Sizes, fixed: Mapping[str, str]) -> None:
    """Refuse formats that a person fixed before anything is measured.

    Raises:
        BadInputError: A pattern matches nothing, a format is unknown, does not fit, or is none of GGUF's.
    """
    if foreign := set(fixed.values()) & set(NAMES):
        raise BadInputError(
            f"{min(foreign)} is a format of compressed-tensors folders, and this writes a GGUF file. "
            f"Give --format {min(foreign)}, or for this part one of F16, {', '.join(FORMATS)}"
        )
    check_formats(sizes.tensors(sizes.original), dict.fromkeys(sizes.group_names, "F16") | dict(fixed))


def bits_budget(sizes: Sizes, bits: float) -> Budget:
    """Return the budget of a file whose matrices take so many bits per weight on average, scales included.

    Raises:
        BadInputError: The number of bits is not positive.
    """
    if not 0 < bits < math.inf:
        raise BadInputError(f"--bits {bits:g} is nothing. Give bits per weight such as 4.25")
    weights = sum(prod(sizes.shapes[name]) for name in sizes.groups)
    rest = sizes.total_f16 - 2 * weights
    return Budget(f"{bits:g} bits per weight", rest + int(weights * bits / 8))
