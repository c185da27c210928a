"""The numpy sampling loop against the reference's, and the way bits travel to pixels."""

import numpy as np
import pytest
import torch

from bar_edge.export import model
from bar_edge.runtime.noise import gumbel
from bar_edge.runtime.sampling import Schedule, guidance_at, sample_token, to_fine_grid, to_tokens, to_uint8
from bar_edge.runtime.spec import VARIANTS, ModelSpec, Recipe

IMAGES = 5


class RandomHead:
    """Logits that depend on the pass and on every known bit; numpy and torch get the same numbers."""

    def __init__(self, seed: int, rows: int, bits: int, passes: int) -> None:
        rng = np.random.default_rng(seed)
        self._base = rng.standard_normal((passes, rows, bits, 2)) * 4
        self._effect = rng.standard_normal((3, bits, bits * 2))
        self.passes: list[tuple[np.ndarray, np.ndarray]] = []  # known and bits as they came

    def logits(self, ids: np.ndarray, s: int) -> np.ndarray:
        """ids [B, K] in {0, 1, 2} -> [rows, K, 2] float32."""
        rows, bits = self._base.shape[1:3]
        effect = self._effect[ids, np.arange(bits)].sum(axis=1).reshape(-1, bits, 2)
        return (self._base[s] + np.tile(effect, (rows // len(ids), 1, 1))).astype(np.float32)

    def numpy(self, known, bits, s):
        self.passes.append((known.copy(), bits.copy()))
        return self.logits(np.where(known, bits, 2).astype(int), s)

    def torch(self, allocation):
        """As the reference calls its head: ids of all rows, the latent, the mask ratio of the pass."""
        total = sum(allocation)
        ratios = [1 - sum(allocation[:s]) / total for s in range(len(allocation))]

        def head(ids, latent, ratio):
            s = int(np.argmin(np.abs(np.array(ratios) - float(ratio[0]))))
            return torch.from_numpy(self.logits(ids[:IMAGES].numpy(), s))

        return head


def uniforms(seed: int, passes: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shape = (passes, IMAGES, bits)
    return rng.random((*shape, 2), dtype=np.float32), rng.random(shape, dtype=np.float32)


@pytest.mark.parametrize("temperature", [0.0, 0.8, 2.5])
@pytest.mark.parametrize("scale", [None, 1.0, 3.7])
@pytest.mark.parametrize("allocation", [(2, 2, 5, 7), (1, 1, 2, 3, 5), (12,), (1,) * 9, (16, 16, 16, 16), (4, 4, 4)])
@pytest.mark.parametrize("seed", range(4))
def test_numpy_draws_what_the_reference_draws(seed, allocation, scale, temperature):
    passes, bits = len(allocation), sum(allocation)
    rows = IMAGES if scale is None else 2 * IMAGES
    head = RandomHead(seed, rows, bits, passes)
    recipe = Recipe(scale or 1.0, temperature, allocation)
    u_bits, u_confidence = uniforms(seed, passes, bits)
    found, margin = sample_token(
        head.numpy, Schedule.of(recipe, bits), scale or 1.0, gumbel(u_bits), gumbel(u_confidence)
    )
    expected = model.sample_token(
        head.torch(allocation), torch.zeros(rows, 1), scale, recipe, *map(torch.from_numpy, (u_bits, u_confidence))
    )
    np.testing.assert_array_equal(found, expected.numpy())
    assert (margin > 0).all() and np.isfinite(margin).all()


def test_each_pass_sees_as_many_known_bits_as_the_allocation_says_and_they_keep_their_value():
    allocation = (2, 2, 5, 7)
    head = RandomHead(1, IMAGES, 16, 4)
    bits, _ = sample_token(
        head.numpy, Schedule.of(Recipe(1, 2.0, allocation), 16), 1.0, *map(gumbel, uniforms(2, 4, 16))
    )
    assert [set(known.sum(axis=1).tolist()) for known, _ in head.passes] == [{0}, {2}, {4}, {9}]
    for (known, _), (known_later, _) in zip(head.passes, head.passes[1:], strict=False):
        assert (known_later >= known).all()
    for known, given in head.passes:
        np.testing.assert_array_equal(given, bits & known)


def test_bits_with_the_largest_confidence_are_kept_without_their_noise():
    """At pass 0 the Gumbel noise that chose a bit does not count for its confidence."""
    logits = np.zeros((1, 4, 2), dtype=np.float32)
    logits[0, :, 1] = (1, 4, 2, 3)  # greedy draws ones; bits 1 and 3 are surest
    seen = []

    def head(known, bits, s):
        seen.append(known.copy())
        return logits

    schedule = Schedule.of(Recipe(1, 1.0, (2, 2)), 4)
    noise = np.zeros((2, 1, 4, 2), dtype=np.float32)
    noise[0, 0, 0] = 50  # a large number on both sides decides nothing
    sample_token(head, schedule, 1.0, noise, np.zeros((2, 1, 4), dtype=np.float32))
    np.testing.assert_array_equal(seen[1], [[False, True, False, True]])


def test_confidence_noise_changes_which_bits_are_kept():
    seen = []

    def head(known, bits, s):
        seen.append(known.copy())
        return np.ones((1, 4, 2), dtype=np.float32)

    confidence = np.zeros((2, 1, 4), dtype=np.float32)
    confidence[0, 0] = (5, 1, 4, 2)
    noise = np.zeros((2, 1, 4, 2), dtype=np.float32)
    sample_token(head, Schedule.of(Recipe(1, 1.0, (2, 2)), 4), 1.0, noise, confidence)
    np.testing.assert_array_equal(seen[1], [[True, False, True, False]])


def test_guidance_moves_away_from_the_unconditional_rows():
    logits = np.zeros((2, 3, 2), dtype=np.float32)
    logits[0, :, 1] = (1, 1, -1)  # conditional
    logits[1, :, 1] = (3, 0.5, -0.5)  # unconditional
    zeros = np.zeros((1, 1, 3, 2), dtype=np.float32)
    schedule = Schedule.of(Recipe(3, 0.0, (3,)), 3)
    bits, _ = sample_token(lambda known, bits, s: logits, schedule, 3.0, zeros, zeros[..., 0])
    np.testing.assert_array_equal(bits, [[False, True, False]])  # 3 + 3 * (1 - 3) is negative


def test_an_image_is_not_touched_by_the_others_of_its_batch():
    logits = np.random.default_rng(0).standard_normal((4, IMAGES, 16, 2)).astype(np.float32)
    schedule = Schedule.of(Recipe(1, 1.5, (2, 2, 5, 7)), 16)
    noise = [gumbel(u) for u in uniforms(1, 4, 16)]
    together, margins = sample_token(lambda known, bits, s: logits[s], schedule, 1.0, *noise)
    for i in range(IMAGES):
        part = slice(i, i + 1)
        alone, margin = sample_token(
            lambda known, bits, s, part=part: logits[s, part], schedule, 1.0, *(n[:, part] for n in noise)
        )
        np.testing.assert_array_equal(alone, together[part])
        assert margin == margins[part]


def test_the_margin_tells_how_far_the_closest_decision_was_from_a_tie():
    logits = np.zeros((1, 3, 2), dtype=np.float32)
    logits[0, :, 1] = (8, -2, 0.5)
    zeros = np.zeros((1, 1, 3, 2), dtype=np.float32)
    schedule = Schedule.of(Recipe(1, 0.0, (3,)), 3)
    _, margin = sample_token(lambda known, bits, s: logits, schedule, 1.0, zeros, zeros[..., 0])
    np.testing.assert_allclose(margin, 0.5 / 8)


def test_a_close_rank_is_a_close_decision_and_a_bit_that_is_known_is_none():
    logits = np.zeros((2, 1, 4, 2), dtype=np.float32)
    logits[0, 0, :, 1] = (8, 4, 3.5, 2)  # two are kept, by half a unit
    logits[1, 0, :, 1] = (0.01, 8, 8, 8)  # what is said of the first again decides nothing
    zeros = np.zeros((2, 1, 4, 2), dtype=np.float32)
    schedule = Schedule.of(Recipe(1, 0.0, (2, 2)), 4)
    _, margin = sample_token(lambda known, bits, s: logits[s], schedule, 1.0, zeros, zeros[..., 0])
    np.testing.assert_allclose(margin, 0.5 / 8)


def test_a_tie_between_zero_and_one_gives_zero_as_the_reference_does():
    zeros = np.zeros((1, 1, 3, 2), dtype=np.float32)
    logits = np.ones((1, 3, 2), dtype=np.float32)
    schedule = Schedule.of(Recipe(1, 0.0, (3,)), 3)
    bits, _ = sample_token(lambda known, bits, s: logits, schedule, 1.0, zeros, zeros[..., 0])
    assert not bits.any()
    assert torch.from_numpy(logits).argmax(-1).sum() == 0


def test_the_schedule_of_an_allocation():
    schedule = Schedule.of(Recipe(5, 2.5, (2, 2, 5, 7)), 16)
    np.testing.assert_allclose(schedule.mask_ratio, [1, 14 / 16, 12 / 16, 7 / 16])
    np.testing.assert_allclose(schedule.temperature, [2.5, 1.875, 1.25, 0.625])
    assert schedule.remask_count.tolist() == [14, 12, 7, 0]
    assert schedule.mask_ratio.dtype == schedule.temperature.dtype == np.float32


@pytest.mark.parametrize(("token", "expected"), [(0, 1), (64, 2), (128, 3), (255, 1 + 4 * 255 / 256)])
def test_guidance_grows_linearly_from_one(token, expected):
    assert guidance_at(token, 5.0, 256) == pytest.approx(expected)


def spec_with(patch_size: int) -> ModelSpec:
    known = VARIANTS["bar_b"].spec.to_dict()
    return ModelSpec.from_dict({**known, "image_seq_len": 64, "token_size": 3, "patch_size": patch_size})


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_tokens_and_the_fine_grid_are_inverse(patch_size):
    spec = spec_with(patch_size)
    cells = np.arange(2 * 64 * 3).reshape(2, 64, 3)
    tokens = to_tokens(cells, spec)
    assert tokens.shape == (2, 64 // patch_size**2, 3 * patch_size**2)
    np.testing.assert_array_equal(to_fine_grid(tokens, spec), cells)


@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_the_bits_of_a_token_are_its_patch_in_row_major_order(patch_size):
    spec = spec_with(patch_size)
    cells = np.arange(64 * 3).reshape(1, 64, 3)
    tokens = to_tokens(cells, spec)
    side = 8 // patch_size
    for token in range(spec.num_tokens):
        expected = []
        for row in range(patch_size):
            for column in range(patch_size):
                y, x = token // side * patch_size + row, token % side * patch_size + column
                expected += cells[0, 8 * y + x].tolist()
        assert tokens[0, token].tolist() == expected


def test_pixels_are_clamped_and_truncated_and_channels_come_last():
    image = np.array([-3, -1, 0, 1 / 255, 0.999, 1, 7], dtype=np.float32)
    pixels = to_uint8(np.broadcast_to(image, (2, 3, 1, 7)))
    assert pixels.shape == (2, 1, 7, 3) and pixels.dtype == np.uint8
    assert pixels[1, 0, :, 0].tolist() == [0, 0, 127, 128, 254, 255, 255]
    colours = np.full((1, 3, 2, 2), -1, dtype=np.float32)
    colours[:, 1] = 1
    assert to_uint8(colours)[0, 0, 0].tolist() == [0, 255, 0]
