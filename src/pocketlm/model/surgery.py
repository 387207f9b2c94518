"""Change the shape of a model into another stock shape of its family."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import Anatomy, anatomy_of, blocks_of, read_weight, write_weight
from pocketlm.model.attention import slice_attention

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@torch.no_grad()
def keep_channels(block: nn.Module, network: nn.Module, space: str, keep: Tensor) -> None:
    """Keep only some coordinates of a space in one block: rows of its writers, columns of its readers.

    Args:
        block: A decoder block; changed in place.
        network: The network it belongs to, for its anatomy.
        space: A space that no norm and no attention reshapes, such as `mlp_hidden`.
        keep: Indices to keep, ascending.
    """
    anatomy = anatomy_of(network)
    for path in anatomy.writers(space):
        _keep_rows(block.get_submodule(path), keep)
    for path in anatomy.readers(space):
        linear = block.get_submodule(path)
        write_weight(linear, read_weight(linear)[:, keep])


def _keep_rows(linear: nn.Module, keep: Tensor) -> None:
    bias = linear.bias
    write_weight(linear, read_weight(linear)[keep])
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach()[keep].clone())


def drop_blocks(network: nn.Module, drop: set[int]) -> None:
    """Remove decoder blocks in place and renumber what counts them.

    The config's `num_hidden_layers` and per-layer lists, and every module's `layer_idx` (the index of its
    key-value cache), are brought in line, so that generation and `from_pretrained` work.
    """
    blocks = blocks_of(network)
    total = len(blocks)
    kept = [index for index in range(total) if index not in drop]
    parent = network.get_submodule(anatomy_of(network).blocks.rpartition(".")[0])
    setattr(parent, anatomy_of(network).blocks.rpartition(".")[2], nn.ModuleList(blocks[i] for i in kept))
    for position, index in enumerate(kept):
        for module in blocks[index].modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = position
    keep_blocks(network.config, kept)


def keep_blocks(config: "PreTrainedConfig", kept: Sequence[int]) -> None:
    """Tell a config which of its blocks are left: how many, and the entries of its per-layer lists."""
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == config.num_hidden_layers and name.startswith("layer"):
            setattr(config, name, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)


def set_ffn_width(network: nn.Module, width: int) -> None:
    """Tell the config that every block's FFN is now `width` channels wide."""
    setattr(network.config, anatomy_of(network).ffn_width, width)


@torch.no_grad()
def keep_tokens(network: nn.Module, kept: list[int]) -> None:
    """Keep only some rows of the embedding and of the head, tied or not, in place, and renumber the special ids.

    Args:
        network: Changed in place; its logits over the kept tokens stay as they were.
        kept: The ids to keep, ascending; their places are the new ids.
    """
    embedding, head = network.get_input_embeddings(), network.get_output_embeddings()
    rows = torch.tensor(kept, device=embedding.weight.device)
    place = {old: new for new, old in enumerate(kept)}
    tied = head.weight is embedding.weight
    embedding.weight = nn.Parameter(embedding.weight[rows])
    embedding.num_embeddings = len(kept)
    embedding.padding_idx = place.get(embedding.padding_idx)
    write_weight(head, embedding.weight if tied else head.weight[rows])
    if tied:
        head.weight = embedding.weight
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias[rows])
    for module in network.modules():
        if hasattr(module, "vocab_size"):
            module.vocab_size = len(kept)
    renumber_tokens(network.config, kept)
    renumber_tokens(network.generation_config, kept)


def renumber_tokens(config: Any, kept: list[int]) -> None:
    """Bring every special id that a config or a generation config states in line with `kept`, in place.

    An id whose token is gone becomes None, and falls out of lists.
    """
    place = {old: new for new, old in enumerate(kept)}
    for name in special_ids(config):
        value = getattr(config, name)
        left = [place[old] for old in as_ids(value) if old in place]
        setattr(config, name, left if isinstance(value, list) and left else left[0] if left else None)
    if hasattr(config, "vocab_size"):
        config.vocab_size = len(kept)


def special_ids(config: Any) -> dict[str, list[int]]:
    """Return the special ids of a config or a generation config, by the setting that names them."""
    named = {name: as_ids(value) for name, value in config.to_dict().items() if name.endswith("_token_id")}
    return {name: ids for name, ids in named.items() if ids}


def as_ids(value: int | list[int] | None) -> list[int]:
    """Return what a config says of a special token, which is one id, several or none, as a list."""
    return [] if value is None else value if isinstance(value, list) else [value]


