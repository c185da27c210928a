"""`bar-edge compile --target cuda`: a bundle's weights laid out as the kernels of `runtime/engines/cuda/` read them.

Nothing depends on a GPU: kernels are compiled where they first run, for the GPU that is there, and batch sizes are
chosen there. Of a linear layer there are

    {layer}.weight_chunks [tiles, bytes] uint8    fp16, INT8, or INT4 two a byte, in the order tensor cores take them
    {layer}.weight_scale [out] float32            int8 and int8-weight
    {layer}.block_scale [out, blocks] float16     int4-weight
    {layer}.input_scale [] float32                int8
    {layer}.bias [out] float32

and all other tensors as they were. A tile is 8 outputs; a chunk of it is 512 bytes, 16 for every lane of the warp that
loads it at once. Of every 16 inputs in a chunk, lane 4g + q has 4q to 4q + 3 of output g (`products.cuh` says why).
Inputs are filled up with zeros to a multiple of 8 and to whole chunks, outputs to whole tiles, so that all weights
begin on a 64-byte boundary of the file, which is copied to the device as it is. Outputs of `w12` alternate between its
two halves: SwiGLU takes them in pairs.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from bar_edge.export.device_weights import device_weights, write
from bar_edge.export.targets import check_compilable
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import SELFTEST, Bundle, derived_provenance, publish, write_manifest
from bar_edge.runtime.engines.cuda.resident import CHUNK_BYTES, CHUNK_INPUTS, FAMILY, NAME, TILE
from bar_edge.runtime.errors import CompatibilityError
from bar_edge.runtime.inspection import engine_sentence, linear_layers
from bar_edge.runtime.precisions import FP16, FP32, INT4_WEIGHT, INT8, INT8_WEIGHT
from bar_edge.runtime.progress import Progress, silent
from bar_edge.runtime.weights import PendingTensor

_INPUT_MULTIPLE = 8
_STEP, _LANE_INPUTS = 16, 4  # inputs that a warp multiplies at once in float16, and what of them a lane has
_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # of a word: where the eight INT4 values of two steps lie
_INTEGER_MULTIPLE = 16  # of the inputs of integer layers; `quantize` keeps to it
_RATIO_LAYERS = ("lm_head.t_embedder.mlp.0", "lm_head.t_embedder.mlp.2")  # never quantized


def prepack_bundle(source: Bundle, output: Path, *, force: bool = False, progress: Progress = silent) -> Bundle:
    """Write the bundle of the engine `cuda`, fp32 or quantized layers in fp16, INT8 and INT4.

    Raises RequestError for a compiled bundle, CompatibilityError for one that only ONNX Runtime runs, BundleError for
    weights that float16 cannot hold.
    """
    check_compilable(source)
    precisions = linear_layers(weights.read_places(source.path / weights.FILE_NAME))
    precisions |= dict.fromkeys(_RATIO_LAYERS, FP32)
    tensors, layers = prepacked(weights.open_weights(source.path), precisions)
    needed = 2 * source.file_bytes(weights.FILE_NAME)
    with publish(output, needed, force=force, sources=[source.path]) as folder:
        progress("writing weights for the kernels", 0, 1)
        write(folder, tensors)
        shutil.copyfile(source.path / SELFTEST, folder / SELFTEST)
        write_manifest(
            folder, spec=source.spec, recipe=source.recipe, variant=source.variant, graphs={},
            provenance=derived_provenance(source, "numpy"),
            quantization=source.manifest.get("quantization"),
            engines={NAME: {"family": FAMILY, "precision": FP16, "layers": layers}},
            progress=progress,
        )  # fmt: skip
    return Bundle.open(output, progress)


def sentence(made: Bundle) -> str:
    """What a bundle for `cuda` is: `kernel family 2, fp16, layers int8 x96, fp16 x4, 620.1 MiB of weights`."""
    size = made.file_bytes(weights.FILE_NAME) / 2**20
    return f"{engine_sentence(made.manifest['engines'][NAME])}, {size:.1f} MiB of weights"


def prepacked(
    tensors: Mapping[str, NDArray[Any]], precisions: Mapping[str, str]
) -> tuple[dict[str, PendingTensor], dict[str, dict[str, Any]]]:
    """Tensors as they are written, and of every linear layer its `form` and `in_features` (as filled up)."""
    made = device_weights(tensors, precisions, TensorProto.FLOAT16)
    layers = {}
    for layer, precision in precisions.items():
        form = FP16 if precision == FP32 else precision
        stored = made.pop(f"{layer}.weight_int8" if form == INT8 else f"{layer}.weight")
        order = _output_order(layer, made[f"{layer}.bias"].shape[0])
        for part in ("bias", "weight_scale", "block_scale"):
            if f"{layer}.{part}" in made:
                made[f"{layer}.{part}"] = _reordered(made[f"{layer}.{part}"], order)
        in_features = stored.shape[0] if form == INT8 else stored.shape[1] * (2 if form == INT4_WEIGHT else 1)
        if form != FP16 and in_features % _INTEGER_MULTIPLE:
            raise CompatibilityError(
                f"{layer}: has {in_features} inputs in {form}, the kernels take multiples of {_INTEGER_MULTIPLE}; "
                "leave this layer in floats"
            )
        made[f"{layer}.weight_chunks"] = _chunked(stored, form, in_features, order)
        layers[layer] = {"form": form, "in_features": _up(in_features, _INPUT_MULTIPLE)}
    return made, layers


def _output_order(layer: str, outputs: int) -> NDArray[np.int64]:
    """Which output of the layer each row of its weights is."""
    order = np.arange(outputs)
    return order.reshape(2, -1).T.reshape(-1) if layer.endswith(".mlp.w12") else order


def _reordered(pending: PendingTensor, order: NDArray[np.int64]) -> PendingTensor:
    return PendingTensor(pending.dtype, pending.shape, lambda: pending.make()[order])


def _chunked(pending: PendingTensor, form: str, in_features: int, order: NDArray[np.int64]) -> PendingTensor:
    """Tiles of bytes, in whole chunks."""
    tiles, chunks = -(-len(order) // TILE), -(-in_features // CHUNK_INPUTS[form])

    def make() -> NDArray[np.uint8]:
        values = _values(pending.make(), form)[order]
        zero = 8 if form == INT4_WEIGHT else 128 if form == INT8_WEIGHT else 0
        whole = np.full((tiles * TILE, chunks * CHUNK_INPUTS[form]), zero, dtype=values.dtype)
        whole[: values.shape[0], : values.shape[1]] = values
        steps = whole.reshape(tiles, TILE, chunks, -1, _STEP // _LANE_INPUTS, _LANE_INPUTS)
        lanes = np.ascontiguousarray(steps.transpose(0, 2, 1, 4, 3, 5))  # [tiles, chunks, output, lane of it, step, 4]
        if form == INT4_WEIGHT:
            nibbles = np.empty((*lanes.shape[:4], lanes.shape[4] // 2, len(_NIBBLES)), dtype=np.uint8)
            nibbles[..., _NIBBLES] = lanes.reshape(nibbles.shape)
            lanes = nibbles[..., 0::2] | nibbles[..., 1::2] << 4
        return lanes.reshape(tiles, -1).view(np.uint8)

    return PendingTensor(np.dtype(np.uint8), (tiles, chunks * CHUNK_BYTES), make)


def _values(stored: NDArray[Any], form: str) -> NDArray[Any]:
    """Weights [out, in]: float16 and static INT8 as they are, others without a sign, their zero in the middle."""
    if form == INT4_WEIGHT:
        packed = stored.view(np.uint8)
        return np.stack((packed & 0xF, packed >> 4), axis=-1).reshape(len(packed), -1) ^ 8
    if form == INT8_WEIGHT:
        return stored.view(np.uint8) ^ 128
    return stored.T if form == INT8 else stored


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
