"""What kernels take, as the compiler tells it; and that what must not be is found."""

import json

import pytest
import typer

from bar_edge.benchmarks import kernels
from bar_edge.benchmarks.kernels import TARGETS, Resources, resources
from bar_edge.runtime.engines.cuda import compiler
from bar_edge.runtime.errors import EngineError

FRUGAL = """
extern "C" __global__ void unbounded(float* x) { x[threadIdx.x] *= 2; }
extern "C" __global__ void __launch_bounds__(128, 4) shared(float* x) {
    __shared__ float all[300];
    all[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    x[threadIdx.x] = all[127 - threadIdx.x];
}
"""
GREEDY = """
extern "C" __global__ %s void greedy(float* x) {
    float own[96];
#pragma unroll
    for (int i = 0; i < 96; ++i) own[i] = x[1024 * i + threadIdx.x];
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 96; ++i) x[1024 * i + threadIdx.x] = own[i] + own[(i + 1) %% 96];
}
"""
STACK = """
extern "C" __global__ void indexed(float* x, int n) {
    float own[40];
    for (int i = 0; i < 40; ++i) own[i] = x[i * n];
    for (int i = 0; i < n; ++i) x[i] = own[(7 * i) % 40];
}
"""


@pytest.fixture(autouse=True)
def nvrtc():
    """Skips where it is not installed."""
    pytest.importorskip("cuda.bindings.nvrtc", reason="the package cuda-bindings is not installed")
    try:
        compiler.installed()
    except EngineError as error:
        pytest.skip(str(error))


@pytest.fixture
def compiled(tmp_path):
    """The kernels of a text."""

    def of(text: str, sm: int = 80) -> list[Resources]:
        source = tmp_path / "some.cu"
        source.write_text(text)
        return resources(source, sm)

    return of


@pytest.mark.parametrize("sm", TARGETS)
def test_every_kernel_is_told_of_with_its_launch_bound(compiled, sm):
    if sm not in compiler.installed()[1]:
        pytest.skip(f"this NVRTC does not know sm_{sm}")
    unbounded, shared = compiled(FRUGAL, sm)
    assert (unbounded.kernel, unbounded.sm, unbounded.threads, unbounded.blocks) == ("unbounded", sm, 1024, 1)
    assert (shared.kernel, shared.threads, shared.blocks) == ("shared", 128, 4)
    assert (unbounded.registers_allowed, shared.registers_allowed) == (64, 128)
    assert (shared.shared_bytes, unbounded.shared_bytes) == (1200, 0)
    assert 0 < unbounded.registers <= 64
    assert unbounded.faults == shared.faults == []


def test_a_kernel_squeezed_into_its_launch_bound_spills(compiled):
    (greedy,) = compiled(GREEDY % "__launch_bounds__(1024, 2)")
    assert greedy.registers <= greedy.registers_allowed == 32
    assert greedy.spill_store_bytes > 0 and greedy.spill_load_bytes > 0
    (fault,) = greedy.faults
    assert fault.startswith("greedy on sm_80 spills: ")


def test_a_kernel_whose_largest_block_would_not_fit_takes_too_many_registers(compiled):
    (greedy,) = compiled(GREEDY % "")
    assert greedy.registers > 64 and greedy.spill_store_bytes == 0
    assert greedy.faults == [f"greedy on sm_80 takes {greedy.registers} registers a thread, 1 x 1024 threads leave 64"]
    (bounded,) = compiled(GREEDY % "__launch_bounds__(128)")
    assert bounded.registers_allowed == 255 and bounded.faults == []


def test_an_array_that_stays_in_memory_is_a_fault(compiled):
    (indexed,) = compiled(STACK)
    assert indexed.faults == ["indexed on sm_80 keeps 160 bytes of every thread in memory, on its stack"]


@pytest.mark.parametrize("log", ["", "ptxas info    : Compiling entry function 'unbounded' for 'sm_80'\n"])
def test_a_compiler_that_does_not_tell_of_all_kernels_is_an_error(compiled, monkeypatch, log):
    monkeypatch.setattr(kernels, "listing", lambda *arguments: (compiler.listing(*arguments)[0], log))
    with pytest.raises(EngineError, match="a newer nvidia-cuda-nvrtc"):
        compiled(FRUGAL)


def test_a_figure_that_is_not_told_is_an_error(compiled, monkeypatch):
    def untold(*arguments):
        ptx, log = compiler.listing(*arguments)
        return ptx, log.replace("registers", "registries")

    monkeypatch.setattr(kernels, "listing", untold)
    with pytest.raises(EngineError, match="unbounded: NVRTC does not tell what it takes"):
        compiled(FRUGAL)


class TestCommand:
    @pytest.fixture
    def run(self, tmp_path, monkeypatch, capsys):
        """What it prints and writes of a text, and its exit code."""
        monkeypatch.setattr(kernels, "SOURCES", (tmp_path / "some.cu",))
        monkeypatch.setattr(kernels, "TARGETS", (35, 80, 90))

        def of(text: str):
            (tmp_path / "some.cu").write_text(text)
            output, code = tmp_path / "build" / "kernels.json", 0
            try:
                kernels.main(output)
            except typer.Exit as ended:
                code = ended.exit_code
            return code, capsys.readouterr().out, json.loads(output.read_text())

        return of

    def test_sound_kernels_are_a_table_and_a_file(self, run):
        code, printed, written = run(FRUGAL)
        assert code == 0 and written["faults"] == []
        version = compiler.installed()[0]
        assert written["compiler"] == f"NVRTC {version}" and written["date"] and written["options"]
        assert [(one["kernel"], one["sm"]) for one in written["kernels"]["some.cu"]] == [
            ("unbounded", 80), ("shared", 80), ("unbounded", 90), ("shared", 90)
        ]  # fmt: skip
        for one in written["kernels"]["some.cu"]:
            assert {"registers", "registers_allowed", "stack_bytes", "spill_store_bytes", "shared_bytes"} < one.keys()
        assert [line.split()[0] for line in printed.splitlines() if line.lstrip().startswith(("unb", "sha"))] == [
            "unbounded", "shared"
        ]  # fmt: skip
        assert written["skipped"] == [f"sm_35: NVRTC {version} does not know it"]
        assert f"skipped sm_35: NVRTC {version} does not know it" in printed

    def test_a_fault_is_exit_code_1_and_is_written_down(self, run):
        code, printed, written = run(FRUGAL + GREEDY % "")
        assert code == 1
        assert len(written["faults"]) == 2 and all(fault in printed for fault in written["faults"])


def test_all_our_sources_are_compiled():
    assert {source.name for source in kernels.SOURCES} >= {"kernels.cu", "model.cu"}
