"""Acceptance on a GPU: here, where there is none, it refuses; its parts run on an emulated one."""

import json
import subprocess
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from bar_edge.benchmarks import bench, gpu_acceptance, gpu_token, measure
from bar_edge.benchmarks.eight_bit import eight_bit
from bar_edge.benchmarks.gpu_products import Figure
from bar_edge.benchmarks.random_checkpoint import random_tokenizer
from bar_edge.calibration.quantizer import PRECISIONS
from bar_edge.runtime import engines
from bar_edge.runtime.engines.cuda.device import host_sm
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.spec import VARIANTS, Variant

from .conftest import InProcess


class InPlace:
    """An executor that does what it is given at once."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, function, *arguments):
        future = Future()
        try:
            future.set_result(function(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future


FIGURE = Figure(768, 2304, "fp16", 2, 16, True, 3e-6, 768 * 2304 * 2)

TOKEN = {"phases": {gpu_token.LAUNCH: 2e-6}, "tokens": {}}


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(gpu_acceptance, "time", made)
    return made


@pytest.fixture
def acceptance(clock, tmp_path):
    return gpu_acceptance.Acceptance(
        tmp_path / "report.json", Console(file=(tmp_path / "log").open("w")), budget=480, command="the command"
    )


def read(tmp_path):
    return json.loads((tmp_path / "report.json").read_text())


@pytest.mark.skipif(host_sm() is not None, reason="there is a GPU here")
def test_without_a_gpu_nothing_is_accepted(tmp_path):
    command = [sys.executable, "-m", "bar_edge.benchmarks.gpu_acceptance", "-o", str(tmp_path / "report.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "no NVIDIA GPU answers here" in done.stderr
    assert not list(tmp_path.iterdir())


# ---- parts and their budget ----


def test_a_part_is_in_the_file_as_soon_as_it_is_done(acceptance, clock, tmp_path):
    def work():
        clock.now += 12
        return {"found": 1}

    assert acceptance.part("first", 20, work) == {"found": 1}
    assert read(tmp_path)["first"] == {"found": 1}
    assert read(tmp_path)["parts"] == {"first": {"outcome": "done", "seconds": 12}}
    assert [file.name for file in tmp_path.iterdir() if "report" in file.name] == ["report.json"]


def test_a_part_for_which_no_time_is_left_is_not_begun_and_said_so(acceptance, clock, tmp_path):
    clock.now = 450
    assert acceptance.part("long", 40, pytest.fail) is None
    assert acceptance.part("short", 20, lambda: 1) == 1
    outcome = read(tmp_path)["parts"]["long"]["outcome"]
    assert outcome == "not run: out of time, it takes up to 40 s and 30 s were left"
    assert "long" not in read(tmp_path)


def test_a_part_that_fails_is_told_and_the_next_goes_on(acceptance, tmp_path):
    def work():
        raise EngineError("no library")

    acceptance.part("broken", 0, work)
    acceptance.part("next", 0, lambda: 1)
    parts = read(tmp_path)["parts"]
    assert parts["broken"]["outcome"] == "failed: EngineError: no library" and parts["next"]["outcome"] == "done"


# ---- what is judged and timed ----


def test_bundles_are_made_for_the_usable_engines_only(bundle_copy, monkeypatch):
    from bar_edge.runtime.bundle import Bundle

    usable = {"cuda": True, "tensorrt": False}
    monkeypatch.setattr(engines, "status", lambda name: engines.Status(name, usable[name], ""))
    made = dict(gpu_acceptance.compiled(Bundle.open(bundle_copy)))
    assert list(made) == ["cuda"]
    assert made["cuda"].engines == ("cuda",) and made["cuda"].path == bundle_copy.with_name("bundle-cuda")


def test_a_bundle_is_judged_beside_onnxruntime(emulated_gpu, small, prepacked):
    found = gpu_acceptance.judged(small.bundle, prepacked)
    assert found["self_test"]["passed"] and found["decisions_differing"] == 0
    assert found["same_bits_again"] and found["same_bits_in_any_batch"]
    assert found["decisions"] == 16 * small.spec.image_seq_len * small.spec.token_size
    assert emulated_gpu  # or ONNX Runtime was judged beside itself


def test_what_cannot_be_run_is_told(small, prepacked, monkeypatch):
    usable = engines.Status("onnxruntime", True, "")
    monkeypatch.setattr(
        engines, "status", lambda name: usable if name == "onnxruntime" else engines.Status(name, False, "no driver")
    )
    assert "no driver" in gpu_acceptance.judged(small.bundle, prepacked)["failed"]


def test_a_bundle_is_judged_in_a_process_of_its_own(small, prepacked):
    found = gpu_acceptance._judged_apart(small.bundle, prepacked)
    assert "cuda" in found["failed"] if host_sm() is None else found["self_test"]["passed"]
    assert gpu_acceptance._judged_apart(small.bundle, "no library") == {"failed": "no library"}


def test_what_breaks_one_judges_process_leaves_the_others_theirs(emulated_gpu, small, prepacked, monkeypatch, tmp_path):
    broken = small.quantized("int8")

    class Process(InProcess):
        def __init__(self, contender, threads, answer_seconds):
            assert answer_seconds > 0  # or a kernel without an end would be waited for
            if contender.arguments["source"] == str(broken.path):
                raise measure.ContenderError("the process ended without an answer")
            super().__init__(contender, threads)

    monkeypatch.setattr(gpu_acceptance, "Worker", Process)
    monkeypatch.setattr(gpu_acceptance, "ThreadPoolExecutor", InPlace)  # the emulated GPU does one thing at a time
    monkeypatch.setattr(gpu_acceptance, "export_bundle", lambda *_: small.bundle)
    monkeypatch.setattr(gpu_acceptance, "collect", lambda *_: None)
    monkeypatch.setattr(gpu_acceptance, "_DEMO_IMAGES", 2)

    def quantize(exact, calibration, output, *, precision, measure):
        if precision == "int4-weight":
            raise EngineError("no room")
        return broken if precision == "int8" else small.bundle

    def compiled(source):
        yield "cuda", prepacked
        yield "tensorrt", "no library"

    monkeypatch.setattr(gpu_acceptance, "quantize_bundle", quantize)
    monkeypatch.setattr(gpu_acceptance, "compiled", compiled)
    found = gpu_acceptance._demo(tmp_path)
    assert list(found) == ["fp32", *PRECISIONS]
    assert found["int4-weight"] == {"quantize": {"failed": "no room"}}
    assert found["int8"]["cuda"] == {"failed": "the process ended without an answer"}
    for name in ("fp32", "int8-weight"):
        assert found[name]["cuda"]["decisions_differing"] == 0
        assert found[name]["tensorrt"] == {"failed": "no library"}


@pytest.fixture
def tiny(small, monkeypatch):
    """A variant of the small model's shapes, and a decoder to match."""
    monkeypatch.setitem(VARIANTS, "tiny", Variant("tiny", small.spec, small.bundle.recipe, "tokenizer", 0))
    monkeypatch.setattr(gpu_acceptance, "random_tokenizer", partial(random_tokenizer, width=64, layers=1))
    return "tiny"


