"""A GPU that is not there: the loop's device and its compiled graphs, executed on the CPU.

Kernels are those of `kernels.cu`, built for the CPU; graphs are those that TensorRT compiles, run by ONNX Runtime on the
very addresses they are bound to; a captured graph is a list of what was put into the stream. So everything of the loop
runs in continuous integration but the driver's calls and TensorRT's own kernels.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto

from bar_edge.export.builder import Device as DeviceForm
from bar_edge.export.device_weights import device_weights, write
from bar_edge.export.tensorrt_graphs import build_tensorrt_graphs
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.loop import TABLES, Loop
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.onnxruntime import load_session
from bar_edge.runtime.inspection import linear_layers

from .host import HostKernels

_GUARD = 64  # bytes behind every allocation that nobody may touch
_CANARY = 0xA5


class EmulatedDevice:
    """Memory, stream and kernels on the CPU. `log` has every kernel launch in order."""

    threads = 4
    blocks = 2

    def __init__(self, kernels: HostKernels, memory: int = 2**32) -> None:
        self._kernels, self._memory = kernels, memory
        self.allocated: dict[int, np.ndarray] = {}
        self._recording: list[Callable[[], None]] | None = None
        self.downloads_before_capture_ends = 0
        self.log: list[str] = []
        self.replays = 0

    def allocate(self, size: int) -> int:
        if size > self.free_bytes():
            raise MemoryError(size)
        memory = np.zeros(size + _GUARD, dtype=np.uint8)
        memory[size:] = _CANARY
        self.allocated[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free(self, address: int) -> None:
        self.check_guards()
        del self.allocated[address]

    def free_bytes(self) -> int:
        return self._memory - sum(memory.nbytes for memory in self.allocated.values())

    def check_guards(self) -> None:
        """Nothing was written behind a buffer."""
        for memory in self.allocated.values():
            assert (memory[-_GUARD:] == _CANARY).all(), "a buffer was overrun"

    def upload(self, address: int, array: np.ndarray) -> None:
        assert self._recording is None, "an upload cannot be captured"
        assert array.flags.c_contiguous
        self.copy(address, array.ctypes.data, array.nbytes)

    def download(self, address: int, array: np.ndarray) -> None:
        assert self._recording is None and array.flags.c_contiguous
        self.copy(array.ctypes.data, address, array.nbytes)

    def copy(self, target: int, source: int, size: int) -> None:
        self.submit(lambda: ctypes.memmove(target, source, size))

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Any]) -> None:
        frozen = tuple(arguments)

        def run() -> None:
            self.log.append(kernel)
            self._kernels.launch(kernel, blocks, self.threads, *frozen)

        self.submit(run)

    def submit(self, work: Callable[[], Any]) -> None:
        """Put something into the stream: done at once, or recorded."""
        if self._recording is None:
            work()
        else:
            self._recording.append(work)

    def capture(self, work: Callable[[], None]) -> list[Callable[[], None]]:
        assert self._recording is None
        self._recording = []
        try:
            work()
            return self._recording
        finally:
            self._recording = None

    def replay(self, graph: list[Callable[[], None]]) -> None:
        self.replays += 1
        for work in graph:
            work()

    def current(self) -> Any:
        return nullcontext()

    def close(self) -> None:
        self.check_guards()


class EmulatedGraphs:
    """The graphs of one profile over a folder of device weights."""

    _DTYPES = {TensorProto.FLOAT: np.float32, TensorProto.INT32: np.int32, TensorProto.FLOAT16: np.float16}

    def __init__(
        self, device: EmulatedDevice, profile: Profile, models: Mapping[str, onnx.ModelProto], folder: Path, in_place: bool
    ) -> None:
        self.profile, self.in_place, self.itemsize = profile, in_place, 4
        self._device = device
        self._shapes: dict[str, dict[str, tuple[tuple[int, ...], Any]]] = {}
        self._sessions = {}
        for name, model in models.items():
            self._sessions[name] = load_session(onnxruntime, model.SerializeToString(), 1, folder)
            self._shapes[name] = {value.name: self._described(value) for value in [*model.graph.input, *model.graph.output]}
        self.calls: list[str] = []

    def enqueue(self, graph: str, addresses: Mapping[str, int]) -> None:
        session, shapes, bound = self._sessions[graph], self._shapes[graph], dict(addresses)
        assert set(bound) == set(shapes), set(bound) ^ set(shapes)

        def run() -> None:
            self.calls.append(graph)
            feeds = {value.name: _view(bound[value.name], *shapes[value.name]) for value in session.get_inputs()}
            names = [value.name for value in session.get_outputs()]
            for name, result in zip(names, session.run(names, feeds), strict=True):
                _view(bound[name], *shapes[name])[...] = result

        self._device.submit(run)

    def close(self) -> None:
        self._sessions.clear()

    def _described(self, value: onnx.ValueInfoProto) -> tuple[tuple[int, ...], Any]:
        tensor = value.type.tensor_type
        return tuple(dim.dim_value for dim in tensor.shape.dim), self._DTYPES[tensor.elem_type]


def emulated_loop(
    bundle: Bundle, kernels: HostKernels, folder: Path, profile: Profile, *, in_place: bool = True
) -> tuple[Loop, EmulatedDevice, EmulatedGraphs]:
    """A loop over the graphs of a bundle, products in float32."""
    tensors = weights.open_weights(bundle.path)
    precisions = linear_layers(weights.read_places(bundle.path / weights.FILE_NAME))
    places = write(folder, device_weights(tensors, precisions, TensorProto.FLOAT))
    models = build_tensorrt_graphs(bundle.spec, places, precisions, DeviceForm(TensorProto.FLOAT, in_place), profile)
    device = EmulatedDevice(kernels)
    graphs = EmulatedGraphs(device, profile, models, folder, in_place)
    tables = {name: np.asarray(tensors[name]) for name in TABLES}
    return Loop(bundle.spec, tables, graphs, device), device, graphs


def _view(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype).reshape(shape)
