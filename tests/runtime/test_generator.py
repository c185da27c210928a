"""The public class: options, indices, order of events, and refusals."""

import os
import shutil
import threading
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image

from bar_edge.export.model import generate_bits
from bar_edge.runtime import Drawn, Generator, engines
from bar_edge.runtime.errors import BundleError, EngineError, RequestError
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_fine_grid, to_uint8


@pytest.fixture(scope="module")
def bar(patch1) -> Generator:
    return patch1.runtime


def bits_of(bar: Generator, class_ids, **options) -> np.ndarray:
    return bar.generate(class_ids, return_bits=True, **options)[1]


# -- what comes out ----------------------------------------------------------------------------------------------------


def test_images_are_rgb_of_the_models_size(bar):
    images = bar.generate([3, 4], seed=1)
    assert [image.mode for image in images] == ["RGB", "RGB"]
    assert [image.size for image in images] == [(64, 64), (64, 64)]


def test_bits_come_with_the_images_when_asked_for(bar):
    images, bits = bar.generate([3, 4], seed=1, return_bits=True)
    assert bits.shape == (2, 16, 6) and bits.dtype == np.uint8 and set(np.unique(bits)) == {0, 1}
    for image, again in zip(images, bar.decode(bits), strict=True):
        assert image.tobytes() == again.tobytes()


def test_images_are_class_major_and_numbered_in_that_order(bar):
    drawn = list(bar.stream([7, None, 2], num=2, batch_size=4))
    assert [(one.index, one.class_id) for one in drawn] == [(0, 7), (1, 7), (2, None), (3, None), (4, 2), (5, 2)]
    assert all(isinstance(one, Drawn) and isinstance(one.image, Image.Image) for one in drawn)
    assert all(one.bits.shape == (16, 6) for one in drawn)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_the_images_index_in_the_request_decides_its_noise(patch1, bar, batch_size):
    bits = bits_of(bar, [7, 2], num=2, seed=9, batch_size=batch_size)
    for index, class_id in enumerate([7, 7, 2, 2]):
        expected = generate_bits(patch1.reference, [class_id], patch1.checkpoint.recipe, SeededNoise(9, [index]))
        np.testing.assert_array_equal(bits[index], to_fine_grid(expected.numpy(), patch1.spec)[0])


def test_the_same_request_gives_the_same_bits_and_another_seed_others(bar):
    first = bits_of(bar, [1, 2, 3], seed=5)
    np.testing.assert_array_equal(bits_of(bar, [1, 2, 3], seed=5), first)
    other = bits_of(bar, [1, 2, 3], seed=6)
    assert (other != first).any(axis=(1, 2)).all()


def test_options_reach_the_sampler(patch1, bar):
    recipe = bar.recipe(guidance=2.0, temperature=0.5, allocation=[1, 5])
    assert (recipe.guidance, recipe.temperature, recipe.allocation) == (2.0, 0.5, (1, 5))
    bits = bits_of(bar, [4, 5], seed=3, guidance=2.0, temperature=0.5, allocation=[1, 5], order="random")
    noise = SeededNoise(3, [0, 1], random_order=True)
    expected = generate_bits(patch1.reference, [4, 5], recipe, noise).numpy()
    np.testing.assert_array_equal(bits, to_fine_grid(expected, patch1.spec))


def test_what_is_not_given_comes_from_the_bundles_recipe(bar):
    assert bar.recipe() == bar.bundle.recipe
    assert bar.recipe(temperature=0).guidance == bar.bundle.recipe.guidance


def test_a_greedy_image_does_not_depend_on_the_seed(bar):
    np.testing.assert_array_equal(
        bits_of(bar, [3], seed=1, temperature=0), bits_of(bar, [3], seed=2, temperature=0)
    )  # fmt: skip


