"""A quantized bundle is what it says, layer by layer, draws every image by itself, or is not written at all."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from bar_edge.calibration import quantizer
from bar_edge.calibration.probe import linear_layers
from bar_edge.calibration.quantize import choose, quantizable, stored
from bar_edge.calibration.quantizer import SENSITIVITY_PLOT, quantize_bundle, read_precisions, summary
from bar_edge.export.prepack import prepack_bundle
from bar_edge.runtime import selftest, weights
from bar_edge.runtime.bundle import SELFTEST, Bundle
from bar_edge.runtime.errors import BundleError, CalibrationError, RequestError
from bar_edge.runtime.generator import Generator

STORED = {
    "fp32": {"weight"},
    "int8": {"weight_int8", "weight_scale", "input_scale"},
    "int8-weight": {"weight_blocks8", "block_scale"},
    "int4-weight": {"weight_blocks4", "block_scale"},
}


def groups_of(bundle: Bundle) -> dict[str, list[str]]:
    return linear_layers(bundle.spec, weights.read_places(bundle.path / weights.FILE_NAME))


def layers_of(bundle: Bundle) -> dict[str, str]:
    """What the manifest says each layer is executed in."""
    return {layer: entry["precision"] for layer, entry in bundle.manifest["quantization"]["layers"].items()}


def parts_of(bundle: Bundle, layer: str) -> set[str]:
    places = weights.read_places(bundle.path / weights.FILE_NAME)
    return {name.removeprefix(f"{layer}.") for name in places if name.rpartition(".")[0] == layer} - {"bias"}


@pytest.fixture
def quantize(small, tmp_path) -> Callable[..., Bundle]:
    """Quantize the small bundle, by default without measuring."""

    def run(**options: object) -> Bundle:
        chosen = {"precision": "int8", "measure": False, "threads": 1, **options}
        return quantize_bundle(small.bundle, small.calibration, tmp_path / "quantized", **chosen)

    return run


@pytest.fixture
def timed(monkeypatch) -> Callable[[dict[str, float]], None]:
    """Say how many times as fast each graph is once it is quantized."""

    def say(speed: dict[str, float]) -> None:
        def seconds(bench: object, graph: str, first: dict[str, str], second: dict[str, str]) -> tuple[float, float]:
            assert not first
            if graph == "step":
                graph = "head" if any(layer.startswith("lm_head.") for layer in second) else "trunk"
            return 1.0, 1 / speed[graph] if second else 1.0

        monkeypatch.setattr(quantizer._Bench, "seconds", seconds)

    return say


# -- what is written ---------------------------------------------------------------------------------------------------


def test_every_graph_executes_what_the_manifest_says(digits, precision):
    """Read back from the operators that read the weights; none is fp32 unsaid."""
    bundle, layers = digits.quantized(precision), layers_of(digits.quantized(precision))
    assert layers.keys() == {layer for group in groups_of(digits.bundle).values() for layer in group}
    seen = {}
    for name, entry in bundle.manifest["graphs"].items():
        found = read_precisions(onnx.load(bundle.graph(name), load_external_data=False), list(layers))
        assert found == {layer: layers[layer] for layer in found}, name
        assert summary(found) == entry["precision"], name
        seen |= found
    assert seen == layers


def test_every_large_layer_is_quantized_to_what_was_asked_for(digits):
    places = weights.read_places(digits.bundle.path / weights.FILE_NAME)
    for precision in STORED.keys() - {"fp32"}:
        layers = layers_of(digits.quantized(precision))
        for graph, group in groups_of(digits.bundle).items():
            wanted = precision if graph in ("trunk", "head") else "int8"  # many rows at once: weight-only does not pay
            for layer in group:
                large = quantizable(*places[f"{layer}.weight"].shape)
                assert layers[layer] == (wanted if large else "fp32"), layer
        fp32 = [layer for layer, kind in layers.items() if kind == "fp32"]
        assert fp32 == ["lm_head.output_embed", "quantize.out_proj"]


def test_weights_are_stored_once_in_their_precision(digits, precision):
    """No float32 twin is left of what was quantized, and nothing integer of what was not."""
    bundle = digits.quantized(precision)
    for layer, kind in layers_of(bundle).items():
        assert parts_of(bundle, layer) == STORED[kind], layer
    size = {
        name: (b.path / weights.FILE_NAME).stat().st_size for name, b in (("fp32", digits.bundle), ("ours", bundle))
    }
    assert size["ours"] < {"int8": 0.33, "int8-weight": 0.33, "int4-weight": 0.28}[precision] * size["fp32"]
    assert {entry.name for entry in bundle.path.iterdir()} == {*bundle.manifest["files"], "manifest.json"}


def test_a_quantized_bundle_proves_itself_and_keeps_its_quality(digits, precision):
    """The demo's targets: at most 1 % of decisions flip with 8 bits, 3 % with 4."""
    bundle = digits.quantized(precision)
    with Generator(bundle, threads=1) as runtime:
        tested = selftest.run(runtime)
    assert tested.passed, tested.sentence
    measured = bundle.manifest["quantization"]["quality"]
    assert 0 < measured["flips"] < {"int8": 0.01, "int8-weight": 0.01, "int4-weight": 0.03}[precision]
    assert measured["latent_snr_db"] > {"int8": 28, "int8-weight": 35, "int4-weight": 18}[precision]
    assert (bundle.spec, bundle.recipe) == (digits.bundle.spec, digits.bundle.recipe)
    assert bundle.manifest["provenance"]["source"]["digest"] == digits.bundle.digest


