"""The driver's side of the GPU: real where this machine has one, a driver that keeps books everywhere."""

import gc
import struct
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest

from bar_edge.runtime.engines.cuda import device as device_module
from bar_edge.runtime.engines.cuda.device import (
    CudaDevice,
    DeviceArray,
    address_of,
    host_sm,
    load_driver,
    stream_handle,
)
from bar_edge.runtime.errors import EngineError

from .fake_driver import CUresult, FakeDriver, stand_in

THEIRS = 77  # a stream, or a context, that somebody else made


@pytest.fixture
def install(monkeypatch):
    """Puts a fake driver in the place of the real one; afterwards the stack of contexts is what it was."""
    installed = []

    def put(driver):
        installed.append((driver, list(driver.contexts)))
        return stand_in(monkeypatch, driver)

    yield put
    for driver, contexts in installed:
        assert driver.contexts == contexts


@pytest.fixture
def driver(install):
    return install(FakeDriver())


# ---- what others give ----


class WithProtocol:
    """A stream of cuda-core, which also has a handle that is not a number."""

    handle = object()

    def __cuda_stream__(self):
        return 0, THEIRS


@pytest.mark.parametrize(
    "stream",
    [
        THEIRS,
        WithProtocol(),
        SimpleNamespace(handle=THEIRS),
        SimpleNamespace(cuda_stream=THEIRS),
        SimpleNamespace(ptr=THEIRS),
    ],
    ids=["integer", "protocol", "pycuda", "pytorch", "cupy"],
)
def test_streams_of_other_libraries_are_understood(stream):
    assert stream_handle(stream) == THEIRS


def test_what_is_no_stream_is_refused():
    with pytest.raises(EngineError, match="'stream' is not a CUDA stream"):
        stream_handle("stream")


def interface(**changed):
    facts = {"shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": 3}
    return SimpleNamespace(__cuda_array_interface__=facts | changed)


@pytest.mark.parametrize("strides", [None, (12, 4)], ids=["none", "pycuda"])
def test_the_address_of_a_dense_array(strides):
    assert address_of(interface(strides=strides), (2, 3), np.float32) == 4096
    assert address_of(interface(), (2, 3), np.float32) == 4096


@pytest.mark.parametrize(
    ("changed", "found"),
    [
        ({"shape": (3, 2)}, r"float32 \[3, 2\]$"),
        ({"typestr": "<f2"}, r"float16 \[2, 3\]$"),
        ({"typestr": "|u1"}, r"uint8 \[2, 3\]$"),
        ({"strides": (4, 8)}, r"float32 \[2, 3\] with strides$"),
    ],
    ids=["shape", "half", "bytes", "transposed"],
)
def test_an_array_that_does_not_fit_is_refused(changed, found):
    with pytest.raises(EngineError, match=r"a dense device array of float32 \[2, 3\] is needed, got " + found):
        address_of(interface(**changed), (2, 3), np.float32)


def test_memory_of_the_loop_for_others():
    array = DeviceArray(4096, (2, 3), np.dtype(np.float32), THEIRS)
    assert array.__cuda_array_interface__ == {
        "shape": (2, 3), "typestr": "<f4", "data": (4096, False), "version": 3, "strides": None, "stream": THEIRS,
    }  # fmt: skip
    assert address_of(array, (2, 3), np.float32) == 4096


def test_pycuda_gets_an_array_on_the_same_memory(monkeypatch):
    gpuarray = SimpleNamespace(GPUArray=lambda shape, dtype, gpudata: (shape, dtype, gpudata))
    monkeypatch.setattr(device_module, "import_module", lambda name: gpuarray)
    array = DeviceArray(4096, (2, 3), np.dtype(np.float32), THEIRS)
    assert array.to_pycuda() == ((2, 3), np.float32, 4096)


def test_without_pycuda_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(EngineError, match=r"needs PyCUDA .*; pip install 'bar-edge\[pycuda\]'"):
        DeviceArray(4096, (2, 3), np.dtype(np.float32), THEIRS).to_pycuda()


# ---- machines without a GPU ----


def test_a_machine_without_a_driver_is_told_so():
    bindings = pytest.importorskip("cuda.bindings.driver")
    try:
        bindings.cuInit(0)
    except RuntimeError:
        with pytest.raises(EngineError, match=r"no NVIDIA driver \(libcuda\) on this machine; install the driver"):
            CudaDevice()
        assert host_sm() is None
    else:
        pytest.skip("this machine has an NVIDIA driver")


def test_bindings_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(EngineError, match=r"cuda-bindings cannot be imported .*; pip install 'bar-edge\[cuda\]'"):
        load_driver()


def test_a_driver_that_does_not_start_is_named(driver):
    driver.answers["cuInit"] = CUresult.CUDA_ERROR_NO_DEVICE
    with pytest.raises(EngineError, match=r"does not start \(CUDA_ERROR_NO_DEVICE\); is there a GPU"):
        load_driver()


def test_the_capability_of_this_machine(driver):
    assert host_sm() == 87
    driver.answers["cuDeviceGet"] = CUresult.CUDA_ERROR_NO_DEVICE
    assert host_sm() is None


