"""What can be known before the work: whether disk and memory suffice."""

import shutil
import tempfile
from pathlib import Path

import torch

from pocketlm.errors import OutOfResourcesError
from pocketlm.measure.device import machine
from pocketlm.model.compute import forward_dtype
from pocketlm.model.language_model import LanguageModel
from pocketlm.model.source import load, weights_of
from pocketlm.pipeline.cache import cache_folder
from pocketlm.plan.budget import say_bytes

LEARNING_COPIES = 4  # float32 copies that learning keeps of a student: gradient, two moments, best checkpoint
TRAINING_COPIES = 2 + LEARNING_COPIES  # while distilling: teacher and student too
CODES_COPIES = TRAINING_COPIES + 2  # where codes learn too: latent weights and their gradient
COPIES = 3  # where nothing is trained: the original, what is made of it, and what is stored
# 16-bit copies on disk: three stages, hf/, the file, the file to compare with; a training's checkpoint, four copies in
# float32; and of each candidate its stages.
DISK_COPIES, CHECKPOINT_COPIES, CANDIDATE_COPIES = 6, 8, 3
OUT_COPIES = 2  # hf/ and the file
# Residual streams in float32 while a cut is solved: of the original and of what is cut, what both were at first, before
# a block and behind it, what is written inside it, and, where the stream becomes narrower, what is read inside it.
STREAMS = 8


def load_if_room(source: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Load a model, see `load`, where memory has room for it.

    Raises:
        OutOfResourcesError: It has not.
    """
    _check_memory(weights_of(source) * dtype.itemsize, "take a smaller model")
    return load(source, dtype)


def check_resources(
    model: LanguageModel, out: Path, trained: bool, candidates: int = 0, more: int = 0, written: int = OUT_COPIES
) -> None:
    """Refuse work that would run out of disk or memory.

    Args:
        model: The original, as it was loaded.
        out: The folder to be written.
        trained: Whether something will learn.
        candidates: How many plans are built beside the one that is taken.
        more: 16-bit copies on disk besides, of stages beyond three and of a file that is only measured.
        written: 16-bit copies in `out`.

    Raises:
        OutOfResourcesError: It would; the message says how much is missing and what helps.
    """
    check_disk(model, out, trained, candidates, more, written)
    check_memory(model, TRAINING_COPIES if trained else COPIES)


def check_disk(
    model: LanguageModel, out: Path, trained: bool, candidates: int = 0, more: int = 0, written: int = OUT_COPIES
) -> None:
    """Refuse work that would run out of disk; the arguments are those of `check_resources`.

    Raises:
        OutOfResourcesError: It would.
    """
    copies = DISK_COPIES + CHECKPOINT_COPIES * trained + CANDIDATE_COPIES * candidates + more
    copy = 2 * model.parameters
    cleaner = "run `pocketlm clean --yes`, or set POCKETLM_CACHE to another disk"
    for folder, disk, advice in (
        (cache_folder(), copies * copy, cleaner),
        (out.resolve(), written * copy, "or give a folder on another disk with -o"),
        (Path(tempfile.gettempdir()), copy, "or set TMPDIR to another disk"),  # files that are read once, one at a time
    ):
        free = shutil.disk_usage(existing(folder)).free
        if free < disk:
            raise OutOfResourcesError(
                f"{folder} has {say_bytes(free)} free, the work needs about {say_bytes(disk)}. "
                f"Free some space, {advice}"
            )


def check_memory(model: LanguageModel, copies: int, advice: str = "take a smaller model") -> None:
    """Refuse work that needs so many copies of a model's weights, one of which is loaded, where there is no room.

    Raises:
        OutOfResourcesError: There is not.
    """
    _check_memory((copies - 1) * model.network.dtype.itemsize * model.parameters, advice)


def check_learning(source: str, adapters: bool) -> None:
    """Refuse to teach a student where memory has no room for it and for what learning keeps besides.

    Args:
        source: The student; its teacher is loaded already.
        adapters: Whether small matrices beside its weights learn.

    Raises:
        OutOfResourcesError: It has not.
    """
    copies = 1 if adapters else 1 + LEARNING_COPIES
    advice = "take a smaller student" if adapters else "let --adapters learn in place of all weights"
    _check_memory(copies * 4 * weights_of(source), advice)


def check_solving(model: LanguageModel, tokens: int, channels: int = 0) -> None:
    """Refuse to re-solve what a cut leaves on more text than memory has room for.

    Args:
        model: The original.
        tokens: Of the text, all of which goes through each block before the next.
        channels: Of each FFN that stay, where what makes them is re-solved too.

    Raises:
        OutOfResourcesError: It has not; the message says how much is missing and what helps.
    """
    width = model.network.config.hidden_size
    held = 4 * STREAMS * width
    if channels:
        held += forward_dtype("cpu").itemsize * 2 * (width + channels)
    weights = (COPIES - 1) * model.network.dtype.itemsize * model.parameters
    _check_memory(weights + tokens * held, "give less text with --data, which the cut is solved on")


def _check_memory(needed: int, advice: str) -> None:
    available = machine().memory_available_bytes
    if available is not None and available < needed:
        raise OutOfResourcesError(
            f"The work needs about {say_bytes(needed)} more memory, {say_bytes(available)} are available. "
            f"Close other programs, or {advice}"
        )


def existing(folder: Path) -> Path:
    """Return a path itself, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())
