"""A linear layer, written at the precision it was quantized to.

What a layer is stored as decides nothing by itself; `GraphBuilder.precisions` says what to write:

    fp32              {layer}.weight [out, in]                                Gemm
    fp16              {layer}.weight_fp16 [out, in] float16                   stored in half the bytes, computed in fp32
    int8              {layer}.weight_int8 [in, out], weight_scale [out],      static symmetric W8A8: Q/DQ around MatMul;
                      input_scale []                                          ONNX Runtime: its integer product by name
                      input_zero_point [] uint8                               only if asymmetric: ONNX Runtime alone
    int8-weight       {layer}.weight_blocks8 [out, blocks, 128] uint8,        weight-only, 128 is zero; the blocks of a
                      block_scale [out, blocks]                               row share one scale
    int4-weight       {layer}.weight_blocks4 [out, blocks, 64] uint8,         weight-only, two values a byte, 8 is zero
                      block_scale [out, blocks]

ONNX Runtime would find its integer product behind Q/DQ by itself, but only if no other rewrite comes first (MatMul and
Add become a Gemm that has no integer kernel, and nothing is said), and signed activations have no fast kernel on x86.
So its form names the operator and shifts activations to uint8 with zero point 128: the same numbers.

For a GPU (`GraphBuilder.device`) the same layers are read from the file that `export/device_weights.py` describes:
weights in the device's type, weight-only values signed, because TensorRT knows no zero points. x comes and goes in
fp32; the product is named `{layer}.product`, by which the compiled plan is read back. Static INT8 keeps fp32 scales and
a fp32 sum: with fp16 scales TensorRT-RTX stores unscaled sums as fp16, which overflow.
"""

import numpy as np
import onnx

from bar_edge.export.builder import MICROSOFT, GraphBuilder
from bar_edge.runtime.precisions import BITS, FP32, INT4_WEIGHT, INT8, INT8_WEIGHT

PRODUCT = ".product"


def linear(g: GraphBuilder, x: str, layer: str, *, name: str = "") -> str:
    """x [M, in] through `layer` (weight and bias) -> [M, out]."""
    g.linear_inputs.append((layer, x))
    precision = g.precisions.get(layer, FP32)
    bias = g.weight(f"{layer}.bias")
    if precision == INT8:
        return _int8(g, x, layer, bias, name)
    if g.device is not None:
        return _on_device(g, x, layer, bias, precision, name)
    if precision in BITS:
        return _weight_only(g, x, layer, bias, BITS[precision], name)
    weight = g.weight(f"{layer}.weight") if precision == FP32 else _from_fp16(g, layer)
    return str(g.op("Gemm", x, weight, bias, transB=1, name=name))


def table_sum(g: GraphBuilder, x: str, rows: str, base: str | None = None) -> str:
    """x [M, n] of zeros and ones selects rows of a table [n, out], on top of a base vector [out]. Always fp32."""
    return str(g.op("Gemm", x, g.weight(rows), *([g.weight(base)] if base else [])))


def _from_fp16(g: GraphBuilder, layer: str) -> str:
    return g.cast(g.weight(f"{layer}.weight_fp16"), onnx.TensorProto.FLOAT)


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
    return str(g.op("Add", g.op("MatMul", x, weight, name=f"{layer}{PRODUCT}"), bias, name=name))


def _on_device(g: GraphBuilder, x: str, layer: str, bias: str, precision: str, name: str) -> str:
    """A product in the device's type; the bias is added in fp32."""
    stored = f"{layer}.weight"
    out, in_features = g.shape_of(stored)
    if precision == INT8_WEIGHT:
        weight = g.to_device(g.op("DequantizeLinear", g.weight(stored), g.weight(f"{layer}.weight_scale"), axis=0))
    elif precision == INT4_WEIGHT:
        scale = f"{layer}.block_scale"
        in_features *= 2  # two values a byte
        values = g.view(stored, stored, onnx.TensorProto.INT4, (out, in_features))
        block = in_features // g.shape_of(scale)[1]
        weight = g.op("DequantizeLinear", values, g.weight(scale), axis=1, block_size=block)
    else:
        weight = g.weight(stored)
    x = g.to_device(x) if precision in BITS or g.type_of(stored) == g.device_type else x
    product = g.op("Gemm", x, weight, transB=1, name=f"{layer}{PRODUCT}")
    return str(g.op("Add", g.from_device(product), bias, name=name))


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
