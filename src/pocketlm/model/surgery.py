"""Change the shape of a model into another stock shape of its family."""

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
