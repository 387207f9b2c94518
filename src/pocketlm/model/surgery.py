"""Change the shape of a model into another stock shape of its family."""

from typing import Any

import torch
from torch import Tensor, nn

from pocketlm.model.anatomy import anatomy_of, blocks_of, read_weight, write_weight


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
        linear = block.get_submodule(path)
        bias = linear.bias
        write_weight(linear, read_weight(linear)[keep])
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach()[keep].clone())
    for path in anatomy.readers(space):
        linear = block.get_submodule(path)
        write_weight(linear, read_weight(linear)[:, keep])


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
    config = network.config
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == total and name.startswith("layer"):
            setattr(config, name, [value[i] for i in kept])
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
        left = [place[old] for old in _flat(value) if old in place]
        setattr(config, name, left if isinstance(value, list) and left else left[0] if left else None)
    if hasattr(config, "vocab_size"):
        config.vocab_size = len(kept)


def special_ids(config: Any) -> dict[str, list[int]]:
    """Return the special ids of a config or a generation config, by the setting that names them."""
    named = {name: _flat(value) for name, value in config.to_dict().items() if name.endswith("_token_id")}
    return {name: ids for name, ids in named.items() if ids}


def _flat(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]
