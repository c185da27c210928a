"""Percentiles of samples, and whether two sets of samples differ beyond their noise."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

P99_SAMPLES = 100  # fewer cannot tell the slowest hundredth
_NOISE_SAMPLES = 5  # fewer say nothing of the scatter
_RESAMPLES = 4000
_CONFIDENCE = 0.95
_LEAST_CHANGE = 0.01


def summarize(samples: Sequence[float]) -> dict[str, float | int]:
    """count, min, p50, p90, max, and p99 from 100 samples on."""
    values = np.asarray(samples, dtype=np.float64)
    p50, p90, p99 = np.percentile(values, (50, 90, 99))
    summary: dict[str, float | int] = {
        "count": len(values), "min": float(values.min()), "p50": float(p50), "p90": float(p90),
    }  # fmt: skip
    if len(values) >= P99_SAMPLES:
        summary["p99"] = float(p99)
    return {**summary, "max": float(values.max())}


@dataclass(frozen=True)
class Change:
    """The median after as a multiple of the median before, with its 95 % bootstrap interval."""

    ratio: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """The interval leaves 1 out, and the change is at least 1 %."""
        return not self.low <= 1 <= self.high and abs(self.ratio - 1) >= _LEAST_CHANGE


def change(before: Sequence[float], after: Sequence[float]) -> Change | None:
    """None with fewer than 5 samples on a side: their scatter is not known. The same samples give the same interval."""
    if min(len(before), len(after)) < _NOISE_SAMPLES:
        return None
    rng = np.random.default_rng(0)

    def medians(samples: Sequence[float]) -> np.ndarray:
        return np.median(rng.choice(np.asarray(samples), (_RESAMPLES, len(samples))), axis=1)

    ratios = medians(after) / medians(before)
    tail = 100 * (1 - _CONFIDENCE) / 2
    low, high = np.percentile(ratios, (tail, 100 - tail))
    return Change(float(np.median(after) / np.median(before)), float(low), float(high))
