"""The GPU loop draws what the ONNX Runtime engine draws: every bit, on graphs and kernels executed on the CPU."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from onnx import TensorProto

from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.cuda.loop import TABLES, buffer_sizes
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.cuda.timeline import STAGES, Timeline
from bar_edge.runtime.errors import CompatibilityError, EngineError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import RecordedNoise, SeededNoise
from bar_edge.runtime.sampling import Schedule, to_fine_grid, to_raster
from bar_edge.runtime.spec import Recipe

from . import emulated
from .emulated import EmulatedDevice, emulated_loop, loop_tables


@pytest.fixture
def emulate(host, tmp_path):
    """Makes loops; afterwards nobody has written behind a buffer, and closing them leaves nothing allocated."""
    made = []

    def make(bundle, profile, **options):
        folder = tmp_path / f"weights-{len(made)}"
        folder.mkdir()
        made.append(emulated_loop(bundle, host, folder, profile, **options))
        return made[-1]

    yield make
    for gpu in made:
        gpu.device.check_guards()
        gpu.loop.close()
        assert gpu.device.allocated_bytes == 0


@pytest.fixture
def devices(monkeypatch):
    """Every emulated device that is made, so that one can be looked at whose loop was refused."""
    made = []

    def make(*args):
        made.append(EmulatedDevice(*args))
        return made[-1]

    monkeypatch.setattr(emulated, "EmulatedDevice", make)
    return made


@pytest.fixture
def patch2(cases):
    return cases("patch2")


def profile_of(case, images=3, *, guided=True):
    return Profile.of(images, guided=guided, passes=len(case.bundle.recipe.allocation))


def batch_of(case, classes, *, seed=3, random_order=False, **recipe):
    """Some images, guided unless the recipe says otherwise."""
    changed = replace(case.bundle.recipe, **({"guidance": 3.0} | recipe))
    noise = SeededNoise(seed, range(5, 5 + len(classes)), random_order=random_order)
    return Batch(np.array(classes), changed, noise, noise.orders(case.spec.num_tokens))


def recorded_batch(case, name, read_sampling):
    """The recorded sampling `name`, with its classes, noise and order."""
    recorded = case.recorded(name)
    recipe, noise = read_sampling(recorded)
    return Batch(recorded["class_ids"].astype(np.int64), recipe, noise, noise.orders(case.spec.num_tokens))


def raster(case, tokens, batch):
    return to_fine_grid(to_raster(tokens, batch.orders), case.spec)


def expected(case, batch, history=None):
    """What the ONNX Runtime engine draws."""
    return case.runtime._engine.sample(batch, None, history)


def random_bits(case, images):
    shape = (images, case.spec.image_seq_len, case.spec.token_size)
    return np.random.default_rng(1).integers(0, 2, shape, dtype=np.uint8)


def bytes_of(case, profile):
    """What a loop needs, tables included."""
    tables = sum(table.nbytes for table in loop_tables(case.bundle).values())
    return sum(buffer_sizes(case.spec, profile, itemsize=4, in_place=True).values()) + tables


TOKEN = "replay of place_token"


def from_first_token(device):
    """Events since the first token."""
    return device.events[device.events.index(TOKEN) :]


@torch.inference_mode()
def first_logits(case, batch, loop):
    """Logits [rows, K, 2] of the reference's first head pass from the latents that a loop had last."""
    latents = torch.from_numpy(loop.last_latents(len(batch.class_ids)))
    ratio = Schedule.of(batch.recipe, case.spec.bits_per_token).mask_ratio[0]
    nothing_known = torch.full((len(latents), case.spec.bits_per_token), 2)
    return case.reference.lm_head(nothing_known, latents, torch.full((len(latents),), float(ratio))).numpy()


