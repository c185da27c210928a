"""The figures that decide a bundle's speed."""

import pytest

from bar_edge.runtime import weights
from bar_edge.runtime.inspection import bytes_per_token, describe_bundle


def test_bytes_per_token_of_bar_b_are_those_of_the_model_notes(places_of):
    """About 170 + 46 + 4 * 101 = 620 million weights."""
    assert bytes_per_token(places_of("bar_b"), 4) / 4e6 == pytest.approx(620, rel=0.02)


def test_every_further_pass_reads_the_heads_products_again(places_of):
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
