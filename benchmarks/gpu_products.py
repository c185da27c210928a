"""How fast the engine `cuda` multiplies at the rows that tokens, prefixes and batches have, beside PyTorch's fp16.

    python -m bar_edge.benchmarks.gpu_products -o gpu_products.json

By layer, form of the weights, rows, and rows that a block takes at once, between which `graphs.block_rows` chooses.
Layers of one shape are stacked until they exceed every cache, and a captured graph of the whole stack is launched again
and again. Not yet run on a GPU.
"""

import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bar_edge.benchmarks.measure import Report, save, stamp
from bar_edge.runtime.engines.cuda.device import CudaDevice
from bar_edge.runtime.engines.cuda.graphs import BLOCK_ROWS, PLAIN, block_rows, product
from bar_edge.runtime.engines.cuda.module import Module, load_model
from bar_edge.runtime.engines.cuda.resident import CHUNK_BYTES, CHUNK_INPUTS, TILE, Layer
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.tables import redirected_width
from bar_edge.runtime.terminal import run_function

SHAPES = ((768, 2304), (768, 768), (2048, 11008), (5504, 2048))  # in, out: trunk qkv and proj, head w12 and w3 of BAR-B
ROWS = (2, 16, 32, 64, 128, 512)
_STACK_BYTES = 256 * 2**20  # several times the largest L2
_BLOCK = 128  # INT4 values that share a scale
_REPEATED = 2**20  # numbers, after which they come again
_RUNS = 7
_LAUNCHES = 32  # of a graph at least, or the gaps between graphs count
_AWAKE_AFTER = 0.2  # seconds of products, in which clocks rise
PYTORCH = "pytorch fp16"


