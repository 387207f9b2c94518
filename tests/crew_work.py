"""What processes that work together do in tests: in a module that another process finds too."""

import importlib
import os

from pocketlm.errors import OutOfResourcesError, PocketlmError
from pocketlm.model.crew import Crew


def fails(crew: Crew, who: int, how: str) -> None:
    """Fail in one process, in which it also costs the others theirs."""
    if who == crew.rank:
        if how == "killed":
            os._exit(3)
        raise OutOfResourcesError("no memory") if how == "memory" else RuntimeError("a defect")
    crew.average([], 1.0, 1.0)


def refuses(crew: Crew) -> None:
    crew.average([], 1.0, 1.0)
    raise PocketlmError("what every process finds")


def refuses_with(crew: Crew, given: object) -> None:
    crew.average([], 1.0, 1.0)


class Missing:
    """What another process cannot make again."""

    def __reduce__(self) -> tuple:
        return importlib.import_module, ("nowhere",)
