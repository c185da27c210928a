"""A report on the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from bar_edge.benchmarks.figures import P99_SAMPLES
from bar_edge.benchmarks.profiles import MAX_OVERHEAD, STAGES
from bar_edge.runtime.tables import FiguresTable

_NOISY = 1.5  # p90 over the fastest
_BUSY = 0.5  # load average


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """Latency, tokens, stages, and what the contenders drew."""
    yield _latency(report)
    yield _tokens(report)
    yield _stages(report)
    yield _proofs(report)


def verdicts_by_contender(report: Mapping[str, Any]) -> dict[tuple[str, int], list[str]]:
    """(contender, batch size) -> sentences."""
    found: dict[tuple[str, int], list[str]] = {}
    for verdict in report["verdicts"]:
        found.setdefault((verdict["contender"], verdict["batch_size"]), []).append(verdict["sentence"])
    return found


def notes(report: Mapping[str, Any]) -> list[str]:
    """What a reader must know of how the figures came about."""
    settings, best, power = report["settings"], report["machine_best"], report["power"]
    found = [
        f"{settings['rounds']} rounds after {settings['warmup']} of warm-up, contenders in turn, {settings['threads']} "
        f"threads each; {report['machine']['cpu']}, {report['date']}",
        f"memory read at {best['bytes_per_second']['max'] / 1e9:.1f} GB/s at best "
        f"({best['bytes_per_second']['min'] / 1e9:.1f} at worst) during the run",
    ]
    if gpu := best.get("gpu_bytes_per_second"):
        found.append(
            f"the GPU copied at {gpu['max'] / 1e9:,.0f} GB/s at best ({gpu['min'] / 1e9:,.0f} at worst), read plus "
            "written: what runs there is held against that"
        )
    elif "without_gpu_best" in report:
        found.append(f"no fraction of bandwidth of what runs on the GPU: {report['without_gpu_best']}")
    if settings["rounds"] < P99_SAMPLES:
        found.append(f"no p99 of images: that takes {P99_SAMPLES} rounds, there were {settings['rounds']}")
    if not power["energy_sources"]:
        found.append(f"no energy: {'; '.join(power['without_energy'])}")
    slowed = [
        f"{name} ({batch['stages']['overhead']:.1f} ×)"
        for name, batch in _batches(report)
        if batch["batch_size"] == settings["batch_sizes"][0] and (batch["stages"].get("overhead") or 1) > MAX_OVERHEAD
    ]
    if slowed:
        found.append(
            f"profiling slows {', '.join(slowed)}: read those stages as shares only, no roofline or verdict on graphs "
            "is drawn from them"
        )
    noisy = [
        f"{name} at batch {batch['batch_size']} ({batch['image']['p90'] / batch['image']['min']:.1f} ×)"
        for name, batch in _batches(report)
        if batch["image"]["p90"] > _NOISY * batch["image"]["min"]
    ]
    if noisy:
        found.append(f"noisy, p90 far above the fastest image: {', '.join(noisy)}; run again on a quiet machine")
    load = power["before"].get("load_average")
    if load is not None and load > _BUSY:
        found.append(f"the machine was not idle: its load was {load} before the run")
    return found


def compact(title: str, *numbers: str) -> FiguresTable:
    """An empty table that fits 80 columns: contender, batch, and right-aligned numbers."""
    table = plain(title, "contender")
    table.add_numbers("batch", *numbers)
    return table


def plain(title: str, *headings: str) -> FiguresTable:
    """An empty table with columns of text."""
    table = FiguresTable(title)
    table.add_texts(*headings)
    return table


def number(value: float) -> str:
    """Three digits that count, never in powers of ten."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def percent(value: float) -> str:
    """A fraction as a percentage."""
    return f"{value:.0%}"


def milliseconds(figures: Mapping[str, float] | None) -> str:
    """The median of what was measured."""
    return "-" if figures is None else number(figures["p50"] * 1e3)


def mebibytes(size: int | None) -> str:
    """A size in MiB."""
    return "-" if size is None else f"{size / 2**20:,.0f}"


def _latency(report: Mapping[str, Any]) -> Table:
    title = f"{report['settings']['variant'] or 'model'}: whole images, milliseconds per image"
    table = compact(title, "p50", "p90", "p99", "min", "images/s")
    for entry in report["contenders"]:
        if entry["state"] != "timed":
            table.add_row(entry["name"], "", _state(entry))
    for name, batch in _batches(report):
        image = batch["image"]
        cells = [number(image[key] * 1e3) if key in image else "-" for key in ("p50", "p90", "p99", "min")]
        table.add_row(name, str(batch["batch_size"]), *cells, number(batch["images_per_second"]))
    return table


def _tokens(report: Mapping[str, Any]) -> Table:
    """What a token costs, and what it takes from memory."""
    energy = bool(report["power"]["energy_sources"])
    gpu = any(batch["gpu_memory_bytes"] for _, batch in _batches(report))
    headings = ["first", "token", "GB/token", "bandwidth", "MiB"]
    headings += [*(["GPU MiB"] if gpu else []), *(["J/image"] if energy else [])]
    table = compact("tokens: median ms of the first and of one, bytes it must read, peak memory", *headings)
    for name, batch in _batches(report):
        bytes_per_token, fraction = batch["bytes_per_token"], batch["fraction_of_bandwidth"]
        cells = [
            milliseconds(batch.get("first_token")), milliseconds(batch.get("token")),
            "-" if bytes_per_token is None else number(bytes_per_token / 1e9),
            "-" if fraction is None else percent(fraction), mebibytes(batch["peak_rss_bytes"]),
        ]  # fmt: skip
        if gpu:
            cells.append(mebibytes(batch["gpu_memory_bytes"]))
        if energy:
            cells.append(" + ".join(number(figures["p50"]) for figures in batch["joules_per_image"].values()))
        table.add_row(name, str(batch["batch_size"]), *cells)
    return table


def _stages(report: Mapping[str, Any]) -> Table:
    table = compact("stages: milliseconds per image, in a profiled pass of its own", *STAGES, "whole")
    for name, batch in _batches(report):
        split, size = batch["stages"], batch["batch_size"]
        cells = [number(split["seconds"][s] / size * 1e3) if s in split["seconds"] else "-" for s in STAGES]
        whole = number(split["wall_seconds"] / size * 1e3) if split["seconds"] else "-"
        table.add_row(name, str(size), *cells, whole)
    return table


def _proofs(report: Mapping[str, Any]) -> Table:
    table = plain("the same work: images from the same noise", "contender", "batch", "proof", "PSNR dB")
    for entry in report["contenders"]:
        if entry["state"] != "timed":
            table.add_row(entry["name"], "", Text.assemble(_state(entry), f": {entry['reason']}"))
            continue
        for found in entry["proofs"]:
            table.add_row(entry["name"], str(found["batch_size"]), found["sentence"], f"{found['psnr_db']:.1f}")
    return table


def _state(entry: Mapping[str, Any]) -> Text:
    """Of a contender that was not timed."""
    return Text(entry["state"], style="dim" if entry["state"] == "reference" else "red")


def _batches(report: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(contender, figures) of everything that was timed."""
    for entry in report["contenders"]:
        for batch in entry.get("batches", ()):
            yield entry["name"], batch
