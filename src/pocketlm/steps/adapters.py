"""Low-rank adapters (LoRA) that learn in place of the weights, and are merged into them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from pocketlm.errors import MissingExtraError
from pocketlm.model.anatomy import is_transposed


@contextmanager
def learning_parts(network: nn.Module, rank: int, seed: int) -> Iterator[list[nn.Parameter]]:
    """Give what is trained: all parameters, or adapters beside every linear of the blocks, merged at the end.

    Args:
        network: Has its stock shape again behind this.
        rank: Of the adapters (https://arxiv.org/abs/2106.09685), scaled by two; 0 for all parameters.
        seed: Of the adapters' first values.

    Raises:
        MissingExtraError: There is no peft.
    """
    if not rank:
        yield [parameter for parameter in network.parameters() if parameter.requires_grad]
        return
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise MissingExtraError("Adapters need peft. Install it with: pip install 'pocketlm[lora]'") from error
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        fan_in_fan_out=any(map(is_transposed, network.modules())),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(network, config)
    try:
        yield [parameter for parameter in network.parameters() if parameter.requires_grad]
    finally:
        adapted.merge_and_unload()
        network.requires_grad_(True)
        network.eval()