@pytest.mark.parametrize("guidance", [None, 1.0])
def test_an_unconditional_image_uses_the_unconditional_class(patch1, bar, guidance):
    bits = bits_of(bar, [None], seed=2, guidance=guidance)
    expected = generate_bits(patch1.reference, [10], bar.recipe(guidance=guidance), SeededNoise(2, [0])).numpy()
    np.testing.assert_array_equal(bits, to_fine_grid(expected, patch1.spec))


def test_numpy_class_ids_are_taken(bar):
    np.testing.assert_array_equal(bits_of(bar, [np.int64(3), np.int32(1)]), bits_of(bar, [3, 1]))
    np.testing.assert_array_equal(bits_of(bar, np.array([3, 1])), bits_of(bar, [3, 1]))
    np.testing.assert_array_equal(bits_of(bar, range(2)), bits_of(bar, [0, 1]))
    np.testing.assert_array_equal(bits_of(bar, iter([0, 1])), bits_of(bar, [0, 1]))


@pytest.mark.parametrize("kind", [np.int8, np.int32, np.uint32, np.int64, np.uint64])
def test_a_seed_of_any_integer_type_is_the_same_seed(bar, kind):
    np.testing.assert_array_equal(bits_of(bar, [3], seed=kind(100)), bits_of(bar, [3], seed=100))


@pytest.mark.parametrize("random_order", [False, True])
def test_led_along_its_own_bits_an_image_comes_out_again(digits, random_order):
    """Of a trained model, whose tokens depend on those before them."""
    bar, classes, noise = digits.runtime, np.array([4, 5]), SeededNoise(3, [0, 1], random_order)
    bits = bar.sample(classes, bar.recipe(), noise)
    np.testing.assert_array_equal(bar.sample(classes, bar.recipe(), noise, history=bits), bits)
    assert (bar.sample(classes, bar.recipe(), noise, history=1 - bits) != bits).any()


def test_decoding_given_bits_is_the_decoder_with_clamped_pixels(bar):
    bits = np.random.default_rng(0).integers(0, 2, (3, 16, 6)).astype(np.uint8)
    raw = bar.decode_raw(bits)
    assert raw.shape == (3, 3, 64, 64) and raw.dtype == np.float32
    for pixels, image in zip(to_uint8(raw), bar.decode(bits.astype(bool)), strict=True):
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_decoding_many_images_is_decoding_each(bar):
    bits = np.random.default_rng(1).integers(0, 2, (19, 16, 6)).astype(np.uint8)
    together = bar.decode_raw(bits)
    assert together.shape == (19, 3, 64, 64)
    for i in (0, 7, 8, 18):
        np.testing.assert_allclose(together[i], bar.decode_raw(bits[i : i + 1])[0], rtol=0, atol=1e-5)


# -- the order of events -----------------------------------------------------------------------------------------------


def test_progress_is_told_per_token_with_the_images_finished(bar):
    told = []
    for one in bar.stream([1, 2], num=2, batch_size=3, progress=lambda *args: told.append(args)):
        told.append(one.index)
    expected = [(0, 4, n, 16) for n in range(1, 17)] + [0, 1, 2] + [(3, 4, n, 16) for n in range(1, 17)] + [3]
    assert told == expected


def test_images_come_as_soon_as_their_batch_is_decoded(bar):
    tokens = []
    stream = bar.stream([1], num=4, batch_size=2, progress=lambda *args: tokens.append(args))
    next(stream)
    assert len(tokens) == 16
    stream.close()


def test_an_error_in_the_callers_progress_ends_the_image_and_leaves_the_generator_usable(bar):
    class StopError(Exception):
        pass

    def stop(finished, images, done, tokens):
        if done == 5:
            raise StopError

    expected = bits_of(bar, [1], seed=4)
    with pytest.raises(StopError):
        bar.generate([1], seed=4, progress=stop)
    np.testing.assert_array_equal(bits_of(bar, [1], seed=4), expected)


