"""Intervals of a median by order statistics, and of a mean by bootstrap."""

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmfast.measure.stats import (
    Estimate,
    bootstrap_means,
    median_estimate,
    percentile_estimate,
)


@pytest.mark.parametrize(
    # k: the largest with P(B < k) <= 0.025 for B ~ Binomial(n, 1/2), from printed tables
    ("n", "k"),
    [(6, 1), (8, 1), (9, 2), (10, 2), (20, 6), (25, 8), (50, 18)],
)
def test_the_interval_of_a_median_is_the_tables(n, k):
    samples = [float(i) for i in range(1, n + 1)]
    random.Random(0).shuffle(samples)
    assert median_estimate(samples) == Estimate((n + 1) / 2, k, n + 1 - k)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_few_samples_give_their_extremes(n):
    assert median_estimate([*range(n)]) == Estimate((n - 1) / 2, 0, n - 1)


def test_no_sample_is_refused():
    with pytest.raises(ValueError, match="at least 1 sample, got 0"):
        median_estimate([])


@given(st.lists(st.floats(0, 1e9), min_size=1, max_size=60))
def test_the_interval_holds_the_median(samples):
    found = median_estimate(samples)
    assert min(samples) <= found.low <= found.value <= found.high <= max(samples)


def test_the_interval_of_a_median_covers_it():
    draw = random.Random(1)
    found = [median_estimate([draw.expovariate(1) for _ in range(21)]) for _ in range(2000)]
    covered = sum(one.low <= math.log(2) <= one.high for one in found) / len(found)
    # exact coverage at n = 21 is 97.3%; four standard deviations of 2,000 draws are 1.5%
    assert 0.958 <= covered <= 0.988


def test_map_turns_the_interval_where_the_function_falls():
    assert Estimate(2.0, 1.0, 4.0).map(lambda us: 8 / us) == Estimate(4.0, 2.0, 8.0)
    assert Estimate(2.0, 1.0, 4.0).map(lambda us: 2 * us) == Estimate(4.0, 2.0, 8.0)


def test_bootstrap_is_seeded_paired_and_right_in_mean_and_spread():
    generator = torch.Generator().manual_seed(0)
    counts = torch.full((200,), 10.0, dtype=torch.float64)
    terms = torch.randn(200, 10, generator=generator, dtype=torch.float64) + 3
    sums = terms.sum(1)
    both = torch.stack([sums, 2 * sums], dim=1)
    means = bootstrap_means(both, counts, seed=4)
    assert torch.equal(means, bootstrap_means(both, counts, seed=4))
    assert not torch.equal(means, bootstrap_means(both, counts, seed=5))
    torch.testing.assert_close(means[:, 1], 2 * means[:, 0])  # the same units for both columns
    exact = float((sums / 10).std(correction=0)) / math.sqrt(200)
    # 2,000 resamples give the mean to exact / 45 and the spread to 1.6%: four of each
    assert abs(float(means[:, 0].mean() - sums.mean() / 10)) < 4 * exact / math.sqrt(2000)
    assert float(means[:, 0].std()) == pytest.approx(exact, rel=0.065)


def test_bootstrap_weighs_units_by_their_counts():
    counts = torch.tensor([1.0, 3.0], dtype=torch.float64)
    means = bootstrap_means(torch.tensor([[1.0], [9.0]]).double(), counts, seed=0)[:, 0]
    # both units, in any order: 10 / 4; one of them twice: 1 or 3
    assert set(means.tolist()) == {1.0, 2.5, 3.0}


def test_percentiles_cut_the_tails_and_hold_the_value():
    resampled = torch.arange(1000, dtype=torch.float64)
    assert percentile_estimate(500.0, resampled) == Estimate(500.0, 25.0, 974.0)
    assert percentile_estimate(-3.0, resampled) == Estimate(-3.0, -3.0, 974.0)
