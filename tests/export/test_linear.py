"""A linear layer at every precision: both forms compute what the stored tensors say, for every row by itself."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from bar_edge.calibration.quantize import block_size, from_blocks, per_channel, to_blocks
from bar_edge.calibration.quantizer import write_weights
from bar_edge.export.builder import GraphBuilder
from bar_edge.export.linear import linear
from bar_edge.runtime import weights
from bar_edge.runtime.engines.onnxruntime import exact_int8_products, load_session

LAYER = "some.layer"
INPUT_SCALE, ZERO_POINT = 0.03, 90
SHAPES = {"blocks of 128": (96, 256), "blocks of 64, an odd number of them": (65, 192), "blocks of 16": (64, 80)}
FORMS = ("canonical", "onnxruntime")
KINDS = ("int8", "int8 asymmetric", "int8-weight", "int4-weight")
RUNTIME_OPERATOR = {"int8": "MatMulIntegerToFloat", "int8-weight": "MatMulNBits", "int4-weight": "MatMulNBits"}
BITS = {"int8-weight": 8, "int4-weight": 4}


class Layer:
    """One quantized layer with random weights: its stored tensors, its graphs, and the numbers they stand for."""

    def __init__(self, folder: Path, kind: str, out: int, in_features: int) -> None:
        rng = np.random.default_rng(7)
        self.folder, self.precision = folder, kind.partition(" ")[0]
        self.zero_point = ZERO_POINT if "asymmetric" in kind else 128
        self.weight = rng.standard_normal((out, in_features)).astype(np.float32)
        self.bias = rng.standard_normal(out).astype(np.float32)
        tensors = {"bias": self.bias}
        if self.precision == "int8":
            levels, scale = per_channel(self.weight)
            self.exact = levels.astype(np.float64) * scale[:, None]  # what is stored stands for
            tensors |= {"weight_int8": np.ascontiguousarray(levels.T), "weight_scale": scale}
            tensors["input_scale"] = np.float32(INPUT_SCALE)
            if self.zero_point != 128:
                tensors["input_zero_point"] = np.uint8(self.zero_point)
        else:
            bits = BITS[self.precision]
            values, scale = to_blocks(self.weight, bits, np.ones(in_features, dtype=np.float32))
            self.exact = from_blocks(values, scale, bits).astype(np.float64)
            tensors |= {f"weight_blocks{bits}": values, "block_scale": scale}
        tensors = {f"{LAYER}.{name}": np.asarray(array) for name, array in tensors.items()}
        if self.precision != "int8":
            count = -(-scale.size * bits // 8)
            tensors[f"zero_points{bits}"] = np.full(count, {4: 0x88, 8: 0x80}[bits], dtype=np.uint8)
        self.places = write_weights(folder, tensors, lambda what, done, total: None)

    def model(self, form: str) -> onnx.ModelProto:
        g = GraphBuilder(self.places, {LAYER: self.precision}, onnxruntime=form == "onnxruntime")
        x = g.input("x", np.float32, ["M", self.weight.shape[1]])
        linear(g, x, LAYER, name="y")
        g.output("y", np.float32, ["M", len(self.weight)])
        return g.model("layer", "one linear layer")

    def run(self, form: str, x: np.ndarray) -> np.ndarray:
        session = load_session(onnxruntime, self.model(form).SerializeToString(), 1, self.folder)
        return session.run(None, {"x": x})[0]

    def seen(self, x: np.ndarray) -> np.ndarray:
        """x as the layer sees it: static scales round and saturate it."""
        if self.precision != "int8":
            return x.astype(np.float64)
        levels = np.clip(np.rint(x / np.float32(INPUT_SCALE)) + self.zero_point, 0, 255) - self.zero_point
        return levels * np.float64(np.float32(INPUT_SCALE))

    def within(self, x: np.ndarray) -> np.ndarray:
        """x without what the static range cuts off."""
        low, high = (INPUT_SCALE * (limit - self.zero_point) for limit in (0, 255))
        return x.clip(low, high) if self.precision == "int8" else x

    def expected(self, x: np.ndarray) -> np.ndarray:
        return self.seen(x) @ self.exact.T + self.bias


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> list[Layer]:
    """A layer of every kind and every size of block."""
    kinds = KINDS if exact_int8_products() else KINDS[2:]
    return [Layer(tmp_path_factory.mktemp("layer"), kind, *shape) for kind in kinds for shape in SHAPES.values()]


def rows_for(layer: Layer, count: int) -> np.ndarray:
    """Random inputs, some of which lie beyond the static range."""
    return np.random.default_rng(count).standard_normal((count, layer.weight.shape[1])).astype(np.float32) * 2


def test_the_canonical_form_computes_what_the_stored_tensors_say(layers):
    for layer in layers:
        x = rows_for(layer, 5)
        if layer.precision == "int8":
            assert (x != layer.within(x)).any()
        np.testing.assert_allclose(layer.run("canonical", x), layer.expected(x), rtol=1e-5, atol=1e-4)


def test_the_runtime_form_computes_the_same_numbers(layers):
    """Integers exactly, but for the rounding of the scales in fp32.

    The weight-only operator rounds activations to 8 bits, block by block of each row (accuracy level 4), so it may be
    off by half a level of every value's block, and by no more.
    """
    for layer in layers:
        x = rows_for(layer, 5)
        found = layer.run("onnxruntime", x)
        slack = np.full(found.shape, 1e-4)
        if layer.precision != "int8":
            block = block_size(x.shape[1])
            half = np.abs(x.reshape(len(x), -1, block)).max(axis=2) / 127 / 2  # [M, blocks]
            slack += half @ np.abs(layer.exact).reshape(len(layer.exact), -1, block).sum(axis=2).T * 1.01
        error = np.abs(found - layer.expected(x))
        assert (error <= slack).all()
        assert np.sqrt(np.square(error).mean()) < 0.01 * layer.expected(x).std()


def test_the_error_is_that_of_the_precision(layers):
    """4 bits are worse than 8, neither is a wrong result, and neither is float32 in disguise."""
    for layer in layers:
        x = layer.within(rows_for(layer, 64))
        exact = x.astype(np.float64) @ layer.weight.T.astype(np.float64) + layer.bias
        for form in FORMS:
            snr = 10 * np.log10(np.square(exact).mean() / np.square(layer.run(form, x) - exact).mean())
            least, most = {"int8": (35, 50), "int8-weight": (35, 60), "int4-weight": (16, 30)}[layer.precision]
            assert least < snr < most


def test_a_row_does_not_depend_on_its_company(layers):
    """No scale is shared between rows: not even company a thousand times as large changes a bit of a row."""
    for layer in layers:
        for count in (2, 16):
            x = rows_for(layer, count)
            louder = np.concatenate((x[:1], x[1:] * 1000))
            for form in FORMS:
                np.testing.assert_array_equal(layer.run(form, x)[0], layer.run(form, louder)[0])


def test_zeros_give_the_bias(layers):
    """A zero stays zero whatever the zero point, so padding is exact."""
    for layer in layers:
        for form in FORMS:
            found = layer.run(form, np.zeros((2, layer.weight.shape[1]), dtype=np.float32))
            np.testing.assert_allclose(found, np.tile(layer.bias, (2, 1)), rtol=0, atol=1e-6)


def test_the_canonical_form_passes_the_full_check_with_standard_operators(layers):
    for layer in layers:
        path = layer.folder / "layer.onnx"
        onnx.save(layer.model("canonical"), path)
        onnx.checker.check_model(path, full_check=True)
        model = onnx.load(path, load_external_data=False)
        assert [entry.domain for entry in model.opset_import] == [""]
        assert {node.domain for node in model.graph.node} == {""}


def test_both_forms_read_the_same_bytes_of_the_weights(layers):
    """No second copy, no float32 one, and as many bits a weight as the precision says."""
    names = {"int8": "weight_int8", "int8-weight": "weight_blocks8", "int4-weight": "weight_blocks4"}
    kinds = {"int8": "INT8", "int8-weight": "UINT8", "int4-weight": "UINT4"}
    for layer in layers:
        place = layer.places[f"{LAYER}.{names[layer.precision]}"]
        assert place.length == layer.weight.size * (4 if layer.precision == "int4-weight" else 8) // 8
        for form in FORMS:
            types = {
                entry.value: tensor.data_type
                for tensor in layer.model(form).graph.initializer
                for entry in tensor.external_data
                if entry.key == "offset"
            }
            kind = onnx.TensorProto.DataType.Name(types[str(place.offset)])
            expected = kinds[layer.precision]
            assert kind == (expected if form == "canonical" else expected.replace("UINT4", "UINT8"))


def test_the_runtime_form_names_its_integer_product(layers):
    """ONNX Runtime is not left to find it, which it silently does not when MatMul and Add were fused first."""
    for layer in layers:
        kinds = [node.op_type for node in layer.model("onnxruntime").graph.node]
        operator = RUNTIME_OPERATOR[layer.precision]
        assert kinds == (["QuantizeLinear", operator] if layer.precision == "int8" else [operator])


# -- whole bundles -----------------------------------------------------------------------------------------------------


def nodes_of(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for g in inner for node in nodes_of(g))]


CANONICAL = ("modulation", "prefix", "trunk_step", "mask_ratio", "head_modulation", "head_pass", "decode")
MIXING = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "MatMulInteger"}


def test_canonical_graphs_stay_standard_and_pass_the_full_check(digits, precision):
    bundle = digits.quantized(precision)
    for name in CANONICAL:
        onnx.checker.check_model(bundle.graph(name), full_check=True)
        model = onnx.load(bundle.graph(name), load_external_data=False)
        assert {entry.domain for entry in model.opset_import} == {""}, name
        assert {node.domain for node in nodes_of(model.graph)} == {""}, name


def test_no_operator_has_a_scale_of_all_rows(digits):
    for precision in RUNTIME_OPERATOR:
        bundle = digits.quantized(precision)
        for name in bundle.graphs:
            model = onnx.load(bundle.graph(name), load_external_data=False)
            assert not {node.op_type for node in nodes_of(model.graph)} & MIXING, name


def test_integer_zero_points_of_canonical_graphs_are_zero(digits):
    """TensorRT refuses any other."""
    bundle = digits.quantized("int8")
    seen = 0
    for name in CANONICAL:
        model = onnx.load(bundle.graph(name), load_external_data=False)
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in nodes_of(model.graph):
            if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
                seen += 1
                for zero_point in node.input[2:]:
                    value = onnx.numpy_helper.to_array(constants[zero_point])
                    assert value.dtype == np.int8 and not value.any(), (name, node.name)
    assert seen > 4 * 20


def test_onnxruntime_executes_the_integer_products(digits, precision, tmp_path):
    """Counted in the graphs as ONNX Runtime rewrote them: none was turned back into floating point."""
    bundle = digits.quantized(precision)
    least = {"onnxruntime_modulation": 5, "onnxruntime_step": 28, "onnxruntime_decode": 17}
    for name, count in least.items():
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(bundle.graph(name), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(tmp_path / "optimized.onnx", load_external_data=False)
        kinds = [node.op_type for node in nodes_of(optimized.graph)]
        operator = RUNTIME_OPERATOR[precision if name == "onnxruntime_step" else "int8"]
        assert kinds.count(operator) == count, name
        assert "DequantizeLinear" not in kinds


def test_every_weight_of_a_quantized_bundle_is_used_by_a_graph(digits):
    for precision in RUNTIME_OPERATOR:
        bundle, offsets = digits.quantized(precision), set()
        for name in bundle.graphs:
            model = onnx.load(bundle.graph(name), load_external_data=False)
            entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
            offsets |= {entry.value for entry in entries if entry.key == "offset"}
        places = weights.read_places(bundle.path / weights.FILE_NAME)
        assert not [name for name, place in places.items() if str(place.offset) not in offsets]
