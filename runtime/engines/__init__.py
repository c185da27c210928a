"""Engines: what turns a bundle's graphs into bits and pixels. One module each, imported only when asked for.

An engine never stands in for another: if it cannot run, it says why (`EngineError`) and nothing else is tried.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.spec import Recipe

TokenProgress = Callable[[int, int], None]  # tokens done, tokens in all


@dataclass(frozen=True)
class Batch:
    """B images to sample together; every field is a function of the request alone, never of the engine."""

    class_ids: NDArray[np.int64]  # [B]; C is the unconditional class
    recipe: Recipe
    u_bits: NDArray[np.float32]  # [N, S, B, K, 2] uniform in [0, 1)
    u_confidence: NDArray[np.float32]  # [N, S, B, K]
    orders: NDArray[np.int64]  # [B, N] grid index generated at each step


class Engine(Protocol):
    """The whole protocol. Engines are not safe for use from two threads at once; `Generator` serializes calls."""

    name: str

    def sample(self, batch: Batch, progress: TokenProgress | None = None) -> NDArray[np.uint8]:
        """Bits [B, N, K] by generation step."""

    def last_latents(self) -> NDArray[np.float32]:
        """Latents [rows, W] that conditioned the last token drawn, conditional rows first."""

    def decode(self, bits: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Bits of the fine grid [B, cells, token_size] -> [B, 3, H, W] as the decoder leaves it."""

    def close(self) -> None:
        """Release what the engine holds; it cannot be used afterwards."""


@dataclass(frozen=True)
class Status:
    """Whether an engine can run on this machine."""

    name: str
    usable: bool
    detail: str  # versions if usable, otherwise why not and what to install


# name -> module; the first usable one that the bundle has graphs for is what `auto` takes
_MODULES = {"onnxruntime": "bar_edge.runtime.engines.onnxruntime"}
NAMES = tuple(_MODULES)


def status(name: str) -> Status:
    """Ask an engine whether it can run here, without starting it."""
    usable, detail = import_module(_MODULES[name]).status()
    return Status(name, usable, detail)


def choose(name: str) -> tuple[str, str]:
    """Resolve `auto` or a name to (engine, why). Raises EngineError if it is unknown or cannot run here."""
    if name != "auto" and name not in _MODULES:
        raise EngineError(f"unknown engine {name!r}; known: auto, {', '.join(NAMES)}")
    states = [status(candidate) for candidate in (NAMES if name == "auto" else (name,))]
    for state in states:
        if state.usable:
            why = "asked for" if name != "auto" else f"the first usable of {', '.join(NAMES)}"
            return state.name, f"{why}; {state.detail}"
    reasons = "; ".join(f"{state.name}: {state.detail}" for state in states)
    raise EngineError(f"engine {name!r} cannot run here ({reasons})")


def start(name: str, bundle: Bundle, threads: int) -> Engine:
    """Start the engine of that (resolved) name on a verified bundle."""
    engine: Engine = import_module(_MODULES[name]).start(bundle, threads)
    return engine
