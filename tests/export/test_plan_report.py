"""What is read back of a plan: kernels, and the types that products are computed in."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bar_edge.export.compile import Builder, check_program
from bar_edge.export.plan_report import Kernel, Program, read_plan
from bar_edge.export.targets import resolve
from bar_edge.runtime.engines.tensorrt import load_library
from bar_edge.runtime.errors import EngineError

LISTING = b"""junk\x00\xff
  tensor={ alignment=16 dims={ 2 64 } name="x.1" offset=0 strides={ 64 1 } type=half }
  tensor={ alignment=16 dims={ 64 } name="scale" offset=0 strides={ 1 } type=float }
  sub_tensor={ alignment=16 dims={ 64 8 } name="weights" offset=3 strides={ 8 1 } type=int8 }
  tensor={ alignment=16 dims={ 2 8 } name="y.1" offset=0 strides={ 8 1 } type=half }
main {
  inside a kernel
}
main {
 label start: 
  runtime_fusion={ name=__myl_CastMulCastFc input_args={ "x.1" "scale" "weights" } output_args={ "y.1" } \
layers="[ONNX Layer: DequantizeLinear_1][ONNX Layer: lm_head.a.product]" backbone=gemm }
  fully_connected={ name="lm_head.b.product_U1" output={"y.1" } input={"x.1" "never listed" } \
layers="[ONNX Layer: lm_head.b.product]" }
  function={ name=__myl_Add fqn=__myl_Add_0x1 args={ "y.1" } input_args={ "y.1" } output_args={ } \
layers="[ONNX Layer: Add_2][ONNX Layer: Add_2]" }
}
"""  # noqa: W291


def kernel(product="a", inputs=("half", "half"), outputs=("half",)):
    return Kernel(f"kernel of {product}", (f"{product}.product",), tuple(inputs), tuple(outputs))


def program(*kernels):
    return Program(kernels)


# -- a listing ---------------------------------------------------------------------------------------------------------


def test_kernels_and_the_types_of_their_operands_are_read():
    first, second, third = read_plan(LISTING).kernels
    assert first == Kernel(
        "__myl_CastMulCastFc", ("DequantizeLinear_1", "lm_head.a.product"), ("half", "float", "int8"), ("half",)
    )
    assert second == Kernel("lm_head.b.product_U1", ("lm_head.b.product",), ("half", "unknown"), ("half",))
    assert third == Kernel("__myl_Add", ("Add_2",), ("half",), ())
    assert read_plan(LISTING).products == {"lm_head.a": "int8-weight", "lm_head.b": "fp16"}
    assert read_plan(LISTING).to_dict() == {"kernels": 3, "products": {"int8-weight": 1, "fp16": 1}}


@pytest.mark.parametrize("plan", [b"", b"ptrt\x00\x01\x02" * 50, b"main {\n inside a kernel\n}\n", LISTING[:400]])
def test_a_plan_that_tells_nothing_is_reported_and_never_guessed_at(plan):
    with pytest.raises(EngineError, match="does not list its kernels; this version of TensorRT-RTX is not known"):
        read_plan(plan)


# -- what a program says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "precision"),
    [
        (["int8", "int8", "float", "float"], "int8"),
        (["half", "float", "int8"], "int8-weight"),
        (["half", "int4", "half"], "int4-weight"),
        (["half", "half", "float", "float"], "fp16"),
        (["float", "bf16", "bf16"], "bf16"),
        (["float", "float"], "fp32"),
        (["int64"], "unknown"),
        ([], "unknown"),
    ],
)
def test_the_precision_of_a_product_is_what_its_kernel_reads(inputs, precision):
    assert program(kernel(inputs=inputs)).products == {"a": precision}


def test_the_first_kernel_of_a_product_computes_it():
    scaling = Kernel("scale", ("a.product", "Add_1"), ("float", "float"), ("float",))
    made = program(kernel(inputs=["int8", "int8"], outputs=["float"]), scaling, kernel("b"))
    assert made.products == {"a": "int8", "b": "fp16"}


def test_an_integer_product_that_stores_half_may_overflow():
    safe = [
        kernel(inputs=["int8", "int8"], outputs=["float"]),
        kernel(inputs=["half", "int8"], outputs=["half"]),
        kernel(inputs=["half", "half"], outputs=["half"]),
    ]
    assert program(*safe).overflowing == []
    assert program(*safe, kernel("b", ["int8", "int8", "float"], ["half"])).overflowing == ["kernel of b"]


# -- judgement ---------------------------------------------------------------------------------------------------------


def test_what_was_asked_for_passes():
    made = program(kernel(), kernel("b", ["int8", "int8"], ["float"]), kernel("c", ["half", "int4"]))
    check_program("step", made, {"a": "fp16", "b": "int8", "c": "int4-weight"})


def test_every_product_that_is_not_what_was_asked_for_is_named():
    made = program(kernel(), kernel("b", ["float", "float"]), kernel("c"))
    with pytest.raises(EngineError) as refused:
        check_program("step", made, {"a": "int8", "b": "fp16", "c": "fp16"})
    assert str(refused.value) == (
        "step: the builder did not do what was asked for: a fp16 instead of int8, b fp32 instead of fp16; please "
        "report this"
    )


@pytest.mark.parametrize("graph", ["step", "head_pass"])
@pytest.mark.parametrize("asked", ["int8-weight", "int4-weight"])
def test_in_the_token_loop_weights_are_read_as_integers(graph, asked):
    with pytest.raises(EngineError, match=rf"{graph}: .* a fp16 instead of {asked}"):
        check_program(graph, program(kernel()), {"a": asked})


@pytest.mark.parametrize("graph", ["modulation", "prefix", "decode"])
def test_once_an_image_weights_may_be_made_floats_first(graph):
    check_program(graph, program(kernel()), {"a": "int8-weight"})
    with pytest.raises(EngineError, match="a fp16 instead of int8"):
        check_program(graph, program(kernel()), {"a": "int8"})


@pytest.mark.parametrize("graph", ["step", "decode"])
def test_a_product_that_may_overflow_is_an_error(graph):
    made = program(kernel(inputs=["int8", "int8"], outputs=["half"]))
    with pytest.raises(EngineError, match=f"{graph}: 1 INT8 products store unscaled sums as float16, which overflow"):
        check_program(graph, made, {"a": "int8"})


def test_products_that_nobody_asked_about_are_free():
    """The embedding of mask ratios is always fp32."""
    check_program("mask_ratio", program(kernel(inputs=["float", "float"])), {})


# -- real plans of one product -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory):
    """The plan of nodes over x [2, 256] in float16, built by TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")
    builder = Builder(load_library("tensorrt_rtx"), resolve("rtx", None), lambda what, done, total: None)
    path = tmp_path_factory.mktemp("plans") / "one.onnx"

    def build(nodes, constants):
        graph = helper.make_graph(
            nodes, "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 256])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [2, 512])],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )  # fmt: skip
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11), path)
        return read_plan(builder.build(path, "one"))

    return build