def test_a_variant_is_made_in_floats_and_with_8_bit_weights(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(engines, "status", lambda name: engines.Status(name, name != "tensorrt", ""))
    made = gpu_acceptance.make(tiny, tmp_path)
    assert [bundle.path.name for bundle in made.bundles] == ["tiny-fp16-cuda", "tiny-int8-weight-cuda"]
    forms = [{e["form"] for e in bundle.manifest["engines"]["cuda"]["layers"].values()} for bundle in made.bundles]
    assert forms == [{"fp16"}, {"fp16", "int8-weight"}]
    assert not made.refused and all(file.is_file() for file in made.checkpoint)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "checkpoint", "tiny-fp16-cuda", "tiny-int8-weight-cuda",
    ]  # fmt: skip


def test_8_bit_weights_decide_almost_as_floats_do(small, tmp_path):
    rounded = eight_bit(small.bundle, tmp_path / "rounded")
    layers = rounded.manifest["quantization"]["layers"]
    assert any(layer.startswith("lm_head.") for layer in layers) and any(
        layer.startswith("blocks.") for layer in layers
    )
    assert not any("adaLN_modulation" in layer and layer.startswith("blocks.") for layer in layers)
    classes, noise = np.arange(4), SeededNoise(3, range(4))
    bits = small.runtime.sample(classes, small.bundle.recipe, noise)
    latents = small.runtime._engine.last_latents()
    with Generator(rounded, engine="onnxruntime", threads=1) as ours:
        led = ours.sample(classes, small.bundle.recipe, noise, history=bits)
        moved = np.abs(ours._engine.last_latents() - latents).max() / np.abs(latents).max()
    assert (led != bits).mean() < 0.02
    assert 0 < moved < 0.03


