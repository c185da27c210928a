"""kernels.cu and model.cu on the CPU, as C++ and as the PTX of NVRTC, and on the GPU, once per session."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bar_edge.runtime.engines.cuda.compiler import KERNELS
from bar_edge.runtime.engines.cuda.module import MODEL
from bar_edge.runtime.errors import EngineError

from . import ptx as compiled
from .host import NATIVE, HostKernels, build

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


@pytest.fixture(scope="session")
def apart() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program on kernels in a process of its own, which may crash, and does at a data race in PTX."""

    def run(program: str, on: HostKernels, *arguments: str) -> subprocess.CompletedProcess[str]:
        settings = {"PYTHONFAULTHANDLER": "1", "PTX_RACES": "1"}
        folders = [str(Path(__file__).parent), str(on.path)]
        command = [sys.executable, "-c", PROGRAM + program, *folders, *arguments]
        return subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, timeout=300, check=False
        )

    return run
