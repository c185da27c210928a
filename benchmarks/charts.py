"""The charts of a report: latency distribution, stages, roofline, throughput against batch."""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from bar_edge.benchmarks.profiles import STAGES

_WIDTH = 9.0  # inches
_ROW = 0.34
_COLOURS = ("#2f5d8a", "#c8553d", "#5b8e7d", "#8d6a9f", "#d9a441", "#4f4f4f", "#7fa7c9", "#b5838d")
_STAGE_COLOURS = dict(zip(STAGES, ("#9db4c0", "#2f5d8a", "#c8553d", "#e3a587", "#5b8e7d", "#c9c9c9"), strict=True))
_STAGE_LABELS = {"head": "head passes", "decode": "decoder", "prefix": "prefix and modulation"}
_MARKERS = {"trunk": "o", "head": "s", "decode": "^"}
_STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "axes.grid": True, "grid.color": "#e6e6e6", "axes.axisbelow": True, "axes.titlesize": 11, "legend.frameon": False,
    "svg.hashsalt": "bar-edge", "text.parse_math": False,  # names may hold dollars
}  # fmt: skip

Row = tuple[str, str, Mapping[str, Any]]  # label, contender, figures of one batch size


def draw(report: Mapping[str, Any]) -> dict[str, Figure]:
    """Every chart that the report has figures for, by name: latency, stages, roofline, throughput."""
    rows = list(_rows(report))
    if not rows:
        return {}
    names = list(dict.fromkeys(name for _, name, _ in rows))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    charts = {}
    with matplotlib.rc_context(_STYLE):
        charts["latency"] = _latency(rows, colours)
        if split := [row for row in rows if row[2]["stages"]["seconds"]]:
            charts["stages"] = _stages(split)
        if any("roofline" in batch for _, _, batch in rows):
            charts["roofline"] = _roofline(report, rows, colours)
        if len(report["settings"]["batch_sizes"]) > 1:
            charts["throughput"] = _throughput(rows, colours)
    return charts


def to_svg(figure: Figure) -> str:
    """The chart as an SVG element for a page."""
    text = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _rows(report: Mapping[str, Any]) -> Iterator[Row]:
    several = len(report["settings"]["batch_sizes"]) > 1
    for batch_size in report["settings"]["batch_sizes"]:
        for entry in report["contenders"]:
            for batch in entry.get("batches", ()):
                if batch["batch_size"] == batch_size:
                    yield entry["name"] + (f"  ·  {batch_size}" if several else ""), entry["name"], batch


def _bars(rows: Sequence[Row]) -> tuple[Figure, Axes]:
    """Horizontal rows, the first on top."""
    figure = Figure(figsize=(_WIDTH, 1.1 + _ROW * len(rows)))
    axes = figure.add_subplot()
    axes.set_yticks(range(len(rows)), [label for label, _, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)
    return figure, axes


def _latency(rows: Sequence[Row], colours: Mapping[str, str]) -> Figure:
    figure, axes = _bars(rows)
    for y, (_, name, batch) in enumerate(rows):
        image = batch["image"]
        axes.hlines(y, image["min"], image["max"], color=colours[name], linewidth=1)
        axes.hlines(y, image["p50"], image["p90"], color=colours[name], linewidth=6, alpha=0.35)
        axes.scatter(image["samples"], [y] * image["count"], s=14, color=colours[name], alpha=0.55, linewidths=0)
        axes.plot(image["p50"], y, "|", color="black", markersize=13, markeredgewidth=1.6)
        axes.annotate(_seconds(image["p50"]), (image["max"], y), xytext=(7, 0), textcoords="offset points", va="center")
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.12)  # room for the labels
    _plain(axes.xaxis, steps=(1, 2, 5))
    axes.set_xlabel("seconds per image, logarithmic; dots: runs, bar: p50 to p90, tick and number: p50")
    axes.set_title("Latency of whole images" + ("  (contender · batch size)" if _several(rows) else ""), loc="left")
    return figure


