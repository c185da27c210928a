"""PTX on the CPU: what it says about kernels is only worth what it can find wrong."""

from pathlib import Path

import numpy as np
import pytest

from bar_edge.runtime.errors import EngineError

from . import ptx
from .host import HostKernels, build

ARITHMETIC = """
extern "C" __global__ void whole(const float* x, int* rounded, unsigned char* below_one, float* kept) {
    const int i = threadIdx.x;
    rounded[i] = (int)x[i];
    below_one[i] = !(x[i] >= 1);
    kept[i] = fminf(fmaxf(x[i], -2.f), 2.f);
}

extern "C" __global__ void integers(const int* a, const int* b, int* quotient, int* rest, long long* product) {
    const int i = threadIdx.x;
    quotient[i] = a[i] / b[i], rest[i] = a[i] % b[i], product[i] = (long long)a[i] * b[i];
}

extern "C" __global__ void backwards(int* values) {
    __shared__ int shared[64];
    shared[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    values[threadIdx.x] = shared[63 - threadIdx.x];
}

extern "C" __global__ void backwards_in_a_race(int* values) {
    __shared__ int shared[64];
    shared[threadIdx.x] = values[threadIdx.x];
    values[threadIdx.x] = shared[63 - threadIdx.x];
}

extern "C" __global__ void blocks_in_a_race(int* values) { values[threadIdx.x] = blockIdx.x; }

extern "C" __global__ void four_at_once(const uint4* from, uint4* to) { *to = *from; }
"""
UNKNOWN = 'extern "C" __global__ void count(unsigned* n) { n[1] = atomicAdd(n, 1u); }'
COPY = """
memory = np.zeros(64, dtype=np.uint32)
first = memory.ctypes.data + -memory.ctypes.data % 16
kernels.launch("four_at_once", 1, 1, first, first + 32 + int(sys.argv[3]))
"""
SHARE = """
kernels.launch(sys.argv[3], int(sys.argv[4]), 64, np.arange(64, dtype=np.int32))
"""


def compiled(text: str, folder: Path) -> HostKernels:
    source = folder / "source.cu"
    source.write_text(text)
    try:
        return HostKernels(ptx.build(source, folder, HostKernels(build(source, folder))))
    except EngineError as error:
        pytest.skip(f"no NVRTC here to compile kernels: {error}")


@pytest.fixture(scope="module")
def arithmetic(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    return compiled(ARITHMETIC, tmp_path_factory.mktemp("arithmetic"))


def test_floats_become_whole_numbers_and_bounded(arithmetic):
    x = np.array([np.nan, np.inf, -np.inf, 3e9, -3e9, -1.9, 0.99, 1], dtype=np.float32)
    rounded, below_one, kept = (np.zeros(len(x), dtype) for dtype in (np.int32, np.uint8, np.float32))
    arithmetic.launch("whole", 1, len(x), x, rounded, below_one, kept)
    assert rounded.tolist() == [0, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), -1, 0, 1]
    assert below_one.tolist() == [1, 0, 1, 0, 1, 1, 1, 0]
    np.testing.assert_array_equal(kept, np.array([-2, 2, -2, 2, -2, -1.9, 0.99, 1], dtype=np.float32))


def test_whole_numbers_keep_their_signs(arithmetic):
    a, b = np.array([-7, 7, -7, 2**31 - 1], dtype=np.int32), np.array([2, -2, -2, 2**30], dtype=np.int32)
    quotient, rest, product = (np.zeros(len(a), dtype) for dtype in (np.int32, np.int32, np.int64))
    arithmetic.launch("integers", 1, len(a), a, b, quotient, rest, product)
    assert quotient.tolist() == [-3, -3, 3, 1]
    assert rest.tolist() == [-1, 1, -1, 2**30 - 1]
    assert product.tolist() == (a.astype(np.int64) * b).tolist()


def test_threads_meet_at_barriers(arithmetic):
    values = np.arange(64, dtype=np.int32)
    arithmetic.launch("backwards", 1, 64, values)
    assert values.tolist() == list(range(63, -1, -1))


@pytest.mark.parametrize(("offset", "message"), [(0, ""), (4, "four_at_once: misaligned address")])
def test_a_misaligned_address_is_told(apart, arithmetic, offset, message):
    found(apart(COPY, arithmetic, str(offset)), message)


@pytest.mark.parametrize(
    ("kernel", "blocks", "message"),
    [
        ("backwards", 1, ""),
        ("backwards_in_a_race", 1, "backwards_in_a_race: data race"),
        ("blocks_in_a_race", 1, ""),
        ("blocks_in_a_race", 2, "blocks_in_a_race: data race"),
    ],
)
def test_a_missing_order_is_told(apart, arithmetic, kernel, blocks, message):
    found(apart(SHARE, arithmetic, kernel, str(blocks)), message)


def found(done, message):
    assert (done.returncode != 0) == bool(message)
    assert done.stderr.startswith(message)


def test_an_unknown_instruction_is_named(tmp_path):
    with pytest.raises(NotImplementedError, match=r"atom\."):
        compiled(UNKNOWN, tmp_path)