# ---- a device ----


def test_a_device_is_what_its_gpu_is(driver):
    device = CudaDevice()
    assert (device.sm, device.blocks, device.threads) == (87, 32, 128)
    assert ("cuModuleLoadData", b"cubin for 87") in driver.calls


def test_closing_gives_everything_back(driver):
    device = CudaDevice()
    with device.current():
        device.capture(lambda: None)
    device.close()
    assert not any(driver.held.values()), driver.held
    assert driver.names().index("cuStreamSynchronize") < driver.names().index("cuGraphExecDestroy")


def test_the_threads_own_context_is_used_and_left_alone(install):
    driver = install(FakeDriver(context=THEIRS))
    device = CudaDevice()
    with device.current():
        assert driver.contexts == [THEIRS, THEIRS]
    device.close()
    assert not {"cuDevicePrimaryCtxRetain", "cuDevicePrimaryCtxRelease"} & set(driver.names())


def test_the_context_is_current_within_a_call_only(driver):
    device = CudaDevice()
    assert driver.contexts == []
    with pytest.raises(KeyError), device.current():
        assert driver.contexts == [*driver.held["context"]]
        raise KeyError
    assert driver.contexts == []


def test_a_given_stream_is_used_and_not_destroyed(driver):
    device = CudaDevice(SimpleNamespace(cuda_stream=THEIRS))
    with device.current():
        address = device.allocate(8)
        device.upload(address, np.zeros(8, np.uint8))
        device.free(address)
    device.close()
    assert device.stream == THEIRS
    assert [call[-1] for call in driver.calls if call[0].endswith("Async")] == [THEIRS, THEIRS]
    assert not {"cuStreamCreate", "cuStreamDestroy"} & set(driver.names())


def test_memory_is_zeroed_counted_and_freed(driver):
    device = CudaDevice()
    with device.current():
        address = device.allocate(64)
        assert device.free_bytes() == 2**20 - 64
        found = np.ones(64, np.uint8)
        device.download(address, found)
        device.free(address)
        assert device.free_bytes() == 2**20
    assert not found.any()


def test_too_little_memory_is_a_memory_error(driver):
    device = CudaDevice()
    with device.current(), pytest.raises(MemoryError):
        device.allocate(2**21)


def test_copies_are_in_the_devices_stream_and_only_a_download_waits(driver):
    device = CudaDevice()
    array = np.arange(16, dtype=np.int32)
    with device.current():
        first, second = device.allocate(64), device.allocate(64)
        driver.calls.clear()
        device.upload(first, array)
        device.copy(second, first, 64)
        assert "cuStreamSynchronize" not in driver.names()
        found = np.zeros_like(array)
        device.download(second, found)
    np.testing.assert_array_equal(found, array)
    assert {call[-1] for call in driver.calls if call[0].startswith("cuMemcpy")} == {device.stream}
    assert driver.names()[-2] == "cuStreamSynchronize"  # before the context is popped


def test_a_launch_passes_addresses_and_scalars_of_their_types(driver):
    driver.widths = (8, 4, 8)
    device = CudaDevice()
    with device.current():
        for _ in range(2):
            device.launch("advance", 3, (2**40 + 1, np.int32(-5), np.uint64(2**63)))
    assert driver.launched == [("advance", (3, 1, 1, 128, 1, 1), device.stream)] * 2
    address, scalar, seed = driver.parameters
    assert struct.unpack("<Q", address) == (2**40 + 1,)
    assert struct.unpack("<i", scalar) == (-5,)
    assert struct.unpack("<Q", seed) == (2**63,)
    assert driver.names().count("cuModuleGetFunction") == 1


def test_a_captured_graph_is_replayed_in_the_stream(driver):
    device = CudaDevice()
    with device.current():
        seen = []
        graph = device.capture(lambda: seen.append(driver.capturing))
        device.replay(graph)
    assert seen == [True]
    assert not driver.capturing
    assert ("cuGraphLaunch", graph, device.stream) in driver.calls
    assert driver.held["graph"] == {graph}  # the one it was made from is gone


def test_nothing_is_collected_within_a_capture(driver):
    """What would be freed there may hold device memory, and freeing that is not allowed."""
    device = CudaDevice()
    with device.current():
        seen = []
        device.capture(lambda: seen.append(gc.isenabled()))
        with pytest.raises(KeyError):
            device.capture({}.popitem)
        assert seen == [False] and gc.isenabled()
        gc.disable()
        try:
            device.capture(lambda: None)
            assert not gc.isenabled()
        finally:
            gc.enable()


def test_another_stream_is_waited_for_or_all_of_them(driver):
    device = CudaDevice()
    with device.current():
        driver.calls.clear()
        device.wait_for(device.stream)
        device.wait_for(5)
        device.wait_for(None)
    assert [call[:2] for call in driver.calls if "Synchronize" in call[0]] == [
        ("cuStreamSynchronize", 5), ("cuCtxSynchronize",),
    ]  # fmt: skip


