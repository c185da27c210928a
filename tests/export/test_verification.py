"""`verify --against`: a bundle beside the checkpoint it came from, or beside another."""

import json
from dataclasses import replace

import pytest
import torch

from bar_edge.export import verification
from bar_edge.export.verification import compare


def test_a_bundle_passes_beside_its_own_checkpoint(golden):
    found = compare(golden.runtime, golden.checkpoint, images=3, seed=4)
    assert found.passed
    assert found.tokens == 3 * golden.spec.num_tokens
    assert found.tokens_differing_without_tie == 0
    assert found.latent_error < 1e-4
    assert found.pixel_error <= 1
    assert json.loads(json.dumps(found.to_dict()))["engine"] == "onnxruntime"


def test_images_are_compared_a_few_at_a_time_and_none_is_left_out(patch1, monkeypatch):
    together = compare(patch1.runtime, patch1.checkpoint, images=3, seed=4)
    told = []
    monkeypatch.setattr(verification, "_TOGETHER", 2)
    parts = compare(
        patch1.runtime,
        patch1.checkpoint,
        images=3,
        seed=4,
        progress=lambda what, done, total: told.append((done, total)),
    )
    assert told == [(0, 3), (2, 3), (3, 3)]
    assert parts.tokens == together.tokens == 3 * patch1.spec.num_tokens
    assert parts.closest_decision == pytest.approx(together.closest_decision, rel=1e-2)
    assert parts.passed


def changed(tensors, name, change):
    return {**tensors, name: change(tensors[name].clone())}


@pytest.mark.parametrize(
    ("part", "name"),
    [("generator", "lm_head.output_embed.bias"), ("generator", "norm.weight"), ("tokenizer", "decoder.conv_out.bias")],
)
def test_a_bundle_fails_beside_a_checkpoint_with_other_weights(patch1, part, name):
    tensors = changed(getattr(patch1.checkpoint, part), name, lambda tensor: tensor + torch.randn_like(tensor))
    assert not compare(patch1.runtime, replace(patch1.checkpoint, **{part: tensors}), images=3, seed=4).passed


def test_a_slightly_different_generator_fails_even_if_no_bit_falls_otherwise(patch1):
    tensors = changed(patch1.checkpoint.generator, "latent_condition_proj.bias", lambda tensor: tensor + 0.02)
    found = compare(patch1.runtime, replace(patch1.checkpoint, generator=tensors), images=1, seed=4)
    assert found.latent_error > 1e-3
    assert not found.passed
