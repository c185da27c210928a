"""The TensorRT engine without TensorRT: plans are ONNX graphs, the library and the GPU are executed on the CPU."""

import json
import shutil
import sys
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from bar_edge.export.builder import DeviceForm
from bar_edge.export.device_weights import write
from bar_edge.runtime import engines
from bar_edge.runtime.bundle import MANIFEST, SELFTEST, Bundle, write_manifest
from bar_edge.runtime.engines import Batch, tensorrt
from bar_edge.runtime.engines.cuda.compiler import KERNELS
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.tensorrt import check_compatible, library_for, load_library
from bar_edge.runtime.errors import BundleError, CompatibilityError, EngineError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.weights import PendingTensor

from .cuda.emulated import EmulatedDevice, EmulatedGraph, device_graphs, loop_tables
from .cuda.host import HostKernels, build

SM, VERSION = 86, "1.7.0.1"
GRAPHS = ["modulation", "mask_ratio", "prefix", "step", "head_pass", "decode"]
BATCHES = (3, 1)  # guided images, in the order in which a manifest might list them


class FakeTensorRt:
    """The module `tensorrt_rtx`: its plans are ONNX graphs over a folder of weights.

    `loaded` lists the rows of every step that was deserialized, `compiled` the graphs whose kernels no runtime cache
    had; plans in `broken` do not load, tensors in `unknown` do not exist, graphs in `failing` do not run.
    """

    __name__ = "tensorrt_rtx"
    __version__ = VERSION
    Logger = type("Logger", (), {"ERROR": 1, "__init__": lambda self, severity: None})

    def __init__(self, device, folder):
        self.device, self.folder = device, folder
        self.loaded, self.compiled = [], []
        self.broken, self.unknown, self.failing = set(), set(), set()

    def Runtime(self, logger):  # noqa: N802
        return SimpleNamespace(deserialize_cuda_engine=self._deserialize)

    def _deserialize(self, plan):
        graph = EmulatedGraph(onnx.load_from_string(plan), self.folder)
        if graph.name in self.broken:
            return None
        if graph.name == "step":
            self.loaded.append(graph.shapes["x"][0][0])
        return FakeEngine(self, graph)


class FakeEngine:
    def __init__(self, library, graph):
        self._library, self._graph = library, graph

    def create_runtime_config(self):
        config = SimpleNamespace(create_runtime_cache=FakeRuntimeCache)
        config.set_runtime_cache = lambda cache: setattr(config, "cache", cache)
        return config

    def create_execution_context(self, config):
        known = f"{self._graph.name} of {self._graph.shapes}"
        if known not in config.cache.known:
            config.cache.known.append(known)
            self._library.compiled.append(self._graph.name)
        return FakeContext(self._library, self._graph)


class FakeRuntimeCache:
    """Which kernels were compiled."""

    def __init__(self):
        self.known = []

    def deserialize(self, data):
        self.known = json.loads(data)
        return True

    def serialize(self):
        return json.dumps(self.known).encode()


class FakeContext:
    def __init__(self, library, graph):
        self._library, self._graph = library, graph
        self._addresses = {}

    def set_tensor_address(self, name, address):
        self._addresses[name] = address
        return name in self._graph.shapes and name not in self._library.unknown

    def execute_async_v3(self, stream):
        assert stream == self._library.device.stream
        if self._graph.name in self._library.failing:
            return False
        self._graph.enqueue(self._library.device, self._addresses)
        return True


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    return HostKernels(build(KERNELS, tmp_path_factory.mktemp("host_kernels")))


@pytest.fixture(scope="module")
def weights_of_plans(tmp_path_factory):
    """Where the plans of `compiled` find their weights."""
    return tmp_path_factory.mktemp("weights_of_plans")


@pytest.fixture(scope="module")
def compiled(small, weights_of_plans, tmp_path_factory):
    """`small`, compiled for two sizes of batches."""
    return compile_for(small.bundle, BATCHES, weights_of_plans, tmp_path_factory.mktemp("compiled") / "bundle")


