"""Kernels compile for every GPU without one, once; a cache that fails costs a compilation and nothing else."""

import re
import sys
from pathlib import Path

import pytest

from bar_edge.benchmarks.kernels import TARGETS
from bar_edge.runtime.engines.cuda import compiler
from bar_edge.runtime.engines.cuda.compiler import KERNELS, compile_source, installed, kernels, listing
from bar_edge.runtime.errors import EngineError

NAMES = re.findall(r"__global__ void (\w+)", KERNELS.read_text())
ELF_FLAGS = slice(48, 52)


@pytest.fixture
def nvrtc():
    """The library itself. Skips where it is not installed."""
    library = pytest.importorskip("cuda.bindings.nvrtc", reason="the package cuda-bindings is not installed")
    try:
        library.nvrtcVersion()
    except RuntimeError as error:
        pytest.skip(f"no NVRTC here: {error}")
    return library


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "bar-edge"


@pytest.fixture
def compilations(nvrtc, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of every compilation so far."""
    seen = []
    compile_ = compiler._program

    def counted(*arguments):
        seen.append(arguments)
        return compile_(*arguments)

    monkeypatch.setattr(compiler, "_program", counted)
    return seen


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A source that compiles quickly."""
    path = tmp_path / "tiny.cu"
    path.write_text('extern "C" __global__ void tiny(int* n) { *n = 1; }')
    return path


@pytest.mark.parametrize("sm", TARGETS)
def test_every_gpu_gets_its_cubin(nvrtc, sm):
    if sm not in nvrtc.nvrtcGetSupportedArchs()[1]:
        pytest.skip(f"this NVRTC does not know sm_{sm}")
    cubin = kernels(sm)
    assert cubin.startswith(b"\x7fELF")
    assert int.from_bytes(cubin[ELF_FLAGS], "little") >> 8 & 0xFF == sm
    for name in NAMES:
        assert f".text.{name}\0".encode() in cubin


def test_the_kernels_are_all_there():
    assert NAMES == [
        "fill_uniforms",
        "place_token",
        "embed",
        "head_embed",
        "sample_pass",
        "advance",
        "gather_rows",
        "write_kv",
        "to_cells",
    ]


def test_a_second_start_compiles_nothing(compilations, cache):
    cubin = kernels(87)
    assert kernels(87) == cubin
    assert len(compilations) == 1
    assert len(list(cache.iterdir())) == 1  # and no temporary file stays


def test_whatever_the_cubin_depends_on_compiles_anew(compilations, tiny, monkeypatch):
    compile_source(tiny, 80)
    compile_source(tiny, 86)
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "OPTIONS", ("--std=c++17",))
        compile_source(tiny, 80)
    tiny.write_text(tiny.read_text().replace("1", "2"))
    compile_source(tiny, 80)
    monkeypatch.setattr(compiler, "_version", lambda nvrtc: "99.0")
    compile_source(tiny, 80)
    assert len(compilations) == 5


def test_a_header_is_found_beside_its_source_and_compiles_anew_when_it_changes(compilations, tiny):
    header = tiny.with_name("one.cuh")
    header.write_text("const int one = 1;")
    tiny.write_text('#include "one.cuh"\nextern "C" __global__ void tiny(int* n) { *n = one; }')
    first = compile_source(tiny, 80)
    header.write_text("const int one = 2;")
    assert compile_source(tiny, 80) != first
    assert len(compilations) == 2


@pytest.mark.parametrize("damage", [lambda stored: stored[:-1], lambda stored: stored[:-1] + b"?", lambda stored: b""])
def test_a_damaged_entry_is_compiled_again_and_mended(compilations, cache, tiny, damage):
    cubin = compile_source(tiny, 80)
    (entry,) = cache.iterdir()
    whole = entry.read_bytes()
    entry.write_bytes(damage(whole))
    assert compile_source(tiny, 80) == cubin
    assert len(compilations) == 2
    assert entry.read_bytes() == whole


def test_without_a_cache_folder_it_compiles_every_time(compilations, tiny, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a folder cannot be made below this")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compile_source(tiny, 80) == compile_source(tiny, 80)
    assert len(compilations) == 2


def test_without_a_home_it_compiles_every_time(compilations, tiny, monkeypatch):
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert compile_source(tiny, 80).startswith(b"\x7fELF")
    assert len(compilations) == 1


@pytest.mark.parametrize("setting", [None, "", "relative/folder"])
def test_the_cache_is_in_the_home_unless_told_otherwise(nvrtc, tiny, tmp_path, monkeypatch, setting):
    monkeypatch.delenv("XDG_CACHE_HOME")
    if setting is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", setting)
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    compile_source(tiny, 80)
    assert len(list((tmp_path / "home/.cache/bar-edge").iterdir())) == 1


def test_an_unknown_gpu_is_named_with_the_remedy(nvrtc):
    major, minor = nvrtc.nvrtcVersion()[1:]
    with pytest.raises(EngineError, match=rf"sm_35, .*NVRTC {major}\.{minor} .*install an NVRTC that knows sm_35"):
        kernels(35)


def test_a_rejected_source_shows_what_nvrtc_says(nvrtc, tiny, cache):
    tiny.write_text('extern "C" __global__ void tiny(int* n) { *n = missing; }')
    with pytest.raises(EngineError, match=r'tiny\.cu.*"missing" is undefined'):
        compile_source(tiny, 80)
    assert not cache.exists()


def test_a_listing_is_of_the_kernel_itself_and_leaves_the_cache_alone(nvrtc, tiny, cache):
    version, known = installed()
    assert version == ".".join(map(str, nvrtc.nvrtcVersion()[1:])) and list(known) == nvrtc.nvrtcGetSupportedArchs()[1]
    ptx, log = listing(tiny, 80)
    assert ".entry tiny(" in ptx and "Compiling entry function 'tiny' for 'sm_80'" in log
    assert not cache.exists()
    tiny.write_text("wrong")
    with pytest.raises(EngineError, match=r"NVRTC does not compile tiny\.cu"):
        listing(tiny, 80)


def test_missing_bindings_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.nvrtc", None)
    with pytest.raises(EngineError, match=r"cuda-bindings.*pip install 'bar-edge\[cuda\]'"):
        kernels(87)


def test_a_missing_library_names_its_package(nvrtc, monkeypatch):
    def not_found():
        raise RuntimeError("Failure finding libnvrtc.so")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", not_found)
    with pytest.raises(EngineError, match="pip install nvidia-cuda-nvrtc"):
        kernels(87)
