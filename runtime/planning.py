"""Latency and memory of a workload on a device, reckoned before anything is built there.

A linear layer takes the longer of reading its weights and multiplying them; the small operations between the layers
and the waiting between dependent phases come on top. Nothing overlaps across layers. docs/planning.md explains the
model, its constants and its errors against what was measured. Every engine is taken to work in the chunks in which
the ONNX Runtime engine does.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from bar_edge.runtime.devices import Device
from bar_edge.runtime.engines.onnxruntime import DECODE_IMAGES, MODULATION_BYTES, PREFIX_ROWS, UNCONDITIONAL_BYTES
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.spec import DECODER_HEADS
from bar_edge.runtime.workload import Layer, Workload

USABLE_MEMORY = 0.9  # of the device's; the rest is left to the system, nominal

_TABLE_COPIES = 3  # a modulation table is computed, transposed and concatenated


@dataclass(frozen=True)
class Cost:
    """Seconds by what they are spent on."""

    memory: float = 0.0  # reading weights and the KV cache
    arithmetic: float = 0.0
    elementwise: float = 0.0  # the small operations between products
    waiting: float = 0.0  # between dependent phases

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __mul__(self, times: float) -> "Cost":
        return Cost(*(getattr(self, field.name) * times for field in fields(self)))

    @property
    def seconds(self) -> float:
        """The sum."""
        return self.memory + self.arithmetic + self.elementwise + self.waiting

    @property
    def limit(self) -> str:
        """What most of the time is spent on."""
        shares = asdict(self)
        return max(shares, key=lambda name: shares[name])


@dataclass(frozen=True)
class Prediction:
    """A batch of B images, all of different classes. Latencies in seconds."""

    precision: str
    batch: int
    token: Cost  # one token of the whole batch, averaged over an image
    first_token_seconds: float  # prefix, its modulation and the first token
    decode_seconds: float  # of the whole batch
    image_seconds: float  # per image
    token_bytes: int  # weights and filled cache that one token of the whole batch reads
    reading_seconds: float  # per image, if it took nothing but its bytes over the device's full bandwidth
    memory_bytes: int
    fits: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            **asdict(self),
            "token_seconds": self.token.seconds,
            "limit": self.token.limit,
            "images_per_second": 1 / self.image_seconds,
        }


def predict(workload: Workload, device: Device, batch: int) -> Prediction:
    """Latency and memory of drawing `batch` images together. Raises RequestError if the device has no rate for it."""
    missing = workload.precisions - set(device.rates)
    if missing:
        raise RequestError(f"{device.name} runs {', '.join(device.rates)}, not {', '.join(sorted(missing))}")
    run, reading = BatchCost(workload, device, batch), BatchCost(workload, _reading_alone(device), batch)
    memory = memory_bytes(workload, device, batch)
    return Prediction(
        precision=workload.precision,
        batch=batch,
        token=run.average_token(),
        first_token_seconds=run.first_token().seconds,
        decode_seconds=run.decode().seconds,
        image_seconds=run.images().seconds / batch,
        token_bytes=round(reading.average_token().seconds * device.bandwidth),
        reading_seconds=reading.images().seconds / batch,
        memory_bytes=memory,
        fits=memory <= device.memory_bytes * USABLE_MEMORY,
    )


def _reading_alone(device: Device) -> Device:
    """A device of the same bandwidth, all of it achieved, on which nothing else takes time."""
    rates = dict.fromkeys(device.rates, math.inf)
    return replace(device, bandwidth_fraction=1.0, rates=rates, elementwise_bandwidth=math.inf, phase_seconds=0.0)


def largest_batch(workload: Workload, device: Device) -> int:
    """The most images whose batch fits the device's memory; 0 if not even one does."""
    limit = device.memory_bytes * USABLE_MEMORY
    low, high = 0, 1
    while memory_bytes(workload, device, high) <= limit:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if memory_bytes(workload, device, middle) <= limit else (low, middle)
    return low