def test_an_image_does_not_depend_on_its_company(digits, precision):
    with Generator(digits.quantized(precision), threads=1) as runtime:
        classes = list(range(8))
        together = runtime.generate(classes, seed=5, batch_size=8, return_bits=True)[1]
        # the same places in the batch, other neighbours
        other = runtime.generate([9 - c if c % 2 else c for c in classes], seed=5, batch_size=8, return_bits=True)[1]
        np.testing.assert_array_equal(together[::2], other[::2])
        assert (together[1::2] != other[1::2]).any()
        alone = runtime.generate(classes, seed=5, batch_size=1, return_bits=True)[1]
        np.testing.assert_array_equal(together, alone)


def test_the_same_calibration_gives_the_same_bundle(quantize, small):
    assert quantize().digest == quantize(force=True).digest


def test_the_manifest_tells_where_the_ranges_are_from(small, quantize):
    found = quantize(observer="percentile").manifest["quantization"]
    assert (found["precision"], found["observer"], found["timings"]) == ("int8", "percentile", [])
    assert found["calibration"] == {
        "data": "trajectories", "images": 8, "seed": 1000, "bundle": small.bundle.digest,
    }  # fmt: skip
    for entry in found["layers"].values():
        assert entry["precision"] == "fp32" or (entry["snr_db"] > 10 and 0 <= entry["smoothing"] < 1)


def test_what_is_stored_is_what_the_choice_was_made_of(small, quantize):
    """Of layers that are smoothed, and whose own outputs nobody smooths."""
    found = quantize(precision="int4-weight")
    entries, tensors = found.manifest["quantization"]["layers"], weights.open_weights(small.bundle.path)
    after = weights.open_weights(found.path)
    layers = [layer for layer, entry in entries.items() if layer.endswith(".mlp.w3") and entry.get("smoothing")]
    assert layers
    for layer in layers:
        stats, weight = small.calibration.stats[layer], np.asarray(tensors[f"{layer}.weight"])
        choice = choose(stats, weight, "int4-weight", "mse", foldable=True)
        assert choice.strength == entries[layer]["smoothing"] and round(choice.snr_db, 2) == entries[layer]["snr_db"]
        expected = stored(layer, choice, weight * choice.factors, stats.mean_square / choice.factors**2)
        for name, array in expected.items():
            np.testing.assert_array_equal(after[name], array, err_msg=name)


def test_quality_is_told_of_images_that_were_not_calibrated_on(small, quantize, monkeypatch):
    def noted(engine, bundle, *, images, seed, progress):
        drawn.append((bundle.digest, seed, images))
        return record(engine, bundle, images=images, seed=seed, progress=progress)

    drawn, record = [], quantizer.record
    monkeypatch.setattr(quantizer, "record", noted)
    found = quantize(precision="int8-weight")
    ((digest, seed, images),) = drawn
    assert digest == small.bundle.digest and seed != small.calibration.plan.seed
    assert found.manifest["quantization"]["quality"]["images"] == images


