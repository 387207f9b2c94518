"""The I-types of GGUF files: two to three bits per weight by storing which vector of a codebook comes next.

Layouts as in ggml's ggml-common.h; the gguf package's decoder and the engine's are the judges (tests/test_formats.py).

    span   |■■■■ group ■■■■|■■■■ group ■■■■|...        weight = (d * step) * level, step odd, 4 bits: 1, 3, ..., 31
    group  |vector|vector|...                          levels: the magnitudes of 4 or 8 weights from a grid; signs apart

A step of the file is (0.5 + n) / 2 or / 4; here the factors that make it odd are in the levels.
"""

from collections.abc import Callable
from functools import partial

import gguf
import torch
from torch import Tensor

from pocketlm.tensors.formats.block import Format
from pocketlm.tensors.formats.codebook import Codebook
from pocketlm.tensors.formats.ggml import (
    fp16_bytes,
    from_fp16_bytes,
    pack_bits,
    pack_neighbours,
    pack_pairs,
    unpack_bits,
    unpack_neighbours,
    unpack_pairs,
)
from pocketlm.tensors.formats.kquants import SPAN


def _codebook(name: str, unit: float, length: int, *, even: bool) -> Codebook:
    # The grids are tables of ggml; the gguf package has them.
    source = getattr(gguf.quants, name)
    source.init_grid()
    grid = torch.from_numpy(source.grid).reshape(source.grid_shape)
    magnitudes = torch.tensor(source.grid_map, dtype=torch.float32)
    return Codebook(tuple((magnitudes * unit).tolist()), torch.searchsorted(magnitudes, grid), length, even)


def _pack_fours(steps: Tensor) -> Tensor:
    """Odd steps of 4 bits, neighbours together in a byte."""
    return pack_neighbours((steps[:, :, 0] >> 1).to(torch.uint8))


def _unpack_fours(data: Tensor) -> Tensor:
    return (2 * unpack_neighbours(data).to(torch.int16) + 1)[:, :, None]


def _to_bytes(words: Tensor, width: int) -> Tensor:
    """(blocks, n) int64 as (blocks, width n) bytes, lowest first."""
    places = 8 * torch.arange(width, device=words.device)
    return (words[:, :, None] >> places & 255).to(torch.uint8).flatten(1)


def _from_bytes(data: Tensor, width: int) -> Tensor:
    places = 8 * torch.arange(width, device=data.device)
    return (data.unflatten(1, (-1, width)).long() << places).sum(2)


def _pack_seven(negative: Tensor) -> Tensor:
    """The first seven of every eight signs as a number; the eighth follows from their parity."""
    return pack_bits(negative).long() & 127


def _unpack_seven(signs: Tensor) -> Tensor:
    seven = unpack_bits(signs.to(torch.uint8)).unflatten(1, (-1, 8))
    seven[:, :, 7] = seven[:, :, :7].sum(2) % 2
    return seven.flatten(1).bool()


# The XXS types put the signs of a group, 4 x 7 bits, and its step, 4 bits, into one 32-bit word.
def _pack_signs_and_step(negative: Tensor, steps: Tensor) -> Tensor:
    sevens = _pack_seven(negative).unflatten(1, (-1, 4)) << torch.tensor([0, 7, 14, 21])
    return sevens.sum(2) | (steps[:, :, 0].long() >> 1) << 28


def _unpack_signs_and_step(words: Tensor) -> tuple[Tensor, Tensor]:
    sevens = (words[:, :, None] >> torch.tensor([0, 7, 14, 21]) & 127).flatten(1)
    return _unpack_seven(sevens), (2 * (words >> 28) + 1).to(torch.int16)[:, :, None]


