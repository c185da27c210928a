"""What fusing could gain: phases that wait for one another, as they run on the CPU, and the tables.

The figures of a token are tested on the driver that is made for tests (tests/runtime/engines/cuda/test_driver_stub.py).
"""

from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from bar_edge.benchmarks import gpu_token, kernels
from bar_edge.runtime.engines.cuda.graphs import Launch
from bar_edge.runtime.errors import RequestError
from tests.runtime.engines.cuda.host import HostKernels, build

BLOCKS = 5


@pytest.fixture(scope="module")
def phases(tmp_path_factory):
    return HostKernels(build(gpu_token.PHASES, tmp_path_factory.mktemp("phases")))


@pytest.mark.parametrize("kernel", ["phase", "early_phase"])
def test_a_phase_counts_on_from_the_one_before_in_every_block(phases, kernel):
    before, after = np.arange(10, 10 + BLOCKS, dtype=np.uint32), np.zeros(BLOCKS, dtype=np.uint32)
    phases.launch(kernel, BLOCKS, 64, before, after)
    assert after.tolist() == [12, 13, 14, 15, 11]


def test_phases_of_one_launch_count_as_many(phases):
    even, odd, arrived = (np.full(1, start, dtype=np.uint32) for start in (0, 0, 99))
    phases.launch("clear", 1, 1, arrived)
    phases.launch("phases", 1, 64, even, odd, arrived, np.int32(6))
    assert (even[0], odd[0], arrived[0]) == (6, 5, 6)


@pytest.mark.parametrize("sm", kernels.TARGETS)
def test_phases_compile_for_every_gpu(sm):
    pytest.importorskip("cuda.bindings.nvrtc", reason="the package cuda-bindings is not installed")
    ptx, _ = kernels.listing(gpu_token.PHASES, sm)
    assert ("griddepcontrol.wait" in ptx) == (sm >= 90)


def test_products_are_told_apart_by_their_layer():
    sizes = map(np.int32, (2, 72, 256, 0))
    launch = Launch("few_rows_int8_weight_16", 9, (1, 2, 3, 4, 5, 6, *sizes, np.float32(0)))
    assert gpu_token._kind(launch) == ("few_rows_int8_weight_16", "256 x 72")
    assert gpu_token._weight_bytes(launch) == 9 * 4 * 512
    other = Launch("attend_step", 24, (1, np.int32(12)))
    assert gpu_token._kind(other) == ("attend_step", "") and gpu_token._weight_bytes(other) == 0


def test_a_bundle_that_is_not_compiled_is_refused_before_a_gpu_is_looked_for(small, tmp_path):
    with pytest.raises(RequestError, match="is not compiled for the engine cuda: bar-edge compile"):
        gpu_token.main([small.bundle.path], tmp_path / "report.json")
    assert not list(tmp_path.iterdir())


def test_the_tables_show_rates_and_what_could_not_be_measured():
    product = gpu_token.Figure("few_rows_fp16_16", "768 x 768", 24, 48e-6, 24 * 768 * 768 * 2).to_dict()
    norm = gpu_token.Figure("norm_modulate", "", 49, -1e-7, 0).to_dict()  # noise may be larger than what is measured
    token = {"launches": 231, "seconds": 400e-6, "kernels": [product, norm]}
    report = {"phases": {gpu_token.LAUNCH: 1.5e-6, gpu_token.BARRIER: "refused"}, "tokens": {"bar_b-cuda": token}}
    console = Console(width=120, file=StringIO())
    for table in gpu_token.tables(report):
        console.print(table)
    text = console.file.getvalue()
    assert "bar_b-cuda: 231 launches, 400.0 µs a token" in text
    assert "refused" in text and "1.5" in text
    assert "590" in text  # GB/s
    assert "-0.1" in text
