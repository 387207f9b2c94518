"""A measured value and how sure it is."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval; of a difference, the interval of the difference."""

    value: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether all three are numbers: not those of a broken model, nor what JSON made of them."""
        return all(end is not None and math.isfinite(end) for end in (self.value, self.low, self.high))


def wilson(hits: int, count: int) -> Interval:
    """Return a share with its Wilson interval (Wilson 1927)."""
    from scipy.stats import binomtest

    ends = binomtest(hits, count).proportion_ci(0.95, "wilson")
    return Interval(hits / count, float(ends.low), float(ends.high))
