"""A CUDA driver that is not there: what `CudaDevice` calls of `cuda.bindings.driver`, with memory on the host.

It keeps books instead of running anything: the context stack, memory, streams, modules, graphs and events that are
held, and every call in order. `answers` makes a call fail. On its clock a kernel, a graph and a copy on the device take
as many milliseconds as `durations` says, everything else takes none.
"""

# ruff: noqa: N802, N815  # the driver's own names

import ctypes
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bar_edge.runtime.engines.cuda import device, module


class CUresult(Enum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901


_OK = CUresult.CUDA_SUCCESS
_COMPUTE_MAJOR, _COMPUTE_MINOR, _SMS = "major", "minor", "multiprocessors"


class FakeDriver:
    """One GPU of compute capability 8.7 with 4 multiprocessors. Handles are numbers."""

    CUresult = CUresult
    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=_COMPUTE_MAJOR,
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=_COMPUTE_MINOR,
        CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT=_SMS,
    )
    CUstream_flags = SimpleNamespace(CU_STREAM_NON_BLOCKING=SimpleNamespace(value=1))
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)

    def __init__(self, memory: int = 2**20, context: int = 0) -> None:
        self.total = memory
        self.contexts = [context] if context else []  # of the calling thread
        self.answers: dict[str, CUresult] = {}
        self.calls: list[tuple[Any, ...]] = []
        self.memory: dict[int, np.ndarray] = {}
        self.held: dict[str, set[int]] = {kind: set() for kind in ("context", "stream", "module", "graph", "event")}
        self.durations = {"cuLaunchKernel": 1.0, "cuGraphLaunch": 1.0, "cuMemcpyDtoDAsync": 1.0}
        self._clock = 0.0
        self._recorded: dict[int, float] = {}  # event -> when
        self.launched: list[tuple[str, tuple[int, ...], int]] = []  # kernel, its six sizes, stream
        self.widths: tuple[int, ...] = ()  # of the parameters that every launch has, in bytes, if they are to be kept
        self.parameters: list[bytes] = []  # of the last launch
        self.capturing = False
        self._next = 100

    def __getattr__(self, name: str) -> Any:
        """cuX(...) runs `_cuX(...)` in a context, notes the call, and gives (status, results...)."""
        if not name.startswith("cu"):
            raise AttributeError(name)
        work = object.__getattribute__(self, f"_{name}")

        def call(*arguments: Any) -> tuple[Any, ...]:
            self.calls.append((name, *arguments))
            if name not in _WITHOUT_CONTEXT:
                assert self.contexts, f"{name} without a current context"
            if name in self.answers:
                return (self.answers[name],) if name in _WITHOUT_RESULT else (self.answers[name], 0)
            result = work(*arguments)
            if not self.capturing:
                self._clock += self.durations.get(name, 0)
            if isinstance(result, CUresult):
                return (result,) if name in _WITHOUT_RESULT else (result, 0)
            return (_OK,) if result is None else (_OK, *(result if isinstance(result, tuple) else (result,)))

        return call

    def names(self) -> list[str]:
        """The calls, without their arguments."""
        return [name for name, *_ in self.calls]

    def _cuInit(self, flags: int) -> None: ...

    def _cuDeviceGet(self, ordinal: int) -> int:
        return ordinal

    def _cuDeviceGetAttribute(self, attribute: str, device: int) -> int:
        return {_COMPUTE_MAJOR: 8, _COMPUTE_MINOR: 7, _SMS: 4}[attribute]

    def _cuDevicePrimaryCtxRetain(self, device: int) -> int:
        return self._hold("context")

    def _cuDevicePrimaryCtxRelease(self, device: int) -> None:
        assert len(self.held["context"]) == 1
        self.held["context"].clear()

    def _cuCtxGetCurrent(self) -> int:
        return self.contexts[-1] if self.contexts else 0

    def _cuCtxGetDevice(self) -> int:
        return 0

    def _cuCtxPushCurrent(self, context: int) -> None:
        self.contexts.append(context)

    def _cuCtxPopCurrent(self) -> int:
        return self.contexts.pop()

    def _cuMemAlloc(self, size: int) -> int | CUresult:
        if size > self._free():
            return CUresult.CUDA_ERROR_OUT_OF_MEMORY
        array = np.full(size, 0xEE, dtype=np.uint8)
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    def _cuMemFree(self, address: int) -> None:
        del self.memory[address]

    def _cuMemGetInfo(self) -> tuple[int, int]:
        return self._free(), self.total

    def _cuMemsetD8Async(self, address: int, value: int, size: int, stream: int) -> None:
        ctypes.memset(address, value, size)

    def _cuMemcpyHtoDAsync(self, target: int, source: int, size: int, stream: int) -> None:
        ctypes.memmove(target, source, size)

    _cuMemcpyDtoHAsync = _cuMemcpyDtoDAsync = _cuMemcpyHtoDAsync

    def _cuStreamCreate(self, flags: int) -> int:
        return self._hold("stream")

    def _cuStreamDestroy(self, stream: int) -> None:
        self.held["stream"].remove(stream)

    def _cuStreamSynchronize(self, stream: int) -> None: ...

    def _cuCtxSynchronize(self) -> None: ...

    def _cuDriverGetVersion(self) -> int:
        return 13000

    def _cuStreamBeginCapture(self, stream: int, mode: int) -> CUresult | None:
        if stream == 0:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED
        self.capturing = True
        return None

    def _cuStreamEndCapture(self, stream: int) -> int:
        self.capturing = False
        return self._hold("graph")

    def _cuGraphInstantiate(self, graph: int, flags: int) -> int:
        return self._hold("graph")

    def _cuGraphLaunch(self, graph: int, stream: int) -> None:
        assert graph in self.held["graph"]

    def _cuGraphDestroy(self, graph: int) -> None:
        self.held["graph"].remove(graph)

    _cuGraphExecDestroy = _cuGraphDestroy

    def _cuEventCreate(self, flags: int) -> int:
        return self._hold("event")

    def _cuEventRecord(self, event: int, stream: int) -> None:
        assert event in self.held["event"] and not self.capturing
        self._recorded[event] = self._clock

    def _cuEventSynchronize(self, event: int) -> None:
        assert event in self._recorded

    def _cuEventElapsedTime(self, begin: int, end: int) -> float:
        return self._recorded[end] - self._recorded[begin]

    def _cuEventDestroy(self, event: int) -> None:
        self.held["event"].remove(event)

    def _cuModuleLoadData(self, cubin: bytes) -> int:
        return self._hold("module")

    def _cuModuleUnload(self, module: int) -> None:
        self.held["module"].remove(module)

    def _cuModuleGetFunction(self, module: int, name: bytes) -> str:
        return name.decode()

    def _cuLaunchKernel(self, function: str, *arguments: int) -> None:
        *sizes, shared, stream, pointers, extra = arguments
        assert (shared, extra) == (0, 0)
        self.launched.append((function, tuple(sizes), stream))
        addresses = (ctypes.c_void_p * len(self.widths)).from_address(pointers)
        self.parameters = [ctypes.string_at(*parameter) for parameter in zip(addresses, self.widths, strict=True)]

    def _free(self) -> int:
        return self.total - sum(array.nbytes for array in self.memory.values())

    def _hold(self, kind: str) -> int:
        self._next += 1
        self.held[kind].add(self._next)
        return self._next


