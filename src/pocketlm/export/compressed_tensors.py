"""Write a model as a Hugging Face folder in the compressed-tensors format, which transformers and vLLM load.

A linear `x.weight` of the model becomes, in the file,

    int     x.weight_packed       (rows, words of codes) int32, codes offset to start at 0
            x.weight_scale        (rows, groups) bfloat16
            x.weight_zero_point   (words of zero points, groups) int32, packed down the rows; asymmetric formats only
            x.weight_shape        (2,) int64
    fp8     x.weight              (rows, columns) float8_e4m3fn
            x.weight_scale        (rows, groups) bfloat16

transformers decodes to the weights that `decode` gives, in the dtype it loads the model in (asymmetric formats always
in bfloat16, and only where they are the one format of the model: see `_needs_decoding`). What vLLM takes, by the source
of its `CompressedTensorsWNA16` and `CompressedTensorsW8A16Fp8`:

    - int4 and int8 with groups of 32, 64, 128 or per row; int2, int3, int5, int6 only in versions of 2026;
    - asymmetric int4, and int8 where a kernel other than Marlin is there to run it;
    - fp8 per row, not in groups;
    - the linears that it joins (q, k, v; gate, up) in one format or none, which is checked here;
    - a quantized head only in versions of 2026, so it is best left in 16 bits.
"""

import copy
import os
import shutil
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pocketlm.errors import BadInputError, MissingExtraError
from pocketlm.model.language_model import LanguageModel, save_company
from pocketlm.tensors.formats.block import Packed
from pocketlm.tensors.formats.integer import (
    DTYPE,
    Layout,
    Scheme,
    pack_stream,
    scheme_of,
    stream_bytes,
    unpack_stream,
)

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import PreTrainedConfig

# vLLM computes each of these with one matrix, which has one format.
JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_INTEGER, _FLOAT, _MIXED = "pack-quantized", "float-quantized", "mixed-precision"


def write_compressed_tensors(model: LanguageModel, packed: Mapping[str, Packed], folder: Path) -> None:
    """Write `model` to `folder`, the linears of `packed` as they are and all else as bfloat16.

    The folder appears under its name only when it is complete.

    Args:
        model: Left as it is.
        packed: By parameter name, in formats of `pocketlm.tensors.formats.integer`.
        folder: A folder that does not exist yet.

    Raises:
        BadInputError: The folder exists, or the model or a format cannot be expressed in compressed-tensors.
        MissingExtraError: The package compressed-tensors is not installed.
    """
    check_free(folder)
    config = copy.deepcopy(model.network.config)
    quantization = quantization_config(model, {name: each.format.name for name, each in packed.items()})
    config.quantization_config = quantization.model_dump(mode="json", exclude_none=True)
    if _needs_decoding(quantization):
        config.quantization_config["dequantize"] = True
    write_folder(model, config, _tensors(model, packed), folder)


def check_free(folder: Path) -> None:
    """Refuse a folder that exists already."""
    if folder.exists():
        raise BadInputError(f"{folder} exists already. Give another folder, or remove this one")