class DeviceBits:
    """Somebody else's device array."""

    def __init__(self, device, array, **facts):
        self.address = device.allocate(array.nbytes)
        device.upload(self.address, array)
        self._shape, self._dtype, self._facts = array.shape, array.dtype, facts

    def __len__(self):
        return self._shape[0]

    @property
    def __cuda_array_interface__(self):
        return {
            "shape": self._shape, "typestr": self._dtype.str, "data": (self.address, False), "version": 3,
            "strides": None, **self._facts,
        }  # fmt: skip


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "apart"])
def test_every_model_draws_what_onnxruntime_draws(golden, emulate, in_place):
    loop = emulate(golden.bundle, profile_of(golden), in_place=in_place).loop
    batch = batch_of(golden, [1, 0, 1], random_order=True)
    np.testing.assert_array_equal(loop.sample(batch), expected(golden, batch))


def test_recorded_noise_draws_the_recorded_images(golden, emulate, read_sampling, sampling):
    batch = recorded_batch(golden, sampling, read_sampling)
    loop = emulate(golden.bundle, profile_of(golden, guided=batch.recipe.guidance > 1)).loop
    np.testing.assert_array_equal(
        raster(golden, loop.sample(batch), batch).reshape(3, -1), golden.recorded(sampling)["ids"].reshape(3, -1)
    )


def test_uniforms_drawn_on_the_device_are_those_drawn_on_the_host(small, emulate):
    loop = emulate(small.bundle, profile_of(small)).loop
    seeded = batch_of(small, [4, 9, 2], seed=2**63 + 5)
    sizes = (small.spec.num_tokens, len(seeded.recipe.allocation), small.spec.bits_per_token)
    recorded = replace(seeded, noise=RecordedNoise(*seeded.noise.uniforms(*sizes)))
    np.testing.assert_array_equal(loop.sample(seeded), loop.sample(recorded))


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "apart"])
def test_one_loop_draws_any_batch_that_fits_in_turn(small, emulate, in_place):
    loop = emulate(small.bundle, profile_of(small), in_place=in_place).loop
    for batch in (
        batch_of(small, [1, 2, 3]),
        batch_of(small, [1, 2, 3, 4, 5, 6], guidance=1.0),  # as many rows, twice the images
        batch_of(small, [7]),
        batch_of(small, [8, 10], random_order=True),  # the unconditional class among them
        batch_of(small, [9], guidance=1.0),
        batch_of(small, [3, 3, 3], guidance=6.5, temperature=0.5),
        batch_of(small, [0, 1], allocation=(1, 2, 2, 5)),
        batch_of(small, [1, 2], temperature=0.0),
    ):
        np.testing.assert_array_equal(loop.sample(batch), expected(small, batch))


def test_an_image_does_not_depend_on_its_company(small, emulate):
    loop = emulate(small.bundle, profile_of(small)).loop
    batch = batch_of(small, [1, 2, 3], random_order=True)
    alone = np.concatenate([loop.sample(batch.part(i, i + 1)) for i in range(3)])
    np.testing.assert_array_equal(alone, loop.sample(batch))


def test_the_same_batch_twice_gives_the_same_bits(small, emulate):
    loop = emulate(small.bundle, profile_of(small)).loop
    batch = batch_of(small, [1, 2, 3])
    first = loop.sample(batch)
    np.testing.assert_array_equal(loop.sample(batch), first)


def test_two_loops_do_not_disturb_each_other(small, patch1, emulate):
    loops = [(case, emulate(case.bundle, profile_of(case)).loop) for case in (small, patch1, small)]
    for seed in (1, 2):
        for case, loop in loops:
            batch = batch_of(case, [1, 2], seed=seed)
            np.testing.assert_array_equal(loop.sample(batch), expected(case, batch))


def test_capacity_is_in_images(small, emulate):
    loop = emulate(small.bundle, profile_of(small)).loop
    assert loop.capacity(Recipe(2.0, 1.0, (10,))) == 3
    assert loop.capacity(Recipe(1.0, 1.0, (10,))) == 6


