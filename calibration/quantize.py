"""Turning linear layers into integers: scales, blocks, and the smoothing strength that serves each layer best.

All functions are pure and work on one layer's arrays; `calibration/quantizer.py` applies them to a bundle.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.calibration import smoothing
from bar_edge.calibration.observers import LEVELS, InputStats, input_range
from bar_edge.runtime.errors import CalibrationError
from bar_edge.runtime.precisions import BITS, INT4_WEIGHT, INT8, INT8_WEIGHT

Floats = NDArray[np.float32]

STRENGTHS = {  # of smoothing to try; 0 means none
    INT8: (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
    INT8_WEIGHT: (0.0, 0.3, 0.5),
    INT4_WEIGHT: (0.0, 0.2, 0.35, 0.5),
}
_INT4_CLIPS = (1.0, 0.93, 0.86, 0.79)
_JUDGED_OUTPUTS = 384
_PERFECT_DB = 300.0
_MAX_BLOCK = 128


@dataclass(frozen=True)
class Choice:
    """How one layer is quantized, and what that does to its output on the calibration rows."""

    precision: str
    strength: float
    factors: Floats | None  # [in], None if not smoothed
    input_scale: float | None  # of static activations
    input_zero_point: int | None  # of asymmetric uint8 activations
    snr_db: float  # of the layer's output


def choose(
    stats: InputStats, weight: Floats, precision: str, observer: str, *, foldable: bool, asymmetric: bool = False
) -> Choice:
    """Search the smoothing strength with the least output error on the sampled rows. weight [out, in].

    Raises CalibrationError for weights that are not finite.
    """
    if not np.isfinite(weight).all():
        raise CalibrationError(f"the weights of {stats.layer} hold NaN or infinite values; the bundle is damaged")
    rows = stats.sample()
    judged = weight[:: max(1, len(weight) // _JUDGED_OUTPUTS)]  # enough to compare strengths by
    exact = rows @ judged.T
    power = float(np.square(exact, dtype=np.float64).mean())
    best: Choice | None = None
    for strength in STRENGTHS[precision] if foldable else (0.0,):
        s = smoothing.factors(stats.channel_max, weight, strength) if strength else None
        x, w = (rows, judged) if s is None else (rows / s, judged * s)
        scale = zero_point = None
        if precision == INT8:
            largest = float((stats.channel_max if s is None else stats.channel_max / s).max())
            scale, zero_point = _grid(x, input_range(x, largest, observer), asymmetric)
            x = _rounded(x, scale, zero_point)
            levels, out_scale = per_channel(w)
            w = levels.astype(np.float32) * out_scale[:, None]
        else:
            mean_square = stats.mean_square if s is None else stats.mean_square / s**2
            w = from_blocks(*to_blocks(w, BITS[precision], mean_square), BITS[precision])
        error = float(np.square(x @ w.T - exact, dtype=np.float64).mean())
        snr = min(10 * np.log10(power / max(error, 1e-30)), _PERFECT_DB) if power else _PERFECT_DB
        if best is None or snr > best.snr_db:
            best = Choice(precision, strength, s, scale, zero_point if asymmetric else None, float(snr))
    if best is None or not np.isfinite(best.snr_db):
        raise CalibrationError(f"the products of {stats.layer} overflow float32; the bundle is damaged")
    return best


def _grid(rows: Floats, limit: float, asymmetric: bool) -> tuple[float, int]:
    """Scale and zero point of uint8 activations. Symmetric ones have 128, which is signed INT8 shifted.

    The symmetric range `limit` is that of the side that reaches farther; the other keeps its proportion in the sample.
    """
    if not asymmetric:
        return limit / LEVELS, 128
    low, high = min(0.0, float(rows.min())), max(0.0, float(rows.max()))
    factor = limit / max(-low, high, 1e-12)
    scale = (high - low) * factor / 255
    return (scale, round(-low * factor / scale)) if scale else (limit / LEVELS, 128)


def _rounded(rows: Floats, scale: float, zero_point: int) -> Floats:
    levels = np.clip(np.rint(rows / np.float32(scale)) + zero_point, 0, 255)
    return np.asarray((levels - zero_point) * np.float32(scale), dtype=np.float32)


def per_channel(weight: Floats) -> tuple[NDArray[np.int8], Floats]:
    """weight [out, in] -> int8 levels [out, in] and scale [out], symmetric."""
    scale = np.maximum(np.abs(weight).max(axis=1), 1e-12) / LEVELS
    return np.rint(weight / scale[:, None]).astype(np.int8), scale.astype(np.float32)


def block_size(in_features: int) -> int:
    """The largest power of two up to 128 that divides `in_features`; below 16 no block form exists."""
    return min(_MAX_BLOCK, in_features & -in_features)


def to_blocks(weight: Floats, bits: int, mean_square: Floats) -> tuple[NDArray[np.uint8], Floats]:
    """weight [out, in] -> values [out, blocks, bytes] and scale [out, blocks].

    8-bit rows have one scale for all their blocks: TensorRT-RTX reads weights with a scale per channel as they are, and
    with one per block makes a float copy of them at every call. The scale of every 4-bit block
    is the candidate with the least squared error, weighted by the input's mean square [in]:
    what matters is the layer's output, not its weights. 4-bit values are packed two a byte, the first one low.
    """
    out, in_features = weight.shape
    block = block_size(in_features)
    blocks = weight.reshape(out, -1, block)
    importance = (mean_square + 1e-12).reshape(1, -1, block)
    zero = 1 << (bits - 1)
    largest = np.maximum(np.abs(blocks).max(axis=2), 1e-12)
    if bits == 8:
        largest = np.broadcast_to(largest.max(axis=1, keepdims=True), largest.shape)
    best_error = np.full(largest.shape, np.inf, dtype=np.float32)
    best_scale = np.empty_like(largest)
    for clip in _INT4_CLIPS if bits == 4 else (1.0,):
        scale = largest * clip / (zero - 1)
        rounded = np.clip(np.rint(blocks / scale[..., None]), -zero, zero - 1)
        error = (np.square(rounded * scale[..., None] - blocks) * importance).sum(axis=2)
        better = error < best_error
        best_error[better], best_scale[better] = error[better], scale[better]
    levels = np.clip(np.rint(blocks / best_scale[..., None]), -zero, zero - 1)
    values = (levels + zero).astype(np.uint8)
    if bits == 4:
        values = values[..., 0::2] | values[..., 1::2] << 4
    return values, best_scale.astype(np.float32)


def from_blocks(values: NDArray[np.uint8], scale: Floats, bits: int) -> Floats:
    """Inverse of `to_blocks`: [out, in]."""
    if bits == 4:
        values = np.stack((values & 15, values >> 4), axis=-1).reshape(*values.shape[:2], -1)
    levels = values.astype(np.float32) - (1 << (bits - 1))
    return np.asarray(levels * scale[..., None]).reshape(len(values), -1)


def stored(layer: str, choice: Choice, weight: Floats, mean_square: Floats) -> dict[str, NDArray[Any]]:
    """The tensors a layer is stored as (`export/linear.py`). weight [out, in], mean_square [in] are smoothed ones."""
    if choice.precision == INT8:
        levels, scale = per_channel(weight)
        zero_point = choice.input_zero_point
        return {
            **({} if zero_point is None else {f"{layer}.input_zero_point": np.array(zero_point, dtype=np.uint8)}),
            f"{layer}.weight_int8": np.ascontiguousarray(levels.T),
            f"{layer}.weight_scale": scale,
            f"{layer}.input_scale": np.array(choice.input_scale, dtype=np.float32),
        }
    bits = BITS[choice.precision]
    values, block_scale = to_blocks(weight, bits, mean_square)
    return {f"{layer}.weight_blocks{bits}": values, f"{layer}.block_scale": block_scale}


def quantizable(out_features: int, in_features: int) -> bool:
    """Layers that are large enough to matter and divide into blocks."""
    return out_features >= 64 and in_features >= 64 and block_size(in_features) >= 16
