"""The engine `cuda`: the whole model in hand-written kernels, for GPUs without TensorRT or where it loses.

A compiled bundle runs on any GPU from SM 8.0 on: kernels are compiled at the first start, for the GPU that is there.
Batch sizes and allocations are not compiled either. There is a profile for 1, 2, 4, ... images, as many as fit beside
one another in the memory that the weights leave; each starts when a batch first needs it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.cuda.compiler import kernels
from bar_edge.runtime.engines.cuda.device import CudaDevice, check_compiler, driver_version, host_sm, load_driver
from bar_edge.runtime.engines.cuda.gpu_engine import GpuEngine
from bar_edge.runtime.engines.cuda.graphs import ITEMSIZE, KernelGraphs, scratch_bytes
from bar_edge.runtime.engines.cuda.layers import check
from bar_edge.runtime.engines.cuda.loop import Loop, buffer_sizes
from bar_edge.runtime.engines.cuda.module import load_model
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.cuda.resident import NAME, Weights
from bar_edge.runtime.errors import CompatibilityError, EngineError
from bar_edge.runtime.spec import ModelSpec

LEAST_SM = 80
_MOST_IMAGES = 256
_USED = 0.9  # of the free memory; what is left is for captured graphs, and for others


def status() -> tuple[bool, str]:
    """(usable, versions or reason)."""
    try:
        driver = load_driver()
        sm = host_sm()
        if sm is None:
            return False, "the NVIDIA driver finds no GPU"
        check_capability(sm)
        check_compiler(driver)
        kernels(sm)
    except (EngineError, CompatibilityError) as error:
        return False, str(error)
    return True, f"SM {sm / 10:.1f}, driver for CUDA {driver_version()}"


def start(bundle: Bundle, threads: int, stream: Any = None) -> "CudaEngine":
    """An engine on a verified bundle. `threads` is for CPU engines. Raises EngineError, CompatibilityError."""
    return CudaEngine(bundle, partial(CudaDevice, stream))


def check_capability(sm: int) -> None:
    """Raise CompatibilityError for a GPU that the kernels are not written for."""
    if sm < LEAST_SM:
        raise CompatibilityError(
            f"this GPU is SM {sm / 10:.1f}, the engine cuda needs SM {LEAST_SM / 10:.1f}; use TensorRT or ONNX Runtime"
        )


def profiles(spec: ModelSpec, passes: int, weights: Weights, free_bytes: int) -> Iterator[Profile]:
    """Profiles of 1, 2, 4, ... guided images: the first one, and others while all fit together."""
    images, needed = 1, 0
    while images <= _MOST_IMAGES:
        profile = Profile.of(images, guided=True, passes=passes)
        buffers = buffer_sizes(spec, profile, itemsize=ITEMSIZE, in_place=True)
        needed += sum(buffers.values()) + scratch_bytes(spec, profile, weights)
        if images > 1 and needed > _USED * free_bytes:
            return
        yield profile
        images *= 2


class CudaEngine(GpuEngine):
    """Samples and decodes with kernels of our own."""

    name = NAME

    def __init__(self, bundle: Bundle, open_device: Callable[[], CudaDevice]) -> None:
        """Raises BundleError, CompatibilityError, EngineError."""
        weights = Weights(bundle)
        check(bundle.spec, weights)
        self._weights, tables = weights, weights.tables
        device = open_device()
        with ExitStack() as undo:  # if starting fails
            undo.callback(device.close)
            check_capability(device.sm)
            with device.current():
                self._module = load_model(device)
                self._resident = weights.load(device)
            undo.pop_all()
        super().__init__(bundle.spec, device, (), tables)
        self._fitting: dict[int, list[Profile]] = {}  # by head passes of an allocation
        self._profiles = self._profiles_of(len(bundle.recipe.allocation))

    def graphs(self, profile: Profile) -> KernelGraphs:
        try:
            return KernelGraphs(self.spec, profile, self._weights, self._resident, self.device, self._module)
        except MemoryError as error:
            raise EngineError(
                f"the activations of {profile.rows} rows need {scratch_bytes(self.spec, profile, self._weights)} bytes "
                f"of device memory, {self.device.free_bytes()} are free; free some, or draw fewer images at once"
            ) from error

    def _parts(self, batch: Batch) -> Iterator[tuple[Loop, int, Batch]]:
        self._profiles = self._profiles_of(len(batch.recipe.allocation))
        return super()._parts(batch)

    def _profiles_of(self, passes: int) -> list[Profile]:
        """What fits beside the loops that there are when an allocation first has so many passes."""
        if passes not in self._fitting:
            with self.device.current():
                free = self.device.free_bytes()
            self._fitting[passes] = list(profiles(self.spec, passes, self._weights, free))
        return self._fitting[passes]

    def close(self) -> None:
        try:
            with self.device.current():
                self._resident.close()
        finally:
            super().close()
