"""`bar-edge bench`: files, exit codes, and one sentence for every mistake."""

import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from rich.console import Console
from typer.testing import CliRunner

from bar_edge.benchmarks import bench, command
from bar_edge.runtime.cli import app
from bar_edge.runtime.errors import CheckpointError, RequestError


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


def test_a_failed_contender_is_shown_and_the_command_fails(small, other_weights, tmp_path):
    done = run(small.bundle.path, other_weights.path, "-o", tmp_path / "report", "--rounds", 1, "--threads", 1)
    assert done.exit_code == 1
    assert done.stderr.startswith("other-weights, onnxruntime failed: batch 1: ") and done.stderr.count("\n") == 1
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [entry["state"] for entry in report["contenders"]] == ["timed", "failed"]


def test_an_engine_that_a_bundle_was_not_made_for_is_told_and_the_command_fails(small, tmp_path):
    done = run(small.bundle.path, "-o", tmp_path / "report", "--engine", "cuda", "--rounds", 1, "--threads", 1)
    assert done.exit_code == 1
    assert done.stderr == "nothing was timed on cuda, which was asked for\n"
    (entry,) = json.loads((tmp_path / "report" / "report.json").read_text())["contenders"]
    assert entry["state"] == "unavailable" and "was made for onnxruntime, not for cuda" in entry["reason"]


@pytest.mark.parametrize(
    ("states", "asked", "missed"),
    [
        ({"a, onnxruntime": "timed", "b, cuda": "unavailable"}, (), []),
        ({"a, onnxruntime": "timed", "b, onnxruntime": "unavailable"}, ("onnxruntime",), []),
        ({"a, onnxruntime": "timed", "a, cuda": "unavailable"}, ("onnxruntime", "cuda"), ["nothing was timed on cuda"]),
        ({"PyTorch fp32": "reference", "b, cuda": "unavailable"}, (), ["nothing was timed"]),
        ({"a, onnxruntime": "timed", "PyTorch fp32": "failed"}, (), ["PyTorch fp32 failed: why"]),
    ],
)
def test_what_was_asked_for_and_not_timed_is_missed(states, asked, missed):
    entries = [{"name": name, "state": state, "reason": "why"} for name, state in states.items()]
    found = command.shortfalls({"contenders": entries}, asked)
    assert len(found) == len(missed) and all(map(str.startswith, found, missed))


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
    with pytest.raises(RequestError, match="is a bundle, which other files would spoil"):
        run(small.bundle.path, "-o", small.bundle.path, "--force")


def test_a_baseline_needs_its_tokenizer(small, tmp_path):
    with pytest.raises(RequestError, match="--baseline and --tokenizer go together"):
        run(small.bundle.path, "--baseline", small.generator, "-o", tmp_path / "report")


def test_files_that_are_not_there_are_refused_at_once(small, tmp_path, never_measured):
    files = {"--baseline": small.generator, "--tokenizer": small.tokenizer, "--config": small.config}
    for missing in files:
        given = {**files, missing: tmp_path / "nope.bin"}
        with pytest.raises(CheckpointError, match=r"nope\.bin"):
            run(small.bundle.path, "-o", tmp_path / "report", *(word for option in given.items() for word in option))
    with pytest.raises(CheckpointError, match="Give the YAML with --config"):
        run(small.bundle.path, "-o", tmp_path / "report", "--baseline", small.generator, "--tokenizer", small.tokenizer)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--form", "--config"])
def test_options_of_a_baseline_need_one(small, tmp_path, option):
    with pytest.raises(RequestError, match="--form and --config are of the PyTorch reference"):
        run(small.bundle.path, option, "bf16", "-o", tmp_path / "report")


def test_more_threads_than_any_machine_has_are_refused(small, tmp_path):
    for threads in (100_000, 999_999_999_999):
        assert run(small.bundle.path, "--threads", threads, "-o", tmp_path / "report").exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.fixture
def never_measured(monkeypatch):
    """Fail if anything is measured."""
    monkeypatch.setattr(bench, "run", lambda *_: pytest.fail("measured"))


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(
    small, tmp_path, monkeypatch, never_measured
):
    def refused(dir):  # noqa: A002
        raise PermissionError(13, "Permission denied", str(dir))

    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        run(small.bundle.path, "-o", tmp_path / "file" / "report")
    monkeypatch.setattr(command, "TemporaryFile", refused)
    with pytest.raises(PermissionError):
        run(small.bundle.path, "-o", tmp_path / "report")


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path):
    command.check_output(tmp_path / "new" / "report", force=False)
    assert not list((tmp_path / "new" / "report").iterdir())


@pytest.mark.parametrize(("owner", "method"), [(Figure, "savefig"), (Path, "write_text")], ids=["charts", "page"])
def test_on_a_full_disk_nothing_is_left_half_written(measured, tmp_path, monkeypatch, owner, method):
    def cut(writer, *arguments, **_):
        path = writer if isinstance(writer, Path) else arguments[0]
        path.write_bytes(b"cut")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(bench, "run", lambda *_: measured)
    monkeypatch.setattr(command, "save", lambda report, path: None)
    monkeypatch.setattr(command, "page", lambda *_: "page")
    monkeypatch.setattr(command.charts, "draw", lambda report: {"latency": Figure()} if owner is Figure else {})
    for name in ("latency.png", "report.html"):
        (tmp_path / name).write_bytes(b"before")
    monkeypatch.setattr(owner, method, cut)
    with pytest.raises(OSError, match="No space left"):
        command.measure(None, tmp_path, lambda *_: None)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {
        "latency.png": b"before", "report.html": b"before",
    }  # fmt: skip


def test_a_page_with_a_name_that_is_no_utf8_is_written(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda *_: measured)
    monkeypatch.setattr(command, "page", lambda *_: "d\udce9mo")
    monkeypatch.setattr(command.charts, "draw", lambda report: {})
    command.measure(None, tmp_path, lambda *_: None)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "d?mo"


@pytest.mark.parametrize("width", [30, 40, 80, 120])
def test_everything_is_shown_as_it_is_at_any_width(measured, width):
    names = {"bundle, onnxruntime": "b[red], onnxruntime", "other-weights, onnxruntime": "c[/b], onnxruntime"}
    report = json.loads(json.dumps(measured[0]))
    report["settings"]["variant"] = "[bold]"
    report["settings"]["threads"] = 123_456
    for entry in (*report["contenders"], *report["verdicts"]):
        for key in ("name", "contender"):
            if key in entry:
                entry[key] = names.get(entry[key], entry[key])
    for entry in report["contenders"]:
        for batch in entry.get("batches", ()):
            batch["image"]["p50"] = 98_765.432
    console = Console(width=width, record=True, soft_wrap=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    command.show(report, console)
    text = console.export_text()
    assert "…" not in text and "[bold]: whole images" in text
    assert text.count("98,765,432") == sum(len(entry.get("batches", ())) for entry in report["contenders"])
    for name in names.values():
        assert name in text or all(part in text for part in name.split())
