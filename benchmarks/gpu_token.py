"""What a token of the engine `cuda` takes on this GPU, kernel by kernel, and what it costs that one waits for another.

    python -m bar_edge.benchmarks.gpu_token bar_b-cuda/ -o gpu_token.json

It says what there is to gain by launching fewer kernels, before anybody fuses them. A kernel's time is what the token's
graph takes longer with all its launches than without: with cold weights, and with the gaps between launches. Beside it
phases with nothing in them, which wait for one another as launches of a graph, as programmatic launches (SM 9.0 and
newer), and at barriers of one cooperative kernel. Not yet run on a GPU.
"""

import ctypes
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bar_edge.benchmarks.gpu_products import graph_seconds, weight_bytes
from bar_edge.benchmarks.measure import Report, save, stamp
from bar_edge.benchmarks.tables import plain
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.cuda.compiler import compile_source
from bar_edge.runtime.engines.cuda.device import Argument, CudaDevice, CudaGraph, Work, kernel_parameters, load_driver
from bar_edge.runtime.engines.cuda.engine import CudaEngine
from bar_edge.runtime.engines.cuda.graphs import Launch
from bar_edge.runtime.engines.cuda.module import THREADS, Module
from bar_edge.runtime.engines.cuda.resident import NAME
from bar_edge.runtime.errors import EngineError, RequestError
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.tables import redirected_width
from bar_edge.runtime.terminal import run_function

PHASES = Path(__file__).with_name("phases.cu")
COUNT = 256  # phases in a graph; even, so that the last one writes the first buffer
LAUNCH, PROGRAMMATIC, BARRIER = "launches of a graph", "programmatic launches", "barriers of one kernel"
_PROGRAMMATIC_SM = 90
_ATTRIBUTES = {
    "cooperative": "CU_LAUNCH_ATTRIBUTE_COOPERATIVE",
    "programmaticStreamSerializationAllowed": "CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION",
}
_REPLAYS, _PHASE_REPLAYS = 32, 64  # of a graph at once: long enough for clocks to rise
_LAST = "advance"  # kernel of a token, after which the same graph is the next token
_PRODUCT = re.compile(r"(?:few|many)_rows_(.+?)(?:_\d+)?")


