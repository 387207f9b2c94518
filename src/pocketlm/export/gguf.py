"""Write a model as GGUF, the file that llama.cpp runs, and say beforehand how many bytes it will have."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import gguf
import numpy as np
import torch
from gguf import GGUFWriter, LlamaFileType
from torch import Tensor

from pocketlm.model.gguf_config import hyperparameters, rope_factors
from pocketlm.model.gguf_file import (
    TYPES,
    Field,
    GgufFile,
    field,
    field_bytes,
    padded,
    read_gguf,
    tensor_bytes,
)
from pocketlm.model.gguf_layout import LAYOUTS, ROPE_FACTORS, Change, gguf_part, to_gguf
from pocketlm.model.gguf_tokenizer import tokenizer_fields
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.surgery import as_ids
from pocketlm.tensors.formats import Packed

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Plain = Literal["F16", "BF16", "F32"]
_HEADER_BYTES = 24  # letters, version, two counts
_F16_MAX = torch.finfo(torch.float16).max
# What a source file says about its own weights and is no longer true of these, or is said anew.
_STALE = ("general.architecture", "general.file_type", "general.quantization_version", "general.alignment",
          "general.size_label", "general.quantized_by", "general.base_model.", "quantize.")  # fmt: skip
_FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of the file to be; `read` makes its bytes when their turn comes."""

    name: str
    type: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def write_gguf(model: LanguageModel, packed: Mapping[str, Packed], path: Path, plain: Plain = "F16") -> None:
    """Write `model` to `path`, the tensors of `packed` as they are and all others as plain numbers.

    The file appears under its name only when it is complete. Tied embeddings are written once.

    Args:
        model: Its weights are converted tensor by tensor, so no second copy of the model is held.
        packed: By transformers parameter name; rows are the outputs of a linear in every family.
        path: The file to make; one that is there is replaced.
        plain: Type of the matrices that are not packed; vectors are always F32, and a matrix with a weight that F16
            cannot hold is BF16.

    Raises:
        BadInputError: The model or its tokenizer cannot be expressed in GGUF.
    """
    entries = _entries(model, packed, plain)
    weights = Counter[str]()
    for entry in entries:
        if len(entry.shape) > 1:
            weights[entry.type] += prod(entry.shape)
    fields = _metadata(model) | {"general.file_type": field(int(_file_type(weights.most_common(1)[0][0])))}
    write_entries(LAYOUTS[model.family].architecture, fields, entries, path)


