"""kernels.cu on the CPU and on the GPU, once per session."""

import pytest

from bar_edge.runtime.engines.cuda.compiler import KERNELS
from bar_edge.runtime.errors import EngineError

from .host import HostKernels, build

try:
    from .gpu import GpuKernels

    ON_GPU = GpuKernels()
except (ImportError, RuntimeError, EngineError) as error:  # no cuda-bindings, no driver, no GPU or no NVRTC for it
    ON_GPU, NO_GPU = None, str(error)


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    """The kernels on the CPU. Skips where there is no g++."""
    return HostKernels(build(KERNELS, tmp_path_factory.mktemp("host_kernels")))


@pytest.fixture(scope="session")
def gpu() -> "GpuKernels":
    """The kernels on the GPU. Skips where there is none."""
    if ON_GPU is None:
        pytest.skip(f"no GPU here to run the kernels: {NO_GPU}")
    return ON_GPU


@pytest.fixture(scope="session", params=["host", "gpu"] if ON_GPU else ["host"])
def kernels(request: pytest.FixtureRequest):
    """What runs kernels, in turn."""
    return request.getfixturevalue(request.param)
