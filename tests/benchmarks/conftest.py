"""One small bench, run once, for everything that shows or compares reports, and one with a GPU that is not there."""

import math
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bar_edge.benchmarks import bench, contenders
from bar_edge.benchmarks.measure import Contender
from bar_edge.benchmarks.plan import Baseline, Plan
from bar_edge.export.prepack import prepack_bundle
from bar_edge.runtime import engines, weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.compiler import KERNELS
from tests.runtime.engines.cuda.emulated import EmulatedDevice, EmulatedEngine
from tests.runtime.engines.cuda.host import HostKernels, build

ROUNDS = 6
TICK = 1e-6  # seconds that everything takes on the emulated GPU
COPIED = 2**20  # bytes that it is asked to copy


@pytest.fixture(scope="session")
def other_weights(small: Any, tmp_path_factory: pytest.TempPathFactory, reseal: Callable[[Path], None]) -> Bundle:
    """A sound bundle of the same shapes that draws something else."""
    folder = tmp_path_factory.mktemp("other") / "other-weights"
    shutil.copytree(small.bundle.path, folder)
    place = weights.read_places(folder / weights.FILE_NAME)["latent_condition_proj.weight"]
    values = np.memmap(folder / weights.FILE_NAME, np.float32, "r+", place.offset, place.shape)
    values *= -1
    values.flush()
    reseal(folder)
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def measured(small: Any, other_weights: Bundle) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """(report, images) of the reference, an exact, a quantized and a wrong bundle at two batch sizes."""
    plan = Plan.of(
        [small.bundle, small.quantized("int8"), other_weights],
        baseline=Baseline(small.generator, small.tokenizer, small.config, ("fp32",)), engines=(), batch_sizes=(2, 1, 2),
        rounds=ROUNDS, warmup=2, threads=1, seed=4, command="bar-edge bench <the command>",
    )  # fmt: skip
    return bench.run(plan, lambda what, done, total: None)


class InProcess:
    """A contender without a process of its own, in the place of `measure.Worker`."""

    pid, load_seconds = 0, 0.5

    def __init__(self, contender: Contender, threads: int, answer_seconds: float | None = None) -> None:
        module, _, name = contender.factory.partition(":")
        small = {
            "Machine": {"mebibytes": 1, "matrix": 8},
            "Gpu": {"mebibytes": COPIED // 2**20, "copies": 3, "awake_after": 0},
        }
        self._contender = getattr(import_module(module), name)(**{**contender.arguments, **small.get(name, {})})

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def call(self, method: str, *arguments: Any) -> Any:
        self.begin(method, *arguments)
        return self.answer()

    def begin(self, method: str, *arguments: Any) -> None:
        self._begun = lambda: getattr(self._contender, method)(*arguments)

    def answer(self) -> Any:
        return self._begun()

    def peak_rss_bytes(self) -> int:
        return 1

    def stop(self) -> None:
        """Nothing to end."""


@pytest.fixture(scope="session")
def prepacked(small: Any, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small bundle, compiled for the engine `cuda`."""
    return prepack_bundle(small.bundle, tmp_path_factory.mktemp("prepacked") / "bundle-cuda")


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The loop's kernels on the CPU. Skips where there is no g++."""
    return HostKernels(build(KERNELS, tmp_path_factory.mktemp("host_kernels")))


@pytest.fixture
def emulated_gpu(
    small: Any, kernels: HostKernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> list[EmulatedDevice]:
    """The engine `cuda` draws on emulated devices, with the graphs of the small bundle; all that are made."""
    made: list[EmulatedDevice] = []
    started = engines.start

    def start(name: str, *others: Any) -> engines.Engine:
        if name != "cuda":
            return started(name, *others)
        engine = EmulatedEngine(small.bundle, kernels, tmp_path)
        made.append(engine.device)
        engine.device.tick = TICK
        return engine

    def device() -> EmulatedDevice:
        made.append(EmulatedDevice(kernels))
        made[-1].tick = TICK
        return made[-1]

    monkeypatch.setattr(engines, "status", lambda name: engines.Status(name, True, "emulated"))
    monkeypatch.setattr(engines, "start", start)
    monkeypatch.setattr(contenders, "CudaDevice", device)
    return made


@pytest.fixture
def bench_on_gpu(
    emulated_gpu: list[EmulatedDevice], small: Any, prepacked: Bundle, monkeypatch: pytest.MonkeyPatch
) -> bench.Bench:
    """A bench of PyTorch, which only proves, and the bundle for `cuda`, in this process."""
    monkeypatch.setattr(bench, "Worker", InProcess)
    monkeypatch.setattr(bench, "MAX_OVERHEAD", math.inf)  # whatever else this machine does meanwhile
    plan = Plan.of(
        [prepacked],
        baseline=Baseline(small.generator, small.tokenizer, small.config, ("fp32",), reference_timed=False),
        engines=(), batch_sizes=(1, 2), rounds=2, warmup=1, threads=1, seed=4, command="the command",
    )  # fmt: skip
    return bench.Bench(plan, lambda what, done, total: None)
