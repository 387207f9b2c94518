"""Number formats: how a row of weights becomes bytes, and back, exactly as the engines decode it.

A format never knows how its codes were chosen. Rounding, GPTQ and whatever comes later all ask a format the
same three things: scales for a span of weights, the nearest code under them, and the bytes.
"""

import copyreg

from pocketlm.tensors.formats import ggml, integer, iquants, kquants
from pocketlm.tensors.formats.block import Format, Packed, Quantized, effective, inverse_scale, pack, unpack
from pocketlm.tensors.formats.fit import fit_scales, fit_steps, ratios, round_to_nearest

FORMATS: dict[str, Format] = {
    form.name: form
    for form in (
        ggml.Q1_0,
        ggml.TQ1_0,
        ggml.TQ2_0,
        iquants.IQ2_XXS,
        ggml.Q2_0,
        iquants.IQ2_XS,
        iquants.IQ2_S,
        kquants.Q2_K,
        iquants.IQ3_XXS,
        iquants.IQ3_S,
        kquants.Q3_K,
        ggml.MXFP4,
        kquants.IQ4_XS,
        ggml.NVFP4,
        ggml.Q4_0,
        ggml.IQ4_NL,
        kquants.Q4_K,
        ggml.Q4_1,
        ggml.Q5_0,
        kquants.Q5_K,
        ggml.Q5_1,
        kquants.Q6_K,
        ggml.Q8_0,
    )
}
"""The formats of GGUF files, by their names there."""


def is_known(name: str) -> bool:
    """Whether there is a format of this name, of GGUF or of compressed-tensors."""
    return name in FORMATS or name in integer.NAMES


def find_format(name: str, columns: int) -> Format:
    """Return a format by its name, for rows of `columns` weights.

    Raises:
        BadInputError: There is none, or its groups do not divide the rows.
    """
    return FORMATS[name] if name in FORMATS else integer.integer_format(name, columns)


# A process gives another one a format by its name: what it is made of are functions without one. Where rows matter, in
# integer formats, a block is a row.
copyreg.pickle(Format, lambda form: (find_format, (form.name, form.block)))

__all__ = [
    "FORMATS",
    "Format",
    "Packed",
    "Quantized",
    "effective",
    "find_format",
    "fit_scales",
    "fit_steps",
    "inverse_scale",
    "is_known",
    "pack",
    "ratios",
    "round_to_nearest",
    "unpack",
]
