"""A measured value and how sure it is."""

import math
import statistics
from collections.abc import Sequence
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


def mean_ratio(ratios: Sequence[float]) -> Interval | None:
    """Return the geometric mean of ratios, each of one round, with Student's interval of their logarithms.

    It is sound for as few as three, and wide then: 2.5 times their deviation to each side, 1.1 by normal quantiles.

    Args:
        ratios: Above 0; None is returned of fewer than two.
    """
    if len(ratios) < 2:
        return None
    from scipy.stats import t

    logs = [math.log(ratio) for ratio in ratios]
    middle = statistics.fmean(logs)
    reach = float(t.ppf(0.975, len(logs) - 1)) * statistics.stdev(logs) / math.sqrt(len(logs))
    return Interval(math.exp(middle), math.exp(middle - reach), math.exp(middle + reach))
