"""The engine `cuda`, its command line and its tests for a GPU through the real bindings, on a driver made for this.

`driver_stub.cpp` says what it answers. A process loads one libcuda, so everything here runs in processes of its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bar_edge.benchmarks.gpu_token import BARRIER, LAUNCH, PHASES, PROGRAMMATIC
from bar_edge.export.prepack import prepack_bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.cuda.compiler import compile_source
from bar_edge.runtime.engines.cuda.module import MODEL
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.cuda.timeline import Timeline
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.noise import SeededNoise

from .emulated_engine import kernel_loop
from .host import build

STUB = Path(__file__).with_name("driver_stub.cpp")
SM, MEMORY = 90, 2**30  # of its GPU
BATCHES = ([1], [3, 2])  # classes
TICK = 1e-3  # seconds that a kernel takes on its clock
PROGRAM = """
import ctypes, json, sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from cuda.bindings import driver
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.cuda.device import CudaDevice
from bar_edge.runtime.engines.cuda.engine import start
from bar_edge.runtime.engines.cuda.timeline import Timeline
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.noise import SeededNoise

def of(returned):
    status, *values = returned
    assert status == driver.CUresult.CUDA_SUCCESS, status
    return values[0] if values else None

def held():
    stub = ctypes.CDLL("libcuda.so.1")
    stub.stub_held.restype = ctypes.c_char_p
    return json.loads(stub.stub_held())

def context():
    of(driver.cuInit(0))
    of(driver.cuCtxSetCurrent(of(driver.cuDevicePrimaryCtxRetain(of(driver.cuDeviceGet(0))))))
"""
DRAW = """
def batch_of(classes):
    noise = SeededNoise(3, range(5, 5 + len(classes)))
    return Batch(np.array(classes), bundle.recipe, noise, noise.orders(bundle.spec.num_tokens))

bundle, made = Bundle.open(sys.argv[1]), {}
engine = start(bundle, 1)
for i, classes in enumerate(json.loads(sys.argv[3])):
    made[f"bits_{i}"], made[f"images_{i}"] = engine.draw(batch_of(classes))
    made[f"latents_{i}"] = engine.last_latents()
    array = engine.images_on_device()
    with engine.device.current():
        made[f"on_device_{i}"] = np.empty(array.shape, array.dtype)
        engine.device.download(array.address, made[f"on_device_{i}"])
timeline = Timeline(engine.device)
engine.draw(batch_of([1]), timeline=timeline)
for stage, seconds in timeline.seconds().items():
    made[f"seconds_{stage}"] = np.array(seconds)
engine.close()
after_first = held()

context()  # of the calling thread, as PyCUDA and PyTorch leave it
stream = of(driver.cuStreamCreate(0))
engine = start(bundle, 1, stream)
with ThreadPoolExecutor(1) as another_thread:
    made["bits_own"], made["images_own"] = another_thread.submit(engine.draw, batch_of([1])).result()
cells = np.random.default_rng(1).integers(0, 2, (2, bundle.spec.image_seq_len, bundle.spec.token_size))
cells = cells.astype(np.float32)
address = of(driver.cuMemAlloc(cells.nbytes))
of(driver.cuMemcpyHtoD(address, cells, cells.nbytes))

class OnDevice:
    __cuda_array_interface__ = {
        "shape": cells.shape, "typestr": "<f4", "data": (int(address), False), "version": 3, "stream": int(stream)
    }
    def __len__(self):
        return len(cells)

made["decoded"], made["decoded_on_device"] = engine.decode(cells), engine.decode(OnDevice())
engine.close()
of(driver.cuMemFree(address))
of(driver.cuStreamDestroy(stream))
of(driver.cuDevicePrimaryCtxRelease(0))
np.savez(sys.argv[2], cells=cells, **made)
print(json.dumps([after_first, held()]))
"""
REFUSED = """
for no_stream in (0, "stream"):
    try:
        CudaDevice(no_stream)
    except EngineError as error:
        print(error)
context()
almost_all = of(driver.cuMemAlloc(int(sys.argv[2]) - 2**16))
try:
    start(Bundle.open(sys.argv[1]), 1)
except EngineError as error:
    print(error)
of(driver.cuMemFree(almost_all))
of(driver.cuDevicePrimaryCtxRelease(0))
print(json.dumps(held()))
"""
WRONG_USE = """
from bar_edge.runtime.engines.cuda.compiler import kernels

answers = {}
def note(what, returned):
    answers[what] = returned[0].name.removeprefix("CUDA_ERROR_")