# ---- all of it ----


@pytest.fixture
def accept(acceptance, emulated_gpu, small, prepacked, tmp_path, monkeypatch):
    """Runs everything on an emulated GPU, with the small model in the place of both variants."""

    def make(name, folder):
        if name == "bar_b_patch4":
            raise EngineError("no disk")
        checkpoint = (small.generator, small.tokenizer, small.config)
        return gpu_acceptance.Made(checkpoint, (prepacked,), {f"{name}, tensorrt": "no library"})

    monkeypatch.setattr(gpu_acceptance, "make", make)
    monkeypatch.setattr(gpu_acceptance, "Worker", InProcess)
    monkeypatch.setattr(gpu_acceptance, "_kernels", lambda: {"passed": True})
    monkeypatch.setattr(gpu_acceptance, "_demo", lambda folder: {"fp32": {"cuda": {"failed": "no library"}}})
    monkeypatch.setattr(gpu_acceptance, "_products", lambda folder: [FIGURE.to_dict()])
    monkeypatch.setattr(gpu_acceptance, "_apart", lambda *_: TOKEN)
    monkeypatch.setattr(gpu_acceptance, "_COMPILED", ("fp32",))  # compiling takes minutes
    monkeypatch.setattr(gpu_acceptance, "_LEAST_SECONDS", 0)
    monkeypatch.setattr(bench, "Worker", InProcess)

    def run():
        gpu_acceptance.accept(acceptance, tmp_path, ("bar_b", "bar_b_patch4"), (2, 3))
        return read(tmp_path)

    return run


TIMED = ("batch 1", "compiled PyTorch, batch 1", "batched, batch 2", "batched, batch 3")


def test_everything_is_in_the_report(accept, acceptance):
    report = accept()
    assert {name: part["outcome"] for name, part in report["parts"].items()} == {
        **dict.fromkeys(("engines", "kernels", "demo", "products", "token", "bar_b, bundles"), "done"),
        "bar_b_patch4, bundles": "failed: EngineError: no disk",
        **dict.fromkeys((f"bar_b, {part}" for part in TIMED), "done"),
        **{
            f"bar_b_patch4, {part}": "failed: EngineError: there is no bundle of it for an engine that works here"
            for part in TIMED
        },
    }
    assert report["commit"] is None or len(report["commit"]["hash"]) == 40
    assert report["engines"]["cuda"]["usable"]
    assert report["token"] == TOKEN
    assert report["bar_b, bundles"] == {"bundles": ["bundle-cuda"], "refused": {"bar_b, tensorrt": "no library"}}
    for key, counts in (("bar_b", [5]), ("bar_b, batched", [2, 2])):
        contenders = {entry["name"]: entry for entry in report[key]["contenders"]}
        assert contenders["PyTorch fp32"]["state"] == "reference"
        for name in ("PyTorch TF32", "PyTorch bf16", "bundle-cuda, cuda"):
            batches = contenders[name]["batches"]
            assert [batch["image"]["count"] for batch in batches] == counts
            assert batches[0]["stages"]["seconds"] and batches[0]["bytes_per_token"] > 0
            assert batches[0].keys() >= {"joules_per_image", "gpu_memory_bytes", "fraction_of_bandwidth"}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for table in gpu_acceptance.summary(acceptance.report):
        console.print(table)
    text = console.export_text()
    assert gpu_token.LAUNCH in text
    assert "bundle-cuda, cuda" in text and "failed: EngineError: no disk" in text and "no library" in text