def head_width(config: Any) -> int:
    """Return how many channels an attention head has."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def key_value_heads(network: nn.Module) -> int:
    """Return how many heads of keys and values a block has; each serves as many query heads."""
    return getattr(network.config, "num_key_value_heads", None) or network.config.num_attention_heads


@torch.no_grad()
def keep_heads(block: nn.Module, network: nn.Module, groups: list[int], queries: list[int]) -> None:
    """Keep some heads of keys and values in one block, and some of the query heads that they serve.

    Args:
        block: A decoder block; changed in place.
        network: The network it belongs to, with the config as it was.
        groups: Which heads of keys and values to keep, ascending.
        queries: Which query heads to keep, ascending: of each of these groups as many.
    """
    anatomy, all_queries = anatomy_of(network), network.config.num_attention_heads
    readers = [block.get_submodule(path) for path in anatomy.readers("attention_out")]
    for edge in anatomy.edges:
        linear = block.get_submodule(edge.path)
        if edge.reads != "attention_in":
            continue
        # GPT-2 writes queries, keys and values of all heads one after the other in one matrix.
        parts = 3 if edge.writes == "query_key_value" else 1
        rows = read_weight(linear).shape[0]
        heads, left = (all_queries, queries) if edge.writes == "query" else (key_value_heads(network), groups)
        keep = torch.arange(rows).view(parts, heads, -1)[:, left].flatten()
        _keep_rows(linear, keep)
    for module in block.modules():
        if hasattr(module, "split_size"):
            module.split_size = len(groups) * head_width(network.config)
        if hasattr(module, "num_key_value_groups"):
            module.num_key_value_groups = len(queries) // len(groups)
    for linear in readers:
        columns = torch.arange(read_weight(linear).shape[1]).view(all_queries, -1)[queries].flatten()
        write_weight(linear, read_weight(linear)[:, columns])


def picks(basis: Tensor) -> bool:
    """Whether a basis picks channels, so that weights of norms can stay where they are."""
    return bool((basis.amax(0) == 1).all())


@torch.no_grad()
def narrow_stream(block: nn.Module, anatomy: Anatomy, basis: Tensor) -> None:
    """Let a block read and write a residual stream of fewer directions.

    Where the stream is rotated the weights of the norms go into the linears behind them (SliceGPT,
    https://arxiv.org/abs/2401.15024); a `basis` that picks channels leaves them. The mean square that a norm divides by
    is taken over fewer channels with the same sum: its weight makes up for that.

    Args:
        block: Changed in place.
        anatomy: Of its family.
        basis: (old width, new width), orthonormal columns.
    """
    rotated = not picks(basis)
    for space, path in anatomy.norms.items():
        norm = block.get_submodule(path)
        weight = norm.weight + anatomy.norm_offset
        for reader in map(block.get_submodule, anatomy.readers(space)):
            folded = read_weight(reader) * weight if rotated else read_weight(reader)
            write_weight(reader, folded @ basis.to(folded))
        left = weight.new_ones(basis.shape[1]) if rotated else weight @ basis.to(weight)
        _resize_norm(norm, left, anatomy, basis)
    for writer in map(block.get_submodule, anatomy.writers("residual")):
        bias = writer.bias
        write_weight(writer, basis.T.to(read_weight(writer)) @ read_weight(writer))
        if bias is not None:
            writer.bias = nn.Parameter(bias.detach() @ basis.to(bias))
    for norm in map(block.get_submodule, anatomy.norms_behind):
        _resize_norm(norm, (norm.weight + anatomy.norm_offset) @ basis.to(norm.weight), anatomy, basis)


def entrance(network: nn.Module, basis: Tensor) -> Tensor:
    """Return what embeddings are multiplied by when a network gets a narrower residual stream, (old width, new width).

    The last norm's weight has to go into the head where the stream is rotated. One that is tied to the embedding takes
    the embedding along: what enters the stream is scaled, channel by channel. That costs little, since what the blocks
    write is many times larger, and the first readers are re-solved.
    """
    if picks(basis) or not network.config.tie_word_embeddings:
        return basis
    weight = network.get_submodule(anatomy_of(network).final_norm).weight.detach()
    return (weight / weight.mean())[:, None] * basis


@torch.no_grad()
def narrow_ends(network: nn.Module, basis: Tensor) -> None:
    """Let the embeddings, the last norm and the head speak a residual stream of fewer directions."""
    anatomy, embedding, head = anatomy_of(network), network.get_input_embeddings(), network.lm_head
    old, new = basis.shape
    tied, rotated, door = network.config.tie_word_embeddings, not picks(basis), entrance(network, basis)
    # Gemma multiplies embeddings by the root of the width.
    factor = (old / new) ** 0.5 if getattr(embedding, "embed_scale", None) is not None else 1.0
    norm = network.get_submodule(anatomy.final_norm)
    weight = norm.weight + anatomy.norm_offset
    for module in network.modules():
        if isinstance(module, nn.Embedding):
            scale = factor if module is embedding else 1.0
            module.weight = nn.Parameter(module.weight @ door.to(module.weight) * scale)
    if tied:
        head.weight = embedding.weight
        left = weight.mean().expand(new) if rotated else weight @ basis.to(weight) / factor
    else:
        folded = head.weight * weight if rotated else head.weight
        write_weight(head, folded @ basis.to(weight))
        left = weight.new_ones(new) if rotated else weight @ basis.to(weight)
    _resize_norm(norm, left, anatomy, basis)


def _resize_norm(norm: nn.Module, weight: Tensor, anatomy: Anatomy, basis: Tensor) -> None:
    """Give a norm the weight, (new width,), that it multiplies by if the mean square was still over the old width."""
    old, new = basis.shape
    factor = 1.0 if isinstance(norm, nn.LayerNorm) else (old / new) ** 0.5
    norm.weight = nn.Parameter(weight * factor - anatomy.norm_offset)
    if isinstance(norm, nn.LayerNorm):
        norm.normalized_shape = (new,)
        norm.bias = nn.Parameter(norm.bias.detach() @ basis.to(norm.bias))


def rebuilt(network: nn.Module, changes: dict[str, int]) -> nn.Module:
    """Return a stock network of the changed config with the weights of `network`.

    transformers wants a Llama's width to be a multiple of its number of heads though nothing depends on it. A
    Mistral without a sliding window computes the same and states the width of a head, so that is what it becomes.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = network.config.to_dict() | changes
    family = settings.pop("model_type")
    if family == "llama" and settings["hidden_size"] % settings["num_attention_heads"]:
        family = "mistral"
        settings = {k: v for k, v in settings.items() if k not in ("attention_bias", "mlp_bias", "pretraining_tp")}
        settings |= {"sliding_window": None, "architectures": ["MistralForCausalLM"]}
    config = AutoConfig.for_model(family, **settings)
    fresh = AutoModelForCausalLM.from_config(config, dtype=network.dtype).eval()
    slice_attention(fresh)
    fresh.load_state_dict(network.state_dict())
    fresh.generation_config = network.generation_config
    return fresh
