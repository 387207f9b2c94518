"""A file's twin, to read much text with: the same weights in a number format that the engine is fast in.

llama.cpp has but a generic kernel for Q2_0 on x86, at a twentieth of Q4_0's speed (benchmarks/format_speed.py).
Whatever Q2_0 holds, Q4_0 holds too: its levels -1 to 2 are among -8 to 7, its fp16 scale serves two blocks of 32
weights instead of one of 64. And llama.cpp rounds activations to Q8_0 in front of both, so logits differ as those of
one file do between batches of two sizes: by the order of sums, and by the activations that this rounds the other way.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch

from pocketlm.export.gguf import Entry, write_entries
from pocketlm.model.gguf_file import GgufFile, read_bytes, read_gguf
from pocketlm.tensors.formats import FORMATS, Packed, Quantized, pack, unpack

SLOW, FAST = FORMATS["Q2_0"], FORMATS["Q4_0"]
_WRITERS_OWN = ("general.architecture", "general.alignment")


@contextmanager
def twin(path: Path) -> Iterator[Path]:
    """Give a GGUF file's twin, gone at the end; the file itself where none of its tensors is slow."""
    file = read_gguf(path)
    if all(info.type != SLOW.name for info in file.tensors.values()):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="pocketlm-") as folder:
        copy = Path(folder) / path.name
        fields = {key: value for key, value in file.fields.items() if key not in _WRITERS_OWN}
        write_entries(file.get("general.architecture"), fields, [_entry(file, name) for name in file.tensors], copy)
        yield copy


def _entry(file: GgufFile, name: str) -> Entry:
    info = file.tensors[name]
    if info.type == SLOW.name:
        return Entry(name, FAST.name, info.shape, partial(_widened, file, name))
    return Entry(name, info.type, info.shape, partial(read_bytes, file, name))


def _widened(file: GgufFile, name: str) -> np.ndarray:
    rows = torch.from_numpy(read_bytes(file, name))
    return widen(Packed(SLOW, rows, file.tensors[name].shape)).rows.numpy()


def widen(packed: Packed) -> Packed:
    """Return a Q2_0 matrix as Q4_0, which decodes to the same weights bit for bit."""
    slow = unpack(packed)
    spread = SLOW.block // FAST.block
    scales, steps = (each.repeat_interleave(spread, dim=1) for each in (slow.scales, slow.steps))
    return pack(Quantized(FAST, FAST.codes_of(SLOW.table()[slow.codes.long()]), scales, steps))
