"""The work of `bar-edge bench` between its options and its files."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile

from rich.console import Console

from bar_edge.benchmarks import bench, charts, comparison, tables
from bar_edge.benchmarks.measure import Report, replacing, save
from bar_edge.benchmarks.page import page
from bar_edge.benchmarks.plan import Baseline, Plan
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.folders import check_folder

JSON, HTML = "report.json", "report.html"
_DPI = 150


def check_output(output: Path, *, force: bool) -> None:
    """Make the folder and prove that it can be written to, before hours of measuring.

    Raises RequestError if a report must not be written there, OSError if it cannot be.
    """
    check_folder(output, force=force)
    output.mkdir(parents=True, exist_ok=True)
    with TemporaryFile(dir=output):
        pass


def check_baseline(baseline: Baseline) -> None:
    """Raise CheckpointError if a file of the baseline is missing or unreadable, or they do not belong together."""
    from bar_edge.export.checkpoint import load_checkpoint

    load_checkpoint(baseline.generator, baseline.tokenizer, baseline.config)


def measure(plan: Plan, output: Path, progress: bench.Progress) -> Report:
    """Run a plan and write report.json, report.html and a PNG of every chart to the folder `output`."""
    report, images = bench.run(plan, progress)
    save(report, output / JSON)
    figures = charts.draw(report)
    for name, figure in figures.items():
        with replacing(output / f"{name}.png") as partial:
            figure.savefig(partial, format="png", dpi=_DPI, bbox_inches="tight")
    with replacing(output / HTML) as partial:
        # names of files that are no UTF-8 hold lone surrogates, which have no encoding
        partial.write_text(page(report, images, figures), encoding="utf-8", errors="replace")
    return report


def shortfalls(report: Report, engines: Sequence[str]) -> list[str]:
    """What was to be timed and was not, a sentence each. `engines` are those asked for by name.

    A bundle whose own engine cannot run here is none, as long as anything was timed: reports of all bundles are made on
    machines that run some of them.
    """
    entries = report["contenders"]
    timed = [entry["name"] for entry in entries if entry["state"] == "timed"]
    found = [f"{entry['name']} failed: {entry['reason']}" for entry in entries if entry["state"] == "failed"]
    for engine in dict.fromkeys(engines):
        if not any(name.endswith(f", {engine}") for name in timed):
            found.append(f"nothing was timed on {engine}, which was asked for")
    if not (timed or found):
        found.append("nothing was timed")
    return found


def show(report: Report, console: Console) -> None:
    """Tables, verdicts and notes on the terminal."""
    for table in tables.tables(report):
        console.print(table)
    for (name, batch_size), sentences in tables.verdicts_by_contender(report).items():
        console.print(f"{name}, batch {batch_size}: {'; '.join(sentences)}", highlight=False, markup=False)
    for note in tables.notes(report):
        console.print(note, style="dim", highlight=False, markup=False)


def compare(paths: Sequence[Path], console: Console) -> None:
    """Say what moved between two reports. Raises RequestError unless two are given."""
    if len(paths) != 2:
        raise RequestError(f"--compare takes two report.json files, got {len(paths)}")
    before, after = map(comparison.read, paths)
    console.print(comparison.table(list(comparison.movements(before, after))))
    for remark in comparison.remarks(before, after):
        console.print(remark, highlight=False, markup=False)