@dataclass(frozen=True)
class Figure:
    """A product's median time in a stack of its like."""

    inputs: int
    outputs: int
    form: str
    rows: int
    block_rows: int | None  # None where PyTorch chooses
    chosen: bool  # by the engine
    seconds: float
    weight_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with bytes of weights and operations a second."""
        work = 2 * self.rows * self.inputs * self.outputs
        rates = {"bytes_per_second": self.weight_bytes / self.seconds, "flops_per_second": work / self.seconds}
        return {**vars(self), **rates}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Figure":
        """Inverse of `to_dict`."""
        return cls(**{field.name: told[field.name] for field in fields(cls)})


def measure(device: CudaDevice) -> list[Figure]:
    """Every shape, form and number of rows. Raises EngineError."""
    with device.current():
        module = load_model(device)
        ours = [figure for shape in SHAPES for form in CHUNK_INPUTS for figure in _ours(device, module, *shape, form)]
        return ours + [_pytorch(*shape, rows) for shape in SHAPES for rows in ROWS]


def weight_bytes(form: str, inputs: int, outputs: int) -> int:
    """Bytes of a layer's weights as they lie on the device, without scales."""
    return -(-outputs // TILE) * -(-inputs // CHUNK_INPUTS[form]) * CHUNK_BYTES


def table(figures: list[Figure]) -> Table:
    """Microseconds by shape and form down, and rows across; in a cell by rows that a block takes."""
    shown = Table(
        title="µs a product, by rows that a block takes; the engine's choice with an asterisk", title_justify="left"
    )
    shown.add_column("in x out, form", no_wrap=True)
    for rows in ROWS:
        shown.add_column(f"{rows} rows", justify="right")
    for inputs, outputs in SHAPES:
        for form in (*CHUNK_INPUTS, PYTORCH):
            of_form = [one for one in figures if (one.inputs, one.outputs, one.form) == (inputs, outputs, form)]
            cells = ["\n".join(_cell(one) for one in of_form if one.rows == rows) for rows in ROWS]
            shown.add_row(f"{inputs} x {outputs} {form}", *cells)
    return shown


def _cell(figure: Figure) -> str:
    if figure.block_rows is None:
        return f"{figure.seconds * 1e6:.1f}"
    return f"{figure.block_rows}: {figure.seconds * 1e6:.1f}{'*' if figure.chosen else ''}"


def _ours(device: CudaDevice, module: Module, inputs: int, outputs: int, form: str) -> Iterator[Figure]:
    size = weight_bytes(form, inputs, outputs)
    count = max(2, _STACK_BYTES // size)
    allocated: list[int] = []

    def random(count: int, dtype: type[np.generic]) -> int:
        """Device memory with so many numbers around 0: some things are faster on zeros."""
        base = np.random.default_rng(0).standard_normal(_REPEATED) * (30 if dtype is np.int8 else 0.02)
        values = np.resize(base.astype(dtype), count)
        allocated.append(device.allocate(values.nbytes))
        device.upload(allocated[-1], values)
        return allocated[-1]

    try:
        weights = random(count * size // 2, np.float16) if form == "fp16" else random(count * size, np.int8)
        blocks = outputs * inputs // _BLOCK
        scale = random(blocks, np.float16) if form == "int4-weight" else random(outputs, np.float32)
        bias, out = random(outputs, np.float32), random(max(ROWS) * outputs, np.float32)
        x = random(max(ROWS) * inputs, np.int8 if form == "int8" else np.float16)
        block, input_scale = (_BLOCK if form == "int4-weight" else 0), (0.02 if form == "int8" else 0.0)
        layers = [
            Layer(form, inputs, outputs, weights + i * size, scale, bias, block, input_scale) for i in range(count)
        ]
        _awaken(device, lambda: module.launch(*product(layers[0], x, out, ROWS[-1], PLAIN, BLOCK_ROWS[-1])))
        for rows in ROWS:
            for taken in BLOCK_ROWS:
                if taken >= 4 * rows and taken != BLOCK_ROWS[0]:
                    continue  # most of it would be rows that there are not

                def stack(rows: int = rows, taken: int = taken) -> None:
                    for layer in repeated(layers):
                        module.launch(*product(layer, x, out, rows, PLAIN, taken))

                seconds = graph_seconds(device, stack) / len(repeated(layers))
                chosen = taken == block_rows(rows, outputs, device.multiprocessors)
                yield Figure(inputs, outputs, form, rows, taken, chosen, seconds, size)
        found = np.empty(max(ROWS) * outputs, dtype=np.float32)
        device.download(out, found)
        if not np.isfinite(found).all():
            raise EngineError(f"{form} products of {inputs} inputs are not finite")
    finally:
        for address in allocated:
            device.free(address)


def repeated(stack: Sequence[Any]) -> list[Any]:
    """A stack, several times over where it is short."""
    return [*stack] * -(-_LAUNCHES // len(stack))


def _awaken(device: CudaDevice, work: Callable[[], None]) -> None:
    """Do some work until clocks have risen, which fall while weights are made."""
    end = time.perf_counter() + _AWAKE_AFTER
    while time.perf_counter() < end:
        for _ in range(_LAUNCHES):
            work()
        device.seconds(device.record(), device.record())  # waits


def graph_seconds(device: CudaDevice, work: Callable[[], None], replays: int = 1) -> float:
    """Median time of a captured graph of `work`, launched so often at once; the first launches are left out."""
    work()  # kernels are loaded at their first launch, which a capture may not allow
    graph = device.capture(work)
    device.replay(graph)
    marks = [device.record()]
    for _ in range(_RUNS):
        for _ in range(replays):
            device.replay(graph)
        marks.append(device.record())
    return median(device.seconds(begin, end) for begin, end in pairwise(marks)) / replays


def _pytorch(inputs: int, outputs: int, rows: int) -> Figure:
    """`torch.nn.functional.linear`, the same way."""
    import torch

    size = 2 * inputs * outputs
    half = {"dtype": torch.float16, "device": "cuda"}
    stack = torch.randn(max(2, _STACK_BYTES // size), outputs, inputs, **half)
    x, bias = torch.randn(rows, inputs, **half), torch.randn(outputs, **half)
    for weight in stack[:2]:  # libraries start before anything is captured
        torch.nn.functional.linear(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    weights = repeated(list(stack))
    with torch.cuda.graph(graph):
        for weight in weights:
            torch.nn.functional.linear(x, weight, bias)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_RUNS + 2)]
    for mark in marks:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    seconds = [1e-3 * begin.elapsed_time(end) for begin, end in pairwise(marks)]
    return Figure(inputs, outputs, PYTORCH, rows, None, False, median(seconds) / len(weights), size)


def main(output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")]) -> None:
    """Measure, print, write."""
    device = CudaDevice()
    try:
        figures = measure(device)
    finally:
        device.close()
    Console(width=redirected_width()).print(table(figures))
    report: Report = stamp(f"python -m bar_edge.benchmarks.gpu_products {shlex.join(sys.argv[1:])}")
    save({**report, "products": [figure.to_dict() for figure in figures]}, output)


if __name__ == "__main__":
    run_function(main)
