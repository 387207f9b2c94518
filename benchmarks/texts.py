"""Text that benchmarks solve and measure on; apart from `common`, which some import without needing torch."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.model.text import pack_windows, read_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def windows_in_turn(paths: list[Path], tokenizer: "PreTrainedTokenizerFast", count: int, length: int) -> Tensor:
    """Return (count, length) ids, the first window of each file, then the second of each: as many of every file.

    Raises:
        BadInputError: A file has too few.
    """
    each = -(-count // len(paths))
    parts = [pack_windows(read_corpus([path]).documents, tokenizer, each, length) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if len(part) < each:
            raise BadInputError(f"{path} has {len(part)} windows of {length} tokens, {each} are wanted")
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]
