"""Streaming statistics equal those of everything at once, in bounded memory; ranges are sensible and never zero."""

import numpy as np
import pytest

from bar_edge.calibration.observers import (
    LEVELS,
    OBSERVERS,
    InputStats,
    Stratum,
    from_arrays,
    input_range,
    to_arrays,
)
from bar_edge.runtime.errors import CalibrationError

CHANNELS = 5


def rng_of(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def some_rows(seed: int, count: int = 1000) -> np.ndarray:
    """Rows that tell where they are from: the first channel is the row's number."""
    rows = rng_of(seed).standard_normal((count, CHANNELS)).astype(np.float32)
    rows[:, 0] = np.arange(count)
    return rows


def streamed(rows: np.ndarray, seed: int, strata: int = 3) -> InputStats:
    """Statistics of rows given in pieces of random sizes, row i in stratum i % strata."""
    stats, rng = InputStats("some.layer", CHANNELS), rng_of(seed)
    cuts = np.sort(rng_of(seed + 1).choice(np.arange(1, len(rows)), size=40, replace=False))
    numbers = np.arange(len(rows))
    for piece in np.split(numbers, cuts):
        for stratum in range(strata):
            stats.add(rows[piece[piece % strata == stratum]], f"stratum {stratum}", rng)
    stats.flush(rng)
    return stats


def sampled(stats: InputStats) -> int:
    return sum(len(stratum.rows) for stratum in stats.strata.values())


# -- streaming ---------------------------------------------------------------------------------------------------------


def test_streaming_equals_all_rows_at_once():
    """However the rows are cut into pieces."""
    for seed in range(5):
        rows = some_rows(seed)
        stats = streamed(rows, seed)
        assert stats.count == len(rows)
        np.testing.assert_array_equal(stats.channel_max, np.abs(rows).max(axis=0))
        np.testing.assert_allclose(stats.mean_square, np.square(rows, dtype=np.float64).mean(axis=0), rtol=1e-6)
        counts = {name: stratum.count for name, stratum in stats.strata.items()}
        assert counts == {f"stratum {i}": len(rows[i::3]) for i in range(3)}


def test_every_sampled_row_was_seen_in_its_stratum_and_only_once():
    rows = some_rows(3)
    for name, stratum in streamed(rows, 3).strata.items():
        numbers = [int(row[0]) for row in stratum.rows]
        assert len(set(numbers)) == len(numbers)
        assert {number % 3 for number in numbers} == {int(name[-1])}
        np.testing.assert_array_equal(np.stack(stratum.rows), rows[numbers])


def test_rows_may_be_overwritten_once_they_are_given():
    """An engine writes every run into the same buffers."""
    rows, buffer, rng = some_rows(4, 200), np.empty((4, CHANNELS), dtype=np.float32), rng_of(0)
    stats = InputStats("some.layer", CHANNELS)
    for part in np.split(rows, 50):
        buffer[:] = part
        stats.add(buffer[:2], "first half", rng)
        stats.add(buffer[2:], "second half", rng)
    buffer[:] = 1e6
    stats.flush(rng)
    np.testing.assert_array_equal(stats.channel_max, np.abs(rows).max(axis=0))
    np.testing.assert_allclose(stats.mean_square, np.square(rows, dtype=np.float64).mean(axis=0), rtol=1e-6)


def test_memory_is_bounded_whatever_the_number_of_rows():
    sizes = [sampled(streamed(some_rows(5, count), 5)) for count in (1000, 4000)]
    assert sizes[0] == sizes[1] < 1000
    stats, rng = InputStats("some.layer", CHANNELS), rng_of(0)
    for _ in range(2000):  # one row at a time: what is pending must not pile up either
        stats.add(np.ones((1, CHANNELS), dtype=np.float32), "one", rng)
    assert stats.count > 1000


def test_the_reservoir_is_a_uniform_sample():
    """Early, middle and late rows are equally likely to be kept, and a row kept once is kept as it was."""
    count, capacity, repeats = 200, 20, 500
    kept, rng = np.zeros(count), rng_of(6)
    rows = np.arange(count, dtype=np.float32)[:, None]
    for _ in range(repeats):
        stratum = Stratum(capacity)
        for part in np.split(rows, 8):
            stratum.add(part, rng)
        assert len(stratum.rows) == capacity and stratum.count == count
        kept[[int(row[0]) for row in stratum.rows]] += 1
    probability = capacity / count
    deviation = np.sqrt(repeats * probability * (1 - probability))
    assert np.abs(kept - repeats * probability).max() < 5 * deviation
    by_tenth = kept.reshape(10, -1).sum(axis=1)
    assert np.abs(by_tenth - repeats * capacity / 10).max() < 5 * deviation * np.sqrt(count / 10)


def test_a_value_that_is_not_finite_is_refused_with_its_layer_and_stratum():
    rng = rng_of(0)
    for value in (np.nan, np.inf, -np.inf):
        rows = some_rows(7, 3)
        rows[1, 2] = value
        stats, late = InputStats("blocks.3.mlp.w3", CHANNELS), InputStats("blocks.3.mlp.w3", CHANNELS)
        with pytest.raises(CalibrationError, match=r"input of blocks\.3\.mlp\.w3 was NaN or infinite at tokens 2/4 co"):
            for _ in range(200):
                stats.add(rows, "tokens 2/4 conditional", rng)
        with pytest.raises(CalibrationError, match="at prefix"):
            late.add(rows, "prefix", rng)
            late.flush(rng)


def test_the_sample_holds_rows_of_every_stratum():
    rows, rng = some_rows(10, 30), rng_of(0)
    stats = InputStats("some.layer", CHANNELS)
    for name, part in (("tokens 1/4 conditional", rows[:10]), ("prefix", rows[10:20]), ("tokens 2/4", rows[20:])):
        stats.add(part, name, rng)
    stats.flush(rng)
    np.testing.assert_array_equal(stats.sample(), rows)
    np.testing.assert_array_equal(stats.channel_max, np.abs(rows).max(axis=0))


# -- ranges ------------------------------------------------------------------------------------------------------------


def squared_error(values: np.ndarray, limit: float) -> float:
    scale = limit / LEVELS
    return float(np.square(np.clip(np.rint(values / scale), -LEVELS, LEVELS) * scale - values).mean())


def ranged(values: np.ndarray, observer: str) -> float:
    return input_range(values, float(np.abs(values).max()), observer)


SAMPLES = {
    "normal": rng_of(1).standard_normal((4000, 25)),
    "Laplace": rng_of(2).laplace(size=(4000, 25)),
    "uniform": rng_of(3).uniform(-1, 1, (4000, 25)),
    "normal with an outlier": np.append(rng_of(4).standard_normal(99999), 30).reshape(4000, 25),
    "mostly zero": np.where(rng_of(5).random((4000, 25)) < 0.99, 0, rng_of(6).standard_normal((4000, 25))),
    "one value": np.full((40, 25), 0.25),
}  # fmt: skip
SAMPLES = {name: values.astype(np.float32) for name, values in SAMPLES.items()}


@pytest.mark.parametrize("observer", OBSERVERS)
def test_ranges_are_positive_grow_with_the_values_and_are_never_beyond_the_largest(observer):
    for name, values in SAMPLES.items():
        largest = float(np.abs(values).max())
        found = ranged(values, observer)
        assert 0 < found <= largest * (1 + 1e-6), name
        assert observer != "max" or found == largest
        assert ranged(values * 1024, observer) == pytest.approx(1024 * found, rel=1e-5), name


def test_no_range_is_zero_whatever_was_seen():
    for observer in OBSERVERS:
        for value in (0, 1e-12, 1e-30):
            values = np.full((10, 3), value, dtype=np.float32)
            found = ranged(values, observer)
            assert np.isfinite(found) and found > 0, (observer, value)
            assert np.isfinite(np.rint(values / (found / LEVELS))).all(), (observer, value)


def test_max_is_what_was_seen_even_where_the_sample_missed_it():
    assert input_range(SAMPLES["normal"], 77.0, "max") == 77


def test_percentile_leaves_one_value_in_ten_thousand_outside():
    for name in ("normal", "Laplace", "uniform"):
        values = SAMPLES[name]
        outside = int((np.abs(values) > ranged(values, "percentile")).sum())
        assert 5 <= outside <= 10, name  # of 100,000
    assert ranged(SAMPLES["normal with an outlier"], "percentile") < 6


def test_mse_finds_the_optimal_clipping():
    """ACIQ (arXiv 1810.05723) derives 3.92 standard deviations for 8 bits of a normal distribution."""
    assert ranged(SAMPLES["normal"], "mse") == pytest.approx(3.92, rel=0.05)
    for name, values in SAMPLES.items():
        largest, found = float(np.abs(values).max()), ranged(values, "mse")
        assert squared_error(values, found) <= squared_error(values, largest) * (1 + 1e-6), name
        others = [largest * fraction for fraction in (0.55, 0.65, 0.75, 0.85, 0.95)]
        assert squared_error(values, found) <= min(squared_error(values, limit) for limit in others) * 1.02, name


def test_entropy_keeps_a_uniform_distribution_and_clips_an_outlier():
    assert ranged(SAMPLES["uniform"], "entropy") > 0.95
    assert ranged(SAMPLES["normal with an outlier"], "entropy") < 0.6 * 30


# -- to a file and back ------------------------------------------------------------------------------------------------


def test_statistics_survive_a_round_trip_and_go_on():
    rows = some_rows(8)
    stats = streamed(rows, 8)
    again = from_arrays("some.layer", to_arrays(stats))
    assert again.count == stats.count and again.strata.keys() == stats.strata.keys()
    np.testing.assert_array_equal(again.channel_max, stats.channel_max)
    np.testing.assert_array_equal(again.mean_square, stats.mean_square)
    for name, stratum in stats.strata.items():
        assert (again.strata[name].count, again.strata[name].capacity) == (stratum.count, stratum.capacity)
        np.testing.assert_array_equal(again.strata[name].rows, stratum.rows)
    for each in (stats, again):
        rng = rng_of(0)
        each.add(rows * 2, "stratum 1", rng)
        each.flush(rng)
    np.testing.assert_array_equal(
        np.stack(again.strata["stratum 1"].rows), np.stack(stats.strata["stratum 1"].rows)
    )  # fmt: skip


def test_arrays_that_do_not_fit_together_are_refused():
    arrays = to_arrays(streamed(some_rows(9), 9))
    for what in arrays:
        with pytest.raises((KeyError, ValueError)):
            from_arrays("some.layer", {name: value for name, value in arrays.items() if name != what})
    for what in ("strata", "stratum_counts", "stratum_sizes", "rows"):
        with pytest.raises((KeyError, ValueError)):
            from_arrays("some.layer", {**arrays, what: arrays[what][:-1]})
    with pytest.raises(ValueError):
        from_arrays("some.layer", {**arrays, "rows": arrays["rows"][:, :-1]})