@pytest.mark.parametrize("use", [Generator.close, Generator.last_latents])
def test_a_progress_callback_that_uses_the_generator_is_told_so_and_not_left_waiting(patch1, use):
    caught = []

    def work() -> None:
        with (
            Generator(patch1.bundle, threads=1) as bar,
            pytest.raises(EngineError, match="own progress callback") as error,
        ):
            bar.generate([1], progress=lambda *args: use(bar))
        caught.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert caught


# -- the bundle while it is used ---------------------------------------------------------------------------------------


def test_what_was_verified_is_what_draws_whatever_takes_its_place(patch1, small, tmp_path):
    place = shutil.copytree(patch1.bundle.path, tmp_path / "bundle")
    with Generator(place, threads=1) as bar:
        place.rename(tmp_path / "old")
        shutil.copytree(small.bundle.path, place)
        np.testing.assert_array_equal(bits_of(bar, [3], seed=1), bits_of(patch1.runtime, [3], seed=1))
        shutil.rmtree(place)
        shutil.rmtree(tmp_path / "old")
        np.testing.assert_array_equal(bits_of(bar, [4], seed=1), bits_of(patch1.runtime, [4], seed=1))


def test_the_working_folder_may_change(patch1, bundle_copy, monkeypatch):
    monkeypatch.chdir(bundle_copy.parent)
    with Generator(bundle_copy.name, threads=1) as bar:
        os.chdir("/")
        np.testing.assert_array_equal(bits_of(bar, [3], seed=1), bits_of(patch1.runtime, [3], seed=1))


# -- several threads ---------------------------------------------------------------------------------------------------


