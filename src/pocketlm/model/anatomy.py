"""Where each model family keeps its parts, as data.

A block is a handful of linear maps between named spaces of activations. Everything the toolkit needs to know
about a family follows from that list: which linears share their input statistics (they read the same space),
and what must shrink together (the rows of a space's writers, the columns of its readers).

    residual --norm--> attention_in --q,k,v--> query, key, value ~attention~> attention_out --o--> residual
    residual --norm--> mlp_in --gate,up--> mlp_hidden --down--> residual
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pocketlm.errors import BadInputError


@dataclass(frozen=True, slots=True)
class Edge:
    """A linear map of a block and the two spaces it joins."""

    path: str
    reads: str
    writes: str

    @property
    def group(self) -> str:
        """The tensors that share one number format: all edges of this kind in all blocks."""
        return GROUPS[self.reads if self.writes == "residual" else self.writes, self.writes == "residual"]


# What people see in plans and recipes, by the inner space of an edge and whether the edge leaves or enters it.
GROUPS = {
    ("query", False): "query_key",
    ("key", False): "query_key",
    ("value", False): "value",
    ("query_key_value", False): "query_key_value",
    ("attention_out", True): "attention_out",
    ("mlp_hidden", False): "ffn_in",
    ("mlp_hidden", True): "ffn_out",
    ("vocabulary", False): "head",
}


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The layout of a model family."""

    edges: tuple[Edge, ...]
    blocks: str = "model.layers"
    final_norm: str = "model.norm"
    ffn_width: str = "intermediate_size"  # the config's name for the width of `mlp_hidden`
    uniform_blocks: bool = True  # False: blocks alternate in kind and none can be dropped
    # What a scale of a space's columns can be taken off again in: the norm or the linear that writes the space, where
    # nothing between the two would notice.
    scaled_by: tuple[tuple[str, str], ...] = ()
    norm_offset: float = 0.0  # what is added to a norm's weight before it multiplies
    norms_behind: tuple[str, ...] = ()  # between the writers of the residual stream and the stream, in their order
    # Whether the residual stream may be rotated: its norms are RMSNorms that only linears read.
    rotates: bool = True

    @property
    def norms(self) -> dict[str, str]:
        """The norm between the residual stream and each space that is read from it."""
        writers = {edge.writes for edge in self.edges}
        return {space: path for space, path in self.scaled_by if space not in writers}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The spaces that some linear reads, in order."""
        return tuple(dict.fromkeys(edge.reads for edge in self.edges))

    def readers(self, space: str) -> list[str]:
        """Return the paths of the linears that read `space`."""
        return [edge.path for edge in self.edges if edge.reads == space]

    def writers(self, space: str) -> list[str]:
        """Return the paths of the linears that write `space`."""
        return [edge.path for edge in self.edges if edge.writes == space]


LLAMA = Anatomy(
    edges=(
        Edge("self_attn.q_proj", "attention_in", "query"),
        Edge("self_attn.k_proj", "attention_in", "key"),
        Edge("self_attn.v_proj", "attention_in", "value"),
        Edge("self_attn.o_proj", "attention_out", "residual"),
        Edge("mlp.gate_proj", "mlp_in", "mlp_hidden"),
        Edge("mlp.up_proj", "mlp_in", "mlp_hidden"),
        Edge("mlp.down_proj", "mlp_hidden", "residual"),
    ),
    scaled_by=(
        ("attention_in", "input_layernorm"),
        ("mlp_in", "post_attention_layernorm"),
        ("mlp_hidden", "mlp.up_proj"),
    ),
)
# Gemma 3 alternates five sliding-window blocks and a global one; engines derive the kind from the index,
# so dropping a block would change the kind of all later ones.
GEMMA3 = Anatomy(
    edges=LLAMA.edges,
    uniform_blocks=False,
    scaled_by=(
        ("attention_in", "input_layernorm"),
        ("mlp_in", "pre_feedforward_layernorm"),
        ("mlp_hidden", "mlp.up_proj"),
    ),
    norm_offset=1.0,
    norms_behind=("post_attention_layernorm", "post_feedforward_layernorm"),
    rotates=False,
)
GPT2 = Anatomy(
    edges=(
        Edge("attn.c_attn", "attention_in", "query_key_value"),
        Edge("attn.c_proj", "attention_out", "residual"),
        Edge("mlp.c_fc", "mlp_in", "mlp_hidden"),
        Edge("mlp.c_proj", "mlp_hidden", "residual"),
    ),
    blocks="transformer.h",
    final_norm="transformer.ln_f",
    ffn_width="n_inner",
    scaled_by=(("attention_in", "ln_1"), ("mlp_in", "ln_2")),
    rotates=False,
)

FAMILIES: dict[str, Anatomy] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "gemma3_text": GEMMA3,
    "gpt2": GPT2,
}


def anatomy_for(family: str) -> Anatomy:
    """Return the anatomy of a transformers model type.

    Raises:
        BadInputError: The family has no anatomy here.
    """
    if family not in FAMILIES:
        raise BadInputError(
            f"The architecture `{family}` is not supported: known are {', '.join(sorted(FAMILIES))}. "
            "A GGUF file of any architecture still works with `pocketlm bench` and `pocketlm chat`"
        )
    return FAMILIES[family]


def anatomy_of(network: nn.Module) -> Anatomy:
    """Return the anatomy of a network, found by its `config.model_type`."""
    return anatomy_for(network.config.model_type)


def blocks_of(network: nn.Module) -> nn.ModuleList:
    """Return the decoder blocks of a network."""
    return network.get_submodule(anatomy_of(network).blocks)


def linears_of(network: nn.Module) -> dict[str, tuple[Edge, nn.Module]]:
    """Return the linears of all decoder blocks and their edges, by the parameter names of their weights."""
    anatomy = anatomy_of(network)
    return {
        f"{anatomy.blocks}.{index}.{edge.path}.weight": (edge, block.get_submodule(edge.path))
        for index, block in enumerate(blocks_of(network))
        for edge in anatomy.edges
    }


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear stores its weight as (in, out), as GPT-2's Conv1D does."""
    return type(module).__name__ == "Conv1D"


