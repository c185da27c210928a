"""Smoothing moves numbers between tensors and changes nothing that the model computes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bar_edge.calibration import smoothing
from bar_edge.calibration.probe import ProbeEngine, linear_layers
from bar_edge.calibration.quantizer import write_weights
from bar_edge.calibration.trajectories import make_batch
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.weights import open_weights

TOLERANCE = 1e-4  # of the largest value
STEPS = 6


def groups_of(case) -> dict[str, list[str]]:
    return linear_layers(case.spec, weights.read_places(case.bundle.path / weights.FILE_NAME))


def foldable(case) -> list[str]:
    return [layer for group in groups_of(case).values() for layer in group if smoothing.producers(layer)]


def random_factors(layer: str, channels: int) -> np.ndarray:
    """Between about a tenth and ten, as different as can be from channel to channel."""
    rng = np.random.default_rng(list(layer.encode()))
    return np.exp(rng.uniform(-2.3, 2.3, channels)).astype(np.float32)


def outputs(bundle: Bundle, bits: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Latents, logits and pixels of a bundle led along the same bits, and what every layer saw."""
    spec = bundle.spec
    batch = make_batch(bundle, np.array([1, 4]), 3, range(2))
    known = np.random.default_rng(1).random((len(batch.recipe.allocation), 2, spec.bits_per_token)) < 0.5
    engine, latents, logits, seen = ProbeEngine(bundle, {}, threads=1), [], [], {}
    for n, step in engine.probe_walk(batch):
        step.lead(known, bits[:, n].astype(bool))
        step.run()
        latents.append(step.latent.copy())
        logits.append(step.seen["logits"].copy())
        for layer, value in step.inputs().items():
            seen.setdefault(layer, []).append(value.reshape(-1, value.shape[-1]).copy())
        step.drawn[:] = bits[:, n]
        if n + 1 == STEPS:
            break
    cells = np.random.default_rng(2).integers(0, 2, (1, spec.image_seq_len, spec.token_size))
    pixels = engine.decode(cells)
    seen_there = {layer: value.copy() for layer, value in engine.decoder_inputs(cells).items()}
    engine.close()
    found = {"latents": np.stack(latents), "logits": np.stack(logits), "pixels": pixels}
    return found, {layer: np.concatenate(values) for layer, values in seen.items()} | seen_there


