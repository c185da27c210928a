"""Percentiles, and what counts as a change."""

import numpy as np
import pytest

from bar_edge.benchmarks.figures import change, summarize


def test_percentiles_of_a_known_row():
    found = summarize([float(x) for x in range(101)])
    assert found == {"count": 101, "min": 0, "p50": 50, "p90": 90, "p99": 99, "max": 100}


@pytest.mark.parametrize(("count", "has"), [(99, False), (100, True)])
def test_p99_takes_a_hundred_samples(count, has):
    assert ("p99" in summarize([1.0] * count)) is has


def test_a_shift_beyond_the_scatter_is_a_change():
    rng = np.random.default_rng(1)
    before, after = 1 + 0.02 * rng.standard_normal(30), 1.1 + 0.02 * rng.standard_normal(30)
    found = change(before, after)
    assert found.beyond_noise
    assert found.low < 1.1 < found.high
    assert not change(before, before + 0.001).beyond_noise


def test_a_shift_within_the_scatter_is_none():
    rng = np.random.default_rng(2)
    before, after = 1 + 0.3 * rng.random(20), 1.02 + 0.3 * rng.random(20)
    assert not change(before, after).beyond_noise


def test_a_change_below_one_percent_does_not_count_however_certain():
    assert not change([1.0] * 10, [1.005] * 10).beyond_noise
    assert change([1.0] * 10, [1.02] * 10).beyond_noise


def test_the_interval_of_a_median_is_the_95_percent_one():
    """Of 101 even samples: by the binomial distribution, ranks 41 to 61 hold the median 95 % of the time."""
    found = change([1.0] * 101, 1 + np.arange(101) / 100)
    assert (found.ratio, found.low, found.high) == pytest.approx((1.5, 1.4, 1.6), abs=0.005)


def test_the_change_is_that_of_the_medians():
    assert change([1.0, 1.0, 1.0, 1.0, 7.0], [2.0, 2.0, 2.0, 90.0, 2.0]).ratio == 2


def test_few_samples_say_nothing():
    assert change([1.0] * 4, [2.0] * 50) is None and change([1.0] * 50, [2.0] * 4) is None
    assert change([1.0] * 5, [2.0] * 5) is not None
