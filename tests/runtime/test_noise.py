"""Noise is the published generator, and a pure function of (seed, image, token, pass, bit)."""

import numpy as np
import pytest

from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.noise import RecordedNoise, SeededNoise, gumbel, philox, raster_orders

ONES = 0xFFFFFFFF
# known answers of Random123 (kat_vectors, philox4x32 with 10 rounds): counter, key, output
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_gives_the_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32  # the seed's low word is the first word of the key
    words = philox([np.uint64(word) for word in counter], seed)
    assert words.tolist() == list(expected)


def test_philox_of_many_counters_is_philox_of_each():
    token, block = np.arange(3, dtype=np.uint64)[:, None], np.arange(2, dtype=np.uint64)
    together = philox((np.uint64(7), token, np.uint64(1), block), 5)
    assert together.shape == (3, 2, 4)
    for i in range(3):
        for j in range(2):
            alone = philox((np.uint64(7), np.uint64(i), np.uint64(1), np.uint64(j)), 5)
            np.testing.assert_array_equal(together[i, j], alone)


def test_uniforms_follow_the_documented_counter():
    """u = top 24 bits / 2^24; counter = (image, token, pass | kind << 16, block); bits before confidences."""
    seed = 0x0123456789ABCDEF
    u_bits, u_confidence = SeededNoise(seed, [11]).uniforms(3, 2, 5)
    for kind, found in ((0, u_bits[2, 1, 0].reshape(-1)), (1, u_confidence[2, 1, 0])):
        for i, u in enumerate(found):
            words = philox([np.uint64(n) for n in (11, 2, 1 | kind << 16, i // 4)], seed)
            assert u == np.float32((int(words[i % 4]) >> 8) / 2**24)


def test_uniforms_are_float32_in_the_half_open_unit_interval():
    for u in SeededNoise(3, range(20)).uniforms(16, 4, 12):
        assert u.dtype == np.float32
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 0.01
        np.testing.assert_array_equal(u * 2**24, np.floor(u * 2**24))


def test_shapes_are_by_token_pass_image_and_bit():
    u_bits, u_confidence = SeededNoise(0, [4, 9]).uniforms(5, 3, 7)
    assert u_bits.shape == (5, 3, 2, 7, 2)
    assert u_confidence.shape == (5, 3, 2, 7)


@pytest.mark.parametrize("random_order", [False, True])
def test_an_image_gets_the_same_noise_alone_and_in_company(random_order):
    company = SeededNoise(8, [3, 14, 15, 9, 2], random_order)
    alone = SeededNoise(8, [15], random_order)
    for together, single in zip(company.uniforms(6, 3, 10), alone.uniforms(6, 3, 10), strict=True):
        np.testing.assert_array_equal(together[:, :, 2:3], single)
    np.testing.assert_array_equal(company.orders(64)[2:3], alone.orders(64))


@pytest.mark.parametrize("random_order", [False, True])
def test_a_part_of_a_batch_has_the_noise_and_the_orders_of_its_images(random_order):
    seeded = SeededNoise(8, [3, 14, 15, 9], random_order)
    for whole in (seeded, RecordedNoise(*seeded.uniforms(6, 3, 10), seeded.orders(6))):
        part = whole.part(1, 3)
        assert part.images == 2
        for found, of_all in zip(part.uniforms(6, 3, 10), whole.uniforms(6, 3, 10), strict=True):
            np.testing.assert_array_equal(found, of_all[:, :, 1:3])
        np.testing.assert_array_equal(part.orders(6), whole.orders(6)[1:3])


def test_noise_does_not_depend_on_how_many_tokens_and_passes_there_are():
    few, many = SeededNoise(1, [0]), SeededNoise(1, [0])
    for short, long in zip(few.uniforms(2, 1, 6), many.uniforms(9, 4, 6), strict=True):
        np.testing.assert_array_equal(short, long[:2, :1])


def test_noise_does_not_depend_on_the_order_of_tokens():
    for raster, random in zip(
        SeededNoise(1, [5]).uniforms(4, 2, 6), SeededNoise(1, [5], random_order=True).uniforms(4, 2, 6), strict=True
    ):
        np.testing.assert_array_equal(raster, random)


def test_every_seed_image_token_pass_and_kind_has_its_own_numbers():
    u_bits, u_confidence = SeededNoise(1, [0, 1]).uniforms(3, 2, 8)
    blocks = [u_bits[n, s, b].reshape(-1)[:8] for n in range(3) for s in range(2) for b in range(2)]
    blocks += [u_confidence[n, s, b] for n in range(3) for s in range(2) for b in range(2)]
    blocks += [seeded.uniforms(1, 1, 8)[1].reshape(-1) for seeded in (SeededNoise(2, [0]), SeededNoise(1 + 2**32, [0]))]
    assert len({block.tobytes() for block in blocks}) == len(blocks)


def test_random_orders_are_permutations_and_differ_by_image_and_seed():
    orders = np.concatenate([SeededNoise(seed, range(10), random_order=True).orders(64) for seed in (1, 2)])
    np.testing.assert_array_equal(np.sort(orders, axis=1), raster_orders(20, 64))
    assert len({order.tobytes() for order in orders}) == 20


def test_without_random_order_tokens_come_in_raster_order():
    np.testing.assert_array_equal(SeededNoise(1, [3, 4]).orders(5), [[0, 1, 2, 3, 4]] * 2)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(RequestError, match=rf"seed must be between 0 and 2\*\*64 - 1, is {seed}"):
        SeededNoise(seed, [0])


@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_both_ends_of_the_seed_range_work(seed):
    assert SeededNoise(seed, [0]).uniforms(1, 1, 4)[0].shape == (1, 1, 1, 4, 2)


@pytest.mark.parametrize("seed", [1.5, "1", None])
def test_a_seed_that_is_no_whole_number_is_refused(seed):
    with pytest.raises(RequestError, match="seed must be a whole number"):
        SeededNoise(seed, [0])


def test_an_image_index_that_is_no_whole_number_is_refused():
    with pytest.raises(RequestError, match=r"image index must be a whole number, is 0\.5"):
        SeededNoise(0, [0.5])


@pytest.mark.parametrize("index", [-1, 2**32])
def test_an_image_index_out_of_range_is_refused(index):
    with pytest.raises(RequestError, match=r"image indices must be between 0 and 2\*\*32 - 1"):
        SeededNoise(0, [0, index])
    assert SeededNoise(0, [0, 2**32 - 1]).uniforms(1, 1, 4)[0].shape == (1, 1, 2, 4, 2)


def test_gumbel_is_the_formula_of_the_paper_and_finite_at_both_ends():
    u = np.array([0, 2.0**-24, 0.25, 0.5, 0.999, 1 - 2.0**-24], dtype=np.float32)
    found = gumbel(u)
    assert found.dtype == np.float32 and np.isfinite(found).all()
    assert (np.diff(found) > 0).all()
    exact = -np.log(-np.log(np.maximum(u.astype(np.float64), 1e-20)))
    np.testing.assert_allclose(found, exact, rtol=1e-6)


def test_recorded_noise_is_given_back_as_it_is():
    rng = np.random.default_rng(0)
    u_bits, u_confidence = (rng.random(shape, dtype=np.float32) for shape in ((4, 2, 3, 6, 2), (4, 2, 3, 6)))
    orders = np.stack([rng.permutation(4) for _ in range(3)])
    noise = RecordedNoise(u_bits, u_confidence, orders)
    assert noise.images == 3
    assert noise.uniforms(4, 2, 6) == (u_bits, u_confidence)
    assert noise.orders(4) is orders
    np.testing.assert_array_equal(RecordedNoise(u_bits, u_confidence).orders(4), raster_orders(3, 4))


def test_recorded_confidences_that_do_not_go_with_the_bits_are_refused():
    noise = RecordedNoise(np.zeros((4, 2, 3, 6, 2), np.float32), np.zeros((4, 2, 3, 5), np.float32))
    with pytest.raises(RequestError, match=r"and \[4, 2, 3, 5\], this model and allocation need"):
        noise.uniforms(4, 2, 6)


@pytest.mark.parametrize("asked", [(5, 2, 6), (4, 3, 6), (4, 2, 7)])
def test_recorded_noise_of_another_shape_is_refused(asked):
    noise = RecordedNoise(np.zeros((4, 2, 3, 6, 2), np.float32), np.zeros((4, 2, 3, 6), np.float32))
    with pytest.raises(RequestError, match=r"recorded noise has shapes \[4, 2, 3, 6, 2\]"):
        noise.uniforms(*asked)
