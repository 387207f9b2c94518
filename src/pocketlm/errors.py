"""What can go wrong, and the exit code that says so.

A message says what happened, why, and what to do, in one or two lines. Anything else that escapes is a defect.
"""


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
