"""Every kernel against its twin in numpy, on the CPU and, where there is one, on a GPU."""

import itertools

import numpy as np
import pytest

from bar_edge.runtime.noise import SeededNoise, gumbel, raster_orders
from bar_edge.runtime.sampling import Schedule, sample_token, to_fine_grid
from bar_edge.runtime.spec import ModelSpec, Recipe

TIE = 1e-6  # of the largest logit: closer decisions may fall either way, since logf differs by a rounding
GEOMETRIES = [(1, 1), (3, 33), (64, 128)]  # grid, block: elementwise kernels give the same in any
SAMPLE = """
for k, block in ((10, 10), (64, 64), (64, 7), (256, 64)):
    rng = np.random.default_rng(k)
    logits, u_bits, u_confidence = (rng.random(s, np.float32) for s in ((4, k, 2), (2, 3, 2, k, 2), (2, 3, 2, k)))
    guidance, temperature = np.ones(2, np.float32), np.ones(3, np.float32)
    remask_count = np.array([k - 3, 2, 0], dtype=np.int32)
    known, bits, tokens = (np.zeros(s, np.uint8) for s in ((2, k), (2, k), (2, 2, k)))
    for head_pass in range(3):
        sizes = [np.int32(size) for size in (head_pass, 3, 2, 2, k, 1)]
        state = (known, bits, tokens, np.ones(1, np.int32))
        inputs = (logits, u_bits, u_confidence, guidance, temperature, remask_count)
        kernels.launch("sample_pass", 2, block, *inputs, *state, *sizes)
"""


def ints(*values: int) -> list[np.int32]:
    return [np.int32(value) for value in values]


