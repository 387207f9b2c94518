"""Number formats: how a row of weights becomes bytes, and back, exactly as the engines decode it.

A format never knows how its codes were chosen. Rounding, GPTQ and whatever comes later all ask a format the
same three things: a scale for a block of weights, the nearest code under a scale, and the bytes.
"""

from pocketlm.tensors.formats.block import (
    Format,
    Packed,
    Quantized,
    fit_scales,
    pack,
    round_to_nearest,
    unpack,
)
from pocketlm.tensors.formats.ggml import FORMATS

__all__ = [
    "FORMATS",
    "Format",
    "Packed",
    "Quantized",
    "fit_scales",
    "pack",
    "round_to_nearest",
    "unpack",
]
