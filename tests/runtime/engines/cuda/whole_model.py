"""The self-test of a bundle compiled for the engine `cuda`, executed kernel by kernel on the CPU.

    python -m tests.runtime.engines.cuda.whole_model BUNDLE-cuda -o benchmarks/results/FILE.json

Takes 20 s a token of BAR-B or so.
"""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from bar_edge.benchmarks.measure import save, stamp
from bar_edge.runtime import selftest
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.compiler import KERNELS
from bar_edge.runtime.engines.cuda.module import MODEL
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.terminal import run_function

from .emulated_engine import EmulatedGenerator, kernel_loop
from .host import NATIVE, HostKernels, build


def main(compiled: Path, output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")]) -> None:
    """Run the self-test, and write what was found."""
    with tempfile.TemporaryDirectory() as folder:
        kernels = HostKernels(build(KERNELS, Path(folder)))
        model = HostKernels(build(MODEL, Path(folder), NATIVE))
        bundle = Bundle.open(compiled)
        profile = Profile.of(1, guided=True, passes=len(bundle.recipe.allocation))
        gpu = kernel_loop(bundle, kernels, model, profile)
        generator: Any = EmulatedGenerator(bundle, gpu.loop)
        found = selftest.run(generator)
        gpu.device.check_guards()
    facts = {"variant": bundle.variant, "kernel_family": bundle.manifest["engines"]["cuda"]["family"]}
    names = shlex.join([compiled.name, "-o", output.name])
    save({**stamp(f"python -m tests.runtime.engines.cuda.whole_model {names}"), **facts, **found.to_dict()}, output)
    print(found.sentence, file=sys.stderr)


if __name__ == "__main__":
    run_function(main)
