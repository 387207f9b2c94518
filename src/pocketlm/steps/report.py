"""What a step did, said by the step itself."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """The record of one step.

    Attributes:
        step: Its name in recipes.
        summary: One sentence for people.
        details: Plain data for programs: scores, losses, what was left undone.
    """

    step: str
    summary: str
    details: dict[str, Any] = field(default_factory=dict)
