"""How far plans are from what was measured: every latency and peak memory in a folder of result files."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bar_edge.runtime.devices import Device, device_of
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.planning import predict
from bar_edge.runtime.spec import Variant
from bar_edge.runtime.workload import of_variant

PEAK_MEMORY = "peak_memory"
TARGET = 0.25  # of relative error, on measured devices


@dataclass(frozen=True)
class Deviation:
    """One measured figure (seconds, or bytes for `peak_memory`) beside its prediction."""

    file: str
    bundle: str
    precision: str
    batch: int
    stage: str
    samples: int
    measured: float  # median
    predicted: float

    @property
    def error(self) -> float:
        """Relative to what was measured; positive where the plan is too slow or too large."""
        return self.predicted / self.measured - 1

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "error": self.error}


def deviations(folder: Path, variant: Variant, device: Device) -> list[Deviation]:
    """All results of a variant on a device, in the order of their files.

    Files of other kinds, and what was measured beside the bundles, are passed over. Raises RequestError if nothing is
    left, or for a damaged file.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; give one of result files")
    found: list[Deviation] = []
    for file in sorted(folder.glob("*.json")):
        for measured in _read(file, variant, device):
            if measured.precision in device.rates:
                found += _beside(file.name, measured, variant, device)
    if not found:
        raise RequestError(
            f"{folder}: has no latency result of {variant.name} on {device.name}; point --against to a folder of "
            "result files, and plan a device and variant that were measured"
        )
    return found


@dataclass(frozen=True)
class _Measured:
    bundle: str
    precision: str
    batch: int
    figures: Mapping[str, tuple[int, float]]  # samples and median


def _read(file: Path, variant: Variant, device: Device) -> list[_Measured]:
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{file}: is not JSON ({error}); measure again") from error
    if not isinstance(report, dict):
        return []
    try:
        if device_of(report.get("machine", {})) is not device:
            return []
        return [*_of_bench(report, variant), *_of_scaling(report, variant)]
    except (AttributeError, KeyError, TypeError) as error:
        raise RequestError(
            f"{file}: not a whole result file ({type(error).__name__}: {error}); measure again, or move it elsewhere"
        ) from error


def _of_bench(report: dict[str, Any], variant: Variant) -> Iterator[_Measured]:
    """Bundles in a report of `bar-edge bench` (docs/benchmarking.md)."""
    if report.get("settings", {}).get("variant") != variant.name:
        return
    for entry in report["contenders"]:
        if entry["kind"] != "bundle":
            continue
        for batch in entry.get("batches", ()):
            stages = ("token", "first_token", "decode", "image")
            figures = {stage: (batch[stage]["count"], batch[stage]["p50"]) for stage in stages if stage in batch}
            figures[PEAK_MEMORY] = (1, batch["peak_rss_bytes"])
            yield _Measured(entry["name"], entry["precision"], batch["batch_size"], figures)


def _of_scaling(report: dict[str, Any], variant: Variant) -> Iterator[_Measured]:
    """Runs of `bar_edge.benchmarks.scaling` on all cores; without the first token and the decoder, cold in many."""
    for run in report.get("runs", ()):
        if (run.get("variant"), run.get("threads")) == (variant.name, report["machine"]["cores"]):
            figures = {
                "token": (run["tokens"] - 1, run["token_seconds"]),
                "image": (1, run["image_seconds"]),
                PEAK_MEMORY: (1, run["peak_rss_bytes"]),
            }
            yield _Measured(run["bundle"], run["precision"], run["batch"], figures)


def _beside(file: str, measured: _Measured, variant: Variant, device: Device) -> Iterator[Deviation]:
    plan = predict(of_variant(variant, measured.precision), device, measured.batch)
    predicted = {
        "token": plan.token.seconds,
        "first_token": plan.first_token_seconds,
        "decode": plan.decode_seconds,
        "image": plan.image_seconds,
        PEAK_MEMORY: plan.memory_bytes,
    }
    for figure, (samples, value) in measured.figures.items():
        yield Deviation(
            file, measured.bundle, measured.precision, measured.batch, figure, samples, value, predicted[figure]
        )
