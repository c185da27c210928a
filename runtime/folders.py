"""Folders that a command fills: none that hold something else, and one writer at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.manifest import MANIFEST

try:
    import fcntl
except ImportError:  # not a POSIX system: nobody is kept out
    fcntl = None  # type: ignore[assignment]


def check_folder(output: Path, *, force: bool) -> None:
    """Raise RequestError unless files may be written into a folder, which need not exist; `force`: beside others."""
    if output.exists() and not output.is_dir():
        raise RequestError(f"{output}: is a file; choose a folder")
    if (output / MANIFEST).exists():
        raise RequestError(f"{output}: is a bundle, which other files would spoil; choose another folder")
    if output.is_dir() and any(output.iterdir()) and not force:
        raise RequestError(f"{output}: has files already; choose an empty folder, or pass --force to write into it")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder that exists; the lock ends with the process at the latest. Raises RequestError if another does."""
    if fcntl is None:
        yield
        return
    held = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RequestError(f"{folder}: another command is writing into it; let it finish") from error
        except OSError:
            pass  # a network file system without locks must not be the end of it
        yield
    finally:
        os.close(held)
