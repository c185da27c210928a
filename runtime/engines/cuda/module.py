"""The kernels of `model.cu` on a device, in blocks of their own size."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from bar_edge.runtime.engines.cuda.compiler import compile_source
from bar_edge.runtime.engines.cuda.device import Argument, CudaDevice, CudaKernels

MODEL = Path(__file__).with_name("model.cu")
THREADS = 256  # of every block; primitives.cuh has the same number


class Module(Protocol):
    """Kernels that can be launched."""

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Argument]) -> None:
        """Put a kernel of `model.cu` into the device's stream, in blocks of `THREADS`."""


def compile_model(sm: int) -> bytes:
    """model.cu as a cubin for compute capability `sm`, from the cache where it was compiled. Raises EngineError."""
    return compile_source(MODEL, sm)


def load_model(device: CudaDevice) -> CudaKernels:
    """Compiled for the GPU that is there, once; called with the device current. Raises EngineError."""
    return device.load(compile_model(device.sm), THREADS)
