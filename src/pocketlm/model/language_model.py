"""A language model as the toolkit carries it: network, tokenizer, and where both came from."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from pocketlm.model.card import write_card

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

NOTICES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")  # files that a licence may want beside the weights


@dataclass(frozen=True)
class Origin:
    """Where a model came from, so that every output can say so."""

    source: str  # what the person typed: a folder, a hub id, a GGUF file or `demo`
    kind: str  # "folder", "hub" or "gguf" (`demo` is a GGUF file)
    path: Path  # the folder or the file on disk
    sha256: str  # of the weight file, or of the list of the weight files' hashes
    key: str  # hash of all that results depend on: weights, their type in memory, config, tokenizer, license, name
    license: str | None  # SPDX-like id as the source states it, None where it states nothing
    base_model: str  # the name under which people know it
    file_bytes: int  # bytes of the weights on disk


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model. Steps take ownership of `network`; the tokenizer never changes in place."""

    network: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    origin: Origin

    @property
    def family(self) -> str:
        """The transformers model type, such as `llama` or `qwen3`."""
        return self.network.config.model_type

    @property
    def is_chat(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return bool(self.tokenizer.chat_template)

    @property
    def parameters(self) -> int:
        """How many weights the network has; tied ones count once."""
        return sum(parameter.numel() for parameter in self.network.parameters())


def save(model: LanguageModel, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write `model` as a plain Hugging Face folder that `from_pretrained` loads, weights as `dtype`.

    Args:
        model: Left as it is.
        folder: Made if missing.
        dtype: A 16-bit type for outputs.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    network = copy.deepcopy(model.network).to(dtype)  # a cast in place would change what the caller goes on with
    network.config.dtype = dtype
    network.save_pretrained(folder)
    save_company(model, folder)


def save_company(model: LanguageModel, folder: Path) -> None:
    """Write into `folder` what goes with the weights: the tokenizer, and the source's name, license and its texts."""
    model.tokenizer.save_pretrained(folder)
    write_card(folder, model.origin.license, model.origin.base_model)
    copy_notices(model.origin, folder)


def copy_notices(origin: Origin, folder: Path) -> None:
    """Copy into `folder` what a model's folder has of licences and notices, which go where its weights go."""
    if origin.path.is_dir():
        for notice in sorted(file for pattern in NOTICES for file in origin.path.glob(pattern)):
            shutil.copy(notice, folder / notice.name)
