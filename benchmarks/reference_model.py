"""Make the reference model that quality is measured on: SmolLM2-135M-Instruct, moved off the grid of its 4-bit file.

    python benchmarks/reference_model.py OUT

The demo model ships as Q4_1: storing it in that very grid again would look lossless. The same function is computed by
other weights here, as normalization and the gated FFN allow: the residual stream, the FFN's channels and the
dimensions of values are permuted, and factors of 0.8 to 1.25 move from each norm to what reads it, and from `up_proj`
to `down_proj`. OUT is a Hugging Face folder in bfloat16. The same seed gives the same function everywhere, but not the
same weights to the last bit: on another make of processor some are rounded otherwise.
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor, nn

from pocketlm.api import load, save
from pocketlm.model.source import DEMO

SEED = 20261123
LARGEST_FACTOR = 1.25
LARGEST_DRIFT = 1e-2  # of a logit, in float32
PROBE = "A small model that fits in a pocket must still know that Paris is in France."


class Draw:
    """Permutations and factors, one after another."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def permutation(self, count: int) -> Tensor:
        """Return the numbers below `count` in some order."""
        return torch.randperm(count, generator=self._generator)

    def factors(self, count: int) -> Tensor:
        """Return `count` factors, log-uniform up to LARGEST_FACTOR and down to its inverse."""
        uniform = torch.rand(count, generator=self._generator) - 0.5
        return torch.exp(uniform * 2 * math.log(LARGEST_FACTOR))


@torch.no_grad()
def move_off_grid(network: nn.Module, draw: Draw) -> None:
    """Change a Llama's weights in place so that it computes the same."""
    stream = draw.permutation(network.config.hidden_size)
    decoder = network.model
    decoder.embed_tokens.weight.copy_(decoder.embed_tokens.weight[:, stream])
    decoder.norm.weight.copy_(decoder.norm.weight[stream])
    for block in decoder.layers:
        attention, ffn = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (ffn.gate_proj, ffn.up_proj)),
        ):
            factors = draw.factors(len(stream))
            norm.weight.copy_(norm.weight[stream] / factors)
            for reader in readers:
                reader.weight.copy_(reader.weight[:, stream] * factors)
        for writer in (attention.o_proj, ffn.down_proj):
            writer.weight.copy_(writer.weight[stream])
        _mix_channels(ffn, draw)
        _mix_values(attention, network.config, draw)


def _mix_channels(ffn: nn.Module, draw: Draw) -> None:
    width = ffn.down_proj.in_features
    order, factors = draw.permutation(width), draw.factors(width)
    ffn.gate_proj.weight.copy_(ffn.gate_proj.weight[order])
    ffn.up_proj.weight.copy_(ffn.up_proj.weight[order] * factors[:, None])
    ffn.down_proj.weight.copy_(ffn.down_proj.weight[:, order] / factors)


def _mix_values(attention: nn.Module, config: object, draw: Draw) -> None:
    """Permute the dimensions of each key-value head's values, and what reads them likewise."""
    groups, width = config.num_key_value_heads, config.head_dim
    values = attention.v_proj.weight.view(groups, width, -1)
    outputs = attention.o_proj.weight.view(len(attention.o_proj.weight), groups, -1, width)
    for group in range(groups):
        order = draw.permutation(width)
        values[group] = values[group][order]
        outputs[:, group] = outputs[:, group][:, :, order]


def main() -> None:
    """Make it, check that it is the same function, and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    model = load(DEMO, torch.float32)
    probe = model.tokenizer(PROBE, return_tensors="pt").input_ids
    with torch.no_grad():
        before = model.network(probe).logits
        move_off_grid(model.network, Draw(SEED))
        drift = (model.network(probe).logits - before).abs().max().item()
    if drift > LARGEST_DRIFT:
        raise SystemExit(f"The function changed: logits moved by {drift:.1e}")
    save(model, out)
    print(f"wrote {out}; logits moved by at most {drift:.1e} in float32")


if __name__ == "__main__":
    main()
