"""The engine `cuda` draws what the ONNX Runtime engine draws, on kernels executed on the CPU."""

import ctypes
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from bar_edge.export.prepack import prepack_bundle
from bar_edge.runtime import selftest
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch, choose, status
from bar_edge.runtime.engines.cuda import device as device_module
from bar_edge.runtime.engines.cuda.engine import check_capability, profiles, start
from bar_edge.runtime.engines.cuda.graphs import block_rows, scratch_bytes
from bar_edge.runtime.engines.cuda.layers import MAX_HEAD_DIM, MAX_POSITIONS, check
from bar_edge.runtime.engines.cuda.loop import buffer_sizes
from bar_edge.runtime.engines.cuda.module import MODEL, THREADS
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.cuda.resident import Weights
from bar_edge.runtime.errors import BundleError, CompatibilityError, EngineError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_uint8

from .emulated import EmulatedDevice
from .emulated_engine import EmulatedGenerator, kernel_loop
from .fake_driver import CUresult, FakeDriver, stand_in

FLIPS, QUANTIZED_FLIPS = 0.005, 0.01
# ONNX Runtime's weight-only products round activations to INT8, ours do not; W8A8 turns the rounding of float16 weights
# in the layers before into whole levels. The graphs for TensorRT differ from it by as much.
LATENTS, QUANTIZED_LATENTS = 2e-3, 3e-2
LEVELS = 2


@pytest.fixture(scope="module")
def prepacked(tmp_path_factory):
    """Bundles for `cuda`, each made once."""
    known = {}

    def make(bundle):
        if bundle.path not in known:
            known[bundle.path] = prepack_bundle(bundle, tmp_path_factory.mktemp("prepacked") / "bundle")
        return known[bundle.path]

    return make


@pytest.fixture
def emulate(host, host_model, prepacked):
    """Makes loops; afterwards nobody has written behind a buffer, and closing them leaves nothing but the weights."""
    made = []

    def make(bundle, images=2, *, guided=True):
        profile = Profile.of(images, guided=guided, passes=len(bundle.recipe.allocation))
        made.append(kernel_loop(prepacked(bundle), host, host_model, profile))
        return made[-1]

    yield make
    for gpu in made:
        gpu.device.check_guards()
        gpu.loop.close()
        assert len(gpu.device.allocations) == 1


@pytest.fixture
def damaged(prepacked, patch1, tmp_path, edit_manifest):
    """A bundle for `cuda` with another account of itself."""

    def make(change):
        made = prepack_bundle(patch1.bundle, tmp_path / "damaged")
        edit_manifest(made.path, lambda manifest: change(manifest["engines"]["cuda"]))
        return Bundle.open(made.path)

    return make


def batch_of(bundle, classes, *, random_order=False, **recipe):
    noise = SeededNoise(3, range(5, 5 + len(classes)), random_order=random_order)
    changed = replace(bundle.recipe, **({"guidance": 3.0} | recipe))
    return Batch(np.array(classes), changed, noise, noise.orders(bundle.spec.num_tokens))


def random_bits(spec, images):
    return np.random.default_rng(1).integers(0, 2, (images, spec.image_seq_len, spec.token_size), dtype=np.uint8)


def relative(found, expected):
    """Largest difference as a fraction of the largest value."""
    return np.abs(found - expected).max() / np.abs(expected).max()


def test_float16_decides_almost_as_float32_does(golden, emulate):
    batch = batch_of(golden.bundle, [1, 0, 1, 4, 5, 6], random_order=True)
    loop = emulate(golden.bundle, 6).loop
    history = golden.runtime._engine.sample(batch)
    # one decision changes those of the passes after it, and these tokens have up to 64 bits
    tolerance = 2 * FLIPS if golden.spec.patch_size > 1 else FLIPS
    assert (loop.sample(batch, None, history) != history).mean() <= tolerance
    assert relative(loop.last_latents(6), golden.runtime._engine.last_latents()) <= LATENTS


def test_without_guidance_every_row_is_an_image(patch1, emulate):
    batch = batch_of(patch1.bundle, [3, 1, 2], guidance=1.0)
    history = patch1.runtime._engine.sample(batch)
    found = emulate(patch1.bundle, 3, guided=False).loop.sample(batch, None, history)
    assert (found != history).mean() <= FLIPS


