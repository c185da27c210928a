"""What compiling costs: seconds, peak memory and plans of bundles compiled for RTX cards, a process each.

python -m bar_edge.benchmarks.compiling bar_b bar_b-int8 -o compiling.json
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from bar_edge.benchmarks.measure import Contender, Worker, save, stamp
from bar_edge.runtime.tables import redirected_width
from bar_edge.runtime.terminal import run_function


class Compiling:
    """Compiles one bundle in a process of its own."""

    def __init__(self, *, bundle: str, precision: str) -> None:
        self._bundle, self._precision = Path(bundle), precision

    def run(self) -> Mapping[str, Any]:
        """Seconds, and what the manifest says of the engines."""
        from bar_edge.export.compile import compile_bundle
        from bar_edge.runtime.bundle import Bundle

        with tempfile.TemporaryDirectory(dir=self._bundle.absolute().parent) as folder:
            source = Bundle.open(self._bundle)
            begin = time.perf_counter()
            made = compile_bundle(source, Path(folder) / "made", target="rtx", precision=self._precision)
            seconds = time.perf_counter() - begin
            return {"seconds": seconds, "engines": made.manifest["engines"]}


def main(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
    precision: Annotated[str, typer.Option()] = "fp16",
) -> None:
    """Compile every bundle once."""
    console, runs = Console(width=redirected_width()), []
    for path in bundles:
        arguments = {"bundle": str(path), "precision": precision}
        with Worker(Contender(path.name, "bar_edge.benchmarks.compiling:Compiling", arguments), 1) as worker:
            found = worker.call("run")
            peak = worker.peak_rss_bytes()
        runs.append({"bundle": path.name, "peak_rss_bytes": peak, **found})
        console.print(f"{path.name}: {found['seconds']:.0f} s, {peak / 2**30:.1f} GiB at the peak", highlight=False)
    names = [path.name if path in bundles else str(path) for path in map(Path, sys.argv[1:])]
    save({**stamp(f"python -m bar_edge.benchmarks.compiling {shlex.join(names)}"), "runs": runs}, output)


if __name__ == "__main__":
    run_function(main)
