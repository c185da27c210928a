"""The TensorRT engine: compiled plans in the GPU loop. TensorRT and TensorRT-RTX are one path with two modules.

A plan runs on the library version, the flavour and the compute capabilities it was made for; all are checked before the
library sees a byte of it, and a refusal names the command that mends it.
"""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch, TokenProgress
from bar_edge.runtime.engines.cuda import cache
from bar_edge.runtime.engines.cuda.device import Address, CudaDevice, DeviceArray, load_driver
from bar_edge.runtime.engines.cuda.loop import ITEMSIZES, TABLES, Loop
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.errors import BundleError, CompatibilityError, EngineError

NAME = "tensorrt"
LIBRARIES = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
_REMEDIES = {
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
    "tensorrt": "install NVIDIA's TensorRT packages (on a Jetson: JetPack's)",
}
RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)  # of TensorRT-RTX 1.7; data-centre and Jetson GPUs need TensorRT

Floats = NDArray[np.float32]


def status() -> tuple[bool, str]:
    """(usable, versions or reason)."""
    try:
        load_driver()
    except EngineError as error:
        return False, str(error)
    found = []
    for name, title in LIBRARIES.items():
        try:
            found.append(f"{title} {load_library(name).__version__}")
        except EngineError:
            continue
    if not found:
        return False, f"neither {' nor '.join(LIBRARIES.values())} is installed; {'; or '.join(_REMEDIES.values())}"
    return True, " and ".join(found)


def start(bundle: Bundle, threads: int, stream: Any = None) -> "TensorRtEngine":
    """An engine on a verified bundle. `threads` is for CPU engines. Raises EngineError, CompatibilityError."""
    return TensorRtEngine(bundle, stream)


def library_for(sm: int) -> str:
    """The library that builds for a compute capability."""
    return "tensorrt_rtx" if sm in RTX_CAPABILITIES else "tensorrt"


def load_library(name: str) -> ModuleType:
    """The module `tensorrt` or `tensorrt_rtx`. Raises EngineError with what to install."""
    try:
        return import_module(name)
    except ImportError as error:
        raise EngineError(f"{LIBRARIES[name]} is not installed ({error}); {_REMEDIES[name]}") from error


def check_compatible(facts: Mapping[str, Any], version: str, sm: int, path: Path) -> None:
    """Raise CompatibilityError unless plans with these facts run under a library version on a compute capability."""
    title = LIBRARIES[facts["library"]]
    if version != facts["version"]:
        raise CompatibilityError(
            f"{path}: was compiled by {title} {facts['version']}, installed is {version}; plans run only under the "
            "version that made them: compile the bundle again here, or install that version"
        )
    if sm not in facts["sms"]:
        made_for = ", ".join(f"{known / 10:.1f}" for known in facts["sms"])
        raise CompatibilityError(
            f"{path}: was compiled for SM {made_for}, this GPU is SM {sm / 10:.1f}; compile the bundle it was made "
            "from with `bar-edge compile BUNDLE --target host -o OUTPUT`"
        )


