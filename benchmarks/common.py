"""What the benchmarks share."""

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pocketlm.errors import BadInputError
from pocketlm.model.text import pack_windows, read_corpus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def command_line() -> str:
    """Return the command that is running, with the names of files instead of where they lie on this machine."""
    return re.sub(r"(?<=[\s='])/[^\s=']*/", "", shlex.join(["python", *sys.argv]))


def windows_in_turn(paths: list[Path], tokenizer: "PreTrainedTokenizerFast", count: int, length: int) -> Tensor:
    """Return (windows, length) ids, the first window of each file, then the second of each: as many of every file.

    Raises:
        BadInputError: A file has too few.
    """
    each = -(-count // len(paths))
    parts = [pack_windows(read_corpus([path]).documents, tokenizer, each, length) for path in paths]
    for path, part in zip(paths, parts, strict=True):
        if len(part) < each:
            raise BadInputError(f"{path} has {len(part)} windows of {length} tokens, {each} are wanted")
    return torch.stack(parts, dim=1).flatten(0, 1)[:count]


def write_results(out: Path, lines: list[str], rows: list[dict] | dict) -> None:
    """Write a page as Markdown and its figures as JSON beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("\n".join([*lines, ""]))
    out.with_suffix(".json").write_text(json.dumps(rows, indent=1))
