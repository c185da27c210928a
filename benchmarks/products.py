"""How fast ONNX Runtime's forms of a linear layer stream weights, at the few rows a token step has.

    python -m bar_edge.benchmarks.products -o benchmarks/results/products.json

Layers of one shape are stacked until they exceed every cache. One session at a time: the threads of a second one would
spin beside it.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnx
import typer
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.table import Table

from bar_edge.benchmarks.contenders import Machine
from bar_edge.benchmarks.measure import save, stamp
from bar_edge.runtime.engines.onnxruntime import cpu_count, library
from bar_edge.runtime.tables import redirected_width
from bar_edge.runtime.terminal import run_function

SHAPES = ((2048, 11008), (5504, 2048), (768, 2304), (768, 768))  # in, out: head w12 and w3, trunk qkv and proj
ROWS = (2, 16)
_WEIGHTS = 120_000_000
_RUNS = 15

Layer = Callable[[str, int, int, np.random.Generator], tuple[list[onnx.NodeProto], list[onnx.TensorProto]]]


def _fp32(name: str, k: int, n: int, rng: np.random.Generator) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    weight = rng.standard_normal((n, k), dtype=np.float32)
    node = helper.make_node("Gemm", ["x", f"w{name}", f"b{name}"], [name], transB=1)
    return [node], [numpy_helper.from_array(weight, f"w{name}"), numpy_helper.from_array(weight[:, 0], f"b{name}")]


def _static(activation: type[np.integer[Any]]) -> Layer:
    def layer(name: str, k: int, n: int, rng: np.random.Generator) -> Any:
        zero = 128 if activation is np.uint8 else 0
        values = {
            f"w{name}": rng.integers(-127, 128, (k, n)).astype(np.int8), f"s{name}": np.full(n, 1e-3, np.float32),
            f"b{name}": np.zeros(n, np.float32), f"a{name}": np.float32(0.02), f"z{name}": activation(zero),
        }  # fmt: skip
        operands = [f"q{name}", f"w{name}", f"a{name}", f"s{name}", f"z{name}", "", f"b{name}"]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", f"a{name}", f"z{name}"], [f"q{name}"]),
            helper.make_node("MatMulIntegerToFloat", operands, [name], domain="com.microsoft"),
        ]
        return nodes, [numpy_helper.from_array(np.asarray(value), key) for key, value in values.items()]

    return layer


def _blocks(bits: int, block: int) -> Layer:
    def layer(name: str, k: int, n: int, rng: np.random.Generator) -> Any:
        values = {
            f"w{name}": rng.integers(0, 256, (n, k // block, block * bits // 8)).astype(np.uint8),
            f"s{name}": np.full((n, k // block), 1e-3, np.float32), f"b{name}": np.zeros(n, np.float32),
        }  # fmt: skip
        operands = ["x", f"w{name}", f"s{name}", "", "", f"b{name}"]
        settings = {"K": k, "N": n, "bits": bits, "block_size": block, "accuracy_level": 4}
        node = helper.make_node("MatMulNBits", operands, [name], domain="com.microsoft", **settings)
        return [node], [numpy_helper.from_array(value, key) for key, value in values.items()]

    return layer


FORMS: dict[str, Layer] = {
    "fp32 Gemm": _fp32,
    "MatMulIntegerToFloat, unsigned": _static(np.uint8),
    "MatMulIntegerToFloat, signed": _static(np.int8),
    "MatMulNBits 8, block 128": _blocks(8, 128),
    "MatMulNBits 8, block 32": _blocks(8, 32),
    "MatMulNBits 4, block 128": _blocks(4, 128),
    "MatMulNBits 4, block 32": _blocks(4, 32),
}


def weights_per_second(form: str, shape: tuple[int, int], threads: int) -> dict[int, float]:
    """Median weights per second by number of rows."""
    k, n = shape
    layers = max(2, _WEIGHTS // (k * n))
    rng = np.random.default_rng(0)
    nodes, initializers = [], []
    for i in range(layers):
        made = FORMS[form](f"y{i}", k, n, rng)
        nodes += made[0]
        initializers += made[1]
    outputs = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["M", n]) for i in range(layers)]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", k])]
    opsets = [helper.make_opsetid("", 22), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "products", inputs, outputs, initializers), opset_imports=opsets, ir_version=10
    )
    ort = library()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result = {}
    for rows in ROWS:
        x = rng.standard_normal((rows, k), dtype=np.float32)
        times = []
        for _ in range(_RUNS + 2):
            begin = time.perf_counter()
            session.run(None, {"x": x})
            times.append(time.perf_counter() - begin)
        result[rows] = k * n * layers / statistics.median(times[2:])
    return result


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
    threads: Annotated[int, typer.Option(help="0 for all cores.")] = 0,
) -> None:
    """Measure every form at every shape, print the table, write the JSON."""
    console, threads = Console(width=redirected_width()), threads or cpu_count()
    best = Machine(threads=threads)
    table = Table(title="G weights/s at 2 and 16 rows")
    table.add_column("form")
    for shape in SHAPES:
        table.add_column("x".join(map(str, shape)), justify="right")
    figures: dict[str, Any] = {}
    with console.status("measuring") as status:
        for form in FORMS:
            figures[form] = {}
            for shape in SHAPES:
                status.update(f"{form}, {shape}")
                rates = weights_per_second(form, shape, threads)
                read = best.bytes_per_second()
                figures[form]["x".join(map(str, shape))] = {"rows": rates, "memory_bytes_per_second": read}
            cells = [f"{e['rows'][2] / 1e9:.1f} / {e['rows'][16] / 1e9:.1f}" for e in figures[form].values()]
            table.add_row(form, *cells)
    command = " ".join(["python -m bar_edge.benchmarks.products", *sys.argv[1:]])
    output.parent.mkdir(parents=True, exist_ok=True)
    save({**stamp(command), "threads": threads, "weights_per_second": figures}, output)
    console.print(table)


if __name__ == "__main__":
    run_function(main)
