"""A GPU that is not there: the loop's device and its compiled graphs, executed on the CPU.

Kernels are those of `kernels.cu`, built for the CPU; graphs are those that TensorRT compiles, run by ONNX Runtime on
the very addresses they are bound to; a captured graph is a list of what was put into the stream. So everything of the
loop runs in continuous integration but the driver's calls and TensorRT's own kernels.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from bar_edge.export.builder import DeviceForm
from bar_edge.export.device_weights import device_weights, write
from bar_edge.export.tensorrt_graphs import build_tensorrt_graphs
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.gpu_engine import GpuEngine
from bar_edge.runtime.engines.cuda.loop import TABLES, Loop
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.onnxruntime import load_session
from bar_edge.runtime.inspection import linear_layers

from .host import HostKernels

ALIGNMENT = 256  # of what the driver allocates, and of every address that TensorRT accepts
_GUARD = 64  # bytes behind every allocation that nobody may touch
_CANARY = 0xA5
_DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.INT32: np.int32, TensorProto.FLOAT16: np.float16}

Recording = list[tuple[str, Callable[[], None]]]


class EmulatedDevice:
    """Memory, stream and kernels on the CPU.

    `events` names everything that was executed, in order: kernels and graphs by their names, and `upload`, `download`,
    `copy`, `replay of` what a captured graph begins with. Copies must lie within one allocation, and gathered rows
    within their table. On the clock of `record` a kernel, graph or copy takes a `tick`, unless `durations` says
    otherwise.
    """

    threads = 4
    blocks, multiprocessors = 2, 1
    stream = 7

    def __init__(self, kernels: HostKernels, memory: int = 2**32) -> None:
        self._kernels, self._memory = kernels, memory
        self._allocated: dict[int, tuple[np.ndarray, int]] = {}  # address -> memory around it, bytes asked for
        self._recording: Recording | None = None
        self.events: list[str] = []
        self.tick = 1.0  # seconds
        self.durations: dict[str, float] = {"upload": 0, "download": 0}
        self.clock = 0.0
        self.closed = False

    @property
    def allocated_bytes(self) -> int:
        """What was asked for and not given back."""
        return sum(size for _, size in self._allocated.values())

    @property
    def allocations(self) -> list[int]:
        """Bytes of every allocation, in order."""
        return [size for _, size in self._allocated.values()]

    def allocate(self, size: int) -> int:
        if size > self.free_bytes():
            raise MemoryError(size)
        memory = np.zeros(ALIGNMENT + size + _GUARD, dtype=np.uint8)
        address = -(-memory.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._allocated[address] = (memory, size)
        self._guard(address)[:] = _CANARY
        return address

    def free(self, address: int) -> None:
        self.check_guards()
        del self._allocated[address]

    def free_bytes(self) -> int:
        return self._memory - self.allocated_bytes

    def check_guards(self) -> None:
        """Nothing was written behind a buffer."""
        for address, (_, size) in self._allocated.items():
            assert (self._guard(address) == _CANARY).all(), f"a buffer of {size} bytes was overrun"

    def upload(self, address: int, array: np.ndarray) -> None:
        assert self._recording is None, "an upload cannot be captured"
        assert array.flags.c_contiguous
        self._check_inside(address, array.nbytes)
        self.submit("upload", lambda: ctypes.memmove(address, array.ctypes.data, array.nbytes))

    def download(self, address: int, array: np.ndarray) -> None:
        assert self._recording is None, "a download cannot be captured"
        assert array.flags.c_contiguous
        self._check_inside(address, array.nbytes)
        self.submit("download", lambda: ctypes.memmove(array.ctypes.data, address, array.nbytes))

    def copy(self, target: int, source: int, size: int) -> None:
        self._check_inside(target, size)
        self._check_inside(source, size)
        self.submit("copy", lambda: ctypes.memmove(target, source, size))

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Any]) -> None:
        frozen = tuple(arguments)

        def run() -> None:
            if kernel == "gather_rows":
                _check_gather(*frozen)
            self._kernels.launch(kernel, blocks, self.threads, *frozen)

        self.submit(kernel, run)

    def submit(self, name: str, work: Callable[[], Any]) -> None:
        """Put something into the stream: done at once, or recorded."""

        def run() -> None:
            self.events.append(name)
            self.clock += self.durations.get(name, self.tick)
            work()

        if self._recording is None:
            run()
        else:
            self._recording.append((name, run))

    def capture(self, work: Callable[[], None]) -> Recording:
        assert self._recording is None, "captures do not nest"
        self._recording = []
        try:
            work()
            return self._recording
        finally:
            self._recording = None

    def replay(self, graph: Recording) -> None:
        assert self._recording is None, "a replay is not captured"
        self.events.append(f"replay of {graph[0][0]}")
        for _, run in graph:
            run()

    def record(self) -> float:
        assert self._recording is None, "an event is not captured"
        return self.clock

    def seconds(self, begin: float, end: float) -> float:
        return end - begin

    def wait_for(self, stream: int | None) -> None:
        self.events.append(f"wait for {stream}")

    def current(self) -> Any:
        return nullcontext()

    def close(self) -> None:
        self.closed = True

    def _guard(self, address: int) -> np.ndarray:
        memory, size = self._allocated[address]
        end = address - memory.ctypes.data + size
        return memory[end : end + _GUARD]

    def _check_inside(self, address: int, size: int) -> None:
        within = (begin <= address and address + size <= begin + held for begin, (_, held) in self._allocated.items())
        assert any(within), f"a copy of {size} bytes leaves its buffer"


class EmulatedGraph:
    """One graph, executed on addresses; `shapes` has its inputs and outputs."""

    def __init__(self, model: onnx.ModelProto, folder: Path) -> None:
        """`folder` holds the weights that the graph reads."""
        self.name = model.graph.name
        self.shapes = {value.name: _described(value) for value in [*model.graph.input, *model.graph.output]}
        self._session = load_session(onnxruntime, model.SerializeToString(), 1, folder)

    def enqueue(self, device: EmulatedDevice, addresses: Mapping[str, int]) -> None:
        """Put a call into a device's stream."""
        bound = dict(addresses)
        assert set(bound) == set(self.shapes), f"{self.name}: {set(bound) ^ set(self.shapes)}"
        unaligned = [name for name, address in bound.items() if address % ALIGNMENT]
        assert not unaligned, f"{self.name}: TensorRT takes no such address of {unaligned}"
        device.submit(self.name, lambda: self._run(bound))

    def _run(self, bound: Mapping[str, int]) -> None:
        feeds = {value.name: self._view(value.name, bound) for value in self._session.get_inputs()}
        names = [value.name for value in self._session.get_outputs()]
        for name, result in zip(names, self._session.run(names, feeds), strict=True):
            self._view(name, bound)[...] = result

    def _view(self, name: str, bound: Mapping[str, int]) -> np.ndarray:
        shape, dtype = self.shapes[name]
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        return np.frombuffer((ctypes.c_char * size).from_address(bound[name]), dtype=dtype).reshape(shape)


