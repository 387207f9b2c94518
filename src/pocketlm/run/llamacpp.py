"""The C interface of llama.cpp as the xllamacpp wheel exports it, through ctypes.

xllamacpp offers a server; the extension module behind it also exports llama.cpp's C functions (`llama.h`,
`ggml.h`). Those give what the server does not: the logits of every position, and the engine's own decoder of
each number format.

Three structs pass by value and their layout differs between versions. The two parameter structs are therefore
opaque blocks, larger than any known version: on x86-64 System V a struct this large lies at the end of the
arguments on the stack, on AArch64 and Windows it is passed as a pointer to a copy, so extra bytes at its end
are never read. Only fields whose place is proven by the documented defaults are set. `llama_batch` has kept
its seven fields for years; `library` proves them on a batch that the engine made.
"""

import ctypes
from collections import deque
from ctypes import (
    POINTER,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_uint32,
    c_void_p,
)
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pocketlm.errors import BadInputError, PocketlmError

if TYPE_CHECKING:
    from torch import Tensor

_LOG_ERROR = 4
_DOCUMENTED_CONTEXT_DEFAULTS = (512, 2048, 512, 1)  # n_ctx, n_batch, n_ubatch, n_seq_max


class ModelParameters(ctypes.Structure):
    """`llama_model_params`: `devices` has been its first field in every version that has it."""

    _fields_ = (("devices", c_void_p), ("rest", c_int64 * 63))


class ContextParameters(ctypes.Structure):
    """`llama_context_params`: the first four fields, then what `llama_context_default_params` says."""

    _fields_ = (
        ("n_ctx", c_uint32),
        ("n_batch", c_uint32),
        ("n_ubatch", c_uint32),
        ("n_seq_max", c_uint32),
        ("rest", c_int64 * 62),
    )


class Batch(ctypes.Structure):
    """`llama_batch`: null positions and sequences mean "append to sequence 0"."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


_LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

# name: (what it returns, what it takes). Models, contexts, vocabularies and memories are opaque pointers.
_PROTOTYPES = {
    "llama_backend_init": (None, ()),
    "llama_log_set": (None, (_LogCallback, c_void_p)),
    "llama_version": (c_char_p, ()),
    "llama_model_default_params": (ModelParameters, ()),
    "llama_model_load_from_file": (c_void_p, (c_char_p, ModelParameters)),
    "llama_model_free": (None, (c_void_p,)),
    "llama_model_get_vocab": (c_void_p, (c_void_p,)),
    "llama_context_default_params": (ContextParameters, ()),
    "llama_init_from_model": (c_void_p, (c_void_p, ContextParameters)),
    "llama_free": (None, (c_void_p,)),
    "llama_set_n_threads": (None, (c_void_p, c_int32, c_int32)),
    "llama_get_memory": (c_void_p, (c_void_p,)),
    "llama_memory_clear": (None, (c_void_p, c_bool)),
    "llama_memory_seq_rm": (c_bool, (c_void_p, c_int32, c_int32, c_int32)),
    "llama_batch_init": (Batch, (c_int32, c_int32, c_int32)),
    "llama_batch_free": (None, (Batch,)),
    "llama_decode": (c_int32, (c_void_p, Batch)),
    "llama_get_logits": (POINTER(c_float), (c_void_p,)),
    "llama_tokenize": (c_int32, (c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool)),
    "llama_vocab_n_tokens": (c_int32, (c_void_p,)),
    "llama_vocab_is_eog": (c_bool, (c_void_p, c_int32)),
    "ggml_type_name": (c_char_p, (c_int,)),
    "ggml_blck_size": (c_int64, (c_int,)),
    "ggml_type_size": (c_size_t, (c_int,)),
}

_error_lines: deque[str] = deque(maxlen=8)


@_LogCallback
def _keep_errors(level: int, text: bytes, _: int | None) -> None:
    # A raise here would be printed by ctypes in the middle of the terminal: decode leniently.
    if level == _LOG_ERROR:
        _error_lines.append(text.decode("utf-8", "replace"))


def take_errors() -> str:
    """Return the error lines that llama.cpp logged since the last call, and forget them."""
    text = "".join(_error_lines)
    _error_lines.clear()
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def version() -> str:
    """Return the engine's version, such as `xllamacpp 2026.10.11549 (llama.cpp 0.6.0-dev)`."""
    return f"xllamacpp {metadata.version('xllamacpp')} (llama.cpp {library().llama_version().decode()})"


def _incompatible(what: str) -> PocketlmError:
    return PocketlmError(
        f"xllamacpp {metadata.version('xllamacpp')} has another C interface than expected ({what}). "
        "Install the version that pocketlm was tested with: `pip install 'xllamacpp==2026.10.*'`"
    )


@cache
def binary() -> ctypes.CDLL:
    """Load the extension module, which nothing is declared of yet.

    Raises:
        PocketlmError: xllamacpp is missing, or brings none.
    """
    package = util.find_spec("xllamacpp")
    if package is None or package.origin is None:
        raise PocketlmError("The engine is not installed: `pip install xllamacpp`")
    binaries = sorted(
        path for path in Path(package.origin).parent.iterdir() if path.suffix in (".so", ".pyd", ".dylib")
    )
    if not binaries:
        raise _incompatible("it brings no extension module")
    return ctypes.CDLL(str(binaries[0]))


