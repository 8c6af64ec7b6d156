"""A figure and its 95% interval: of a median by order statistics, of a mean by bootstrap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CONFIDENCE = 0.95
RESAMPLES = 2000  # of a bootstrap: leaves about 50 resamples beyond each end of the interval


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95% interval, ``low <= value <= high``."""

    value: float
    low: float
    high: float

    def map(self, change: Callable[[float], float]) -> Estimate:
        """Carry value and interval through a monotone function, turning the ends if it falls."""
        low, high = sorted((change(self.low), change(self.high)))
        return Estimate(change(self.value), low, high)


def median_estimate(samples: Sequence[float]) -> Estimate:
    """Take the median and the 95% interval that its order statistics give, with no assumption.

    The number of samples below the true median is binomial with p = 1/2, so the interval from the
    k-th smallest to the k-th largest misses it with probability 2 * P(B < k). k is the largest
    that keeps this at or below 5%. Fewer than 6 samples cannot: they give their least and greatest.

    Raises:
        ValueError: there is no sample.
    """
    n = len(samples)
    if n == 0:
        raise ValueError("median_estimate: wanted at least 1 sample, got 0")
    ordered = sorted(samples)
    k, missed = 1, 2 * 0.5**n
    while k <= n // 2:
        missed += 2 * math.comb(n, k) * 0.5**n
        if missed > 1 - CONFIDENCE:
            break
        k += 1
    return Estimate(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def percentile(samples: Sequence[float], share: float) -> float:
    """The value below which ``share`` (0 to 1) of the samples lie, linear between two of them.

    Raises:
        ValueError: there is no sample.
    """
    if not samples:
        raise ValueError("percentile: wanted at least 1 sample, got 0")
    ordered = sorted(samples)
    whole, part = divmod(share * (len(ordered) - 1), 1)
    low, high = ordered[int(whole)], ordered[min(int(whole) + 1, len(ordered) - 1)]
    return low + (high - low) * part


def bootstrap_means(
    sums: torch.Tensor, counts: torch.Tensor, *, seed: int = 0, resamples: int = RESAMPLES
) -> torch.Tensor:
    """Resample units with replacement and give each resample's mean: its sums over its counts.

    Args:
        sums: ``(n_units, n_quantities)``, float64, on the CPU: each unit's total.
        counts: ``(n_units,)``, float64: how many terms each total has.
        seed: of the draws. The same units are drawn for every quantity, so that a ratio or a
            difference of two columns keeps what their errors have in common.
        resamples: how many resamples.

    Returns:
        ``(resamples, n_quantities)``, float64.
    """
    import torch

    n_units = len(counts)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n_units, (resamples, n_units), generator=generator)
    weights = torch.zeros(resamples, n_units, dtype=torch.float64)
    weights.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return (weights @ sums) / (weights @ counts)[:, None]


def percentile_estimate(value: float, resampled: torch.Tensor) -> Estimate:
    """Take the middle 95% of resampled values as the interval, widened if need be to hold value."""
    ordered = sorted(resampled.tolist())
    cut = int(len(ordered) * (1 - CONFIDENCE) / 2)
    return Estimate(value, min(value, ordered[cut]), max(value, ordered[-1 - cut]))
