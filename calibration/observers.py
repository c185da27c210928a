"""From what a layer saw to the range it is quantized over.

`InputStats` streams: whatever the number of images it keeps, per stratum (position, pass, guidance branch), a bounded
uniform sample of rows, and exactly, per channel, the largest magnitude and the mean square. `input_range` turns values
into a symmetric range by one of four observers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.errors import CalibrationError

Floats = NDArray[np.float32]

LEVELS = 127  # symmetric int8: -127..127
PERCENTILE = 99.99
_FLUSH_ROWS = 256
_ROWS = 48  # sampled per stratum
_CAPACITY = {"positions": 384, "cells": 384}  # layers with a single stratum
_KL_BINS, _MSE_STEPS = 2048, 40


@dataclass
class Stratum:
    """A uniform sample of the rows of one stratum, and how many there were."""

    capacity: int
    rows: list[Floats] = field(default_factory=list)
    count: int = 0

    def add(self, rows: Floats, rng: np.random.Generator) -> None:
        """Reservoir sampling (algorithm R)."""
        for row in rows:
            self.count += 1
            if len(self.rows) < self.capacity:
                self.rows.append(row.copy())
            elif (slot := int(rng.integers(self.count))) < self.capacity:
                self.rows[slot] = row.copy()


class InputStats:
    """Streaming statistics of the input [M, in] of one linear layer."""

    def __init__(self, layer: str, channels: int) -> None:
        self.layer = layer
        self.channel_max: Floats = np.zeros(channels, dtype=np.float32)
        self.channel_square: NDArray[np.float64] = np.zeros(channels)
        self.count = 0
        self.strata: dict[str, Stratum] = {}
        self._pending: dict[str, list[Floats]] = {}
        self._pending_rows = 0

    def add(self, rows: Floats, stratum: str, rng: np.random.Generator) -> None:
        """Take rows [M, in] of one stratum. Raises CalibrationError for values that are not finite."""
        self._pending.setdefault(stratum, []).append(rows.copy())  # the caller's buffer is written over by the next run
        self._pending_rows += len(rows)
        if self._pending_rows >= _FLUSH_ROWS:
            self.flush(rng)

    def flush(self, rng: np.random.Generator) -> None:
        """Take in what is still pending."""
        for stratum, parts in self._pending.items():
            rows = np.concatenate(parts)
            if not np.isfinite(rows).all():
                raise CalibrationError(
                    f"the input of {self.layer} was NaN or infinite at {stratum}: the bundle is damaged or its model "
                    "overflows; run `bar-edge verify` on it"
                )
            np.maximum(self.channel_max, np.abs(rows).max(axis=0), out=self.channel_max)
            self.channel_square += np.square(rows, dtype=np.float64).sum(axis=0)
            self.count += len(rows)
            self.strata.setdefault(stratum, Stratum(_CAPACITY.get(stratum, _ROWS))).add(rows, rng)
        self._pending.clear()
        self._pending_rows = 0

    def sample(self) -> Floats:
        """All sampled rows [R, in]."""
        return np.stack([row for stratum in self.strata.values() for row in stratum.rows])

    @property
    def mean_square(self) -> Floats:
        """[in]"""
        return np.asarray(self.channel_square / max(1, self.count), dtype=np.float32)


def _maximum(values: Floats, largest: float) -> float:
    return largest


def _percentile(values: Floats, largest: float) -> float:
    return float(np.percentile(np.abs(values), PERCENTILE))


def _mse(values: Floats, largest: float) -> float:
    """The clipping range with the least mean squared error of rounding and clipping."""
    values = np.abs(values.ravel())

    def error(limit: float) -> float:
        scale = limit / LEVELS
        return float(np.square(np.minimum(np.rint(values / scale), LEVELS) * scale - values).mean())

    return min((largest * (1 - 0.5 * i / _MSE_STEPS) for i in range(_MSE_STEPS)), key=error)


def _entropy(values: Floats, largest: float) -> float:
    """The clipping range whose quantized histogram has the least KL divergence from the full one."""
    counts, _ = np.histogram(np.abs(values), bins=_KL_BINS, range=(0, largest))
    best, best_divergence = largest, np.inf
    for bins in range(_KL_BINS // 2, _KL_BINS + 1, 16):
        clipped = counts[:bins].astype(np.float64)
        clipped[-1] += counts[bins:].sum()
        groups = np.array_split(np.arange(bins), LEVELS + 1)
        spread = np.concatenate([
            np.where(counts[g] > 0, counts[g].sum() / max(1, (counts[g] > 0).sum()), 0.0) for g in groups
        ])  # fmt: skip
        p, q = clipped / clipped.sum(), spread / max(1e-12, spread.sum())
        mask = p > 0
        divergence = float((p[mask] * np.log(p[mask] / np.maximum(q[mask], 1e-12))).sum())
        if divergence < best_divergence:
            best, best_divergence = largest * bins / _KL_BINS, divergence
    return best


OBSERVERS: dict[str, Callable[[Floats, float], float]] = {
    "max": _maximum,
    "percentile": _percentile,
    "mse": _mse,
    "entropy": _entropy,
}


def input_range(values: Floats, largest: float, observer: str) -> float:
    """The symmetric range of a layer's input, never zero: values [R, in] are a sample, `largest` its true limit."""
    return max(OBSERVERS[observer](values, largest), 1e-8) if largest > 0 else 1.0


def to_arrays(stats: InputStats) -> dict[str, NDArray[Any]]:
    """What `from_arrays` reads back."""
    names = sorted(stats.strata)
    return {
        "channel_max": stats.channel_max,
        "channel_square": stats.channel_square,
        "count": np.int64(stats.count),
        "strata": np.array(names),
        "stratum_counts": np.array([stats.strata[name].count for name in names]),
        "stratum_sizes": np.array([len(stats.strata[name].rows) for name in names]),
        "rows": np.concatenate([np.stack(stats.strata[name].rows) for name in names]),
    }  # type: ignore[dict-item]


def from_arrays(layer: str, arrays: dict[str, NDArray[Any]]) -> InputStats:
    """Inverse of `to_arrays`. Raises KeyError or ValueError for arrays that do not fit together or are not finite."""
    stats = InputStats(layer, len(arrays["channel_max"]))
    sizes, rows = arrays["stratum_sizes"], arrays["rows"]
    if rows.shape != (int(sizes.sum()), len(stats.channel_max)) or arrays["channel_square"].shape != rows.shape[1:]:
        raise ValueError(f"the arrays of {layer} do not fit together")
    if not all(np.isfinite(arrays[name]).all() for name in ("channel_max", "channel_square", "rows")):
        raise ValueError(f"the arrays of {layer} are not finite")
    stats.channel_max[:] = arrays["channel_max"]
    stats.channel_square[:] = arrays["channel_square"]
    stats.count = int(arrays["count"])
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    for name, count, part in zip(arrays["strata"], arrays["stratum_counts"], parts, strict=True):
        stats.strata[str(name)] = Stratum(_CAPACITY.get(str(name), _ROWS), list(part), int(count))
    return stats
