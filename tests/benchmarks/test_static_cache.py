"""The static-cache form of the reference draws what the reference draws."""

import copy

import numpy as np
import pytest

from bar_edge.benchmarks.static_cache import StaticCacheSampler
from bar_edge.export.model import generate_bits
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.spec import Recipe


def plain(function):
    """In the place of the compiler."""
    return function


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_bits_are_those_of_the_growing_cache(golden, guidance):
    recipe = Recipe(guidance, 2.0, golden.checkpoint.recipe.allocation)
    noise, class_ids = SeededNoise(5, range(2)), [0, 1]
    sampler = StaticCacheSampler(copy.deepcopy(golden.reference), 2, recipe, plain)
    steps = []
    drawn = sampler.sample(class_ids, noise, lambda done, total: steps.append((done, total)))
    expected = generate_bits(golden.reference, class_ids, recipe, noise)
    assert np.array_equal(drawn.numpy(), expected.numpy())
    assert steps == [(n + 1, golden.spec.num_tokens) for n in range(golden.spec.num_tokens)]


def test_a_sampler_draws_the_same_again_and_takes_a_generator_from_another(small):
    model, noise = copy.deepcopy(small.reference), SeededNoise(1, range(1))
    recipe = small.checkpoint.recipe
    first = StaticCacheSampler(model, 1, recipe, plain)
    drawn = first.sample([0], noise)
    assert np.array_equal(drawn, first.sample([0], noise))  # what the last image left in the cache is not seen
    StaticCacheSampler(model, 2, recipe, plain)
    assert np.array_equal(drawn, StaticCacheSampler(model, 1, recipe, plain).sample([0], noise))


def test_a_sampler_stays_on_the_models_device(small):
    """PyTorch refuses to mix devices: a tensor made on the CPU would be found."""
    model = copy.deepcopy(small.reference).to("meta")
    sampler = StaticCacheSampler(model, 2, small.checkpoint.recipe, plain)
    assert sampler.sample([0, 1], SeededNoise(1, range(2))).device.type == "meta"