@pytest.mark.parametrize(("compiler", "message"), [("12.9", None), ("13.1", None), ("14.0", "NVRTC 14.0")])
def test_an_nvrtc_of_a_newer_cuda_than_the_driver_is_refused(driver, monkeypatch, compiler, message):
    monkeypatch.setattr(device_module, "installed", lambda: (compiler, (87,)))
    with nullcontext() if message is None else pytest.raises(EngineError, match=f"{message}.*for CUDA 13.0"):
        CudaDevice().close()
    assert not driver.held["context"]


def test_a_capture_ends_even_if_the_work_fails(driver):
    device = CudaDevice()
    with device.current(), pytest.raises(KeyError):
        device.capture({}.popitem)
    assert not driver.capturing


def test_a_failed_capture_leaves_no_graph(driver):
    device = CudaDevice()
    with device.current(), pytest.raises(KeyError):
        device.capture({}.popitem)
    assert not driver.held["graph"]


def test_what_failed_in_a_capture_is_what_is_reported(driver):
    device = CudaDevice()
    driver.answers["cuStreamEndCapture"] = CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
    with device.current(), pytest.raises(KeyError):
        device.capture({}.popitem)


def test_time_passes_between_marks_for_what_lies_between_them(driver):
    driver.durations |= {"cuLaunchKernel": 250.0, "cuGraphLaunch": 4000.0}
    device = CudaDevice()
    with device.current():
        graph = device.capture(lambda: device.launch("advance", 1, (0,)))
        begin = device.record()
        device.launch("advance", 1, (0,))
        middle = device.record()
        device.replay(graph)
        device.replay(graph)
        end = device.record()
        assert (device.seconds(begin, middle), device.seconds(middle, end)) == (0.25, 8.0)
        assert device.seconds(begin, end) == 8.25
    waited = [call[1] for call in driver.calls if call[0] == "cuEventSynchronize"]
    assert waited[:2] == [begin, middle]  # or the time would be asked for before it is known
    assert len(driver.held["event"]) == 3
    device.close()
    assert not driver.held["event"]


def test_kernels_of_another_cubin_are_launched_in_the_devices_stream(driver):
    device = CudaDevice()
    with device.current():
        device.load(b"another", 64).launch("theirs", 3, (2**40, np.int32(1), np.int32(2)))
    assert ("cuModuleLoadData", b"another") in driver.calls
    assert driver.launched == [("theirs", (3, 1, 1, 64, 1, 1), device.stream)]
    assert len(driver.held["module"]) == 2  # and the device's own
    device.close()
    assert not driver.held["module"]


def test_what_is_uploaded_lives_until_the_stream_has_read_it(driver):
    device = CudaDevice()
    with device.current():
        address, array = device.allocate(16), np.arange(4.0, dtype=np.float32)
        device.upload(address, array)
        alive = weakref.ref(array)
        del array
        assert alive() is not None
        device.download(address, np.empty(4, dtype=np.float32))
        assert alive() is None
        device.free(address)
    device.close()


def test_what_the_driver_refuses_is_an_engine_error_by_name(driver):
    device = CudaDevice()
    driver.answers["cuMemcpyDtoDAsync"] = CUresult.CUDA_ERROR_INVALID_VALUE
    with device.current(), pytest.raises(EngineError, match="the CUDA driver answered CUDA_ERROR_INVALID_VALUE"):
        device.copy(1, 2, 3)


def test_the_default_stream_is_refused_by_name(driver):
    """PyTorch's current stream is 0 unless another one was made, and that one cannot be captured."""
    with pytest.raises(EngineError, match="default stream"):
        device = CudaDevice(SimpleNamespace(cuda_stream=0))
        with device.current():
            device.capture(lambda: None)


def test_a_device_that_does_not_start_leaves_nothing_behind(driver, monkeypatch):
    def fail(sm):
        raise EngineError("no NVRTC")

    monkeypatch.setattr(device_module, "kernels", fail)
    with pytest.raises(EngineError, match="no NVRTC"):
        CudaDevice()
    assert not any(driver.held.values()), driver.held


def test_a_context_that_a_kernel_broke_is_given_up(driver):
    device = CudaDevice()
    driver.answers["cuStreamSynchronize"] = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(EngineError, match="answered CUDA_ERROR_INVALID_VALUE to cuStreamSynchronize"):
        device.close()
    assert not driver.held["context"]


# ---- a real one ----


def test_a_real_gpu_does_the_same():
    try:
        device = CudaDevice()
    except EngineError as error:
        pytest.skip(f"no GPU here: {error}")
    with device.current():
        token, copied = device.allocate(4), device.allocate(4)
        device.upload(token, np.array([41], np.int32))
        device.launch("advance", 1, (token,))  # loads it, which a capture may not allow
        graph = device.capture(lambda: device.launch("advance", 1, (token,)))
        begin = device.record()
        for _ in range(3):
            device.replay(graph)
        assert 0 < device.seconds(begin, device.record()) < 1
        device.copy(copied, token, 4)
        found = np.zeros(1, np.int32)
        device.download(copied, found)
        assert found == 45
        free = device.free_bytes()
        with pytest.raises(MemoryError):
            device.allocate(2 * free)
        device.free(token)
        device.free(copied)
    device.close()