def test_integers_decide_almost_as_onnxruntime_does(small, emulate, precision):
    bundle = small.quantized(precision)
    batch, loop = batch_of(bundle, [1, 0, 4]), emulate(bundle, 3).loop
    with Generator(bundle, engine="onnxruntime", threads=1) as reference:
        history = reference._engine.sample(batch)
        latents = reference._engine.last_latents()
        image = reference._engine.decode(random_bits(small.spec, 3))
    assert (loop.sample(batch, None, history) != history).mean() <= QUANTIZED_FLIPS
    assert relative(loop.last_latents(3), latents) <= QUANTIZED_LATENTS
    assert relative(loop.decode(random_bits(small.spec, 3)), image) <= QUANTIZED_LATENTS


def test_the_demo_draws_and_decodes(digits, emulate):
    loop, batch = emulate(digits.bundle, 1).loop, batch_of(digits.bundle, [7])
    history = digits.runtime._engine.sample(batch)
    assert (loop.sample(batch, None, history) != history).mean() <= FLIPS
    assert relative(loop.last_latents(1), digits.runtime._engine.last_latents()) <= LATENTS
    record = selftest.Record.load(digits.bundle.path / "selftest.npz", digits.spec)
    pixels = to_uint8(loop.decode(record.bits[None]))[0].astype(int)
    assert np.abs(pixels - record.image).max() <= LEVELS


def test_every_decoder_decodes(golden, emulate):
    bits = random_bits(golden.spec, 3)
    found = emulate(golden.bundle, 2).loop.decode(bits)
    expected = golden.runtime._engine.decode(bits)
    assert np.abs(found - expected).max() * 127.5 <= LEVELS


@pytest.mark.parametrize("form", ["fp32", "int8", "int8-weight", "int4-weight"])
def test_an_image_is_the_same_bits_in_any_batch(small, emulate, form):
    bundle = small.bundle if form == "fp32" else small.quantized(form)
    batch = batch_of(bundle, [1, 0, 4])
    together = emulate(bundle, 3).loop.sample(batch)
    alone = emulate(bundle, 1).loop
    for i in range(0, 3, 2):
        np.testing.assert_array_equal(alone.sample(batch.part(i, i + 1))[0], together[i])


def test_images_on_the_device_are_those_decoded(patch1, emulate):
    loop, batch = emulate(patch1.bundle, 2).loop, batch_of(patch1.bundle, [1, 2])
    bits, images = loop.draw(batch)
    np.testing.assert_array_equal(bits, loop.sample(batch))
    assert np.isfinite(images).all()


def test_a_token_takes_seven_launches_a_layer_and_three_a_block(patch1, emulate):
    spec, gpu = patch1.spec, emulate(patch1.bundle, 1)
    gpu.loop.sample(batch_of(patch1.bundle, [1]))
    last = len(gpu.device.events) - gpu.device.events[::-1].index("replay of place_token")
    launched = Counter(event for event in gpu.device.events[last:] if event not in ("download", "copy"))
    passes, blocks, around = (
        len(patch1.bundle.recipe.allocation),
        spec.head_layers,
        ("place_token", "gather_rows", "embed"),
    )
    step = 7 * spec.num_layers + 2 + 1 + (blocks + 1)
    head_pass = 3 * blocks + 2
    assert sum(launched.values()) == len(around) + step + passes * (head_pass + 2) + 1
    assert all(launched[name] == 1 for name in (*around, "advance"))


@pytest.mark.parametrize("form", ["fp32", "int8", "int8-weight", "int4-weight"])
def test_the_engine_proves_itself(golden, emulate, prepacked, form):
    bundle = golden.bundle if form == "fp32" else golden.quantized(form)
    found = selftest.run(EmulatedGenerator(prepacked(bundle), emulate(bundle, 1).loop))
    assert found.passed, found.sentence


def test_what_nvrtc_compiles_proves_itself(small, ptx, ptx_model, prepacked):
    bundle = prepacked(small.quantized("int8-weight"))
    profile = Profile.of(1, guided=True, passes=len(bundle.recipe.allocation))
    found = selftest.run(EmulatedGenerator(bundle, kernel_loop(bundle, ptx, ptx_model, profile).loop))
    assert found.passed, found.sentence


