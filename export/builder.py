"""A thin layer over `onnx.helper` for writing graphs node by node.

Graphs are written rather than traced: every node is there because it was measured, initializers keep checkpoint
names, and no weight is touched (initializers are external data that point into `weights.safetensors`).
"""

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from bar_edge.runtime.weights import FILE_NAME, StoredTensor

OPSET = 24
PORTABLE_OPSET = 20  # what TensorRT 10.3 reads
BLOCKS_OPSET = 21  # the first with blocks in DequantizeLinear
IR_VERSION = 11
MICROSOFT = "com.microsoft"
_TYPES = {
    np.dtype(np.float32): TensorProto.FLOAT,
    np.dtype(np.float16): TensorProto.FLOAT16,
    np.dtype(np.int64): TensorProto.INT64,
    np.dtype(np.int32): TensorProto.INT32,
    np.dtype(np.int8): TensorProto.INT8,
    np.dtype(np.uint8): TensorProto.UINT8,
    np.dtype(np.uint16): TensorProto.BFLOAT16,  # bits of bfloat16, which numpy does not have
    np.dtype(np.bool_): TensorProto.BOOL,
}
Shape = Sequence[int | str]


@dataclass(frozen=True)
class DeviceForm:
    """How graphs are written that are compiled for a GPU (`export/tensorrt_graphs.py`)."""

    dtype: int  # TensorProto.FLOAT, FLOAT16 or BFLOAT16: products, attention and caches; the rest is fp32
    in_place: bool  # TensorScatter (opset 24) updates the caches; else new keys and values are an output (opset 20)


