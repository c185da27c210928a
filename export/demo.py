"""`bar-edge demo`: the main job on a small model that was really trained and ships with the package."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from bar_edge.benchmarks import bench, tables
from bar_edge.benchmarks.plan import Baseline, Plan
from bar_edge.calibration.frechet import judge
from bar_edge.calibration.quantizer import quantize_bundle
from bar_edge.calibration.trajectories import collect, make_plan
from bar_edge.export.checkpoint import load_checkpoint
from bar_edge.export.exporter import export_bundle
from bar_edge.export.verification import compare
from bar_edge.runtime import selftest
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.folders import check_folder
from bar_edge.runtime.generator import Drawn, Generator
from bar_edge.runtime.pictures import contact_sheet, save_png

SEED = 7
_PER_CLASS = 20
_SHOWN, _SHOWN_BESIDE = 6, 3  # of each class: on the sheet of digits, and beside their INT8 twins
_BATCH = 20
_CHECKED_IMAGES = 10
_CALIBRATION_IMAGES = 64
_TIMED_ROUNDS = 5

Bar = Callable[[str, int, int], None]


def data() -> AbstractContextManager[Path]:
    """The folder with the demo's generator.bin, tokenizer.bin, config.yaml, reference samples and judge."""
    return as_file(files("bar_edge.export").joinpath("demo_data"))


def run(output: Path, *, force: bool, console: Console, progress: Callable[[], Any]) -> None:
    """Export, draw digits, verify against PyTorch, quantize, compare, time. Everything lands in `output`."""
    check_folder(output, force=force)
    output.mkdir(parents=True, exist_ok=True)
    with data() as folder:
        with progress() as bar:
            exact = _export_and_verify(folder, output, console, bar)
            int8, drawn, drawn_int8 = _quantize_and_draw(exact, output, console, bar)
            for name, images in (("fp32", drawn), ("int8", drawn_int8)):
                found = judge(np.stack([np.asarray(one.image) for one in images]), _asked(images), folder)
                console.print(
                    f"{name}: {found.accuracy:.1%} of {found.images} digits are read as the digit asked for, "
                    f"Fréchet distance to real digits {found.frechet:.0f}"
                )
        with progress() as bar:
            sources = (folder / "generator.bin", folder / "tokenizer.bin", folder / "config.yaml")
            plan = Plan.of(
                [exact, int8], baseline=Baseline(*sources, forms=("fp32",)), engines=("onnxruntime",), batch_sizes=(1,),
                rounds=_TIMED_ROUNDS, warmup=1, threads=0, seed=SEED, command="bar-edge demo",
            )  # fmt: skip
            report, _ = bench.run(plan, bar)
    console.print(next(tables.tables(report)))
    console.print("this model is tiny: what an image costs here is mostly not its weights (see docs/performance.md)")
    console.print(f"look at {output / 'digits.png'} and {output / 'fp32-and-int8.png'}")


def _export_and_verify(folder: Path, output: Path, console: Console, bar: Bar) -> Bundle:
    sources = (folder / "generator.bin", folder / "tokenizer.bin", folder / "config.yaml")
    bundle = export_bundle(*sources, output / "bundle", force=True, progress=bar)
    console.print(f"exported {bundle.path}")
    with Generator(bundle, engine="onnxruntime") as runtime:
        tested = selftest.run(runtime)
        checked = compare(runtime, load_checkpoint(*sources), images=_CHECKED_IMAGES, seed=SEED)
    console.print(f"self-test: {tested.sentence}")
    console.print(
        f"against PyTorch: {checked.images} images, {checked.tokens_differing} of {checked.tokens} tokens differ "
        f"({checked.tokens_differing_without_tie} without a tie), pixels within {checked.pixel_error} level"
    )
    if not (tested.passed and checked.passed):
        raise EngineError(
            "the demo's images are not those of the reference model; run `bar-edge doctor` and report this"
        )
    return bundle


def _quantize_and_draw(
    exact: Bundle, output: Path, console: Console, bar: Bar
) -> tuple[Bundle, list[Drawn], list[Drawn]]:
    plan = make_plan(exact.spec, images=_CALIBRATION_IMAGES, seed=1000, batch_size=_BATCH)
    calibration = collect(exact, plan, progress=bar)
    # everything becomes INT8 whether it is faster at this size or not: the demo is to show what INT8 images look like
    int8 = quantize_bundle(
        exact, calibration, output / "bundle-int8", precision="int8", measure=False, force=True, progress=bar
    )
    quality = int8.manifest["quantization"]["quality"]
    console.print(
        f"quantized {int8.path}: {int8.manifest['graphs']['onnxruntime_step']['precision']}; teacher-forced, "
        f"{quality['flips']:.2%} of {quality['decisions']:,} decisions flip, KL {quality['kl']:.1e} nats a bit"
    )
    drawn, drawn_int8 = (_draw(bundle, bar) for bundle in (exact, int8))
    settings = {"seed": SEED, "bundles": [exact.digest, int8.digest]}
    shown = [one for one in drawn if one.index % _PER_CLASS < _SHOWN]
    labels = [f"{one.class_id} #{one.index % _PER_CLASS}" for one in shown]
    save_png(contact_sheet([one.image for one in shown], labels, _SHOWN), output / "digits.png", settings)
    pairs = [pair for pair in zip(drawn, drawn_int8, strict=True) if pair[0].index % _PER_CLASS < _SHOWN_BESIDE]
    images = [one.image for pair in pairs for one in pair]
    labels = [f"{pair[0].class_id} {name}" for pair in pairs for name in ("fp32", "int8")]
    save_png(contact_sheet(images, labels, 2 * _SHOWN_BESIDE), output / "fp32-and-int8.png", settings)
    return int8, drawn, drawn_int8


def _draw(bundle: Bundle, bar: Bar) -> list[Drawn]:
    with Generator(bundle, engine="onnxruntime") as runtime:
        stream = runtime.stream(
            range(bundle.spec.num_classes), num=_PER_CLASS, seed=SEED, batch_size=_BATCH,
            progress=lambda _, images, done, tokens: bar(f"{bundle.path.name}: drawing, tokens", done, tokens),
        )  # fmt: skip
        return list(stream)


def _asked(drawn: list[Drawn]) -> Any:
    return np.array([one.class_id for one in drawn])
