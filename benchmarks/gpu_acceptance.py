"""Does it work on this GPU, and how fast is it? One command, one JSON.

    python -m bar_edge.benchmarks.gpu_acceptance -o acceptance.json

From the root of a checkout with its test dependencies, on a machine with an NVIDIA GPU and a PyTorch that runs on it;
nothing is downloaded. Parts: which engines work here and why the others do not; the tests of our kernels, which run on
the GPU as well where there is one; the demo, led along what ONNX Runtime draws; random weights in published shapes,
timed by `bench` beside PyTorch on the GPU. What fails is in the report with its reason, and the other parts go on.

Not yet run on a GPU.
"""

import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from bar_edge.benchmarks import bench
from bar_edge.benchmarks.measure import Report, save, stamp
from bar_edge.benchmarks.plan import Baseline, Plan
from bar_edge.benchmarks.random_checkpoint import random_generator, random_tokenizer, write_checkpoint
from bar_edge.export import demo
from bar_edge.export.compile import compile_bundle
from bar_edge.export.exporter import export_bundle
from bar_edge.export.prepack import prepack_bundle
from bar_edge.runtime import engines, selftest
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.device import driver_version, host_sm
from bar_edge.runtime.errors import BarEdgeError, EngineError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.spec import VARIANTS

_KERNEL_TESTS = "tests/runtime/engines/cuda"
_DEMO_IMAGES = 16
_FORMS = ("fp32", "tf32", "bf16", "compiled-bf16")
_VARIANTS = ("bar_b", "bar_b_patch4")


def accept(folder: Path, console: Console, *, batches: tuple[int, ...], rounds: int) -> Report:
    """All parts, with what they make in `folder`. Raises EngineError where there is no GPU."""
    sm = host_sm()
    if sm is None:
        raise EngineError("no NVIDIA GPU answers here, so there is nothing to accept; see `bar-edge doctor`")
    found = map(engines.status, engines.NAMES)
    states = {state.name: {"usable": state.usable, "detail": state.detail} for state in found}
    console.print(states)
    report: Report = {"sm": sm, "driver": driver_version(), "engines": states, "kernels": _kernels()}
    with demo.data() as data:
        exact = export_bundle(data / "generator.bin", data / "tokenizer.bin", data / "config.yaml", folder / "demo")
    report["demo"] = {name: _judged(exact, made) for name, made in _compiled(exact, folder, sm)}
    console.print(report["demo"])
    for name in _VARIANTS:
        known, source = VARIANTS[name], folder / f"{name}-checkpoint"
        write_checkpoint(source, known.spec, known.recipe, random_generator(known.spec), random_tokenizer(known.spec))
        files = (source / "generator.bin", source / "tokenizer.bin", source / "config.yaml")
        exact = export_bundle(files[0], files[1], files[2], folder / name)
        made = [bundle for _, bundle in _compiled(exact, folder, sm) if isinstance(bundle, Bundle)]
        if not made:
            report[name] = {"failed": "no GPU engine is usable here"}
            continue
        plan = Plan.of(
            made, baseline=Baseline(*files, forms=_FORMS), engines=(), batch_sizes=batches, rounds=rounds, warmup=1,
            threads=0, seed=0, command="benchmarks.gpu_acceptance",
        )  # fmt: skip
        report[name], _ = bench.run(plan, lambda what, done, total: console.print(what, highlight=False))
    return report


def _kernels() -> dict[str, Any]:
    """The kernels' own tests; on a machine with a GPU they run there, too."""
    command = [sys.executable, "-m", "pytest", "-q", _KERNEL_TESTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return {"passed": done.returncode == 0, "summary": done.stdout.strip().splitlines()[-1:], "command": command[1:]}


def _compiled(source: Bundle, folder: Path, sm: int) -> Iterator[tuple[str, Bundle | str]]:
    """The bundle for every GPU engine that is usable here, or why it could not be made."""
    makers = {
        "cuda": lambda output: prepack_bundle(source, output),
        "tensorrt": lambda output: compile_bundle(source, output, target="host", host_sm=sm),
    }
    for name, make in makers.items():
        if engines.status(name).usable:
            try:
                yield name, make(folder / f"{source.path.name}-{name}")
            except BarEdgeError as error:
                yield name, str(error)


def _judged(exact: Bundle, made: Bundle | str) -> dict[str, Any]:
    """The self-test, and decisions beside those of ONNX Runtime from the same past with the same noise."""
    if isinstance(made, str):
        return {"failed": made}
    classes, noise = np.arange(_DEMO_IMAGES) % exact.spec.num_classes, SeededNoise(3, range(_DEMO_IMAGES))
    try:
        with Generator(exact, engine="onnxruntime") as reference, Generator(made) as ours:
            bits = reference.sample(classes, exact.recipe, noise)
            led = ours.sample(classes, exact.recipe, noise, history=bits)
            again = ours.sample(classes, exact.recipe, noise)
            alone = ours.sample(classes[:1], exact.recipe, noise.part(0, 1))
            return {
                "self_test": selftest.run(ours).to_dict(),
                "decisions_differing": float((led != bits).mean()),
                "same_bits_in_any_batch": bool((again[:1] == alone).all()),
            }
    except BarEdgeError as error:
        return {"failed": str(error)}


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
    batches: Annotated[list[int], typer.Option("--batch", min=1)] = [1, 8, 64],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """Run everything and write the report."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        report = accept(Path(folder), console, batches=tuple(batches), rounds=rounds)
    command = f"python -m bar_edge.benchmarks.gpu_acceptance {shlex.join(sys.argv[1:])}"
    save({**stamp(command), **report}, output)


if __name__ == "__main__":
    typer.run(main)