@pytest.fixture
def library(monkeypatch, host, weights_of_plans, tmp_path):
    """A machine with a GPU and TensorRT-RTX, and an empty cache; in the end nobody has written behind a buffer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    device = EmulatedDevice(host)
    device.sm = SM
    made = FakeTensorRt(device, weights_of_plans)
    monkeypatch.setattr(tensorrt, "CudaDevice", lambda stream: device)
    monkeypatch.setattr(tensorrt, "load_driver", lambda: None)
    monkeypatch.setattr(tensorrt, "check_compiler", lambda driver: None)
    monkeypatch.setattr(tensorrt, "load_library", lambda name: made)
    yield made
    device.check_guards()


@pytest.fixture
def engine(compiled, library):
    started = tensorrt.start(compiled, threads=0)
    yield started
    started.close()
    assert library.device.allocated_bytes == 0
    assert library.device.closed


@pytest.fixture
def edited(compiled, tmp_path):
    """Makes a copy of the compiled bundle whose account of engines was changed."""

    def make(change):
        folder = shutil.copytree(compiled.path, tmp_path / "edited")
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest["engines"])
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return Bundle.open(folder)

    return make


def compile_for(source, batches, weights, output):
    """What `compile_bundle` makes, with ONNX graphs for plans."""
    output.mkdir()
    profiles = []
    for images in batches:
        profile = Profile.of(images, guided=True, passes=len(source.recipe.allocation))
        graphs = device_graphs(source, weights, profile, DeviceForm(TensorProto.FLOAT, in_place=True))
        plans = {name: {"file": f"{name}-{images}.plan"} for name in graphs}
        for name, model in graphs.items():
            (output / plans[name]["file"]).write_bytes(model.SerializeToString())
        profiles.append({"sizes": profile.to_dict(), "plans": plans})
    tables = loop_tables(source)
    write(output, {name: PendingTensor(t.dtype, t.shape, lambda t=t: t) for name, t in tables.items()})
    shutil.copyfile(source.path / SELFTEST, output / SELFTEST)
    account = {
        "library": "tensorrt_rtx", "version": VERSION, "sms": [75, SM], "in_place": True, "precision": "fp32",
        "profiles": profiles,
    }  # fmt: skip
    write_manifest(
        output, spec=source.spec, recipe=source.recipe, variant=None, graphs={}, provenance={},
        engines={"tensorrt": account},
    )  # fmt: skip
    return Bundle.open(output)


def batch_of(case, images, *, guidance=3.0, **recipe):
    noise = SeededNoise(3, range(images), random_order=True)
    changed = replace(case.bundle.recipe, guidance=guidance, **recipe)
    return Batch(np.arange(images) % case.spec.num_classes, changed, noise, noise.orders(case.spec.num_tokens))


def expected(case, batch, history=None):
    """What the ONNX Runtime engine draws."""
    return case.runtime._engine.sample(batch, None, history)


# ---- drawing ----


@pytest.mark.parametrize(
    ("images", "guidance", "rows"),
    [(1, 3.0, [2]), (2, 3.0, [6]), (3, 3.0, [6]), (1, 1.0, [2]), (2, 1.0, [2]), (6, 1.0, [6])],
)
def test_the_smallest_engines_that_hold_a_batch_draw_it(small, engine, library, images, guidance, rows):
    batch = batch_of(small, images, guidance=guidance)
    np.testing.assert_array_equal(engine.sample(batch), expected(small, batch))
    assert library.loaded == rows


def test_engines_are_loaded_once(small, engine, library):
    for images in (1, 3, 1, 2):
        batch = batch_of(small, images)
        np.testing.assert_array_equal(engine.sample(batch), expected(small, batch))
    assert library.loaded == [2, 6]


def test_a_larger_batch_is_drawn_in_parts_of_the_largest_engines(small, engine, library):
    batch = batch_of(small, 7)
    reports = []
    np.testing.assert_array_equal(engine.sample(batch, lambda *done: reports.append(done)), expected(small, batch))
    tokens = small.spec.num_tokens
    assert library.loaded == [6]
    assert library.device.events.count("replay of place_token") == 3 * tokens
    assert reports[-1] == (tokens, tokens)


def test_every_part_is_led_by_its_history(small, engine):
    batch = batch_of(small, 7)
    shape = (7, small.spec.num_tokens, small.spec.bits_per_token)
    history = np.random.default_rng(0).integers(0, 2, shape, dtype=np.uint8)
    np.testing.assert_array_equal(engine.sample(batch, None, history), expected(small, batch, history))


def test_images_of_all_parts_are_drawn(small, engine):
    batch = batch_of(small, 5)
    bits, images = engine.draw(batch)
    expected_bits, expected_images = small.runtime._engine.draw(batch)
    np.testing.assert_array_equal(bits, expected_bits)
    np.testing.assert_allclose(images, expected_images, atol=1e-4)


def test_the_last_latents(small, engine):
    for look in (engine.last_latents, engine.first_logits):
        with pytest.raises(EngineError, match="no token was sampled yet"):
            look()
    batch = batch_of(small, 2)
    engine.sample(batch)
    expected(small, batch)
    np.testing.assert_allclose(engine.last_latents(), small.runtime._engine.last_latents(), atol=1e-5)


def test_the_last_latents_of_a_batch_that_was_drawn_in_parts(small, engine):
    batch = batch_of(small, 7)
    engine.sample(batch)
    expected(small, batch)
    np.testing.assert_allclose(engine.last_latents(), small.runtime._engine.last_latents(), atol=1e-5)


def test_the_first_logits_are_of_the_part_drawn_last(small, engine):
    batch = batch_of(small, 7)
    engine.sample(batch)
    logits = engine.first_logits()
    engine.sample(batch.part(6, 7))
    assert logits.shape == (2, small.spec.bits_per_token, 2)
    np.testing.assert_allclose(engine.first_logits(), logits, atol=1e-5)  # by engines of another size


def test_bits_are_decoded_before_anything_was_drawn(small, engine):
    shape = (1, small.spec.image_seq_len, small.spec.token_size)
    bits = np.random.default_rng(0).integers(0, 2, shape, dtype=np.uint8)
    np.testing.assert_allclose(engine.decode(bits), small.runtime._engine.decode(bits), atol=1e-4)


def test_the_images_drawn_last_are_shared_on_the_device(small, engine, library):
    with pytest.raises(EngineError, match="nothing was drawn since"):
        engine.images_on_device()
    _, images = engine.draw(batch_of(small, 2))
    shared = engine.images_on_device()
    found = np.empty(shared.shape, shared.dtype)
    library.device.download(shared.address, found)
    np.testing.assert_array_equal(found, images)
    assert shared.stream == library.device.stream


def test_images_drawn_in_parts_are_not_together_and_it_says_so(small, engine):
    engine.draw(batch_of(small, 5))
    with pytest.raises(EngineError, match=r"drawn in \d parts, .*; draw at most \d at once"):
        engine.images_on_device()


def test_a_generator_draws_with_it(small, compiled, library):
    with Generator(compiled, engine="tensorrt") as generator:
        _, bits = generator.generate([1, 2], seed=4, return_bits=True)
    _, expected_bits = small.runtime.generate([1, 2], seed=4, return_bits=True)
    np.testing.assert_array_equal(bits, expected_bits)
    assert library.device.allocated_bytes == 0


# ---- kernels that TensorRT-RTX compiles on the device ----


def test_kernels_are_compiled_once_on_a_machine(small, compiled, library):
    of_rows = ["prefix", "step", "head_pass", "decode"]  # the others are the same for any number of rows
    for images, graphs in ((1, GRAPHS), (1, []), (3, of_rows), (1, []), (3, [])):
        library.compiled.clear()
        with closing(tensorrt.start(compiled, threads=0)) as engine:
            engine.sample(batch_of(small, images))
        assert sorted(library.compiled) == sorted(graphs)


def test_a_damaged_cache_costs_a_compilation_only(small, compiled, library, tmp_path):
    for _ in range(2):
        library.compiled.clear()
        with closing(tensorrt.start(compiled, threads=0)) as engine:
            engine.sample(batch_of(small, 1))
        assert sorted(library.compiled) == sorted(GRAPHS)
        (stored,) = (tmp_path / "cache" / "bar-edge").iterdir()
        stored.write_bytes(stored.read_bytes()[:-1])


# ---- what does not go ----


def test_one_row_is_too_few_for_guidance(small, library, edited):
    def one_row(accounts):
        for entry in accounts["tensorrt"]["profiles"]:
            entry["sizes"]["rows"] = 1

    engine = tensorrt.start(edited(one_row), threads=0)
    with pytest.raises(CompatibilityError, match="one row, and guidance needs two for an image"):
        engine.sample(batch_of(small, 1))


def test_a_tensor_that_a_plan_lacks_is_named(small, engine, library):
    library.unknown.add("ratio_embedding")
    with pytest.raises(EngineError, match="the plan of mask_ratio has no tensor ratio_embedding; compile the bundle"):
        engine.sample(batch_of(small, 1))


def test_a_graph_that_does_not_run_is_named(small, engine, library):
    library.failing.add("head_pass")
    with pytest.raises(EngineError, match="TensorRT could not run head_pass"):
        engine.sample(batch_of(small, 1))


def test_a_plan_that_does_not_load_is_named(small, engine, library):
    library.broken.add("step")
    with pytest.raises(
        EngineError, match=rf"step-1\.plan: TensorRT-RTX {VERSION} does not load it; compile the bundle"
    ):
        engine.sample(batch_of(small, 1))


def test_closing_releases_loops_and_device(small, compiled, library):
    engine = tensorrt.start(compiled, threads=0)
    engine.sample(batch_of(small, 1))
    engine.sample(batch_of(small, 3))
    assert library.device.allocated_bytes > 0
    engine.close()
    assert library.device.allocated_bytes == 0
    assert library.device.closed


def test_too_little_memory_leaves_the_engine_usable(small, engine, library):
    engine.sample(batch_of(small, 1))
    library.device._memory = library.device.allocated_bytes + 2**16
    with pytest.raises(EngineError, match="MiB of device memory for 6 rows"):
        engine.sample(batch_of(small, 3))
    batch = batch_of(small, 1)
    np.testing.assert_array_equal(engine.sample(batch), expected(small, batch))


# ---- what a machine must have ----

FACTS = {"library": "tensorrt_rtx", "version": VERSION, "sms": [75, SM]}


def test_plans_run_under_the_version_and_the_gpu_they_were_made_for(tmp_path):
    check_compatible(FACTS, VERSION, SM, tmp_path)
    check_compatible(FACTS, VERSION, 75, tmp_path)


def test_another_version_is_refused_with_the_remedy(tmp_path):
    message = (
        r"was compiled by TensorRT-RTX 1\.7\.0\.1, installed is 1\.8; .* compile the bundle again here, or install"
    )
    with pytest.raises(CompatibilityError, match=message):
        check_compatible(FACTS, "1.8", SM, tmp_path)


def test_another_gpu_is_refused_with_the_remedy(tmp_path):
    message = r"compiled for SM 7\.5, 8\.6, this GPU is SM 12\.0; .*`bar-edge compile BUNDLE --target host -o OUTPUT`"
    with pytest.raises(CompatibilityError, match=message):
        check_compatible(FACTS, VERSION, 120, tmp_path)


@pytest.mark.parametrize(("attribute", "value"), [("__version__", "1.8"), ("sm", 120)])
def test_an_engine_does_not_start_where_its_plans_do_not_run(compiled, library, monkeypatch, attribute, value):
    monkeypatch.setattr(library if attribute == "__version__" else library.device, attribute, value, raising=False)
    with pytest.raises(CompatibilityError, match="was compiled"):
        tensorrt.start(compiled, threads=0)
    assert library.loaded == []


def test_a_refused_engine_leaves_no_device_open(compiled, library):
    library.device.sm = 120
    with pytest.raises(CompatibilityError):
        tensorrt.start(compiled, threads=0)
    assert library.device.closed


@pytest.mark.parametrize(
    ("sm", "name"),
    [(75, "tensorrt_rtx"), (86, "tensorrt_rtx"), (120, "tensorrt_rtx"), (87, "tensorrt"), (90, "tensorrt")],
)
def test_the_library_for_a_gpu(sm, name):
    assert library_for(sm) == name


@pytest.mark.parametrize(
    ("name", "remedy"), [("tensorrt_rtx", "pip install tensorrt-rtx-cu13"), ("tensorrt", "NVIDIA's TensorRT packages")]
)
def test_a_library_that_is_missing_is_named(monkeypatch, name, remedy):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(EngineError, match=f"is not installed .*; .*{remedy}"):
        load_library(name)


def test_status_without_a_driver(monkeypatch):
    def no_driver():
        raise EngineError("no NVIDIA driver (libcuda) on this machine; install the driver of your GPU")

    monkeypatch.setattr(tensorrt, "load_driver", no_driver)
    usable, reason = tensorrt.status()
    assert not usable
    assert reason.startswith("no NVIDIA driver")


def test_status_of_this_machine_agrees_with_the_driver():
    usable, reason = tensorrt.status()
    if usable:
        assert "TensorRT" in reason
    else:
        assert any(cause in reason for cause in ("driver", "cuda-bindings", "is installed"))


def test_status_without_a_library(monkeypatch):
    monkeypatch.setattr(tensorrt, "load_driver", lambda: None)
    monkeypatch.setattr(tensorrt, "check_compiler", lambda driver: None)
    for name in tensorrt.LIBRARIES:
        monkeypatch.setitem(sys.modules, name, None)
    usable, reason = tensorrt.status()
    assert not usable
    assert reason.startswith("neither TensorRT-RTX nor TensorRT is installed; pip install tensorrt-rtx-cu13; or ")


def test_status_with_a_library(library):
    assert tensorrt.status() == (True, f"TensorRT-RTX {VERSION} and TensorRT {VERSION}")


# ---- what a manifest must say ----


def unset(name):
    return lambda accounts: accounts["tensorrt"].pop(name)


def put(name, value):
    return lambda accounts: accounts["tensorrt"].update({name: value})


def profile(change):
    return lambda accounts: change(accounts["tensorrt"]["profiles"][0])


MALFORMED = {
    "no account": lambda accounts: accounts.update(tensorrt={}),
    "no profiles": unset("profiles"),
    "profiles of no list": put("profiles", 7),
    "profile of nothing": put("profiles", [None]),
    "no plans": profile(lambda entry: entry.pop("plans")),
    "plan without file": profile(lambda entry: entry["plans"]["step"].pop("file")),
    "no precision": unset("precision"),
    "unknown precision": put("precision", "fp8"),
    "no in_place": unset("in_place"),
    "no library": unset("library"),
    "no rows": profile(lambda entry: entry["sizes"].pop("rows")),
    "rows of no number": profile(lambda entry: entry["sizes"].update(rows="many")),
    "unknown size": profile(lambda entry: entry["sizes"].update(columns=3)),
    "any module": put("library", "json"),
    "no version": unset("version"),
    "no SMs": unset("sms"),
    "SMs of no list": put("sms", SM),
    "empty profiles": put("profiles", []),
    "missing graph": profile(lambda entry: entry["plans"].pop("decode")),
    "zero rows": profile(lambda entry: entry["sizes"].update(rows=0)),
    "plan outside": profile(lambda entry: entry["plans"]["step"].update(file="../step.plan")),
    "plan not listed": profile(lambda entry: entry["plans"]["step"].update(file="unlisted.plan")),
}


@pytest.mark.parametrize("change", MALFORMED.values(), ids=MALFORMED.keys())
def test_an_account_of_engines_that_is_malformed_is_refused(edited, library, change):
    bundle = edited(change)
    with pytest.raises(BundleError, match=r"account of engines is malformed .*; compile it again"):
        tensorrt.start(bundle, threads=0)


def test_a_compiled_bundle_is_not_for_onnxruntime(compiled):
    message = "was made for tensorrt, not for onnxruntime; use the bundle that it was compiled from"
    with pytest.raises(CompatibilityError, match=message):
        engines.choose("onnxruntime", compiled)
    with pytest.raises(CompatibilityError, match=message):
        Generator(compiled, engine="onnxruntime")


def test_a_bundle_that_was_not_compiled_is_not_for_tensorrt(small):
    message = "was made for onnxruntime, not for tensorrt; compile it: bar-edge compile BUNDLE --target host"
    with pytest.raises(CompatibilityError, match=message):
        engines.choose("tensorrt", small.bundle)


def test_auto_takes_what_a_bundle_was_compiled_for_or_nothing(compiled, library, monkeypatch):
    name, why = engines.choose("auto", compiled)
    assert name == "tensorrt"
    assert why.startswith("what the bundle was made for; TensorRT-RTX")
    monkeypatch.setattr(tensorrt, "status", lambda: (False, "no NVIDIA driver"))
    with pytest.raises(EngineError, match=r"cannot run here \(tensorrt: no NVIDIA driver\)"):
        engines.choose("auto", compiled)
