"""The harness: contenders in processes of their own, failures told apart, files written whole."""

import itertools
import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from bar_edge.benchmarks import measure
from bar_edge.benchmarks.contenders import Machine
from bar_edge.benchmarks.machine import machine, versions
from bar_edge.benchmarks.measure import Contender, ContenderError, Worker, peak_rss_bytes, save, stamp

ABANDON = """
from bar_edge.benchmarks.measure import Contender, Worker
if __name__ == "__main__":
    running = Worker(Contender("event", "threading:Event"), threads=1)
    running.begin(BEGIN)
    running.stop()
"""
MACHINE = "bar_edge.benchmarks.contenders:Machine"


@pytest.fixture(scope="module")
def worker():
    small = {"threads": 1, "mebibytes": 2, "matrix": 64}
    with Worker(Contender("small", MACHINE, small), threads=1) as running:
        yield running


def test_methods_run_in_another_process(worker):
    assert worker.pid not in (0, os.getpid())
    assert worker.call("bytes_per_second") > 0
    assert worker.call("flops_per_second") > 0
    assert worker.load_seconds > 0


@pytest.mark.parametrize("faster", [np.bitwise_or, np.maximum], ids=lambda reduction: reduction.__name__)
def test_memory_is_read_as_fast_as_the_faster_reduction_at_its_fastest(monkeypatch, faster):
    rates = {True: iter([1.0, 9.0, 3.0]), False: itertools.repeat(2.0)}
    monkeypatch.setattr(Machine, "_read", lambda self, reduction: next(rates[reduction is faster]))
    assert Machine(threads=1, mebibytes=1, matrix=8).bytes_per_second() == 9


def test_a_failed_call_tells_why_and_the_contender_lives_on(worker):
    with pytest.raises(ContenderError, match=r"AttributeError.*no_such_method"):
        worker.call("no_such_method")
    assert worker.call("bytes_per_second") > 0


def test_peak_memory_is_each_contenders_own(worker):
    large = {"threads": 1, "mebibytes": 200, "matrix": 64}
    with Worker(Contender("large", MACHINE, large), threads=1) as other:
        assert other.peak_rss_bytes() > worker.peak_rss_bytes() + 150 * 2**20
    assert worker.peak_rss_bytes() > 2**20


def test_a_contender_that_hangs_is_killed_and_said_so():
    with Worker(Contender("hanging", "threading:Event"), threads=1, answer_seconds=20) as running:
        running._answer_seconds = 0.2  # a process takes longer to start
        with pytest.raises(ContenderError, match=r"no answer within 0\.2 s; its process was killed"):
            running.call("wait")
        running._process.join(timeout=60)
        assert running._process.exitcode == -signal.SIGKILL
        with pytest.raises(ContenderError, match="ended without an answer"):
            running.call("is_set")


def test_a_call_that_began_is_not_waited_for():
    with Worker(Contender("event", "threading:Event"), threads=1, answer_seconds=20) as running:
        begin = time.monotonic()
        running.begin("wait", 2)  # of its own accord, it returns False after so many seconds
        assert time.monotonic() - begin < 1
        assert running.answer() is False
        assert time.monotonic() - begin >= 2


def test_a_contender_that_hangs_while_it_loads_is_killed_too():
    with pytest.raises(ContenderError, match="its process was killed"):
        Worker(Contender("hanging", "signal:pause"), threads=1, answer_seconds=0.2)


def test_ctrl_c_does_not_keep_a_process_from_ending(monkeypatch):
    running = Worker(Contender("event", "threading:Event"), threads=1)
    running.begin("wait", 2)
    join = running._process.join

    def joined(timeout=None):
        os.kill(os.getpid(), signal.SIGINT)
        join(timeout)

    monkeypatch.setattr(running._process, "join", joined)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts behind itself
    try:
        running.stop()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    join(60)
    assert not running._process.is_alive()


@pytest.mark.parametrize(
    "begin", ['"wait", 1', '"is_set"); running._pipe.poll(60'], ids=["before it has one", "with one that nobody read"]
)
def test_a_process_ends_silently_when_nobody_waits_for_its_answer(python, begin):
    done = python(ABANDON.replace("BEGIN", begin))
    assert done.returncode == 0 and done.stderr == ""


def test_libraries_are_told_the_number_of_threads():
    with Worker(Contender("environment", "os:getenv", {"key": "OMP_NUM_THREADS"}), threads=3) as running:
        assert running.call("strip") == "3"
    assert os.environ.get("OMP_NUM_THREADS") != "3"


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("bar_edge.benchmarks.nowhere:Machine", {}, "ModuleNotFoundError"),
        ("bar_edge.benchmarks.contenders:Nobody", {}, "AttributeError"),
        (MACHINE, {"colour": "red"}, "TypeError"),
        (MACHINE, {"threads": 0}, "ZeroDivisionError"),
        ("os:_exit", {"status": 3}, "the process ended without an answer"),
    ],
)
def test_a_contender_that_does_not_load_says_why(factory, arguments, message):
    with pytest.raises(ContenderError, match=message):
        Worker(Contender("broken", factory, arguments), threads=1)


def test_a_result_says_what_it_was_taken_on():
    found = stamp("the command")
    assert found["command"] == "the command"
    assert found["machine"] == machine() and {"cpu", "cores", "instructions", "system", "python"} <= machine().keys()
    assert found["versions"] == versions() and {"bar-edge", "torch", "onnxruntime", "numpy"} <= versions().keys()
    assert len(found["date"]) == len("2026-01-31")


def test_a_report_is_saved_whole(tmp_path):
    path = tmp_path / "report.json"
    save({"a": [1.5]}, path)
    assert json.loads(path.read_text()) == {"a": [1.5]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.json"]


def test_this_process_has_a_peak():
    assert peak_rss_bytes() > 2**20


def test_a_report_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    def full(self, target):
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        save({"a": 1}, tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


def test_a_system_that_does_not_tell_of_peaks_is_no_error(monkeypatch, tmp_path):
    status = tmp_path / "status"
    monkeypatch.setattr(measure, "_STATUS", status)
    assert peak_rss_bytes() is None
    status.write_text("Name:\tpython\nVmSize:\t 20480 kB\nVmRSS:\t  1024 kB\n")
    assert peak_rss_bytes() is None
    status.write_text("VmHWM:\t    2048 kB\nVmRSS:\t  1024 kB\n")
    assert peak_rss_bytes() == 2 * 2**20
