"""A linear layer, written at the precision it was quantized to.

What a layer is stored as decides nothing by itself; `GraphBuilder.precisions` says what to write:

    fp32              {layer}.weight [out, in]                                Gemm
    int8              {layer}.weight_int8 [in, out], weight_scale [out],      static symmetric W8A8: Q/DQ around MatMul;
                      input_scale []                                          ONNX Runtime: its integer product by name
                      input_zero_point [] uint8                               only if asymmetric: ONNX Runtime alone
    int8-weight       {layer}.weight_blocks8 [out, blocks, 128] uint8,        weight-only, 128 is zero
                      block_scale [out, blocks]
    int4-weight       {layer}.weight_blocks4 [out, blocks, 64] uint8,         weight-only, two values a byte, 8 is zero
                      block_scale [out, blocks]

ONNX Runtime would find its integer product behind Q/DQ by itself, but only if no other rewrite comes first (MatMul and
Add become a Gemm that has no integer kernel, and nothing is said), and signed activations have no fast kernel on x86.
So its form names the operator and shifts activations to uint8 with zero point 128: the same numbers.
"""

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
    input_scale = g.weight(f"{layer}.input_scale")
    if g.has(f"{layer}.input_zero_point"):
        zero = g.weight(f"{layer}.input_zero_point")
    else:
        zero = g.constant(128, np.uint8) if g.onnxruntime else g.constant(0, np.int8)
    quantized = g.op("QuantizeLinear", x, input_scale, zero)
    if g.onnxruntime:
        operands = (quantized, weight, input_scale, scale, zero, "", bias)
        return str(g.op("MatMulIntegerToFloat", *operands, domain=MICROSOFT, name=name))
    x = g.op("DequantizeLinear", quantized, input_scale, zero)
    weight = g.op("DequantizeLinear", weight, scale, axis=1)
    return str(g.op("Add", g.op("MatMul", x, weight), bias, name=name))


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
