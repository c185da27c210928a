"""The report as one HTML file that opens offline: no scripts, no fonts, nothing fetched."""

import base64
import io
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from bar_edge.benchmarks import charts, tables
from bar_edge.benchmarks.profiles import STAGES

_TEMPLATE = "report.html.j2"
_SHOWN = 4  # images of a contender
_ALTERNATIVES = {
    "latency": "Seconds per image of every contender, every run a dot; the numbers are in the table above.",
    "stages": "Share of each stage in the time of an image, for every contender.",
    "roofline": "Operations per second against operations per byte, by stage, under the limits of the machine.",
    "throughput": "Images per second against batch size for every contender.",
}


def page(
    report: Mapping[str, Any], images: Mapping[str, Sequence[NDArray[np.uint8]]], figures: Mapping[str, Figure]
) -> str:
    """HTML of a report, the images [H, W, 3] each contender drew, and the charts."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["ms"] = lambda seconds: tables.number(seconds * 1e3)
    environment.filters["percent"] = tables.percent
    environment.filters["mebibytes"] = tables.mebibytes
    template = environment.from_string(files("bar_edge.benchmarks").joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    batches = [batch for entry in report["contenders"] for batch in entry.get("batches", ())]
    return template.render(
        report=report,
        has={
            "p99": bool(batches) and all("p99" in batch["image"] for batch in batches),
            "gpu": any(batch["gpu_memory_bytes"] for batch in batches),
            "energy": any(batch["joules_per_image"] for batch in batches),
        },
        stages=STAGES,
        methods=list(dict.fromkeys(batch["stages"]["method"] for batch in batches)),
        notes=tables.notes(report),
        verdicts=tables.verdicts_by_contender(report),
        charts=[(name, _ALTERNATIVES[name], charts.to_svg(figure)) for name, figure in figures.items()],
        images={name: [data_uri(image) for image in drawn[:_SHOWN]] for name, drawn in images.items()},
    )


def data_uri(image: NDArray[np.uint8]) -> str:
    """An image [H, W, 3] as a PNG inside a URL."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
