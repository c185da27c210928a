"""The replay repeats every decision: it agrees with what was drawn and notices what was not."""

import numpy as np
import pytest
import torch

from bar_edge.export.model import generate_bits
from bar_edge.export.replay import TIE, Replay, replay, teacher_forced_latents
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_fine_grid, to_tokens
from bar_edge.runtime.spec import Recipe


def test_recorded_samplings_are_repeated_without_a_differing_bit(golden, sampling, read_sampling):
    recorded = golden.recorded(sampling)
    recipe, noise = read_sampling(recorded)
    found = replay(golden.reference, recorded["ids"], recorded["class_ids"].tolist(), recipe, noise)
    assert not found.differing_bits.any()
    assert found.unexplained == found.images_with_ties == 0
    assert found.margins.min() > 0
    assert len(found.latents) == len(recorded["class_ids"]) * (2 if recipe.guidance > 1 else 1)


def test_one_changed_bit_is_noticed_at_its_token_and_nowhere_before(golden, read_sampling):
    recorded = golden.recorded("sample_random_order")
    recipe, noise = read_sampling(recorded)
    spec, token = golden.spec, golden.spec.num_tokens // 2
    tokens = to_tokens(recorded["ids"], spec).copy()
    place = noise.orders(spec.num_tokens)[1, token]
    tokens[1, place, 3] ^= 1
    found = replay(golden.reference, to_fine_grid(tokens, spec), recorded["class_ids"].tolist(), recipe, noise)
    assert found.differing_bits[1, token] == 1
    assert not found.differing_bits[1, :token].any()
    assert not found.differing_bits[[0, 2]].any()
    assert found.unexplained >= 1


def test_drawing_with_another_seed_is_not_explained(golden):
    recipe = golden.checkpoint.recipe
    bits = to_fine_grid(generate_bits(golden.reference, [1, 2], recipe, SeededNoise(5, [0, 1])).numpy(), golden.spec)
    assert replay(golden.reference, bits, [1, 2], recipe, SeededNoise(5, [0, 1])).unexplained == 0
    assert (
        replay(golden.reference, bits, [1, 2], recipe, SeededNoise(6, [0, 1])).unexplained > golden.spec.num_tokens // 2
    )


def test_only_a_difference_at_a_tie_is_explained():
    differing = np.array([[0, 2, 0], [0, 0, 0], [1, 0, 3]])
    margins = np.array([[1, TIE / 2, 1], [TIE / 2, 1, 1], [TIE / 3, 1, 2 * TIE]], dtype=np.float32)
    found = Replay(differing, margins, np.empty((3, 3, 1), dtype=np.float32))
    assert found.unexplained == 1
    assert found.images_with_ties == 2


def test_what_the_reference_cannot_tell_is_not_explained():
    """NaN is neither far from a tie nor near one; bits may even be equal."""
    margins = np.array([[np.nan, np.nan, 1]], dtype=np.float32)
    assert Replay(np.array([[1, 0, 0]]), margins, np.empty((1, 3, 1), dtype=np.float32)).unexplained == 2


@pytest.mark.parametrize("copy", [0, 1], ids=["conditional", "unconditional"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_give_no_margin(patch1, read_sampling, monkeypatch, value, copy):
    recorded = patch1.recorded("sample_cfg")
    recipe, noise = read_sampling(recorded)
    head = patch1.reference.lm_head.forward

    def overflowing(ids, latent, ratio):
        logits = head(ids, latent, ratio)
        logits[copy * patch1.spec.num_tokens + 3, 0, 1] = value  # the fourth token of the image
        return logits

    monkeypatch.setattr(patch1.reference.lm_head, "forward", overflowing)
    found = replay(patch1.reference, recorded["ids"], recorded["class_ids"].tolist(), recipe, noise)
    assert np.isnan(found.margins[:, 3]).all()
    assert not np.isnan(np.delete(found.margins, 3, axis=1)).any()
    assert found.unexplained == len(found.margins)


@pytest.mark.parametrize("kind", ["cond", "uncond"])
@torch.inference_mode()
def test_teacher_forced_latents_in_raster_order(golden, kind):
    recorded = golden.recorded("forward")
    classes = torch.from_numpy(recorded["class_ids"])
    if kind == "uncond":
        classes = torch.full_like(classes, golden.spec.unconditional_class)
    orders = torch.arange(golden.spec.num_tokens).expand(len(classes), -1)
    found = teacher_forced_latents(golden.reference, classes, torch.from_numpy(recorded["teacher_tokens"]), orders)
    np.testing.assert_allclose(found.numpy(), recorded[f"latents_{kind}"], rtol=0, atol=1e-5)


def test_teacher_forced_latents_in_random_order(golden):
    recorded = golden.recorded("forward_random_order")
    found = teacher_forced_latents(
        golden.reference, *(torch.from_numpy(recorded[name]) for name in ("class_ids", "tokens_in_order", "orders"))
    )
    np.testing.assert_allclose(found.numpy(), recorded["latents_cond"], rtol=0, atol=1e-5)


def test_latents_come_by_generation_step_with_conditional_rows_first(patch1):
    recipe, noise = Recipe(3.0, 1.0, (2, 4)), SeededNoise(9, [0, 1], random_order=True)
    bits = to_fine_grid(generate_bits(patch1.reference, [4, 5], recipe, noise).numpy(), patch1.spec)
    found = replay(patch1.reference, bits, [4, 5], recipe, noise).latents
    orders = noise.orders(16)
    drawn = torch.from_numpy(np.take_along_axis(to_tokens(bits, patch1.spec), orders[:, :, None], axis=1))
    for rows, classes in ((slice(0, 2), [4, 5]), (slice(2, 4), [10, 10])):
        expected = teacher_forced_latents(patch1.reference, torch.tensor(classes), drawn, torch.from_numpy(orders))
        np.testing.assert_allclose(found[rows], expected.numpy(), rtol=0, atol=1e-5)
