"""What a report says in words: every contender against the baselines, every quantized graph against its fp32."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bar_edge.benchmarks.profiles import MAX_OVERHEAD

# stage of the split -> (graph whose precision decides it, what `quantize` calls it, what readers call it)
_GRAPHS = {
    "prefix": ("modulation", "modulation", "prefix and modulation"),
    "trunk": ("trunk_step", "trunk", "trunk"),
    "head": ("head_pass", "head", "head"),
    "decode": ("decode", "decode", "decoder"),
}
_FP32 = "fp32"

Verdict = dict[str, Any]


def of_report(report: Mapping[str, Any], manifests: Mapping[str, Mapping[str, Any]]) -> list[Verdict]:
    """Verdicts in reading order. `manifests`: bundle name -> its manifest, which knows what was measured and rejected.

    Each is {contender, batch_size, graph (None: the whole image), against, ratio (None: not measured), sentence}.
    """
    verdicts: list[Verdict] = []
    timed = [entry for entry in report["contenders"] if entry["state"] == "timed"]
    for entry in timed:
        if entry["kind"] != "bundle":
            continue
        name, _, engine = entry["name"].rpartition(", ")
        exact = next((e for e in timed if _is_fp32_twin(e, engine)), None)
        timings = manifests.get(name, {}).get("quantization", {}).get("timings", [])
        for batch in entry["batches"]:
            verdicts += _whole(entry, batch, timed)
            if entry["precision"] != _FP32:
                twin = _batch_of(exact, batch["batch_size"]) if exact else None
                verdicts += _graph_by_graph(entry, batch, twin, timings)
    return verdicts


def _is_fp32_twin(entry: Mapping[str, Any], engine: str) -> bool:
    return entry["kind"] == "bundle" and entry["precision"] == _FP32 and entry["name"].endswith(f", {engine}")


def _batch_of(entry: Mapping[str, Any], batch_size: int) -> Mapping[str, Any] | None:
    return next((batch for batch in entry["batches"] if batch["batch_size"] == batch_size), None)


def _whole(entry: Mapping[str, Any], batch: Mapping[str, Any], timed: Sequence[Mapping[str, Any]]) -> Iterator[Verdict]:
    for other in timed:
        base = _batch_of(other, batch["batch_size"]) if other["kind"] == "pytorch" else None
        if base is not None:
            ratio = base["image"]["p50"] / batch["image"]["p50"]
            yield _verdict(entry, batch, None, other["name"], ratio, f"{ratio:.1f} × {other['name']}")


def _graph_by_graph(
    entry: Mapping[str, Any], batch: Mapping[str, Any], twin: Mapping[str, Any] | None, timings: Sequence[str]
) -> Iterator[Verdict]:
    for stage, (graph, known_as, label) in _GRAPHS.items():
        if graph not in entry["graphs"]:
            continue  # a compiled bundle has graphs of its own
        precision = entry["graphs"][graph].split(" ")[0]
        if precision == _FP32:
            rejected = next((text for text in timings if text.startswith(f"{known_as}: ")), None)
            why = f" (when it was quantized, {rejected})" if rejected else ""
            yield _verdict(entry, batch, stage, _FP32, None, f"{label} kept fp32{why}")
        elif twin is not None and _told_apart(batch) and _told_apart(twin):
            ratio = twin["stages"]["seconds"][stage] / batch["stages"]["seconds"][stage]
            slower = "" if ratio >= 1 else " (slower: keep it fp32)"
            yield _verdict(entry, batch, stage, _FP32, ratio, f"{label} {precision} {ratio:.1f} × fp32{slower}")


def _told_apart(batch: Mapping[str, Any]) -> bool:
    """Whether the split by stage is one of the model and not of the profiler."""
    return bool(batch["stages"]["seconds"]) and batch["stages"]["overhead"] <= MAX_OVERHEAD


def _verdict(
    entry: Mapping[str, Any], batch: Mapping[str, Any], graph: str | None, against: str, ratio: float | None, text: str
) -> Verdict:
    return {
        "contender": entry["name"], "batch_size": batch["batch_size"], "graph": graph, "against": against,
        "ratio": ratio, "sentence": text,
    }  # fmt: skip