def _pack_iq2_xxs(book: Codebook, codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    index, negative = book.index(codes)
    vectors = index.to(torch.uint8).reshape(-1, 8, 4)
    words = _to_bytes(_pack_signs_and_step(negative, steps), 4).reshape(-1, 8, 4)
    return torch.cat([fp16_bytes(scales[:, :, 0]), torch.cat([vectors, words], 2).flatten(1)], 1)


def _unpack_iq2_xxs(book: Codebook, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    vectors, words = data[:, 2:].reshape(-1, 8, 8).chunk(2, dim=2)
    negative, steps = _unpack_signs_and_step(_from_bytes(words.flatten(1), 4))
    return book.codes(vectors.flatten(1).long(), negative), from_fp16_bytes(data[:, :2])[:, :, None], steps


def _pack_iq2_xs(book: Codebook, codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    index, negative = book.index(codes)
    words = _to_bytes(index | _pack_seven(negative) << 9, 2)
    return torch.cat([fp16_bytes(scales[:, :, 0]), words, _pack_fours(steps)], 1)


def _unpack_iq2_xs(book: Codebook, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    words = _from_bytes(data[:, 2:66], 2)
    codes = book.codes(words & 511, _unpack_seven(words >> 9))
    return codes, from_fp16_bytes(data[:, :2])[:, :, None], _unpack_fours(data[:, 66:])


def _pack_iq2_s(book: Codebook, codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    index, negative = book.index(codes)
    low, high = (index & 255).to(torch.uint8), (index >> 8).to(torch.uint8)
    return torch.cat([fp16_bytes(scales[:, :, 0]), low, pack_bits(negative), pack_pairs(high), _pack_fours(steps)], 1)


def _unpack_iq2_s(book: Codebook, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index = data[:, 2:34].long() | unpack_pairs(data[:, 66:74]).long() << 8
    codes = book.codes(index, unpack_bits(data[:, 34:66]).bool())
    return codes, from_fp16_bytes(data[:, :2])[:, :, None], _unpack_fours(data[:, 74:])


def _pack_iq3_xxs(book: Codebook, codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    index, negative = book.index(codes)
    words = _to_bytes(_pack_signs_and_step(negative, steps), 4)
    return torch.cat([fp16_bytes(scales[:, :, 0]), index.to(torch.uint8), words], 1)


def _unpack_iq3_xxs(book: Codebook, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    negative, steps = _unpack_signs_and_step(_from_bytes(data[:, 66:], 4))
    return book.codes(data[:, 2:66].long(), negative), from_fp16_bytes(data[:, :2])[:, :, None], steps


def _pack_iq3_s(book: Codebook, codes: Tensor, scales: Tensor, steps: Tensor) -> Tensor:
    index, negative = book.index(codes)
    low, high = (index & 255).to(torch.uint8), pack_bits(index >> 8)
    return torch.cat([fp16_bytes(scales[:, :, 0]), low, high, pack_bits(negative), _pack_fours(steps)], 1)


def _unpack_iq3_s(book: Codebook, data: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    index = data[:, 2:66].long() | unpack_bits(data[:, 66:74]).long() << 8
    codes = book.codes(index, unpack_bits(data[:, 74:106]).bool())
    return codes, from_fp16_bytes(data[:, :2])[:, :, None], _unpack_fours(data[:, 106:])


def _format(name: str, block_bytes: int, group: int, book: Codebook, pack: Callable, unpack: Callable) -> Format:
    return Format(
        name, SPAN, block_bytes, book.levels, partial(pack, book), partial(unpack, book),
        group=group, steps=tuple(range(1, 32, 2)), signed=False, codebook=book,
    )  # fmt: skip


IQ2_XXS = _format("IQ2_XXS", 66, 32, _codebook("IQ2_XXS", 0.125, 8, even=True), _pack_iq2_xxs, _unpack_iq2_xxs)
IQ2_XS = _format("IQ2_XS", 74, 16, _codebook("IQ2_XS", 0.125, 8, even=True), _pack_iq2_xs, _unpack_iq2_xs)
IQ2_S = _format("IQ2_S", 82, 16, _codebook("IQ2_S", 0.125, 8, even=False), _pack_iq2_s, _unpack_iq2_s)
IQ3_XXS = _format("IQ3_XXS", 98, 32, _codebook("IQ3_XXS", 0.25, 8, even=True), _pack_iq3_xxs, _unpack_iq3_xxs)
IQ3_S = _format("IQ3_S", 110, 32, _codebook("IQ3_S", 1.0, 4, even=False), _pack_iq3_s, _unpack_iq3_s)