def write_folder(model: LanguageModel, config: "PreTrainedConfig", tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a Hugging Face folder with these tensors; it appears under its name only when it is complete.

    Args:
        model: Whose tokenizer and generation settings go with it.
        config: Of the model, with its `quantization_config`; changed.
        tensors: By their names in the file.
        folder: A folder that does not exist yet.
    """
    config.architectures = [type(model.network).__name__]
    config.dtype = DTYPE
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        beside.mkdir(parents=True)
        config.save_pretrained(beside)
        model.network.generation_config.save_pretrained(beside)
        save_company(model, beside)
        save_file(tensors, beside / "model.safetensors", metadata={"format": "pt"})
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


# ---- config ----


def quantization_config(model: LanguageModel, formats: Mapping[str, str]) -> "QuantizationConfig":
    """Return the `quantization_config` of a folder whose linears have these formats, checked by compressed-tensors.

    Args:
        model: The model.
        formats: Format name by parameter name.

    Raises:
        BadInputError: The model or a format cannot be expressed in compressed-tensors.
        MissingExtraError: The package compressed-tensors is not installed.
    """
    try:
        from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme, QuantizationStatus
    except ImportError:
        raise MissingExtraError(
            "Writing this folder needs compressed-tensors. Install it with\n"
            "  pip install 'pocketlm[compressed-tensors]'"
        ) from None
    linears = {
        name: formats.get(f"{name}.weight")
        for name, module in model.network.named_modules()
        if isinstance(module, nn.Linear)
    }
    _check(model, formats, linears)
    names = sorted({name for name in linears.values() if name})
    groups = {
        f"group_{index}": QuantizationScheme(
            # By class where that says it; `ignore` goes before.
            targets=["Linear"] if len(names) == 1 else [path for path, each in linears.items() if each == name],
            weights=_arguments(scheme_of(name)),
            format=_format(scheme_of(name)),
        )
        for index, name in enumerate(names)
    }
    kinds = {_format(scheme_of(name)) for name in names}
    return QuantizationConfig(
        config_groups=groups,
        format=kinds.pop() if len(kinds) == 1 else _MIXED,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=[path for path, name in linears.items() if name is None],
    )


def _check(model: LanguageModel, formats: Mapping[str, str], linears: Mapping[str, str | None]) -> None:
    if not formats:
        raise BadInputError("No weights are quantized: save the model as a plain folder")
    parameters = dict(model.network.named_parameters())  # a tied head has no weights of its own
    strangers = sorted(
        name for name in formats if name not in parameters or name.removesuffix(".weight") not in linears
    )
    if strangers:
        raise BadInputError(
            f"compressed-tensors folders quantize linears only, and {strangers[0]} of this {model.family} model is "
            "none. Leave embeddings, and heads tied to them, at 16 bits; GPT-2 cannot be stored this way"
        )
    if len(set(formats.values())) > 1 and any(name.endswith("-asym") for name in formats.values()):
        raise BadInputError(
            "transformers loads a folder with zero points (`-asym`) only where all linears have that one format. "
            "Give all the same, or symmetric ones"
        )
    for path in linears:
        parent, _, leaf = path.rpartition(".")
        for joined in JOINED:
            kinds = {linears.get(f"{parent}.{each}") for each in joined}
            if leaf == joined[0] and len(kinds) > 1:
                found = ", ".join(sorted(name or "16 bits" for name in kinds))
                raise BadInputError(f"vLLM joins {', '.join(joined)} of {parent}: they need one format, not {found}")


def _needs_decoding(config: "QuantizationConfig") -> bool:
    # compressed-tensors 0.18 to 0.20 make room for unpacked zero points, so transformers refuses packed ones unless it
    # decodes while it loads. That in turn takes all linears to have the first group's format.
    groups = list(config.config_groups.values())
    return len(groups) == 1 and not groups[0].weights.symmetric


def _format(scheme: Scheme) -> str:
    return _INTEGER if scheme.kind == "int" else _FLOAT


def _arguments(scheme: Scheme) -> dict[str, object]:
    """Return compressed-tensors' words for a format."""
    return {
        "num_bits": scheme.bits,
        "type": scheme.kind,
        "symmetric": scheme.symmetric,
        "strategy": "group" if scheme.group else "channel",
        "group_size": scheme.group,
        "dynamic": False,
    }


# ---- tensors ----


def _tensors(model: LanguageModel, packed: Mapping[str, Packed]) -> dict[str, Tensor]:
    tensors = {}
    for name, parameter in model.network.named_parameters():  # a tied embedding comes once
        if name not in packed:
            tensors[name] = parameter.detach().to("cpu", DTYPE).contiguous()
            continue
        if packed[name].shape != tuple(parameter.shape):
            raise ValueError(f"{name} is {tuple(parameter.shape)} in the model and {packed[name].shape} packed")
        tensors |= {f"{name}{end}": tensor for end, tensor in compressed(packed[name]).items()}
    return tensors


def compressed(packed: Packed) -> dict[str, Tensor]:
    """Return the tensors that stand for a weight matrix, by what their names have after `weight`."""
    rows, columns = packed.shape
    scheme = scheme_of(packed.format.name)
    layout = Layout(scheme, columns)
    codes, scales, zeros = layout.split(packed.rows.cpu())
    if scheme.kind == "float":
        return {"": codes.view(torch.float8_e4m3fn), "_scale": scales}
    tensors = {
        "_packed": codes.view(torch.int32),
        "_scale": scales,
        "_shape": torch.tensor([rows, columns]),
    }
    if zeros is not None:
        down = unpack_stream(zeros, scheme.bits, layout.groups).T
        tensors["_zero_point"] = pack_stream(down, scheme.bits, 4).view(torch.int32).T.contiguous()
    return tensors


# ---- size ----


def predicted_bytes(shapes: Mapping[str, tuple[int, ...]], formats: Mapping[str, str]) -> int:
    """Return the exact bytes of the tensors that `write_compressed_tensors` would store, by arithmetic alone.

    The file has a header besides, of about a hundred bytes for each tensor.

    Args:
        shapes: Shape by parameter name, matrices as (out, in), tied embeddings once.
        formats: Format name by parameter name; names that `shapes` lacks are ignored.
    """
    return sum(_bytes(shape, formats.get(name)) for name, shape in shapes.items())


def _bytes(shape: tuple[int, ...], name: str | None) -> int:
    if name is None:
        return DTYPE.itemsize * prod(shape)
    rows, columns = shape
    layout = Layout(scheme_of(name), columns)
    size = rows * (layout.code_bytes + DTYPE.itemsize * layout.groups)
    if layout.scheme.kind == "int":
        size += 16  # the shape
    if not layout.scheme.symmetric:
        size += layout.groups * stream_bytes(rows, layout.scheme.bits, 4)
    return size
