"""A bundle with 8-bit weights made without calibration, to time random weights by.

`bar-edge quantize` follows a model's own trajectories; those of random weights mean nothing and take minutes. Trunk and
head become `int8-weight`, which only rounds weights and needs no calibration. Modulation and decoder, of which
`quantize` makes static INT8 from what they saw, stay floats.
"""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bar_edge.calibration.probe import linear_layers
from bar_edge.calibration.quantize import quantizable, to_blocks
from bar_edge.calibration.quantizer import write_weights
from bar_edge.export.graphs import build_graphs
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import SELFTEST, Bundle, derived_provenance, publish, write_manifest
from bar_edge.runtime.precisions import INT8_WEIGHT
from bar_edge.runtime.progress import silent

_BITS, _ZERO_POINT = 8, 0x80


def eight_bit(source: Bundle, output: Path) -> Bundle:
    """Round the weights of an fp32 bundle's trunk and head. Its self-test stays the one of fp32."""
    places = weights.read_places(source.path / weights.FILE_NAME)
    layers = linear_layers(source.spec, places)
    rounded = [layer for layer in (*layers["trunk"], *layers["head"]) if quantizable(*places[f"{layer}.weight"].shape)]
    held: dict[str, NDArray[Any]] = dict(weights.open_weights(source.path))
    scales = 0
    for layer in rounded:
        weight = np.asarray(held.pop(f"{layer}.weight"))
        values, scale = to_blocks(weight, _BITS, np.ones(weight.shape[1], dtype=np.float32))
        held |= {f"{layer}.weight_blocks{_BITS}": values, f"{layer}.block_scale": scale}
        scales = max(scales, scale.size)
    held[f"zero_points{_BITS}"] = np.full(scales, _ZERO_POINT, dtype=np.uint8)
    precisions = dict.fromkeys(rounded, INT8_WEIGHT)
    with publish(output, sum(array.nbytes for array in held.values()), force=False) as folder:
        graphs = build_graphs(source.spec, write_weights(folder, held, silent), precisions)
        for name, model in graphs.items():
            onnx.save(model, folder / f"{name}.onnx")
        shutil.copyfile(source.path / SELFTEST, folder / SELFTEST)
        write_manifest(
            folder, spec=source.spec, recipe=source.recipe, variant=source.variant,
            graphs={name: {"file": f"{name}.onnx", "precision": INT8_WEIGHT} for name in graphs},
            provenance=derived_provenance(source, "onnx", "numpy"),
            quantization={"precision": INT8_WEIGHT, "layers": {layer: {"precision": INT8_WEIGHT} for layer in rounded}},
        )  # fmt: skip
    return Bundle.open(output)
