"""The CUDA kernels on the CPU: cuda_shim.h makes a shared library of a .cu file, driven here as a GPU would be.

Launches take addresses, as cuLaunchKernel does, so that code which only knows addresses can be tested with it.
"""

import ctypes
import mmap
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

SHIM = Path(__file__).with_name("cuda_shim.h")
_FLAGS = (
    "-std=c++20", "-O2", "-ffp-contract=off", "-pthread", "-shared", "-fPIC", "-Wall", "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",  # kernels read arrays as vectors of other types, which CUDA allows
    "-fsanitize=bounds", "-fsanitize-undefined-trap-on-error",  # an index outside a kernel's own array crashes
)  # fmt: skip
NATIVE = ("-march=native",)  # one instruction for fmaf instead of a call: the same numbers, in less time
_OWN_SYMBOLS = ("-Wl,-Bsymbolic", "-fno-gnu-unique")  # the process may hold another function of a kernel's name
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_FUNCTION = re.compile(r"__(global|device)__\b[^{};]*?\b(?!__)(\w+)\s*\([^{};]*\)\s*\{")
_COOPERATION = re.compile(r"__shared__|__sync|__shfl|__ballot|\bmma\b")


@dataclass(frozen=True)
class Part:
    """A dense array from an element on."""

    array: np.ndarray
    first: int


class Table:
    """The addresses of dense arrays."""

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self.arrays = arrays
        self.addresses = np.array([array.ctypes.data for array in arrays], dtype=np.uint64)


def walled(array: np.ndarray) -> np.ndarray:
    """The same values before a page that nobody may touch: what leaves the array at its end crashes."""
    held = mmap.mmap(-1, -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(held)) + len(held) - mmap.PAGESIZE
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    begin = len(held) - mmap.PAGESIZE - array.nbytes
    view = np.frombuffer(held, dtype=array.dtype, count=array.size, offset=begin).reshape(array.shape)
    view[...] = array
    return view


Argument = np.ndarray | Part | Table | np.generic | int | None


class HostKernels:
    """The kernels of a library that `build` made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))

    def launch(self, name: str, grid: int, block: int, *args: Argument) -> None:
        """Run a kernel to its end.

        A pointer parameter takes a dense array of its type, or part of one, an address, or None for null; one to void a
        table, too. Any other parameter takes a numpy scalar of its type. Raises TypeError where one does not fit.
        """
        codes = self.parameters(name)
        if len(codes) != len(args):
            raise TypeError(f"{name} has {len(codes)} parameters, got {len(args)} arguments")
        values = [
            _value(code, arg, f"{name}, argument {i}") for i, (code, arg) in enumerate(zip(codes, args, strict=True))
        ]
        addresses = (ctypes.c_void_p * len(values))(*(value.ctypes.data for value in values))
        self._library[f"launch_{name}"](ctypes.c_uint(grid), ctypes.c_uint(block), addresses)

    def parameters(self, name: str) -> list[str]:
        """The codes of a kernel's parameters: numpy's of a scalar ("f4"), "*" and that for a pointer, "*" to void."""
        describe = self._library[f"parameters_{name}"]
        describe.restype = ctypes.c_char_p
        return describe().decode().split()


def build(source: Path, folder: Path, flags: Sequence[str] = ()) -> Path:
    """Make a shared library of a .cu file: `launch_NAME` and `parameters_NAME` for every kernel NAME.

    Takes seconds. Raises RuntimeError with what g++ says, pytest's Skipped where there is no g++.
    """
    cooperative = _kernels(_with_headers(source))
    entries = "".join(_entry(name, flag) for name, flag in cooperative.items())
    return compile_library(f'#include "{source}"\n{entries}', folder / f"{source.stem}.so", flags)


def compile_library(code: str, library: Path, flags: Sequence[str]) -> Path:
    """Make a shared library of C++ that cuda_shim.h comes before.

    Raises RuntimeError with what g++ says, pytest's Skipped where there is no g++.
    """
    if shutil.which("g++") is None:
        pytest.skip("no g++ here to build the kernels for the CPU")
    source = library.with_suffix(".cpp")
    source.write_text(code)
    command = ["g++", *_FLAGS, *_OWN_SYMBOLS, *flags, "-include", str(SHIM), str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    return library


def _with_headers(source: Path) -> str:
    """The text of a source, and of what it includes where it does; twice where that is included twice."""
    return _INCLUDE.sub(lambda found: _with_headers(source.with_name(found[1])), source.read_text())


def _kernels(text: str) -> dict[str, bool]:
    """Every kernel's name, and whether its threads cooperate, itself or through a function it calls."""
    text = _COMMENT.sub("", text)
    found = list(_FUNCTION.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    bodies = {match[2]: text[match.end() : end] for match, end in zip(found, ends, strict=True)}
    cooperative = {name for name, body in bodies.items() if _COOPERATION.search(body)}
    while True:
        callers = {
            name
            for name, body in bodies.items()
            if name not in cooperative and any(re.search(rf"\b{called}\b", body) for called in cooperative)
        }
        if not callers:
            return {match[2]: match[2] in cooperative for match in found if match[1] == "global"}
        cooperative |= callers


def _entry(name: str, cooperative: bool) -> str:
    flag = str(cooperative).lower()
    return f"""
extern "C" void launch_{name}(unsigned grid, unsigned block, void** arguments) {{
    shim::launch({name}, {flag}, grid, block, arguments);
}}
extern "C" const char* parameters_{name}() {{
    static const std::string all = shim::parameters({name});
    return all.c_str();
}}
"""


def _value(code: str, arg: Argument, where: str) -> np.ndarray:
    """An array holding what the kernel receives: an address or a scalar."""
    if not code.startswith("*"):
        if not isinstance(arg, np.generic) or arg.dtype.str[1:] != code:
            raise TypeError(f"{where}: expected a numpy scalar of type {code}, got {arg!r}")
        return np.array(arg)
    if isinstance(arg, Part):
        return np.array(_value(code, arg.array, where) + np.uint64(arg.first * arg.array.itemsize))
    if isinstance(arg, Table):
        return _value(code, arg.addresses, where)
    if isinstance(arg, np.ndarray):
        if code[1:] not in ("", arg.dtype.str[1:]) or not arg.flags.c_contiguous:
            raise TypeError(f"{where}: expected a dense array of type {code[1:]}, got {arg.dtype} {arg.strides}")
        return np.array(arg.ctypes.data, dtype=np.uint64)
    if isinstance(arg, np.generic) or not isinstance(arg, int | None):
        raise TypeError(f"{where}: expected an array, an address or None, got {arg!r}")
    return np.array(arg or 0, dtype=np.uint64)