def write_entries(architecture: str, fields: Mapping[str, Field], entries: Sequence[Entry], path: Path) -> None:
    """Write fields and tensors to `path`, which appears only when it is complete; the architecture is no field here."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    writer = GGUFWriter(beside, architecture)
    try:
        for key, value in fields.items():
            writer.add_key_value(key, value.value, value.type, sub_type=value.item)
        for entry in entries:
            size = tensor_bytes(entry.type, entry.shape)
            # Said to be int8: for uint8 the writer looks the type's block up, and lacks the youngest types.
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.int8), size, raw_dtype=TYPES[entry.type].number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.read())
        writer.close()
        beside.replace(path)
    finally:
        writer.close()
        beside.unlink(missing_ok=True)


# ---- size ----


def metadata_bytes(model: LanguageModel) -> int:
    """Return the bytes before the tensor infos: they depend on the tokenizer, not on the shapes."""
    fields = _metadata(model) | {
        "general.architecture": field(LAYOUTS[model.family].architecture),
        "general.file_type": field(0),
    }
    return _HEADER_BYTES + sum(field_bytes(key, value) for key, value in fields.items())


def parameter_shapes(config: "PreTrainedConfig") -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor that a model of this config has in a file, matrices as (out, in).

    No weights are made, so the config may be of a model that does not exist yet: fewer blocks, another width.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    shapes = {}
    for name, parameter in network.named_parameters():
        shape = tuple(parameter.shape)
        shapes[name] = shape[::-1] if gguf_part(config.model_type, name)[1] == "transposed" else shape
    factors = rope_factors(config)
    return shapes if factors is None else shapes | {ROPE_FACTORS: tuple(factors.shape)}


def predicted_bytes(
    metadata: int,
    family: str,
    shapes: Mapping[str, tuple[int, ...]],
    formats: Mapping[str, str],
    plain: Plain = "F16",
) -> int:
    """Return the exact size of the file that `write_gguf` would make, by arithmetic alone.

    Args:
        metadata: From `metadata_bytes`.
        family: The transformers model type.
        shapes: From `parameter_shapes`.
        formats: GGUF type by parameter name, for what is to be packed; names that `shapes` lacks are ignored.
        plain: Type of the matrices that are not packed.

    Raises:
        BadInputError: A type is unknown, or its blocks do not divide a row.
    """
    infos = data = 0
    for name, shape in shapes.items():
        infos += 24 + len(gguf_part(family, name)[0]) + 8 * len(shape)  # two lengths, type, offset, name, shape
        data += padded(tensor_bytes(formats.get(name) or _plain_type(shape, plain), shape))
    return padded(metadata + infos) + data


# ---- tensors ----


def _plain_type(shape: tuple[int, ...], plain: Plain) -> str:
    return plain if len(shape) > 1 else "F32"


def _entries(model: LanguageModel, packed: Mapping[str, Packed], plain: Plain) -> list[Entry]:
    config = model.network.config
    parameters = dict(model.network.named_parameters())  # a tied embedding comes once
    strangers = sorted(set(packed) - set(parameters))
    if strangers:
        raise ValueError(f"the model has no weights of its own named {', '.join(strangers)}")
    entries = []
    for name, parameter in parameters.items():
        target, change = gguf_part(model.family, name)
        shape = tuple(parameter.shape[::-1] if change == "transposed" else parameter.shape)
        if name in packed:
            if packed[name].shape != shape:
                raise ValueError(f"{name} is {shape} in the model and {packed[name].shape} packed")
            read = partial(_packed_bytes, packed[name], change, config)
            entries.append(Entry(target, packed[name].format.name, shape, read))
        else:
            kind = _plain_type(shape, plain)
            if kind == "F16" and torch.linalg.vector_norm(parameter, torch.inf) > _F16_MAX:
                kind = "BF16"  # as many bytes
            entries.append(Entry(target, kind, shape, partial(_plain_bytes, parameter, change, config, kind)))
    factors = rope_factors(config)
    if factors is not None:
        entries.append(Entry(ROPE_FACTORS, "F32", tuple(factors.shape), factors.numpy))
    return entries


def _packed_bytes(packed: Packed, change: Change, config: "PreTrainedConfig") -> np.ndarray:
    # Each row is quantized on its own, so rows can change places after packing.
    return to_gguf(packed.rows, change, config, packed=True).cpu().contiguous().numpy()


@torch.no_grad()
def _plain_bytes(parameter: Tensor, change: Change, config: "PreTrainedConfig", kind: str) -> np.ndarray:
    weight = to_gguf(parameter.detach().cpu().float(), change, config)
    if kind == "BF16":
        return weight.bfloat16().contiguous().view(torch.int16).numpy()
    if kind == "F16":
        weight = weight.half()
    return weight.contiguous().numpy()


# ---- metadata ----


def _metadata(model: LanguageModel) -> dict[str, Field]:
    config, origin = model.network.config, model.origin
    architecture = LAYOUTS[model.family].architecture
    tokenizer = tokenizer_fields(model.tokenizer, config.vocab_size, _end_ids(model))
    general: dict[str, Field] = {"general.type": field("model"), "general.name": field(origin.base_model)}
    if origin.license:
        general["general.license"] = field(origin.license)
    if origin.kind == "gguf":
        source = read_gguf(origin.path)
        kept = {key: value for key, value in source.fields.items() if not key.startswith((*_STALE, "tokenizer."))}
        general |= kept
        if _same_vocabulary(source, tokenizer):
            tokenizer = {key: value for key, value in source.fields.items() if key.startswith("tokenizer.")}
    organization, _, name = origin.base_model.rpartition("/")
    general |= {
        "general.base_model.count": field(1),
        "general.base_model.0.name": field(name),
        "general.quantization_version": field(gguf.GGML_QUANT_VERSION),
    }
    if organization:
        general["general.base_model.0.organization"] = field(organization)
        general["general.base_model.0.repo_url"] = field(f"https://huggingface.co/{origin.base_model}")
    shape = {f"{architecture}.{key}": field(value) for key, value in hyperparameters(config).items()}
    return general | shape | tokenizer


def _same_vocabulary(source: GgufFile, fields: Mapping[str, Field]) -> bool:
    keys = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    return all(source.get(key) == (fields[key].value if key in fields else None) for key in keys)


def _end_ids(model: LanguageModel) -> list[int]:
    ends = as_ids(model.network.generation_config.eos_token_id)
    own = model.tokenizer.eos_token_id
    return ends if own is None or (ends and own not in ends) else [own, *ends]


def _file_type(type_name: str) -> LlamaFileType:
    name = _FILE_TYPES.get(type_name, f"MOSTLY_{type_name}")
    return LlamaFileType.__members__.get(name, LlamaFileType.GUESSED)