def test_a_fault_of_the_head_too_small_for_decisions_is_found(cases, emulate, prepacked):
    """One bias of a model whose tokens have 64 bits, of which 2 % may flip."""
    case = cases("patch4")
    gpu = emulate(case.bundle, 1)
    address = gpu.loop._graphs._weights.layer("lm_head.output_embed").bias
    ctypes.c_float.from_address(address).value += 0.2
    found = selftest.run(EmulatedGenerator(prepacked(case.bundle), gpu.loop))
    assert not found.passed and found.sentence.startswith("logits differ by")


# -- what is refused, and what there is room for -----------------------------------------------------------------------


def test_old_gpus_are_refused():
    check_capability(80)
    with pytest.raises(CompatibilityError, match=r"this GPU is SM 7\.5, the engine cuda needs SM 8\.0; use TensorRT"):
        check_capability(75)


def test_without_a_driver_the_engine_says_so(patch1, prepacked):
    state = status("cuda")
    if state.usable:
        pytest.skip("this machine has a GPU")
    with pytest.raises(EngineError, match="cannot run here"):
        choose("auto", prepacked(patch1.bundle))
    with pytest.raises(CompatibilityError, match="not for cuda; compile it: bar-edge compile BUNDLE --target cuda"):
        choose("cuda", patch1.bundle)


def test_other_kernels_bundles_are_refused(damaged):
    with pytest.raises(CompatibilityError, match="is for kernel family 99, this is family 2; compile the bundle"):
        Weights(damaged(lambda account: account.update(family=99)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda account: account.pop("layers"), "its account of engines is malformed"),
        (lambda account: account["layers"]["blocks.0.attn.qkv"].update(form="int8"), "has no tensor .*weight_scale"),
        (lambda account: account["layers"]["blocks.0.attn.qkv"].update(form="fp8"), "do not fit its form 'fp8'"),
        (lambda account: account["layers"]["blocks.0.attn.qkv"].update(in_features=72), "do not fit its form 'fp16'"),
        (
            lambda account: account["layers"].update(other=account["layers"]["blocks.0.attn.qkv"]),
            "no tensor other.bias",
        ),
    ],
)
def test_an_account_that_does_not_fit_the_tensors_is_refused(damaged, change, message):
    with pytest.raises(BundleError, match=message):
        Weights(damaged(change))


def test_weights_of_another_model_are_refused(patch1, prepacked):
    weights = Weights(prepacked(patch1.bundle))
    check(patch1.spec, weights)
    with pytest.raises(BundleError, match=r"latent_condition_proj is 64 to 48, its model needs \(128, 48\)"):
        check(replace(patch1.spec, hidden_size=128), weights)


def test_tables_of_another_model_are_refused(patch1, prepacked):
    with pytest.raises(
        BundleError, match=r"symbol_embedding is float32 \[16, 64\], its model needs float32 \[17, 64\]"
    ):
        check(replace(patch1.spec, num_classes=11), Weights(prepacked(patch1.bundle)))


@pytest.mark.parametrize(
    ("change", "message"), [({"num_heads": 16}, "heads have 4 channels"), ({"image_seq_len": 2304}, "attends to 2")]
)
def test_heads_and_lengths_that_the_kernels_cannot_do_are_named(patch1, prepacked, change, message):
    with pytest.raises(CompatibilityError, match=f"{message}.*use TensorRT"):
        check(replace(patch1.spec, **change), Weights(prepacked(patch1.bundle)))


def test_the_limits_are_those_of_the_kernels():
    limits = f"MAX_POSITIONS = {MAX_POSITIONS}, MAX_HEAD_DIM = {MAX_HEAD_DIM},"
    assert limits in MODEL.with_name("attention.cuh").read_text()


def test_weights_that_do_not_fit_say_what_is_free(patch1, prepacked, host):
    weights = Weights(prepacked(patch1.bundle))
    with pytest.raises(EngineError, match=r"its weights need \d+ MiB of device memory, 0 MiB are free"):
        weights.load(EmulatedDevice(host, memory=1000))


def test_profiles_double_while_all_fit_together(patch1, prepacked):
    weights, passes = Weights(prepacked(patch1.bundle)), len(patch1.bundle.recipe.allocation)

    def needed(profile):
        buffers = buffer_sizes(patch1.spec, profile, itemsize=2, in_place=True)
        return sum(buffers.values()) + scratch_bytes(patch1.spec, profile, weights)

    four = [Profile.of(images, guided=True, passes=passes) for images in (1, 2, 4, 8)]
    enough = int(sum(map(needed, four)) / 0.9) + 1
    assert list(profiles(patch1.spec, passes, weights, enough)) == four
    assert list(profiles(patch1.spec, passes, weights, enough - 1000)) == four[:3]
    assert [profile.rows for profile in profiles(patch1.spec, passes, weights, 0)] == [2]
    assert max(profile.rows for profile in profiles(patch1.spec, passes, weights, 2**50)) == 512


