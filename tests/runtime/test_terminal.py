"""Every end of a command is one sentence and an exit code, and it cleans up first."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# publishes a bundle and, on SIGTERM, needs a while to clean up
PUBLISHING = """
import sys, time
from pathlib import Path
from bar_edge.runtime.bundle import publish
from bar_edge.runtime.terminal import run_function

seconds, output = float(sys.argv.pop()), Path(sys.argv.pop())

def command() -> None:
    with publish(output, 0, force=False) as folder:
        try:
            (folder / "half").write_text("x")
            print("writing", flush=True)
            time.sleep(seconds)
        finally:
            print("cleaning up", flush=True)
            time.sleep(0.5)
            print("cleaned up", flush=True)

run_function(command)
"""
IN_A_THREAD = """
import threading
from bar_edge.runtime.terminal import run_function
ended = []

def main() -> None:
    try:
        run_function(lambda: print("ran"))
    except SystemExit as end:
        ended.append(end.code)

thread = threading.Thread(target=main)
thread.start()
thread.join()
print(ended)
"""

FULL = """
import errno, os
from bar_edge.runtime.terminal import run_function

def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

run_function(full)
"""


def test_a_full_disk_is_told_with_the_remedy():
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {os.strerror(errno.ENOSPC)}; nothing half-written was left behind; free some space, or choose another "
        "disk\n"
    )


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Start `PUBLISHING` and wait until it writes."""

    def begin(seconds: float = 60, **options: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PUBLISHING, str(tmp_path / "bundle"), str(seconds)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1, **options
        )  # fmt: skip
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        return process

    return begin


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("times", [1, 2])
def test_sigterm_ends_like_ctrl_c_even_if_it_comes_twice(start, tmp_path, times):
    """`timeout` sends it to the command and again to its group."""
    process = start()
    assert len(names(tmp_path)) == 1
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "cleaning up\n"
    for _ in range(times - 1):
        process.send_signal(signal.SIGTERM)
    rest, errors = process.communicate(timeout=60)
    assert (rest, process.returncode) == ("cleaned up\n", 143)
    assert errors == "stopped; nothing half-written was left behind\n"
    assert names(tmp_path) == []


def test_sigterm_that_the_parent_wants_ignored_is_ignored(start, tmp_path):
    process = start(seconds=0.5, preexec_fn=lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert names(tmp_path) == ["bundle"]


def test_a_command_runs_outside_the_main_thread(python):
    done = python(IN_A_THREAD)
    assert done.stdout == "ran\n[0]\n", done.stderr


def ended(*command: str, text: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """`bar-edge` with these arguments, to its end."""
    program = [sys.executable, "-c", "from bar_edge.runtime.cli import main; main()", *command]
    return subprocess.run(program, capture_output=True, text=text, env=os.environ | environment, check=False)


def test_a_pipe_that_is_closed_is_no_failed_check():
    program = [
        sys.executable,
        "-c",
        "from bar_edge.runtime.cli import main; main()",
        "plan",
        "bar_b",
        "--device",
        "orin",
    ]
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_encoding_without_greek_is_no_reason_to_end():
    done = ended("plan", "bar_b", "--device", "orin", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "bar_b" in done.stdout and not done.stderr


def test_debug_shows_where_and_keeps_the_code(tmp_path):
    done = ended("--debug", "verify", str(tmp_path))
    assert done.returncode == 2 and "Traceback" in done.stderr and "BundleError" in done.stderr


def test_what_looks_like_markup_in_a_name_is_shown(tmp_path):
    done = ended("doctor")
    assert "pip install 'bar-edge[" in done.stdout or "missing" not in done.stdout
    assert str(tmp_path / "a[b]") in ended("verify", str(tmp_path / "a[b]"), COLUMNS="400").stderr