class GraphBuilder:
    """Collects the nodes, initializers, inputs and outputs of one graph. Values are referred to by name."""

    def __init__(
        self,
        weights: Mapping[str, StoredTensor],
        precisions: Mapping[str, str] | None = None,
        *,
        onnxruntime: bool = False,
        device: DeviceForm | None = None,
        parent: "GraphBuilder | None" = None,
    ) -> None:
        """`precisions`: linear layers that are not fp32; `onnxruntime` allows that runtime's operators."""
        self.onnxruntime = onnxruntime
        self.device = device
        self.precisions = precisions or {}
        self.linear_inputs: list[tuple[str, str]] = []  # (layer, value) of every linear layer, for probes
        self._weights = weights
        self._parent = parent
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._count = 0
        self._domains = {""}

    @property
    def native(self) -> bool:
        """Whether operators newer than opset 20 may be used; in TensorRT-RTX they take two kernels less per block."""
        return self.device is None or self.device.in_place

    def subgraph(self) -> "GraphBuilder":
        """A builder for the body of a control-flow node; weights and constants go to the outermost graph."""
        return GraphBuilder(self._weights, self.precisions, onnxruntime=self.onnxruntime, parent=self)

    def op(
        self, op_type: str, *inputs: str, name: str = "", domain: str = "", outputs: int = 1, **attributes: Any
    ) -> Any:
        """Add a node. Returns the name of its output, or a list of names if `outputs` > 1.

        `name` names the (first) output; without it one is made from the operator and a counter.
        """
        first = name or self._root()._fresh(op_type)
        results = [first] + [f"{first}.{i}" for i in range(1, outputs)]
        self._append(helper.make_node(op_type, inputs, results, name=first, domain=domain, **attributes), domain)
        return results[0] if outputs == 1 else results

    def node(
        self, op_type: str, inputs: Sequence[str], outputs: Sequence[str], *, domain: str = "", **attributes: Any
    ) -> None:
        """Add a node whose outputs are all named by the caller; "" leaves an optional one out."""
        name = next(output for output in outputs if output)
        self._append(helper.make_node(op_type, inputs, outputs, name=name, domain=domain, **attributes), domain)

    def has(self, name: str) -> bool:
        """Whether the weights file holds a tensor of that name."""
        return name in self._weights

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the weights file."""
        return self._weights[name].shape

    def weight(self, name: str) -> str:
        """The initializer of that name in the weights file."""
        place = self._weights[name]
        return self.view(name, name, _TYPES[place.dtype], place.shape)

    def view(self, name: str, source: str, data_type: int, dims: Sequence[int]) -> str:
        """An initializer that reads the beginning of the stored tensor `source` as another type or shape."""
        root = self._root()
        if name not in root._initializers:
            place = self._weights[source]
            bits = 4 if data_type in (TensorProto.INT4, TensorProto.UINT4) else 8 * place.dtype.itemsize
            length = -(-math.prod(dims) * bits // 8)
            tensor = TensorProto(name=name, data_type=data_type, dims=dims)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", FILE_NAME), ("offset", place.offset), ("length", length)):
                tensor.external_data.add(key=key, value=str(value))
            root._initializers[name] = tensor
        return name

    def constant(self, value: Any, dtype: Any, name: str = "") -> str:
        """A small constant inside the graph file; equal constants are shared."""
        root = self._root()
        array = np.asarray(value, dtype=dtype)
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        name = name or f"const_{array.dtype.name}_{'x'.join(map(str, array.shape))}_{digest}"
        if name not in root._initializers:
            root._initializers[name] = numpy_helper.from_array(array, name)
        return name

    def input(self, name: str, dtype: Any, shape: Shape, doc: str = "") -> str:
        """Declare a graph input; strings in `shape` are symbolic dimensions."""
        self._inputs.append(helper.make_tensor_value_info(name, _data_type(dtype), shape, doc))
        return name

    def output(self, name: str, dtype: Any, shape: Shape, doc: str = "") -> None:
        """Declare a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, _data_type(dtype), shape, doc))

    def graph(self, name: str, doc: str = "") -> onnx.GraphProto:
        """The finished graph."""
        return helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, list(self._initializers.values()), doc_string=doc
        )

    def model(self, name: str, doc: str) -> onnx.ModelProto:
        """The finished model."""
        opset = OPSET
        if not self.native:
            blocks = any(attribute.name == "block_size" for node in self._nodes for attribute in node.attribute)
            opset = BLOCKS_OPSET if blocks else PORTABLE_OPSET
        opsets = [helper.make_opsetid("", opset)]
        if MICROSOFT in self._domains:
            opsets.append(helper.make_opsetid(MICROSOFT, 1))
        return helper.make_model(
            self.graph(name, doc), opset_imports=opsets, ir_version=IR_VERSION, producer_name="bar-edge"
        )

    def cast(self, x: str, data_type: int) -> str:
        """x as another type."""
        return str(self.op("Cast", x, to=data_type))

    @property
    def device_type(self) -> int:
        """TensorProto's number of the type of products and caches."""
        return TensorProto.FLOAT if self.device is None else self.device.dtype

    def to_device(self, x: str) -> str:
        """fp32 x in the type of products and caches."""
        return x if self.device_type == TensorProto.FLOAT else self.cast(x, self.device_type)

    def from_device(self, x: str) -> str:
        """x, of the type of products and caches, in fp32."""
        return x if self.device_type == TensorProto.FLOAT else self.cast(x, TensorProto.FLOAT)

    def type_of(self, name: str) -> int:
        """TensorProto's number of the type of a tensor in the weights file."""
        return _TYPES[self._weights[name].dtype]

    def _root(self) -> "GraphBuilder":
        return self if self._parent is None else self._parent._root()

    def _append(self, node: onnx.NodeProto, domain: str) -> None:
        self._nodes.append(node)
        self._root()._domains.add(domain)

    def _fresh(self, op_type: str) -> str:
        self._count += 1
        return f"{op_type}_{self._count}"


def _data_type(dtype: Any) -> int:
    """TensorProto's number of a numpy dtype, or of what is such a number already."""
    return dtype if isinstance(dtype, int) else _TYPES[np.dtype(dtype)]
