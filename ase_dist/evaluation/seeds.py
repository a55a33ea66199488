"""The mean and spread of a score over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def mean_and_spread(values: Sequence[float | None]) -> tuple[float, float]:
    """Mean and sample standard deviation over seeds; NaN where there are too few for either."""
    known = [value for value in values if value is not None and math.isfinite(value)]
    mean = statistics.fmean(known) if known else math.nan
    return mean, statistics.stdev(known) if len(known) > 1 else math.nan
