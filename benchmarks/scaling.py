"""How cost grows with batch, tokens, depth and threads: whole images of several bundles, one after the other.

    python -m bar_edge.benchmarks.scaling bar_b-int8 --batch 1 --batch 32 --threads 1 --threads 2 -o scaling.json
    python -m bar_edge.benchmarks.scaling --plot scaling.json other.json -o scaling.png

Every cell draws one batch after a warm-up of its own; what is compared within a file is ratios of 2 and more, not
percents. Token times keep their position, so that the growth of attention with the filled cache can be seen.
"""

import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from rich.console import Console
from rich.table import Table

from bar_edge.benchmarks.measure import Contender, Report, Worker, replacing, save, stamp
from bar_edge.benchmarks.tables import mebibytes
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.tables import redirected_width
from bar_edge.runtime.terminal import run_function

_POINTS = 16  # stretches of positions whose median token time is kept


def measure(bundles: Sequence[Path], batches: Sequence[int], threads: Sequence[int], console: Console) -> list[Report]:
    """One batch of every bundle, batch size and number of threads."""
    runs = []
    for path in bundles:
        bundle = Bundle.open(path)
        for count in threads:
            arguments = {"bundle": str(path), "engine": bundle.engines[0], "threads": count}
            for batch in batches:
                with Worker(
                    Contender(path.name, "bar_edge.benchmarks.contenders:OnEngine", arguments), count
                ) as worker:
                    if bundle.spec.num_tokens * batch <= 512:  # long batches warm themselves
                        worker.call("draw", batch, 0)
                    drawn = worker.call("draw", batch, 1)
                    peak = worker.peak_rss_bytes()
                runs.append(_run(path, bundle, batch, count, drawn.seconds, peak))
                console.print(_sentence(runs[-1]), highlight=False)
    return runs


def _run(
    path: Path, bundle: Bundle, batch: int, threads: int, seconds: dict[str, list[float]], peak: int | None
) -> Report:
    token = np.asarray(seconds["token"])
    places = np.array_split(np.arange(1, len(token) + 1), min(_POINTS, len(token)))
    parts = np.array_split(token, min(_POINTS, len(token)))
    precision = bundle.manifest.get("quantization", {}).get("precision", "fp32")
    return {
        "bundle": path.name, "variant": bundle.variant, "layers": bundle.spec.num_layers, "precision": precision,
        "tokens": bundle.spec.num_tokens, "batch": batch, "threads": threads,
        "image_seconds": seconds["image"][0], "first_token": seconds["first_token"][0],
        "token_seconds": float(np.median(token)), "decode_seconds": seconds["decode"][0], "peak_rss_bytes": peak,
        "by_position": [
            {"position": float(np.mean(place)), "seconds": float(np.median(part))}
            for place, part in zip(places, parts, strict=True)
        ],
    }  # fmt: skip


def growth(run: Report) -> dict[str, float]:
    """Token seconds by position: start and slope of a line, and how much closer a parabola comes (of the variance)."""
    position = np.array([point["position"] for point in run["by_position"]])
    seconds = np.array([point["seconds"] for point in run["by_position"]])
    slope, start = np.polyfit(position, seconds, 1)
    left = [float(np.square(seconds - np.polyval(np.polyfit(position, seconds, n), position)).mean()) for n in (1, 2)]
    spread = float(seconds.var()) or 1.0
    return {"start": float(start), "slope": float(slope), "curved": (left[0] - left[1]) / spread}