def test_more_images_than_fit_are_refused(small, emulate):
    loop = emulate(small.bundle, profile_of(small)).loop
    with pytest.raises(EngineError, match="4 images in a batch, these engines were compiled for 3"):
        loop.sample(batch_of(small, [0, 1, 2, 3]))


def test_another_number_of_passes_is_refused_by_name(small, emulate):
    loop = emulate(small.bundle, profile_of(small)).loop
    with pytest.raises(CompatibilityError, match=r"allocation 3,7: .* compiled for 4 head passes"):
        loop.sample(batch_of(small, [0], allocation=(3, 7)))


def test_a_single_pass_unmasks_all_bits(small, emulate):
    loop = emulate(small.bundle, Profile.of(2, guided=True, passes=1)).loop
    batch = batch_of(small, [0, 1], allocation=(small.spec.bits_per_token,))
    np.testing.assert_array_equal(loop.sample(batch), expected(small, batch))


def test_a_guided_batch_leaves_an_odd_row_aside(small, emulate):
    loop = emulate(small.bundle, profile_of(small, 5, guided=False)).loop
    for batch in (batch_of(small, [1, 1, 1, 1, 1], guidance=1.0), batch_of(small, [6, 7])):
        np.testing.assert_array_equal(loop.sample(batch), expected(small, batch))


def test_the_odd_row_reads_nothing_out_of_bounds(small, emulate):
    profile = replace(profile_of(small, 5, guided=False), modulation_pairs=6)  # with 64, token 20 is the first
    loop = emulate(small.bundle, profile).loop
    loop.sample(batch_of(small, [1, 2, 3, 4, 5], guidance=1.0))
    loop.sample(batch_of(small, [6, 7]))


def test_the_odd_row_has_no_latents(small, emulate):
    loop = emulate(small.bundle, profile_of(small, 5, guided=False)).loop
    loop.sample(batch_of(small, [6, 7]))
    assert len(loop.last_latents(2)) == 4


# ---- led by what was recorded ----


def test_led_by_recorded_tokens_the_decisions_are_equal(small, emulate, read_sampling):
    batch = recorded_batch(small, "sample_random_order", read_sampling)
    loop = emulate(small.bundle, profile_of(small)).loop
    shape = (3, small.spec.num_tokens, small.spec.bits_per_token)
    history = np.random.default_rng(0).integers(0, 2, shape, dtype=np.uint8)
    led = loop.sample(batch, None, history)
    np.testing.assert_array_equal(led, expected(small, batch, history))
    assert (led != loop.sample(batch)).any()  # or the history was not looked at


def test_led_by_its_own_bits_it_draws_them_again(small, emulate):
    loop = emulate(small.bundle, profile_of(small)).loop
    for batch in (batch_of(small, [1, 2], random_order=True), batch_of(small, [1, 2, 3, 4], guidance=1.0)):
        drawn = loop.sample(batch)
        np.testing.assert_array_equal(loop.sample(batch, None, drawn), drawn)


# ---- pixels and latents ----


def test_draw_is_sample_and_decode(golden, emulate):
    gpu = emulate(golden.bundle, profile_of(golden))
    batch = batch_of(golden, [1, 0], random_order=True)
    bits, images = gpu.loop.draw(batch)
    expected_bits, expected_images = golden.runtime._engine.draw(batch)
    np.testing.assert_array_equal(bits, expected_bits)
    np.testing.assert_allclose(images, expected_images, atol=1e-4)
    np.testing.assert_array_equal(gpu.loop.decode(raster(golden, bits, batch)), images)


def test_drawing_decodes_without_the_host_in_between(small, emulate):
    gpu = emulate(small.bundle, profile_of(small))
    gpu.loop.draw(batch_of(small, [1, 2, 3]))
    last_token = max(i for i, event in enumerate(gpu.device.events) if event == TOKEN)
    after = [event for event in gpu.device.events[last_token:] if event in ("to_cells", "upload", "download")]
    assert after == ["to_cells", "download", "download"]


