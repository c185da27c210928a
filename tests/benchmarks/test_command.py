"""`bar-edge bench`: files, exit codes, and one sentence for every mistake."""

import json

import pytest
from typer.testing import CliRunner

from bar_edge.runtime.cli import app
from bar_edge.runtime.errors import RequestError


def run(*arguments: object):
    """A verb in this process; what it raises is raised."""
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], catch_exceptions=False)


@pytest.fixture(scope="module")
def written(small, tmp_path_factory):
    """(what was printed, the folder that was written) of a bench of one bundle."""
    output = tmp_path_factory.mktemp("bench") / "report"
    done = run(small.bundle.path, "-o", output, "--rounds", 5, "--threads", 1, "--batch-size", 2)
    assert done.exit_code == 0
    return done.output, output


def test_a_report_is_json_page_and_charts(written):
    printed, output = written
    assert {"report.json", "report.html", "latency.png", "stages.png"} <= {file.name for file in output.iterdir()}
    assert not [file for file in output.iterdir() if file.name.startswith(".")]
    report = json.loads((output / "report.json").read_text())
    assert report["command"].startswith("bar-edge")
    assert report["settings"]["rounds"] == 5 and report["settings"]["batch_sizes"] == [2]
    assert "bundle, onnxruntime" in printed and "no p99 of images" in printed
    assert (output / "report.html").read_text().startswith("<!doctype html>")
    assert (output / "latency.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_is_compared_with_itself(written):
    path = written[1] / "report.json"
    done = run("--compare", path, path)
    assert done.exit_code == 0
    assert done.output.split().count("noise") == 3  # image, first token and decode are within it
    assert "slower" not in done.output and "differ" not in done.output


@pytest.mark.parametrize("count", [1, 3])
def test_two_reports_are_compared_no_more_no_less(written, count):
    with pytest.raises(RequestError, match=f"takes two report.json files, got {count}"):
        run("--compare", *[written[1] / "report.json"] * count)


def test_a_folder_with_files_is_refused_before_anything_is_measured(small, tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(RequestError, match="has files already"):
        run(small.bundle.path, "-o", tmp_path)
    with pytest.raises(RequestError, match="is a file"):
        run(small.bundle.path, "-o", tmp_path / "mine")


def test_a_baseline_needs_its_tokenizer(small, tmp_path):
    with pytest.raises(RequestError, match="--baseline and --tokenizer go together"):
        run(small.bundle.path, "--baseline", small.generator, "-o", tmp_path / "report")
