"""Measures of quality: nothing for a model beside itself, and what arithmetic says for a known change."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bar_edge.calibration import quality
from bar_edge.calibration.probe import ProbeEngine
from bar_edge.calibration.quality import (
    check_pair,
    compare_bundles,
    paired_images,
    precisions_of,
    probe,
    record,
    teacher_forced,
)
from bar_edge.calibration.quantizer import write_weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import CalibrationError
from bar_edge.runtime.weights import open_weights

BIAS = "lm_head.output_embed.bias"


@pytest.fixture(scope="module")
def recorded(small) -> list[quality.Recorded]:
    engine = probe(small.bundle, threads=1)
    try:
        return record(engine, small.bundle, images=6, seed=21, batch_size=4)
    finally:
        engine.close()


@pytest.fixture
def altered(small, tmp_path, reseal):
    """The bundle with one tensor changed, its hashes made to match."""

    def make(name: str, change) -> Bundle:
        folder = Path(shutil.copytree(small.bundle.path, tmp_path / "altered"))
        tensors = dict(open_weights(small.bundle.path))
        tensors[name] = change(np.array(tensors[name]))
        write_weights(folder, tensors, lambda what, done, total: None)
        reseal(folder)
        return Bundle.open(folder)

    return make


def forced(recorded, bundle: Bundle) -> quality.TeacherForced:
    engine = probe(bundle, threads=1)
    try:
        return teacher_forced(recorded, engine)
    finally:
        engine.close()


def test_a_recording_is_what_the_runtime_draws(small, recorded):
    drawn = np.concatenate([one.drawn for one in recorded])
    ids = np.concatenate([one.batch.class_ids for one in recorded])
    spec = small.spec
    assert drawn.shape == (6, spec.num_tokens, spec.bits_per_token)
    assert list(ids) == [0, 1, 3, 5, 7, 9]
    bits = small.runtime.generate(list(ids), seed=21, return_bits=True)[1]
    np.testing.assert_array_equal(drawn.reshape(bits.shape), bits)  # patches of one cell


def test_a_recording_keeps_every_decision_apart(small, recorded):
    """Steps are run in the same buffers: what is recorded of a token must not be the last token's."""
    for one in recorded:
        tokens = small.spec.num_tokens
        for values in (one.logits, one.latents):
            assert len({value.tobytes() for value in values}) == tokens
        done = np.cumsum((0, *small.bundle.recipe.allocation))[:-1]
        np.testing.assert_array_equal(one.known.sum(axis=3), np.broadcast_to(done[None, :, None], one.known.shape[:3]))
        assert (one.known[:, 1:] >= one.known[:, :-1]).all()


def test_fp32_beside_itself_flips_nothing(small, recorded):
    found = forced(recorded, small.bundle)
    assert found.flips == 0 and set(found.flips_per_pass) == {0} == set(found.flips_per_quarter)
    assert 0 <= found.kl < 1e-9
    assert min(found.latent_snr_db, found.logit_snr_db) > 100
    masked = small.spec.bits_per_token - np.cumsum((0, *small.bundle.recipe.allocation))[:-1]
    assert (found.images, found.decisions) == (6, 6 * small.spec.num_tokens * masked.sum())


