"""CUDA sources compiled for one GPU architecture with NVRTC: no toolkit and no GPU needed, and compiled once.

What was compiled is kept in the user's cache folder, under the hash of everything it depends on.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from bar_edge.runtime.engines.cuda import cache
from bar_edge.runtime.errors import EngineError

KERNELS = Path(__file__).with_name("kernels.cu")
OPTIONS = ("--std=c++17", "--fmad=false")  # no contraction: float32 products round as numpy's do


def kernels(sm: int) -> bytes:
    """kernels.cu as a cubin for compute capability `sm` (87 for 8.7). Raises EngineError."""
    return compile_source(KERNELS, sm)


def compile_source(source: Path, sm: int) -> bytes:
    """A CUDA source as a cubin for compute capability `sm`, from the cache where it was compiled before.

    Raises EngineError if NVRTC is missing, does not know the GPU, or rejects the source.
    """
    nvrtc = _library()
    version = _version(nvrtc)
    known = _architectures(nvrtc)
    if sm not in known:
        raise EngineError(
            f"this GPU is sm_{sm}, and the installed NVRTC {version} compiles for "
            f"{', '.join(f'sm_{arch}' for arch in known)}: install an NVRTC that knows sm_{sm} "
            "(pip install nvidia-cuda-nvrtc for CUDA 13, nvidia-cuda-nvrtc-cu12 for CUDA 12)"
        )
    arguments = [f"--gpu-architecture=sm_{sm}", *OPTIONS]
    key = hashlib.sha256("\0".join((*arguments, version, "")).encode())
    for text in (source.read_bytes(), *_headers(source).values()):
        key.update(text)
    name = f"{key.hexdigest()}.cubin"
    cubin = cache.read(name)
    if cubin is None:
        with _program(nvrtc, source, arguments) as program:
            cubin = _output(nvrtc, program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        cache.write(name, cubin)
    return cubin


def installed() -> tuple[str, tuple[int, ...]]:
    """The version of NVRTC and the compute capabilities it compiles for. Raises EngineError if there is none."""
    nvrtc = _library()
    return _version(nvrtc), _architectures(nvrtc)


def listing(source: Path, sm: int) -> tuple[str, str]:
    """The PTX of a source, and what ptxas tells of every function in it: compiled anew, past the cache.

    Raises EngineError if NVRTC is missing or rejects the source.
    """
    nvrtc = _library()
    arguments = [f"--gpu-architecture=sm_{sm}", *OPTIONS, "--ptxas-options=--verbose"]
    with _program(nvrtc, source, arguments) as program:
        ptx = _output(nvrtc, program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
        return _text(ptx), _log(nvrtc, program)


def _library() -> ModuleType:
    """The NVRTC bindings. The library itself is loaded at the first call."""
    try:
        return import_module("cuda.bindings.nvrtc")
    except ImportError as error:
        raise EngineError(
            f"CUDA kernels are compiled through the package cuda-bindings, which cannot be imported ({error}): "
            "pip install 'bar-edge[cuda]'"
        ) from error


def _version(nvrtc: ModuleType) -> str:
    try:
        major, minor = _checked(nvrtc, nvrtc.nvrtcVersion())
    except (RuntimeError, OSError) as error:
        raise EngineError(
            "the CUDA compiler library NVRTC is not installed or cannot be loaded: pip install nvidia-cuda-nvrtc for "
            "CUDA 13, nvidia-cuda-nvrtc-cu12 for CUDA 12"
        ) from error
    return f"{major}.{minor}"


def _architectures(nvrtc: ModuleType) -> tuple[int, ...]:
    return tuple(_checked(nvrtc, nvrtc.nvrtcGetSupportedArchs()))


def _headers(source: Path) -> dict[str, bytes]:
    """What a source may include: the headers beside it, by name."""
    return {header.name: header.read_bytes() for header in sorted(source.parent.glob("*.cuh"))}


@contextmanager
def _program(nvrtc: ModuleType, source: Path, arguments: Sequence[str]) -> Iterator[Any]:
    """A compiled program. Raises EngineError if NVRTC rejects the source."""
    headers = _headers(source)
    names = [name.encode() for name in headers]
    sources = (source.read_bytes(), source.name.encode(), len(headers), list(headers.values()), names)
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(*sources))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [argument.encode() for argument in arguments])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise EngineError(
                f"NVRTC does not compile {source.name} with {' '.join(arguments)}, which a reinstalled bar-edge and "
                f"nvidia-cuda-nvrtc should: {_log(nvrtc, program)}"
            )
        yield program
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(nvrtc: ModuleType, program: Any) -> str:
    return _text(_output(nvrtc, program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog))


def _output(nvrtc: ModuleType, program: Any, size: Callable[..., Any], get: Callable[..., Any]) -> bytes:
    """What NVRTC has made of a program, read with two of its calls."""
    made = bytearray(_checked(nvrtc, size(program)))
    _checked(nvrtc, get(program, made))
    return bytes(made)


def _text(made: bytes) -> str:
    return made.rstrip(bytes(1)).decode(errors="replace").strip()


def _checked(nvrtc: ModuleType, returned: tuple[Any, ...]) -> Any:
    """What an NVRTC call returned besides its status: one value, or several. Raises EngineError for a failure."""
    status, *values = returned
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"NVRTC failed with {status.name}: reinstall nvidia-cuda-nvrtc and cuda-bindings")
    return values[0] if len(values) == 1 else values
