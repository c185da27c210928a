"""The CUDA kernels on a GPU, behind the interface of `HostKernels`: the same tests run on both."""

import ctypes
from typing import Any

import numpy as np
from cuda.bindings import driver

from bar_edge.runtime.engines.cuda.compiler import kernels

_ALIGNMENT = 16  # an array keeps its address modulo this: the copy kernels depend on it


class GpuKernels:
    """kernels.cu on the first GPU. Raises RuntimeError where there is no driver or no GPU."""

    def __init__(self) -> None:
        _checked(driver.cuInit(0))
        device = _checked(driver.cuDeviceGet(0))
        _checked(driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(device))))
        attribute = driver.CUdevice_attribute
        major, minor = (
            _checked(driver.cuDeviceGetAttribute(of, device))
            for of in (
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self._module = _checked(driver.cuModuleLoadData(kernels(10 * major + minor)))

    def launch(self, name: str, grid: int, block: int, *args: np.ndarray | np.generic | None) -> None:
        """Copy the arrays to the GPU, run the kernel, copy them back."""
        function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        copies = {i: _Copy(arg) for i, arg in enumerate(args) if isinstance(arg, np.ndarray)}
        values = [
            np.array(arg)
            if isinstance(arg, np.generic)
            else np.array(copies[i].address if i in copies else 0, np.uint64)
            for i, arg in enumerate(args)
        ]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        _checked(driver.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, 0, ctypes.addressof(addresses), 0))
        _checked(driver.cuCtxSynchronize())
        for copy in copies.values():
            copy.read_back()


class _Copy:
    """A host array's copy in device memory."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self._allocated = _checked(driver.cuMemAlloc(array.nbytes + _ALIGNMENT))
        self.address = int(self._allocated) + array.ctypes.data % _ALIGNMENT
        _checked(driver.cuMemcpyHtoD(self.address, array.ctypes.data, array.nbytes))

    def read_back(self) -> None:
        """Into the host array; frees the copy."""
        _checked(driver.cuMemcpyDtoH(self._array.ctypes.data, self.address, self._array.nbytes))
        _checked(driver.cuMemFree(self._allocated))


def _checked(returned: tuple[Any, ...]) -> Any:
    status, *values = returned
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"the CUDA driver answered {status.name}")
    return values[0] if values else None
