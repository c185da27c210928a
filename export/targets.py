"""GPUs that engines are compiled for: by name, or what is in this machine."""

from dataclasses import dataclass

from bar_edge.runtime.bundle import Bundle, check_not_compiled
from bar_edge.runtime.engines.cuda.loop import check_bits
from bar_edge.runtime.engines.tensorrt import LIBRARIES, library_for
from bar_edge.runtime.errors import CompatibilityError, EngineError

RTX_SMS = (80, 86, 89, 120)  # what a TensorRT-RTX plan made here covers


@dataclass(frozen=True)
class Gpu:
    """A GPU by name."""

    title: str
    sm: int


DEVICES = {
    "a100": Gpu("A100", 80),
    "rtx3090": Gpu("RTX 3090", 86),
    "orin": Gpu("Jetson Orin", 87),
    "rtx4090": Gpu("RTX 4090", 89),
    "l4": Gpu("L4", 89),
    "h100": Gpu("H100", 90),
    "h200": Gpu("H200", 90),
    "b200": Gpu("B200", 100),
    "thor": Gpu("Jetson Thor", 110),
    "rtx5090": Gpu("RTX 5090", 120),
}
NAMES = ("rtx", "host", *DEVICES)


@dataclass(frozen=True)
class Target:
    """What to build with, for which compute capabilities."""

    package: str  # tensorrt or tensorrt_rtx
    sms: tuple[int, ...]


def resolve(name: str, host_sm: int | None) -> Target:
    """The target of that name on a machine whose GPU has capability `host_sm` (None: no GPU).

    TensorRT-RTX builds for its GPUs anywhere; TensorRT only for the GPU in the machine. Raises EngineError with what is
    missing.
    """
    if name == "rtx":
        return Target("tensorrt_rtx", RTX_SMS)
    if name == "host":
        if host_sm is None:
            raise EngineError(
                "target host: no NVIDIA GPU answers here; name a device, or `rtx`, which builds without a GPU "
                f"(known: {', '.join(NAMES)})"
            )
        return Target(library_for(host_sm), (host_sm,))
    if name not in DEVICES:
        raise EngineError(f"unknown target {name!r}; known: {', '.join(NAMES)}")
    device = DEVICES[name]
    if device.sm in RTX_SMS:
        return Target("tensorrt_rtx", (device.sm,))
    if host_sm == device.sm:
        return Target(library_for(host_sm), (host_sm,))
    found = f"has SM {host_sm / 10:.1f}" if host_sm else "has no GPU"
    raise EngineError(
        f"target {name}: the {device.title} is SM {device.sm / 10:.1f}, which TensorRT-RTX does not build for, and "
        f"{LIBRARIES['tensorrt']} builds only for the GPU in the machine, and this one {found}; copy the bundle there "
        "and run `bar-edge compile BUNDLE --target host -o OUTPUT` on it"
    )


def check_compilable(source: Bundle) -> None:
    """Raise RequestError or CompatibilityError for a bundle that no GPU engine can be made of."""
    check_not_compiled(source)
    check_bits(source.spec)
    if source.manifest.get("quantization", {}).get("activations") == "asymmetric":
        raise CompatibilityError(
            f"{source.path}: has asymmetric activations, which only ONNX Runtime runs; quantize without --asymmetric"
        )
