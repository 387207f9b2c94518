"""The block formats of GGUF files whose blocks are 32 weights long, so that narrow models can use them.

Layouts as in ggml's `block_q4_0`, `block_q5_0`, `block_q8_0` and `block_iq4_nl`; the gguf package's decoder and
the engine's are the judges (tests/test_formats.py).
"""

import torch
from torch import Tensor

from pocketlm.tensors.formats.block import Format

# The sixteen levels of IQ4_NL, closer together near zero where most weights are.
IQ4_NL_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _pack_nibbles(codes: Tensor) -> Tensor:
    # Byte j holds weight j in its low half and weight j + 16 in its high half.
    low, high = codes.chunk(2, dim=1)
    return low | (high << 4)


def _unpack_nibbles(data: Tensor) -> Tensor:
    return torch.cat([data & 15, data >> 4], dim=1)


def _pack_five_bits(codes: Tensor) -> Tensor:
    # The fifth bits of the 32 weights first, eight to a byte, then the nibbles.
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    fifth = ((codes >> 4).reshape(-1, 4, 8) << places).sum(2, dtype=torch.uint8)
    return torch.cat([fifth, _pack_nibbles(codes & 15)], dim=1)


def _unpack_five_bits(data: Tensor) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=data.device)
    fifth = ((data[:, :4, None] >> places) & 1).reshape(-1, 32)
    return _unpack_nibbles(data[:, 4:]) | (fifth << 4)


def _pack_bytes(codes: Tensor) -> Tensor:
    # Code 0 is level -127; the file holds the level itself as a signed byte.
    return (codes.to(torch.int16) - 127).to(torch.int8).view(torch.uint8)


def _unpack_bytes(data: Tensor) -> Tensor:
    return (data.contiguous().view(torch.int8).to(torch.int16) + 127).to(torch.uint8)


Q4_0 = Format("Q4_0", 32, 18, tuple(range(-8, 8)), _pack_nibbles, _unpack_nibbles)
IQ4_NL = Format("IQ4_NL", 32, 18, IQ4_NL_LEVELS, _pack_nibbles, _unpack_nibbles)
Q5_0 = Format("Q5_0", 32, 22, tuple(range(-16, 16)), _pack_five_bits, _unpack_five_bits)
Q8_0 = Format("Q8_0", 32, 34, tuple(range(-127, 128)), _pack_bytes, _unpack_bytes)

FORMATS: dict[str, Format] = {form.name: form for form in (Q4_0, IQ4_NL, Q5_0, Q8_0)}
