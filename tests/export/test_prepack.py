"""`compile --target cuda`: weights lie as the kernels read them, and mean what they meant."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from bar_edge.calibration.quantize import Choice, from_blocks, stored
from bar_edge.export.prepack import prepack_bundle, prepacked, sentence
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import SELFTEST, Bundle
from bar_edge.runtime.cli import app
from bar_edge.runtime.engines.cuda.resident import CHUNK_INPUTS, TILE, Weights
from bar_edge.runtime.errors import BundleError, CompatibilityError, RequestError
from bar_edge.runtime.inspection import linear_layers
from bar_edge.runtime.precisions import BITS

W12, QKV = "blocks.1.mlp.w12", "blocks.0.attn.qkv"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A bundle for `cuda`, its account and its tensors."""
    known = {}

    def make(bundle):
        if bundle.path not in known:
            made = prepack_bundle(bundle, tmp_path_factory.mktemp("prepack") / "bundle")
            known[bundle.path] = made, made.manifest["engines"]["cuda"], weights.open_weights(made.path)
        return known[bundle.path]

    return make


def unpacked(tensors, layer, entry):
    """weight [out, in] that a packed layer stands for."""
    chunks, outputs, form = tensors[f"{layer}.weight_chunks"], len(tensors[f"{layer}.bias"]), entry["form"]
    if form == "fp16":
        stored = chunks.view(np.float16).astype(np.float64)
    elif form == "int4-weight":
        stored = np.stack([chunks & 15, chunks >> 4], axis=-1).reshape(len(chunks), -1).astype(np.float64) - 8
    else:
        stored = chunks.view(np.int8).astype(np.float64) if form == "int8" else chunks.astype(np.float64) - 128
    inputs = -(-entry["in_features"] // CHUNK_INPUTS[form]) * CHUNK_INPUTS[form]
    o, k = np.ogrid[: -(-outputs // TILE) * TILE, :inputs]
    lane, of_lane = 4 * (o % TILE) + k % 16 // 4, CHUNK_INPUTS[form] // 4
    step, i = k % CHUNK_INPUTS[form] // 16, k % 4
    within = 4 * step + i
    if form == "int4-weight":  # eight values of a word, of two steps: in each half of it one of every pair
        within = 8 * (step // 2) + 2 * (step % 2) + i // 2 + 4 * (i % 2)
    values = stored[o // TILE, k // CHUNK_INPUTS[form] * 32 * of_lane + lane * of_lane + within]
    assert stored.size == values.size
    assert not values[outputs:].any() and not values[:, entry["in_features"] :].any()  # what was filled up
    values = values[:outputs, : entry["in_features"]]
    if f"{layer}.block_scale" in tensors:
        scale = tensors[f"{layer}.block_scale"].astype(np.float64)
        return values * np.repeat(scale, entry["in_features"] // scale.shape[1], axis=1)
    return values * tensors[f"{layer}.weight_scale"][:, None] if f"{layer}.weight_scale" in tensors else values


def original(tensors, layer, form):
    """weight [out, in] of the bundle that was packed."""
    if form == "int8":
        return tensors[f"{layer}.weight_int8"].T.astype(np.float64) * tensors[f"{layer}.weight_scale"][:, None]
    if form in BITS:
        return from_blocks(tensors[f"{layer}.weight_blocks{BITS[form]}"], tensors[f"{layer}.block_scale"], BITS[form])
    return tensors[f"{layer}.weight" if f"{layer}.weight" in tensors else f"{layer}.weight_fp16"]


@pytest.mark.parametrize("form", ["fp32", "int8", "int8-weight", "int4-weight"])
def test_every_layer_means_what_it_meant(small, packed, form):
    source = small.bundle if form == "fp32" else small.quantized(form)
    before, (_, account, after) = weights.open_weights(source.path), packed(source)
    stored = linear_layers(weights.read_places(source.path / weights.FILE_NAME))
    assert set(account["layers"]) == {*stored, "lm_head.t_embedder.mlp.0", "lm_head.t_embedder.mlp.2"}
    for layer, entry in account["layers"].items():
        kind = stored.get(layer, "fp32")
        assert entry["form"] == ("fp16" if kind == "fp32" else kind)
        weight, bias = original(before, layer, entry["form"]), before[f"{layer}.bias"]
        if layer.endswith(".w12"):
            weight, bias = (np.stack(np.split(x, 2), axis=1).reshape(x.shape) for x in (weight, bias))
        np.testing.assert_allclose(unpacked(after, layer, entry)[:, : weight.shape[1]], weight, rtol=1e-3, atol=6e-8)
        np.testing.assert_array_equal(after[f"{layer}.bias"], bias)


def layer_of(form, outputs, inputs):
    """The tensors of one layer, as a bundle stores it."""
    rng = np.random.default_rng(0)
    weight, ones = rng.standard_normal((outputs, inputs), dtype=np.float32), np.ones(inputs, dtype=np.float32)
    choice = Choice(form, 0.0, None, 0.1, None, 40.0)
    weights_of_it = {"layer.weight": weight} if form == "fp32" else stored("layer", choice, weight, ones)
    return {**weights_of_it, "layer.bias": rng.standard_normal(outputs, dtype=np.float32)}


@pytest.mark.parametrize("form", ["fp32", "int8", "int8-weight", "int4-weight"])
def test_what_does_not_fill_tiles_and_chunks_is_filled_up_with_zeros(form):
    before = layer_of(form, 20, 80)
    pending, layers = prepacked(before, {"layer": form})
    after = {name: tensor.make() for name, tensor in pending.items()}
    found = unpacked(after, "layer", layers["layer"])
    np.testing.assert_allclose(found, original(before, "layer", form), rtol=1e-3, atol=6e-8)


@pytest.mark.parametrize("form", ["int8", "int8-weight", "int4-weight"])
def test_inputs_that_integer_kernels_cannot_take_are_refused(form):
    with pytest.raises(CompatibilityError, match=f"layer: has 72 inputs in {form}, the kernels take multiples of 16"):
        prepacked(layer_of(form, 64, 72), {"layer": form})


def test_w12_alternates_between_its_halves(patch1, packed):
    before, (_, _, after) = weights.open_weights(patch1.bundle.path), packed(patch1.bundle)
    half = len(before[f"{W12}.bias"]) // 2
    np.testing.assert_array_equal(after[f"{W12}.bias"][:4], before[f"{W12}.bias"][[0, half, 1, half + 1]])


def test_what_is_loaded_16_bytes_at_a_time_is_aligned(golden, packed):
    made, account, _ = packed(golden.bundle)
    places = weights.read_places(made.path / weights.FILE_NAME)
    assert all(places[f"{layer}.weight_chunks"].offset % weights.ALIGNMENT == 0 for layer in account["layers"])


def test_everything_else_stays_as_it_is(patch1, packed):
    before, (_, account, after) = weights.open_weights(patch1.bundle.path), packed(patch1.bundle)
    others = {name for name in before if name.rpartition(".")[0] not in account["layers"]}
    assert {"rope_cos", "symbol_embedding", "decoder.conv_out.weight"} <= others <= set(after)
    for name in others:
        np.testing.assert_array_equal(after[name], before[name])


def test_the_bundle_says_what_it_is_and_carries_the_selftest(small, packed):
    source = small.quantized("int8")
    made, account, _ = packed(source)
    assert made.engines == ("cuda",) and not made.graphs
    assert (account["family"], account["precision"]) == (2, "fp16")
    assert (made.path / SELFTEST).read_bytes() == (source.path / SELFTEST).read_bytes()
    assert made.manifest["provenance"]["source"]["digest"] == source.digest
    assert made.manifest["quantization"] == source.manifest["quantization"]
    assert (made.spec, made.recipe) == (source.spec, source.recipe)
    Weights(made)


def test_two_of_the_same_are_the_same(patch1, packed, tmp_path):
    assert prepack_bundle(patch1.bundle, tmp_path / "again").digest == packed(patch1.bundle)[0].digest


def test_weights_that_float16_cannot_hold_are_refused(bundle_copy, reseal, tmp_path):
    place = weights.read_places(bundle_copy / weights.FILE_NAME)[f"{QKV}.weight"]
    with (bundle_copy / weights.FILE_NAME).open("r+b") as file:
        file.seek(place.offset)
        file.write(np.float32(1e6).tobytes())
    reseal(bundle_copy)
    with pytest.raises(BundleError, match="not finite in float16"):
        prepack_bundle(Bundle.open(bundle_copy), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_asymmetric_activations_are_refused(bundle_copy, edit_manifest, tmp_path):
    edit_manifest(bundle_copy, lambda manifest: manifest.update(quantization={"activations": "asymmetric"}))
    with pytest.raises(CompatibilityError, match="which only ONNX Runtime runs; quantize without --asymmetric"):
        prepack_bundle(Bundle.open(bundle_copy), tmp_path / "out")


def test_what_is_compiled_is_not_compiled_again(patch1, packed, tmp_path):
    with pytest.raises(RequestError, match="is compiled already"):
        prepack_bundle(packed(patch1.bundle)[0], tmp_path / "out")


def test_what_it_is_made_of_is_never_replaced(bundle_copy):
    with pytest.raises(BundleError, match="which it is made of"):
        prepack_bundle(Bundle.open(bundle_copy), bundle_copy, force=True)
    Bundle.open(bundle_copy)


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def test_compile_makes_it_and_says_what_it_holds(small, tmp_path):
    done = run("compile", small.quantized("int8").path, "--target", "cuda", "-o", tmp_path / "out")
    made = Bundle.open(tmp_path / "out")
    assert done.stdout.replace("\n", "").startswith(f"{tmp_path / 'out'}: kernel family 2, fp16, ")
    size = made.file_bytes(weights.FILE_NAME) / 2**20
    assert sentence(made).removeprefix("kernel family 2, fp16, layers ").split(", ") == [
        *_forms(made),
        f"{size:.1f} MiB of weights",
    ]


def test_the_size_of_a_bundle_is_told_in_mib(patch1, packed):
    made = packed(patch1.bundle)[0]
    files = {weights.FILE_NAME: {"bytes": 1000 * 2**20, "sha256": ""}}
    assert sentence(replace(made, manifest={**made.manifest, "files": files})).endswith(", 1000.0 MiB of weights")


def _forms(made):
    forms = [entry["form"] for entry in made.manifest["engines"]["cuda"]["layers"].values()]
    return [f"{form} x{forms.count(form)}" for form in sorted(set(forms), key=forms.count, reverse=True)]


@pytest.mark.parametrize("option", [("--batch", 2), ("--precision", "fp32"), ("--keep-onnx", "graphs")])
def test_options_of_other_targets_are_refused(patch1, tmp_path, option):
    with pytest.raises(RequestError, match="--target cuda takes fp16 and any batch"):
        run("compile", patch1.bundle.path, "--target", "cuda", *option, "-o", tmp_path / "out")


def test_inspect_describes_it(patch1, packed):
    facts = json.loads(run("inspect", packed(patch1.bundle)[0].path, "--json").stdout)
    assert facts["weights"]["tensors"] > 0
