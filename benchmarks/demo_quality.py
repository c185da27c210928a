"""Quality of quantized demo bundles beside the spread of fp32 over seeds.

    python -m bar_edge.benchmarks.demo_quality demo/bundle demo/bundle-int8 -o benchmarks/results/NAME.json

Draws the same number of digits with the fp32 bundle under five seeds and with every quantized bundle under the first,
and judges each set by its Fréchet distance to real digits and by class accuracy (`calibration/frechet.py`).
"""

import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bar_edge.benchmarks.measure import machine, save, versions
from bar_edge.calibration.frechet import judge
from bar_edge.export.demo import data
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.generator import Generator

SEEDS = (1, 2, 3, 4, 5)


def draw_and_judge(bundle: Bundle, *, images: int, seed: int, progress: Callable[[str], None]) -> dict[str, Any]:
    """Fréchet distance and accuracy of `images` digits, classes balanced."""
    per_class = images // bundle.spec.num_classes
    pixels, class_ids = [], []
    with Generator(bundle, engine="onnxruntime") as bar:
        for drawn in bar.stream(range(bundle.spec.num_classes), num=per_class, seed=seed, batch_size=50):
            pixels.append(np.asarray(drawn.image))
            class_ids.append(drawn.class_id)
            if len(pixels) % 100 == 0:
                progress(f"{bundle.path.name}, seed {seed}: {len(pixels)} of {images}")
    with data() as folder:
        return {"seed": seed, **judge(np.stack(pixels), np.array(class_ids), folder).to_dict()}


def compare(
    reference: Bundle, bundles: list[Bundle], *, images: int, seeds: tuple[int, ...], progress: Callable[[str], None]
) -> dict[str, Any]:
    """Judge all sets; for each bundle, whether it lies within the range of the fp32 seeds."""
    exact = [draw_and_judge(reference, images=images, seed=seed, progress=progress) for seed in seeds]
    worst = max(entry["frechet"] for entry in exact)
    mean_accuracy = float(np.mean([entry["accuracy"] for entry in exact]))
    judged = {}
    for bundle in bundles:
        found = draw_and_judge(bundle, images=images, seed=seeds[0], progress=progress)
        judged[bundle.path.name] = {
            **found,
            "precision": bundle.manifest["graphs"]["onnxruntime_step"]["precision"],
            "flips": bundle.manifest["quantization"]["quality"]["flips"],
            "frechet_within_fp32_seeds": found["frechet"] <= worst,
            "accuracy_points_below_fp32": 100 * (mean_accuracy - found["accuracy"]),
        }
    return {"fp32": exact, "fp32_frechet_range": [min(e["frechet"] for e in exact), worst],
            "fp32_mean_accuracy": mean_accuracy, "bundles": judged}  # fmt: skip


def table(report: dict[str, Any]) -> Table:
    """The report for people."""
    result = Table(title="digits: distance to real ones, and class accuracy")
    for heading in ("set", "step", "flips", "Fréchet", "accuracy"):
        result.add_column(heading)
    for entry in report["fp32"]:
        result.add_row(
            f"fp32, seed {entry['seed']}", "fp32", "-", f"{entry['frechet']:.3f}", f"{entry['accuracy']:.2%}"
        )
    for name, entry in report["bundles"].items():
        flips = f"{entry['flips']:.2%}"
        result.add_row(name, entry["precision"], flips, f"{entry['frechet']:.3f}", f"{entry['accuracy']:.2%}")
    return result


def main(
    reference: Annotated[Path, typer.Argument(help="The demo's fp32 bundle.")],
    bundles: Annotated[list[Path], typer.Argument(help="Quantized bundles made from it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
    images: Annotated[int, typer.Option(help="Digits per set.")] = 2000,
) -> None:
    """Judge, print the table, write the JSON."""
    console = Console()
    with console.status("drawing") as status:
        report = compare(
            Bundle.open(reference), [Bundle.open(path) for path in bundles], images=images, seeds=SEEDS,
            progress=status.update,
        )  # fmt: skip
    command = " ".join(["python -m bar_edge.benchmarks.demo_quality", *sys.argv[1:]])
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    output.parent.mkdir(parents=True, exist_ok=True)
    save({"date": date, "command": command, "machine": machine(), "versions": versions(), **report}, output)
    console.print(table(report))


if __name__ == "__main__":
    typer.run(main)
