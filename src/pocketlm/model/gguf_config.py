"""The transformers config and GGUF's hyperparameters, one made from the other in both directions."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.model.gguf_file import GgufFile
from pocketlm.model.gguf_layout import ARCHITECTURES, LAYOUTS, ROPE_FACTORS, Layout
from pocketlm.model.surgery import head_width

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# Llama 3's published scaling: low and high frequency factor, original context length. A file keeps only
# what they result in.
_LLAMA3 = (1.0, 4.0, 8192)
# llama.cpp's constants, and the options it has no field for.
_YARN = {"beta_fast": 32, "beta_slow": 1, "attention_factor": None, "mscale": None, "mscale_all_dim": None}


def hyperparameters(config: "PreTrainedConfig") -> dict[str, int | float | str]:
    """Return the fields that describe a model's shape and rotary positions, keys without the architecture.

    Raises:
        BadInputError: llama.cpp would compute something else than this config asks for.
    """
    layout = LAYOUTS[config.model_type]
    _check_fixed(layout, config)
    values = {key: getattr(config, attribute, None) for key, attribute in layout.keys}
    if config.model_type == "gpt2":
        values["feed_forward_length"] = values["feed_forward_length"] or 4 * config.n_embd
        return values
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        values[key] = values[key] or config.hidden_size // config.num_attention_heads
    if config.model_type == "mistral" and config.sliding_window:
        # llama.cpp's `llama` has no sliding window; within the window both compute the same.
        values["context_length"] = min(config.max_position_embeddings, config.sliding_window)
    return values | _rope_fields(config)


def _check_fixed(layout: Layout, config: "PreTrainedConfig") -> None:
    for attribute, values in layout.fixed:
        value = getattr(config, attribute, values[0])
        if value not in values:
            raise BadInputError(
                f"llama.cpp has no `{attribute}: {value}` for {layout.architecture} models (it computes "
                f"{' or '.join(map(str, values))}): this model cannot be written as GGUF"
            )
    if config.model_type == "gemma3_text":
        pattern = [
            "full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(len(config.layer_types))
        ]
        if config.layer_types != pattern or config.query_pre_attn_scalar != config.head_dim:
            raise BadInputError(
                "llama.cpp takes every sixth block of a Gemma 3 for a global one and scales attention by the "
                "head's width: this config differs and cannot be written as GGUF"
            )


def _rope_fields(config: "PreTrainedConfig") -> dict[str, int | float | str]:
    rope = config.rope_parameters
    fields: dict[str, int | float | str] = {}
    if config.model_type == "gemma3_text":
        fields["rope.freq_base_swa"] = float(rope["sliding_attention"]["rope_theta"])
        rope = rope["full_attention"]
    fields["rope.freq_base"] = float(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise BadInputError(
            f"The rotary scaling `{kind}` cannot be written as GGUF: default, linear, yarn and llama3 can"
        )
    if kind in ("linear", "yarn"):
        fields["rope.scaling.type"] = kind
        fields["rope.scaling.factor"] = float(rope["factor"])
    if kind == "yarn":
        odd = [key for key, usual in _YARN.items() if (rope.get(key) or usual) != usual]
        if odd:
            raise BadInputError(f"The YaRN setting {', '.join(odd)} of this model cannot be written as GGUF")
        fields["rope.scaling.original_context_length"] = int(
            rope.get("original_max_position_embeddings") or config.max_position_embeddings
        )
    return fields


def rope_factors(config: "PreTrainedConfig") -> Tensor | None:
    """Return what Llama 3 divides each rotary frequency by, (head_dim / 2,) float32; None for other models.

    Source: transformers' `_compute_llama3_parameters`, published with Llama 3.1 (arXiv 2407.21783).
    """
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    return _llama3_factors(
        head_width(config),
        rope["rope_theta"],
        rope["factor"],
        (rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]),
    )


def _llama3_factors(head_dim: int, base: float, factor: float, scaling: tuple[float, float, float]) -> Tensor:
    low, high, context = scaling
    wavelengths = 2 * math.pi * base ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    smooth = ((context / wavelengths - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def config_from_gguf(file: GgufFile, factors: Tensor | None) -> "PreTrainedConfig":
    """Build the transformers config that a file's fields describe.

    Args:
        file: The header.
        factors: The tensor `rope_freqs.weight`, None where the file has none.

    Raises:
        BadInputError: The architecture is unknown, a field is missing, or the rotary scaling is unknown.
    """
    from transformers import AutoConfig

    architecture = file.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise BadInputError(
            f"The architecture `{architecture}` of {file.path} is not supported: known are "
            f"{', '.join(ARCHITECTURES)}. It still works with `pocketlm bench` and `pocketlm chat`"
        )
    layout = ARCHITECTURES[architecture]
    found = {attribute: _plain(file, f"{architecture}.{key}") for key, attribute in reversed(layout.keys)}
    values = {attribute: value for attribute, value in found.items() if value is not None}
    embedding = file.tensors.get("token_embd.weight")
    missing = [attribute for attribute in list(dict(layout.keys).values())[:5] if attribute not in values]
    if embedding is None or missing:
        raise BadInputError(f"{file.path} does not state {', '.join(missing) or 'token_embd.weight'}: it is damaged")
    values |= {
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "bos_token_id": file.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": file.get("tokenizer.ggml.padding_token_id"),
    }
    if layout.family != "gpt2":
        values.setdefault("head_dim", values["hidden_size"] // values["num_attention_heads"])
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
        values["rope_parameters"] = _rope_parameters(file, layout, values, factors)
        if layout.family == "llama":  # Qwen 2 always has biases
            values["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
            values["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    if layout.family == "gemma3_text":
        values["query_pre_attn_scalar"] = values["head_dim"]
    return AutoConfig.for_model(layout.family, **values)


def _plain(file: GgufFile, key: str) -> int | float | None:
    value = file.get(key)
    if isinstance(value, list):  # one value per block
        if len(set(value)) > 1:
            raise BadInputError(f"{file.path} has blocks of different shapes (`{key}`), which no stock config can say")
        value = value[0]
    # 1e-05 is stored as the nearest float32: give back the shortest number that means the same.
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rope_parameters(file: GgufFile, layout: Layout, values: dict, factors: Tensor | None) -> dict[str, Any]:
    def get(key: str, default: Any = None) -> Any:
        value = _plain(file, f"{layout.architecture}.rope.{key}")
        return default if value is None else value

    kind = get("scaling.type", "none")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": get("freq_base", 10000.0)}
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": get("scaling.factor", 1.0)}
        if kind == "yarn":
            rope["original_max_position_embeddings"] = get(
                "scaling.original_context_length", values["max_position_embeddings"]
            )
    elif kind != "none":
        raise BadInputError(f"{file.path} scales rotary positions by `{kind}`: none, linear and yarn can be read")
    if factors is not None:
        low, high, context = _LLAMA3
        factor = round(factors.max().item(), 4)
        expected = _llama3_factors(values["head_dim"], rope["rope_theta"], factor, _LLAMA3)
        if expected.shape != factors.shape or not torch.allclose(expected, factors, rtol=1e-3):
            raise BadInputError(f"{file.path} has rotary factors (`{ROPE_FACTORS}`) that are not Llama 3's")
        rope |= {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": low,
            "high_freq_factor": high,
            "original_max_position_embeddings": context,
        }
    if layout.family == "gemma3_text":
        local = {"rope_type": "default", "rope_theta": get("freq_base_swa", 10000.0)}
        return {"full_attention": rope, "sliding_attention": local}
    return rope
