"""A GPU as the loop sees it: memory, one stream, kernels, captured graphs, events. A thin layer over the CUDA driver.

The context is the calling thread's if it has one (PyCUDA's, PyTorch's), else the device's primary one; it is pushed for
the time of a call, so an engine may be used from any thread, one at a time. Each device object has a stream of its own
unless it is given one, so two generators in one process do not wait for each other.
"""

import ctypes
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from operator import index
from types import ModuleType
from typing import Any, Protocol, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.engines.cuda.compiler import installed, kernels
from bar_edge.runtime.errors import EngineError

Address = int
Argument = Address | np.generic  # an address, or a scalar of exactly the kernel's type
CudaGraph = Any
CudaEvent = Any
_BLOCKS_PER_SM = 8
_DEFAULT_STREAMS = (0, 1, 2)  # null, legacy and per-thread


class Device(Protocol):
    """What the loop asks of a GPU. Everything is put into one stream, in order; only `download` waits."""

    multiprocessors: int
    threads: int  # of a block
    blocks: int  # most blocks of an elementwise kernel

    def allocate(self, size: int) -> Address:
        """Zeroed memory. Raises MemoryError."""

    def free(self, address: Address) -> None:
        """Give memory back."""

    def free_bytes(self) -> int:
        """Memory that could be allocated."""

    def upload(self, address: Address, array: NDArray[Any]) -> None:
        """Copy a dense array to the device."""

    def download(self, address: Address, array: NDArray[Any]) -> None:
        """Fill a dense array from the device, when everything before has run."""

    def copy(self, target: Address, source: Address, size: int) -> None:
        """Copy on the device."""

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Argument]) -> None:
        """Run a kernel of `kernels.cu` in blocks of `threads`."""

    def capture(self, work: "Work") -> CudaGraph:
        """What `work` puts into the stream, as a graph; nothing of it runs yet."""

    def replay(self, graph: CudaGraph) -> None:
        """Run a captured graph."""

    def record(self) -> CudaEvent:
        """Mark this point of the stream; `close` releases the mark."""

    def seconds(self, begin: CudaEvent, end: CudaEvent) -> float:
        """What the stream took from one mark to another. Waits for both."""

    def wait_for(self, stream: int | None) -> None:
        """Wait until another stream, or with None every one, has done what it was given."""

    def current(self) -> Any:
        """A context manager within which the other methods may be called."""

    def close(self) -> None:
        """Release what it holds, memory excepted."""


class Work(Protocol):
    """Something that puts work into the stream."""

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class DeviceArray:
    """Memory of the loop that others may read, through `__cuda_array_interface__`, and have read before its next call.

    It is not to be written, though the interface does not say so: PyTorch takes no array that does.
    """

    address: Address
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    stream: int

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3,
            "strides": None, "stream": self.stream,
        }  # fmt: skip

    def to_pycuda(self) -> Any:
        """A pycuda.gpuarray.GPUArray on the same memory. Raises EngineError without PyCUDA."""
        try:
            gpuarray = import_module("pycuda.gpuarray")
        except ImportError as error:
            raise EngineError(f"this needs PyCUDA ({error}); pip install 'bar-edge[pycuda]'") from error
        return gpuarray.GPUArray(self.shape, self.dtype, gpudata=self.address)


def address_of(array: Any, shape: tuple[int, ...], dtype: Any) -> Address:
    """The address of anybody's dense device array (PyCUDA, PyTorch, CuPy). Raises EngineError if it does not fit."""
    facts = array.__cuda_array_interface__
    found = (tuple(facts["shape"]), np.dtype(facts["typestr"]))
    dense = facts.get("strides") in (None, np.empty(shape, dtype).strides)  # PyCUDA states them always
    if found != (shape, np.dtype(dtype)) or not dense:
        raise EngineError(
            f"a dense device array of {np.dtype(dtype)} {list(shape)} is needed, got {found[1]} {list(found[0])}"
            f"{'' if dense else ' with strides'}"
        )
    return int(facts["data"][0])


def stream_handle(stream: Any) -> int:
    """The handle of a stream: an integer, or an object of cuda-bindings, cuda-core, PyCUDA, PyTorch or CuPy.

    Raises EngineError for anything else.
    """
    if isinstance(stream, SupportsIndex):  # CUstream of cuda-bindings, too
        return index(stream)
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for name in ("handle", "cuda_stream", "ptr"):
        if hasattr(stream, name):
            return int(getattr(stream, name))
    raise EngineError(f"{stream!r} is not a CUDA stream")