def test_more_images_than_the_decoder_takes_are_decoded_in_turn(patch2, emulate):
    profile = replace(profile_of(patch2, 4, guided=False), decode_images=2)
    batch = batch_of(patch2, [1, 2, 3], guidance=1.0)
    gpu = emulate(patch2.bundle, profile)
    _, images = gpu.loop.draw(batch)
    np.testing.assert_allclose(images, patch2.runtime._engine.draw(batch)[1], atol=1e-4)
    assert gpu.device.events.count("decode") == 2


def test_what_the_decoder_is_bound_to_is_aligned_for_any_model(patch1, emulate):
    loop = emulate(patch1.bundle, profile_of(patch1)).loop
    loop.draw(batch_of(patch1, [1, 2, 3, 4, 5, 6], guidance=1.0))  # the decoder takes 3, of 384 bytes each


def test_more_images_than_rows_are_decoded(patch1, emulate):
    loop = emulate(patch1.bundle, profile_of(patch1, 2, guided=False)).loop
    bits = random_bits(patch1, 5)
    np.testing.assert_allclose(loop.decode(bits), patch1.runtime._engine.decode(bits), atol=1e-4)
    assert loop.decode(bits[:0]).shape == (0, 3, patch1.spec.image_size, patch1.spec.image_size)


def test_bits_on_the_device_are_decoded_where_they_are(patch1, emulate):
    gpu = emulate(patch1.bundle, profile_of(patch1, 2, guided=False))
    bits = random_bits(patch1, 5)
    theirs = DeviceBits(gpu.device, bits.astype(np.float32), stream=None)
    gpu.device.events.clear()
    np.testing.assert_array_equal(gpu.loop.decode(theirs), gpu.loop.decode(bits))
    gpu.device.free(theirs.address)
    assert "upload" not in gpu.device.events[: gpu.device.events.index("download")]


@pytest.mark.parametrize(
    ("facts", "waited"), [({"stream": None}, []), ({"stream": 5}, ["wait for 5"]), ({}, ["wait for None"])]
)
def test_who_made_bits_on_the_device_is_waited_for(patch1, emulate, facts, waited):
    gpu = emulate(patch1.bundle, profile_of(patch1, 2, guided=False))
    theirs = DeviceBits(gpu.device, random_bits(patch1, 2).astype(np.float32), **facts)
    gpu.device.events.clear()
    gpu.loop.decode(theirs)
    gpu.device.free(theirs.address)
    assert [event for event in gpu.device.events if event.startswith("wait")] == waited
    assert gpu.device.events[: len(waited)] == waited


def test_bits_of_another_shape_on_the_device_are_refused(patch1, emulate):
    gpu = emulate(patch1.bundle, profile_of(patch1))
    theirs = DeviceBits(gpu.device, np.zeros((2, 3, 4), np.float32))
    with pytest.raises(EngineError, match=r"float32 \[2, 16, 6\] is needed, got float32 \[2, 3, 4\]"):
        gpu.loop.decode(theirs)
    gpu.device.free(theirs.address)


def test_images_stay_on_the_device_for_others(small, emulate):
    gpu = emulate(small.bundle, profile_of(small))
    _, images = gpu.loop.draw(batch_of(small, [1, 2]))
    shared = gpu.loop.images_on_device(2, stream=7).__cuda_array_interface__
    found = np.empty(shared["shape"], np.dtype(shared["typestr"]))
    gpu.device.download(shared["data"][0], found)
    np.testing.assert_array_equal(found, images)
    assert shared["stream"] == 7


@pytest.mark.parametrize("classes", [[1, 2, 3], [4, 5]], ids=["full", "padded"])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_the_last_latents_are_those_of_onnxruntime(small, emulate, classes, guidance):
    loop = emulate(small.bundle, profile_of(small)).loop
    batch = batch_of(small, classes, guidance=guidance)
    loop.sample(batch)
    expected(small, batch)
    np.testing.assert_allclose(loop.last_latents(len(classes)), small.runtime._engine.last_latents(), atol=1e-5)


