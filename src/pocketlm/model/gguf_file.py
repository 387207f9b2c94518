"""Read a GGUF file, the container of llama.cpp: named fields, then tensors.

    "GGUF" | version | tensor count | field count | fields | tensor infos | padding | tensor data

The header is parsed here, because the `gguf` package's reader needs seconds for a tokenizer's arrays and
stops at tensor types younger than itself. Decoding is left to the package: it is the judge of our encoders.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.tensors.formats import FORMATS, Packed, unpack

ALIGNMENT = 32


class TensorType(NamedTuple):
    """How GGUF stores a tensor: `block` weights of a row in `block_bytes` bytes."""

    number: int
    block: int
    block_bytes: int


# The gguf package does not know or decode these two yet; llama.cpp reads them.
_YOUNG_TYPES = {"Q1_0": TensorType(41, 128, 18), "Q2_0": TensorType(42, 64, 18)}
TYPES: dict[str, TensorType] = {
    kind.name: TensorType(int(kind), *gguf.GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType
} | _YOUNG_TYPES
_TYPE_NAMES = {kind.number: name for name, kind in TYPES.items()}

_SCALARS: dict[GGUFValueType, np.dtype] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}


@dataclass(frozen=True, slots=True)
class Field:
    """A metadata value with the type it has in the file; `item` is the type of an array's elements."""

    value: Any
    type: GGUFValueType
    item: GGUFValueType | None = None


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and how it is stored; `shape` is (out, in), slowest dimension first as in torch."""

    type: str
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class GgufFile:
    """The header of a GGUF file."""

    path: Path
    fields: dict[str, Field]
    tensors: dict[str, TensorInfo]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a field's value, or `default` where the file does not state it."""
        return self.fields[key].value if key in self.fields else default


def field(value: bool | int | float | str | list) -> Field:
    """Give a Python value the type that llama.cpp's converter gives it."""
    kinds = {
        bool: GGUFValueType.BOOL,
        int: GGUFValueType.UINT32,
        float: GGUFValueType.FLOAT32,
        str: GGUFValueType.STRING,
    }
    if isinstance(value, list):
        item = kinds[type(value[0])]
        return Field(value, GGUFValueType.ARRAY, GGUFValueType.INT32 if item is GGUFValueType.UINT32 else item)
    return Field(value, kinds[type(value)])


def field_bytes(key: str, value: Field) -> int:
    """Return the bytes that a field takes in the file, its key included."""

    def size(kind: GGUFValueType, item: Any) -> int:
        return 8 + len(item.encode()) if kind is GGUFValueType.STRING else _SCALARS[kind].itemsize

    start = 8 + len(key.encode()) + 4
    if value.item is None:
        return start + size(value.type, value.value)
    if value.item is GGUFValueType.STRING:
        return start + 12 + sum(size(value.item, item) for item in value.value)
    return start + 12 + len(value.value) * _SCALARS[value.item].itemsize


