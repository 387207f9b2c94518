"""What a GGUF file says of itself, through llama.cpp's own reader, in milliseconds and without torch."""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import BadInputError
from pocketlm.run.engine import check_is_gguf


@dataclass(frozen=True, slots=True)
class Header:
    """What chat and serving depend on.

    Attributes:
        trained_context: The longest context that the model was made for, in tokens.
        chat_template: How a conversation is written for the model, in Jinja; None if the file does not say.
        pools: Whether the file says how its hidden states become one embedding.
    """

    trained_context: int
    chat_template: str | None
    pools: bool


class _Parameters(ctypes.Structure):
    """`gguf_init_params`: read no tensors, make no context for them."""

    _fields_ = (("no_alloc", c_bool), ("context", POINTER(c_void_p)))


def read_header(path: Path) -> Header:
    """Read the named fields of a GGUF file.

    Raises:
        BadInputError: There is no such file, it is no GGUF file, or damaged.
    """
    check_is_gguf(path)
    llama = _library()
    opened = llama.gguf_init_from_file(str(path).encode(), _Parameters(True, None))
    if not opened:
        raise BadInputError(f"{path} is damaged: its header cannot be read. Download or export it again")
    try:
        return _header(llama, opened)
    finally:
        llama.gguf_free(opened)


def _header(llama: ctypes.CDLL, opened: int) -> Header:
    def text(key: str) -> str | None:
        place = llama.gguf_find_key(opened, key.encode())
        return llama.gguf_get_val_str(opened, place).decode("utf-8", "replace") if place >= 0 else None

    architecture = text("general.architecture") or ""
    context = llama.gguf_find_key(opened, f"{architecture}.context_length".encode())
    return Header(
        trained_context=llama.gguf_get_val_u32(opened, context) if context >= 0 else 0,
        chat_template=text("tokenizer.chat_template"),
        pools=llama.gguf_find_key(opened, f"{architecture}.pooling_type".encode()) >= 0,
    )


def _library() -> ctypes.CDLL:
    import xllamacpp

    llama = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    for name, returns, takes in (
        ("gguf_init_from_file", c_void_p, (c_char_p, _Parameters)),
        ("gguf_free", None, (c_void_p,)),
        ("gguf_find_key", c_int64, (c_void_p, c_char_p)),
        ("gguf_get_val_str", c_char_p, (c_void_p, c_int64)),
        ("gguf_get_val_u32", c_uint32, (c_void_p, c_int64)),
    ):
        function = getattr(llama, name)
        function.restype, function.argtypes = returns, takes
    return llama