@pytest.mark.parametrize("classes", [[1, 2, 3], [4, 5]], ids=["full", "padded"])
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_the_first_logits_are_those_of_the_reference(small, emulate, classes, guidance):
    loop = emulate(small.bundle, profile_of(small)).loop
    batch = batch_of(small, classes, guidance=guidance)
    loop.sample(batch)
    reference = first_logits(small, batch, loop)
    found = loop.first_logits(len(classes))
    np.testing.assert_allclose(found, reference, rtol=0, atol=2e-6 * np.abs(reference).max())


def test_looking_at_the_logits_changes_nothing_that_is_drawn(small, emulate):
    loop, batch = emulate(small.bundle, profile_of(small)).loop, batch_of(small, [1, 2])
    drawn, logits = loop.sample(batch), loop.first_logits(2)
    np.testing.assert_array_equal(loop.first_logits(2), logits)
    np.testing.assert_array_equal(loop.sample(batch), drawn)


# ---- what the device is asked to do ----


def test_a_token_needs_nothing_from_the_host(small, emulate):
    gpu = emulate(small.bundle, profile_of(small))
    for history in (None, np.zeros((3, small.spec.num_tokens, small.spec.bits_per_token), np.uint8)):
        gpu.device.events.clear()
        gpu.loop.sample(batch_of(small, [1, 2, 3]), None, history)
        during = from_first_token(gpu.device)
        assert during.count(TOKEN) == small.spec.num_tokens
        assert "upload" not in during
        assert during.index("download") == len(during) - 1


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "apart"])
def test_what_a_token_is_made_of(small, emulate, in_place):
    gpu = emulate(small.bundle, profile_of(small), in_place=in_place)
    gpu.loop.sample(batch_of(small, [1, 2, 3]))
    token = ["place_token", "gather_rows", "embed", "step"] + ([] if in_place else ["write_kv"])
    token += ["head_embed", "head_pass", "sample_pass"] * len(small.bundle.recipe.allocation) + ["advance"]
    assert from_first_token(gpu.device) == [TOKEN, *token] * small.spec.num_tokens + ["download"]


def test_a_token_is_captured_once_for_as_many_images(small, emulate, monkeypatch):
    gpu = emulate(small.bundle, profile_of(small))
    captured, capture = [], gpu.device.capture
    monkeypatch.setattr(gpu.device, "capture", lambda work: captured.append(capture(work)) or captured[-1])
    for batch in (
        batch_of(small, [1]),
        batch_of(small, [1, 2, 3], temperature=0.5, allocation=(1, 1, 4, 4)),
        batch_of(small, [1], guidance=1.0),
        batch_of(small, [2], random_order=True),
    ):
        gpu.loop.sample(batch)
    tokens = [recording for recording in captured if recording[0][0] == "place_token"]
    assert len(tokens) == 2  # guided, and not


def test_all_graphs_are_replayed_from_the_second_image_on(small, emulate):
    gpu = emulate(small.bundle, replace(profile_of(small), prefix_rows=2, modulation_pairs=9))
    first = gpu.loop.draw(batch_of(small, [1, 2, 3]))
    gpu.device.events.clear()
    again = gpu.loop.draw(batch_of(small, [1, 2, 3]))
    np.testing.assert_array_equal(again[0], first[0])
    np.testing.assert_array_equal(again[1], first[1])
    for graph in ("mask_ratio", "modulation", "prefix", "decode"):
        befores = [before for before, event in pairwise(gpu.device.events) if event == graph]
        assert befores and set(befores) == {f"replay of {graph}"}