@pytest.mark.parametrize("sure", [0, 2])
def test_the_image_that_is_farthest_from_a_tie_is_recorded(small, quantize, monkeypatch, sure):
    """The closest of all its decisions counts, not that of the last token."""
    margins = np.full((small.spec.num_tokens, 4), 1.0)
    margins[3] = 0.1
    margins[:, sure] = 0.5
    by_token = iter(margins)
    monkeypatch.setattr(quantizer, "sample_token", lambda *arguments: (None, next(by_token)))
    found = quantize(precision="int8-weight")
    assert selftest.Record.load(found.path / SELFTEST, found.spec).image_index == sure


def test_layers_to_keep_stay_fp32_and_nothing_else_does(small, quantize):
    keep = ("blocks.1.mlp.w3", "lm_head.transformer.0.mlp.w12", "decoder.transformer.0.attn.qkv", "quantize.out_proj")
    plain, bundle = layers_of(small.quantized("int8-weight")), quantize(precision="int8-weight", keep_fp32=keep)
    assert layers_of(bundle) == {layer: "fp32" if layer in keep else kind for layer, kind in plain.items()}
    for layer in keep:
        assert parts_of(bundle, layer) == {"weight"}
    with Generator(bundle, threads=1) as runtime:
        assert selftest.run(runtime).passed


def test_a_slow_prefix_outweighs_a_faster_trunk(small, quantize, timed):
    """They share their layers: what counts is the image, one prefix and 16 tokens."""
    timed({"modulation": 2.0, "trunk": 1.2, "prefix": 0.1, "head": 2.0, "decode": 2.0})
    layers = layers_of(quantize(measure=True))
    assert {layers[layer] for layer in groups_of(small.bundle)["trunk"]} == {"fp32"}


def test_a_layer_can_be_stored_as_float16(small, quantize):
    keep = ("blocks.1.mlp.w3", "decoder.transformer.0.attn.qkv")
    plain, bundle = layers_of(small.quantized("int8-weight")), quantize(precision="int8-weight", keep_fp16=keep)
    assert layers_of(bundle) == {layer: "fp16" if layer in keep else kind for layer, kind in plain.items()}
    for layer in keep:
        assert parts_of(bundle, layer) == {"weight_fp16"}
    with Generator(bundle, threads=1) as runtime:
        assert selftest.run(runtime).passed


def test_asymmetric_activations_serve_what_is_mostly_positive(small, quantize):
    bundle = quantize(asymmetric=True)
    found, plain = (b.manifest["quantization"] for b in (bundle, small.quantized("int8")))
    assert (found["activations"], plain["activations"]) == ("asymmetric", "symmetric")
    better = [
        found["layers"][layer]["snr_db"] > plain["layers"][layer]["snr_db"]
        for layer in plain["layers"]
        if layer.endswith(".fc2")  # behind GELU; what w3 sees is a product, and as often negative
    ]
    assert all(better)
    with Generator(bundle, threads=1) as runtime:
        assert selftest.run(runtime).passed


# -- timing and budget -------------------------------------------------------------------------------------------------


def test_each_graph_keeps_what_is_faster(small, quantize, timed):
    timed({"modulation": 0.9, "trunk": 3.0, "prefix": 0.5, "head": 1.04, "decode": 1.5})
    bundle = quantize(precision="int8-weight", measure=True)
    groups, layers = groups_of(small.bundle), layers_of(bundle)
    plain = layers_of(small.quantized("int8-weight"))
    for graph, group in groups.items():
        kept = graph in ("trunk", "decode")
        assert {layer: layers[layer] for layer in group} == {
            layer: plain[layer] if kept else "fp32" for layer in group
        }, graph
        assert all(parts_of(bundle, layer) == STORED[layers[layer]] for layer in group)
    sentences = dict(sentence.split(": ", 1) for sentence in bundle.manifest["quantization"]["timings"])
    assert sentences.keys() == {*groups, "prefix"}
    assert sentences["prefix"].startswith("0.50 x fp32") and "goes with the trunk" in sentences["prefix"]
    assert sentences["trunk"].startswith(
        "3.00 x fp32 (333.3 ms against 1000.0 ms for a token with its head in fp32), kept"
    )
    assert all(sentences[graph].endswith("kept fp32") for graph in ("modulation", "head"))
    assert bundle.manifest["graphs"]["modulation"]["precision"] == "fp32 x2"


