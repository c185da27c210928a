"""Engines: what turns a bundle's graphs into bits and pixels. One module each, imported only when asked for.

An engine never stands in for another: if it cannot run, it says why (`EngineError`) and nothing else is tried.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import CompatibilityError, EngineError
from bar_edge.runtime.noise import NoiseSource
from bar_edge.runtime.spec import Recipe

TokenProgress = Callable[[int, int], None]  # tokens done, tokens in all; a GPU engine tells the last one alone


@dataclass(frozen=True)
class Batch:
    """B images to sample together; every field is a function of the request alone, never of the engine."""

    class_ids: NDArray[np.int64]  # [B]; C is the unconditional class
    recipe: Recipe
    noise: NoiseSource  # of B images
    orders: NDArray[np.int64]  # [B, N] grid index generated at each step

    def part(self, begin: int, end: int) -> "Batch":
        """Some of its images."""
        return Batch(self.class_ids[begin:end], self.recipe, self.noise.part(begin, end), self.orders[begin:end])


class Engine(Protocol):
    """The whole protocol. Engines are not safe for use from two threads at once; `Generator` serializes calls."""

    name: str

    def sample(
        self, batch: Batch, progress: TokenProgress | None = None, history: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Bits [B, N, K] by generation step.

        With `history` [B, N, K], every token is drawn after the tokens recorded there instead of those just drawn, so
        that two engines can be compared decision by decision.
        """

    def draw(
        self, batch: Batch, progress: TokenProgress | None = None
    ) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
        """`sample`, and the decoded images [B, 3, H, W] of what was drawn."""

    def last_latents(self) -> NDArray[np.float32]:
        """Latents [rows, W] that conditioned the last token drawn, conditional rows first."""

    def decode(self, bits: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Bits of the fine grid [B, cells, token_size] -> [B, 3, H, W] as the decoder leaves it."""

    def close(self) -> None:
        """Release what the engine holds; it cannot be used afterwards."""


@runtime_checkable
class OnDevice(Protocol):
    """An engine whose results stay in device memory."""

    def first_logits(self) -> NDArray[np.float32]:
        """Logits [rows, K, 2] of the last token's first head pass, when no bit is known; conditional rows first.

        Of a batch that was drawn in parts: of the last part.
        """

    def images_on_device(self) -> Any:
        """The images [B, 3, H, W] drawn last (`cuda/device.py`, DeviceArray)."""

    def decode(self, bits: Any) -> NDArray[np.float32]:
        """`Engine.decode`, also of a dense float32 array in device memory, through `__cuda_array_interface__`."""


@dataclass(frozen=True)
class Status:
    """Whether an engine can run on this machine."""

    name: str
    usable: bool
    detail: str  # versions if usable, otherwise why not and what to install


# name -> module; the first usable one that the bundle was made for is what `auto` takes
_MODULES = {
    "tensorrt": "bar_edge.runtime.engines.tensorrt",
    "cuda": "bar_edge.runtime.engines.cuda.engine",
    "onnxruntime": "bar_edge.runtime.engines.onnxruntime",
}
NAMES = tuple(_MODULES)
_REMEDIES = {
    "tensorrt": "compile it: bar-edge compile BUNDLE --target host -o OUTPUT",
    "cuda": "compile it: bar-edge compile BUNDLE --target cuda -o OUTPUT",
    "onnxruntime": "use the bundle that it was compiled from",
}


def status(name: str) -> Status:
    """Ask an engine whether it can run here, without starting it."""
    usable, detail = import_module(_MODULES[name]).status()
    return Status(name, usable, detail)


def choose(name: str, bundle: Bundle) -> tuple[str, str]:
    """Resolve `auto` or a name to (engine, why).

    Raises EngineError if it is unknown or cannot run here, CompatibilityError if the bundle was not made for it.
    """
    if name != "auto" and name not in _MODULES:
        raise EngineError(f"unknown engine {name!r}; known: auto, {', '.join(NAMES)}")
    made_for = bundle.engines
    if name != "auto" and name not in made_for:
        raise CompatibilityError(
            f"{bundle.path}: was made for {', '.join(made_for)}, not for {name}; {_REMEDIES[name]}"
        )
    states = [status(candidate) for candidate in (made_for if name == "auto" else (name,))]
    for state in states:
        if state.usable:
            why = "asked for" if name != "auto" else "what the bundle was made for"
            return state.name, f"{why}; {state.detail}"
    reasons = "; ".join(f"{state.name}: {state.detail}" for state in states)
    raise EngineError(f"engine {name!r} cannot run here ({reasons})")


def start(name: str, bundle: Bundle, threads: int, stream: Any = None) -> Engine:
    """Start the engine of that (resolved) name on a verified bundle; `stream` as `Generator` takes it."""
    engine: Engine = import_module(_MODULES[name]).start(bundle, threads, stream)
    return engine
