"""The mean and spread of a score over seeds, and the difference of two rows paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean difference over ``pairs`` seeds and its confidence interval; NaN where there are too few pairs for one."""

    mean: float
    low: float
    high: float
    pairs: int

    @property
    def is_none(self) -> bool:
        """Whether the interval holds 0, or there is none: then no difference has been shown."""
        return not (self.low > 0 or self.high < 0)


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; NaN where there are too few for either."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan


def paired_difference(scores: Mapping[int, float | None], reference: Mapping[int, float | None]) -> Difference:
    """Scores minus those of the reference of the same seed, with Student's interval of ``CONFIDENCE`` for the mean.

    Pairs of which a score is missing or not finite are left out. The interval is mean +- t * s / sqrt(n), t the
    quantile of n - 1 degrees of freedom and s the sample standard deviation of the differences.
    """
    both = [(scores[seed], reference[seed]) for seed in scores if seed in reference]
    known = [a - b for a, b in both if a is not None and b is not None and math.isfinite(a - b)]
    mean, spread = mean_and_spread(known)
    half = (
        float(stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1)) * spread / math.sqrt(len(known)) if known else math.nan
    )
    return Difference(mean, mean - half, mean + half, len(known))