def plot(runs: Sequence[Report], path: Path) -> None:
    """Four panels: batch, threads, tokens and depth, position."""
    figure = Figure(figsize=(11, 8), layout="constrained")
    batch, threads, tokens, position = figure.subplots(2, 2).flat
    most = max(run["threads"] for run in runs)
    _lines(batch, runs, "batch", most)
    batch.set(xlabel="images in a batch", ylabel="seconds an image", title="Batch", ylim=(0, None))
    batch.set_xscale("log", base=2)
    batch.xaxis.set_major_formatter(ScalarFormatter())
    several = {run["bundle"] for run in runs if run["threads"] != most}
    for name, chosen in _by_bundle([run for run in runs if run["batch"] == 1 and run["bundle"] in several]):
        threads.plot([r["threads"] for r in chosen], [r["image_seconds"] for r in chosen], "o-", label=name)
    threads.set(xlabel="threads", ylabel="seconds an image, batch 1", title="Threads", ylim=(0, None))
    threads.set_xticks(range(1, most + 1))
    threads.legend()
    single = [run for run in runs if run["batch"] == 1 and run["threads"] == most]
    for run in single:
        tokens.plot(run["tokens"], run["image_seconds"], "o")
        label = f"{run['variant'] or run['bundle']} {run['precision']}"
        tokens.annotate(
            label, (run["tokens"], run["image_seconds"]), xytext=(5, 4), textcoords="offset points", fontsize=8
        )
        x, y = (
            [1e3 * point[k] if k == "seconds" else point[k] for point in run["by_position"]]
            for k in ("position", "seconds")
        )
        position.plot(x, y, "-", label=label)
    tokens.set(
        xscale="log", yscale="log", xlabel="tokens", ylabel="seconds an image, batch 1", title="Tokens and depth"
    )
    position.set(xlabel="position", ylabel="ms a token, batch 1", title="Filled cache", ylim=(0, None))
    position.legend(fontsize=8)
    with replacing(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def _lines(axes: Axes, runs: Sequence[Report], along: str, threads: int) -> None:
    chosen = [run for run in runs if run["threads"] == threads]
    several = {run["bundle"] for run in chosen if run["batch"] > 1}
    for name, lines in _by_bundle([run for run in chosen if run["bundle"] in several]):
        lines.sort(key=lambda run: run[along])
        axes.plot([run[along] for run in lines], [run["image_seconds"] for run in lines], "o-", label=name)
    axes.legend()


def _by_bundle(runs: Sequence[Report]) -> Iterator[tuple[str, list[Report]]]:
    for name in dict.fromkeys(run["bundle"] for run in runs):
        yield name, [run for run in runs if run["bundle"] == name]


def _sentence(run: Report) -> str:
    grown = growth(run)
    return (
        f"{run['bundle']}, batch {run['batch']}, {run['threads']} threads: {run['image_seconds']:.2f} s an image, "
        f"{1e3 * run['token_seconds']:.1f} ms a token ({1e3 * grown['start']:.1f}, and {1e6 * grown['slope']:.1f} µs a "
        f"position), {mebibytes(run['peak_rss_bytes'])} MiB"
    )


def table(runs: Sequence[Report]) -> Table:
    """Everything measured."""
    columns = ("bundle", "tokens", "layers", "batch", "threads", "s an image", "ms a token", "µs a position", "MiB")
    made = Table(*columns)
    for run in runs:
        made.add_row(
            run["bundle"], *(str(run[name]) for name in ("tokens", "layers", "batch", "threads")),
            f"{run['image_seconds']:.2f}", f"{1e3 * run['token_seconds']:.1f}", f"{1e6 * growth(run)['slope']:.1f}",
            mebibytes(run["peak_rss_bytes"]),
        )  # fmt: skip
    return made


def main(
    inputs: Annotated[list[Path], typer.Argument(help="Bundles, or result files with --plot.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write, or a PNG with --plot.")],
    batches: Annotated[list[int], typer.Option("--batch", min=1)] = [1],  # noqa: B006
    threads: Annotated[list[int], typer.Option("--threads", min=1)] = [1],  # noqa: B006
    plotted: Annotated[bool, typer.Option("--plot", help="Draw result files instead of measuring.")] = False,
) -> None:
    """Measure how cost grows, or draw what was measured."""
    console = Console(width=redirected_width())
    if plotted:
        plot([run for path in inputs for run in json.loads(path.read_text(encoding="utf-8"))["runs"]], output)
        return
    if not output.absolute().parent.is_dir():
        raise RequestError(f"{output}: its folder does not exist; make it first")
    runs = measure(inputs, batches, threads, console)
    names = [path.name if path in inputs else str(path) for path in map(Path, sys.argv[1:])]
    save({**stamp(f"python -m bar_edge.benchmarks.scaling {shlex.join(names)}"), "runs": runs}, output)
    console.print(table(runs))


if __name__ == "__main__":
    run_function(main)
