"""The self-test passes on a sound bundle and fails on anything else, in one sentence."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from bar_edge.runtime import selftest, weights
from bar_edge.runtime.bundle import SELFTEST
from bar_edge.runtime.errors import BundleError
from bar_edge.runtime.generator import Generator


def test_a_fresh_bundle_passes(golden):
    found = selftest.run(golden.runtime)
    assert found.passed
    assert (found.engine, found.differing_bits, found.first_differing_cell) == ("onnxruntime", 0, None)
    assert found.total_bits == golden.spec.image_seq_len * golden.spec.token_size
    assert found.latent_error < 1e-4 and found.pixel_error <= 1
    assert found.sentence.startswith(f"all {found.total_bits} bits equal")
    assert json.loads(json.dumps(found.to_dict()))["passed"] is True


def test_the_demo_passes(digits):
    assert selftest.run(digits.runtime).passed


@pytest.mark.parametrize("precision", ["int8", "int8-weight", "int4-weight"])
def test_another_cpus_sums_do_not_fail_a_quantized_bundle(digits, precision, tmp_path, reseal):
    """Floats moved by 1e-6 stand in for a CPU that adds in another order: activations reach the next integer."""
    moved, rng = tmp_path / "moved", np.random.default_rng(0)
    shutil.copytree(digits.quantized(precision).path, moved)
    file = moved / weights.FILE_NAME
    for place in weights.read_places(file).values():
        if place.dtype == np.float32:
            values = np.memmap(file, np.float32, "r+", place.offset, place.shape)
            values *= 1 + 1e-6 * rng.standard_normal(place.shape).astype(np.float32)
            values.flush()
    reseal(moved)
    with Generator(moved, threads=1) as runtime:
        found = selftest.run(runtime)
    assert found.passed, found.sentence
    assert found.latent_error > 1e-4  # or nothing was moved that counts


def test_a_quantized_bundle_whose_positions_are_off_by_one_fails(digits, tmp_path, reseal):
    changed = tmp_path / "changed"
    shutil.copytree(digits.quantized("int8").path, changed)
    file = changed / weights.FILE_NAME
    place = weights.read_places(file)["pos_embed"]
    values = np.memmap(file, np.float32, "r+", place.offset, place.shape)
    values[:] = np.roll(values, 1, axis=0)
    values.flush()
    reseal(changed)
    with Generator(changed, threads=1) as runtime:
        assert not selftest.run(runtime).passed


@pytest.fixture
def altered(bundle_copy, reseal) -> Callable[..., selftest.SelfTest]:
    """Run the self-test of a bundle whose record was changed and whose manifest was made to match."""

    def run(change: Callable[[dict[str, np.ndarray]], object]) -> selftest.SelfTest:
        path = bundle_copy / SELFTEST
        with np.load(path) as stored:
            record = dict(stored)
        change(record)
        np.savez(path, **record)
        reseal(bundle_copy)
        with Generator(bundle_copy, threads=1) as runtime:
            return selftest.run(runtime)

    return run


def test_an_unchanged_record_still_passes(altered):
    assert altered(lambda record: None).passed


def test_a_changed_bit_fails_and_is_named(altered):
    def change(record):
        record["bits"][5] ^= 0x10  # bit 43: cell 7 of 6 bits

    found = altered(change)
    assert not found.passed
    assert (found.differing_bits, found.total_bits, found.first_differing_cell) == (1, 96, 7)
    assert "1 of 96 bits differ, the first in grid cell 7" in found.sentence


def test_pixels_are_judged_on_the_recorded_bits_whatever_was_drawn(patch1, altered):
    def change(record):
        record["bits"] ^= 0xFF
        bits = np.unpackbits(record["bits"]).reshape(1, patch1.spec.image_seq_len, patch1.spec.token_size)
        record["image"] = np.asarray(patch1.runtime.decode(bits)[0])

    found = altered(change)
    assert found.differing_bits == found.total_bits and found.pixel_error <= 1


def test_a_changed_image_fails(altered):
    def change(record):
        value = int(record["image"][3, 4, 1])
        record["image"][3, 4, 1] = value + 9 if value < 128 else value - 9

    found = altered(change)
    assert not found.passed and found.differing_bits == 0
    assert 8 <= found.pixel_error <= 10
    assert "pixels differ by" in found.sentence


def test_one_level_of_rounding_is_allowed(altered):
    def change(record):
        at = np.unravel_index(record["image"].argmin(), record["image"].shape)
        record["image"][at] += 1

    assert altered(change).pixel_error <= 2


@pytest.mark.parametrize("value", [1.0, np.nan, np.inf])
def test_changed_latents_fail(altered, value):
    def change(record):
        record["latent"][7] += value

    found = altered(change)
    assert not found.passed
    assert "latents differ" in found.sentence


@pytest.mark.parametrize("name", ["seed", "class_id", "image_index"])
def test_another_request_draws_other_bits(altered, name):
    def change(record):
        record[name] = record[name] + 1 if record[name] == 0 else record[name] - 1

    assert not altered(change).passed


BROKEN = {
    "no seed": lambda record: record.pop("seed"),
    "no latent": lambda record: record.pop("latent"),
    "bits that are no bytes": lambda record: record.update(bits=record["bits"].astype(float)),
    "no logits": lambda record: record.pop("first_logits"),
    "a latent of another width": lambda record: record.update(latent=np.zeros(47, dtype=np.float32)),
    "too few bits": lambda record: record.update(bits=record["bits"][:3]),
    "an image of another size": lambda record: record.update(image=np.zeros((32, 32, 3), dtype=np.uint8)),
    "several seeds": lambda record: record.update(seed=np.arange(3)),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_record_that_makes_no_sense_is_a_bundle_error(altered, how):
    with pytest.raises(BundleError, match=r"selftest\.npz"):
        altered(BROKEN[how])


@pytest.mark.parametrize("class_id", [99, -3])
def test_a_record_of_a_class_there_is_not_is_refused(altered, class_id):
    with pytest.raises(BundleError, match=f"class {class_id}, image . is not of this model"):
        altered(lambda record: record.update(class_id=np.int64(class_id)))


def test_a_record_of_another_model_is_refused_by_what_differs(patch1, cases):
    path = patch1.bundle.path / SELFTEST
    with pytest.raises(BundleError, match=r"selftest\.npz: bits is uint8 \[12\], expected uint8 \[20\]; export"):
        selftest.Record.load(path, cases("patch1_10bit").spec)


def a_single_array(path):
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


FILES = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not an archive"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "a single array": a_single_array,
    "a pickle": lambda path: np.savez(path, seed=np.array({"code": "object"}, dtype=object)),
}


@pytest.mark.parametrize("how", FILES)
def test_a_file_that_is_no_record_is_a_bundle_error(bundle_copy, reseal, how):
    FILES[how](bundle_copy / SELFTEST)
    reseal(bundle_copy)
    with Generator(bundle_copy, threads=1) as runtime, pytest.raises(BundleError, match=r"selftest\.npz"):
        selftest.run(runtime)


def test_flipped_bytes_are_a_bundle_error_or_a_record_but_never_a_crash(patch1, tmp_path):
    shape = (patch1.spec.image_seq_len, patch1.spec.token_size)
    content, path = (patch1.bundle.path / SELFTEST).read_bytes(), tmp_path / "selftest.npz"
    rng = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(len(content), size=3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            record = selftest.Record.load(path, patch1.spec)
        except BundleError:
            continue
        assert record.bits.shape == shape and 0 <= record.class_id <= patch1.spec.num_classes


# ---- engines that round otherwise ----


class Compiled:
    """A bundle on an engine of another name, which draws what was recorded but for what is changed."""

    engine_name = "cuda"

    def __init__(self, runtime: Generator, form: str = "fp16", flipped: int = 0, levels: float = 0, **changed: float):
        """`changed`: `of_one` in levels; `latent` and `logit` as fractions of the largest."""
        self.spec, self._flipped, self._levels, self._changed = runtime.spec, flipped, levels, changed
        self.record = selftest.Record.load(runtime.bundle.path / SELFTEST, runtime.spec)
        made_of = {"quantization": {}} if form == "int8" else {}
        precision = "fp16" if form == "int8" else form
        facts = {**runtime.bundle.manifest, **made_of, "engines": {"cuda": {"precision": precision}}}
        self.bundle = replace(runtime.bundle, manifest=facts)

    def sample(self, class_ids, recipe, noise, history):
        np.testing.assert_array_equal(history, self.record.bits[None])
        bits = history.copy()
        bits.reshape(-1)[: self._flipped] ^= 1
        return bits

    def last_latents(self):
        return self._moved("latent", self.record.latent)

    def first_logits(self):
        return self._moved("logit", self.record.first_logits)

    def _moved(self, what, recorded):
        values = recorded.copy()
        values.reshape(-1)[5] += self._changed.get(what, 0) * np.abs(values).max()
        return values[None]

    def decode_raw(self, bits):
        away = np.where(self.record.image < 128, 1, -1).transpose(2, 0, 1)
        image = self.record.image.transpose(2, 0, 1) + 0.5 + away * self._levels
        image[0, 0, 0] += away[0, 0, 0] * self._changed.get("of_one", 0)
        return (image / 127.5 - 1)[None].astype(np.float32)


ROUNDINGS = {  # what a bundle is made of: fraction of decisions, and of the largest latent or logit
    "fp32": (0.01, 5e-3),
    "fp16": (0.01, 5e-3),
    "bf16": (0.03, 3e-2),
    "int8": (0.03, 3e-2),
}


@pytest.mark.parametrize("form", ROUNDINGS)
def test_a_compiled_engine_may_flip_as_many_decisions_as_follow_from_rounding(golden, form):
    spec, fraction = golden.spec, ROUNDINGS[form][0]
    bits = spec.image_seq_len * spec.token_size
    allowed = int(bits * fraction * max(1, (spec.bits_per_token / 16) ** 0.5))
    found = selftest.run(Compiled(golden.runtime, form, flipped=allowed))
    assert found.passed and found.differing_bits == allowed
    assert not selftest.run(Compiled(golden.runtime, form, flipped=allowed + 1)).passed


def test_a_compiled_engine_may_differ_in_levels(patch1):
    assert selftest.run(Compiled(patch1.runtime, levels=4)).passed
    found = selftest.run(Compiled(patch1.runtime, levels=5))
    assert not found.passed and "pixels differ by 5.0 levels (root mean square), 4 is allowed" in found.sentence
    assert selftest.run(Compiled(patch1.runtime, of_one=16)).passed
    found = selftest.run(Compiled(patch1.runtime, of_one=17))
    assert not found.passed and "pixels differ by 17 levels, 16 is allowed" in found.sentence


@pytest.mark.parametrize("what", ["latent", "logit"])
@pytest.mark.parametrize("form", ROUNDINGS)
def test_a_compiled_engine_may_differ_in_values_by_what_rounding_does(golden, form, what):
    allowed = ROUNDINGS[form][1]
    found = selftest.run(Compiled(golden.runtime, form, **{what: 0.98 * allowed}))
    assert found.passed and getattr(found, f"{what}_error") == pytest.approx(0.98 * allowed, rel=1e-3)
    found = selftest.run(Compiled(golden.runtime, form, **{what: 1.02 * allowed}))
    assert not found.passed
    assert found.sentence == f"{what}s differ by {1.02 * allowed:.1e} of their size, {allowed:.0e} is allowed"
    assert not selftest.run(Compiled(golden.runtime, form, **{what: np.nan})).passed


def test_the_engine_that_recorded_is_not_asked_for_logits(golden):
    assert selftest.run(golden.runtime).logit_error is None
