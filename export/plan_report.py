"""What a TensorRT builder really made of a graph: kernels, and the types each product is computed in.

A TensorRT-RTX plan embeds a readable listing of its kernels and tensors, so this needs no GPU and does not take the
builder's word for anything. The listing is not documented: a plan without one is reported as such, never guessed at.
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bar_edge.export.linear import PRODUCT
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.precisions import FP16, FP32, INT4_WEIGHT, INT8, INT8_WEIGHT

BF16 = "bf16"
_PROGRAM = re.compile(
    rb"\nmain \{\n label \w+: \n(.*?)\n\}", re.DOTALL
)  # without the space it is the inside of a kernel
_TENSOR = re.compile(rb'\n {2}(?:sub_)?tensor=\{[^\n]*? name="([^"]+)"[^\n]*? type=(\w+) \}')
_CALL = re.compile(rb"^ {2}(\w+)=\{ ?name=\"?([^\s\"]+)", re.MULTILINE)
_INPUTS = re.compile(rb"\binput(?:_args)?=\{([^}]*)\}")
_OUTPUTS = re.compile(rb"\boutput(?:_args)?=\{([^}]*)\}")
_LAYER = re.compile(rb"\[ONNX Layer: ([^\]]+)\]")
_QUOTED = re.compile(rb'"([^"]+)"')
_FLOATS = {"float": FP32, "half": FP16, "bf16": BF16}
_WEIGHT_ONLY = {"int8": INT8_WEIGHT, "int4": INT4_WEIGHT}


@dataclass(frozen=True)
class Kernel:
    """One kernel launch of a plan."""

    name: str
    layers: tuple[str, ...]  # ONNX nodes it computes
    inputs: tuple[str, ...]  # types of its operands
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Program:
    """What runs in one call of a plan."""

    kernels: tuple[Kernel, ...]

    @property
    def products(self) -> dict[str, str]:
        """What every linear layer is computed in: fp32, fp16, bf16, int8, int8-weight, int4-weight.

        The first kernel that a product is named in computes it; later ones scale what it gave.
        """
        found: dict[str, str] = {}
        for kernel in self.kernels:
            for layer in kernel.layers:
                if layer.endswith(PRODUCT):
                    found.setdefault(layer.removesuffix(PRODUCT), _executed(kernel))
        return found

    @property
    def overflowing(self) -> list[str]:
        """Integer products that store their unscaled sums as float16, which end at 65504."""
        return [k.name for k in self.kernels if k.inputs.count("int8") >= 2 and "half" in k.outputs]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: number of kernels, and products by precision."""
        return {"kernels": len(self.kernels), "products": dict(Counter(self.products.values()).most_common())}


def read_plan(plan: bytes) -> Program:
    """The program of a TensorRT-RTX plan, the same for every GPU it is for. Raises EngineError if it tells none."""
    main = _PROGRAM.search(plan)
    if main is None:
        raise EngineError("the plan does not list its kernels; this version of TensorRT-RTX is not known to bar-edge")
    types = {name: kind.decode() for name, kind in _TENSOR.findall(plan, 0, main.start())}
    return Program(tuple(_kernels(main[1], types)))


def _kernels(listing: bytes, types: Mapping[bytes, str]) -> list[Kernel]:
    calls = list(_CALL.finditer(listing))
    ends = [call.start() for call in calls[1:]] + [len(listing)]
    found = []
    for call, end in zip(calls, ends, strict=True):
        text = listing[call.start() : end]
        operands = [_types_of(pattern.search(text), types) for pattern in (_INPUTS, _OUTPUTS)]
        layers = tuple(dict.fromkeys(name.decode() for name in _LAYER.findall(text)))
        found.append(Kernel(call[2].decode(), layers, *operands))
    return found


def _types_of(match: "re.Match[bytes] | None", types: Mapping[bytes, str]) -> tuple[str, ...]:
    return tuple(types.get(name, "unknown") for name in _QUOTED.findall(match[1])) if match else ()


def _executed(kernel: Kernel) -> str:
    """By what the kernel reads: two INT8 operands make an integer product, one next to floats weight-only."""
    integers = [kind for kind in kernel.inputs if kind in _WEIGHT_ONLY]
    floats = [_FLOATS[kind] for kind in kernel.inputs if kind in _FLOATS]
    if integers.count("int8") >= 2:
        return INT8
    if integers:
        return _WEIGHT_ONLY[integers[0]]
    return min(floats, key=(BF16, FP16, FP32).index, default="unknown")
