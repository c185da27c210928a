"""What moved between two reports."""

import copy
import json
import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from bar_edge.benchmarks import comparison
from bar_edge.benchmarks.figures import summarize
from bar_edge.runtime.errors import RequestError

EXACT = "bundle, onnxruntime"


def scaled(report, name, factor):
    """The report, with every image of a contender taking `factor` times as long."""
    other = copy.deepcopy(report)
    for batch in next(entry for entry in other["contenders"] if entry["name"] == name)["batches"]:
        samples = [factor * seconds for seconds in batch["image"]["samples"]]
        batch["image"] = {**summarize(samples), "samples": samples}
    return other


@pytest.fixture
def steady(measured):
    """A report whose images scatter by 2 %, so that what is noise does not depend on this machine's day."""
    report = copy.deepcopy(measured[0])
    for entry in report["contenders"]:
        for batch in entry.get("batches", ()):
            for figure in ("image", "first_token", "decode"):
                samples = [1 + 0.004 * i for i in range(6)]
                batch[figure] = {**summarize(samples), "samples": samples}
    return report


@pytest.mark.parametrize(("factor", "verdict"), [(1.3, "slower"), (0.7, "faster"), (1.002, "within noise")])
def test_only_what_leaves_the_noise_has_moved(steady, factor, verdict):
    found = list(comparison.movements(steady, scaled(steady, EXACT, factor)))
    verdicts = {(one.contender, one.figure): one.verdict for one in found}
    assert verdicts[EXACT, "image"] == verdict
    assert {v for key, v in verdicts.items() if key != (EXACT, "image")} == {"within noise"}


def test_few_samples_are_not_judged(steady):
    for entry in steady["contenders"]:
        for batch in entry.get("batches", ()):
            batch["image"]["samples"] = batch["image"]["samples"][:2]
    found = comparison.movements(steady, scaled(steady, EXACT, 3))
    assert {one.verdict for one in found if one.figure == "image"} == {"too few samples"}


def test_what_differs_besides_is_told(steady):
    other = copy.deepcopy(steady)
    other["machine"]["cpu"] = "another"
    other["contenders"] = [entry for entry in other["contenders"] if entry["name"] != EXACT]
    samples = [rate / 2 for rate in steady["machine_best"]["bytes_per_second"]["samples"]]
    steady["machine_best"]["bytes_per_second"]["samples"] = [8e9 + i for i in range(len(samples))]
    other["machine_best"]["bytes_per_second"]["samples"] = [4e9 + i for i in range(len(samples))]
    remarks = "\n".join(comparison.remarks(steady, other))
    assert re.search(r"machine differ: cpu .* then another", remarks)
    assert "0.50 × the speed" in remarks
    assert f"timed in the first report only: {EXACT} at batch 1, {EXACT} at batch 2" in remarks
    assert comparison.remarks(steady, steady) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read as JSON"), ("[]", "not a report"), ('{"format": "other"}', "not a report"),
     (json.dumps({"format": "bar-edge bench", "format_version": 99}), "report format 99")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        comparison.read(path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda report: report.pop("contenders"), "has no 'contenders'"),
        (lambda report: report.pop("machine"), "has no 'machine'"),
        (lambda report: report["machine_best"]["bytes_per_second"].pop("samples"), "has no 'samples'"),
        (lambda report: report["contenders"][0]["batches"][0]["image"].pop("p50"), "has no 'p50'"),
        (lambda report: report["contenders"][0].pop("name"), "has no 'name'"),
        (lambda report: report.update(contenders=5), "is damaged"),
        (lambda report: report.update(versions=[]), "is damaged"),
        (lambda report: report["contenders"].append([]), "is damaged"),
        (lambda report: report["contenders"][0]["batches"][0]["image"].update(samples=["fast"]), "is damaged"),
    ],
)
def test_reports_that_lack_what_is_compared_are_refused_by_name(measured, tmp_path, spoil, message):
    report = copy.deepcopy(measured[0])
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    assert comparison.read(path) == report
    spoil(report)
    path.write_text(json.dumps(report))
    with pytest.raises(RequestError, match=f"report.json: {message}"):
        comparison.read(path)


def test_the_table_is_in_milliseconds_and_its_interval_from_low_to_high(steady):
    moved = comparison.movements(steady, scaled(steady, EXACT, 1.3))
    image = next(one for one in moved if (one.contender, one.figure) == (EXACT, "image"))
    console = Console(width=200, record=True, file=StringIO())
    console.print(comparison.table([image]))
    row = next(line for line in console.export_text().splitlines() if EXACT in line)
    assert "1,010 1,313 1.300" in " ".join(row.split())
    low, high = map(float, re.search(r"(\d\.\d{3}) to (\d\.\d{3})", row).groups())
    assert 1.2 < low < 1.3 < high < 1.4


@pytest.mark.parametrize("width", [40, 80, 120])
def test_names_figures_and_verdicts_are_shown_at_any_width(steady, width):
    slower = scaled(steady, EXACT, 1.3)
    moved = [replace(one, contender="c[/b], onnxruntime") for one in comparison.movements(steady, slower)]
    console = Console(width=width, record=True, soft_wrap=True, file=StringIO())
    console.print(comparison.table(moved))
    words = console.export_text().split()
    assert words.count("c[/b],") == words.count("onnxruntime") == len(moved)
    assert words.count("slower") == 2 and words.count("1.300") >= 2  # at two batch sizes
    assert not [word for word in words if "…" in word]
