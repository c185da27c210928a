"""A bench with a GPU: an emulated one, on whose clock every kernel, graph and copy takes as long."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from rich.console import Console

from bar_edge.benchmarks import charts, command, contenders, energy, profiles, tables
from bar_edge.benchmarks.measure import ContenderError
from bar_edge.benchmarks.page import page
from bar_edge.runtime.engines.cuda.timeline import STAGES
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.noise import RecordedNoise, SeededNoise

from .conftest import COPIED, TICK

COPIED_A_SECOND = 2 * COPIED / TICK  # read and written


@pytest.fixture
def report(bench_on_gpu):
    with bench_on_gpu as running:
        for batch_size in (1, 2):
            running.measure(batch_size, rounds=2)
            running.explain()
        return running.report()


@pytest.fixture
def ours(report):
    return report["contenders"][1]


def test_the_reference_proves_and_is_not_timed(report, ours):
    reference = report["contenders"][0]
    assert (reference["name"], reference["state"]) == ("PyTorch fp32", "reference")
    assert "batches" not in reference and len(reference["proofs"]) == 2
    assert (ours["name"], ours["state"], ours["device"]) == ("bundle-cuda, cuda", "timed", "gpu")
    assert [proof["judged_differing_bits"] for proof in ours["proofs"]] == [0, 0]


def test_the_time_of_a_token_is_that_of_its_graphs(ours, small):
    passes, tokens = len(small.bundle.recipe.allocation), small.spec.num_tokens
    for batch in ours["batches"]:
        assert batch["image"]["count"] == 2
        assert not {"first_token", "decode"} & set(batch)  # the host hears of the last token only
        trunk, head = 4, 3 * passes + 1  # kernels and graphs
        figures = dict.fromkeys(("min", "p50", "p90", "max"), pytest.approx((trunk + head) * TICK))
        assert batch["token"] == {"count": tokens, **figures}
        seconds = batch["stages"]["seconds"]
        assert seconds["trunk"] == pytest.approx(tokens * trunk * TICK)
        assert seconds["head"] == pytest.approx(tokens * head * TICK)
        assert seconds["host"] > 0
        assert set(seconds) == {*STAGES, "host"}
        assert sum(seconds.values()) == pytest.approx(batch["stages"]["wall_seconds"])
        assert batch["stages"]["overhead"] > 0 and "token_seconds" not in batch["stages"]


def test_bandwidth_is_held_against_the_gpus_own(report, ours):
    best = report["machine_best"]
    assert best["gpu_bytes_per_second"]["samples"] == pytest.approx([COPIED_A_SECOND] * 4)
    assert best["bytes_per_second"]["p50"] != COPIED_A_SECOND
    for batch in ours["batches"]:
        batch_fraction = batch["bytes_per_token"] / batch["token"]["p50"] / COPIED_A_SECOND
        assert batch["fraction_of_bandwidth"] == pytest.approx(batch_fraction, rel=1e-3)
        point = batch["roofline"]["trunk"]
        read = batch["work"]["trunk"]["bytes"] / batch["stages"]["seconds"]["trunk"]
        assert point["fraction_of_bandwidth"] == pytest.approx(read / COPIED_A_SECOND)


def test_a_gpu_that_cannot_be_measured_leaves_the_fraction_out_and_says_why(bench_on_gpu, monkeypatch):
    from bar_edge.benchmarks import bench

    worker = bench.Worker

    def failing(contender, *others):
        if contender.factory.endswith(":Gpu"):
            raise bench.ContenderError("EngineError: no driver")
        return worker(contender, *others)

    monkeypatch.setattr(bench, "Worker", failing)
    with bench_on_gpu as running:
        running.measure(1, rounds=1)
        running.explain()
        report = running.report()
    (batch,) = report["contenders"][1]["batches"]
    assert batch["fraction_of_bandwidth"] is None and "roofline" not in batch
    assert batch["bytes_per_token"] > 0
    assert any("no driver" in note for note in tables.notes(report))
    assert "–" in page(report, {}, {})


class Meter:
    """12 J between any two looks."""

    source, looks = "NVML GPU 0", 0

    def joules(self):
        self.looks += 1
        return 12.0 * self.looks

    def close(self):
        self.looks = -1


def test_energy_and_memory_of_the_gpu_are_told(bench_on_gpu, monkeypatch):
    meter = Meter()
    monkeypatch.setattr(bench_on_gpu, "_meters", [meter])
    monkeypatch.setattr(energy, "gpu_memory_bytes", lambda pid: 3 * 2**30)
    with bench_on_gpu as running:
        running.measure(2, rounds=3)
        running.explain()
        report = running.report()
    (batch,) = report["contenders"][1]["batches"]
    assert batch["joules_per_image"]["NVML GPU 0"] == {"count": 3, "min": 6, "p50": 6, "p90": 6, "max": 6}
    assert batch["gpu_memory_bytes"] == 3 * 2**30
    assert meter.looks == -1
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    command.show(report, console)
    shown = console.export_text()
    assert "GPU MiB" in shown and "3,072" in shown


def test_what_was_measured_before_a_contender_failed_stays(bench_on_gpu, monkeypatch):
    draw = contenders.OnEngine.draw

    def failing(self, images, *others):
        if images == 2:
            raise ContenderError("RuntimeError: out of memory")
        return draw(self, images, *others)

    monkeypatch.setattr(contenders.OnEngine, "draw", failing)
    with bench_on_gpu as running:
        for batch_size in (1, 2):
            running.measure(batch_size, rounds=1)
            running.explain()
        report = running.report()
    ours = report["contenders"][1]
    assert (ours["state"], ours["reason"]) == ("failed", "batch 2: RuntimeError: out of memory")
    assert [batch["batch_size"] for batch in ours["batches"]] == [1]
    assert "out of memory" in page(report, {}, charts.draw(report))


def test_a_round_lasts_as_long_as_it_must(bench_on_gpu, monkeypatch):
    clock = iter(range(10_000))  # seconds, one at every look
    monkeypatch.setattr(contenders.time, "perf_counter", lambda: next(clock))
    with bench_on_gpu as running:
        running.measure(1, rounds=2, least_seconds=30)
        running.explain()
        (batch,) = running.report()["contenders"][1]["batches"]
    assert batch["image"]["count"] > 4  # two rounds of several images


def test_the_report_is_shown_everywhere(report):
    assert json.loads(json.dumps(report)) == report
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    command.show(report, console)
    assert "the GPU copied at" in console.export_text()
    text = page(report, {}, charts.draw(report))
    assert "the GPU copied at" in text and "GPU&#39;s memory" not in text
    assert "roofline" in charts.draw(report)


@pytest.fixture
def pytorch_on_gpu(small, monkeypatch):
    """(PyTorch's contender as on a GPU, what it sampled with, told to whom)."""
    made = contenders.PyTorch(
        generator=str(small.generator), tokenizer=str(small.tokenizer), config=str(small.config),
        recipe=asdict(small.bundle.recipe), threads=1, dtype="float32", compiled=False,
    )  # fmt: skip
    sampled_with = []
    sample = made._sample

    def watched(class_ids, noise, progress):
        sampled_with.append((noise, progress))
        return sample(class_ids, noise, progress)

    monkeypatch.setattr(made, "device", lambda: "gpu")
    monkeypatch.setattr(made, "_sample", watched)
    monkeypatch.setattr(profiles.HostClock, "on_gpu", True)
    monkeypatch.setattr(profiles, "TorchEvents", profiles.HostClock)
    return made, sampled_with


def test_pytorch_on_a_gpu_is_not_waited_for_while_an_image_is_timed(pytorch_on_gpu, small):
    made, sampled_with = pytorch_on_gpu
    drawn = made.draw(2, 4)
    assert set(drawn.seconds) == {"image"}
    made.draw(2, 4)
    (first, told), (second, _) = sampled_with
    assert told is None  # or it would be waited for, or marked, at every token
    assert isinstance(first, RecordedNoise)  # made before the clock ran
    assert second is first  # and before energy is measured
    expected = small.runtime.sample(np.arange(2), small.bundle.recipe, SeededNoise(4, range(2)))
    assert (drawn.bits == expected).all()


def test_the_time_of_pytorchs_tokens_on_a_gpu_is_from_the_split(pytorch_on_gpu, small):
    made, _ = pytorch_on_gpu
    split = made.profile(2, 4)
    assert len(split["token_seconds"]) == small.spec.num_tokens - 1 and min(split["token_seconds"]) > 0
    assert sum(split["token_seconds"]) < split["wall_seconds"]
    assert "CUDA events" in split["method"]


def test_only_tf32_rounds_convolutions_to_it(small, monkeypatch):
    import torch

    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    precision = torch.get_float32_matmul_precision()
    arguments = {
        "generator": str(small.generator), "tokenizer": str(small.tokenizer), "config": str(small.config),
        "recipe": asdict(small.bundle.recipe), "threads": 1, "dtype": "float32", "compiled": False,
    }  # fmt: skip
    try:
        for tf32 in (False, True):
            contenders.PyTorch(**arguments, tf32=tf32)
            assert torch.backends.cudnn.allow_tf32 is tf32
    finally:
        torch.set_float32_matmul_precision(precision)


def test_an_engine_without_a_timeline_is_said_so(small):
    with (
        profiles.SplitGenerator(small.bundle, engine="onnxruntime", threads=1) as generator,
        pytest.raises(EngineError, match="onnxruntime does not tell its stages apart"),
    ):
        generator.split(*contenders._request(small.spec, 1, 0))


def test_the_gpus_speed_is_the_median_of_its_copies(emulated_gpu):
    gpu = contenders.Gpu(mebibytes=3, copies=5, awake_after=0)
    (device,) = emulated_gpu
    device.durations["copy"] = 0.5
    assert gpu.gpu_bytes_per_second() == 2 * 3 * 2**20 / 0.5
    assert device.events == ["copy"] * 5
    assert device.allocated_bytes == 2 * 3 * 2**20
