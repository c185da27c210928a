"""The devices `bar-edge plan` knows: memory, bandwidth, arithmetic rates, and where every figure comes from.

A measured device holds what runs on it gave. Every other device holds its vendor's peak figures and the nominal
fractions below, which are assumptions until something is measured there: its plans are projections.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.precisions import FP16, FP32, INT4_WEIGHT, INT8, INT8_WEIGHT

NOMINAL_BANDWIDTH_FRACTION = 0.85  # of the peak, streaming weights
NOMINAL_RATE_FRACTION = 0.5  # of the dense peak, in the products of these sizes
NOMINAL_PHASE_SECONDS = 2.5e-6  # launch or grid-wide barrier and the tail of the kernel before
NOMINAL_GPU_FIXED_BYTES = 600 * 2**20  # CUDA context and libraries

_TERA, _GIGA, _GIB = 1e12, 1e9, 2**30


@dataclass(frozen=True)
class Device:
    """One machine. Rates are multiply-adds per second (half of the vendors' operations per second)."""

    name: str
    title: str
    memory_bytes: int
    bandwidth: float  # bytes per second, peak or measured
    bandwidth_fraction: float  # what reading weights achieves of it
    rates: Mapping[str, float]  # by what layers are stored in; a precision that is missing cannot run here
    rate_fraction: float
    elementwise_bandwidth: float  # bytes per second that the small operations between the products read and write
    phase_seconds: float  # cost of one step that must wait for the whole result of the step before
    fixed_bytes: int  # held before the first weight is loaded
    sources: Mapping[str, str]  # of every figure above
    machine: Mapping[str, Any] | None = None  # how results measured on it describe it; None: nothing measured

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "measured": self.measured}

    @property
    def measured(self) -> bool:
        """Whether the figures come from runs on the device itself."""
        return self.machine is not None

    @property
    def read_bandwidth(self) -> float:
        """Bytes per second that reading weights achieves."""
        return self.bandwidth * self.bandwidth_fraction

    def rate(self, precision: str) -> float:
        """Multiply-adds per second that large products with such weights achieve."""
        return self.rates[precision] * self.rate_fraction

    def activation_precision(self, precision: str) -> str:
        """What activations and the KV cache are held in beside weights of a precision: fp32 or fp16."""
        return FP16 if FP16 in self.rates and precision != FP32 else FP32

    def activation_bytes(self, precision: str) -> int:
        """Bytes of one activation beside weights of a precision."""
        return 2 if self.activation_precision(precision) == FP16 else 4


def find_device(name: str) -> Device:
    """The device of that name. Raises RequestError if there is none."""
    if name not in DEVICES:
        raise RequestError(f"unknown device {name!r}; choose one of {', '.join(DEVICES)}")
    return DEVICES[name]


def device_of(machine: Mapping[str, Any]) -> Device | None:
    """The device a result file was measured on, from its `machine` entry."""
    return next(
        (device for device in DEVICES.values() if device.machine and device.machine.items() <= machine.items()), None
    )


def _gpu(
    name: str, title: str, memory_gib: float, gb_per_second: float, tera_operations: tuple[float, float, float],
    sources: Mapping[str, str],
) -> Device:  # fmt: skip
    """A GPU from its vendor's figures. `tera_operations`: dense fp32, fp16 with fp32 sums, int8."""
    fp32, fp16, int8 = (value * _TERA / 2 for value in tera_operations)
    bandwidth = gb_per_second * _GIGA
    return Device(
        name, title, round(memory_gib * _GIB), bandwidth, NOMINAL_BANDWIDTH_FRACTION,
        {FP32: fp32, FP16: fp16, INT8: int8, INT8_WEIGHT: fp16, INT4_WEIGHT: fp16}, NOMINAL_RATE_FRACTION,
        bandwidth * NOMINAL_BANDWIDTH_FRACTION, NOMINAL_PHASE_SECONDS, NOMINAL_GPU_FIXED_BYTES,
        {
            **sources,
            "achieved": f"{NOMINAL_BANDWIDTH_FRACTION} of the bandwidth, {NOMINAL_RATE_FRACTION} of the rates, "
            f"{NOMINAL_PHASE_SECONDS * 1e6:g} µs a phase, {NOMINAL_GPU_FIXED_BYTES / 2**20:.0f} MiB held: assumed, "
            "not measured on any GPU",
        },
    )  # fmt: skip