def array_of(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int32)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def zeros_and_ones(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.integers(0, 2, shape, dtype=np.uint8)


def permutations(rng: np.random.Generator, images: int, tokens: int) -> np.ndarray:
    return np.stack([rng.permutation(tokens) for _ in range(images)]).astype(np.int32)


def misaligned(array: np.ndarray) -> np.ndarray:
    """The same values at an address that is a multiple of 2 but not of 4."""
    storage = np.empty(array.nbytes + 16, dtype=np.uint8)
    begin = (2 - storage.ctypes.data) % 16
    view = storage[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize(("grid", "block"), GEOMETRIES)
@pytest.mark.parametrize(
    ("seed", "images", "n", "s", "k"),
    [
        (0, [0], 1, 1, 1),
        (2**64 - 1, [2**32 - 1, 3], 5, 2, 10),
        (0x0123456789ABCDEF, [7, 7, 0, 1, 2], 3, 4, 7),
        (1, [4], 16, 4, 256),
        (2**32, [1, 0], 4, 3, 16),
    ],
)
def test_fill_uniforms_is_the_documented_stream(kernels, seed, images, n, s, k, grid, block):
    u_bits = np.full((n, s, len(images), k, 2), np.nan, dtype=np.float32)
    u_confidence = np.full((n, s, len(images), k), np.nan, dtype=np.float32)
    indices = np.array(images, dtype=np.uint32)
    sizes = ints(n, s, len(images), k)
    kernels.launch("fill_uniforms", grid, block, np.uint64(seed), indices, u_bits, u_confidence, *sizes)
    expected_bits, expected_confidence = SeededNoise(seed, images).uniforms(n, s, k)
    np.testing.assert_array_equal(u_bits, expected_bits)
    np.testing.assert_array_equal(u_confidence, expected_confidence)


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_place_token_describes_the_position_before_each_token(kernels, images, copies):
    rng = np.random.default_rng(images)
    tokens, prefix, num_classes, positions = 9, 5, 20, 4
    rows = images * copies
    classes = rng.integers(0, num_classes + 1, rows, dtype=np.int32)
    distinct, class_slot = np.unique(classes, return_inverse=True)
    class_slot, chunk = class_slot.astype(np.int32), array_of(positions, len(distinct))
    orders = permutations(rng, images, tokens)
    order_of_row = np.tile(orders, (copies, 1))
    for n in range(tokens):
        symbols, own, targets, start, index = outputs = np.full((5, rows), -7, dtype=np.int32)
        inputs = (array_of(n), classes, class_slot, chunk, orders)
        sizes = ints(rows, images, tokens, prefix, num_classes)
        kernels.launch("place_token", 2, 3, *inputs, *outputs, *sizes)
        np.testing.assert_array_equal(symbols, classes + 3 if n == 0 else np.full(rows, num_classes + 5))
        np.testing.assert_array_equal(own, prefix + order_of_row[:, n - 1] if n else np.full(rows, prefix - 1))
        np.testing.assert_array_equal(targets, prefix + order_of_row[:, n])
        np.testing.assert_array_equal(start, prefix - 1 + n)
        np.testing.assert_array_equal(index, n % positions * len(distinct) + class_slot)


def embedded(symbols, own, targets, bits, tables):
    """[M, D]: the sum in the kernel's order, float32."""
    symbol_embedding, bit_embedding, pos_embed, target_aware_pos_embed = tables
    x = np.zeros((len(symbols), bit_embedding.shape[1]), dtype=np.float32)
    for k, row in enumerate(bit_embedding):
        x += bits[:, k : k + 1] * row
    return x + symbol_embedding[symbols] + pos_embed[own] + target_aware_pos_embed[targets]


@pytest.mark.parametrize(("grid", "block"), GEOMETRIES)
@pytest.mark.parametrize("n", [None, 0, 3])
@pytest.mark.parametrize(
    ("positions", "images", "k", "d"), [(1, 1, 10, 24), (4, 2, 16, 7), (15, 5, 64, 13), (4, 2, 256, 20)]
)
def test_embed_sums_the_rows_of_its_tables(kernels, positions, images, k, d, n, grid, block):
    rng = np.random.default_rng(k)
    table_rows = 11
    tables = [floats(rng, rows, d) for rows in (table_rows, k, table_rows, table_rows)]
    symbols, own, targets = rng.integers(0, table_rows, (3, positions), dtype=np.int32)
    bits = zeros_and_ones(rng, images, k)
    x = np.full((positions, d), np.nan, dtype=np.float32)
    token = None if n is None else array_of(n)
    sizes = ints(positions, d, k, images)
    kernels.launch("embed", grid, block, symbols, own, targets, bits, *tables, x, *sizes, token)
    bits_of_position = bits[np.arange(positions) % images] * np.uint8(n != 0)
    np.testing.assert_array_equal(x, embedded(symbols, own, targets, bits_of_position, tables))


def test_embed_of_prefix_positions_takes_no_bits(kernels):
    rng = np.random.default_rng(0)
    positions, k, d = 6, 10, 8
    tables = [floats(rng, rows, d) for rows in (9, k, 9, 9)]
    symbols, own, targets = rng.integers(0, 9, (3, positions), dtype=np.int32)
    x = np.full((positions, d), np.nan, dtype=np.float32)
    kernels.launch("embed", 2, 8, symbols, own, targets, None, *tables, x, *ints(positions, d, k, 2), None)
    no_bits = np.zeros((positions, k), dtype=np.uint8)
    np.testing.assert_array_equal(x, embedded(symbols, own, targets, no_bits, tables))


@pytest.mark.parametrize(("grid", "block"), GEOMETRIES)
@pytest.mark.parametrize("head_pass", [0, 1, 3])
@pytest.mark.parametrize(
    ("copies", "images", "k", "w"), [(1, 1, 10, 24), (2, 2, 16, 7), (2, 5, 64, 13), (1, 2, 256, 20)]
)
def test_head_embed_sums_what_is_known(kernels, copies, images, k, w, head_pass, grid, block):
    rng = np.random.default_rng(k)
    known, bits = zeros_and_ones(rng, images, k), zeros_and_ones(rng, images, k)
    bit_embedding, masked_embedding = floats(rng, 2 * k, w), floats(rng, w)
    x = np.full((copies * images, w), np.nan, dtype=np.float32)
    sizes = ints(copies * images, images, k, w, head_pass)
    kernels.launch("head_embed", grid, block, known, bits, bit_embedding, masked_embedding, x, *sizes)
    expected = np.tile(masked_embedding, (images, 1))
    if head_pass > 0:
        for column, row in zip(np.concatenate((known, known & bits), axis=1).T, bit_embedding, strict=True):
            expected += column[:, None] * row
    np.testing.assert_array_equal(x, np.tile(expected, (copies, 1)))


class Sampler:
    """`sample_pass` for one token after the other, from logits [N, S, R, K, 2]; records what each pass begins with."""

    def __init__(self, kernels, logits, u_bits, u_confidence, guidance, schedule, block) -> None:
        self._kernels, self._logits, self._block = kernels, logits, block
        self._tokens, self._passes, self._images, self._bits = u_confidence.shape
        self._inputs = (u_bits, u_confidence, guidance, schedule.temperature, schedule.remask_count.astype(np.int32))
        rng = np.random.default_rng(99)
        self.known, self.bits = zeros_and_ones(rng, 2, self._images, self._bits)  # left by the token before
        self.drawn = np.full((self._images, self._tokens, self._bits), 255, dtype=np.uint8)

    def token(self, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """(known, known ones) with which every pass after the first begins."""
        states = []
        rows = self._logits.shape[2]
        for s in range(self._passes):
            assert (self.drawn[:, n] == 255).all()  # only the last pass writes the token
            state = (self.known, self.bits, self.drawn, array_of(n))
            sizes = ints(s, self._passes, self._tokens, self._images, self._bits, rows > self._images)
            logits = np.ascontiguousarray(self._logits[n, s])
            self._kernels.launch("sample_pass", self._images, self._block, logits, *self._inputs, *state, *sizes)
            states.append((self.known.copy(), self.known & self.bits))
        return states[:-1]


def twin(logits, schedule, guidance, u_bits, u_confidence):
    """The same of `sample_token` for one token: states, bits and margin."""
    states = []

    def head(known, known_ones, s):
        states.append((known, known_ones))
        return logits[s]

    bits, margin = sample_token(head, schedule, guidance, gumbel(u_bits), gumbel(u_confidence))
    return states[1:], bits, margin


ALLOCATIONS = [(2, 2, 2, 4), (3, 7), (10,), (2, 2, 5, 7), (1, 5, 10), (16, 16, 16, 16), (64, 64, 64, 64), (100, 156)]


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("images", [1, 2, 5])
@pytest.mark.parametrize("allocation", ALLOCATIONS, ids=str)
def test_sample_pass_draws_what_numpy_draws(kernels, allocation, images, guided):
    rng = np.random.default_rng(sum(allocation) + images)
    tokens, passes, k = 3, len(allocation), sum(allocation)
    schedule = Schedule.of(Recipe(5.0, 2.5, allocation), k)
    guidance = np.array([1, 2.25, 4.9], dtype=np.float32)
    logits = 3 * floats(rng, tokens, passes, images * (1 + guided), k, 2)
    u_bits, u_confidence = SeededNoise(images, range(images)).uniforms(tokens, passes, k)
    sampler = Sampler(kernels, logits, u_bits, u_confidence, guidance, schedule, block=33)
    compared = 0
    for n in range(tokens):
        found = sampler.token(n)
        expected, bits, margin = twin(logits[n], schedule, guidance[n], u_bits[n], u_confidence[n])
        clear = margin > TIE
        compared += clear.sum()
        np.testing.assert_array_equal(sampler.drawn[clear, n], bits[clear])
        for mine, theirs in itertools.chain.from_iterable(
            zip(*pair, strict=True) for pair in zip(found, expected, strict=True)
        ):
            np.testing.assert_array_equal(mine[clear], theirs[clear])
        assert (sampler.drawn[:, n + 1 :] == 255).all()
    assert compared >= tokens * images - 1  # near-ties are rare


@pytest.mark.parametrize("block", [1, 10, 64, 256])
def test_sample_pass_needs_no_particular_block(kernels, block):
    rng = np.random.default_rng(3)
    schedule = Schedule.of(Recipe(5.0, 2.5, (3, 20, 41)), 64)
    logits = floats(rng, 1, 3, 4, 64, 2)
    u_bits, u_confidence = SeededNoise(8, range(2)).uniforms(1, 3, 64)
    sampler = Sampler(kernels, logits, u_bits, u_confidence, np.full(1, 3, dtype=np.float32), schedule, block)
    sampler.token(0)
    _, bits, margin = twin(logits[0], schedule, 3, u_bits[0], u_confidence[0])
    assert (margin > TIE).all()
    np.testing.assert_array_equal(sampler.drawn[:, 0], bits)


@pytest.mark.parametrize("guided", [True, False])
def test_sample_pass_keeps_ties_at_the_cutoff_masked_as_numpy_does(kernels, guided):
    """Whole logits without noise: ties between values and between confidences, and no rounding."""
    rng = np.random.default_rng(4)
    images, allocation = 5, (2, 2, 5, 7)
    schedule = Schedule.of(Recipe(2.0, 0.0, allocation), 16)
    guidance = np.full(1, 2, dtype=np.float32)
    logits = rng.integers(-1, 2, (1, 4, images * (1 + guided), 16, 2)).astype(np.float32)
    u_bits, u_confidence = SeededNoise(0, range(images)).uniforms(1, 4, 16)
    sampler = Sampler(kernels, logits, u_bits, u_confidence, guidance, schedule, block=16)
    found = sampler.token(0)
    expected, bits, margin = twin(logits[0], schedule, guidance[0], u_bits[0], u_confidence[0])
    assert (margin == 0).all()
    np.testing.assert_array_equal(sampler.drawn[:, 0], bits)
    np.testing.assert_array_equal(np.array(found), np.array(expected))
    assert (np.array(found)[:, 0].sum(axis=-1) < np.cumsum(allocation)[:-1, None]).any()  # a tie did stay masked


def test_sample_pass_bounds_the_noise_of_u_at_both_ends(kernels):
    """u = 0, or a recorded u rounded up to 1, must not become infinite noise, which would beat any logit."""
    logits = np.zeros((1, 1, 1, 2, 2), dtype=np.float32)
    logits[..., 0] = 100  # more than the noise of any u can differ
    u_bits = np.array([[0, 1], [1, 0]], dtype=np.float32).reshape(1, 1, 1, 2, 2)
    schedule = Schedule.of(Recipe(1.0, 1.0, (2,)), 2)
    u_confidence, guidance = np.zeros((1, 1, 1, 2), dtype=np.float32), np.ones(1, dtype=np.float32)
    sampler = Sampler(kernels, logits, u_bits, u_confidence, guidance, schedule, block=2)
    sampler.token(0)
    assert sampler.drawn.tolist() == [[[0, 0]]]


def test_advance_counts_once(kernels):
    n = array_of(41)
    kernels.launch("advance", 2, 32, n)
    assert n.tolist() == [42]


def test_a_gpu_runs_all_of_these_tests_too(gpu):
    """Says so by its skip where there is none."""
    test_advance_counts_once(gpu)


@pytest.mark.parametrize("place_out", [np.ascontiguousarray, misaligned], ids=["to_aligned", "to_misaligned"])
@pytest.mark.parametrize("place", [np.ascontiguousarray, misaligned], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("row_bytes", [2, 14, 16, 48, 50])
def test_gather_rows_copies_rows_and_leaves_the_negative(kernels, row_bytes, place, place_out):
    rng = np.random.default_rng(row_bytes)
    pieces, table_rows = 3, 5
    table = place(rng.integers(0, 256, (pieces, table_rows, row_bytes), dtype=np.uint8))
    index = array_of(4, -1, 0, 4, 2, -2)
    out = place_out(np.full((pieces, len(index), row_bytes), 77, dtype=np.uint8))
    kernels.launch("gather_rows", 3, 33, table, index, out, *ints(pieces, table_rows, len(index), row_bytes))
    expected = table[:, index]
    expected[:, index < 0] = 77
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("place_out", [np.ascontiguousarray, misaligned], ids=["to_aligned", "to_misaligned"])
@pytest.mark.parametrize("place", [np.ascontiguousarray, misaligned], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("row_bytes", [6, 32])
@pytest.mark.parametrize(("rows", "row_offset", "start", "positions"), [(3, 0, 0, 7), (2, 1, 4, 3), (1, 2, 6, 1)])
def test_write_kv_writes_its_rows_and_positions_only(
    kernels, rows, row_offset, start, positions, row_bytes, place, place_out
):
    rng = np.random.default_rng(positions)
    layers, heads, all_rows, length = 2, 3, 3, 7
    kv = place(rng.integers(0, 256, (layers, 2, rows, heads, positions, row_bytes), dtype=np.uint8))
    caches = place_out(rng.integers(0, 256, (layers, 2, all_rows, heads, length, row_bytes), dtype=np.uint8))
    expected = caches.copy()
    expected[:, :, row_offset : row_offset + rows, :, start : start + positions] = kv
    sizes = ints(row_offset, layers, rows, heads, positions, all_rows, length, row_bytes)
    kernels.launch("write_kv", 4, 32, kv, caches, array_of(start), *sizes)
    np.testing.assert_array_equal(caches, expected)


@pytest.mark.parametrize("random_order", [True, False])
@pytest.mark.parametrize("images", [1, 5])
@pytest.mark.parametrize(("side", "patch", "token_size"), [(16, 1, 16), (3, 2, 5), (4, 4, 16), (1, 3, 1), (32, 1, 10)])
def test_to_cells_puts_every_bit_in_its_place(kernels, side, patch, token_size, images, random_order):
    rng = np.random.default_rng(side)
    n, k = side**2, token_size * patch**2
    spec = ModelSpec(8, 1, 1, n * patch**2, token_size, patch, 3, 2, 8, 1, 4)
    orders = permutations(rng, images, n) if random_order else raster_orders(images, n).astype(np.int32)
    tokens = zeros_and_ones(rng, images, n, k)
    cells = np.full((images, n * patch**2, token_size), np.nan, dtype=np.float32)
    kernels.launch("to_cells", 4, 64, tokens, orders, cells, *ints(images, n, k, patch))
    raster = np.empty_like(tokens)
    for image, order in enumerate(orders):
        raster[image, order] = tokens[image]
    np.testing.assert_array_equal(cells, to_fine_grid(raster, spec))


def test_the_threads_of_sample_pass_do_not_race(apart, ptx):
    """It alone shares memory; what can be found is in test_ptx.py."""
    done = apart(SAMPLE, ptx)
    assert done.returncode == 0, done.stderr