def launch(what, function, *arguments, blocks=1, threads=1):
    values = [np.array(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
    size = (blocks, 1, 1, threads, 1, 1)
    note(what, driver.cuLaunchKernel(function, *size, 0, stream, ctypes.addressof(pointers), 0))

note("before cuInit", driver.cuDeviceGet(0))
of(driver.cuInit(0))
note("no context", driver.cuMemAlloc(64))
note("second device", driver.cuDeviceGet(1))
context()
stream, other = of(driver.cuStreamCreate(1)), of(driver.cuStreamCreate(0))
memory, freed = of(driver.cuMemAlloc(100)), of(driver.cuMemAlloc(100))
host = np.zeros(100, dtype=np.uint8)
of(driver.cuMemFree(freed))
note("too much memory", driver.cuMemAlloc(2**40))
note("no memory", driver.cuMemAlloc(0))
note("freed twice", driver.cuMemFree(freed))
note("copy to freed memory", driver.cuMemcpyHtoDAsync(freed, host.ctypes.data, 100, stream))
note("copy beyond the end", driver.cuMemcpyDtoHAsync(host.ctypes.data, int(memory) + 1, 100, stream))
note("unknown stream", driver.cuMemsetD8Async(memory, 0, 100, 77))
note("event not recorded", driver.cuEventElapsedTime(of(driver.cuEventCreate(0)), of(driver.cuEventCreate(0))))

note("not a cubin", driver.cuModuleLoadData(bytes(64)))
note("cubin for another GPU", driver.cuModuleLoadData(kernels(80)))
module = of(driver.cuModuleLoadData(kernels(90)))
note("unknown kernel", driver.cuModuleGetFunction(module, b"no_such_kernel"))
note("kernel of another module", driver.cuModuleGetFunction(module, b"norm_modulate"))
advance = of(driver.cuModuleGetFunction(module, b"advance"))
of(driver.cuMemsetD8Async(memory, 0, 100, stream))
launch("a kernel", advance, np.uint64(int(memory)))
launch("no blocks", advance, np.uint64(int(memory)), blocks=0)
launch("too many threads", advance, np.uint64(int(memory)), threads=2048)
launch("memory of the host", advance, np.uint64(host.ctypes.data))
launch("freed memory", advance, np.uint64(int(freed)))

mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
note("end without begin", driver.cuStreamEndCapture(stream))
note("capture of the default stream", driver.cuStreamBeginCapture(0, mode))
for what, forbidden in {
    "synchronization": lambda: driver.cuStreamSynchronize(stream),
    "allocation": lambda: driver.cuMemAlloc(64),
    "release": lambda: driver.cuMemFree(memory),
    "upload": lambda: driver.cuMemcpyHtoDAsync(memory, host.ctypes.data, 100, stream),
}.items():
    of(driver.cuStreamBeginCapture(stream, mode))
    note(f"{what} in a capture", forbidden())
    launch(f"kernel after {what}", advance, np.uint64(int(memory)))
    note(f"end after {what}", driver.cuStreamEndCapture(stream))
of(driver.cuStreamBeginCapture(stream, mode))
note("another stream while one captures", driver.cuStreamSynchronize(other))
launch("a captured kernel", advance, np.uint64(int(memory)))
graph = of(driver.cuStreamEndCapture(stream))
executable = of(driver.cuGraphInstantiate(graph, 0))
of(driver.cuGraphDestroy(graph))
note("destroyed graph", driver.cuGraphInstantiate(graph, 0))
for _ in range(2):
    of(driver.cuGraphLaunch(executable, stream))
of(driver.cuMemcpyDtoH(host.ctypes.data, memory, 4))
answers["token"] = int(host.view(np.int32)[0])  # one launch, and two of the graph
of(driver.cuMemFree(memory))
note("graph on freed memory", driver.cuGraphLaunch(executable, stream))
of(driver.cuModuleUnload(module))
launch("kernel of an unloaded module", advance, np.uint64(int(memory)))
print(json.dumps(answers))
"""
PRODUCT_FIGURES = """
from bar_edge.benchmarks import gpu_products

gpu_products.SHAPES, gpu_products.ROWS = ((256, 72),), (2, 32)
gpu_products._STACK_BYTES, gpu_products._REPEATED = 100_000, 1000
gpu_products._pytorch = lambda *shape: None
device = CudaDevice()
seconds = [figure.seconds for figure in gpu_products.measure(device) if figure]
device.close()
print(json.dumps([seconds, held()]))
"""
TOKEN_FIGURES = """
import sys
from pathlib import Path
from bar_edge.benchmarks import gpu_products, gpu_token

gpu_products._RUNS = gpu_token._REPLAYS = gpu_token._PHASE_REPLAYS = 1
gpu_token.main([Path(sys.argv[1])], Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def bundle(patch1, tmp_path_factory):
    return prepack_bundle(patch1.bundle, tmp_path_factory.mktemp("prepacked") / "bundle")


@pytest.fixture(scope="module")
def run(host, host_model, tmp_path_factory):
    """Run a command of Python with the driver, its output; skips where it cannot be made or there is no NVRTC."""
    pytest.importorskip("cuda.bindings.driver", reason="the package cuda-bindings is not installed")
    if not sys.platform.startswith("linux"):
        pytest.skip("the driver is made for Linux")
    try:
        compile_source(MODEL, SM)
    except EngineError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("driver")
    library = folder / "libcuda.so.1"
    subprocess.run(["g++", "-std=c++20", "-O1", "-Wall", "-shared", "-fPIC", STUB, "-o", library, "-ldl"], check=True)
    settings = {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("LD_LIBRARY_PATH")])),
        "BAR_EDGE_STUB_KERNELS": f"{host.path}:{host_model.path}:{build(PHASES, folder)}",
    }

    def call(*arguments):
        command = [sys.executable, "-X", "faulthandler", *map(str, arguments)]
        done = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


