"""Latency of bundles beside the PyTorch reference, in one interleaved run.

    python -m bar_edge.benchmarks.latency /tmp/bar_b /tmp/bar_b-fp32 /tmp/bar_b-int8 -o benchmarks/results/NAME.json

The first argument is a folder with generator.bin, tokenizer.bin and config.yaml (see random_checkpoint.py).
"""

import sys
from collections.abc import Callable, Mapping, Sequence
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

MEMORY = "memory"


def compare(
    checkpoint: Mapping[str, str | None],
    bundles: Sequence[Path],
    *,
    batch: int,
    tokens: int,
    rounds: int,
    threads: int,
    baselines: Sequence[str] = ("float32",),
    progress: Callable[[str], None] | None = None,
) -> Report:
    """Measure the reference in each of the `baselines` dtypes and every bundle; derived figures are in `summary`."""
    common = {"batch": batch, "tokens": tokens, "threads": threads}
    contenders = [
        Contender(
            f"pytorch {dtype}", "bar_edge.benchmarks.contenders:pytorch", {**checkpoint, **common, "dtype": dtype}
        )
        for dtype in baselines
    ]
    contenders += [
        Contender(
            path.name,
            "bar_edge.benchmarks.contenders:runtime",
            {"bundle": str(path), "engine": "onnxruntime", **common},
        )
        for path in bundles
    ]
    contenders.append(Contender(MEMORY, "bar_edge.benchmarks.contenders:memory", {"threads": threads}))
    command = " ".join(["python -m bar_edge.benchmarks.latency", *sys.argv[1:]])
    report = measure(contenders, rounds=rounds, command=command, progress=progress)
    stage = "image" if tokens == 0 else "token"
    base = median(report, contenders[0].name, stage)
    report["summary"] = {
        "model": Bundle.open(bundles[0]).variant,
        "batch": batch,
        "threads": threads,
        "stage": stage,
        "bundles": {path.name: _derived(report, path, batch, stage, base) for path in bundles},
    }
    return report


def _derived(report: Report, path: Path, batch: int, stage: str, base: float | None) -> dict[str, Any]:
    """Speed beside the first baseline, and beside what the machine's memory allows."""
    bundle = Bundle.open(path)
    spec = bundle.spec
    read = bytes_per_token(weights.read_places(path / weights.FILE_NAME), len(bundle.recipe.allocation))
    rows = batch * (2 if bundle.recipe.guidance > 1 else 1)
    cache = rows * 8 * spec.num_layers * (spec.prefix_length + spec.num_tokens) * spec.hidden_size
    held = (path / weights.FILE_NAME).stat().st_size + cache
    derived: dict[str, Any] = {"bytes_per_token": read, "weights_and_kv_cache_bytes": held}
    ours, token = median(report, path.name, stage), median(report, path.name, "token")
    memory = next(entry for entry in report["contenders"] if entry["name"] == MEMORY)
    bandwidth = memory["stages"]["bytes_per_second"]["maximum"] if "stages" in memory else None  # what it can do
    if base and ours and token and bandwidth:
        peak = next(entry["peak_rss_bytes"] for entry in report["contenders"] if entry["name"] == path.name)
        derived |= {
            f"{stage}_speedup": base / ours,
            "floor_seconds": read / bandwidth,
            "fraction_of_bandwidth": read / bandwidth / token,
            "peak_rss_over_weights_and_cache": peak / held,
        }
    return derived


def table(report: Report) -> Table:
    """The report for people."""
    result = Table(title=f"{report['summary']['model'] or 'model'}, batch {report['summary']['batch']}")
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
    bundles: Annotated[list[Path], typer.Argument(help="Bundles made from it.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
    batch: Annotated[int, typer.Option(help="Images drawn together.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens per round; 0 for whole images.")] = 9,
    rounds: Annotated[int, typer.Option(help="Counted rounds.")] = 4,
    baseline: Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeat.")] = None,
    threads: Annotated[int, typer.Option(help="0 for all cores.")] = 0,
) -> None:
    """Measure, print the table, write the JSON."""
    console = Console()
    names = {"generator": "generator.bin", "tokenizer": "tokenizer.bin", "config": "config.yaml"}
    with console.status("loading") as status:
        report = compare(
            {key: str(checkpoint / name) for key, name in names.items()}, bundles, batch=batch, tokens=tokens,
            rounds=rounds, threads=threads or cpu_count(), baselines=baseline or ["float32"], progress=status.update,
        )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    save(report, output)
    console.print(table(report))
    for name, derived in report["summary"]["bundles"].items():
        console.print(name, {key: round(value, 4) for key, value in derived.items()})


if __name__ == "__main__":
    typer.run(main)