def read_weight(module: nn.Module) -> Tensor:
    """Return the weight of a linear as (out, in)."""
    return module.weight.detach().T if is_transposed(module) else module.weight.detach()


@torch.no_grad()
def write_weight(module: nn.Module, weight: Tensor) -> None:
    """Replace the weight of a linear by `weight`, (out, in), in the dtype it has; the shape may change."""
    weight = weight.to(module.weight.dtype)
    module.weight = nn.Parameter((weight.T if is_transposed(module) else weight).contiguous())
    outputs, inputs = weight.shape
    if is_transposed(module):
        module.nf, module.nx = outputs, inputs
    else:
        module.out_features, module.in_features = outputs, inputs


@torch.no_grad()
def overwrite_weight(module: nn.Module, weight: Tensor) -> None:
    """Give a linear or an embedding other weights, (out, in), in place: tied ones change together."""
    module.weight.copy_(weight.T if is_transposed(module) else weight)


@contextmanager
def replaced(weights: dict[nn.Module, Tensor]) -> Iterator[None]:
    """While open, linears and embeddings have other weights, (out, in); tied ones change together."""
    before = {module: module.weight.data.clone() for module in weights}
    try:
        for module, weight in weights.items():
            overwrite_weight(module, weight)
        yield
    finally:
        for module, weight in before.items():
            module.weight.data.copy_(weight)


@torch.no_grad()
def scale_space(block: nn.Module, anatomy: Anatomy, space: str, scale: Tensor) -> None:
    """Multiply the columns that read a space by `scale`, and take it off again in what writes the space, in place.

    The block computes what it did, up to rounding.

    Args:
        block: A decoder block.
        anatomy: Of its family.
        space: One that `anatomy.scaled_by` names.
        scale: (width of the space,), positive.
    """
    for path in anatomy.readers(space):
        reader = block.get_submodule(path)
        overwrite_weight(reader, read_weight(reader) * scale)
    writer = block.get_submodule(dict(anatomy.scaled_by)[space])
    if writer.weight.dim() == 1:
        writer.weight.copy_((writer.weight + anatomy.norm_offset) / scale - anatomy.norm_offset)
    else:
        overwrite_weight(writer, read_weight(writer) / scale[:, None])
    if getattr(writer, "bias", None) is not None:
        writer.bias.div_(scale)


def ffn_width(network: nn.Module) -> int:
    """Return how many channels the feed-forward networks have."""
    anatomy = anatomy_of(network)
    return read_weight(blocks_of(network)[0].get_submodule(anatomy.readers("mlp_hidden")[0])).shape[1]