@pytest.fixture(scope="module")
def drawn(run, bundle, tmp_path_factory):
    """What the engine made, and how much it left in both of its lives."""
    file = tmp_path_factory.mktemp("drawn") / "drawn.npz"
    left = json.loads(run("-c", PROGRAM + DRAW, bundle.path, file, json.dumps(BATCHES)))
    with np.load(file) as stored:
        return dict(stored), left


@pytest.fixture
def emulate(bundle, host, host_model):
    def make(images):
        profile = Profile.of(images, guided=True, passes=len(bundle.recipe.allocation))
        return kernel_loop(bundle, host, host_model, profile)

    return make


def batch_of(bundle, classes):
    noise = SeededNoise(3, range(5, 5 + len(classes)))
    return Batch(np.array(classes), bundle.recipe, noise, noise.orders(bundle.spec.num_tokens))


@pytest.mark.parametrize(("number", "classes"), [*enumerate(BATCHES)])
def test_the_engine_draws_what_the_emulated_loop_draws(bundle, drawn, emulate, number, classes):
    made, _ = drawn
    loop = emulate(len(classes)).loop
    bits, images = loop.draw(batch_of(bundle, classes))
    np.testing.assert_array_equal(made[f"bits_{number}"], bits)
    np.testing.assert_array_equal(made[f"images_{number}"], images)
    np.testing.assert_array_equal(made[f"on_device_{number}"], images)
    np.testing.assert_array_equal(made[f"latents_{number}"], loop.last_latents(len(classes)))


def test_a_given_stream_the_callers_context_and_another_thread_draw_the_same(drawn):
    made, _ = drawn
    np.testing.assert_array_equal(made["bits_own"], made["bits_0"])
    np.testing.assert_array_equal(made["images_own"], made["images_0"])


def test_bits_on_the_device_are_decoded(drawn, emulate):
    made, _ = drawn
    np.testing.assert_array_equal(made["decoded"], emulate(1).loop.decode(made["cells"]))
    np.testing.assert_array_equal(made["decoded_on_device"], made["decoded"])


def test_the_stages_take_as_many_kernels_as_on_the_emulated_device(bundle, drawn, emulate):
    made, _ = drawn
    emulated = emulate(1)
    timeline = Timeline(emulated.device)
    emulated.loop.draw(batch_of(bundle, [1]), timeline=timeline)
    for stage, seconds in timeline.seconds().items():
        np.testing.assert_allclose(made[f"seconds_{stage}"], np.array(seconds) * TICK, rtol=1e-5)


def test_closed_engines_leave_nothing(drawn):
    _, left = drawn
    for held in left:
        assert not any(held.values()), held


def test_an_engine_that_cannot_start_says_so_and_leaves_nothing(run, bundle):
    *no_streams, error, held = run("-c", PROGRAM + REFUSED, bundle.path, MEMORY).splitlines()
    assert ["stream" in told for told in no_streams] == [True, True]
    assert "its weights need" in error and "MiB are free" in error
    assert not any(json.loads(held).values()), held


