"""`bar-edge quantize`, and `verify` and `inspect` of what it makes, as a user meets them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bar_edge.calibration import quantizer, ranges
from bar_edge.calibration.trajectories import Calibration
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.cli import app
from bar_edge.runtime.errors import BarEdgeError, BundleError, CalibrationError, RequestError

MAIN = "from bar_edge.runtime.cli import main\nmain()"
FEW = ("--images", 4, "--batch-size", 4)


def run(*arguments: object):
    """A verb in this process; what it raises is raised."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)


def quantize(bundle: Path, output: Path, *options: object, few: tuple[object, ...] = FEW):
    return run("quantize", bundle, "-o", output, "--no-measure", "--threads", 1, *few, *options)


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory) -> Path:
    """A calibration of the small bundle."""
    path = tmp_path_factory.mktemp("calibration") / "ranges.npz"
    small.calibration.save(path)
    return path


@pytest.fixture
def never_collected(monkeypatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("hours of collecting began before the mistake was found")

    monkeypatch.setattr(ranges, "collect", fail)


def unwrapped(text: str) -> str:
    """Without the line breaks of a narrow terminal."""
    return text.replace("\n", "")


def layers_of(bundle: Bundle) -> dict[str, str]:
    return {layer: entry["precision"] for layer, entry in bundle.manifest["quantization"]["layers"].items()}


# -- quantize ----------------------------------------------------------------------------------------------------------


def test_quantize_collects_and_tells_what_became_of_every_graph(small, tmp_path):
    done = quantize(small.bundle.path, tmp_path / "new" / "quantized", "--precision", "int4-weight", "--seed", 7)
    assert done.exit_code == 0
    bundle = Bundle.open(tmp_path / "new" / "quantized")
    facts = bundle.manifest["quantization"]
    assert (facts["precision"], facts["calibration"]["images"], facts["calibration"]["seed"]) == ("int4-weight", 4, 7)
    lines = done.stdout.splitlines()
    assert lines[0] == "nothing measured on this machine (--no-measure)"
    for graph in ("onnxruntime_modulation", "onnxruntime_step", "onnxruntime_decode"):
        assert f"{graph}: {bundle.manifest['graphs'][graph]['precision']}" in lines
    assert f"{facts['quality']['flips']:.2%} of" in lines[-1] and "not calibrated on" in lines[-1]
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["quantized"]


def test_quantize_measures_unless_told_otherwise(small, saved, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizer, "_FASTER", 0.0)  # whatever is measured here
    done = run("quantize", small.bundle.path, "-o", tmp_path / "q", "--calibration", saved, "--threads", 1)
    timings = Bundle.open(tmp_path / "q").manifest["quantization"]["timings"]
    assert len(timings) == 5 and all(sentence in done.stdout for sentence in timings)


def test_a_calibration_is_written_and_used_again(small, tmp_path, monkeypatch, request):
    file = tmp_path / "ranges.npz"
    assert quantize(small.bundle.path, tmp_path / "first", "--calibration", file).exit_code == 0
    assert Calibration.load(file).complete
    request.getfixturevalue("never_collected")
    for name, few in (("second", FEW), ("third", ())):  # the same command again, and one that leaves it to the file
        done = quantize(small.bundle.path, tmp_path / name, "--calibration", file, few=few)
        assert done.exit_code == 0 and f"using the ranges in {file}: 4 images, seed 1000" in unwrapped(done.stderr)
    first, *others = (Bundle.open(tmp_path / name) for name in ("first", "second", "third"))
    assert {bundle.digest for bundle in others} == {first.digest}


@pytest.mark.usefixtures("never_collected")
@pytest.mark.parametrize(
    ("option", "value", "told"),
    [("--images", 5, "images {images}, not 5"), ("--seed", 3, "seed {seed}, not 3"),
     ("--batch-size", 3, "batch size {batch_size}, not 3")],
)  # fmt: skip
def test_a_calibration_that_is_not_what_was_asked_for_is_not_used(small, saved, tmp_path, option, value, told):
    plan = Calibration.load(saved).plan
    with pytest.raises(RequestError, match=rf"was collected with {told.format(**vars(plan))}; leave those options out"):
        quantize(small.bundle.path, tmp_path / "q", "--calibration", saved, option, value, few=())
    assert list(tmp_path.iterdir()) == []


def test_real_images_are_calibrated_on(small, tmp_path):
    spec, rng = small.spec, np.random.default_rng(0)
    for label in ("a", "b"):
        folder = tmp_path / "data" / "train" / label
        folder.mkdir(parents=True)
        for i in range(3):
            tokens = rng.integers(0, 2, spec.image_seq_len * spec.token_size).astype(bool)
            np.savez(folder / f"{i}.npz", tokens=tokens, tokens_flip=tokens)
    (tmp_path / "data" / "metadata.json").write_text(json.dumps({"token_size": spec.token_size}))
    assert quantize(small.bundle.path, tmp_path / "q", "--data", tmp_path / "data").exit_code == 0
    calibration = Bundle.open(tmp_path / "q").manifest["quantization"]["calibration"]
    assert calibration["images"] == 4 and len(calibration["data"]) == 64
    file = tmp_path / "ranges.npz"
    options = ("--data", tmp_path / "data", "--calibration", file)
    assert quantize(small.bundle.path, tmp_path / "s", *options).exit_code == 0
    assert quantize(small.bundle.path, tmp_path / "t", *options, few=()).exit_code == 0
    for changed in (tmp_path / "data" / "train").glob("*/*.npz"):
        with np.load(changed) as stored:
            turned = {name: ~stored[name] for name in stored.files}
        np.savez(changed, **turned)
    with pytest.raises(RequestError, match=r"was collected with data [0-9a-f]{64}, not [0-9a-f]{64}; leave"):
        quantize(small.bundle.path, tmp_path / "u", *options)
    with pytest.raises(CalibrationError, match="holds 6 images, 7 were asked for"):
        quantize(small.bundle.path, tmp_path / "r", "--data", tmp_path / "data", "--images", 7)


def test_layers_are_kept_and_a_budget_is_told(small, saved, tmp_path):
    keep = ("blocks.0.attn.qkv", "decoder.ffn.0")
    done = quantize(
        small.bundle.path, tmp_path / "q", "--precision", "int4-weight", "--calibration", saved, "--budget", 0.01,
        *(part for layer in keep for part in ("--keep", layer)), few=(),
    )  # fmt: skip
    assert done.exit_code == 0
    bundle = Bundle.open(tmp_path / "q")
    assert {layers_of(bundle)[layer] for layer in keep} == {"fp32"}
    kept = bundle.manifest["quantization"]["sensitivity"]["kept_fp32"]
    assert f"kept in fp32 for the budget: {', '.join(kept) or 'nothing'}" in done.stdout


def test_force_replaces_a_bundle(small, saved, tmp_path):
    assert quantize(small.bundle.path, tmp_path / "q", "--calibration", saved, few=()).exit_code == 0
    with pytest.raises(BundleError, match="exists already"):
        quantize(small.bundle.path, tmp_path / "q", "--calibration", saved, few=())
    done = quantize(
        small.bundle.path, tmp_path / "q", "--calibration", saved, "--precision", "int8-weight", "--force", few=()
    )  # fmt: skip
    assert done.exit_code == 0
    assert Bundle.open(tmp_path / "q").manifest["quantization"]["precision"] == "int8-weight"


# -- mistakes ----------------------------------------------------------------------------------------------------------


EARLY = {
    "an unknown precision": (("--precision", "int3"), "precision 'int3'"),
    "an unknown observer": (("--observer", "guess"), "observer 'guess'"),
    "an unknown layer": (("--keep", "blocks.77.attn.qkv"), r"unknown layers blocks\.77\.attn\.qkv"),
    "a negative budget": (("--budget", "-0.5"), "budget"),
    "a budget that is no number": (("--budget", "nan"), "budget"),
    "its own source as output": (("-o", "{bundle}"), "which it is made of"),
    "no data": (("--data", "{new}"), "has no folder `train`"),
}


@pytest.mark.usefixtures("never_collected")
def test_a_mistake_is_found_before_anything_is_collected(small, tmp_path):
    wrong = {}
    for mistake, (options, message) in EARLY.items():
        options = [option.format(bundle=small.bundle.path, new=tmp_path / "new") for option in options]
        try:
            wrong[mistake] = quantize(small.bundle.path, tmp_path / "q", *options).stdout
        except BarEdgeError as error:
            assert re.search(message, str(error)), mistake
        except AssertionError as error:
            wrong[mistake] = str(error)
    assert not wrong
    assert list(tmp_path.iterdir()) == []


def test_a_quantized_bundle_is_not_quantized_again(small, tmp_path):
    with pytest.raises(CalibrationError, match="is quantized already"):
        quantize(small.quantized("int8").path, tmp_path / "q")
    assert list(tmp_path.iterdir()) == []


def test_a_seed_out_of_range_is_refused_or_used_but_never_a_crash(patch1, tmp_path):
    """The held-out images need a seed as well."""
    for seed in (2**64 - 1, 2**64, -1):
        try:
            done = quantize(patch1.bundle.path, tmp_path / "q", "--seed", seed)
        except (RequestError, CalibrationError) as error:
            assert "seed" in str(error)
        else:
            assert done.exit_code == 0 and 0 <= seed < 2**64


MISTAKES = {
    "a damaged calibration": (("--calibration", "{damaged}"), "CalibrationError: {damaged}: not a calibration file"),
    "a folder for a calibration": (("--calibration", "{folder}"), "CalibrationError: {folder}: not a calibration file"),
    "a calibration of another bundle": (("--calibration", "{other}"), "{other}: collected from another bundle"),
    "too few images": (("--images", "3"), "CalibrationError: 3 images are too few"),
    "an unknown precision": (("--precision", "int3"), "CalibrationError: precision 'int3'"),
    "no bundle": (None, "BundleError: {folder}: has no manifest.json"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_exit_code_2(python, patch1, saved, tmp_path, mistake):
    (tmp_path / "damaged.npz").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    places = {"damaged": tmp_path / "damaged.npz", "folder": tmp_path / "folder", "other": saved}
    options, message = MISTAKES[mistake]
    bundle = patch1.bundle.path if options is not None else tmp_path / "folder"
    arguments = [option.format(**places) for option in options or ()]
    done = python(MAIN, "quantize", bundle, "-o", tmp_path / "new", "--no-measure", "--images", 4, *arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and message.format(**places) in done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    assert not (tmp_path / "new").exists()


def test_a_calibration_that_cannot_be_written_is_no_traceback(python, patch1, tmp_path):
    """Its folder is made, or missed in one sentence; the collected ranges are not thrown away for it."""
    ranges = tmp_path / "no" / "such" / "folder" / "ranges.npz"
    done = python(
        MAIN, "quantize", patch1.bundle.path, "-o", tmp_path / "new", "--no-measure", "--images", 4,
        "--calibration", ranges,
    )  # fmt: skip
    assert "Traceback" not in done.stderr
    assert (done.returncode == 0 and ranges.exists()) or (done.returncode == 2 and done.stderr.count("\n") == 1)


# -- verify and inspect ------------------------------------------------------------------------------------------------


def test_verify_of_a_quantized_bundle_beside_its_fp32(small):
    bundle = small.quantized("int8")
    done = run("verify", bundle.path, "--reference", small.bundle.path, "--num", 4, "--threads", 1, "--json")
    assert done.exit_code == 0
    facts = json.loads(done.stdout)
    assert facts["passed"] and facts["selftest"]["passed"]
    assert facts["teacher_forced"]["images"] == facts["paired_images"]["images"] == 4
    assert 0 < facts["teacher_forced"]["kl"] < 0.05
    assert "against_checkpoint" not in facts


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_verify_of_a_bundle_beside_itself_prints_json_that_others_can_read(small):
    done = run("verify", small.bundle.path, "--reference", small.bundle.path, "--num", 2, "--threads", 1, "--json")
    facts = json.loads(done.stdout, parse_constant=no_constant)
    assert facts["teacher_forced"]["flips"] == 0 and facts["paired_images"]["identical_images"] == 1


def test_verify_refuses_what_a_bundle_was_not_made_from(small):
    """Shapes and recipe are the same, so figures would come out, of two models."""
    bundle, other = small.quantized("int8").path, small.quantized("int8-weight").path
    for pair in ((bundle, other), (small.bundle.path, bundle)):
        with pytest.raises(CalibrationError, match="was not quantized from"):
            run("verify", pair[0], "--reference", pair[1], "--threads", 1)


def test_verify_refuses_another_models_fp32_and_a_checkpoint(small, patch1):
    bundle = small.quantized("int8").path
    with pytest.raises(CalibrationError, match="are different models"):
        run("verify", bundle, "--reference", patch1.bundle.path, "--threads", 1)
    with pytest.raises(RequestError, match="is quantized: compare it with --reference FP32_BUNDLE instead"):
        run("verify", bundle, "--against", small.generator, "--tokenizer", small.tokenizer, "--config", small.config)


def test_inspect_tells_what_every_layer_is_stored_in(small):
    fp32 = json.loads(run("inspect", small.bundle.path, "--json").stdout)
    assert fp32["quantization"] is None and set(fp32["linear_layers"].values()) == {"fp32"}
    for precision in ("int8", "int8-weight", "int4-weight"):
        bundle = small.quantized(precision)
        facts = json.loads(run("inspect", bundle.path, "--json").stdout)
        assert {layer: facts["linear_layers"][layer] for layer in layers_of(bundle)} == layers_of(bundle)
        assert facts["linear_layers"].keys() == fp32["linear_layers"].keys()
        assert facts["quantization"]["precision"] == precision
        step = facts["graphs"]["onnxruntime_step"]["precision"]
        assert step == bundle.manifest["graphs"]["onnxruntime_step"]["precision"]
        assert facts["bytes_read_per_token"] < 0.6 * fp32["bytes_read_per_token"]
    for path in (bundle.path, small.bundle.path):
        assert "blocks.1.mlp.w12" in run("inspect", path).stdout


@pytest.mark.usefixtures("never_collected")
def test_every_layer_that_inspect_lists_can_be_kept(small, saved, tmp_path):
    """The error for an unknown layer sends people there."""
    listed = json.loads(run("inspect", small.bundle.path, "--json").stdout)["linear_layers"]
    options = [part for layer in listed if not layer.startswith("blocks.") for part in ("--keep", layer)]
    assert quantize(small.bundle.path, tmp_path / "q", "--calibration", saved, *options, few=()).exit_code == 0
