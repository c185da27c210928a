"""The weights that a GPU reads hold exactly the numbers of the bundle."""

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from bar_edge.calibration.quantize import from_blocks, to_blocks
from bar_edge.export.device_weights import device_weights, write
from bar_edge.export.linear import PRODUCT
from bar_edge.runtime import weights
from bar_edge.runtime.errors import BundleError
from bar_edge.runtime.inspection import linear_layers
from bar_edge.runtime.precisions import BITS

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}
STORED = {"fp16": np.dtype(np.float16), "bf16": np.dtype(np.uint16), "fp32": np.dtype(np.float32)}
LAYER = "blocks.0.mlp.w3"


def stored_in(bundle):
    """A bundle's tensors, and what its linear layers are stored in."""
    places = weights.read_places(bundle.path / weights.FILE_NAME)
    return weights.open_weights(bundle.path), linear_layers(places)


def one_layer(tensors, precision, dtype):
    """What becomes of the tensors of one layer."""
    named = {f"{LAYER}.{part}": array for part, array in tensors.items()}
    made = device_weights(named, {LAYER: precision}, TYPES[dtype])
    return {name.removeprefix(f"{LAYER}."): pending.make() for name, pending in made.items()}


def as_floats(array):
    return array.view(ml_dtypes.bfloat16) if array.dtype == np.uint16 else array


def dequantized(written, layer):
    """What the graph's DequantizeLinear makes of a layer's weights [out, in], as ONNX's reference computes it."""
    graph = next(m.graph for m in written.graphs.values() if any(n.name == layer + PRODUCT for n in m.graph.node))
    product = next(node for node in graph.node if node.name == layer + PRODUCT)
    node = next(node for node in graph.node if product.input[1] in node.output)
    initializers = [tensor for tensor in graph.initializer if tensor.name in node.input]
    output = helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph([node], "one", [], [output], initializers), opset_imports=[helper.make_opsetid("", 24)]
    )
    onnx.load_external_data_for_model(model, str(written.folder))
    return ReferenceEvaluator(model).run(None, {})[0]


@pytest.mark.parametrize("precision", BITS)
@pytest.mark.parametrize("model", ["small", "digits"])
def test_weight_only_values_are_exactly_those_of_the_bundle(request, written, model, precision):
    """Signed values, nibbles and blocks: all as `from_blocks` reads the bundle's."""
    bundle = request.getfixturevalue(model).quantized(precision)
    tensors, precisions = stored_in(bundle)
    layers = [layer for layer, kind in precisions.items() if kind == precision]
    graphs = written(bundle, TensorProto.FLOAT)
    assert len(layers) > 10
    for layer in layers:
        values, scale = tensors[f"{layer}.weight_blocks{BITS[precision]}"], tensors[f"{layer}.block_scale"]
        np.testing.assert_array_equal(
            dequantized(graphs, layer), from_blocks(values, scale, BITS[precision]), err_msg=layer, strict=True
        )


@pytest.mark.parametrize("dtype", TYPES)
def test_the_scales_of_int4_are_rounded_to_the_devices_type_and_those_of_int8_kept(dtype):
    rows = np.random.default_rng(0).normal(size=(6, 256)).astype(np.float32)
    for precision, bits in BITS.items():
        values, scale = to_blocks(rows, bits, np.ones(256, np.float32))
        made = one_layer({f"weight_blocks{bits}": values, "block_scale": scale}, precision, dtype)
        if bits == 8:
            assert made.keys() == {"weight", "weight_scale"}
            assert (scale == scale[:, :1]).all()
            np.testing.assert_array_equal(made["weight_scale"], scale[:, 0], strict=True)
        else:
            assert made.keys() == {"weight", "block_scale"} and made["block_scale"].dtype == STORED[dtype]
            expected = scale.astype(as_floats(made["block_scale"]).dtype)
            np.testing.assert_array_equal(as_floats(made["block_scale"]), expected, strict=True)


def test_a_row_of_a_single_block_becomes_two():
    rows = np.random.default_rng(1).normal(size=(5, 64)).astype(np.float32)
    values, scale = to_blocks(rows, 4, np.ones(64, np.float32))
    assert scale.shape == (5, 1)
    made = one_layer({"weight_blocks4": values, "block_scale": scale}, "int4-weight", "fp32")
    assert made["weight"].shape == (5, 32) and made["block_scale"].shape == (5, 2)
    halves = np.repeat(made["block_scale"], 32, axis=1)
    nibbles = np.stack((made["weight"] & 15, made["weight"] >> 4), axis=-1).reshape(5, 64).astype(np.int8)
    signed = np.where(nibbles > 7, nibbles - 16, nibbles)
    np.testing.assert_array_equal(signed * halves, from_blocks(values, scale, 4))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_tiny_scale_never_becomes_zero(dtype):
    """TensorRT refuses a scale of zero; below float16's smallest number it would be one."""
    scale = np.array([[1e-12, 2.0**-24, 2.0**-20, 1.0]], dtype=np.float32)
    values = np.zeros((1, 4, 64), dtype=np.uint8)
    made = one_layer({"weight_blocks4": values, "block_scale": scale}, "int4-weight", dtype)["block_scale"]
    np.testing.assert_array_equal(as_floats(made).astype(np.float32), [[2.0**-24, 2.0**-24, 2.0**-20, 1.0]])


