"""The work of `bar-edge bench` between its options and its files."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from bar_edge.benchmarks import bench, charts, comparison, tables
from bar_edge.benchmarks.measure import Report, save
from bar_edge.benchmarks.page import page
from bar_edge.benchmarks.plan import Plan
from bar_edge.runtime.errors import RequestError

JSON, HTML = "report.json", "report.html"
_DPI = 150


def check_output(output: Path, *, force: bool) -> None:
    """Raise RequestError if a report must not be written to `output`; asked before hours of measuring."""
    if output.exists() and not output.is_dir():
        raise RequestError(f"{output}: is a file; choose a folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise RequestError(f"{output}: has files already; choose another folder, or pass --force to write into it")


def measure(plan: Plan, output: Path, progress: bench.Progress) -> Report:
    """Run a plan and write report.json, report.html and a PNG of every chart to `output`."""
    report, images = bench.run(plan, progress)
    output.mkdir(parents=True, exist_ok=True)
    save(report, output / JSON)
    figures = charts.draw(report)
    for name, figure in figures.items():
        figure.savefig(output / f"{name}.png", dpi=_DPI, bbox_inches="tight")
    (output / HTML).write_text(page(report, images, figures), encoding="utf-8")
    return report


def show(report: Report, console: Console) -> None:
    """Tables, verdicts and notes on the terminal."""
    for table in tables.tables(report):
        console.print(table)
    for (name, batch_size), sentences in tables.verdicts_by_contender(report).items():
        console.print(f"{name}, batch {batch_size}: {'; '.join(sentences)}", highlight=False)
    for note in tables.notes(report):
        console.print(note, style="dim", highlight=False)


def compare(paths: Sequence[Path], console: Console) -> None:
    """Say what moved between two reports. Raises RequestError unless two are given."""
    if len(paths) != 2:
        raise RequestError(f"--compare takes two report.json files, got {len(paths)}")
    before, after = map(comparison.read, paths)
    console.print(comparison.table(list(comparison.movements(before, after))))
    for remark in comparison.remarks(before, after):
        console.print(remark, highlight=False)