_ORIN_BRIEF = "NVIDIA Jetson AGX Orin Series Technical Brief, 2022"
_ORIN_RATES = "GPU only, dense: half of the sparse INT8 rate, fp16 a quarter; the DLAs are not counted"
_HOPPER_RATES = "dense: half of the sparse figures; fp32 outside the tensor cores"

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _gpu(
            "orin", "Jetson AGX Orin 64 GB", 64, 204.8, (5.3, 42.5, 85),
            {"memory, bandwidth": _ORIN_BRIEF, "rates": f"{_ORIN_BRIEF}; {_ORIN_RATES} (170 TOPS sparse)"},
        ),
        _gpu(
            "orin-nx", "Jetson Orin NX 16 GB", 16, 102.4, (1.88, 15, 30),
            {
                "memory, bandwidth": "NVIDIA Jetson Orin NX Series data sheet, 2023",
                "rates": f"same data sheet, 1024 cores at 918 MHz; {_ORIN_RATES} (60 TOPS sparse)",
            },
        ),
        _gpu(
            "orin-nano", "Jetson Orin Nano 8 GB, Super mode", 8, 102, (2.09, 16.7, 33.5),
            {
                "memory, bandwidth": "NVIDIA Jetson Orin Nano Super Developer Kit data sheet, 2024",
                "rates": f"same data sheet, 1024 cores at 1020 MHz; {_ORIN_RATES} (67 TOPS sparse)",
            },
        ),
        _gpu(
            "thor", "Jetson AGX Thor (T5000)", 128, 273, (8.06, 258, 517),
            {
                "memory, bandwidth": "NVIDIA Jetson Thor Series Modules data sheet, 2025",
                "rates": "fp8 and fp16 dense, derived from 2070 TFLOPS sparse FP4 of the same data sheet (a quarter, "
                "an eighth); INT8 taken to be as fast as fp8; fp32 from 2560 cores at 1.575 GHz",
            },
        ),
        _gpu(
            "rtx4090", "GeForce RTX 4090", 24, 1008, (82.6, 165.2, 660.6),
            {"memory, bandwidth, rates": "NVIDIA Ada GPU Architecture white paper, 2022, appendix A; dense"},
        ),
        _gpu(
            "h100", "H100 SXM 80 GB", 80, 3350, (67, 989, 1979),
            {"memory, bandwidth, rates": f"NVIDIA H100 Tensor Core GPU data sheet, 2023; {_HOPPER_RATES}"},
        ),
        _gpu(
            "h200", "H200 SXM 141 GB", 141e9 / _GIB, 4800, (67, 989, 1979),
            {"memory, bandwidth, rates": f"NVIDIA H200 Tensor Core GPU data sheet, 2024; {_HOPPER_RATES}"},
        ),
        Device(
            "epyc-2core", "2 cores of an AMD EPYC with AVX-512 VNNI, ONNX Runtime on the CPU", 24_684_084 * 1024,
            33.6e9, 1.0, {FP32: 87e9, INT8: 338e9, INT8_WEIGHT: 157e9, INT4_WEIGHT: 178e9}, 1.0,
            2.2e9, 13e-6, 156_000_000,
            {
                "memory": "MemTotal of the machine, 2026-11-24",
                "bandwidth": "measured: median of the memory readings in benchmarks/results/products.json; not fitted",
                "rates": "int8-weight, int4-weight measured: 16 rows of the head's layers in products.json; fp32, int8 "
                "fitted to two decoders of earlier runs",
                "elementwise, phase": "fitted together to nine token medians of earlier runs",
                "fixed": "fitted to the peak memory of two earlier runs (56 MB after import, the rest sessions)",
                "earlier runs": "of BAR-B at batch 1 and 8 on 2026-11-24, cpu_bar_b_*.json in commit 1bf553d",
            },
            {"cpu": "AMD EPYC", "cores": 2},
        ),
    )
}  # fmt: skip
