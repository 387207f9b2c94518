"""How each model family is laid out in GGUF, as data: the same table writes a file and reads one.

A layout names every tensor on both sides, says what changes on the way, and pairs GGUF's hyperparameter keys
with the attributes of the transformers config.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from pocketlm.errors import BadInputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# rotary: rows reordered so that the two halves of a rotary pair are neighbours, head by head.
# transposed: GPT-2 stores (in, out). plus_one: Gemma stores a norm's distance from 1.
Change = Literal["same", "query_rotary", "key_rotary", "transposed", "plus_one"]
_HEADS = {"query_rotary": "num_attention_heads", "key_rotary": "num_key_value_heads"}
ROPE_FACTORS = "rope_freqs.weight"  # a tensor that follows from the config and is no parameter


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor on both sides; `{}` stands for the block's index."""

    gguf: str
    parameter: str
    change: Change = "same"


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one family.

    Attributes:
        architecture: `general.architecture` in the file.
        family: The transformers model type that a file of this architecture is read as.
        parts: The tensors.
        keys: Pairs of a GGUF key (without the architecture) and a config attribute; (required ones first).
        fixed: What llama.cpp has built in: config attribute and the values that mean the same.
    """

    architecture: str
    family: str
    parts: tuple[Part, ...]
    keys: tuple[tuple[str, str], ...]
    fixed: tuple[tuple[str, tuple[Any, ...]], ...]


def _linear(gguf_name: str, path: str, change: Change = "same") -> tuple[Part, Part]:
    # A transposed weight has a plain bias; rows that move take their bias along.
    bias = "same" if change == "transposed" else change
    return Part(f"blk.{{}}.{gguf_name}.weight", f"{path}.weight", change), Part(
        f"blk.{{}}.{gguf_name}.bias", f"{path}.bias", bias
    )


def _decoder(rotary: bool = False, norm: Change = "same", norms: tuple[tuple[str, str], ...] = ()) -> tuple[Part, ...]:
    block = "model.layers.{}"
    return (
        Part("token_embd.weight", "model.embed_tokens.weight"),
        Part("output_norm.weight", "model.norm.weight", norm),
        Part("output.weight", "lm_head.weight"),
        Part(ROPE_FACTORS, ROPE_FACTORS),
        *_linear("attn_q", f"{block}.self_attn.q_proj", "query_rotary" if rotary else "same"),
        *_linear("attn_k", f"{block}.self_attn.k_proj", "key_rotary" if rotary else "same"),
        *_linear("attn_v", f"{block}.self_attn.v_proj"),
        *_linear("attn_output", f"{block}.self_attn.o_proj"),
        *_linear("ffn_gate", f"{block}.mlp.gate_proj"),
        *_linear("ffn_up", f"{block}.mlp.up_proj"),
        *_linear("ffn_down", f"{block}.mlp.down_proj"),
        *(Part(f"blk.{{}}.{name}.weight", f"{block}.{path}.weight", norm) for name, path in norms),
    )


_NORMS = (("attn_norm", "input_layernorm"), ("ffn_norm", "post_attention_layernorm"))
_HEAD_NORMS = (("attn_q_norm", "self_attn.q_norm"), ("attn_k_norm", "self_attn.k_norm"))
_GEMMA_NORMS = (
    ("attn_norm", "input_layernorm"),
    ("post_attention_norm", "post_attention_layernorm"),
    ("ffn_norm", "pre_feedforward_layernorm"),
    ("post_ffw_norm", "post_feedforward_layernorm"),
)
_GPT2_PARTS = (
    Part("token_embd.weight", "transformer.wte.weight"),
    Part("position_embd.weight", "transformer.wpe.weight"),
    Part("output_norm.weight", "transformer.ln_f.weight"),
    Part("output_norm.bias", "transformer.ln_f.bias"),
    Part("output.weight", "lm_head.weight"),
    *_linear("attn_norm", "transformer.h.{}.ln_1"),
    *_linear("ffn_norm", "transformer.h.{}.ln_2"),
    *_linear("attn_qkv", "transformer.h.{}.attn.c_attn", "transposed"),
    *_linear("attn_output", "transformer.h.{}.attn.c_proj", "transposed"),
    *_linear("ffn_up", "transformer.h.{}.mlp.c_fc", "transposed"),
    *_linear("ffn_down", "transformer.h.{}.mlp.c_proj", "transposed"),
)
_KEYS = (
    ("block_count", "num_hidden_layers"),
    ("context_length", "max_position_embeddings"),
    ("embedding_length", "hidden_size"),
    ("feed_forward_length", "intermediate_size"),
    ("attention.head_count", "num_attention_heads"),
    ("attention.head_count_kv", "num_key_value_heads"),
    ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
    ("attention.key_length", "head_dim"),
    ("attention.value_length", "head_dim"),
    ("rope.dimension_count", "head_dim"),
    ("vocab_size", "vocab_size"),
)
_GPT2_KEYS = (
    ("block_count", "n_layer"),
    ("context_length", "n_positions"),
    ("embedding_length", "n_embd"),
    ("feed_forward_length", "n_inner"),
    ("attention.head_count", "n_head"),
    ("attention.layer_norm_epsilon", "layer_norm_epsilon"),
    ("vocab_size", "vocab_size"),
)
_SILU = (("hidden_act", ("silu", "swish")),)
_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")

_LLAMA = Layout("llama", "llama", _decoder(rotary=True, norms=_NORMS), _KEYS, _SILU)
LAYOUTS: dict[str, Layout] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Layout("qwen2", "qwen2", _decoder(norms=_NORMS), _KEYS, (*_SILU, ("use_sliding_window", (False,)))),
    "qwen3": Layout(
        "qwen3",
        "qwen3",
        _decoder(norms=_NORMS + _HEAD_NORMS),
        _KEYS,
        (*_SILU, ("use_sliding_window", (False,))),
    ),
    "gemma3_text": Layout(
        "gemma3",
        "gemma3_text",
        _decoder(norm="plus_one", norms=_GEMMA_NORMS + _HEAD_NORMS),
        (*_KEYS, ("attention.sliding_window", "sliding_window")),
        (
            ("hidden_activation", _GELU),
            ("attn_logit_softcapping", (None,)),
            ("final_logit_softcapping", (None,)),
            ("use_bidirectional_attention", (False, None)),
        ),
    ),
    "gpt2": Layout(
        "gpt2",
        "gpt2",
        _GPT2_PARTS,
        _GPT2_KEYS,
        (
            ("activation_function", _GELU),
            ("scale_attn_weights", (True,)),
            ("scale_attn_by_inverse_layer_idx", (False,)),
        ),
    ),
}
ARCHITECTURES: dict[str, Layout] = {layout.architecture: layout for layout in LAYOUTS.values()}
_TO_GGUF = {
    name: {part.parameter: (part.gguf, part.change) for part in layout.parts} for name, layout in ARCHITECTURES.items()
}
_FROM_GGUF = {
    name: {part.gguf: (part.parameter, part.change) for part in layout.parts} for name, layout in ARCHITECTURES.items()
}


def gguf_part(family: str, parameter: str) -> tuple[str, Change]:
    """Return the GGUF name of a parameter and its change on the way there.

    Raises:
        BadInputError: GGUF has no place for the parameter.
    """
    return _find(parameter, _TO_GGUF[LAYOUTS[family].architecture])


def parameter_part(architecture: str, name: str) -> tuple[str, Change]:
    """Return the transformers parameter that a GGUF tensor holds, and the change to undo.

    Raises:
        BadInputError: The family has no such parameter.
    """
    return _find(name, _FROM_GGUF[architecture])


def _find(name: str, table: dict[str, tuple[str, Change]]) -> tuple[str, Change]:
    block = re.search(r"\.(\d+)\.", name)
    template = name if block is None else name.replace(block.group(), ".{}.", 1)
    if template not in table:
        raise BadInputError(
            f"The tensor `{name}` has no counterpart between transformers and GGUF in this family: "
            "the model has parts that its stock architecture lacks"
        )
    found, change = table[template]
    return found.format(block.group(1) if block else ""), change


def rotary_order(rows: int, heads: int) -> Tensor:
    """Return for each row of the file the row of the transformers weight that it is, (rows,).

    transformers turns dimension i of a head with i + head_dim / 2, llama.cpp's `llama` turns 2i with 2i + 1.
    """
    return torch.arange(rows).reshape(heads, 2, -1).transpose(1, 2).reshape(-1)


def to_gguf(tensor: Tensor, change: Change, config: "PreTrainedConfig", packed: bool = False) -> Tensor:
    """Return a parameter, or its packed rows (out, bytes per row), as the file holds it."""
    if change in _HEADS:
        return tensor[rotary_order(len(tensor), getattr(config, _HEADS[change]))]
    if packed or change == "same":
        return tensor
    return tensor.T if change == "transposed" else tensor + 1


def from_gguf(tensor: Tensor, change: Change, config: "PreTrainedConfig") -> Tensor:
    """Return a tensor of the file as the parameter it is: the inverse of `to_gguf`."""
    if change in _HEADS:
        return tensor[rotary_order(len(tensor), getattr(config, _HEADS[change])).argsort()]
    if change == "same":
        return tensor
    return tensor.T.contiguous() if change == "transposed" else tensor - 1