class TensorRtEngine:
    """Samples and decodes with compiled plans. Sets of plans are loaded when a batch first needs them."""

    name = NAME

    def __init__(self, bundle: Bundle, stream: Any = None) -> None:
        self.spec = bundle.spec
        facts = bundle.manifest["engines"][NAME]
        try:
            profiles = [
                (Profile.from_dict(entry["sizes"]), {name: plan["file"] for name, plan in entry["plans"].items()})
                for entry in facts["profiles"]
            ]
            self._itemsize, self._in_place = ITEMSIZES[facts["precision"]], bool(facts["in_place"])
            library = str(facts["library"])
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"{bundle.path}: its account of engines is malformed ({error!r}); compile it again"
            ) from error
        self._profiles = sorted(profiles, key=lambda entry: entry[0].rows)
        self._trt = load_library(library)
        self.device = CudaDevice(stream)
        check_compatible(facts, self._trt.__version__, self.device.sm, bundle.path)
        tensors = weights.open_weights(bundle.path)
        self._tables = {name: np.asarray(tensors[name]) for name in TABLES}
        self._path = bundle.path
        self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        self._kernels = f"{library}-{self._trt.__version__}-sm{self.device.sm}.kernels"
        self._loops: dict[int, Loop] = {}  # by rows
        self._last: tuple[Loop, int] | None = None  # the loop that drew last, and its images

    def sample(
        self, batch: Batch, progress: TokenProgress | None = None, history: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        parts = []
        for loop, begin, part in self._parts(batch):
            led = None if history is None else history[begin : begin + len(part.class_ids)]
            parts.append(loop.sample(part, progress, led))
        return np.concatenate(parts)

    def draw(self, batch: Batch, progress: TokenProgress | None = None) -> tuple[NDArray[np.uint8], Floats]:
        drawn = [loop.draw(part, progress) for loop, _, part in self._parts(batch)]
        return np.concatenate([bits for bits, _ in drawn]), np.concatenate([images for _, images in drawn])

    def last_latents(self) -> Floats:
        if self._last is None:
            raise EngineError("no token was sampled yet")
        loop, images = self._last
        return loop.last_latents(images)

    def decode(self, bits: Any) -> Floats:
        loop = self._last[0] if self._last is not None else self._loop(self._profiles[0])
        return loop.decode(bits)

    def images_on_device(self) -> DeviceArray:
        """The images [B, 3, H, W] drawn last, float32 as the decoder leaves them; valid until the next call."""
        if self._last is None:
            raise EngineError("nothing was drawn yet")
        loop, images = self._last
        return loop.images_on_device(images, self.device.stream)

    def close(self) -> None:
        for loop in self._loops.values():
            loop.close()
        self._loops.clear()
        self._last = None
        self.device.close()

    def _parts(self, batch: Batch) -> Any:
        """The batch in parts that fit the engines: the smallest that holds it, or the largest several times."""
        count = len(batch.class_ids)
        copies = 2 if batch.recipe.guidance > 1 else 1
        fitting = [entry for entry in self._profiles if entry[0].rows // copies >= count]
        entry = fitting[0] if fitting else self._profiles[-1]
        capacity = entry[0].rows // copies
        if capacity < 1:
            raise CompatibilityError(
                "these engines have one row, guidance needs two; compile with a batch of guided images"
            )
        for begin in range(0, count, capacity):
            loop = self._loop(entry)
            part = batch.part(begin, min(count, begin + capacity))
            self._last = (loop, len(part.class_ids))
            yield loop, begin, part

    def _loop(self, entry: tuple[Profile, dict[str, str]]) -> Loop:
        profile, plans = entry
        if profile.rows not in self._loops:
            files = {name: self._path / file for name, file in plans.items()}
            with self.device.current():
                stored = cache.read(self._kernels)
                graphs = _Plans(self._trt, self._runtime, self.device, profile, files, stored)
                graphs.itemsize, graphs.in_place = self._itemsize, self._in_place
                if graphs.compiled is not None and graphs.compiled != stored:
                    cache.write(self._kernels, graphs.compiled)
            self._loops[profile.rows] = Loop(self.spec, self._tables, graphs, self.device)
        return self._loops[profile.rows]


class _Plans:
    """The plans of one profile, loaded."""

    itemsize: int
    in_place: bool

    def __init__(
        self,
        trt: ModuleType,
        runtime: Any,
        device: CudaDevice,
        profile: Profile,
        files: Mapping[str, Path],
        kernels: bytes | None,
    ) -> None:
        """`kernels`: what TensorRT-RTX compiled for this GPU before; `compiled` is what it has now."""
        self.profile = profile
        self.compiled: bytes | None = None
        self._stream = device.stream
        self._engines, self._contexts = {}, {}
        for name, file in files.items():
            engine = runtime.deserialize_cuda_engine(file.read_bytes())
            context = self._context(trt, engine, kernels) if engine is not None else None
            if context is None:
                raise EngineError(
                    f"{file}: {LIBRARIES[trt.__name__]} {trt.__version__} does not load it; compile the bundle here"
                )
            self._engines[name], self._contexts[name] = engine, context

    def enqueue(self, graph: str, addresses: Mapping[str, Address]) -> None:
        context = self._contexts[graph]
        for name, address in addresses.items():
            if not context.set_tensor_address(name, address):
                raise EngineError(f"the plan of {graph} has no tensor {name}; compile the bundle again")
        if not context.execute_async_v3(self._stream):
            raise EngineError(f"TensorRT could not run {graph}; `bar-edge verify` on this machine may tell more")

    def close(self) -> None:
        self._contexts.clear()
        self._engines.clear()

    def _context(self, trt: ModuleType, engine: Any, kernels: bytes | None) -> Any:
        """A context; TensorRT-RTX compiles the plan's kernels for the GPU here, unless it did before."""
        if trt.__name__ != "tensorrt_rtx":
            return engine.create_execution_context()
        config = engine.create_runtime_config()
        compiled = config.create_runtime_cache()
        known = self.compiled or kernels
        if known is not None:
            compiled.deserialize(known)
        config.set_runtime_cache(compiled)
        context = engine.create_execution_context(config)
        self.compiled = bytes(compiled.serialize())
        return context
