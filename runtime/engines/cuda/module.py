"""The kernels of `products.cu` on a device, in blocks of their own size."""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bar_edge.runtime.engines.cuda.compiler import OPTIONS, compile_source
from bar_edge.runtime.engines.cuda.device import Argument, CudaDevice, load_driver
from bar_edge.runtime.errors import EngineError

PRODUCTS = Path(__file__).with_name("products.cu")
THREADS = 256  # of every block; products.cu has the same number


class Module(Protocol):
    """Kernels that can be launched."""

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Argument]) -> None:
        """Put a kernel of `products.cu` into the device's stream, in blocks of `THREADS`."""

    def close(self) -> None:
        """Release what it holds."""


class CudaModule:
    """Compiled for the GPU that is there, once."""

    def __init__(self, device: CudaDevice) -> None:
        """Called with the device current. Raises EngineError."""
        self._driver = load_driver()
        self._stream = device.stream
        (self._module,) = self._checked(self._driver.cuModuleLoadData(compile_source(PRODUCTS, device.sm, OPTIONS)))
        self._functions: dict[str, Any] = {}

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Argument]) -> None:
        driver = self._driver
        if kernel not in self._functions:
            (self._functions[kernel],) = self._checked(driver.cuModuleGetFunction(self._module, kernel.encode()))
        values = [np.array(a, dtype=np.uint64) if isinstance(a, int) else np.array(a) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        sizes = (blocks, 1, 1, THREADS, 1, 1)
        self._checked(
            driver.cuLaunchKernel(self._functions[kernel], *sizes, 0, self._stream, ctypes.addressof(pointers), 0)
        )

    def close(self) -> None:
        self._checked(self._driver.cuModuleUnload(self._module))

    def _checked(self, returned: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a driver call returned besides its status. Raises EngineError."""
        status, *values = returned
        if status != self._driver.CUresult.CUDA_SUCCESS:
            raise EngineError(f"the CUDA driver answered {status.name}")
        return tuple(values)
