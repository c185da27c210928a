"""Quality of quantized demo bundles beside fp32, over five seeds each.

    python -m bar_edge.benchmarks.demo_quality demo/bundle demo/bundle-int8 -o benchmarks/results/NAME.json

Draws the same digits with every bundle under five seeds and judges each set by its Fréchet distance to real digits and
by class accuracy (`calibration/frechet.py`). One seed alone says little: sets of one bundle differ by 10 %.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from bar_edge.benchmarks.measure import save, stamp
from bar_edge.calibration.frechet import judge
from bar_edge.export.demo import data
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.tables import redirected_width
from bar_edge.runtime.terminal import run_function

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
    """Judge all sets; for each bundle, whether its mean lies within the range of the fp32 seeds."""

    def judged(bundle: Bundle) -> dict[str, Any]:
        sets = [draw_and_judge(bundle, images=images, seed=seed, progress=progress) for seed in seeds]
        distances, accuracies = ([entry[key] for entry in sets] for key in ("frechet", "accuracy"))
        return {
            "sets": sets,
            "frechet_mean": float(np.mean(distances)),
            "frechet_range": [min(distances), max(distances)],
            "accuracy_mean": float(np.mean(accuracies)),
        }

    exact = judged(reference)
    others = {}
    for bundle in bundles:
        found = judged(bundle)
        others[bundle.path.name] = {
            "precision": bundle.manifest["graphs"]["onnxruntime_step"]["precision"],
            "flips": bundle.manifest["quantization"]["quality"]["flips"],
            "kl": bundle.manifest["quantization"]["quality"]["kl"],
            **found,
            "mean_frechet_within_fp32_range": found["frechet_mean"] <= exact["frechet_range"][1],
            "accuracy_points_below_fp32": 100 * (exact["accuracy_mean"] - found["accuracy_mean"]),
        }
    return {"fp32": exact, "bundles": others}


def table(report: dict[str, Any]) -> Table:
    """The report for people."""
    result = Table(title="digits: distance to real ones, and class accuracy")
    for heading in ("bundle", "step", "flips", "Fréchet, mean", "range", "accuracy"):
        result.add_column(heading)
    for name, entry in {"fp32": report["fp32"], **report["bundles"]}.items():
        low, high = entry["frechet_range"]
        flips = f"{entry['flips']:.2%}" if "flips" in entry else "-"
        result.add_row(
            name, entry.get("precision", "fp32"), flips, f"{entry['frechet_mean']:.1f}", f"{low:.0f} to {high:.0f}",
            f"{entry['accuracy_mean']:.2%}",
        )  # fmt: skip
    return result


def main(
    reference: Annotated[Path, typer.Argument(help="The demo's fp32 bundle.")],
    bundles: Annotated[list[Path], typer.Argument(help="Quantized bundles made from it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
    images: Annotated[int, typer.Option(help="Digits per set; there are five sets of each bundle.")] = 2000,
) -> None:
    """Judge, print the table, write the JSON."""
    console = Console(width=redirected_width())
    with console.status("drawing") as status:
        report = compare(
            Bundle.open(reference), [Bundle.open(path) for path in bundles], images=images, seeds=SEEDS,
            progress=status.update,
        )  # fmt: skip
    command = " ".join(["python -m bar_edge.benchmarks.demo_quality", *sys.argv[1:]])
    output.parent.mkdir(parents=True, exist_ok=True)
    save({**stamp(command), **report}, output)
    console.print(table(report))


if __name__ == "__main__":
    run_function(main)