def test_what_there_is_no_time_for_is_named(accept, acceptance, clock, monkeypatch):
    measure = bench.Bench.measure

    def slow(self, *arguments):
        clock.now += 430
        measure(self, *arguments)

    monkeypatch.setattr(bench.Bench, "measure", slow)
    report = accept()
    assert report["parts"]["bar_b, batch 1"] == {"outcome": "done", "seconds": 430}
    for name in ("bar_b, batched, batch 2", "bar_b, compiled PyTorch, batch 1"):
        assert report["parts"][name]["outcome"].startswith("not run: out of time")
    assert [batch["batch_size"] for batch in report["bar_b"]["contenders"][1]["batches"]] == [1]


def test_the_kernels_tests_are_those_that_run_on_a_gpu(monkeypatch):
    ran = []

    def run(command, **_):
        ran.append(command)
        return SimpleNamespace(returncode=1, stdout="a\nb\n1 failed", stderr="")

    monkeypatch.setattr(gpu_acceptance.subprocess, "run", run)
    found = gpu_acceptance._kernels()
    assert found == {"passed": False, "summary": ["a", "b", "1 failed"], "command": found["command"]}
    assert ran[0][1:3] == ["-m", "pytest"] and "-k 'gpu and not cubin'" in found["command"]
    monkeypatch.setattr(gpu_acceptance.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match="pytest is not installed"):
        gpu_acceptance._kernels()


@pytest.mark.parametrize(
    ("counts", "passed"),
    [("1 passed in 0.31s", True), ("3 skipped in 0.1s", False), ("2 passed, 1 skipped, 4 deselected in 1s", False)],
)
def test_kernels_whose_tests_were_skipped_have_not_passed(monkeypatch, counts, passed):
    told = f"..s\nSKIPPED [1] test_kernels.py:3: the GPU tests skipped this\n{counts}\n"
    done = SimpleNamespace(returncode=0, stdout=told, stderr="")
    monkeypatch.setattr(gpu_acceptance.subprocess, "run", lambda *_, **__: done)
    assert gpu_acceptance._kernels()["passed"] is passed


@pytest.mark.parametrize("work", [gpu_acceptance._kernels, lambda: gpu_acceptance._products(Path())])
def test_a_part_whose_process_hangs_is_killed_and_failed(acceptance, tmp_path, monkeypatch, work):
    run = subprocess.run

    def hang(command, timeout, **named):
        assert timeout >= 2 * 40
        return run([sys.executable, "-c", "import signal; signal.pause()"], timeout=0.2, **named)

    monkeypatch.setattr(gpu_acceptance.subprocess, "run", hang)
    acceptance.part("hanging", 0, work)
    acceptance.part("next", 0, lambda: 1)
    parts = read(tmp_path)["parts"]
    assert parts["hanging"]["outcome"].startswith("failed: TimeoutExpired") and parts["next"]["outcome"] == "done"


def test_products_and_a_token_are_timed_in_processes_of_their_own(monkeypatch, tmp_path, prepacked, small):
    ran = []

    def run(command, **_):
        *ran[:], report = *command[1:-1], Path(command[-1])
        measure.save({"products": [FIGURE.to_dict()], **TOKEN}, report)
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(gpu_acceptance.subprocess, "run", run)
    assert [Figure.from_dict(one) for one in gpu_acceptance._products(tmp_path)] == [FIGURE]
    assert ran == ["-m", "bar_edge.benchmarks.gpu_products", "-o"]
    made = gpu_acceptance.Made((), (prepacked, small.bundle), {})
    assert gpu_acceptance._token(made, tmp_path).items() >= TOKEN.items()
    assert ran == ["-m", "bar_edge.benchmarks.gpu_token", str(prepacked.path), "-o"]
    failed = SimpleNamespace(returncode=1, stdout="", stderr="trace\nEngineError: no driver")
    monkeypatch.setattr(gpu_acceptance.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(EngineError, match="no driver"):
        gpu_acceptance._products(tmp_path)
    with pytest.raises(EngineError, match="no bundle"):
        gpu_acceptance._token(None, tmp_path)


def test_a_variant_is_made_in_a_process_of_its_own_and_what_fails_there_is_told(tmp_path):
    with gpu_acceptance._making("bar_xxl", tmp_path) as worker:
        assert worker.pid
        with pytest.raises(measure.ContenderError, match="bar_xxl"):
            worker.answer()
