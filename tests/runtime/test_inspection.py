"""The figures that decide a bundle's speed."""

import pytest
import torch

from bar_edge.export.checkpoint import Checkpoint, generator_shapes, tokenizer_shapes
from bar_edge.export.rewrite import Rewriter
from bar_edge.runtime import weights
from bar_edge.runtime.inspection import bytes_per_token, describe_bundle
from bar_edge.runtime.spec import VARIANTS


def places_of(name: str) -> dict:
    """Where the weights of a published variant would lie, without any weights."""
    variant = VARIANTS[name]
    spec = variant.spec
    shapes = (
        generator_shapes(spec),
        tokenizer_shapes(1024, 24, spec.token_size, spec.image_seq_len, spec.decoder_patch_size),
    )
    tensors = [{key: torch.empty(shape, device="meta") for key, shape in part.items()} for part in shapes]
    return weights.lay_out(Rewriter(Checkpoint(spec, variant.recipe, name, *tensors)).pending)[1]


def test_bytes_per_token_of_bar_b_are_those_of_the_model_notes():
    """About 170 + 46 + 4 * 101 = 620 million weights."""
    assert bytes_per_token(places_of("bar_b"), 4) / 4e6 == pytest.approx(620, rel=0.02)


def test_every_further_pass_reads_the_heads_products_again():
    places = places_of("bar_b")
    each = bytes_per_token(places, 5) - bytes_per_token(places, 4)
    assert each / 4e6 == pytest.approx(101, rel=0.02)
    assert bytes_per_token(places, 9) - bytes_per_token(places, 8) == each


def test_what_is_read_once_per_image_is_not_read_per_token(digits):
    facts = describe_bundle(digits.bundle)
    stored = facts["weights"]["bytes"]
    once = bytes_per_token(weights.read_places(digits.bundle.path / weights.FILE_NAME), 1)
    assert 0 < facts["bytes_read_per_image_once"] < stored - once
    assert facts["bytes_read_per_token"] > once