def stand_in(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> FakeDriver:
    """A fake driver in the place of the real one, with nothing to compile; all that the engine `cuda` needs."""
    monkeypatch.setattr(device, "import_module", lambda name: driver)
    monkeypatch.setattr(device, "kernels", lambda sm: f"cubin for {sm}".encode())
    monkeypatch.setattr(device, "installed", lambda: ("13.0", (87,)))
    monkeypatch.setattr(module, "compile_source", lambda source, sm: b"cubin of the model")
    return driver


_WITHOUT_CONTEXT = {
    "cuInit", "cuDeviceGet", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease",
    "cuCtxGetCurrent", "cuCtxPushCurrent", "cuDriverGetVersion",
}  # fmt: skip
_WITHOUT_RESULT = {
    "cuInit", "cuDevicePrimaryCtxRelease", "cuCtxPushCurrent", "cuMemFree", "cuMemsetD8Async", "cuMemcpyHtoDAsync",
    "cuMemcpyDtoHAsync", "cuMemcpyDtoDAsync", "cuStreamDestroy", "cuStreamSynchronize", "cuStreamBeginCapture",
    "cuEventRecord", "cuEventSynchronize", "cuEventDestroy", "cuGraphLaunch", "cuGraphDestroy", "cuGraphExecDestroy",
    "cuModuleUnload", "cuLaunchKernel", "cuCtxSynchronize",
}  # fmt: skip
