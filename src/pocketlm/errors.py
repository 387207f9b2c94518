"""What can go wrong, and the exit code that says so.

A message says what happened, why, and what to do, in one or two lines. Anything else that escapes is a defect.
"""

import errno


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk is full, in the words of the system, of safetensors, or of torch."""
    said = str(error)
    full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return full or f"os error {errno.ENOSPC}" in said or ("PytorchStreamWriter" in said and "write failed" in said)


class PocketlmError(Exception):
    """An error with a message made for the person at the terminal."""

    exit_code = 1


class BadInputError(PocketlmError):
    """A path, an option, a file or a text that cannot be used as it is."""

    exit_code = 2


class ImpossibleBudgetError(PocketlmError):
    """No recipe reaches the budget; the message has the range that can be met."""

    exit_code = 3


class VerificationError(PocketlmError):
    """The exported file does not do in the engine what was predicted or asked for."""

    exit_code = 4


class OutOfResourcesError(PocketlmError):
    """Too little disk or memory for the work."""

    exit_code = 5


class MissingExtraError(PocketlmError):
    """An optional package is needed; the message has the line that installs it."""

    exit_code = 6
