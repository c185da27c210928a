"""The timing harness: contenders in processes of their own, taking turns, medians and peak memory as JSON.

A contender is a factory by name that returns a callable; each call does some work and returns seconds (or another
figure) per stage, as lists of samples. Contenders run one at a time, round robin, so a machine that slows down slows
all of them; what is quoted is the median over all rounds after the warm-up. Every contender lives in a fresh process:
its peak resident memory is its own, load included.
"""

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module, metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

Samples = dict[str, list[float]]
Report = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """`factory` is "module:function"; called with `arguments` it returns the callable to time."""

    name: str
    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)


def measure(
    contenders: Sequence[Contender],
    *,
    rounds: int,
    warmup: int = 1,
    command: str = "",
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Run all contenders in turn, `warmup` uncounted rounds and then `rounds` counted ones.

    Returns the report: machine, command, date, and per contender the median, minimum, maximum and count of every
    stage, load seconds and peak RSS. A contender that fails is reported with its error instead of figures.
    """
    workers = [_Worker(contender) for contender in contenders]
    try:
        for round_number in range(warmup + rounds):
            for worker in workers:
                if progress is not None:
                    kind = "warm-up" if round_number < warmup else f"round {round_number - warmup + 1} of {rounds}"
                    progress(f"{kind}: {worker.contender.name}")
                worker.run(counted=round_number >= warmup)
        return {
            **stamp(command),
            "rounds": rounds,
            "contenders": [worker.finish() for worker in workers],
        }
    finally:
        for worker in workers:
            worker.stop()


def stamp(command: str) -> Report:
    """What every result says beside its figures: date, command, machine and versions."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"date": date, "command": command, "machine": machine(), "versions": versions()}


def save(report: Report, path: Path) -> None:
    """Write a report; the file appears whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def median(report: Report, contender: str, stage: str) -> float | None:
    """The median of one stage of one contender; None if it failed or has no such stage."""
    found = next(entry for entry in report["contenders"] if entry["name"] == contender)
    stages = found.get("stages", {})
    return float(stages[stage]["median"]) if stage in stages else None


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    model = "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
        flags = next((line for line in lines if line.startswith("flags")), "").split()
    else:
        flags = []
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "instructions": [
            name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8") if name in flags
        ],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of the libraries whose speed is measured."""
    known = {}
    for name in ("bar-edge", "torch", "onnxruntime", "numpy"):
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = "not installed"
    return known


class _Worker:
    def __init__(self, contender: Contender) -> None:
        self.contender = contender
        self.error = ""
        self.load_seconds = 0.0
        self.peak_rss = 0
        self.samples: Samples = {}
        context = multiprocessing.get_context("spawn")
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote, contender), daemon=True)
        self._process.start()
        remote.close()
        self.load_seconds = float(self._ask("load") or 0)

    def run(self, *, counted: bool) -> None:
        samples = self._ask("run") if not self.error else None
        if counted and samples is not None:
            for stage, values in samples.items():
                self.samples.setdefault(stage, []).extend(values)

    def finish(self) -> dict[str, Any]:
        self.peak_rss = int(self._ask("rss") or 0) if not self.error else 0
        entry: dict[str, Any] = {"name": self.contender.name, "arguments": self.contender.arguments}
        if self.error:
            return {**entry, "error": self.error}
        stages = {
            stage: {
                "median": statistics.median(values),
                "minimum": min(values),
                "maximum": max(values),
                "count": len(values),
            }
            for stage, values in self.samples.items()
        }
        return {**entry, "load_seconds": self.load_seconds, "peak_rss_bytes": self.peak_rss, "stages": stages}

    def stop(self) -> None:
        self._pipe.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()

    def _ask(self, what: str) -> Any:
        try:
            self._pipe.send(what)
            ok, answer = self._pipe.recv()
        except (EOFError, OSError):
            ok, answer = False, "the process ended without an answer (out of memory?)"
        if not ok:
            self.error = str(answer)
            return None
        return answer


def _serve(pipe: Connection, contender: Contender) -> None:
    run: Callable[[], Samples] | None = None
    while True:
        try:
            what = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            if what == "load":
                begin = time.perf_counter()
                module, _, function = contender.factory.partition(":")
                run = getattr(import_module(module), function)(**contender.arguments)
                pipe.send((True, time.perf_counter() - begin))
            elif what == "run":
                assert run is not None
                pipe.send((True, run()))
            else:
                pipe.send((True, peak_rss_bytes()))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))


def peak_rss_bytes() -> int:
    """The peak resident set of this process, mapped files included; 0 where the system does not tell."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