# ---- the time of its parts ----


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "apart"])
def test_a_timeline_tells_what_every_part_of_a_token_took(small, emulate, in_place):
    gpu = emulate(small.bundle, profile_of(small), in_place=in_place)
    gpu.device.durations |= {"step": 100.0, "head_pass": 10.0}
    timeline, passes, tokens = Timeline(gpu.device), len(small.bundle.recipe.allocation), small.spec.num_tokens
    gpu.loop.draw(batch_of(small, [1, 2, 3]), timeline=timeline)
    seconds = timeline.seconds()
    trunk = 100 + 3 + (0 if in_place else 1)  # the step; place_token, gather_rows and embed; write_kv
    assert seconds["trunk"] == [trunk] * tokens
    assert seconds["head"] == [passes * 12 + 1] * tokens  # the pass, head_embed and sample_pass; advance
    assert seconds["decode"] == [1 + 3]  # to_cells; two copies and the decoder


def test_the_parts_of_a_timeline_add_up_to_what_the_device_did(small, emulate):
    profile = replace(profile_of(small), modulation_pairs=7)  # modulation is due within the loop as well
    gpu = emulate(small.bundle, profile)
    gpu.loop.draw(batch_of(small, [1, 2, 3]), timeline=Timeline(gpu.device))  # captures
    timeline, before = Timeline(gpu.device), gpu.device.clock
    gpu.loop.draw(batch_of(small, [1, 2, 3]), timeline=timeline)
    seconds = timeline.seconds()
    assert tuple(seconds) == STAGES
    assert sum(map(sum, seconds.values())) == gpu.device.clock - before
    assert len(seconds["prefix"]) > 2


def test_with_a_timeline_the_same_is_drawn_and_afterwards_a_token_is_one_graph_again(small, emulate):
    gpu = emulate(small.bundle, profile_of(small))
    batch = batch_of(small, [1, 2, 3], random_order=True)
    bits, images = gpu.loop.draw(batch)
    timed_bits, timed_images = gpu.loop.draw(batch, timeline=Timeline(gpu.device))
    np.testing.assert_array_equal(timed_bits, bits)
    np.testing.assert_array_equal(timed_images, images)
    gpu.device.events.clear()
    gpu.loop.draw(batch)
    assert gpu.device.events.count(TOKEN) == small.spec.num_tokens
    assert "replay of head_embed" not in gpu.device.events


@pytest.mark.parametrize(("classes", "positions"), [([1], 3), ([1, 2], 2), ([1, 2, 3], 1)])
def test_modulation_is_computed_when_it_is_due(small, emulate, classes, positions):
    profile = replace(profile_of(small), modulation_pairs=7)  # the unconditional class is one more
    gpu = emulate(small.bundle, profile)
    batch = batch_of(small, classes)
    np.testing.assert_array_equal(gpu.loop.sample(batch), expected(small, batch))
    tokens = [event for event in from_first_token(gpu.device) if event in (TOKEN, "modulation")]
    due = [["modulation"] if n and n % positions == 0 else [] for n in range(small.spec.num_tokens)]
    assert tokens == [event for chunk in due for event in [*chunk, TOKEN]]


def test_as_many_classes_as_rows(small, emulate):
    profile = replace(profile_of(small, 11, guided=False), modulation_pairs=11)
    gpu = emulate(small.bundle, profile)
    batch = batch_of(small, list(range(11)), guidance=1.0)
    np.testing.assert_array_equal(gpu.loop.sample(batch), expected(small, batch))


@pytest.mark.parametrize("prefix_rows", [1, 2, 3, 6])
def test_a_prefix_in_groups_of_rows_and_chunks_of_positions(small, emulate, prefix_rows):
    profile = replace(profile_of(small), prefix_rows=prefix_rows, modulation_pairs=9)
    gpu = emulate(small.bundle, profile)
    for batch in (batch_of(small, [1, 2, 3], random_order=True), batch_of(small, [4, 5, 6, 7], guidance=1.0)):
        gpu.device.events.clear()
        np.testing.assert_array_equal(gpu.loop.sample(batch), expected(small, batch))
        assert gpu.device.events.count("prefix") == 6 // prefix_rows
        before = gpu.device.events[: gpu.device.events.index("prefix")]
        assert before.count("modulation") > 1


