"""Where the GPU's time goes, by the loop's own account: events around everything that a stage puts into the stream."""

from collections.abc import Iterator
from contextlib import contextmanager

from bar_edge.runtime.engines.cuda.device import CudaEvent, Device

STAGES = ("prefix", "trunk", "head", "decode")  # the head's includes sampling, the trunk's the head's modulation


class Timeline:
    """Seconds of every stage in the stream, span by span; what the GPU waits for the host between spans is in none.

    Within a span it is: the prefix's includes its uploads and what the host computes for them.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._spans: list[tuple[str, CudaEvent, CudaEvent]] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What is put into the stream within is of the stage `name`; called with the device current."""
        begin = self._device.record()
        yield
        self._spans.append((name, begin, self._device.record()))

    def seconds(self) -> dict[str, list[float]]:
        """Of the spans of each of `STAGES`, in order. Waits for the last one."""
        with self._device.current():
            spans = [(name, self._device.seconds(begin, end)) for name, begin, end in self._spans]
        return {stage: [seconds for name, seconds in spans if name == stage] for stage in STAGES}
