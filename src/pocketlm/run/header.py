"""What a GGUF file says of itself, through llama.cpp's own reader, in milliseconds and without torch."""

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_int, c_int64, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path

from pocketlm.errors import BadInputError
from pocketlm.run import llamacpp

_UINT32 = 4  # a field's type, as GGUF numbers them: asked for a number of another, the reader ends the process


@dataclass(frozen=True, slots=True)
class Header:
    """What chat, serving and measuring depend on.

    Attributes:
        trained_context: The longest context that the model was made for, in tokens.
        chat_template: How a conversation is written for the model, in Jinja; None if the file does not say.
        pools: Whether the file says how its hidden states become one embedding.
        head_widths: Of a head's keys and of its values; 0 where the file does not say.
        positions: How many have weights of their own, as in GPT-2, beyond which the engine ends the process; 0 where
            they are computed, so that a longer context works.
    """

    trained_context: int
    chat_template: str | None
    pools: bool
    head_widths: tuple[int, int]
    positions: int


class _Parameters(ctypes.Structure):
    """`gguf_init_params`: read no tensors, make no context for them."""

    _fields_ = (("no_alloc", c_bool), ("context", POINTER(c_void_p)))


def check_is_gguf(path: Path) -> None:
    """Look at the first bytes before the engine does, whose messages are about its own code.

    Raises:
        BadInputError: `path` cannot be read or is no GGUF file.
    """
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise BadInputError(f"Cannot read {path}: {error.strerror}") from error
    if magic != b"GGUF":
        raise BadInputError(f"{path} is not a GGUF file: it does not begin with `GGUF`")


def read_header(path: Path) -> Header:
    """Read the named fields of a GGUF file.

    Raises:
        BadInputError: There is no such file, it is no GGUF file, or damaged.
    """
    check_is_gguf(path)
    llama = _reader()
    opened = llama.gguf_init_from_file(str(path).encode(), _Parameters(True, None))
    if not opened:
        raise BadInputError(f"{path} is damaged: its header cannot be read. Download or export it again")
    try:
        return _header(llama, opened)
    finally:
        llama.gguf_free(opened)


def cache_types(path: Path) -> list[str]:
    """Return how keys and values of a file can be cached, largest type first: what has blocks that divide its heads.

    Raises:
        BadInputError: As `read_header`.
    """
    widths, blocks = read_header(path).head_widths, llamacpp.library().ggml_blck_size
    return [
        name for name, number in llamacpp.CACHE_TYPES.items() if not any(width % blocks(number) for width in widths)
    ]


def check_cache(path: Path, cache: str) -> None:
    """Refuse a type of the cache of keys and values that does not fit a file.

    Raises:
        BadInputError: Its blocks do not divide the heads, or as `read_header`.
    """
    fitting = cache_types(path)
    if cache not in fitting:
        raise BadInputError(
            f"{path} cannot cache keys and values as {cache}: a block of that does not divide the width of a head. "
            f"Take {fitting[-1]}"
        )


def check_positions(path: Path, prompt: int, generate: int) -> None:
    """Refuse to read and write more tokens than a file has positions for.

    Raises:
        BadInputError: It has fewer, or as `read_header`.
    """
    positions = read_header(path).positions
    if positions and prompt + generate > positions:
        raise BadInputError(
            f"{path} has learned {positions:,} positions; a prompt of {prompt:,} and {generate:,} tokens behind it "
            "need more. Give a shorter --prompt, or a smaller --generate"
        )


def _header(llama: ctypes.CDLL, opened: int) -> Header:
    def text(key: str) -> str | None:
        place = llama.gguf_find_key(opened, key.encode())
        return llama.gguf_get_val_str(opened, place).decode("utf-8", "replace") if place >= 0 else None

    architecture = text("general.architecture") or ""

    def number(key: str) -> int:
        place = llama.gguf_find_key(opened, f"{architecture}.{key}".encode())
        stated = place >= 0 and llama.gguf_get_kv_type(opened, place) == _UINT32
        return llama.gguf_get_val_u32(opened, place) if stated else 0

    context, heads = number("context_length"), number("attention.head_count")
    width = number("embedding_length") // heads if heads else 0
    return Header(
        trained_context=context,
        chat_template=text("tokenizer.chat_template"),
        pools=llama.gguf_find_key(opened, f"{architecture}.pooling_type".encode()) >= 0,
        head_widths=(number("attention.key_length") or width, number("attention.value_length") or width),
        positions=context if llama.gguf_find_tensor(opened, b"position_embd.weight") >= 0 else 0,
    )


def _reader() -> ctypes.CDLL:
    llama = llamacpp.binary()
    for name, returns, takes in (
        ("gguf_init_from_file", c_void_p, (c_char_p, _Parameters)),
        ("gguf_free", None, (c_void_p,)),
        ("gguf_find_key", c_int64, (c_void_p, c_char_p)),
        ("gguf_find_tensor", c_int64, (c_void_p, c_char_p)),
        ("gguf_get_kv_type", c_int, (c_void_p, c_int64)),
        ("gguf_get_val_str", c_char_p, (c_void_p, c_int64)),
        ("gguf_get_val_u32", c_uint32, (c_void_p, c_int64)),
    ):
        function = getattr(llama, name)
        function.restype, function.argtypes = returns, takes
    return llama