def test_the_two_forms_of_a_graph_take_turns_and_the_fastest_call_of_each_counts(monkeypatch):
    clock, calls = [0.0], []

    def forms(bench: object, graph: str, precisions: dict[str, str]) -> Callable[[], None]:
        form = "quantized" if precisions else "fp32"

        def call() -> None:
            clock[0] += (5 if form == "fp32" else 2) + (3 if len(calls) < 6 else 0)  # another program, in the beginning
            calls.append(form)

        return call

    monkeypatch.setattr(quantizer._Bench, "_run", forms)
    monkeypatch.setattr(quantizer.time, "perf_counter", lambda: clock[0])
    assert quantizer._Bench(None, Path(), {}, 1).seconds("decode", {}, {"decoder.ffn.0": "int8"}) == (5, 2)
    assert calls == ["fp32", "quantized"] * (len(calls) // 2)


def test_nothing_is_published_when_nothing_is_faster(quantize, timed, tmp_path):
    timed(dict.fromkeys(("modulation", "trunk", "prefix", "head", "decode"), 0.8))
    with pytest.raises(CalibrationError, match="nothing is faster quantized on this machine, so no bundle was written"):
        quantize(measure=True)
    assert list(tmp_path.iterdir()) == []


def test_a_graph_without_a_layer_to_quantize_is_not_timed(patch1, tmp_path, timed):
    """This model's head is too narrow: nothing of it can be faster or slower."""
    timed({"modulation": 2.0, "trunk": 2.0, "prefix": 2.0, "decode": 2.0})
    bundle = quantize_bundle(
        patch1.bundle, patch1.calibration, tmp_path / "quantized", precision="int8", threads=1
    )  # fmt: skip
    assert not [sentence for sentence in bundle.manifest["quantization"]["timings"] if sentence.startswith("head")]


def test_a_budget_keeps_the_most_harmful_layers_and_says_so(small, quantize):
    before = small.quantized("int4-weight").manifest["quantization"]["quality"]["flips"]
    budget = before / 2
    assert budget > 0
    bundle = quantize(precision="int4-weight", budget=budget)
    facts = bundle.manifest["quantization"]
    found, layers = facts["sensitivity"], layers_of(bundle)
    assert found["budget"] == budget
    assert found["flips_before"] > budget >= found["flips_after"]
    plain, groups = layers_of(small.quantized("int4-weight")), groups_of(small.bundle)
    step = {layer for layer in (*groups["trunk"], *groups["head"]) if plain[layer] != "fp32"}
    assert found["kl_alone"].keys() == step
    assert {layer for layer in step if layers[layer] == "fp32"} == set(found["kept_fp32"]) < step
    assert all(parts_of(bundle, layer) == STORED[layers[layer]] for layer in step)
    assert (bundle.path / SENSITIVITY_PLOT).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_budget_is_held_by_the_bundle_that_is_written(small, quantize):
    """Not only by a step whose modulation is still fp32."""
    flips = small.quantized("int8").manifest["quantization"]["quality"]["flips"]
    facts = quantize(precision="int8", budget=flips * 0.95).manifest["quantization"]
    assert facts["quality"]["flips"] == facts["sensitivity"]["flips_after"] <= flips * 0.95


def test_a_budget_that_holds_keeps_nothing(quantize):
    facts = quantize(budget=0.5).manifest["quantization"]
    assert facts["sensitivity"]["kept_fp32"] == [] and facts["sensitivity"]["kl_alone"] == {}


def test_a_budget_that_leaves_nothing_quantized_is_no_quantized_bundle(quantize, timed, tmp_path):
    """Asking for integers and getting a bundle without any is a failure."""
    timed({"modulation": 0.5, "trunk": 2.0, "prefix": 2.0, "head": 2.0, "decode": 0.5})
    with pytest.raises(CalibrationError):
        quantize(precision="int4-weight", measure=True, budget=0.0)
    assert list(tmp_path.iterdir()) == []


# -- refusals ----------------------------------------------------------------------------------------------------------


REFUSED = {
    "an unknown precision": ({"precision": "int3"}, "precision 'int3'.*known are int8, int8-weight, int4-weight"),
    "an unknown observer": ({"observer": "guess"}, "observer 'guess'.*max, percentile"),
    "an unknown layer": ({"keep_fp32": ("blocks.0.attn.qkv", "blocks.9.attn.qkv")}, r"unknown layers blocks\.9\.attn"),
    "a negative budget": ({"budget": -0.1}, "budget"),
    "a budget that is no number": ({"budget": float("nan")}, "budget"),
}  # fmt: skip


def test_settings_that_do_not_fit_are_refused_and_nothing_is_written(quantize, tmp_path):
    for options, message in REFUSED.values():
        with pytest.raises(CalibrationError, match=message):
            quantize(**options)
        assert list(tmp_path.iterdir()) == []


def test_a_quantized_bundle_is_not_quantized_again(small, tmp_path):
    bundle = small.quantized("int8")
    with pytest.raises(CalibrationError, match="is quantized already; quantize the fp32 bundle it was made from"):
        quantize_bundle(bundle, small.calibration, tmp_path / "twice", precision="int4-weight")
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_that_does_not_belong_to_the_bundle_is_refused(small, patch1, tmp_path):
    for calibration in (
        patch1.calibration,
        replace(small.calibration, bundle="0" * 64),
        replace(small.calibration, images_done=3),
    ):
        with pytest.raises(CalibrationError):
            quantize_bundle(small.bundle, calibration, tmp_path / "no", precision="int8", measure=False, threads=1)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", [0, 1], ids=["the first row", "a row that no strength is judged by"])
def test_weights_that_are_not_numbers_are_refused_by_name(small, tmp_path, reseal, monkeypatch, row):
    """At the very end of the decoder, where no other layer's input would tell."""
    monkeypatch.setattr("bar_edge.calibration.quantize._JUDGED_OUTPUTS", 4)
    folder = Path(shutil.copytree(small.bundle.path, tmp_path / "damaged"))
    place = weights.read_places(folder / weights.FILE_NAME)["decoder.ffn.0.weight"]
    with (folder / weights.FILE_NAME).open("r+b") as file:
        file.seek(place.offset + row * place.shape[1] * place.dtype.itemsize)
        file.write(np.full(8, np.nan, dtype=np.float32).tobytes())
    reseal(folder)
    bundle = Bundle.open(folder)
    calibration = replace(small.calibration, bundle=bundle.digest)
    with pytest.raises(CalibrationError, match=r"decoder\.ffn\.0"):
        quantize_bundle(bundle, calibration, tmp_path / "quantized", precision="int8", measure=False, threads=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["damaged"]


def test_a_compiled_bundle_is_refused(small, tmp_path):
    packed = prepack_bundle(small.bundle, tmp_path / "packed")
    with pytest.raises(RequestError, match="is compiled already; use the bundle it was made from"):
        quantizer.check_settings(packed, precision="int8", observer="mse", keep=(), budget=None)
    with pytest.raises(RequestError, match="is compiled already"):
        quantize_bundle(packed, small.calibration, tmp_path / "quantized", precision="int8")


def test_what_it_is_made_of_is_never_replaced(small, tmp_path):
    source = Bundle.open(shutil.copytree(small.bundle.path, tmp_path / "source"))
    with pytest.raises(BundleError, match="which it is made of"):
        quantize_bundle(source, small.calibration, source.path, precision="int8", force=True)
    Bundle.open(source.path)


def test_an_interruption_leaves_nothing_behind(quantize, tmp_path):
    for stage in ("choosing scales", "writing weights", "recording fp32", "self-test", "hashing"):

        def stop(what: str, done: int, total: int, stage: str = stage) -> None:
            if what.startswith(stage):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(progress=stop)
        assert list(tmp_path.iterdir()) == [], stage


def test_a_graph_that_is_not_what_was_asked_for_is_refused(quantize, tmp_path, monkeypatch):
    """If a layer came out as fp32 although INT8 was asked for, no bundle may say otherwise."""
    original = quantizer.build_graphs

    def forgetful(spec, placed, final):
        kept = {layer: kind for layer, kind in final.items() if layer != "blocks.0.mlp.w12"}
        places = {**placed, "blocks.0.mlp.w12.weight": placed["blocks.0.mlp.w12.weight_int8"]}
        places["blocks.0.mlp.w12.weight"] = replace(places["blocks.0.mlp.w12.weight"], shape=(512, 64))
        return original(spec, places, kept)

    monkeypatch.setattr(quantizer, "build_graphs", forgetful)
    monkeypatch.setattr(onnx.checker, "check_model", lambda *args, **kwargs: None)
    with pytest.raises(Exception, match=r"not what was asked for: \{'blocks\.0\.mlp\.w12': 'fp32'\}"):
        quantize()
    assert list(tmp_path.iterdir()) == []