def test_the_command_line_finds_proves_and_draws(run, bundle, tmp_path):
    command = ("-c", "from bar_edge.runtime.cli import main; main()")
    engines = json.loads(run(*command, "doctor", "--json"))["engines"]
    assert engines["cuda"] == {"usable": True, "detail": "SM 9.0, driver for CUDA 13.0"}
    proof = json.loads(run(*command, "verify", bundle.path, "--engine", "cuda", "--json"))
    assert proof["passed"] and proof["selftest"]["engine"] == "cuda"
    run(*command, "generate", bundle.path, "--class", 1, "--num", 2, "--engine", "cuda", "-o", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("0*.png"))) == 2


def test_products_are_timed(run):
    seconds, held = json.loads(run("-c", PROGRAM + PRODUCT_FIGURES))
    assert seconds and all(one == pytest.approx(TICK) for one in seconds)  # a product is one kernel
    assert not any(held.values()), held


def test_a_token_is_timed_kernel_by_kernel(run, bundle, drawn, tmp_path):
    made, _ = drawn
    run("-c", TOKEN_FIGURES, bundle.path, tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    token = report["tokens"][bundle.path.name]
    launches = np.sum([made[f"seconds_{part}"][0] for part in ("trunk", "head")]) / TICK - 1  # the next token
    assert token["launches"] == pytest.approx(launches)
    assert token["seconds"] == pytest.approx(launches * TICK)
    layers, passes = bundle.spec.num_layers, len(bundle.recipe.allocation)
    by_kernel = {one["kernel"]: one for one in token["kernels"] if not one["layer"]}
    assert {name: by_kernel[name]["launches"] for name in ("attend_step", "sample_pass", "place_token")} == {
        "attend_step": layers, "sample_pass": passes, "place_token": 1,
    }  # fmt: skip
    for one in token["kernels"]:
        assert one["seconds"] == pytest.approx(one["launches"] * TICK), one
        assert bool(one["weight_bytes"]) == bool(one["layer"])
    assert sum(one["launches"] for one in token["kernels"]) == token["launches"]
    assert report["phases"][LAUNCH] == report["phases"][PROGRAMMATIC] == pytest.approx(TICK)
    assert "COOPERATIVE_LAUNCH_TOO_LARGE" in report["phases"][BARRIER]


def test_what_is_tested_on_real_hardware_passes(run):
    files = [Path(__file__).with_name(f"test_{name}.py") for name in ("device", "kernels", "model_kernels")]
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "gpu", *files)
    assert " passed" in told and "skipped" not in told


def test_wrong_use_is_answered_as_cuda_answers_it(run):
    in_capture = {}
    for what in ("synchronization", "allocation", "release", "upload"):
        in_capture[f"{what} in a capture"] = "STREAM_CAPTURE_UNSUPPORTED"
        in_capture[f"kernel after {what}"] = in_capture[f"end after {what}"] = "STREAM_CAPTURE_INVALIDATED"
    assert json.loads(run("-c", PROGRAM + WRONG_USE)) == {
        "before cuInit": "NOT_INITIALIZED",
        "no context": "INVALID_CONTEXT",
        "second device": "INVALID_DEVICE",
        "too much memory": "OUT_OF_MEMORY",
        "no memory": "INVALID_VALUE",
        "freed twice": "INVALID_VALUE",
        "copy to freed memory": "INVALID_VALUE",
        "copy beyond the end": "INVALID_VALUE",
        "unknown stream": "INVALID_HANDLE",
        "event not recorded": "INVALID_HANDLE",
        "not a cubin": "INVALID_IMAGE",
        "cubin for another GPU": "NO_BINARY_FOR_GPU",
        "unknown kernel": "NOT_FOUND",
        "kernel of another module": "NOT_FOUND",
        "a kernel": "CUDA_SUCCESS",
        "no blocks": "INVALID_VALUE",
        "too many threads": "INVALID_VALUE",
        "memory of the host": "ILLEGAL_ADDRESS",
        "freed memory": "ILLEGAL_ADDRESS",
        "end without begin": "STREAM_CAPTURE_UNMATCHED",
        "capture of the default stream": "STREAM_CAPTURE_UNSUPPORTED",
        **in_capture,
        "another stream while one captures": "CUDA_SUCCESS",
        "a captured kernel": "CUDA_SUCCESS",
        "destroyed graph": "INVALID_VALUE",
        "token": 3,
        "graph on freed memory": "ILLEGAL_ADDRESS",
        "kernel of an unloaded module": "INVALID_HANDLE",
    }
