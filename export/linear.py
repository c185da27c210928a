"""A linear layer, written at the precision it was quantized to.

What a layer is stored as decides nothing by itself; `GraphBuilder.precisions` says what to write:

    fp32              {layer}.weight [out, in]                                Gemm
    int8              {layer}.weight_int8 [in, out], weight_scale [out],      static symmetric W8A8: Q/DQ around MatMul;
                      input_scale [] or [2] (prefix, tokens)                  ONNX Runtime: its integer product by name
                      input_zero_point, uint8 of that shape                   only if asymmetric: ONNX Runtime alone
    int8-weight       {layer}.weight_blocks8 [out, blocks, 128] uint8,        weight-only, 128 is zero
                      block_scale [out, blocks]
    int4-weight       {layer}.weight_blocks4 [out, blocks, 64] uint8,         weight-only, two values a byte, 8 is zero
                      block_scale [out, blocks]

ONNX Runtime would find its integer product behind Q/DQ by itself, but only if no other rewrite comes first (MatMul and
Add become a Gemm that has no integer kernel, and nothing is said), and signed activations have no fast kernel on x86.
So its form names the operator and shifts activations to uint8 with zero point 128: the same numbers.
"""

from collections.abc import Sequence

import numpy as np
import onnx

from bar_edge.export.builder import MICROSOFT, GraphBuilder

FP32, INT8, INT8_WEIGHT, INT4_WEIGHT = "fp32", "int8", "int8-weight", "int4-weight"
BITS = {INT8_WEIGHT: 8, INT4_WEIGHT: 4}


def linear(g: GraphBuilder, x: str, layer: str, *, name: str = "") -> str:
    """x [M, in] through `layer` (weight and bias) -> [M, out]."""
    g.linear_inputs.append((layer, x))
    precision = g.precisions.get(layer, FP32)
    bias = g.weight(f"{layer}.bias")
    if precision == FP32:
        return str(g.op("Gemm", x, g.weight(f"{layer}.weight"), bias, transB=1, name=name))
    if precision == INT8:
        return _int8(g, x, layer, bias, name)
    return _weight_only(g, x, layer, bias, BITS[precision], name)


def table_sum(g: GraphBuilder, x: str, rows: str, base: str | None = None) -> str:
    """x [M, n] of zeros and ones selects rows of a table [n, out], on top of a base vector [out]. Always fp32."""
    return str(g.op("Gemm", x, g.weight(rows), *([g.weight(base)] if base else [])))


def _int8(g: GraphBuilder, x: str, layer: str, bias: str, name: str) -> str:
    weight, scale = g.weight(f"{layer}.weight_int8"), g.weight(f"{layer}.weight_scale")
    input_scale = _of_positions(g, f"{layer}.input_scale", onnx.TensorProto.FLOAT)
    asymmetric = g.has(f"{layer}.input_zero_point")
    if asymmetric:
        zero = _of_positions(g, f"{layer}.input_zero_point", onnx.TensorProto.UINT8)
    else:
        zero = g.constant(128, np.uint8) if g.onnxruntime else g.constant(0, np.int8)
    quantized = g.op("QuantizeLinear", x, input_scale, zero)
    if g.onnxruntime:
        operands = (quantized, weight, input_scale, scale, zero, "", bias)
        return str(g.op("MatMulIntegerToFloat", *operands, domain=MICROSOFT, name=name))
    x = g.op("DequantizeLinear", quantized, input_scale, zero)
    weight = g.op("DequantizeLinear", weight, scale, axis=1)
    return str(g.op("Add", g.op("MatMul", x, weight), bias, name=name))


def choose_scales(g: GraphBuilder, layers: Sequence[str], prefix: str) -> None:
    """Let layers with two scales use that of the prefix where `prefix` (int64 scalar) is 1, of tokens where it is 0.

    All at once: a Gather and a Split for the scales of the whole trunk, and for its zero points if it has any.
    """
    for part in ("input_scale", "input_zero_point"):
        names = [f"{layer}.{part}" for layer in layers if g.precisions.get(layer) == INT8]
        two = [name for name in names if g.has(name) and g.shape_of(name) == (2,)]
        if not two:
            continue
        table = g.op("Concat", *(g.weight(name) for name in two), axis=0)
        table = g.op("Reshape", table, g.constant([-1, 2], np.int64))  # [layers, 2]
        index = g.op("Sub", g.constant(1, np.int64), prefix)
        chosen = g.op("Split", g.op("Gather", table, index, axis=1), axis=0, num_outputs=len(two), outputs=len(two))
        g.chosen |= dict(zip(two, [chosen] if len(two) == 1 else chosen, strict=True))


def _of_positions(g: GraphBuilder, name: str, data_type: int) -> str:
    """The one value of a layer's input; of two, that of the positions this graph runs."""
    if name in g.chosen:
        return g.chosen[name]
    if g.shape_of(name) == ():
        return g.weight(name)
    return g.view(f"{name}.{'prefix' if g.prefix else 'token'}", name, data_type, (), 1 - g.prefix)


def _weight_only(g: GraphBuilder, x: str, layer: str, bias: str, bits: int, name: str) -> str:
    stored, scale = f"{layer}.weight_blocks{bits}", g.weight(f"{layer}.block_scale")
    out, blocks, size = g.shape_of(stored)
    block = size * 8 // bits
    if g.onnxruntime:
        return str(
            g.op(
                "MatMulNBits", x, g.weight(stored), scale, "", "", bias,
                domain=MICROSOFT, name=name, K=blocks * block, N=out, bits=bits, block_size=block, accuracy_level=4,
            )
        )  # fmt: skip
    # the same bytes in the standard form; zero points are one stored run of equal bytes that all layers share
    data_type = onnx.TensorProto.UINT4 if bits == 4 else onnx.TensorProto.UINT8
    values = g.view(f"{layer}.weight", stored, data_type, (out, blocks * block))
    zero = g.view(f"{layer}.zero_point", f"zero_points{bits}", data_type, (out, blocks))
    weight = g.op("DequantizeLinear", values, scale, zero, axis=1, block_size=block)
    return str(g.op("Gemm", x, weight, bias, transB=1, name=name))