def tensor_bytes(type_name: str, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor's data, padding not counted.

    Raises:
        BadInputError: The type is unknown, or its blocks do not divide the rows.
    """
    if type_name not in TYPES:
        raise BadInputError(f"GGUF has no tensor type `{type_name}`: known are {', '.join(sorted(TYPES))}")
    kind = TYPES[type_name]
    if shape[-1] % kind.block:
        raise BadInputError(
            f"{type_name} stores blocks of {kind.block} weights, and rows of {shape[-1]} do not divide: "
            "choose a type with smaller blocks for this tensor"
        )
    return prod(shape) // kind.block * kind.block_bytes


def padded(size: int) -> int:
    """Round a number of bytes up to the file's alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Cursor:
    """A position in the mapped file that moves on as values are read."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def numbers(self, kind: np.dtype, count: int) -> list:
        if count * kind.itemsize > len(self.data) - self.at:
            raise EOFError
        start, self.at = self.at, self.at + count * kind.itemsize
        return np.frombuffer(self.data, kind, count, start).tolist()

    def number(self, kind: GGUFValueType) -> Any:
        return self.numbers(_SCALARS[kind], 1)[0]

    def string(self) -> str:
        (length,) = struct.unpack_from("<Q", self.data, self.at)
        start = self.at + 8
        if length > len(self.data) - start:
            raise EOFError
        self.at = start + length
        return self.data[start : self.at].decode()

    def value(self, kind: GGUFValueType) -> Field:
        if kind is GGUFValueType.STRING:
            return Field(self.string(), kind)
        if kind is not GGUFValueType.ARRAY:
            return Field(self.number(kind), kind)
        item = GGUFValueType(self.number(GGUFValueType.UINT32))
        count = self.number(GGUFValueType.UINT64)
        if item is GGUFValueType.STRING:
            return Field([self.string() for _ in range(count)], kind, item)
        return Field(self.numbers(_SCALARS[item], count), kind, item)


def read_gguf(path: Path) -> GgufFile:
    """Read the header of a GGUF file; no tensor is decoded.

    Raises:
        BadInputError: The file is not GGUF, is cut off or damaged, or is one part of a split model.
    """
    try:
        stream = path.open("rb")
    except OSError as error:
        raise BadInputError(f"Cannot read {path}: {error.strerror}") from error
    with stream:
        if stream.read(4) != b"GGUF":
            raise BadInputError(f"{path} is not a GGUF file: it does not begin with the letters GGUF")
        try:
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
                file = _parse(path, data)
                parts = int(file.get("split.count", 1))
        except (EOFError, struct.error, ValueError, KeyError, TypeError) as error:
            raise BadInputError(
                f"{path} is cut off or damaged: its header cannot be read. Download or export it again"
            ) from error
    if parts > 1:
        raise BadInputError(f"{path} is one part of a split model: join the parts with `llama-gguf-split --merge`")
    size = path.stat().st_size
    for name, info in file.tensors.items():
        if info.offset + tensor_bytes(info.type, info.shape) > size:
            raise BadInputError(f"{path} is cut off: the data of `{name}` is missing. Download or export it again")
    return file


def _parse(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    cursor.at = 4
    version = cursor.number(GGUFValueType.UINT32)
    if version not in (2, 3):
        raise BadInputError(f"{path} is GGUF version {version}: versions 2 and 3 (little-endian) can be read")
    tensor_count, field_count = cursor.numbers(np.dtype("<u8"), 2)
    fields = {}
    for _ in range(field_count):
        key = cursor.string()
        fields[key] = cursor.value(GGUFValueType(cursor.number(GGUFValueType.UINT32)))
    infos = {}
    for _ in range(tensor_count):
        name = cursor.string()
        shape = cursor.numbers(np.dtype("<u8"), cursor.number(GGUFValueType.UINT32))
        number = cursor.number(GGUFValueType.UINT32)
        if number not in _TYPE_NAMES:
            raise BadInputError(f"{path} stores `{name}` in a tensor type that is unknown here (number {number})")
        infos[name] = TensorInfo(_TYPE_NAMES[number], tuple(reversed(shape)), cursor.number(GGUFValueType.UINT64))
    alignment = fields["general.alignment"].value if "general.alignment" in fields else ALIGNMENT
    if alignment < 1:
        raise ValueError("the data begins nowhere")
    start = -(-cursor.at // alignment) * alignment
    placed = {name: TensorInfo(info.type, info.shape, start + info.offset) for name, info in infos.items()}
    return GgufFile(path, fields, placed)


def read_bytes(file: GgufFile, name: str) -> np.ndarray:
    """Return a tensor as it is stored, uint8: (..., bytes of a row)."""
    info = file.tensors[name]
    size = tensor_bytes(info.type, info.shape)
    data = np.fromfile(file.path, np.uint8, size, offset=info.offset)
    return data.reshape(*info.shape[:-1], size // prod(info.shape[:-1]))


def read_tensor(file: GgufFile, name: str) -> Tensor:
    """Decode one tensor to float32, in the shape and order of the file.

    Raises:
        BadInputError: Nothing here decodes the tensor's type.
    """
    info, rows = file.tensors[name], read_bytes(file, name)
    if info.type in FORMATS and info.type in _YOUNG_TYPES:
        return unpack(Packed(FORMATS[info.type], torch.from_numpy(rows), info.shape)).decode()
    plain = {"F32": np.float32, "F16": np.float16}.get(info.type)
    if plain is not None:
        return torch.from_numpy(rows.view(plain).astype(np.float32))
    try:
        return torch.from_numpy(gguf.dequantize(rows, GGMLQuantizationType[info.type]))
    except (NotImplementedError, KeyError) as error:
        raise BadInputError(f"{file.path} stores `{name}` as {info.type}, which cannot be decoded here") from error
