"""Figures with 95% intervals: medians by order statistics, means by bootstrap."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

CONFIDENCE = 0.95
RESAMPLES = 2000  # of a bootstrap: about 50 are beyond each end of the interval


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95% interval, ``low <= value <= high``."""

    value: float
    low: float
    high: float

    def map(self, change: Callable[[float], float]) -> Estimate:
        """Apply a monotone function to value and interval; a falling one swaps the ends."""
        low, high = sorted((change(self.low), change(self.high)))
        return Estimate(change(self.value), low, high)


def median_estimate(samples: Sequence[float]) -> Estimate:
    """Return the median with its 95% interval from order statistics; no distribution is assumed.

    The number of samples below the true median is binomial with p = 1/2. So the interval from the
    k-th smallest to the k-th largest sample misses it with probability 2 * P(B < k), and k is the
    largest for which this is at most 5%. Fewer than 6 samples give their minimum and maximum.

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
    """Return the percentile at ``share`` (0 to 1), interpolated linearly between two samples.

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
    """Resample units with replacement and return each resample's mean: its sums over its counts.

    Args:
        sums: ``(n_units, n_quantities)``, float64, on the CPU: each unit's totals.
        counts: ``(n_units,)``, float64: the number of terms of each total.
        seed: of the draws. The same units are drawn for every quantity, so that the errors of
            two columns stay correlated in their ratio or difference.
        resamples: the number of resamples.

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
    """Return the middle 95% of resampled values as the interval, widened to contain ``value``."""
    ordered = sorted(resampled.tolist())
    cut = int(len(ordered) * (1 - CONFIDENCE) / 2)
    return Estimate(value, min(value, ordered[cut]), max(value, ordered[-1 - cut]))