def kernel_parameters(arguments: Sequence[Argument]) -> tuple[list[NDArray[Any]], "ctypes.Array[ctypes.c_void_p]"]:
    """What a launch takes: pointers to values, which must live until it returns."""
    values = [np.array(a, dtype=np.uint64) if isinstance(a, int) else np.array(a) for a in arguments]
    return values, (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))


class CudaKernels:
    """The kernels of a cubin on a device, launched into its stream in blocks of `threads` (`CudaDevice.load`)."""

    def __init__(self, device: "CudaDevice", module: Any, threads: int) -> None:
        self._device, self._module, self._threads = device, module, threads
        self._functions: dict[str, Any] = {}

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Argument]) -> None:
        """Put a kernel into the stream. Raises EngineError."""
        call, stream = self._device.call, self._device.stream
        if kernel not in self._functions:
            self._functions[kernel] = call("cuModuleGetFunction", self._module, kernel.encode())
        _values, pointers = kernel_parameters(arguments)
        size = (blocks, 1, 1, self._threads, 1, 1)
        try:
            call("cuLaunchKernel", self._functions[kernel], *size, 0, stream, ctypes.addressof(pointers), 0)
        except EngineError as error:
            raise EngineError(f"{error} of {kernel}") from error


class CudaDevice:
    """The GPU of the calling thread's context, or the first one."""

    def __init__(self, stream: Any = None) -> None:
        """Raises EngineError where there is no driver, no GPU, no compiler for its kernels, or for a default stream."""
        given = None if stream is None else stream_handle(stream)
        if given in _DEFAULT_STREAMS:
            raise EngineError("the default stream cannot be captured into a graph; give a stream that you made")
        self._own_stream = given is None
        self._driver = driver = load_driver()
        current = self.call("cuCtxGetCurrent")
        if int(current):
            self._context, self._primary = current, None
        else:
            self._primary = self.call("cuDeviceGet", 0)
            self._context = self.call("cuDevicePrimaryCtxRetain", self._primary)
        self._modules: list[Any] = []
        self._graphs: list[CudaGraph] = []
        self._events: list[CudaEvent] = []
        self._uploaded: list[NDArray[Any]] = []
        try:
            with self.current():
                device = self.call("cuCtxGetDevice")
                self.sm = capability(driver, device)
                check_compiler(driver)
                cubin = kernels(self.sm)
                count = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
                self.multiprocessors = self.call("cuDeviceGetAttribute", count, device)
                self.blocks = _BLOCKS_PER_SM * self.multiprocessors
                self.threads = 128
                self._kernels = self.load(cubin, self.threads)
                flags = driver.CUstream_flags.CU_STREAM_NON_BLOCKING.value
                self.stream = int(self.call("cuStreamCreate", flags)) if given is None else given
        except BaseException:
            with self.current():
                self._unload()
            self._release()
            raise

    @contextmanager
    def current(self) -> Iterator[None]:
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    def allocate(self, size: int) -> Address:
        driver = self._driver
        status, address = driver.cuMemAlloc(size)
        if status == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
            raise MemoryError(size)
        self._check("cuMemAlloc", status)
        self.call("cuMemsetD8Async", address, 0, size, self.stream)
        return int(address)

    def free(self, address: Address) -> None:
        self.call("cuMemFree", address)

    def free_bytes(self) -> int:
        return int(self.call("cuMemGetInfo")[0])

    def upload(self, address: Address, array: NDArray[Any]) -> None:
        self._uploaded.append(array)  # lives until the stream has surely read it
        self.call("cuMemcpyHtoDAsync", address, array.ctypes.data, array.nbytes, self.stream)

    def download(self, address: Address, array: NDArray[Any]) -> None:
        self.call("cuMemcpyDtoHAsync", array.ctypes.data, address, array.nbytes, self.stream)
        self.call("cuStreamSynchronize", self.stream)
        self._uploaded.clear()

    def copy(self, target: Address, source: Address, size: int) -> None:
        self.call("cuMemcpyDtoDAsync", target, source, size, self.stream)

    def load(self, cubin: bytes, threads: int) -> CudaKernels:
        """Other kernels, for blocks of `threads`; `close` unloads them. Raises EngineError."""
        self._modules.append(self.call("cuModuleLoadData", cubin))
        return CudaKernels(self, self._modules[-1], threads)

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Argument]) -> None:
        self._kernels.launch(kernel, blocks, arguments)

    def capture(self, work: Work) -> CudaGraph:
        driver = self._driver
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.call("cuStreamBeginCapture", self.stream, mode)
        try:
            with _no_garbage_collection():  # which may free somebody's device memory, and so end the capture
                work()
        except BaseException:
            _, graph = driver.cuStreamEndCapture(self.stream)  # what went wrong in `work` is what counts
            if graph is not None and int(graph):
                driver.cuGraphDestroy(graph)
            raise
        graph = self.call("cuStreamEndCapture", self.stream)
        executable = self.call("cuGraphInstantiate", graph, 0)
        self.call("cuGraphDestroy", graph)
        self._graphs.append(executable)
        return executable

    def record(self) -> CudaEvent:
        self._events.append(self.call("cuEventCreate", 0))
        self.call("cuEventRecord", self._events[-1], self.stream)
        return self._events[-1]

    def seconds(self, begin: CudaEvent, end: CudaEvent) -> float:
        for event in (begin, end):
            self.call("cuEventSynchronize", event)
        return 1e-3 * float(self.call("cuEventElapsedTime", begin, end))

    def wait_for(self, stream: int | None) -> None:
        if stream is None:
            self.call("cuCtxSynchronize")
        elif stream != self.stream:
            self.call("cuStreamSynchronize", stream)

    def replay(self, graph: CudaGraph) -> None:
        self.call("cuGraphLaunch", graph, self.stream)

    def close(self) -> None:
        try:
            with self.current():
                self.call("cuStreamSynchronize", self.stream)
                for graph in self._graphs:
                    self.call("cuGraphExecDestroy", graph)
                for event in self._events:
                    self.call("cuEventDestroy", event)
                self._unload()
                if self._own_stream:
                    self.call("cuStreamDestroy", self.stream)
        finally:  # a kernel that failed has broken the context: the next one to ask for it gets a new one
            self._release()

    def _unload(self) -> None:
        for module in self._modules:
            self.call("cuModuleUnload", module)

    def _release(self) -> None:
        if self._primary is not None:
            self.call("cuDevicePrimaryCtxRelease", self._primary)

    def call(self, function: str, *arguments: Any) -> Any:
        """The result of a driver call. Raises EngineError."""
        status, *values = getattr(self._driver, function)(*arguments)
        self._check(function, status)
        return values[0] if len(values) == 1 else values

    def _check(self, function: str, status: Any) -> None:
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"the CUDA driver answered {status.name} to {function}")


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_compiler(driver: ModuleType) -> None:
    """Raise EngineError if NVRTC is of a newer CUDA than the driver, which does not load what that compiles."""
    compiler, _ = installed()
    _, found = driver.cuDriverGetVersion()
    newest = found // 1000
    if int(compiler.partition(".")[0]) > newest:
        raise EngineError(
            f"NVRTC {compiler} compiles what this driver, for CUDA {_dotted(found)}, does not load: install a newer "
            f"driver, or an NVRTC for CUDA {newest} (pip install 'bar-edge[cuda12]' for CUDA 12)"
        )


