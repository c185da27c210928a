"""Who may be timed: what draws the same images."""

from dataclasses import replace

import numpy as np
import pytest

from bar_edge.benchmarks import proof
from bar_edge.benchmarks.contenders import Drawn, Judgement


@pytest.fixture
def reference() -> Drawn:
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (2, 16, 10)).astype(np.uint8)
    return Drawn(bits, rng.integers(1, 255, (2, 8, 8, 3)).astype(np.uint8), {})


def with_bits(drawn: Drawn, count: int) -> Drawn:
    """The same with the first `count` bits of the first image flipped."""
    bits = drawn.bits.copy()
    bits[0].reshape(-1)[:count] ^= 1
    return Drawn(bits, drawn.pixels, {})


@pytest.mark.parametrize(("levels", "passed"), [(0, True), (1, True), (-1, True), (2, False), (-2, False)])
def test_equal_bits_pass_and_pixels_may_be_one_level_off(reference, levels, passed):
    pixels = reference.pixels.astype(int)
    pixels[1, 3, 4, 2] = 100
    exact = replace(reference, pixels=pixels.astype(np.uint8))
    pixels[1, 3, 4, 2] += levels
    found = proof.compare(exact, Drawn(exact.bits, pixels.astype(np.uint8), {}), None, exact=True)
    assert found.passed is passed and found.differing_bits == 0 and found.identical_images == 1
    assert f"within {abs(levels)} of 255 levels" in found.sentence


def test_the_signal_to_noise_is_that_of_the_median_image_and_never_infinite(reference):
    """One level everywhere is 48.13 dB; a single one in a large image says as much as none."""
    off = reference.pixels.copy()
    off[0] += 1
    found = proof.compare(reference, Drawn(reference.bits, off, {}), None, exact=True)
    assert found.psnr_db == pytest.approx((48.1308 + 99) / 2, abs=1e-3)
    large = Drawn(reference.bits, np.zeros((2, 512, 512, 3), dtype=np.uint8), {})
    near = Drawn(large.bits, large.pixels.copy(), {})
    near.pixels[:, 0, 0, 0] = 1
    assert proof.compare(large, near, None, exact=True).psnr_db == 99


def test_one_bit_too_many_refuses_an_exact_contender(reference):
    found = proof.compare(reference, with_bits(reference, 1), None, exact=True)
    assert not found.passed
    assert "1 of 320 bits differ" in found.sentence
    assert found.differing_bits == 1 / 320 and found.identical_images == 0.5


@pytest.mark.parametrize(("unexplained", "passed"), [(0, True), (1, False)])
def test_the_judge_excuses_ties_and_nothing_else(reference, unexplained, passed):
    judgement = Judgement(differing_bits=3, total_bits=320, tokens_differing=2, tokens_unexplained=unexplained)
    assert proof.compare(reference, with_bits(reference, 3), judgement, exact=True).passed is passed


@pytest.mark.parametrize(("wrong", "passed"), [(5, True), (80, True), (81, False)])
def test_an_inexact_contender_is_refused_from_a_quarter_of_wrong_bits_on(reference, wrong, passed):
    judgement = Judgement(differing_bits=wrong, total_bits=320, tokens_differing=16, tokens_unexplained=16)
    found = proof.compare(reference, with_bits(reference, 100), judgement, exact=False)
    assert found.passed is passed
    assert found.judged_differing_bits == wrong / 320
    assert found.psnr_db == 99.0


def test_without_a_judge_an_inexact_contender_is_described(reference):
    found = proof.compare(reference, with_bits(reference, 32), None, exact=False)
    assert found.passed and found.judged_differing_bits is None
    assert "10.0% of bits differ" in found.sentence
