"""The CPU stand-in for CUDA: what it says about kernels is only worth what it can find wrong."""

import signal
from pathlib import Path

import numpy as np
import pytest

from .host import HostKernels, build

COOPERATING = """
__device__ int warp_sum(int value) {
    for (int mask = 16; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffff, value, mask);
    return value;
}

extern "C" __global__ void __launch_bounds__(64) sum_warps(const int* values, int* sums) {
    const int sum = warp_sum(values[threadIdx.x]);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
}

extern "C" __global__ void shuffles(const int* values, int* down, int* first, unsigned* odd) {
    const int value = values[threadIdx.x];
    down[threadIdx.x] = __shfl_down_sync(0xffffffff, value, 3);
    first[threadIdx.x] = __shfl_sync(0xffffffff, value, 0);
    odd[threadIdx.x] = __ballot_sync(0xffffffff, value % 2);
}

extern "C" __global__ void reverse(const int* values, int* reversed, int early) {
    __shared__ int shared[64];
    shared[threadIdx.x] = values[blockIdx.x * blockDim.x + threadIdx.x];
    __syncthreads();
    if (threadIdx.x < early) return;  // leaves the others one barrier to pass without it
    __syncthreads();
    reversed[blockIdx.x * blockDim.x + threadIdx.x] = shared[blockDim.x - 1 - threadIdx.x];
}
"""
BEHIND = """
from host import Part, walled

kernels.launch("advance", 1, 1, Part(walled(np.zeros(1, dtype=np.int32)), int(sys.argv[3])))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cooperating") / "cooperating.cu"
    path.write_text(COOPERATING)
    return path


@pytest.fixture(scope="module")
def cooperating(source: Path) -> HostKernels:
    return HostKernels(build(source, source.parent))


def test_a_warp_sums_through_shuffles_in_a_called_function(cooperating):
    values, sums = np.arange(64, dtype=np.int32) ** 2, np.zeros(2, dtype=np.int32)
    cooperating.launch("sum_warps", 1, 64, values, sums)
    assert sums.tolist() == values.reshape(2, 32).sum(axis=1).tolist()


@pytest.mark.parametrize("threads", [32, 40])
def test_shuffles_stay_within_their_warp(cooperating, threads):
    values = np.random.default_rng(0).integers(0, 100, threads, dtype=np.int32)
    down, first = np.zeros((2, threads), dtype=np.int32)
    odd = np.zeros(threads, dtype=np.uint32)
    cooperating.launch("shuffles", 1, threads, values, down, first, odd)
    for begin in range(0, threads, 32):
        warp = slice(begin, min(begin + 32, threads))
        own = values[warp]
        assert down[warp].tolist() == [*own[3:], *own[-3:]]
        assert set(first[warp]) == {own[0]}
        assert set(odd[warp]) == {sum(int(value) % 2 << lane for lane, value in enumerate(own))}


@pytest.mark.parametrize("early", [0, 5])
def test_blocks_run_in_turn_and_barriers_do_not_wait_for_who_returned(cooperating, early):
    values, found = np.arange(4 * 40, dtype=np.int32), np.full(4 * 40, -1, dtype=np.int32)
    cooperating.launch("reverse", 4, 40, values, found, np.int32(early))
    expected = values.reshape(4, 40)[:, ::-1].copy()
    expected[:, :early] = -1
    np.testing.assert_array_equal(found.reshape(4, 40), expected)


def test_addresses_stand_for_arrays(host):
    n = np.array([6], dtype=np.int32)
    host.launch("advance", 1, 1, n.ctypes.data)
    assert n.tolist() == [7]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "advance has 1 parameters, got 0"),
        ((np.zeros(1, dtype=np.int64),), "expected a dense array of type i4, got int64"),
        ((np.zeros(4, dtype=np.int32)[::2],), "expected a dense array"),
        ((np.int32(3),), "expected an array, an address or None"),
        ((1.5,), "expected an array, an address or None"),
    ],
)
def test_an_argument_that_does_not_fit_is_refused(host, args, message):
    with pytest.raises(TypeError, match=message):
        host.launch("advance", 1, 1, *args)


@pytest.mark.parametrize("size", [8, np.int64(8), np.float32(8), np.zeros(1, dtype=np.int32)])
def test_a_scalar_must_have_the_type_of_its_parameter(host, size):
    arrays = [np.zeros(8, dtype=dtype) for dtype in (np.uint8, np.int32, np.float32)]
    with pytest.raises(TypeError, match="argument 3: expected a numpy scalar of type i4"):
        host.launch("to_cells", 1, 1, *arrays, size, *[np.int32(1)] * 3)


def test_a_source_that_does_not_compile_says_why(tmp_path):
    broken = tmp_path / "broken.cu"
    broken.write_text('extern "C" __global__ void broken(int* n) { *n = missing; }')
    with pytest.raises(RuntimeError, match="missing"):
        build(broken, tmp_path)


def test_a_touch_behind_a_walled_array_crashes(apart, host):
    assert apart(BEHIND, host, "0").returncode == 0
    assert apart(BEHIND, host, "1").returncode == -signal.SIGSEGV