@pytest.mark.parametrize(("part", "precision"), [("weight", "fp32"), ("weight_fp16", "fp16")])
@pytest.mark.parametrize("dtype", TYPES)
def test_floats_are_rounded_to_the_devices_type(part, precision, dtype):
    """As ml_dtypes rounds, ties and the smallest numbers included; uint16 holds the bits of bfloat16."""
    ties = np.array([[1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-11, 2.0**-30, 0.1, -6.1e-5]])
    stored = ties.astype(np.float16 if part == "weight_fp16" else np.float32)
    made = one_layer({part: stored, "bias": np.full(1, 0.1, np.float32)}, precision, dtype)
    floats = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16, "fp32": np.float32}[dtype]
    assert made["weight"].dtype == STORED[dtype]
    np.testing.assert_array_equal(as_floats(made["weight"]), stored.astype(np.float32).astype(floats), strict=True)
    np.testing.assert_array_equal(made["bias"], np.full(1, 0.1, np.float32), strict=True)


def test_more_than_float16_can_hold_is_an_error_that_names_the_tensor_and_bf16():
    large = {"weight": np.array([[1.0, 70_000.0]], dtype=np.float32)}
    with pytest.raises(BundleError, match=r"^blocks\.0\.mlp\.w3\.weight: .*not finite in float16.*--precision bf16$"):
        one_layer(large, "fp32", "fp16")
    for dtype in ("bf16", "fp32"):
        assert as_floats(one_layer(large, "fp32", dtype)["weight"])[0, 1] == pytest.approx(70_000, rel=2**-8)


def test_int8_weights_and_their_scales_stay_as_they_are(small):
    tensors, precisions = stored_in(small.quantized("int8"))
    made = device_weights(tensors, precisions, TensorProto.FLOAT16)
    layers = [layer for layer, kind in precisions.items() if kind == "int8"]
    assert layers
    for layer in layers:
        for part in ("weight_int8", "weight_scale", "input_scale", "bias"):
            name = f"{layer}.{part}"
            np.testing.assert_array_equal(made[name].make(), tensors[name], strict=True)


@pytest.mark.parametrize("dtype", TYPES)
def test_only_products_are_rounded(small, dtype):
    """The embedding of mask ratios, norms, biases, tables and the convolution stay fp32."""
    tensors, precisions = stored_in(small.bundle)
    made = device_weights(tensors, precisions, TYPES[dtype])
    products = {f"{layer}.weight" for layer in precisions}
    assert made.keys() == tensors.keys()
    assert {made[name].dtype for name in products} == {STORED[dtype]}
    assert "lm_head.t_embedder.mlp.0.weight" in made.keys() - products
    for name in made.keys() - products:
        np.testing.assert_array_equal(made[name].make(), tensors[name], err_msg=name, strict=True)


@pytest.mark.parametrize("form", ["fp32", "int8", "int4-weight"])
def test_what_is_written_is_what_was_planned(small, tmp_path, form):
    tensors, precisions = stored_in(small.bundle if form == "fp32" else small.quantized(form))
    pending = device_weights(tensors, precisions, TensorProto.BFLOAT16)
    places = write(tmp_path, pending)
    read = weights.open_weights(tmp_path)
    assert places.keys() == read.keys() == pending.keys()
    assert not any("zero_points" in name for name in read)
    for name, array in read.items():
        np.testing.assert_array_equal(array, pending[name].make(), err_msg=name, strict=True)


def test_8_bit_rows_with_several_scales_are_refused():
    """As bundles had them once; taking the first scale for all would draw something else without a word."""
    scale = np.array([[1, 1, 1], [1, 2, 1]], dtype=np.float32)
    tensors = {"weight_blocks8": np.zeros((2, 3, 128), dtype=np.uint8), "block_scale": scale}
    with pytest.raises(BundleError, match=r"w3\.block_scale: 8-bit rows have a scale per block.*quantize again"):
        one_layer(tensors, "int8-weight", "fp16")
