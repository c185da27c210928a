"""The weights of a bundle as a GPU wants them: products in the device's type, weight-only values signed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from bar_edge.runtime import weights
from bar_edge.runtime.errors import BundleError
from bar_edge.runtime.precisions import BITS, FP16, FP32
from bar_edge.runtime.weights import PendingTensor, StoredTensor

FLOATS: dict[int, Any] = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
_SMALLEST = np.float32(2.0**-24)  # that float16 has: TensorRT takes no scale of zero
_SIGN = {8: np.uint8(0x80), 4: np.uint8(0x88)}  # turns values whose zero is in the middle of the range into signed ones


def device_weights(
    tensors: Mapping[str, NDArray[Any]], precisions: Mapping[str, str], data_type: int
) -> dict[str, PendingTensor]:
    """What the graphs of `export/tensorrt_graphs.py` read, by name; each is computed when it is written.

    `tensors` and `precisions` (linear layer -> how it is stored) are those of a bundle, `data_type` is TensorProto's
    type of products. Raises BundleError for 8-bit rows with several scales; making one does if float16 cannot hold it.
    """
    made: dict[str, PendingTensor] = {}
    for name, array in tensors.items():
        layer, _, part = name.rpartition(".")
        precision = precisions.get(layer)
        if part in ("weight", "weight_fp16") and precision in (FP32, FP16):
            made[f"{layer}.weight"] = _in_type(name, array, array.shape, data_type)
        elif part.startswith("weight_blocks") and precision in BITS:
            made[f"{layer}.weight"] = _signed(array, BITS[precision])
        elif part == "block_scale" and precision in BITS:
            if BITS[precision] == 8:  # rows have one scale, which is repeated for every block
                if (array != array[:, :1]).any():
                    raise BundleError(f"{name}: 8-bit rows have a scale per block, GPUs take one a row; quantize again")
                made[f"{layer}.weight_scale"] = _as_is(array[:, 0])
            else:
                # a row of a single block is dequantized to memory at every call; as two blocks it is read as it is
                scale = np.repeat(array, 2, axis=1) if array.shape[1] == 1 else array
                made[name] = _in_type(name, np.maximum(scale, _SMALLEST), scale.shape, data_type)
        elif not part.startswith("zero_points"):
            made[name] = _as_is(array)
    return made


def write(folder: Path, pending: Mapping[str, PendingTensor]) -> dict[str, StoredTensor]:
    """Write the weights file of `folder`; returns the places."""
    header, places = weights.lay_out(pending)
    with (folder / weights.FILE_NAME).open("wb") as file:
        for _ in weights.write(file, header, places, pending):
            pass
    return places


def _as_is(array: NDArray[Any]) -> PendingTensor:
    return PendingTensor(array.dtype, array.shape, lambda: array)


def _in_type(name: str, array: NDArray[Any], shape: tuple[int, ...], data_type: int) -> PendingTensor:
    def make() -> NDArray[Any]:
        with np.errstate(over="ignore"):
            cast = np.asarray(array, dtype=np.float32).astype(FLOATS[data_type])
        if not np.isfinite(cast.astype(np.float32)).all():
            raise BundleError(f"{name}: holds values that are not finite in float16; compile with --precision bf16")
        return cast.view(np.uint16) if data_type == TensorProto.BFLOAT16 else cast

    stored = np.dtype(np.uint16) if data_type == TensorProto.BFLOAT16 else FLOATS[data_type]
    return PendingTensor(stored, shape, make)


def _signed(values: NDArray[np.uint8], bits: int) -> PendingTensor:
    """Blocks [out, blocks, bytes] -> [out, in] INT8, or [out, in / 2] with two INT4 a byte."""
    dtype = np.dtype(np.int8 if bits == 8 else np.uint8)
    return PendingTensor(
        dtype, (len(values), values[0].size), lambda: (values ^ _SIGN[bits]).reshape(len(values), -1).view(dtype)
    )
