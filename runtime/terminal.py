"""How a command ends: in one sentence and an exit code, whatever goes wrong."""

import errno
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from io import TextIOWrapper
from types import FrameType
from typing import Any, NoReturn

import typer
from rich.console import Console

from bar_edge.runtime.errors import BarEdgeError

err = Console(stderr=True, soft_wrap=True)
_INTERRUPTED = 130  # what typer makes of Ctrl-C
_STOPPED = 128 + signal.SIGTERM
_PIPE_CLOSED = 141  # what a shell calls a command that SIGPIPE ended


class _Stopped(BaseException):
    """SIGTERM came: like Ctrl-C, it ends what runs and lets it clean up."""


def run(app: typer.Typer) -> NoReturn:
    """Run a command to its exit code: a BarEdgeError becomes one line and 2, as does a place that cannot be written."""
    _clean_up_on_sigterm()
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # an encoding without µ is no reason to end
    try:
        code = app(standalone_mode=False)
    except _Stopped:
        err.print("stopped; nothing half-written was left behind")
        sys.exit(_STOPPED)
    except BarEdgeError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
            sys.exit(2)
        err.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        err.print(str(error), markup=False, highlight=False)
        sys.exit(2)
    except SystemExit as ending:  # typer's, of a pipe whose reader has seen enough: with 1, which is a failed check
        sys.exit(_PIPE_CLOSED if isinstance(ending.__context__, BrokenPipeError) else ending.code)
    except OSError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
            sys.exit(2)
        where = f"{error.filename}: " if error.filename else ""
        remedy = "; free some space, or choose another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        told = f"error: {where}{error.strerror or error}; nothing half-written was left behind{remedy}"
        err.print(told, markup=False)
        sys.exit(2)
    except Exception as error:
        show, exit_code = getattr(error, "show", None), getattr(error, "exit_code", None)
        if show is None or exit_code is None:
            raise
        show()  # a mistake on the command line itself, explained by typer
        sys.exit(exit_code)
    if code == _INTERRUPTED:
        err.print("interrupted; nothing half-written was left behind")
    sys.exit(code if isinstance(code, int) else 0)


def run_function(command: Callable[..., Any]) -> NoReturn:
    """`run` for a program that is one function; its parameters are the options."""
    app = typer.Typer(add_completion=False)
    app.command()(command)
    run(app)


def _clean_up_on_sigterm() -> None:
    """Only the main thread may ask for that, and what was told to ignore the signal goes on ignoring it."""
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _stop)


def _stop(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice, and the second would end the cleaning up
    raise _Stopped
