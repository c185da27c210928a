"""What long work tells while it goes on."""

from collections.abc import Callable

Progress = Callable[[str, float, int], None]  # what is being done, how much of it is done (in part, too), of how much


def silent(what: str, done: float, total: int) -> None:
    """Nobody listens."""
