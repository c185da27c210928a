"""What a checkpoint or an ONNX file is, in facts."""

from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from bar_edge.export.checkpoint import Tensors, generator_shapes, read_state_dict
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import MANIFEST
from bar_edge.runtime.errors import CheckpointError
from bar_edge.runtime.onnx_locations import external_locations
from bar_edge.runtime.spec import VARIANTS


def describe_file(path: Path) -> dict[str, Any]:
    """JSON-ready facts of a checkpoint or an ONNX graph. Raises CheckpointError."""
    if path.name == weights.FILE_NAME and (path.parent / MANIFEST).exists():
        raise CheckpointError(f"{path}: holds the weights of a bundle; inspect its folder, {path.parent}")
    return _describe_onnx(path) if path.suffix == ".onnx" else _describe_checkpoint(path)


def _describe_checkpoint(path: Path) -> dict[str, Any]:
    tensors = read_state_dict(path)
    kind = "generator" if "cls_token" in tensors else "tokenizer" if "quantize.out_proj.weight" in tensors else None
    if kind is None:
        raise CheckpointError(f"{path}: holds {len(tensors)} tensors, but neither a BAR generator nor a BAR tokenizer")
    parameters = sum(t.numel() for name, t in tensors.items() if ".rope.freqs_" not in name)
    return {
        "kind": f"{kind} checkpoint",
        "variant": _variant(tensors) if kind == "generator" else None,
        "parameters": parameters,
        "tensors": len(tensors),
        "dtypes": dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors.values())),
        "file_bytes": path.stat().st_size,
        "shapes": {name: list(t.shape) for name, t in tensors.items()},
    }


def _variant(tensors: Tensors) -> str | None:
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return next((name for name, known in VARIANTS.items() if generator_shapes(known.spec) == shapes), None)


def _describe_onnx(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
        locations = external_locations(data)
        model = onnx.load_model_from_string(data)
    except Exception as error:
        raise CheckpointError(f"{path}: not a readable ONNX graph ({error})") from error
    graph = model.graph
    return {
        "kind": "ONNX graph",
        "name": graph.name,
        "opsets": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": {value.name: _type(value) for value in graph.input},
        "outputs": {value.name: _type(value) for value in graph.output},
        "operators": dict(Counter(node.op_type for node in graph.node).most_common()),
        "initializers": dict(Counter(onnx.TensorProto.DataType.Name(t.data_type) for t in graph.initializer)),
        "external_data": sorted(locations),
        "file_bytes": len(data),
    }


def _type(value: onnx.ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    dims = [d.dim_param or str(d.dim_value) for d in tensor.shape.dim]
    return f"{onnx.TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(dims)}]"
