"""The ONNX Runtime engine draws what the reference draws, whatever the batch, the order and the company."""

import os
import sys

import numpy as np
import onnxruntime
import pytest

from bar_edge.export.model import generate_bits
from bar_edge.export.replay import replay
from bar_edge.runtime import engines
from bar_edge.runtime.engines import onnxruntime as engine
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_fine_grid
from bar_edge.runtime.spec import Recipe

MOST_TIES = 0.01  # of the images


def test_recorded_samplings_are_drawn_bit_by_bit(golden, sampling, read_sampling):
    recorded = golden.recorded(sampling)
    recipe, noise = read_sampling(recorded)
    np.testing.assert_array_equal(golden.runtime.sample(recorded["class_ids"], recipe, noise), recorded["ids"])


def test_latents_of_the_last_token_are_the_references(golden, read_sampling):
    recorded = golden.recorded("sample_cfg")
    recipe, noise = read_sampling(recorded)
    bits = golden.runtime.sample(recorded["class_ids"], recipe, noise)
    expected = replay(golden.reference, bits, recorded["class_ids"].tolist(), recipe, noise).latents[:, -1]
    np.testing.assert_allclose(golden.runtime.last_latents(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("images", "random_order", "first"), [(200, False, 0), (40, True, 1000)], ids=["200 raster", "40 random order"]
)
def test_digits_are_those_of_the_reference_decision_by_decision(digits, images, random_order, first):
    recipe, batch = digits.checkpoint.recipe, 40
    unexplained = ties = 0
    for begin in range(0, images, batch):
        class_ids = np.arange(begin, begin + batch) % 10
        noise = SeededNoise(2026, range(first + begin, first + begin + batch), random_order)
        bits = digits.runtime.sample(class_ids, recipe, noise)
        checked = replay(digits.reference, bits, class_ids.tolist(), recipe, noise)
        unexplained += checked.unexplained
        ties += checked.images_with_ties
    assert unexplained == 0
    assert ties <= MOST_TIES * images


def test_recorded_digits_are_drawn_again(digits, read_sampling):
    recorded = digits.recorded("reference_samples")
    recipe, noise = read_sampling(recorded)
    bits = digits.runtime.sample(recorded["class_ids"], recipe, noise)
    np.testing.assert_array_equal(bits, recorded["ids"])
    images = np.stack([np.asarray(image) for image in digits.runtime.decode(bits)]).astype(int)
    assert np.abs(images - recorded["images"]).max() <= 1


@pytest.mark.parametrize("order", ["raster", "random"])
def test_the_batch_changes_no_bit(digits, order):
    def draw(batch_size: int) -> np.ndarray:
        return digits.runtime.generate(
            list(range(10)), num=4, seed=11, order=order, batch_size=batch_size, return_bits=True
        )[1]  # fmt: skip

    together = draw(40)
    np.testing.assert_array_equal(draw(7), together)
    np.testing.assert_array_equal(draw(1), together)


def test_company_changes_no_bit(digits):
    recipe = digits.checkpoint.recipe
    alone = digits.runtime.sample(np.array([6]), recipe, SeededNoise(11, [33]))
    for classes, indices in (([6, 1, 1], [33, 2, 3]), ([0, 6], [8, 33]), ([6, 6, 10, 6, 3], [1, 33, 4, 5, 6])):
        company = digits.runtime.sample(np.array(classes), recipe, SeededNoise(11, indices))
        np.testing.assert_array_equal(company[indices.index(33)], alone[0])


def test_threads_change_no_bit(digits):
    class_ids, recipe, noise = np.array([3, 8]), digits.checkpoint.recipe, SeededNoise(5, [0, 1])
    with Generator(digits.bundle, threads=2) as two:
        np.testing.assert_array_equal(
            two.sample(class_ids, recipe, noise), digits.runtime.sample(class_ids, recipe, noise)
        )


def test_batches_of_changing_size_leave_nothing_behind(golden):
    """Buffers and caches are reused; an earlier batch of any shape must not show."""
    recipe = golden.checkpoint.recipe
    noise = {n: SeededNoise(3, range(n), random_order=True) for n in (1, 2, 5)}
    first = {n: golden.runtime.sample(np.arange(n), recipe, noise[n]) for n in (5, 1, 2)}
    golden.runtime.sample(np.arange(2), Recipe(1.0, 2.0, (golden.spec.bits_per_token,)), noise[2])
    for n in (2, 1, 5):
        np.testing.assert_array_equal(golden.runtime.sample(np.arange(n), recipe, noise[n]), first[n])
    np.testing.assert_array_equal(first[5][:2], first[2])


@pytest.mark.parametrize("random_order", [False, True])
@pytest.mark.parametrize("guidance", [0.0, 0.5, 1.0, 1.0001, 12.0])
def test_any_guidance_gives_the_references_bits(golden, guidance, random_order):
    recipe, noise = Recipe(guidance, 1.0, golden.checkpoint.recipe.allocation), SeededNoise(1, [0, 1], random_order)
    found = golden.runtime.sample(np.array([2, 7]), recipe, noise)
    expected = generate_bits(golden.reference, [2, 7], recipe, noise).numpy()
    np.testing.assert_array_equal(found, to_fine_grid(expected, golden.spec))


@pytest.mark.parametrize("allocation", [(1, 1, 2, 3, 5), (12,), (1,) * 12, (6, 6)], ids=str)
def test_any_allocation_gives_the_references_bits(digits, allocation):
    recipe, noise = Recipe(3.0, 1.5, allocation), SeededNoise(1, [0, 1])
    found = digits.runtime.sample(np.array([2, 7]), recipe, noise)
    expected = generate_bits(digits.reference, [2, 7], recipe, noise).numpy()
    np.testing.assert_array_equal(found, to_fine_grid(expected, digits.spec))


def test_unconditional_images_beside_conditional_ones(golden):
    recipe, noise = golden.checkpoint.recipe, SeededNoise(4, [0, 1, 2])
    classes = [golden.spec.unconditional_class, 3, golden.spec.unconditional_class]
    found = golden.runtime.sample(np.array(classes), recipe, noise)
    expected = generate_bits(golden.reference, classes, recipe, noise).numpy()
    np.testing.assert_array_equal(found, to_fine_grid(expected, golden.spec))


def test_bits_are_returned_by_generation_step_and_put_in_raster_order_once(patch1, read_sampling):
    recorded = patch1.recorded("sample_random_order")
    recipe, noise = read_sampling(recorded)
    batch = engines.Batch(recorded["class_ids"], recipe, noise, noise.orders(16))
    direct = engines.start("onnxruntime", patch1.bundle, 1)
    drawn = direct.sample(batch)
    assert drawn.dtype == np.uint8 and drawn.shape == (3, 16, 6)
    for image, order in enumerate(recorded["orders"]):
        np.testing.assert_array_equal(drawn[image], recorded["ids"][image][order])
    direct.close()


LOAD_WITH_WARNINGS = """
import sys
from pathlib import Path
import onnxruntime
options = onnxruntime.SessionOptions()
options.log_severity_level = 2
for path in Path(sys.argv[1]).glob("*.onnx"):
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
"""


def test_the_library_has_nothing_to_warn_of(python, golden):
    """The engine itself asks it for errors only."""
    done = python(LOAD_WITH_WARNINGS, golden.bundle.path)
    assert done.returncode == 0
    assert done.stdout + done.stderr == ""


# -- choosing an engine ------------------------------------------------------------------------------------------------


def test_auto_takes_what_the_bundle_was_made_for_and_says_why(patch1):
    name, why = engines.choose("auto", patch1.bundle)
    assert name == "onnxruntime"
    assert "what the bundle was made for" in why and "onnxruntime 1." in why
    assert "asked for" in engines.choose("onnxruntime", patch1.bundle)[1]


@pytest.fixture
def without_onnxruntime(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)


def test_a_missing_library_is_named_with_its_remedy(without_onnxruntime, patch1):
    state = engines.status("onnxruntime")
    assert not state.usable and "pip install onnxruntime" in state.detail
    for name in ("auto", "onnxruntime"):
        with pytest.raises(EngineError, match=rf"engine '{name}' cannot run here .*pip install onnxruntime"):
            Generator(patch1.output, engine=name)


def test_a_library_that_is_too_old_is_refused(monkeypatch, patch1):
    monkeypatch.setattr(onnxruntime, "__version__", "1.9.0")
    with pytest.raises(EngineError, match=r"onnxruntime 1\.9\.0 is too old; pip install 'onnxruntime>="):
        engines.choose("onnxruntime", patch1.bundle)


def test_a_graph_the_library_cannot_load_is_an_engine_error_in_one_line(bundle_copy, reseal):
    content = (bundle_copy / "mask_ratio.onnx").read_bytes()
    (bundle_copy / "mask_ratio.onnx").write_bytes(content.replace(b"Gemm", b"Gumm"))
    reseal(bundle_copy)
    with pytest.raises(EngineError, match="cannot load") as caught:
        Generator(bundle_copy, threads=1)
    assert "\n" not in str(caught.value)


START_IN_A_NEW_HOME = """
import os, sys
os.environ["HOME"] = sys.argv[1]
for name in ("CI", "XDG_CACHE_HOME", "ORT_DISABLE_TELEMETRY"):
    os.environ.pop(name, None)
os.environ.update(entry.split("=") for entry in sys.argv[3:])
from bar_edge.runtime import Generator
Generator(sys.argv[2], threads=1).close()
print(os.environ["ORT_DISABLE_TELEMETRY"])
"""


def test_a_device_reports_to_nobody(python, patch1, tmp_path):
    """The library's own builds leave an identifier of the device in its home when they report."""
    done = python(START_IN_A_NEW_HOME, tmp_path, patch1.bundle.path)
    assert (done.stdout, done.stderr) == ("1\n", "")
    assert list(tmp_path.iterdir()) == []


def test_the_owner_of_a_device_may_let_it_report(python, patch1, tmp_path):
    done = python(START_IN_A_NEW_HOME, tmp_path, patch1.bundle.path, "CI=1", "ORT_DISABLE_TELEMETRY=0")
    assert done.stdout == "0\n"


@pytest.mark.parametrize("where", ["make_step", "decode"])
def test_too_little_memory_is_one_sentence_and_leaves_the_engine_usable(patch1, monkeypatch, where):
    def fail(*args: object) -> None:
        raise MemoryError("Unable to allocate 31.6 MiB")

    with Generator(patch1.bundle, threads=1) as bar:
        expected = bar.generate([1, 2], return_bits=True)[1]
        with monkeypatch.context() as patch:
            patch.setattr(engine.OnnxRuntimeEngine, "make_step", fail)
            if where == "decode":
                patch.setattr(np, "concatenate", fail)
            with pytest.raises(EngineError, match=r"too little memory for 3 images at once .*; draw fewer at once"):
                bar.decode(expected[[0, 1, 0]]) if where == "decode" else bar.generate([1, 2, 3])
        np.testing.assert_array_equal(bar.generate([1, 2], return_bits=True)[1], expected)


def test_cores_are_those_the_process_may_use():
    assert 1 <= engine.cpu_count() <= (os.cpu_count() or 1)