def integers(*shape):
    return np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)


def test_a_plain_product_is_read_as_float16(plan_of):
    made = plan_of(
        [helper.make_node("Gemm", ["x", "w"], ["y"], "a.product", transB=1)],
        {"w": (integers(512, 256) / 127).astype(np.float16)},
    )
    assert made.products == {"a": "fp16"}
    check_program("step", made, {"a": "fp16"})


def weight_only(block_size):
    attributes = {"axis": 1, "block_size": block_size} if block_size else {"axis": 0}
    scale = np.full((512, 256 // block_size) if block_size else (512,), 0.01, np.float16)
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale"], ["dequantized"], **attributes),
        helper.make_node("Gemm", ["x", "dequantized"], ["y"], "a.product", transB=1),
    ]
    return nodes, {"w": integers(512, 256), "scale": scale}


def test_int8_weights_with_a_scale_per_row_are_read_as_integers(plan_of):
    made = plan_of(*weight_only(block_size=0))
    assert made.products == {"a": "int8-weight"}
    check_program("step", made, {"a": "int8-weight"})


def test_int8_weights_in_blocks_are_made_floats_in_a_kernel_of_their_own(plan_of):
    """What the bytes were to be saved for is lost: read as fp16 and refused in the token loop."""
    made = plan_of(*weight_only(block_size=128))
    assert made.products == {"a": "fp16"} and len(made.kernels) > 1
    with pytest.raises(EngineError, match="a fp16 instead of int8-weight"):
        check_program("step", made, {"a": "int8-weight"})


def test_float16_scales_make_an_int8_product_that_may_overflow(plan_of):
    """The form that `export/linear.py` must never write."""
    made = plan_of(
        [
            helper.make_node("QuantizeLinear", ["x", "x_scale"], ["quantized"]),
            helper.make_node("DequantizeLinear", ["quantized", "x_scale"], ["x_again"]),
            helper.make_node("DequantizeLinear", ["w", "scale"], ["w_again"], axis=1),
            helper.make_node("MatMul", ["x_again", "w_again"], ["y"], "a.product"),
        ],
        {"w": integers(256, 512), "scale": np.full(512, 0.01, np.float16), "x_scale": np.array(0.01, np.float16)},
    )
    assert made.products == {"a": "int8"} and made.overflowing
    with pytest.raises(EngineError, match="store unscaled sums as float16"):
        check_program("step", made, {"a": "int8"})