class Smoothed:
    """The outputs of a bundle before and after smoothing."""

    def __init__(self, case, folder: Path) -> None:
        self.bundle, self.folder = case.bundle, folder
        self.tensors = open_weights(case.bundle.path)
        spec = case.spec
        self.bits = np.random.default_rng(0).integers(0, 2, (2, spec.num_tokens, spec.bits_per_token)).astype(np.uint8)
        self.exact, self.seen = outputs(self.bundle, self.bits)

    def factors(self, layer: str) -> np.ndarray:
        return random_factors(layer, self.tensors[f"{layer}.weight"].shape[1])

    def by(self, layers: Sequence[str]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Differences from the exact outputs, as fractions of the largest value, and what every layer saw."""
        tensors = dict(self.tensors)
        for layer in layers:
            smoothing.apply(tensors, layer, self.factors(layer))
        write_weights(self.folder, tensors, lambda what, done, total: None)
        found, seen = outputs(replace(self.bundle, path=self.folder), self.bits)
        return {
            name: float(np.abs(found[name] - exact).max() / np.abs(exact).max()) for name, exact in self.exact.items()
        }, seen


@pytest.fixture(scope="module")
def smoothed(small, tmp_path_factory) -> Smoothed:
    return Smoothed(small, tmp_path_factory.mktemp("smoothed"))


def test_each_foldable_layer_by_itself_changes_only_what_it_sees(smoothed, small):
    """Its input is divided by the factors, channel by channel, and every output stays what it was."""
    for layer in foldable(small):
        errors, seen = smoothed.by([layer])
        assert max(errors.values()) < TOLERANCE, (layer, errors)
        expected = smoothed.seen[layer] / smoothed.factors(layer)
        assert not np.allclose(seen[layer], smoothed.seen[layer], rtol=1e-2)
        np.testing.assert_allclose(seen[layer], expected, rtol=0, atol=1e-5 * np.abs(expected).max(), err_msg=layer)


@pytest.mark.parametrize("part", ["trunk", "head", "decode", "everything"])
def test_smoothing_layers_together_changes_no_output(smoothed, small, part):
    layers = foldable(small) if part == "everything" else [x for x in groups_of(small)[part] if smoothing.producers(x)]
    errors, seen = smoothed.by(layers)
    assert max(errors.values()) < TOLERANCE, errors
    for layer in layers:
        expected = smoothed.seen[layer] / smoothed.factors(layer)
        np.testing.assert_allclose(seen[layer], expected, rtol=0, atol=1e-4 * np.abs(expected).max(), err_msg=layer)


def test_the_trained_model_keeps_its_outputs_too(digits, tmp_path):
    errors, _ = Smoothed(digits, tmp_path).by(foldable(digits))
    assert max(errors.values()) < TOLERANCE, errors


def test_the_layers_that_can_be_smoothed_are_those_of_the_notes(small):
    layers = [layer for group in groups_of(small).values() for layer in group]
    exact = {
        *(f"blocks.{i}.{part}" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")),
        *(f"lm_head.transformer.{i}.mlp.{part}" for i in range(3) for part in ("w12", "w3")),
        "lm_head.output_embed", "decoder.ffn.0",
        *(x for x in layers if x.startswith("decoder.transformer.") and not x.endswith(".fc2")),
    }  # fmt: skip
    assert set(foldable(small)) == exact
    assert not smoothing.producers("decoder.transformer.0.mlp.fc2")  # behind a GELU


def test_stored_arrays_are_left_alone(small):
    tensors = {name: np.array(array) for name, array in open_weights(small.bundle.path).items()}
    before, changed = {name: array.copy() for name, array in tensors.items()}, dict(tensors)
    for layer in foldable(small):
        smoothing.apply(changed, layer, random_factors(layer, tensors[f"{layer}.weight"].shape[1]))
    for name, array in before.items():
        np.testing.assert_array_equal(tensors[name], array, err_msg=name)
    assert all(
        changed[name].dtype == np.float32 and changed[name].shape == array.shape for name, array in before.items()
    )
    assert any(changed[name] is not tensors[name] for name in changed)


def test_factors_even_out_inputs_and_weights():
    rng = np.random.default_rng(0)
    channel_max = np.exp(rng.uniform(-3, 3, 64)).astype(np.float32)
    weight = (rng.standard_normal((32, 64)) * np.exp(rng.uniform(-2, 2, 64))).astype(np.float32)
    for strength in (0.0, 0.3, 0.5, 0.9, 1.0):
        s = smoothing.factors(channel_max, weight, strength)
        assert s.dtype == np.float32 and np.exp(np.log(s).mean()) == pytest.approx(1, rel=1e-4)
        weight_max = np.abs(weight).max(axis=0)
        expected = channel_max**strength / weight_max ** (1 - strength)
        np.testing.assert_allclose(s / s[0], expected / expected[0], rtol=1e-3)
    even = channel_max / smoothing.factors(channel_max, weight, 1.0)
    assert even.max() / even.min() < 1.001


def test_channels_without_data_or_weights_keep_their_scale():
    """The padding of a SwiGLU: zeros in, zeros in the weights."""
    rng = np.random.default_rng(0)
    channel_max, weight = rng.uniform(1, 9, 8).astype(np.float32), rng.standard_normal((6, 8)).astype(np.float32)
    channel_max[2], weight[:, 5] = 0, 0
    s = smoothing.factors(channel_max, weight, 0.5)
    assert s[2] == s[5] == 1 and np.isfinite(s).all() and (s > 0).all()
    nothing = smoothing.factors(np.zeros(8, dtype=np.float32), weight, 0.5)
    np.testing.assert_array_equal(nothing, np.ones(8))
    extreme = smoothing.factors(np.geomspace(1e-30, 1e30, 8).astype(np.float32), weight + 1, 0.9)
    assert extreme.min() >= 1e-3 and extreme.max() <= 1e3
