"""Latency of a bundle beside the PyTorch reference, in one interleaved run.

    python -m bar_edge.benchmarks.latency /tmp/bar_b /tmp/bar_b-bundle -o benchmarks/results/NAME.json

The first argument is a folder with generator.bin, tokenizer.bin and config.yaml (see random_checkpoint.py).
"""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bar_edge.benchmarks.measure import Contender, Report, measure, median, save
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.onnxruntime import cpu_count
from bar_edge.runtime.inspection import bytes_per_token

BASELINE, RUNTIME, MEMORY = "pytorch float32", "onnxruntime", "memory"


def compare(
    checkpoint: dict[str, str | None],
    bundle: Path,
    *,
    batch: int,
    tokens: int,
    rounds: int,
    threads: int,
    progress: Any,
) -> Report:
    """Measure the reference and the runtime; adds the derived figures under `summary`."""
    common = {"batch": batch, "tokens": tokens, "threads": threads}
    contenders = [
        Contender(BASELINE, "bar_edge.benchmarks.contenders:pytorch", {**checkpoint, **common}),
        Contender(RUNTIME, "bar_edge.benchmarks.contenders:runtime",
                  {"bundle": str(bundle), "engine": "onnxruntime", **common}),
        Contender(MEMORY, "bar_edge.benchmarks.contenders:memory", {"threads": threads}),
    ]  # fmt: skip
    report = measure(
        contenders,
        rounds=rounds,
        command=" ".join(["python -m bar_edge.benchmarks.latency", *sys.argv[1:]]),
        progress=progress,
    )
    opened = Bundle.open(bundle)
    spec = opened.spec
    read = bytes_per_token(weights.read_places(bundle / weights.FILE_NAME), len(opened.recipe.allocation))
    rows = batch * (2 if opened.recipe.guidance > 1 else 1)
    cache = rows * 8 * spec.num_layers * (spec.prefix_length + spec.num_tokens) * spec.hidden_size
    stored = (bundle / weights.FILE_NAME).stat().st_size
    report["summary"] = {
        "variant": opened.variant, "batch": batch, "threads": threads, "bytes_per_token": read,
        "weights_and_kv_cache_bytes": stored + cache,
    }  # fmt: skip
    reference, ours, bandwidth = (
        median(report, BASELINE, "token"), median(report, RUNTIME, "token"), median(report, MEMORY, "bytes_per_second")
    )  # fmt: skip
    if reference and ours and bandwidth:
        peak = next(entry["peak_rss_bytes"] for entry in report["contenders"] if entry["name"] == RUNTIME)
        report["summary"] |= {
            "token_speedup": reference / ours,
            "floor_seconds": read / bandwidth,
            "fraction_of_bandwidth": read / bandwidth / ours,
            "peak_rss_over_weights_and_cache": peak / (stored + cache),
        }
    return report


def table(report: Report) -> Table:
    """The report for people."""
    result = Table(title=f"{report['summary']['variant'] or 'model'}, batch {report['summary']['batch']}")
    for heading in ("contender", "token ms", "first token ms", "decode ms", "s per image", "peak RSS MiB", "load s"):
        result.add_column(heading, justify="left" if heading == "contender" else "right")
    for entry in report["contenders"]:
        if entry["name"] == MEMORY:
            continue
        if "error" in entry:
            result.add_row(entry["name"], entry["error"])
            continue
        stages = {stage: figures["median"] for stage, figures in entry["stages"].items()}
        cells = [f"{stages[s] * 1e3:.2f}" if s in stages else "-" for s in ("token", "first_token", "decode")]
        image = f"{stages['image']:.3f}" if "image" in stages else "-"
        result.add_row(
            entry["name"], *cells, image, f"{entry['peak_rss_bytes'] / 2**20:.0f}", f"{entry['load_seconds']:.1f}"
        )
    return result


def main(
    checkpoint: Annotated[Path, typer.Argument(help="Folder with generator.bin, tokenizer.bin, config.yaml.")],
    bundle: Annotated[Path, typer.Argument(help="The bundle exported from it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
    batch: Annotated[int, typer.Option(help="Images drawn together.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens per round; 0 for whole images.")] = 9,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 4,
    threads: Annotated[int, typer.Option(help="0 for all cores.")] = 0,
) -> None:
    """Measure, print the table, write the JSON."""
    console = Console()
    names = {"generator": "generator.bin", "tokenizer": "tokenizer.bin", "config": "config.yaml"}
    files: dict[str, str | None] = {key: str(checkpoint / name) for key, name in names.items()}
    with console.status("loading") as status:
        report = compare(
            files, bundle, batch=batch, tokens=tokens, rounds=rounds, threads=threads or cpu_count(),
            progress=status.update,
        )  # fmt: skip
    save(report, output)
    console.print(table(report))
    for key, value in report["summary"].items():
        console.print(f"{key}: {value:.4g}" if isinstance(value, float) else f"{key}: {value}")


if __name__ == "__main__":
    typer.run(main)