def load_driver() -> ModuleType:
    """The driver's bindings, initialised. Raises EngineError with what is missing."""
    try:
        driver = import_module("cuda.bindings.driver")
    except ImportError as error:
        raise EngineError(f"cuda-bindings cannot be imported ({error}); pip install 'bar-edge[cuda]'") from error
    try:
        (status,) = driver.cuInit(0)
    except (RuntimeError, OSError) as error:  # the library itself is missing
        raise EngineError("no NVIDIA driver (libcuda) on this machine; install the driver of your GPU") from error
    if status != driver.CUresult.CUDA_SUCCESS:
        raise EngineError(f"the NVIDIA driver does not start ({status.name}); is there a GPU, and may you use it?")
    return driver


def capability(driver: ModuleType, device: Any) -> int:
    """Compute capability of a device: 87 for 8.7."""
    attribute = driver.CUdevice_attribute
    names = ("CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR", "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR")
    (_, major), (_, minor) = (driver.cuDeviceGetAttribute(getattr(attribute, name), device) for name in names)
    return int(10 * major + minor)


def driver_version() -> str | None:
    """CUDA version of the driver, as `13.0`; None without one."""
    try:
        driver = load_driver()
    except EngineError:
        return None
    _, version = driver.cuDriverGetVersion()
    return _dotted(version)


def host_sm() -> int | None:
    """Compute capability of the first GPU of this machine; None if there is none."""
    try:
        driver = load_driver()
    except EngineError:
        return None
    status, device = driver.cuDeviceGet(0)
    return capability(driver, device) if status == driver.CUresult.CUDA_SUCCESS else None


def _dotted(version: int) -> str:
    """13000 of the driver as `13.0`."""
    return f"{version // 1000}.{version % 1000 // 10}"