def test_two_threads_get_what_one_would_get(bar):
    wanted = {(seed, n): bits_of(bar, list(range(n)), seed=seed) for seed in range(3) for n in (1, 3)}
    found, errors = {}, []

    def work(keys) -> None:
        try:
            for seed, n in keys:
                found[threading.get_ident(), seed, n] = bits_of(bar, list(range(n)), seed=seed)
        except Exception as error:
            errors.append(error)

    keys = list(wanted)
    threads = [threading.Thread(target=work, args=(order,)) for order in (keys, keys[::-1])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(found) == 2 * len(wanted)
    for (_, seed, n), bits in found.items():
        np.testing.assert_array_equal(bits, wanted[seed, n])


class Shared:
    """An engine whose first call waits a moment for another to come in: `together` tells whether one did."""

    def __init__(self, spec) -> None:
        self.spec, self.together = spec, False
        self.busy, self.joined = threading.Event(), threading.Event()

    def sample(self, batch, progress=None, history=None):
        if self.busy.is_set():
            self.joined.set()
        else:
            self.busy.set()
            self.together = self.joined.wait(0.2)
        return np.zeros((len(batch.class_ids), self.spec.num_tokens, self.spec.bits_per_token), dtype=np.uint8)

    def draw(self, batch, progress=None):
        return self.sample(batch), self.decode(batch.class_ids)

    def decode(self, bits):
        self.joined.set()
        return np.zeros((len(bits), 3, self.spec.image_size, self.spec.image_size), dtype=np.float32)

    def last_latents(self):
        self.joined.set()
        return np.zeros((1, self.spec.head_width), dtype=np.float32)

    def close(self) -> None:
        self.joined.set()


CALLS = {
    "sample": lambda bar: bar.sample(np.array([1]), bar.recipe(), SeededNoise(0, [0])),
    "draw": lambda bar: bar.draw(np.array([1]), bar.recipe(), SeededNoise(0, [0])),
    "decode": lambda bar: bar.decode(np.zeros((1, 16, 6), dtype=np.uint8)),
    "last_latents": Generator.last_latents,
    "close": Generator.close,
}


@pytest.mark.parametrize("second", CALLS)
def test_a_call_waits_until_that_of_another_thread_is_done(patch1, monkeypatch, second):
    engine = Shared(patch1.spec)
    monkeypatch.setattr(engines, "start", lambda *arguments: engine)
    bar = Generator(patch1.bundle)
    thread = threading.Thread(target=CALLS["sample"], args=(bar,))
    thread.start()
    assert engine.busy.wait(30)
    CALLS[second](bar)
    thread.join()
    assert engine.joined.is_set() and not engine.together


# -- refusals ----------------------------------------------------------------------------------------------------------


BAD = {
    "no class": ({"class_ids": []}, "class ids: none is given; this model has classes 0 to 9"),
    "a class too large": ({"class_ids": [3, 10]}, "class ids: 10 is not"),
    "a negative class": ({"class_ids": [-1]}, "class ids: -1 is not"),
    "a fractional class": ({"class_ids": [1.5]}, "class id must be a whole number, is 1.5"),
    "a class name": ({"class_ids": ["cat"]}, "class id must be a whole number, is 'cat'"),
    "no list of classes": ({"class_ids": 3}, "class ids must be a list of whole numbers or None, is 3"),
    "a number of images in words": ({"num": "2"}, "num must be a whole number, is '2'"),
    "a fraction of a batch": ({"batch_size": 2.5}, "batch_size must be a whole number, is 2.5"),
    "a fraction of a seed": ({"seed": 1.5}, "seed must be a whole number, is 1.5"),
    "no seed": ({"seed": None}, "seed must be a whole number, is None"),
    "guidance in words": ({"guidance": "strong"}, "guidance must be a finite number that is not negative, is 'strong'"),
    "temperatures": ({"temperature": [1, 2]}, "temperature must be a finite number that is not negative, is [1, 2]"),
    "guidance beyond any float": ({"guidance": 10**400}, "guidance must be a finite number"),
    "no list of counts": ({"allocation": 6}, "allocation must be a list of whole numbers, is 6"),
    "no image": ({"num": 0}, "num and batch_size must be at least 1, are 0 and 8"),
    "an empty batch": ({"batch_size": 0}, "num and batch_size must be at least 1, are 1 and 0"),
    "a negative seed": ({"seed": -1}, "seed must be between"),
    "a seed too large": ({"seed": 2**64}, "seed must be between"),
    "an unknown order": ({"order": "spiral"}, "order must be raster or random, is 'spiral'"),
    "negative guidance": ({"guidance": -1}, "guidance must be a finite number"),
    "guidance that is no number": ({"guidance": float("nan")}, "guidance must be a finite number"),
    "negative temperature": ({"temperature": -0.1}, "temperature must be a finite number"),
    "infinite temperature": ({"temperature": float("inf")}, "temperature must be a finite number"),
    "an empty allocation": ({"allocation": []}, "sum to 6, the bits per token"),
    "an allocation too short": ({"allocation": [1, 2]}, "allocation 1,2 does not fit"),
    "a falling allocation": ({"allocation": [4, 2]}, "allocation 4,2 does not fit"),
    "an allocation with a zero": ({"allocation": [0, 6]}, "allocation 0,6 does not fit"),
    "an allocation with fractions": ({"allocation": [2.9, 4.1]}, "allocation"),
}


@pytest.mark.parametrize("what", BAD)
def test_options_that_make_no_sense_are_refused_before_anything_is_drawn(bar, what):
    options, message = BAD[what]
    told = []
    with pytest.raises(RequestError) as caught:
        bar.stream(**{"class_ids": [1], "progress": lambda *args: told.append(args), **options})
    assert message in str(caught.value)
    assert told == []


@pytest.mark.parametrize(
    "bits",
    [np.zeros((16, 6)), np.zeros((1, 16, 5)), np.zeros((1, 15, 6)), np.full((1, 16, 6), 2), np.full((1, 16, 6), 0.5)],
)
def test_bits_that_do_not_fit_the_model_are_refused(bar, bits):
    with pytest.raises(RequestError, match=r"bits must be 0 or 1 of shape \[B, 16, 6\]"):
        bar.decode(bits)


def test_noise_for_another_number_of_images_is_refused(bar):
    with pytest.raises(RequestError, match="noise for 3 images, but 2 class ids"):
        bar.sample(np.array([1, 2]), bar.recipe(), SeededNoise(0, range(3)))


@pytest.mark.parametrize("shape", [(16, 6), (1, 16, 6), (2, 16, 5), (3, 16, 6)])
def test_a_history_of_another_shape_is_refused(bar, shape):
    history = np.zeros(shape, dtype=np.uint8)
    with pytest.raises(RequestError, match=r"bits must be 0 or 1 of shape \[2, 16, 6\], got"):
        bar.sample(np.array([1, 2]), bar.recipe(), SeededNoise(0, range(2)), history=history)


@pytest.mark.parametrize("class_id", [-4, -1, 11, 99])
def test_sampling_a_class_there_is_not_is_refused(bar, class_id):
    with pytest.raises(RequestError, match=str(class_id)):
        bar.sample(np.array([3, class_id]), bar.recipe(), SeededNoise(0, [0, 1]))


class InDeviceMemory:
    """Bits of somebody's array on a GPU."""

    __cuda_array_interface__: ClassVar = {"shape": (1, 16, 6), "typestr": "<f4", "data": (4096, False), "version": 3}


def test_bits_in_device_memory_reach_a_gpu_engine_as_they_are(patch1, monkeypatch):
    given, made = [], np.zeros((1, 3, 8, 8), dtype=np.float32)

    class OnGpu:
        first_logits = images_on_device = print

        def decode(self, bits):
            given.append(bits)
            return made

        def close(self):
            pass

    monkeypatch.setattr(engines, "start", lambda *_: OnGpu())
    bits = InDeviceMemory()
    with Generator(patch1.bundle) as runtime:
        assert runtime.decode_raw(bits) is made and given == [bits]
        assert np.asarray(runtime.decode(bits)[0]).shape == (8, 8, 3)


def test_bits_in_device_memory_are_refused_by_an_engine_on_the_cpu(patch1):
    with pytest.raises(EngineError, match="onnxruntime keeps nothing in device memory"):
        patch1.runtime.decode(InDeviceMemory())


def test_a_closed_generator_says_so(patch1):
    with Generator(patch1.bundle, threads=1) as bar:
        bits = bits_of(bar, [1])
        stream = bar.stream([1, 2], batch_size=1)
        next(stream)
    for use in (lambda: bar.generate([1]), lambda: bar.decode(bits), bar.last_latents, lambda: next(stream)):
        with pytest.raises(EngineError, match="this generator is closed"):
            use()
    bar.close()  # a second time is nothing


def test_an_unknown_engine_is_refused_with_the_known_ones(patch1):
    with pytest.raises(EngineError, match="unknown engine 'tpu'; known: auto, tensorrt, cuda, onnxruntime"):
        Generator(patch1.bundle, engine="tpu")


@pytest.mark.parametrize("threads", [-1, 1025, 10**9])
def test_threads_that_no_machine_has_are_refused(patch1, threads):
    with pytest.raises(RequestError, match=rf"threads must be 0, for all cores, to 1024, is {threads}"):
        Generator(patch1.bundle, threads=threads)


@pytest.mark.parametrize("threads", ["2", None, 1.5])
def test_threads_that_are_no_number_are_refused(patch1, threads):
    with pytest.raises(RequestError, match="threads must be a whole number"):
        Generator(patch1.bundle, threads=threads)


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match="not a bundle"):
        Generator(tmp_path)


def test_logits_are_shown_by_gpu_engines_alone(patch1):
    with pytest.raises(EngineError, match="onnxruntime keeps nothing in device memory"):
        patch1.runtime.first_logits()


def test_latents_before_the_first_token_are_an_error(patch1):
    with Generator(patch1.bundle, threads=1) as bar, pytest.raises(EngineError, match="no token was sampled yet"):
        bar.last_latents()