class BatchCost:
    """The parts of drawing one batch, each as a `Cost`."""

    def __init__(self, workload: Workload, device: Device, batch: int) -> None:
        self._w, self._device, self._batch = workload, device, batch
        self._sizes = _Sizes(workload, device, batch)

    def token(self, filled: int) -> Cost:
        """One token, when the cache holds `filled` positions of every row."""
        w, sizes = self._w, self._sizes
        spec = w.spec
        phases = 5 * spec.num_layers + 2 + w.passes * (2 * spec.head_layers + 1)
        cache = Cost(memory=sizes.cache_bytes(sizes.rows, filled) / self._device.read_bandwidth)
        head = self._run(w.head_modulation, sizes.rows * w.passes) + self._run(w.head_pass, sizes.rows) * w.passes
        return self._run(w.trunk, sizes.rows) + cache + head + self._wait(phases)

    def average_token(self) -> Cost:
        """One token, averaged over an image."""
        spec = self._w.spec
        return self.token(spec.prefix_length + spec.num_tokens // 2)

    def first_token(self) -> Cost:
        """From class ids to the first token."""
        return self.prefix() + self._chunk(self._sizes.chunk) + self.token(self._w.spec.prefix_length)

    def prefix(self) -> Cost:
        """All prefix positions but the last, for every class of the batch, and their modulation."""
        w, sizes = self._w, self._sizes
        positions = w.spec.prefix_length - 1
        groups = math.ceil(sizes.classes / PREFIX_ROWS)
        rows = sizes.classes / groups
        group = self._run(w.trunk, rows * positions) + self._wait(5 * w.spec.num_layers)
        head = self._run(w.head_modulation, rows) + self._run(w.head_pass, rows)  # drawn with the prefix, never used
        return self._run(w.modulation, positions * sizes.classes) + (group + head) * groups

    def modulation(self) -> Cost:
        """The modulation of all drawn positions, in chunks."""
        positions = self._w.spec.num_tokens
        return self._chunk(self._sizes.chunk) * (positions / self._sizes.chunk)

    def decode(self) -> Cost:
        """Bits to pixels. The elementwise work of so many rows is part of the device's rates."""
        w = self._w
        positions = 1 + w.spec.image_seq_len
        groups = math.ceil(self._batch / DECODE_IMAGES)
        rows = self._batch / groups * positions
        attention = 2 * rows * positions * w.decoder_width * w.decoder_layers
        rate = self._device.rate(self._device.activation_precision(w.precision))
        products = self._products(w.decoder, rows) + Cost(arithmetic=attention / rate)
        return (products + self._wait(5 * w.decoder_layers)) * groups

    def images(self) -> Cost:
        """The whole batch."""
        return self.prefix() + self.modulation() + self.average_token() * self._w.spec.num_tokens + self.decode()

    def _chunk(self, positions: int) -> Cost:
        return self._run(self._w.modulation, positions * self._sizes.stepped_classes) + self._wait(1)

    def _run(self, layers: Sequence[Layer], rows: float) -> Cost:
        values = rows * sum(layer.outputs for layer in layers)  # each is written, and read by what follows
        moved = 2 * values * self._device.activation_bytes(self._w.precision)
        return self._products(layers, rows) + Cost(elementwise=moved / self._device.elementwise_bandwidth)

    def _products(self, layers: Sequence[Layer], rows: float) -> Cost:
        memory = arithmetic = 0.0
        for layer in layers:
            reading = layer.bytes / self._device.read_bandwidth
            multiplying = layer.weights * rows / self._device.rate(layer.precision)
            if reading >= multiplying:
                memory += reading
            else:
                arithmetic += multiplying
        return Cost(memory, arithmetic)

    def _wait(self, phases: int) -> Cost:
        return Cost(waiting=phases * self._device.phase_seconds)


def memory_bytes(workload: Workload, device: Device, batch: int) -> int:
    """Peak memory of a batch."""
    spec = workload.spec
    sizes = _Sizes(workload, device, batch)
    prefix = min(sizes.classes, PREFIX_ROWS)
    prefix_positions = spec.prefix_length - 1
    full = spec.prefix_length + spec.num_tokens
    tables = max(sizes.classes * prefix_positions, sizes.stepped_classes * sizes.chunk) * sizes.modulation_bytes
    held = device.fixed_bytes + workload.stored_bytes + sizes.unconditional_bytes
    sampling = (
        sizes.cache_bytes(sizes.rows + prefix, full)
        + _TABLE_COPIES * tables
        + prefix * prefix_positions * sizes.modulation_bytes  # the prefix's own rows of the table
    )
    positions = 1 + spec.image_seq_len
    values = positions * 8 * workload.decoder_width + positions**2 * DECODER_HEADS  # widest layer in and out; scores
    return held + sampling + min(batch, DECODE_IMAGES) * values * device.activation_bytes(workload.precision)


class _Sizes:
    """Row and byte counts of a batch, as the engine arranges it."""

    def __init__(self, workload: Workload, device: Device, batch: int) -> None:
        spec = workload.spec
        self._spec, self._width = spec, device.activation_bytes(workload.precision)
        self.rows = batch * (2 if workload.guided else 1)
        self.classes = batch + workload.guided
        self.modulation_bytes = 6 * spec.num_layers * spec.hidden_size * self._width  # one class, one position
        table = self.modulation_bytes * (spec.prefix_length + spec.num_tokens - 1)
        self.unconditional_bytes = table if workload.guided and table <= UNCONDITIONAL_BYTES else 0
        # the unconditional class is computed once and kept, if its table is not too large
        self.stepped_classes = batch if self.unconditional_bytes else self.classes
        chunk = MODULATION_BYTES // (self.modulation_bytes * self.stepped_classes)
        self.chunk = min(max(1, chunk), spec.num_tokens)

    def cache_bytes(self, rows: int, positions: int) -> int:
        """K and V of all layers."""
        return rows * positions * 2 * self._spec.num_layers * self._spec.hidden_size * self._width
