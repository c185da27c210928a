"""The engine `cuda` without a GPU: its kernels, built for the CPU, in the loop on an emulated device."""

from collections.abc import Sequence
from typing import Any

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.graphs import KernelGraphs
from bar_edge.runtime.engines.cuda.layers import check
from bar_edge.runtime.engines.cuda.loop import Loop
from bar_edge.runtime.engines.cuda.module import THREADS
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.cuda.resident import Weights

from .emulated import Emulated, EmulatedDevice
from .host import HostKernels


class EmulatedModule:
    """Kernels of `products.cu` in the stream of an emulated device."""

    def __init__(self, products: HostKernels, device: EmulatedDevice) -> None:
        self._products, self._device = products, device

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Any]) -> None:
        frozen = tuple(arguments)
        self._device.submit(kernel, lambda: self._products.launch(kernel, blocks, THREADS, *frozen))


def kernel_loop(bundle: Bundle, kernels: HostKernels, products: HostKernels, profile: Profile) -> Emulated:
    """A loop over the kernel graphs of a bundle compiled for `cuda`, on a device of its own."""
    device = EmulatedDevice(kernels)
    weights = Weights(bundle)
    check(bundle.spec, weights)
    module = EmulatedModule(products, device)
    graphs = KernelGraphs(bundle.spec, profile, weights, weights.load(device), device, module)
    return Emulated(Loop(bundle.spec, weights.tables, graphs, device), device)