@dataclass(frozen=True)
class Figure:
    """Launches of a token that are alike, and what they add to it together."""

    kernel: str
    layer: str  # "inputs x outputs" of a product
    launches: int
    seconds: float
    weight_bytes: int  # 0 for what is no product

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with bytes of weights a second where there are any."""
        timed = self.weight_bytes and self.seconds > 0
        return {**vars(self), "bytes_per_second": self.weight_bytes / self.seconds if timed else None}


class TracedDevice(CudaDevice):
    """A device that knows what was captured and which launches were in it, and can capture it again without some."""

    def __init__(self) -> None:
        self.captured: list[tuple[Work, list[Launch]]] = []
        self._launched: list[Launch] = []
        self._left_out: Callable[[Launch], bool] = _none
        super().__init__()

    def load(self, cubin: bytes, threads: int) -> Any:
        return _Traced(super().load(cubin, threads), self._note)

    def capture(self, work: Work) -> CudaGraph:
        self._launched = []
        graph = super().capture(work)
        self.captured.append((work, self._launched))
        self._launched = []
        return graph

    @contextmanager
    def without(self, left_out: Callable[[Launch], bool]) -> Iterator[None]:
        """Launches of which that holds are left out."""
        self._left_out = left_out
        try:
            yield
        finally:
            self._left_out = _none

    def _note(self, launch: Launch) -> bool:
        self._launched.append(launch)
        return not self._left_out(launch)


class _Traced:
    """Kernels that ask before they are launched."""

    def __init__(self, kernels: Module, wanted: Callable[[Launch], bool]) -> None:
        self._kernels, self._wanted = kernels, wanted

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Any]) -> None:
        if self._wanted(Launch(kernel, blocks, tuple(arguments))):
            self._kernels.launch(kernel, blocks, arguments)


def _none(launch: Launch) -> bool:
    return False


def measure_token(bundle: Bundle) -> Report:
    """A token in the middle of one guided image: its launches, its time, and a figure for every kind of launch.

    Raises EngineError and what opening an engine raises.
    """
    engine = CudaEngine(bundle, TracedDevice)
    try:
        noise = SeededNoise(0, range(1))
        engine.draw(Batch(np.zeros(1, np.int64), bundle.recipe, noise, noise.orders(bundle.spec.num_tokens)))
        with engine.device.current():
            return _measured(engine.device, bundle.spec.num_tokens // 2)
    finally:
        engine.close()


def _measured(device: TracedDevice, position: int) -> Report:
    work, launches = next((work, of) for work, of in device.captured if any(one.kernel == _LAST for one in of))
    (last,) = (one for one in launches if one.kernel == _LAST)
    device.upload(last.arguments[0], np.array([position], dtype=np.int32))
    kinds: dict[tuple[str, str], list[Launch]] = defaultdict(list)
    for launch in launches:
        if launch is not last:
            kinds[_kind(launch)].append(launch)

    def seconds_without(*kinds: tuple[str, str]) -> float:
        with device.without(lambda launch: launch.kernel == _LAST or _kind(launch) in kinds):
            return graph_seconds(device, work, _REPLAYS)

    seconds_without()  # clocks rise
    whole = seconds_without()
    figures = [
        Figure(*kind, len(alike), whole - seconds_without(kind), sum(map(_weight_bytes, alike)))
        for kind, alike in kinds.items()
    ]
    figures.sort(key=lambda figure: -figure.seconds)
    return {
        "position": position, "launches": len(launches) - 1, "seconds": whole,
        "kernels": [figure.to_dict() for figure in figures],
    }  # fmt: skip


def _kind(launch: Launch) -> tuple[str, str]:
    if not _PRODUCT.fullmatch(launch.kernel):
        return launch.kernel, ""
    _, outputs, inputs, *_ = _sizes(launch)
    return launch.kernel, f"{inputs} x {outputs}"


def _weight_bytes(launch: Launch) -> int:
    product = _PRODUCT.fullmatch(launch.kernel)
    if product is None:
        return 0
    _, outputs, inputs, *_ = _sizes(launch)
    return weight_bytes(product[1].replace("_", "-"), inputs, outputs)


def _sizes(launch: Launch) -> list[int]:
    """Of a product, the first of which are rows, outputs and inputs."""
    return [int(argument) for argument in launch.arguments if isinstance(argument, np.int32)]


def measure_phases(device: CudaDevice) -> dict[str, float | str]:
    """Seconds of a phase with nothing in it, by how it waits for the one before, or why that could not be measured.

    A phase has a block on every multiprocessor. Raises EngineError.
    """
    blocks = device.multiprocessors
    with device.current():
        module = device.call("cuModuleLoadData", compile_source(PHASES, device.sm))
        launch = partial(_launch, device, module)
        even, odd, arrived = (device.allocate(4 * blocks) for _ in range(3))

        def one_by_one(kernel: str, switch: str = "") -> None:
            for i in range(COUNT):
                launch(kernel, blocks, (odd, even) if i % 2 else (even, odd), switch)

        def together() -> None:
            launch("clear", 1, (arrived,))
            launch("phases", blocks, (even, odd, arrived, np.int32(COUNT)), "cooperative")

        ways = {LAUNCH: partial(one_by_one, "phase"), BARRIER: together}
        if device.sm >= _PROGRAMMATIC_SM:
            ways[PROGRAMMATIC] = partial(one_by_one, "early_phase", "programmaticStreamSerializationAllowed")
        found: dict[str, float | str] = {}
        for way, work in ways.items():
            try:
                _check(device, work, even, blocks)
                found[way] = graph_seconds(device, work, _PHASE_REPLAYS) / COUNT
            except EngineError as error:
                found[way] = str(error)
        for address in (even, odd, arrived):
            device.free(address)
        device.call("cuModuleUnload", module)
    return found


def _launch(
    device: CudaDevice, module: Any, kernel: str, blocks: int, arguments: Sequence[Argument], switch: str = ""
) -> None:
    """Put a kernel into the stream, perhaps with an attribute switched on."""
    driver = load_driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = THREADS, 1, 1
    config.hStream = driver.CUstream(device.stream)
    if switch:
        attribute = driver.CUlaunchAttribute()
        attribute.id = getattr(driver.CUlaunchAttributeID, _ATTRIBUTES[switch])
        setattr(attribute.value, switch, 1)
        config.attrs, config.numAttrs = [attribute], 1
    _values, pointers = kernel_parameters(arguments)
    function = device.call("cuModuleGetFunction", module, kernel.encode())
    device.call("cuLaunchKernelEx", config, function, ctypes.addressof(pointers), 0)


def _check(device: CudaDevice, work: Work, even: int, blocks: int) -> None:
    """Raise EngineError if some block went on before all were done."""
    counted = np.zeros(blocks, dtype=np.uint32)
    device.upload(even, counted.copy())
    work()
    device.download(even, counted)
    if (counted != COUNT).any():
        raise EngineError(f"blocks counted {sorted(set(counted.tolist()))} phases of {COUNT}: one did not wait")


def tables(report: Report) -> Iterator[Table]:
    """Phases, and the kernels of every bundle's token."""
    phases = plain("a phase with nothing in it", "waits for the one before at", "µs")
    for way, seconds in report["phases"].items():
        phases.add_row(way, seconds if isinstance(seconds, str) else _us(seconds))
    yield phases
    for name, token in report["tokens"].items():
        title = f"{name}: {token['launches']} launches, {_us(token['seconds'])} µs a token"
        kernels = plain(title, "kernel", "layer", "launches", "µs together", "µs each", "GB/s")
        for one in token["kernels"]:
            rate = one["bytes_per_second"]
            each = _us(one["seconds"] / one["launches"])
            row = (one["kernel"], one["layer"], str(one["launches"]), _us(one["seconds"]), each)
            kernels.add_row(*row, f"{rate * 1e-9:,.0f}" if rate else "")
        yield kernels


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:,.1f}"


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Compiled for the engine cuda.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
) -> None:
    """Measure, print, write."""
    opened = [Bundle.open(path) for path in bundles]
    for bundle in opened:
        if NAME not in bundle.engines:
            raise RequestError(
                f"{bundle.path}: is not compiled for the engine cuda: bar-edge compile {bundle.path} --target cuda -o "
                "OUTPUT, and give that"
            )
    device = CudaDevice()
    try:
        phases = measure_phases(device)
    finally:
        device.close()
    report = {
        **stamp(f"python -m bar_edge.benchmarks.gpu_token {shlex.join(sys.argv[1:])}"), "phases": phases,
        "tokens": {bundle.path.name: measure_token(bundle) for bundle in opened},
    }  # fmt: skip
    console = Console(width=redirected_width())
    for table in tables(report):
        console.print(table)
    save(report, output)


if __name__ == "__main__":
    run_function(main)
