"""How a command ends: in one sentence and an exit code, whatever goes wrong."""

import sys
from collections.abc import Callable
from typing import Any, NoReturn

import typer
from rich.console import Console

from bar_edge.runtime.errors import BarEdgeError

err = Console(stderr=True, soft_wrap=True)
_INTERRUPTED = 130  # what typer makes of Ctrl-C


def run(app: typer.Typer) -> NoReturn:
    """Run a command to its exit code: a BarEdgeError becomes one line and 2, as does a place that cannot be written."""
    try:
        code = app(standalone_mode=False)
    except BarEdgeError as error:
        if "--debug" in sys.argv:
            raise
        err.print(f"[bold red]error:[/] {type(error).__name__}: ", end="")
        err.print(str(error), markup=False, highlight=False)
        sys.exit(2)
    except OSError as error:
        if "--debug" in sys.argv:
            raise
        where = f"{error.filename}: " if error.filename else ""
        err.print(f"error: {where}{error.strerror or error}; nothing half-written was left behind", markup=False)
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