def _stages(rows: Sequence[Row]) -> Figure:
    figure, axes = _bars(rows)
    for y, (_, _, batch) in enumerate(rows):
        seconds, left = batch["stages"]["seconds"], 0.0
        whole = sum(seconds.values())
        for stage in STAGES:
            share = 100 * seconds.get(stage, 0.0) / whole
            axes.barh(y, share, left=left, height=0.68, color=_STAGE_COLOURS[stage])
            if share >= 7:
                dark = stage in ("trunk", "head", "decode")
                axes.text(
                    left + share / 2, y, f"{share:.0f}", ha="center", va="center", fontsize=8,
                    color="white" if dark else "#333333",
                )  # fmt: skip
            left += share
        axes.text(101, y, _seconds(whole / batch["batch_size"]), va="center", fontsize=9)
    axes.set_xlim(0, 112)
    axes.set_xticks(range(0, 101, 20))
    axes.set_xlabel("% of the profiled pass; its time per image on the right")
    handles = [matplotlib.patches.Patch(color=_STAGE_COLOURS[s], label=_STAGE_LABELS.get(s, s)) for s in STAGES]
    axes.legend(handles=handles, ncols=len(STAGES), loc="lower left", bbox_to_anchor=(0, 1.0), columnspacing=1.2,
                handlelength=1.0, fontsize=9)  # fmt: skip
    return figure


def _roofline(report: Mapping[str, Any], rows: Sequence[Row], colours: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(_WIDTH, 5.2))
    axes = figure.add_subplot()
    best = {name: figures["max"] for name, figures in report["machine_best"].items()}
    bandwidth, peak, gpu = best["bytes_per_second"], best["flops_per_second"], best.get("gpu_bytes_per_second")
    points = [(name, stage, point) for _, name, batch in rows for stage, point in batch.get("roofline", {}).items()]
    intensities = [point["flops_per_byte"] for _, _, point in points]
    x = np.geomspace(min(intensities) / 2, max([*intensities, peak / bandwidth]) * 3, 200)
    axes.plot(x, np.minimum(x * bandwidth, peak) / 1e9, color="#333333", linewidth=1.4)
    memory = "memory" if gpu is None else "the CPU's memory"
    axes.annotate(f"{memory}, {bandwidth / 1e9:.0f} GB/s read", (x[0], x[0] * bandwidth / 1e9), xytext=(0, -14),
                  textcoords="offset points", fontsize=9)  # fmt: skip
    axes.annotate(f"fp32 matrix product, {peak / 1e9:,.0f} Gflop/s", (x[-1], peak / 1e9), xytext=(0, 6),
                  textcoords="offset points", ha="right", fontsize=9)  # fmt: skip
    if gpu is not None:
        axes.plot(x, x * gpu / 1e9, color="#333333", linewidth=1.4, linestyle="--")
        axes.annotate(f"the GPU's memory, {gpu / 1e9:,.0f} GB/s copied", (x[0], x[0] * gpu / 1e9), xytext=(0, -14),
                      textcoords="offset points", fontsize=9)  # fmt: skip
    for name, stage, point in points:
        axes.scatter(point["flops_per_byte"], point["flops_per_second"] / 1e9, marker=_MARKERS[stage], s=46,
                     color=colours[name], edgecolors="white", linewidths=0.6, zorder=3)  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain(axes.xaxis, axes.yaxis)
    axes.set_xlabel("operations per byte that must be read")
    axes.set_ylabel("Gflop/s reached")
    on_gpu = "" if gpu is None else "; the GPU's points lie under its dashed line"
    axes.set_title(f"Roofline by stage; integers may pass the fp32 roof{on_gpu}", loc="left")
    line = matplotlib.lines.Line2D
    axes.set_ylim(bottom=min(axes.get_ylim()[0], x[0] * bandwidth / 2e9))
    shown = dict.fromkeys(name for name, _, _ in points)
    handles = [line([], [], marker="o", linestyle="", color=colours[name], label=name) for name in shown]
    handles += [
        line([], [], marker=marker, linestyle="", color="#888888", label=_STAGE_LABELS.get(stage, stage))
        for stage, marker in _MARKERS.items()
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return figure


def _throughput(rows: Sequence[Row], colours: Mapping[str, str]) -> Figure:
    figure = Figure(figsize=(_WIDTH, 4.2))
    axes = figure.add_subplot()
    for name, colour in colours.items():
        points = [(batch["batch_size"], batch["images_per_second"]) for _, other, batch in rows if other == name]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=5, color=colour, label=name)
    sizes = sorted({batch["batch_size"] for _, _, batch in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_yscale("log")
    _plain(axes.yaxis, steps=(1, 2, 5))
    axes.set_xlabel("images drawn together")
    axes.set_ylabel("images per second, logarithmic")
    axes.set_title("Throughput against batch size", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=9)
    return figure


def _plain(*scales: Axis, steps: Sequence[int] = (1,)) -> None:
    """Numbers instead of powers of ten, at these steps of every decade."""
    for scale in scales:
        scale.set_major_locator(LogLocator(subs=steps))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter(NullFormatter())


def _several(rows: Sequence[Row]) -> bool:
    return len({batch["batch_size"] for _, _, batch in rows}) > 1


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