# ---- memory ----


def test_the_loop_allocates_what_it_says(golden, emulate):
    for in_place in (True, False):
        gpu = emulate(golden.bundle, profile_of(golden), in_place=in_place)
        sizes = buffer_sizes(golden.spec, profile_of(golden), itemsize=4, in_place=in_place)
        tables = sum(table.nbytes for table in loop_tables(golden.bundle).values())
        assert gpu.device.allocated_bytes == gpu.loop.bytes == sum(sizes.values()) + tables
        assert len(gpu.device.allocations) == len(list(filter(None, sizes.values()))) + len(TABLES)
        gpu.loop.sample(batch_of(golden, [1]))
        assert gpu.device.allocated_bytes == gpu.loop.bytes  # nothing is allocated later


def test_closing_frees_everything_and_may_be_repeated(small, emulate):
    gpu = emulate(small.bundle, profile_of(small))
    gpu.loop.sample(batch_of(small, [1]))
    gpu.loop.close()
    assert gpu.device.allocated_bytes == 0
    assert not gpu.device.closed  # it is not the loop's
    gpu.loop.close()


def test_too_little_memory_is_refused_with_the_batch_that_fits(small, host, tmp_path, devices):
    profile = profile_of(small, 8)
    needed = bytes_of(small, profile)
    free = (needed + bytes_of(small, profile_of(small, 4))) // 2
    with pytest.raises(EngineError) as refused:
        emulated_loop(small.bundle, host, tmp_path, profile, memory=free)
    (device,) = devices
    assert device.allocated_bytes == 0
    text = str(refused.value)
    assert f"needs {needed / 2**20:.0f} MiB of device memory for 16 rows" in text
    assert f"{free / 2**20:.0f} MiB are free" in text  # before the loop took any
    images = int(text.rpartition("a batch of ")[2])
    assert 4 <= images < 8
    assert bytes_of(small, profile_of(small, images)) <= free


def test_memory_that_holds_no_loop_at_all_is_refused_with_another_remedy(small, host, tmp_path, devices):
    with pytest.raises(EngineError, match="0 MiB are free: not one guided image would fit; free some memory"):
        emulated_loop(small.bundle, host, tmp_path, profile_of(small), memory=2**12)
    assert devices[0].allocated_bytes == 0


def test_a_batch_that_does_not_fit_is_not_advised(small, host, tmp_path):
    free = bytes_of(small, profile_of(small, 1)) - 1
    with pytest.raises(EngineError, match="not one guided image would fit; free some memory"):
        emulated_loop(small.bundle, host, tmp_path, profile_of(small, 8), memory=free)


# ---- other precisions ----


def test_quantized_decisions_are_those_of_onnxruntime(small, precision, emulate):
    bundle = small.quantized(precision)
    loop = emulate(bundle, profile_of(small)).loop
    batch = batch_of(small, [1, 2, 3])
    history = expected(small, batch)
    led = loop.sample(batch, None, history)
    with Generator(bundle, engine="onnxruntime", threads=1) as runtime:
        assert (led != runtime._engine.sample(batch, None, history)).mean() < 0.01


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "apart"])
def test_float16_decides_almost_as_float32_does(small, emulate, in_place):
    try:
        gpu = emulate(small.bundle, profile_of(small), in_place=in_place, dtype=TensorProto.FLOAT16)
    except EngineError as error:
        pytest.skip(f"ONNX Runtime's CPU does not run float16 graphs: {error}")
    batch = batch_of(small, [1, 2, 3], random_order=True)
    history = expected(small, batch)
    led = gpu.loop.sample(batch, None, history)
    assert (led != history).mean() < 0.01
