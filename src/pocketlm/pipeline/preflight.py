"""What can be known before the work: whether disk and memory suffice."""

import shutil
import tempfile
from pathlib import Path

from pocketlm.errors import OutOfResourcesError
from pocketlm.measure.device import machine
from pocketlm.model.language_model import LanguageModel
from pocketlm.pipeline.cache import cache_folder
from pocketlm.plan.budget import say_bytes

TRAINING_COPIES = 6  # float32 copies while distilling: teacher, student, gradient, two moments, best checkpoint
COPIES = 3  # where nothing is trained: the original, what is made of it, and what is stored
# 16-bit copies on disk: three stages, hf/, the file, the file to compare with; a training's checkpoint, four copies in
# float32; and of each candidate its stages.
DISK_COPIES, CHECKPOINT_COPIES, CANDIDATE_COPIES = 6, 8, 3
OUT_COPIES = 2  # hf/ and the file


def check_resources(model: LanguageModel, out: Path, trained: bool, candidates: int = 0) -> None:
    """Refuse work that would run out of disk or memory.

    Args:
        model: The original, as it was loaded.
        out: The folder to be written.
        trained: Whether something will learn.
        candidates: How many plans are built beside the one that is taken.

    Raises:
        OutOfResourcesError: It would; the message says how much is missing and what helps.
    """
    copies = DISK_COPIES + CHECKPOINT_COPIES * trained + CANDIDATE_COPIES * candidates
    copy = 2 * model.parameters
    cleaner = "run `pocketlm clean --yes`, or set POCKETLM_CACHE to another disk"
    for folder, disk, advice in (
        (cache_folder(), copies * copy, cleaner),
        (out.resolve(), OUT_COPIES * copy, "or give a folder on another disk with -o"),
        (Path(tempfile.gettempdir()), copy, "or set TMPDIR to another disk"),  # files that are read once, one at a time
    ):
        free = shutil.disk_usage(existing(folder)).free
        if free < disk:
            raise OutOfResourcesError(
                f"{folder} has {say_bytes(free)} free, the work needs about {say_bytes(disk)}. "
                f"Free some space, {advice}"
            )
    # One copy is loaded already.
    copy = (4 if trained else model.network.dtype.itemsize) * model.parameters
    memory, available = ((TRAINING_COPIES if trained else COPIES) - 1) * copy, machine().memory_available_bytes
    if available is not None and available < memory:
        raise OutOfResourcesError(
            f"The work needs about {say_bytes(memory)} more memory, {say_bytes(available)} are available. "
            "Close other programs, or take a smaller model"
        )


def existing(folder: Path) -> Path:
    """Return a path itself, or the nearest one above it that is there."""
    return next(path for path in (folder, *folder.parents) if path.exists())