def test_a_bias_that_outweighs_every_logit_flips_every_zero(small, recorded, altered):
    """All bits become 1: the flips are the decisions that were 0, pass by pass and quarter by quarter."""
    found = forced(recorded, altered(BIAS, lambda bias: bias + np.tile([0, 1e4], len(bias) // 2).astype(np.float32)))
    zeros, masked = np.zeros((2, small.spec.num_tokens, len(small.bundle.recipe.allocation)))
    for one in recorded:
        zeros += ((one.logits.argmax(-1) == 0) & ~one.known).sum(axis=(2, 3))
        masked += (~one.known).sum(axis=(2, 3))
    assert 0.2 < found.flips < 0.8
    assert found.flips == pytest.approx(zeros.sum() / masked.sum(), abs=1e-12)
    np.testing.assert_allclose(found.flips_per_pass, zeros.sum(0) / masked.sum(0))
    quarters = [zeros[i : i + 4].sum() / masked[i : i + 4].sum() for i in range(0, 16, 4)]
    np.testing.assert_allclose(found.flips_per_quarter, quarters)
    assert found.latent_snr_db > 100  # the trunk is what it was
    assert found.logit_snr_db < -20


def test_the_divergence_is_that_of_the_two_distributions(small, recorded, altered):
    """A bias of log 2 on every 1 changes the odds twofold."""
    shift = np.log(2)
    found = forced(recorded, altered(BIAS, lambda bias: bias + np.tile([0, shift], len(bias) // 2).astype(np.float32)))
    odds = np.concatenate([np.diff(one.logits, axis=-1)[..., 0][~one.known] for one in recorded]).astype(np.float64)
    log_one, log_zero = -np.logaddexp(0, -odds), -np.logaddexp(0, odds)
    other_one, other_zero = -np.logaddexp(0, -odds - shift), -np.logaddexp(0, odds + shift)
    expected = np.exp(log_one) * (log_one - other_one) + np.exp(log_zero) * (log_zero - other_zero)
    assert found.decisions == odds.size
    assert found.kl == pytest.approx(expected.mean(), rel=1e-3)
    masked = small.spec.bits_per_token - np.cumsum((0, *small.bundle.recipe.allocation))[:-1]
    assert found.kl == pytest.approx(np.average(found.kl_per_pass, weights=masked))
    assert found.kl == pytest.approx(np.mean(found.kl_per_quarter))


def test_the_led_engine_is_never_left_to_its_own_bits(small, recorded, altered):
    """However different its decisions, every state is the recorded one: latents follow the recorded tokens."""
    bundle = altered(BIAS, lambda bias: bias - np.tile([0, 1e4], len(bias) // 2).astype(np.float32))
    engine = ProbeEngine(bundle, {}, threads=1)
    one = recorded[0]
    teacher_forced([one], engine)
    rows = np.abs(engine.last_latents() - one.latents[-1]).max()
    engine.close()
    assert rows < 1e-4 * np.abs(one.latents[-1]).max()


def test_paired_images_of_a_bundle_and_itself_are_the_same(small):
    found = paired_images(small.bundle, small.bundle, images=5, seed=4, threads=1)
    assert (found.images, found.identical_images, found.differing_bits) == (5, 1.0, 0.0)
    assert found.psnr_db == found.decoder_psnr_db == 99.0


def test_paired_images_tell_the_decoder_from_the_bits(small, altered):
    """A changed decoder changes pixels and no bit."""
    bundle = altered("decoder.conv_out.bias", lambda bias: bias + np.float32(0.1))
    found = paired_images(small.bundle, bundle, images=3, seed=4, threads=1)
    assert found.differing_bits == 0 and found.identical_images == 1
    assert found.psnr_db == found.decoder_psnr_db < 40


def test_paired_images_part_where_decisions_do(small, altered):
    bundle = altered(BIAS, lambda bias: bias + np.random.default_rng(0).standard_normal(bias.shape).astype(np.float32))
    found = paired_images(small.bundle, bundle, images=4, seed=4, threads=1)
    assert 0 < found.differing_bits < 1 and found.identical_images < 1
    assert found.decoder_psnr_db == 99.0 > found.psnr_db


def test_bundles_of_different_models_or_recipes_are_not_compared(small, patch1):
    other = replace(small.bundle, recipe=replace(small.bundle.recipe, temperature=0.5))
    for pair in ((small.bundle, patch1.bundle), (patch1.bundle, small.bundle), (small.bundle, other)):
        with pytest.raises(CalibrationError, match="are different models; compare a bundle with its own fp32"):
            check_pair(*pair)
        with pytest.raises(CalibrationError, match="different models"):
            compare_bundles(*pair, images=2, seed=0, threads=1)


def test_a_quantized_bundle_beside_its_fp32(small, precision):
    bundle = small.quantized(precision)
    assert precisions_of(small.bundle) == {} != precisions_of(bundle)
    found = compare_bundles(small.bundle, bundle, images=8, seed=77, threads=1)
    assert json.loads(json.dumps(found)) == found
    measured = found["teacher_forced"]
    assert 0 < measured["kl"] < 0.02 and measured["flips"] < 0.05
    assert 15 < measured["latent_snr_db"] < 60
    assert found["paired_images"]["decoder_psnr_db"] > 35
