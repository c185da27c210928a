"""`bar-edge demo`: the main job on a small model that was really trained and ships with the package."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from rich.console import Console

from bar_edge.benchmarks import latency
from bar_edge.export.checkpoint import load_checkpoint
from bar_edge.export.exporter import export_bundle
from bar_edge.export.verification import compare
from bar_edge.runtime import selftest
from bar_edge.runtime.engines.onnxruntime import cpu_count
from bar_edge.runtime.errors import EngineError, RequestError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.pictures import contact_sheet, save_png

PER_CLASS = 6
SEED = 7
_CHECKED_IMAGES = 10
_TIMED_ROUNDS = 5


def data() -> AbstractContextManager[Path]:
    """The folder with the demo's generator.bin, tokenizer.bin, config.yaml and reference samples."""
    return as_file(files("bar_edge.export").joinpath("demo_data"))


def run(output: Path, *, force: bool, console: Console, progress: Callable[[], Any]) -> None:
    """Export, draw a sheet of digits, verify against PyTorch, time both. Everything lands in `output`."""
    bundle_path, sheet_path = output / "bundle", output / "digits.png"
    if output.exists() and any(output.iterdir()) and not force:
        raise RequestError(f"{output}: has files already; choose another folder, or pass --force to write into it")
    output.mkdir(parents=True, exist_ok=True)
    with data() as folder:
        sources = {"generator": folder / "generator.bin", "tokenizer": folder / "tokenizer.bin"}
        config = folder / "config.yaml"
        with progress() as bar:
            bundle = export_bundle(**sources, config=config, output=bundle_path, force=True, progress=bar)
            console.print(f"exported {bundle_path}")
            with Generator(bundle, engine="onnxruntime") as runtime:
                digits = range(bundle.spec.num_classes)
                drawn = list(
                    runtime.stream(
                        list(digits), num=PER_CLASS, seed=SEED, batch_size=20,
                        progress=lambda finished, images, done, tokens: bar(f"drawing {images} digits", done, tokens),
                    )
                )  # fmt: skip
                labels = [f"{one.class_id} #{one.index % PER_CLASS}" for one in drawn]
                settings = {"bundle": bundle.digest, "seed": SEED, "engine": runtime.engine_name}
                save_png(contact_sheet([one.image for one in drawn], labels, PER_CLASS), sheet_path, settings)
                console.print(f"drew {len(drawn)} digits with {runtime.engine_name}")
                tested = selftest.run(runtime)
                checkpoint = load_checkpoint(sources["generator"], sources["tokenizer"], config)
                checked = compare(runtime, checkpoint, images=_CHECKED_IMAGES, seed=SEED)
        console.print(f"self-test: {tested.sentence}")
        console.print(
            f"against PyTorch: {checked.images} images, {checked.tokens_differing} of {checked.tokens} tokens differ "
            f"({checked.tokens_differing_without_tie} without a tie), pixels within {checked.pixel_error} level"
        )
        if not (tested.passed and checked.passed):
            raise EngineError(
                "the demo's images are not those of the reference model; run `bar-edge doctor` and report this"
            )
        with console.status("timing") as status:
            report = latency.compare(
                {**{name: str(path) for name, path in sources.items()}, "config": str(config)}, [bundle_path],
                batch=1, tokens=0, rounds=_TIMED_ROUNDS, threads=cpu_count(), progress=status.update,
            )  # fmt: skip
    console.print(latency.table(report))
    console.print(f"look at {sheet_path}")
