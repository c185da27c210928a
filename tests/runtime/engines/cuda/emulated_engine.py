"""The engine `cuda` without a GPU: its kernels, built for the CPU, in the loop on an emulated device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.cuda.graphs import KernelGraphs
from bar_edge.runtime.engines.cuda.layers import check
from bar_edge.runtime.engines.cuda.loop import Loop
from bar_edge.runtime.engines.cuda.module import THREADS
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.cuda.resident import Weights
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_fine_grid, to_tokens
from bar_edge.runtime.spec import Recipe

from .emulated import Emulated, EmulatedDevice
from .host import HostKernels


class EmulatedModule:
    """Kernels of `model.cu` in the stream of an emulated device."""

    def __init__(self, model: HostKernels, device: EmulatedDevice) -> None:
        self._model, self._device = model, device

    def launch(self, kernel: str, blocks: int, arguments: Sequence[Any]) -> None:
        frozen = tuple(arguments)
        self._device.submit(kernel, lambda: self._model.launch(kernel, blocks, THREADS, *frozen))


def kernel_loop(bundle: Bundle, kernels: HostKernels, model: HostKernels, profile: Profile) -> Emulated:
    """A loop over the kernel graphs of a bundle compiled for `cuda`, on a device of its own."""
    device = EmulatedDevice(kernels)
    weights = Weights(bundle)
    check(bundle.spec, weights)
    module = EmulatedModule(model, device)
    graphs = KernelGraphs(bundle.spec, profile, weights, weights.load(device), device, module)
    return Emulated(Loop(bundle.spec, weights.tables, graphs, device), device)


class EmulatedGenerator:
    """What `selftest.run` asks of a generator."""

    engine_name = "cuda"

    def __init__(self, bundle: Bundle, loop: Loop) -> None:
        self.bundle, self.spec, self._loop = bundle, bundle.spec, loop

    def sample(
        self, class_ids: NDArray[np.int64], recipe: Recipe, noise: SeededNoise, *, history: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Bits [1, image_seq_len, token_size], led along others."""
        batch = Batch(class_ids, recipe, noise, noise.orders(self.spec.num_tokens))
        return to_fine_grid(self._loop.sample(batch, None, to_tokens(history, self.spec)), self.spec)

    def last_latents(self) -> NDArray[np.float32]:
        """Latents [2, W]."""
        return self._loop.last_latents(1)

    def first_logits(self) -> NDArray[np.float32]:
        """Logits [2, K, 2]."""
        return self._loop.first_logits(1)

    def decode_raw(self, bits: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images [1, 3, H, W]."""
        return self._loop.decode(bits)
