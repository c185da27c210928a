"""How far plans are from what was measured: every latency and peak memory in a folder of result files."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bar_edge.runtime.devices import Device, device_of
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.planning import BatchCost, memory_bytes
from bar_edge.runtime.precisions import PRECISIONS
from bar_edge.runtime.spec import Variant
from bar_edge.runtime.workload import Workload, of_variant

PEAK_MEMORY = "peak_memory"
TARGET = 0.25  # of relative error, on measured devices
_SAME_BYTES = 0.01  # relative difference up to which a bundle is taken to be of a precision


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
    left, or for a bundle of unknown precision.
    """
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such folder; give one of result files")
    found: list[Deviation] = []
    for file in sorted(folder.glob("*.json")):
        report = _read(file)
        if device_of(report.get("machine", {})) is not device:
            continue
        if report.get("settings", {}).get("variant") == variant.name:
            found += _of_bench(file.name, report, variant, device)
        elif report.get("summary", {}).get("model") == variant.name:
            found += _of_report(file.name, report, variant, device)
    if not found:
        raise RequestError(
            f"{folder}: has no latency result of {variant.name} on {device.name}; point --against to a folder of "
            "result files, and plan a device and variant that were measured"
        )
    return found


def _read(file: Path) -> dict[str, Any]:
    try:
        report = json.loads(file.read_text())
    except ValueError as error:
        raise RequestError(f"{file}: is not JSON ({error}); measure again") from error
    return report if isinstance(report, dict) else {}


def _of_bench(file: str, report: dict[str, Any], variant: Variant, device: Device) -> Iterator[Deviation]:
    """Bundles in a report of `bar-edge bench` (docs/benchmarking.md)."""
    for entry in report["contenders"]:
        if entry["kind"] != "bundle" or entry["precision"] not in device.rates:
            continue
        workload = of_variant(variant, entry["precision"])
        for batch in entry.get("batches", ()):
            predicted = _stages(workload, device, batch["batch_size"], 0)
            measured = {stage: (batch[stage]["count"], batch[stage]["p50"]) for stage in predicted if stage in batch}
            measured[PEAK_MEMORY] = (1, batch["peak_rss_bytes"])
            for stage, (samples, value) in measured.items():
                yield Deviation(
                    file,
                    entry["name"],
                    workload.precision,
                    batch["batch_size"],
                    stage,
                    samples,
                    value,
                    predicted[stage],
                )


def _of_report(file: str, report: dict[str, Any], variant: Variant, device: Device) -> Iterator[Deviation]:
    """Bundles in a result of what came before `bar-edge bench`."""
    for entry in report["contenders"]:
        if "bundle" not in entry["arguments"] or "stages" not in entry:
            continue
        name, arguments = entry["name"], entry["arguments"]
        batch, tokens = arguments["batch"], arguments["tokens"]
        workload = _workload(variant, device, name, report["summary"]["bundles"][name]["bytes_per_token"])
        predicted = _stages(workload, device, batch, tokens)
        measured = {stage: (value["count"], value["median"]) for stage, value in entry["stages"].items()}
        measured[PEAK_MEMORY] = (1, entry["peak_rss_bytes"])
        for stage, (samples, value) in measured.items():
            yield Deviation(file, name, workload.precision, batch, stage, samples, value, predicted[stage])


def _stages(workload: Workload, device: Device, batch: int, tokens: int) -> dict[str, float]:
    """Predictions under the names results use. `tokens` 0 draws whole images; otherwise the image ends there."""
    run = BatchCost(workload, device, batch)
    whole = tokens == 0
    spec = workload.spec
    return {
        "token": run.token(spec.prefix_length + (spec.num_tokens if whole else tokens) // 2).seconds,
        "first_token": run.first_token().seconds,
        "decode": run.decode().seconds,
        "image": run.images().seconds / batch,
        PEAK_MEMORY: memory_bytes(workload, device, batch, decoded=whole),
    }


def _workload(variant: Variant, device: Device, bundle: str, bytes_per_token: int) -> Workload:
    """The precision whose bytes a measured bundle reads."""
    known = [of_variant(variant, precision) for precision in PRECISIONS if precision in device.rates]
    nearest = min(known, key=lambda workload: abs(workload.bytes_per_token - bytes_per_token))
    if abs(nearest.bytes_per_token / bytes_per_token - 1) > _SAME_BYTES:
        raise RequestError(
            f"{bundle} reads {bytes_per_token:,} bytes a token, which no precision of {variant.name} does "
            f"(nearest: {nearest.precision}, {nearest.bytes_per_token:,}); plan its bundle folder instead"
        )
    return nearest
