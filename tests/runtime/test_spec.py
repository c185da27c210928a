"""What a model is in numbers, and which allocations it takes."""

import math

import pytest

from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.spec import VARIANTS, ModelSpec, Recipe, find_variant

TABLE = {  # N, K, pixels, guidance, temperature, bits unmasked per pass
    "bar_b_patch4": (16, 256, 256, 9.6, 1.4, (64, 64, 64, 64)),
    "bar_b_patch2": (64, 64, 256, 5.5, 2.0, (16, 16, 16, 16)),
    "bar_b": (256, 16, 256, 5.0, 2.5, (2, 2, 5, 7)),
    "bar_l": (256, 16, 256, 5.3, 3.0, (2, 2, 5, 7)),
    "bar_l_res512": (1024, 10, 512, 4.2, 2.8, (2, 2, 2, 4)),
}


@pytest.mark.parametrize("name", TABLE)
def test_published_variants_have_the_published_numbers(name):
    variant = VARIANTS[name]
    spec, recipe = variant.spec, variant.recipe
    assert (spec.num_tokens, spec.bits_per_token, spec.image_size) == TABLE[name][:3]
    assert (recipe.guidance, recipe.temperature, recipe.allocation) == TABLE[name][3:]
    assert recipe.validated(spec.bits_per_token) is recipe
    assert find_variant(spec) is variant


def test_there_is_no_other_variant():
    assert VARIANTS.keys() == TABLE.keys()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_spec_survives_json(name):
    spec = VARIANTS[name].spec
    assert ModelSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    "change", [{"hidden_size": 0}, {"hidden_size": -1}, {"num_layers": 2.0}, {"patch_size": True}, {"x": 1}, None]
)
def test_a_spec_that_is_not_positive_integers_under_the_known_names_is_refused(change):
    values = VARIANTS["bar_b"].spec.to_dict()
    if change is None:
        del values["token_size"]
    with pytest.raises(ValueError, match="model field"):
        ModelSpec.from_dict({**values, **(change or {})})


@pytest.mark.parametrize("allocation", [(16,), (1,) * 16, (2, 2, 5, 7), (8, 8)])
def test_allocations_that_fit(allocation):
    assert Recipe(1, 1, allocation).validated(16).allocation == allocation


@pytest.mark.parametrize("allocation", [(), (15,), (2, 2, 5, 8), (7, 5, 2, 2), (0, 16), (-1, 17), (2, 5, 4, 5)])
def test_allocations_that_do_not_fit_are_refused_with_their_numbers(allocation):
    with pytest.raises(RequestError, match=f"allocation {','.join(map(str, allocation)) or '.empty.'} does not fit"):
        Recipe(1, 1, allocation).validated(16)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf])
@pytest.mark.parametrize("name", ["guidance", "temperature"])
def test_guidance_and_temperature_must_be_finite_and_not_negative(name, value):
    values = {"guidance": 1.0, "temperature": 1.0, name: value}
    with pytest.raises(RequestError, match=f"{name} must be a finite number"):
        Recipe(values["guidance"], values["temperature"], (4,)).validated(4)
