"""Write a model with many zeros as a folder that stores a bit for every weight and 16 bits for those that are not zero.

The layout is compressed-tensors' `sparse-bitmask`. A linear `x.weight` becomes, in the file,

    x.compressed    (weights that are not zero,) bfloat16, row after row
    x.bitmask       (rows, ⌈columns / 8⌉) uint8, lowest bit first, 1 where a weight is not zero
    x.row_offsets   (rows,) int64, where each row starts in `compressed`
    x.shape         (2,) int64

compressed-tensors up to 0.14 reads it, and with it transformers and vLLM of that time; later versions keep its
configuration but not its decoder. `read_sparse_bitmask` reads it here. At half zeros a weight takes 9 bits instead of
16, on disk: nothing computes faster for it.
"""

import copy
from collections.abc import Mapping
from math import prod
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import pad

from pocketlm.errors import BadInputError
from pocketlm.export.compressed_tensors import check_free, write_folder
from pocketlm.model.anatomy import linears_of
from pocketlm.model.language_model import LanguageModel
from pocketlm.tensors.formats.ggml import pack_bits, unpack_bits
from pocketlm.tensors.formats.integer import DTYPE

ENDS = ("compressed", "bitmask", "row_offsets", "shape")


def write_sparse_bitmask(model: LanguageModel, folder: Path, pattern: str | None = None) -> None:
    """Write `model` to `folder`, the linears of its blocks as bitmasks and all else as bfloat16.

    The folder appears under its name only when it is complete.

    Args:
        model: Left as it is.
        folder: A folder that does not exist yet.
        pattern: As in `Sparsify`, for the folder's configuration.

    Raises:
        BadInputError: The folder exists, the family has no linears that can be stored so, or it would be no smaller.
    """
    check_free(folder)
    zeros, shapes = zero_counts(model), _shapes(model)
    if not _are_fewer(shapes, zeros):
        raise BadInputError("Too few weights are zero for a bitmask to save anything. Save the model as a plain folder")
    weights = {name: each.detach().to("cpu", DTYPE) for name, each in model.network.named_parameters()}
    config = copy.deepcopy(model.network.config)
    share = sum(zeros.values()) / sum(prod(shapes[name]) for name in zeros)
    config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "sparsity_config": {
            "format": "sparse-bitmask",
            "global_sparsity": share,
            "sparsity_structure": pattern or "unstructured",
            "registry_requires_subclass": False,
            "targets": ["Linear"],
            "ignore": ["lm_head"],
        },
    }
    tensors = {}
    for name, weight in weights.items():
        if name not in zeros:
            tensors[name] = weight.contiguous()
            continue
        stem = name.removesuffix("weight")
        tensors |= {f"{stem}{end}": part for end, part in squeeze(weight).items()}
    write_folder(model, config, tensors, folder)


def saves_bytes(model: LanguageModel) -> bool:
    """Whether a folder of bitmasks is smaller than a plain one: the blocks have torch's linears, and zeros enough."""
    return _has_torch_linears(model) and _are_fewer(_shapes(model), zero_counts(model))


def zero_counts(model: LanguageModel) -> dict[str, int]:
    """Return how many weights are zero as they are stored, by the parameter names of the linears in the blocks.

    Raises:
        BadInputError: As `linear_names`.
    """
    return {name: int((model.network.get_parameter(name).to(DTYPE) == 0).sum()) for name in linear_names(model)}


def linear_names(model: LanguageModel) -> list[str]:
    """Return the parameter names of the linears in the blocks.

    Raises:
        BadInputError: The family stores them the other way round (GPT-2).
    """
    if not _has_torch_linears(model):
        raise BadInputError(f"A {model.family} model has no linears of torch, so it cannot be stored as bitmasks")
    return list(linears_of(model.network))


def _has_torch_linears(model: LanguageModel) -> bool:
    return all(isinstance(linear, nn.Linear) for _, linear in linears_of(model.network).values())


def _shapes(model: LanguageModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.network.named_parameters()}


def _are_fewer(shapes: Mapping[str, tuple[int, ...]], zeros: Mapping[str, int]) -> bool:
    return predicted_bytes(shapes, zeros) < predicted_bytes(shapes, {})


def squeeze(weight: Tensor) -> dict[str, Tensor]:
    """Return the tensors that stand for a matrix, (rows, columns), by the last part of their names."""
    there = weight != 0
    counts = there.sum(1)
    return {
        "compressed": weight[there],
        "bitmask": pack_bits(pad(there, (0, -weight.shape[1] % 8))),
        "row_offsets": counts.cumsum(0) - counts,
        "shape": torch.tensor(weight.shape),
    }


def expand(parts: Mapping[str, Tensor]) -> Tensor:
    """Return the matrix that `squeeze` made `parts` of."""
    rows, columns = parts["shape"].tolist()
    there = unpack_bits(parts["bitmask"])[:, :columns].bool()
    weight = torch.zeros(rows, columns, dtype=parts["compressed"].dtype)
    weight[there] = parts["compressed"]
    return weight


def read_sparse_bitmask(file: Path) -> dict[str, Tensor]:
    """Return the weights of a safetensors file with bitmasks, by their parameter names."""
    tensors = load_file(file)
    stems = [name.removesuffix(".bitmask") for name in tensors if name.endswith(".bitmask")]
    weights = {f"{stem}.weight": expand({end: tensors.pop(f"{stem}.{end}") for end in ENDS}) for stem in stems}
    return tensors | weights


def predicted_bytes(shapes: Mapping[str, tuple[int, ...]], zeros: Mapping[str, int]) -> int:
    """Return the exact bytes of the tensors that `write_sparse_bitmask` stores, by arithmetic alone.

    The file has a header besides, of about a hundred bytes for each tensor.

    Args:
        shapes: Shape by parameter name, matrices as (out, in), tied embeddings once.
        zeros: How many weights are zero, by the parameter names of what is stored as a bitmask.
    """
    return sum(_bytes(shape, zeros.get(name)) for name, shape in shapes.items())


def _bytes(shape: tuple[int, ...], zeros: int | None) -> int:
    if zeros is None:
        return DTYPE.itemsize * prod(shape)
    rows, columns = shape
    return DTYPE.itemsize * (rows * columns - zeros) + rows * (-(-columns // 8)) + 8 * rows + 16
