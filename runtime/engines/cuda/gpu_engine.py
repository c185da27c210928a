"""What every engine on a GPU is: loops of some sizes on one device, and batches in parts that fit them."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.engines import Batch, TokenProgress
from bar_edge.runtime.engines.cuda.device import CudaDevice, DeviceArray
from bar_edge.runtime.engines.cuda.loop import Graphs, Loop, copies_of
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.cuda.timeline import Timeline
from bar_edge.runtime.errors import CompatibilityError, EngineError
from bar_edge.runtime.spec import ModelSpec

Floats = NDArray[np.float32]


class GpuEngine(ABC):
    """Samples and decodes on a device. A loop starts when a batch first needs it."""

    def __init__(
        self, spec: ModelSpec, device: CudaDevice, profiles: Sequence[Profile], tables: Mapping[str, Floats]
    ) -> None:
        self.spec, self.device = spec, device
        self._profiles = sorted(profiles, key=lambda profile: profile.rows)
        self._tables = tables
        self._loops: dict[Profile, Loop] = {}
        self._latents: list[tuple[Floats, int]] = []  # and images, of the parts of the last batch but the last one
        self._last: tuple[Loop, int] | None = None  # the loop that drew the last part, and its images
        self._drawn: list[tuple[Loop, int]] = []  # the loops that hold the images drawn last, and how many

    @abstractmethod
    def graphs(self, profile: Profile) -> Graphs:
        """The graphs of a profile, loaded; called with the device current."""

    def sample(
        self, batch: Batch, progress: TokenProgress | None = None, history: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        parts = []
        for loop, begin, part in self._parts(batch):
            led = None if history is None else history[begin : begin + len(part.class_ids)]
            parts.append(loop.sample(part, progress, led))
            self._last = loop, len(part.class_ids)
        return np.concatenate(parts)

    def draw(
        self, batch: Batch, progress: TokenProgress | None = None, timeline: Timeline | None = None
    ) -> tuple[NDArray[np.uint8], Floats]:
        """`Engine.draw`; a `timeline` is told what the GPU took by stage."""
        drawn, where = [], []
        for loop, _, part in self._parts(batch):
            drawn.append(loop.draw(part, progress, timeline))
            self._last = loop, len(part.class_ids)
            where.append(self._last)
        self._drawn = where
        return np.concatenate([bits for bits, _ in drawn]), np.concatenate([images for _, images in drawn])

    def last_latents(self) -> Floats:
        loop, images = self._last_part()
        parts = [*self._latents, (loop.last_latents(images), images)]
        conditional = [latents[:images] for latents, images in parts]
        unconditional = [latents[images:] for latents, images in parts]
        return np.concatenate([*conditional, *unconditional])

    def first_logits(self) -> Floats:
        loop, images = self._last_part()
        return loop.first_logits(images)

    def decode(self, bits: Any) -> Floats:
        self._drawn = []
        loop = next(iter(self._loops.values())) if self._loops else self._loop(self._profiles[0])
        return loop.decode(bits)

    def images_on_device(self) -> DeviceArray:
        """The images [B, 3, H, W] drawn last, float32 as the decoder leaves them; valid until the next call."""
        if not self._drawn:
            raise EngineError("nothing was drawn since the last call")
        if len(self._drawn) > 1:
            raise EngineError(
                f"the batch was drawn in {len(self._drawn)} parts, so its images are not together on the device; "
                f"draw at most {self._drawn[0][1]} at once"
            )
        loop, images = self._drawn[0]
        return loop.images_on_device(images, self.device.stream)

    def close(self) -> None:
        """Also after an error of CUDA, when nothing can be given back but the context itself."""
        with ExitStack() as last:
            last.callback(self.device.close)
            for loop in self._loops.values():
                last.callback(loop.close)
            self._loops.clear()
            self._drawn.clear()

    def _last_part(self) -> tuple[Loop, int]:
        if self._last is None:
            raise EngineError("no token was sampled yet")
        return self._last

    def _parts(self, batch: Batch) -> Iterator[tuple[Loop, int, Batch]]:
        """The batch in parts that fit: in the smallest loop that holds it, or the largest several times."""
        count, copies = len(batch.class_ids), copies_of(batch.recipe)
        profile = next((one for one in self._profiles if one.rows // copies >= count), self._profiles[-1])
        capacity = profile.rows // copies
        if capacity < 1:
            raise CompatibilityError("these engines have one row, and guidance needs two for an image")
        self._latents, self._drawn, self._last = [], [], None
        for begin in range(0, count, capacity):
            if self._last is not None:  # the next part is drawn over its latents
                last, images = self._last
                self._latents.append((last.last_latents(images), images))
            yield self._loop(profile), begin, batch.part(begin, min(count, begin + capacity))

    def _loop(self, profile: Profile) -> Loop:
        if profile not in self._loops:
            with self.device.current():
                graphs = self.graphs(profile)
                try:
                    self._loops[profile] = Loop(self.spec, self._tables, graphs, self.device)
                except EngineError:
                    graphs.close()
                    raise
        return self._loops[profile]