def test_many_rows_take_larger_blocks_where_these_keep_the_whole_gpu_busy():
    assert [block_rows(rows, 768, 132) for rows in (1, 16, 17, 64, 65, 512)] == [16, 16, 32, 64, 64, 64]
    assert block_rows(11 * 128, 768, 132) == 128  # 11 x 12 blocks
    assert block_rows(11 * 128 - 128, 768, 132) == 64
    assert block_rows(65, 768, 12) == 128


# -- on a driver ------------------------------------------------------------------------------------------------------


@pytest.fixture
def driver(monkeypatch):
    """A driver that keeps books, and nothing to compile with."""
    return stand_in(monkeypatch, FakeDriver(memory=2**26))


def nothing_is_held(driver):
    return not driver.memory and not any(driver.held.values()) and not driver.contexts


def test_the_engine_holds_weights_and_loops_until_it_is_closed(patch1, prepacked, driver):
    engine = start(prepacked(patch1.bundle), 1)
    (resident,) = driver.memory.values()
    packed = (prepacked(patch1.bundle).path / "weights.safetensors").read_bytes()
    assert resident.tobytes() == packed  # one allocation, one copy
    bits, images = engine.draw(batch_of(patch1.bundle, [1, 2, 3]))  # in a profile of four
    assert bits.shape[0] == images.shape[0] == 3
    launched = {name for name, *_ in driver.launched}
    assert {"few_rows_fp16_16", "many_rows_fp16", "attend_step", "conv_out"} <= launched
    threads = {size[3] for name, size, _ in driver.launched if name.startswith(("few_rows", "many_rows", "attend"))}
    assert threads == {THREADS}
    one_pass = (patch1.spec.bits_per_token,)
    assert len(engine.sample(batch_of(patch1.bundle, [1], allocation=one_pass))) == 1  # nothing was compiled for three
    engine.close()
    assert nothing_is_held(driver)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda driver: setattr(driver, "total", 1000), EngineError, "its weights need"),
        (lambda driver: driver.answers.update(cuLaunchKernel=CUresult.CUDA_ERROR_INVALID_VALUE), None, ""),
        (
            lambda driver: driver.answers.update(cuMemcpyHtoDAsync=CUresult.CUDA_ERROR_INVALID_VALUE),
            EngineError,
            "answ",
        ),
    ],
)
def test_a_start_that_fails_holds_nothing(patch1, prepacked, driver, change, error, message):
    change(driver)
    if error is None:
        engine = start(prepacked(patch1.bundle), 1)
        with pytest.raises(EngineError, match="answered CUDA_ERROR_INVALID_VALUE to cuLaunchKernel of "):
            engine.sample(batch_of(patch1.bundle, [1]))
        engine.close()
    else:
        with pytest.raises(error, match=message):
            start(prepacked(patch1.bundle), 1)
    assert nothing_is_held(driver)


def test_after_an_error_of_cuda_the_next_engine_gets_a_new_context(patch1, prepacked, driver):
    """Such a context gives nothing back, not even memory, and whoever shares it meets the error again."""
    engine = start(prepacked(patch1.bundle), 1)
    engine.sample(batch_of(patch1.bundle, [1]))
    for call in ("cuStreamSynchronize", "cuMemFree", "cuModuleUnload"):
        driver.answers[call] = CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(EngineError):
        engine.close()
    assert not driver.held["context"] and not driver.contexts


def test_an_old_gpu_starts_no_engine(patch1, prepacked, driver, monkeypatch):
    monkeypatch.setattr(device_module, "capability", lambda driver, device: 75)
    with pytest.raises(CompatibilityError, match=r"SM 7\.5"):
        start(prepacked(patch1.bundle), 1)
    assert nothing_is_held(driver)


def test_a_gpu_proves_itself(digits, prepacked):
    if not status("cuda").usable:
        pytest.skip(f"no GPU here to run the engine: {status('cuda').detail}")
    with Generator(prepacked(digits.bundle), engine="cuda") as generator:
        result = selftest.run(generator)
    assert result.passed, result.sentence