@cache
def library() -> ctypes.CDLL:
    """Return llama.cpp with its functions declared, once the struct layouts are proven; its log is silenced.

    Raises:
        PocketlmError: xllamacpp is missing, or its C interface is another one.
    """
    loaded = binary()
    for name, (returns, takes) in _PROTOTYPES.items():
        try:
            function = getattr(loaded, name)
        except AttributeError:
            raise _incompatible(f"`{name}` is not exported") from None
        function.restype, function.argtypes = returns, takes
    _prove_layouts(loaded)
    loaded.llama_backend_init()
    silence(loaded)
    return loaded


def silence(loaded: ctypes.CDLL) -> None:
    """Send llama.cpp's log to `take_errors`; a server started since then has taken it over."""
    loaded.llama_log_set(_keep_errors, None)


def _prove_layouts(loaded: ctypes.CDLL) -> None:
    context = loaded.llama_context_default_params()
    found = (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max)
    if found != _DOCUMENTED_CONTEXT_DEFAULTS:
        raise _incompatible(f"context defaults read {found}, not {_DOCUMENTED_CONTEXT_DEFAULTS}")
    if loaded.llama_model_default_params().devices is not None:
        raise _incompatible("model defaults do not begin with an empty device list")
    batch = loaded.llama_batch_init(3, 0, 1)
    allocated = [bool(getattr(batch, name)) for name, _ in Batch._fields_[1:]]
    # The engine allocates all but the embeddings, and ends the list of sequences with a null.
    fits = batch.n_tokens == 0 and allocated == [True, False, True, True, True, True]
    if not (fits and all(batch.seq_id[i] for i in range(3)) and not batch.seq_id[3]):
        raise _incompatible("`llama_batch` has other fields")
    loaded.llama_batch_free(batch)


CACHE_TYPES = {"f16": 1, "q8_0": 8, "q4_0": 2}  # of keys and values, with ggml's numbers


def set_cache_type(parameters: ContextParameters, name: str) -> None:
    """Let keys and values be cached as `name`, one of CACHE_TYPES.

    The two fields are found by their documented defaults: both F16, right behind the two null pointers of the
    evaluation callback, and nowhere else.

    Raises:
        PocketlmError: The fields are not where they were in every version so far.
    """
    defaults = library().llama_context_default_params()
    numbers = (c_int32 * (ctypes.sizeof(ContextParameters) // 4)).from_buffer_copy(defaults)
    pattern = [0, 0, 0, 0, CACHE_TYPES["f16"], CACHE_TYPES["f16"]]
    places = [i for i in range(4, 64) if numbers[i : i + 6] == pattern]
    if len(places) != 1:
        raise _incompatible("the cache's types are not where they were")
    fields = (c_int32 * len(numbers)).from_buffer(parameters)
    fields[places[0] + 4] = fields[places[0] + 5] = CACHE_TYPES[name]


@cache
def _formats() -> dict[str, tuple[int, int]]:
    # Asked for the name of a type that it does not have, the engine reads past its table: ask only for those
    # that it lists.
    from xllamacpp import ggml_type

    ggml, formats = library(), {}
    for kind in ggml_type:
        name = kind.name.removeprefix("GGML_TYPE_").lower()
        if name != "count" and (ggml.ggml_type_name(kind.value) or b"").decode().lower() == name:
            formats[name] = (ggml.ggml_blck_size(kind.value), ggml.ggml_type_size(kind.value))
    return formats


def decode_row(type_name: str, data: bytes, count: int) -> "Tensor":
    """Decode `count` weights with the engine's own reference decoder (`dequantize_row_*` of ggml).

    Args:
        type_name: A quantized GGUF type in any case, such as `Q4_0`, `IQ4_NL`, `Q2_K`, `MXFP4`.
        data: The bytes of whole blocks, as they lie in the file.
        count: How many weights `data` holds.

    Returns:
        The weights, float32, (count,).

    Raises:
        BadInputError: The type has no decoder, or `data` and `count` do not fit it.
    """
    name = type_name.lower()
    symbol = f"dequantize_row_{name[:-1]}K" if name.endswith("_k") else f"dequantize_row_{name}"
    if name not in _formats() or not hasattr(library(), symbol):
        raise BadInputError(f"The engine has no decoder for the number format `{type_name}`")
    block, block_bytes = _formats()[name]
    if count % block or len(data) != count // block * block_bytes:
        raise BadInputError(
            f"{len(data)} bytes do not hold {count} weights in {type_name}: "
            f"each {block} weights take {block_bytes} bytes"
        )
    import torch

    weights = np.empty(count, np.float32)
    decode = getattr(library(), symbol)
    decode.restype, decode.argtypes = None, (c_char_p, c_void_p, c_int64)
    decode(data, weights.ctypes.data, count)
    return torch.from_numpy(weights)
