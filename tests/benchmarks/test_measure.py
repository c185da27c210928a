"""The timing harness: contenders take turns, failures are reported, and the report is whole JSON."""

import json

import pytest

from bar_edge.benchmarks.measure import Contender, Report, machine, measure, median, peak_rss_bytes, save, versions

MEMORY = "bar_edge.benchmarks.contenders:memory"
SMALL = {"threads": 1, "mebibytes": 2}
BROKEN = {
    "no such module": Contender("no such module", "bar_edge.benchmarks.nowhere:memory"),
    "no such function": Contender("no such function", "bar_edge.benchmarks.contenders:nothing"),
    "wrong arguments": Contender("wrong arguments", MEMORY, {"colour": "red"}),
    "fails to load": Contender("fails to load", MEMORY, {"threads": 0}),
    "fails to run": Contender("fails to run", "types:SimpleNamespace"),
    "dies": Contender("dies", "os:_exit", {"status": 3}),
}


@pytest.fixture(scope="module")
def told() -> list[str]:
    return []


@pytest.fixture(scope="module")
def report(told) -> Report:
    """Two sound contenders around those that fail in every way."""
    contenders = [Contender("first", MEMORY, SMALL), *BROKEN.values(), Contender("last", MEMORY, SMALL)]
    return measure(contenders, rounds=2, warmup=1, command="the command", progress=told.append)


def test_contenders_take_turns_round_by_round(report, told):
    names = ["first", *BROKEN, "last"]
    assert told == [f"{kind}: {name}" for kind in ("warm-up", "round 1 of 2", "round 2 of 2") for name in names]


@pytest.mark.parametrize("name", ["first", "last"])
def test_figures_are_over_the_counted_rounds(report, name):
    entry = next(entry for entry in report["contenders"] if entry["name"] == name)
    assert "error" not in entry
    figures = entry["stages"]["bytes_per_second"]
    assert figures["count"] == 2
    assert 0 < figures["minimum"] <= figures["median"] <= figures["maximum"]
    assert entry["arguments"] == SMALL
    assert entry["load_seconds"] > 0
    assert median(report, name, "bytes_per_second") == figures["median"]


def test_peak_memory_is_each_contenders_own(report):
    small = next(entry for entry in report["contenders"] if entry["name"] == "first")["peak_rss_bytes"]
    large = measure([Contender("large", MEMORY, {"threads": 1, "mebibytes": 200})], rounds=1, warmup=0)
    assert small > 2**20
    assert large["contenders"][0]["peak_rss_bytes"] > small + 150 * 2**20


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no such module", "ModuleNotFoundError"),
        ("no such function", "AttributeError"),
        ("wrong arguments", "TypeError"),
        ("fails to load", "ZeroDivisionError"),
        ("fails to run", "not callable"),
        ("dies", "the process ended without an answer"),
    ],
)
def test_a_contender_that_fails_is_reported_and_stops_nobody(report, name, message):
    entry = next(entry for entry in report["contenders"] if entry["name"] == name)
    assert message in entry["error"]
    assert "stages" not in entry
    assert median(report, name, "bytes_per_second") is None


def test_the_report_says_what_it_was_taken_on(report):
    assert report["command"] == "the command" and report["rounds"] == 2
    assert report["machine"].keys() == {"cpu", "cores", "instructions", "system", "python"} == machine().keys()
    assert report["versions"].keys() == {"bar-edge", "torch", "onnxruntime", "numpy"} == versions().keys()
    assert len(report["date"]) == len("2026-01-31")


def test_a_report_is_saved_whole(report, tmp_path):
    path = tmp_path / "report.json"
    save(report, path)
    assert json.loads(path.read_text()) == report
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_a_stage_nobody_has_has_no_median(report):
    assert median(report, "first", "token") is None


def test_this_process_has_a_peak():
    assert peak_rss_bytes() > 2**20
