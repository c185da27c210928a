"""The CUDA kernels on a GPU, behind the interface of `HostKernels`: the same tests run on both."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver

from bar_edge.runtime.engines.cuda.compiler import compile_source

from .host import Argument, Part, Table

_ALIGNMENT = 16  # an array keeps its address modulo this: the copy kernels depend on it


class GpuKernels:
    """The kernels of a source on the first GPU. Raises RuntimeError where there is no driver or no GPU."""

    def __init__(self, source: Path) -> None:
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
        self._module = _checked(driver.cuModuleLoadData(compile_source(source, 10 * major + minor)))

    def launch(self, name: str, grid: int, block: int, *args: Argument) -> None:
        """Copy the arrays to the GPU, run the kernel, copy them back."""
        function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
        copies: dict[int, _Copy] = {}  # by the array's own address: what is given twice is copied once
        values = [np.array(arg) if isinstance(arg, np.generic) else _address(arg, copies) for arg in args]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        _checked(driver.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, 0, ctypes.addressof(addresses), 0))
        try:
            _checked(driver.cuCtxSynchronize())
        except RuntimeError as error:  # the context is broken: every test after this one would fail for it
            pytest.exit(f"{name}: {error}", returncode=1)
        for copy in copies.values():
            copy.read_back()


def _address(arg: Argument, copies: dict[int, "_Copy"]) -> np.ndarray:
    """Of what a pointer parameter takes, on the device. Raises TypeError for an address on the host."""
    if arg is None:
        return np.array(0, dtype=np.uint64)
    if isinstance(arg, Part):
        return np.array(_address(arg.array, copies) + np.uint64(arg.first * arg.array.itemsize))
    if isinstance(arg, Table):
        return _address(np.array([_address(array, copies) for array in arg.arrays], dtype=np.uint64), copies)
    if not isinstance(arg, np.ndarray):
        raise TypeError(f"{arg!r} means nothing on a GPU")
    if arg.ctypes.data not in copies:
        copies[arg.ctypes.data] = _Copy(arg)
    return np.array(copies[arg.ctypes.data].address, dtype=np.uint64)


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
