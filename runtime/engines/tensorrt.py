"""The TensorRT engine: compiled plans in the GPU loop. TensorRT and TensorRT-RTX are one path with two modules.

A plan runs on the library version, the flavour and the compute capabilities it was made for; all are checked before the
library sees a byte of it, and a refusal names the command that mends it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda import cache
from bar_edge.runtime.engines.cuda.device import Address, CudaDevice, check_compiler, load_driver
from bar_edge.runtime.engines.cuda.gpu_engine import GpuEngine
from bar_edge.runtime.engines.cuda.loop import GRAPHS, ITEMSIZES, TABLES
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.errors import BundleError, CompatibilityError, EngineError

NAME = "tensorrt"
LIBRARIES = {"tensorrt_rtx": "TensorRT-RTX", "tensorrt": "TensorRT"}
_REMEDIES = {
    "tensorrt_rtx": "pip install tensorrt-rtx-cu13",
    "tensorrt": "install NVIDIA's TensorRT packages (on a Jetson: JetPack's)",
}
RTX_CAPABILITIES = (75, 80, 86, 89, 120, 121)  # of TensorRT-RTX 1.7; data-centre and Jetson GPUs need TensorRT


def status() -> tuple[bool, str]:
    """(usable, versions or reason)."""
    try:
        check_compiler(load_driver())  # kernels of ours are around the plans
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


class TensorRtEngine(GpuEngine):
    """Samples and decodes with compiled plans."""

    name = NAME

    def __init__(self, bundle: Bundle, stream: Any = None) -> None:
        """Raises BundleError, CompatibilityError, EngineError."""
        account = _Account.of(bundle)
        self._account = account
        self._trt = load_library(account.package)
        device = CudaDevice(stream)
        try:
            check_compatible(account.facts, self._trt.__version__, device.sm, bundle.path)
            tensors = weights.open_weights(bundle.path)
            super().__init__(
                bundle.spec, device, list(account.plans), {name: np.asarray(tensors[name]) for name in TABLES}
            )
            self._runtime = self._trt.Runtime(self._trt.Logger(self._trt.Logger.ERROR))
        except BaseException:
            device.close()
            raise
        self._kernels = f"{account.package}-{self._trt.__version__}-sm{device.sm}-{bundle.digest[:16]}.kernels"

    def graphs(self, profile: Profile) -> "_Plans":
        stored = cache.read(self._kernels)
        loaded = _Plans(self._trt, self._runtime, self.device, profile, self._account, stored)
        if loaded.compiled is not None and loaded.compiled != stored:
            cache.write(self._kernels, loaded.compiled)
        return loaded


@dataclass(frozen=True)
class _Account:
    """What a compiled bundle's manifest says of its engines, checked."""

    facts: Mapping[str, Any]
    package: str
    itemsize: int
    in_place: bool
    plans: Mapping[Profile, Mapping[str, Path]]  # every graph's plan

    @classmethod
    def of(cls, bundle: Bundle) -> "_Account":
        """Raises BundleError if anything is missing or points out of the bundle."""
        files = bundle.manifest["files"]
        try:
            facts = bundle.manifest["engines"][NAME]
            plans = {}
            for entry in facts["profiles"]:
                named = {name: str(entry["plans"][name]["file"]) for name in GRAPHS}
                if unlisted := sorted(set(named.values()) - set(files)):
                    raise ValueError(f"the plan {unlisted[0]} is not a listed file")
                plans[Profile.from_dict(entry["sizes"])] = {name: bundle.path / file for name, file in named.items()}
            if facts["library"] not in LIBRARIES or not plans:
                raise ValueError(f"library {facts['library']!r}, {len(plans)} profiles")
            if not isinstance(facts["version"], str) or not all(isinstance(sm, int) for sm in facts["sms"]):
                raise ValueError("version and compute capabilities")
            itemsize = ITEMSIZES[facts["precision"]]
            return cls(facts, facts["library"], itemsize, bool(facts["in_place"]), plans)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(
                f"{bundle.path}: its account of engines is malformed ({error!r}); compile it again"
            ) from error


class _Plans:
    """The plans of one profile, loaded."""

    def __init__(
        self,
        trt: ModuleType,
        runtime: Any,
        device: CudaDevice,
        profile: Profile,
        account: _Account,
        kernels: bytes | None,
    ) -> None:
        """`kernels`: what TensorRT-RTX compiled for this GPU before; `compiled` is what it has now."""
        self.profile, self.itemsize, self.in_place = profile, account.itemsize, account.in_place
        self.compiled: bytes | None = None
        self._stream = device.stream
        self._engines, self._contexts = {}, {}
        for name, file in account.plans[profile].items():
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
