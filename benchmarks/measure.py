"""The harness under every benchmark: contenders in processes of their own, and what every result file says.

A contender is a class by name; an object of it lives in a fresh process and its methods are called one at a time, so
that nothing another contender loaded, cached or left spinning is measured with it, and its peak memory is its own.
"""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from bar_edge.benchmarks.machine import machine, versions

Report = dict[str, Any]
_STATUS = Path("/proc/self/status")  # getrusage would count what the parent held when it started this process
_END_SECONDS = 3
_ENDED = "the process ended without an answer (out of memory?)"
_starting = threading.Lock()  # processes inherit the environment, which is one for all threads


class ContenderError(Exception):
    """A contender failed: the message is what it said, or that its process ended."""


@dataclass(frozen=True)
class Contender:
    """`factory` is "module:class"; called with `arguments` it gives the object whose methods are called."""

    name: str
    factory: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Worker:
    """A contender in a process of its own, with as many threads in every library as `threads` says.

    One that takes longer than `answer_seconds` to load or to answer, such as one that waits for a kernel without an
    end, is killed. None: it may take as long as it likes.
    """

    def __init__(self, contender: Contender, threads: int, answer_seconds: float | None = None) -> None:
        """Start the process and load the contender. Raises ContenderError."""
        self.contender, self._answer_seconds = contender, answer_seconds
        context = multiprocessing.get_context("spawn")
        self._pipe, remote = context.Pipe()
        self._process = context.Process(target=_serve, args=(remote,), daemon=True)
        with _starting, _thread_limits(threads):
            self._process.start()
        remote.close()
        begin = time.perf_counter()
        try:
            self._ask(("load", contender))
        except BaseException:  # Ctrl-C as well
            self.stop()
            raise
        self.load_seconds = time.perf_counter() - begin

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    def call(self, method: str, *arguments: Any) -> Any:
        """Call a method of the contender and return what it returns. Raises ContenderError."""
        self.begin(method, *arguments)
        return self.answer()

    def begin(self, method: str, *arguments: Any) -> None:
        """Let a call begin, whose `answer` is asked for later. Raises ContenderError."""
        self._send(("call", method, arguments))

    def answer(self) -> Any:
        """Wait for the call that began, `answer_seconds` from now on. Raises ContenderError."""
        try:
            if not self._pipe.poll(self._answer_seconds):
                self._process.kill()
                raise ContenderError(f"no answer within {self._answer_seconds:g} s; its process was killed")
            ok, answer = self._pipe.recv()
        except (EOFError, OSError) as error:
            raise ContenderError(_ENDED) from error
        if not ok:
            raise ContenderError(answer)
        return answer

    def peak_rss_bytes(self) -> int | None:
        """Peak resident memory of the process so far, loading included; None where the system does not tell."""
        peak: int | None = self._ask(("rss",))
        return peak

    def stop(self) -> None:
        """End the process. Ctrl-C does not keep it from that."""
        with _uninterrupted():
            self._pipe.close()
            self._process.join(timeout=_END_SECONDS)
            if self._process.is_alive():
                self._process.kill()
                self._process.join()  # the next contender is not timed while this one's memory is given back

    def _send(self, question: tuple[Any, ...]) -> None:
        try:
            self._pipe.send(question)
        except OSError as error:
            raise ContenderError(_ENDED) from error

    def _ask(self, question: tuple[Any, ...]) -> Any:
        self._send(question)
        return self.answer()


def stamp(command: str) -> Report:
    """What every result says beside its figures: date, command, machine and versions."""
    date = datetime.now(timezone.utc).strftime("%Y-%m-%d")
    return {"date": date, "command": command, "machine": machine(), "versions": versions()}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which then gets the name `path`: whole or, after an error, not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def save(report: Report, path: Path) -> None:
    """Write a report; the file appears whole."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def peak_rss_bytes() -> int | None:
    """The peak resident set of this process, mapped files included; None where the system does not tell."""
    if not _STATUS.exists():
        return None
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    peak = next((line.split()[1] for line in lines if line.startswith("VmHWM")), None)
    return None if peak is None else int(peak) * 1024


@contextmanager
def _thread_limits(threads: int) -> Iterator[None]:
    """Set, while a process starts, the variables that OpenMP and BLAS libraries read when they load."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, str(threads)))
    try:
        yield
    finally:
        for name in names:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C is not heard within; only the main thread hears it anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    with suppress(EOFError, ConnectionError):  # who asked has gone, with an answer unread or not
        _answer_all(pipe)


def _answer_all(pipe: Connection) -> NoReturn:
    contender: Any = None
    while True:
        question, *details = pipe.recv()
        try:
            if question == "load":
                (described,) = details
                module, _, name = described.factory.partition(":")
                contender = getattr(import_module(module), name)(**described.arguments)
                answer: Any = None
            elif question == "call":
                method, arguments = details
                answer = getattr(contender, method)(*arguments)
            else:
                answer = peak_rss_bytes()
            pipe.send((True, answer))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}"))
