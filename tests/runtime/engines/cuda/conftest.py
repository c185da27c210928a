"""kernels.cu and model.cu on the CPU, as C++ and as the PTX of NVRTC, and on the GPU, once per session."""

import os
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from bar_edge.runtime.engines.cuda.compiler import KERNELS
from bar_edge.runtime.engines.cuda.module import MODEL
from bar_edge.runtime.errors import EngineError

from . import ptx as compiled
from .host import NATIVE, RACE_FOUND, HostKernels, build

try:
    from .gpu import GpuKernels

    ON_GPU = {source: GpuKernels(source) for source in (KERNELS, MODEL)}
except (ImportError, RuntimeError, EngineError) as error:  # no cuda-bindings, no driver, no GPU or no NVRTC for it
    ON_GPU, NO_GPU = {}, str(error)

RUN_BY = ["host", "ptx"] + ["gpu"] * bool(ON_GPU)

PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from pathlib import Path
from host import HostKernels

kernels = HostKernels(Path(sys.argv[2]))
"""


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The kernels on the CPU. Skips where there is no g++."""
    return HostKernels(build(KERNELS, tmp_path_factory.mktemp("host_kernels")))


@pytest.fixture(scope="session")
def host_model(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The kernels of the engine `cuda`, model.cu, on the CPU. Skips where there is no g++."""
    return HostKernels(build(MODEL, tmp_path_factory.mktemp("host_model"), NATIVE))


@pytest.fixture(scope="session")
def ptx(host: HostKernels, tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The kernels as NVRTC compiles them, on the CPU. Skips where there is no NVRTC."""
    return _compiled(KERNELS, host, tmp_path_factory.mktemp("ptx_kernels"))


@pytest.fixture(scope="session")
def ptx_model(host_model: HostKernels, tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The kernels of model.cu as NVRTC compiles them, on the CPU. Skips where there is no NVRTC."""
    return _compiled(MODEL, host_model, tmp_path_factory.mktemp("ptx_model"))


def _compiled(source: Path, host: HostKernels, folder: Path) -> HostKernels:
    try:
        return HostKernels(compiled.build(source, folder, host))
    except EngineError as error:
        pytest.skip(f"no NVRTC here to compile the kernels: {error}")


@pytest.fixture(scope="session")
def gpu() -> "GpuKernels":
    """The kernels on the GPU. Skips where there is none."""
    if not ON_GPU:
        pytest.skip(f"no GPU here to run the kernels: {NO_GPU}")
    return ON_GPU[KERNELS]


@pytest.fixture(scope="session", params=RUN_BY)
def kernels(request: pytest.FixtureRequest):
    """What runs kernels, in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session", params=RUN_BY)
def model(request: pytest.FixtureRequest):
    """What runs the kernels of model.cu, in turn."""
    return ON_GPU[MODEL] if request.param == "gpu" else request.getfixturevalue(f"{request.param}_model")


Apart = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def apart() -> Apart:
    """Run a program on kernels in a process of its own, which may crash."""

    def run(program: str, on: HostKernels, *arguments: str) -> subprocess.CompletedProcess[str]:
        return _run(program, on.path, {"PYTHONFAULTHANDLER": "1"}, *arguments)

    return run


@pytest.fixture(scope="session")
def thread_sanitizer(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    """Run a program on a source's kernels, finding data races. Skips where ThreadSanitizer does not work."""
    folder = tmp_path_factory.mktemp("thread_sanitizer")

    @cache
    def library(source: Path) -> Path:
        return build(source, folder, ["-fsanitize=thread"])

    def run(program: str, source: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
        found = subprocess.run(["g++", "-print-file-name=libtsan.so"], capture_output=True, text=True, check=True)
        settings = {"LD_PRELOAD": found.stdout.strip(), "TSAN_OPTIONS": f"exitcode={RACE_FOUND}"}
        return _run(program, library(source), settings, *arguments)

    try:
        done = run("", KERNELS)
    except RuntimeError as error:
        pytest.skip(f"g++ has no ThreadSanitizer here: {error}")
    if done.returncode:
        pytest.skip(f"ThreadSanitizer does not run here: {done.stderr.strip()}")
    return run


def _run(program: str, library: Path, settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    folders = [str(Path(__file__).parent), str(library)]
    command = [sys.executable, "-c", PROGRAM + program, *folders, *arguments]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False)
