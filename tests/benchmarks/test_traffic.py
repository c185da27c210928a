"""Bytes and operations that a batch cannot avoid."""

from dataclasses import replace

import numpy as np
import pytest

from bar_edge.benchmarks import traffic
from bar_edge.runtime import weights
from bar_edge.runtime.errors import CompatibilityError
from bar_edge.runtime.inspection import bytes_per_token
from bar_edge.runtime.precisions import PRECISIONS, WEIGHT_TENSORS
from bar_edge.runtime.spec import Recipe


def test_trunk_and_head_together_read_what_inspect_says(small):
    found = traffic.of_bundle(small.bundle)
    places = weights.read_places(small.bundle.path / weights.FILE_NAME)
    assert found.trunk[0] + found.head[0] == bytes_per_token(places, len(small.bundle.recipe.allocation))
    assert found.trunk[0] > 0 and found.head[0] > 0 and found.decode[0] > 0


def test_quantizing_changes_bytes_and_leaves_operations(small):
    exact, four = traffic.of_bundle(small.bundle), traffic.of_bundle(small.quantized("int4-weight"))
    assert four.trunk[0] < exact.trunk[0] / 2
    assert four.trunk[1] == pytest.approx(exact.trunk[1], rel=0.2)  # blocks are padded to a whole number
    assert four.head[1] == pytest.approx(exact.head[1], rel=0.2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_are_counted_however_they_are_stored(precision):
    items = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}.get(precision, np.uint8)
    columns = 64 if precision == "int4-weight" else 128  # two values a byte
    place = weights.StoredTensor(np.dtype(items), (8, columns), 0)
    assert traffic._weights(f"blocks.0.mlp.w3.{WEIGHT_TENSORS[precision]}", place) == 8 * 128


def test_the_reference_reads_more_than_the_bundle(small):
    recipe = small.checkpoint.recipe
    loop = traffic.of_modules(small.reference, small.decoder, len(recipe.allocation))
    ours = traffic.of_bundle(small.bundle)
    assert loop.trunk[0] > ours.trunk[0] and loop.head[0] > ours.head[0]


def test_a_bundle_for_cuda_reads_half_the_bytes_and_computes_as_much(small, prepacked):
    exact, ours = traffic.of_bundle(small.bundle), traffic.of_bundle(prepacked)
    together = [sum(part) for part in zip(exact.trunk, exact.head, strict=True)]
    found = [sum(part) for part in zip(ours.trunk, ours.head, strict=True)]
    assert found[0] == pytest.approx(together[0] / 2, rel=0.1)  # tables stay in fp32
    assert found[1] == pytest.approx(together[1], rel=0.05)  # inputs are filled up
    assert ours.decode[1] == pytest.approx(exact.decode[1], rel=0.05)
    assert ours.head[0] < exact.head[0] / 2 and ours.head[1] < exact.head[1]  # its modulation is computed in the trunk
    assert (exact.cache_item, ours.cache_item) == (4, 2)


def test_a_bundle_of_plans_does_not_tell_its_weights(small):
    plans = replace(small.bundle, manifest={**small.bundle.manifest, "engines": {"tensorrt": {}}})
    with pytest.raises(CompatibilityError, match="holds plans and not weights"):
        traffic.of_bundle(plans)


@pytest.mark.parametrize("name", ["patch1_10bit", "patch4"])  # with patches there are fewer tokens than cells
def test_weights_are_read_once_a_batch_and_the_cache_once_a_row(stated_spec, data, name):
    spec = stated_spec(data / "golden" / name / "config.yaml")
    recipe = Recipe(2.0, 1.0, (spec.bits_per_token,))
    found = traffic.Traffic(trunk=(1000, 10), head=(100, 5), decode=(7, 3))
    one, eight = (found.of_batch(spec, recipe, images) for images in (1, 8))
    tokens = spec.num_tokens
    assert one["head"] == traffic.Work(100 * tokens, 2 * tokens * 2 * 5)
    assert eight["head"].bytes == one["head"].bytes and eight["head"].flops == 8 * one["head"].flops
    cache = one["trunk"].bytes - 1000 * tokens
    assert eight["trunk"].bytes == 1000 * tokens + 8 * cache
    filled = sum(spec.prefix_length + n for n in range(tokens))
    assert cache == 2 * filled * 2 * spec.num_layers * spec.hidden_size * 4
    assert one["decode"] == traffic.Work(7, 2 * spec.image_seq_len * 3)
    assert eight["decode"] == traffic.Work(7, 8 * 2 * spec.image_seq_len * 3)
    unguided = found.of_batch(spec, Recipe(1.0, 1.0, recipe.allocation), 1)
    assert unguided["trunk"].bytes - 1000 * tokens == cache // 2
