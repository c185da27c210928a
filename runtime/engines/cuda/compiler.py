"""CUDA sources compiled for one GPU architecture with NVRTC: no toolkit and no GPU needed, and compiled once.

What was compiled is kept in the user's cache folder, under the hash of everything it depends on.
"""

import hashlib
from collections.abc import Sequence
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
    return compile_source(KERNELS, sm, OPTIONS)


def compile_source(source: Path, sm: int, options: Sequence[str]) -> bytes:
    """A CUDA source as a cubin for compute capability `sm`, from the cache where it was compiled before.

    Raises EngineError if NVRTC is missing, does not know the GPU, or rejects the source.
    """
    nvrtc = _library()
    version = _version(nvrtc)
    known = _checked(nvrtc, nvrtc.nvrtcGetSupportedArchs())
    if sm not in known:
        raise EngineError(
            f"this GPU is sm_{sm}, and the installed NVRTC {version} compiles for "
            f"{', '.join(f'sm_{arch}' for arch in known)}: install an NVRTC that knows sm_{sm} "
            "(pip install nvidia-cuda-nvrtc for CUDA 13, nvidia-cuda-nvrtc-cu12 for CUDA 12)"
        )
    text = source.read_bytes()
    arguments = [f"--gpu-architecture=sm_{sm}", *options]
    key = hashlib.sha256("\0".join((*arguments, version, "")).encode() + text).hexdigest()
    name = f"{key}.cubin"
    cubin = cache.read(name)
    if cubin is None:
        cubin = _compile(nvrtc, text, source.name, arguments)
        cache.write(name, cubin)
    return cubin


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


def _compile(nvrtc: ModuleType, text: bytes, name: str, arguments: Sequence[str]) -> bytes:
    program = _checked(nvrtc, nvrtc.nvrtcCreateProgram(text, name.encode(), 0, [], []))
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(arguments), [argument.encode() for argument in arguments])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = bytearray(_checked(nvrtc, nvrtc.nvrtcGetProgramLogSize(program)))
            _checked(nvrtc, nvrtc.nvrtcGetProgramLog(program, log))
            raise EngineError(
                f"NVRTC does not compile {name} with {' '.join(arguments)}, which a reinstalled bar-edge and "
                f"nvidia-cuda-nvrtc should: {log.rstrip(bytes(1)).decode(errors='replace').strip()}"
            )
        cubin = bytearray(_checked(nvrtc, nvrtc.nvrtcGetCUBINSize(program)))
        _checked(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin))
        return bytes(cubin)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _checked(nvrtc: ModuleType, returned: tuple[Any, ...]) -> Any:
    """What an NVRTC call returned besides its status: one value, or several. Raises EngineError for a failure."""
    status, *values = returned
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError(f"NVRTC failed with {status.name}: reinstall nvidia-cuda-nvrtc and cuda-bindings")
    return values[0] if len(values) == 1 else values
