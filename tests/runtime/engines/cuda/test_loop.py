"""The GPU loop draws what the ONNX Runtime engine draws: every bit, on graphs and kernels executed on the CPU."""

import numpy as np
import pytest

from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.spec import Recipe

from .emulated import emulated_loop


def batch_of(case, classes, recipe, *, random_order=False, seed=3):
    noise = SeededNoise(seed, range(5, 5 + len(classes)), random_order=random_order)
    return Batch(np.array(classes), recipe, noise, noise.orders(case.bundle.spec.num_tokens))


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "apart"])
def test_the_loop_draws_what_onnxruntime_draws(golden, host, tmp_path, in_place):
    spec, recipe = golden.bundle.spec, golden.bundle.recipe
    loop, device, graphs = emulated_loop(
        golden.bundle, host, tmp_path, Profile.of(3, guided=True, passes=len(recipe.allocation)), in_place=in_place
    )
    batch = batch_of(golden, [1, 0, 1], Recipe(3.0, recipe.temperature, recipe.allocation), random_order=True)
    engine = golden.runtime._engine
    expected = engine.sample(batch)
    np.testing.assert_array_equal(loop.sample(batch), expected)