class EmulatedGraphs:
    """The graphs of one profile."""

    def __init__(
        self,
        device: EmulatedDevice,
        profile: Profile,
        models: Mapping[str, onnx.ModelProto],
        folder: Path,
        form: DeviceForm,
    ) -> None:
        self.profile, self.in_place = profile, form.in_place
        self.itemsize = np.dtype(_DTYPES[form.dtype]).itemsize
        self._device = device
        self._graphs = {name: EmulatedGraph(model, folder) for name, model in models.items()}

    def enqueue(self, graph: str, addresses: Mapping[str, int]) -> None:
        self._graphs[graph].enqueue(self._device, addresses)

    def close(self) -> None:
        self._graphs.clear()


@dataclass(frozen=True)
class Emulated:
    """A loop and the device it runs on."""

    loop: Loop
    device: EmulatedDevice


def emulated_loop(
    bundle: Bundle,
    kernels: HostKernels,
    folder: Path,
    profile: Profile,
    *,
    in_place: bool = True,
    dtype: int = TensorProto.FLOAT,
    memory: int = 2**32,
) -> Emulated:
    """A loop over the graphs of a bundle, on a device of its own; `dtype` is TensorProto's type of products."""
    form = DeviceForm(dtype, in_place)
    device = EmulatedDevice(kernels, memory)
    graphs = EmulatedGraphs(device, profile, device_graphs(bundle, folder, profile, form), folder, form)
    return Emulated(Loop(bundle.spec, loop_tables(bundle), graphs, device), device)


class EmulatedEngine(GpuEngine):
    """An engine whose graphs are those of an fp32 bundle, on a device of its own; it draws 2 images together."""

    name = "emulated"

    def __init__(self, bundle: Bundle, kernels: HostKernels, folder: Path) -> None:
        device: Any = EmulatedDevice(kernels)
        profile = Profile.of(2, guided=True, passes=len(bundle.recipe.allocation))
        super().__init__(bundle.spec, device, [profile], loop_tables(bundle))
        self._bundle, self._folder = bundle, folder

    def graphs(self, profile: Profile) -> EmulatedGraphs:
        form = DeviceForm(TensorProto.FLOAT, in_place=True)
        models = device_graphs(self._bundle, self._folder, profile, form)
        return EmulatedGraphs(self.device, profile, models, self._folder, form)


def device_graphs(bundle: Bundle, folder: Path, profile: Profile, form: DeviceForm) -> dict[str, onnx.ModelProto]:
    """The graphs that TensorRT would compile, and in `folder` the weights they read."""
    tensors = weights.open_weights(bundle.path)
    precisions = linear_layers(weights.read_places(bundle.path / weights.FILE_NAME))
    places = write(folder, device_weights(tensors, precisions, form.dtype))
    return build_tensorrt_graphs(bundle.spec, places, precisions, form, profile)


def loop_tables(bundle: Bundle) -> dict[str, np.ndarray]:
    """What the kernels read of a bundle's weights."""
    tensors = weights.open_weights(bundle.path)
    return {name: np.asarray(tensors[name]) for name in TABLES}


def _check_gather(_table: int, index: int, _out: int, _pieces: Any, held: np.int32, count: np.int32, *_: Any) -> None:
    rows = np.frombuffer((ctypes.c_char * (4 * int(count))).from_address(index), dtype=np.int32)
    assert (rows < held).all(), f"row {rows.max()} of a table of {held} is gathered"


def _described(value: onnx.ValueInfoProto) -> tuple[tuple[int, ...], Any]:
    tensor = value.type.tensor_type
    return tuple(dim.dim_value for dim in tensor.shape.dim), _DTYPES[tensor.elem_type]
