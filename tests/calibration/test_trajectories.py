"""Calibration sees what the loop really computes, every image once, and is read back only by what it belongs to."""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bar_edge.benchmarks.random_checkpoint import random_generator, random_tokenizer, write_checkpoint
from bar_edge.calibration import trajectories
from bar_edge.calibration.probe import ProbeEngine, linear_layers
from bar_edge.calibration.trajectories import Calibration, RealImages, collect, make_batch, make_plan
from bar_edge.export.exporter import export_bundle
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.errors import CalibrationError
from bar_edge.runtime.sampling import to_fine_grid, to_tokens
from bar_edge.runtime.spec import ModelSpec, Recipe

QUARTERS = [f"tokens {i}/4" for i in (1, 2, 3, 4)]
BRANCHES = ("conditional", "unconditional")


def in_branches(*strata: str) -> set[str]:
    return {f"{stratum} {branch}" for stratum in strata for branch in BRANCHES}


def groups_of(case) -> dict[str, list[str]]:
    return linear_layers(case.spec, weights.read_places(case.bundle.path / weights.FILE_NAME))


def assert_same_statistics(one: Calibration, other: Calibration) -> None:
    assert one.stats.keys() == other.stats.keys()
    for layer, stats in one.stats.items():
        again = other.stats[layer]
        assert stats.count == again.count, layer
        np.testing.assert_array_equal(stats.channel_max, again.channel_max, err_msg=layer)
        np.testing.assert_allclose(stats.channel_square, again.channel_square, rtol=1e-9, err_msg=layer)
        counts, counts_again = ({name: s.count for name, s in each.strata.items()} for each in (stats, again))
        assert counts == counts_again, layer


# -- what is seen ------------------------------------------------------------------------------------------------------


def test_every_linear_layer_is_seen(small, digits):
    for case in (small, digits):
        groups = groups_of(case)
        assert all(groups[name] for name in ("modulation", "trunk", "head", "decode"))
        assert case.calibration.stats.keys() == {layer for group in groups.values() for layer in group}
        for layer, stats in case.calibration.stats.items():
            assert stats.count > 0 and (stats.channel_max > 0).any(), layer


def test_layers_are_stratified_by_position_pass_and_branch(small):
    passes = [f"pass {s + 1}" for s in range(len(small.bundle.recipe.allocation))]
    assert len(passes) > 1
    strata = {
        "modulation": {"positions"},
        "trunk": {"prefix"} | in_branches(*QUARTERS),
        "head": in_branches(*passes),
        "decode": {"cells"},
    }
    for name, group in groups_of(small).items():
        for layer in group:
            # the prefix's latent conditions nothing
            expected = strata[name] - ({"prefix"} if layer == "latent_condition_proj" else set())
            assert small.calibration.stats[layer].strata.keys() == expected, layer


def test_the_modulation_is_seen_of_every_class_drawn_and_of_the_unconditional_one(small):
    """It is modulated too, at every token."""
    plan, spec = small.calibration.plan, small.spec
    classes = [{*plan.class_ids[i : i + plan.batch_size], spec.unconditional_class} for i in (0, plan.batch_size)]
    positions = spec.prefix_length + spec.num_tokens - 1
    assert plan.images == 2 * plan.batch_size and positions <= 64  # few enough to be seen at all of them
    for layer in groups_of(small)["modulation"]:
        assert small.calibration.stats[layer].count == positions * sum(map(len, classes))


def test_strata_are_equally_full(small):
    spec, images = small.spec, small.calibration.plan.images
    for layer in ("blocks.1.mlp.w3", "lm_head.transformer.2.mlp.w12", "lm_head.adaln_before_head.adaLN_modulation.1"):
        strata = small.calibration.stats[layer].strata
        rows = images * spec.num_tokens // (1 if layer.startswith("lm_head.") else len(QUARTERS))
        assert {stratum.count for name, stratum in strata.items() if name != "prefix"} == {rows}


def test_without_guidance_there_is_one_branch(small):
    bundle = replace(small.bundle, recipe=replace(small.bundle.recipe, guidance=1.0))
    found = collect(bundle, make_plan(bundle.spec, images=4, seed=1, batch_size=4), threads=1)
    for layer in ("blocks.0.attn.qkv", "lm_head.output_embed"):
        names = found.stats[layer].strata.keys() - {"prefix"}
        assert names and all(name.endswith(" conditional") for name in names)
    rows = sum(s.count for name, s in found.stats["blocks.0.attn.qkv"].strata.items() if name != "prefix")
    assert rows == 4 * small.spec.num_tokens


def walked(bundle: Bundle, plan: trajectories.Plan, bits: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Every row that every layer of the trunk sees at the tokens, collected without bounds: led along bits if given."""
    seen: dict[str, list[np.ndarray]] = {}
    engine = ProbeEngine(bundle, {}, threads=1)
    for begin in range(0, plan.images, plan.batch_size):
        part = slice(begin, begin + plan.batch_size)
        ids = np.array(plan.class_ids[part])
        for n, step in engine.probe_walk(make_batch(bundle, ids, plan.seed, range(begin, begin + len(ids)))):
            step.run()
            for layer, value in step.inputs().items():
                seen.setdefault(layer, []).append(value.reshape(-1, value.shape[-1]).copy())
            if bits is not None:
                step.drawn[:] = bits[part, n]
    engine.close()
    return {layer: np.concatenate(parts) for layer, parts in seen.items()}


def at_tokens(found: Calibration, layer: str) -> Iterator[np.ndarray]:
    for name, stratum in found.stats[layer].strata.items():
        if name != "prefix":
            yield from stratum.rows


def test_the_statistics_are_those_of_every_row_of_the_walk(small):
    """Nothing is seen twice, skipped, or overwritten before it is counted."""
    for layer, rows in walked(small.bundle, small.calibration.plan).items():
        stats = small.calibration.stats[layer]
        known = Counter(row.tobytes() for row in rows)
        sampled = Counter(row.tobytes() for row in at_tokens(small.calibration, layer))
        assert not sampled - known, layer
        if layer.startswith("lm_head."):
            assert stats.count == len(rows), layer
            np.testing.assert_array_equal(stats.channel_max, np.abs(rows).max(axis=0), err_msg=layer)
            square = np.square(rows, dtype=np.float64).mean(axis=0)
            np.testing.assert_allclose(stats.mean_square, square, rtol=1e-5, err_msg=layer)
        else:  # the trunk: few enough rows to be sampled whole
            assert sampled == known, layer
            tokens = stats.count - (stats.strata["prefix"].count if "prefix" in stats.strata else 0)
            assert tokens == len(rows), layer
            assert (stats.channel_max >= np.abs(rows).max(axis=0)).all(), layer


def test_the_batch_size_changes_no_statistic_of_the_tokens(small):
    plan = small.calibration.plan
    other = collect(small.bundle, replace(plan, batch_size=3), threads=1)
    for layer in groups_of(small)["head"]:
        one, two = small.calibration.stats[layer], other.stats[layer]
        assert one.count == two.count
        np.testing.assert_allclose(one.channel_max, two.channel_max, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(one.mean_square, two.mean_square, rtol=1e-3, atol=1e-6)


def test_what_is_kept_does_not_grow_with_the_images(small):
    """Every stratum is cut at a size of its own, and gets that far."""
    found = collect(small.bundle, make_plan(small.spec, images=32, seed=1, batch_size=8), threads=1)
    full = 0
    for layer, stats in found.stats.items():
        assert stats.count > small.calibration.stats[layer].count
        for name, stratum in stats.strata.items():
            assert len(stratum.rows) == min(stratum.count, stratum.capacity) <= 384, (layer, name)
            assert stratum.capacity == small.calibration.stats[layer].strata[name].capacity
            full += stratum.count > stratum.capacity
    assert full > 100


def test_a_prefix_of_two_positions_is_still_the_prefix(tmp_path):
    """With one repetition of the class only one position comes before the step that draws."""
    spec = ModelSpec(
        hidden_size=32, num_layers=1, num_heads=2, image_seq_len=16, token_size=4, patch_size=2, num_classes=5,
        repeat_class_condition=1, head_width=32, head_layers=1, decoder_patch_size=16,
    )  # fmt: skip
    write_checkpoint(
        tmp_path, spec, Recipe(2.0, 1.0, (4, 12)), random_generator(spec), random_tokenizer(spec, width=32, layers=1)
    )
    sources = (tmp_path / name for name in ("generator.bin", "tokenizer.bin", "config.yaml"))
    bundle = export_bundle(*sources, tmp_path / "bundle")
    found = collect(bundle, make_plan(spec, images=4, seed=1, batch_size=4), threads=1)
    assert found.stats["blocks.0.attn.qkv"].strata.keys() == {"prefix"} | in_branches(*QUARTERS)
    assert found.stats["lm_head.output_embed"].count == 2 * 4 * 2 * spec.num_tokens


# -- real images -------------------------------------------------------------------------------------------------------


@pytest.fixture
def real(small) -> RealImages:
    shape = (6, small.spec.image_seq_len, small.spec.token_size)
    bits = np.random.default_rng(5).integers(0, 2, shape).astype(np.uint8)
    return RealImages(bits, np.array([3, 1, 3, 9, 0, 7]), "digest of the data")


def test_real_images_are_followed_not_drawn(small, real):
    plan = make_plan(small.spec, images=6, seed=1, batch_size=4, real=real)
    assert plan.class_ids == (3, 1, 3, 9, 0, 7) and plan.data == "digest of the data"
    found = collect(small.bundle, plan, real=real, threads=1)
    cells = {cell.tobytes() for cell in real.bits.reshape(-1, small.spec.token_size).astype(np.float32)}
    assert {row.tobytes() for row in found.stats["quantize.out_proj"].strata["cells"].rows} <= cells
    expected = walked(small.bundle, plan, to_tokens(real.bits, small.spec))
    for layer in groups_of(small)["trunk"]:
        known = {row.tobytes() for row in expected[layer]}
        assert all(row.tobytes() in known for row in at_tokens(found, layer)), layer


def test_real_images_are_unmasked_by_the_allocation(small, real, monkeypatch):
    """Pass s begins with as many known bits as the passes before it unmask, at places of its own for every image."""
    led = []
    original = trajectories.ProbeStep.lead
    monkeypatch.setattr(
        trajectories.ProbeStep,
        "lead",
        lambda step, known, bits: (led.append((known.copy(), bits.copy())), original(step, known, bits)),
    )
    collect(small.bundle, make_plan(small.spec, images=6, seed=1, batch_size=6, real=real), real=real, threads=1)
    done = np.cumsum((0, *small.bundle.recipe.allocation))[:-1]
    assert len(led) == small.spec.num_tokens
    for known, _ in led:
        np.testing.assert_array_equal(known.sum(axis=2), np.tile(done[:, None], (1, 6)))
        assert (known[1:] >= known[:-1]).all()  # a known bit stays known
    assert len({known[-1, image].tobytes() for known, _ in led for image in range(6)}) > 30
    np.testing.assert_array_equal(np.stack([bits for _, bits in led], axis=1), to_tokens(real.bits, small.spec) == 1)
    np.testing.assert_array_equal(to_fine_grid(to_tokens(real.bits, small.spec), small.spec), real.bits)


# -- interruption ------------------------------------------------------------------------------------------------------


@pytest.fixture
def interrupted(small, tmp_path) -> Callable[..., Path]:
    """Collect until image `after` and press Ctrl-C; returns the partial file."""

    def run(plan: trajectories.Plan, after: int) -> Path:
        def stop(what: str, done: int, total: int) -> None:
            if f"images {after + 1}-" in what and done > 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            collect(small.bundle, plan, partial=tmp_path / "partial.npz", threads=1, progress=stop)
        return tmp_path / "partial.npz"

    return run


def test_a_resumed_run_uses_every_image_exactly_once(small, interrupted, monkeypatch):
    plan = small.calibration.plan
    partial = interrupted(plan, 4)
    stored = Calibration.load(partial)
    assert stored.images_done == 4 and not stored.complete
    drawn = []
    original = trajectories.make_batch

    def told(bundle: Bundle, class_ids: np.ndarray, seed: int, indices: range) -> Batch:
        drawn.extend(indices)
        return original(bundle, class_ids, seed, indices)

    monkeypatch.setattr(trajectories, "make_batch", told)
    resumed = collect(small.bundle, plan, partial=partial, threads=1)
    assert drawn == [4, 5, 6, 7]
    assert resumed.complete and Calibration.load(partial).complete
    assert_same_statistics(resumed, small.calibration)


@pytest.mark.parametrize("what", ["another plan", "another bundle"])
def test_what_was_collected_for_something_else_is_not_taken_up(small, interrupted, what):
    plan = small.calibration.plan
    partial = interrupted(plan, 4)
    if what == "another bundle":
        stored = Calibration.load(partial)
        stored.bundle = "0" * 64
        stored.save(partial)
    wanted = plan if what == "another bundle" else replace(plan, seed=2)
    found = collect(small.bundle, wanted, partial=partial, threads=1)
    assert (found.plan, found.bundle) == (wanted, small.bundle.digest)
    assert_same_statistics(found, collect(small.bundle, wanted, threads=1))


def test_a_damaged_partial_file_does_not_stop_the_next_run(small, tmp_path):
    """It cannot be mended by collecting again if collecting again reads it first."""
    partial = tmp_path / "partial.npz"
    partial.write_bytes(b"PK\x03\x04 cut short")
    assert collect(small.bundle, small.calibration.plan, partial=partial, threads=1).complete


# -- files -------------------------------------------------------------------------------------------------------------


def test_a_calibration_survives_a_round_trip_without_pickles(small, tmp_path):
    path = tmp_path / "ranges.npz"
    small.calibration.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["ranges.npz"]
    loaded = Calibration.load(path)
    assert (loaded.bundle, loaded.plan) == (small.bundle.digest, small.calibration.plan)
    assert loaded.complete
    loaded.check_bundle(small.bundle, path)
    assert_same_statistics(loaded, small.calibration)
    for layer, stats in small.calibration.stats.items():
        for name, stratum in stats.strata.items():
            np.testing.assert_array_equal(stratum.rows, loaded.stats[layer].strata[name].rows)
    with np.load(path, allow_pickle=False) as stored:
        assert all(stored[name].dtype != object for name in stored.files)
        header = json.loads(str(stored["header"]))
    assert header["bundle"] == small.bundle.digest and header["plan"]["seed"] == 1000


def test_a_failing_write_leaves_the_old_file(small, tmp_path, monkeypatch):
    path = tmp_path / "ranges.npz"
    path.write_bytes(b"old")

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError):
        small.calibration.save(path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["ranges.npz"]


def test_a_calibration_of_another_bundle_or_an_unfinished_one_is_refused(small, patch1, tmp_path):
    path = tmp_path / "ranges.npz"
    with pytest.raises(CalibrationError, match="collected from another bundle"):
        small.calibration.check_bundle(patch1.bundle, path)
    unfinished = replace(small.calibration, images_done=3)
    with pytest.raises(CalibrationError, match="only 3 of 8 images were used"):
        unfinished.check_bundle(small.bundle, path)


def single_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def edited_header(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with np.load(path) as stored:
            arrays = dict(stored)
        header = {**json.loads(str(arrays["header"])), **changes}
        np.savez(path, **{**arrays, "header": np.array(json.dumps(header))})

    return change


def not_finite(name: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with np.load(path) as stored:
            arrays = dict(stored)
        arrays[f"blocks.0.attn.qkv/{name}"].flat[0] = np.nan
        np.savez(path, **arrays)

    return change


def cut_member(path: Path) -> None:
    """A whole archive with half an array in it."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in members if name.endswith("/rows.npy"))
    members[name] = members[name][: len(members[name]) // 2]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)


DAMAGES = {
    "absent": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not an archive"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:5000]),
    "an array cut": cut_member,
    "a single array": single_array,
    "a pickle": lambda path: np.savez(path, header=np.array({"code": "object"}, dtype=object)),
    "another archive": lambda path: np.savez(path, tokens=np.zeros(3)),
    "another format": edited_header(format=99),
    "no plan": edited_header(plan=None),
    "a plan of another kind": edited_header(plan={"images": 3}),
    "a range that is not a number": not_finite("channel_max"),
    "a mean square without bounds": not_finite("channel_square"),
    "a row that is not a number": not_finite("rows"),
    "a layer that is not there": edited_header(layers=["blocks.77.attn.qkv"]),
}


def test_a_file_that_is_no_calibration_is_refused_by_name(small, tmp_path):
    path, wrong = tmp_path / "ranges.npz", {}
    for how, damage in DAMAGES.items():
        small.calibration.save(path)
        damage(path)
        try:
            wrong[how] = Calibration.load(path)
        except CalibrationError as error:
            assert "ranges.npz" in str(error)
        except Exception as error:
            wrong[how] = error
    assert not wrong


def test_flipped_bytes_are_a_calibration_error_or_another_calibration_but_never_a_crash(patch1, tmp_path):
    path = tmp_path / "ranges.npz"
    collect(patch1.bundle, make_plan(patch1.spec, images=4, seed=1, batch_size=4), threads=1).save(path)
    content, rng = path.read_bytes(), np.random.default_rng(0)
    directory = len(content) - 200 * 200  # the archive's directory and its last members
    for i in range(60):
        damaged = bytearray(content)
        for place in rng.integers(directory if i % 2 else 0, len(content), size=3):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            Calibration.load(path)
        except CalibrationError:
            continue


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_too_few_images_are_refused(small):
    with pytest.raises(CalibrationError, match="3 images are too few to calibrate on; use at least 4"):
        collect(small.bundle, make_plan(small.spec, images=3, seed=1, batch_size=8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "the batch size must be at least 1, is 0"),
        ({"class_ids": (1, 2, 3)}, "8 images were planned with 3 class ids"),
        ({"class_ids": (99,) * 8}, "class 99 is not there: this model has classes 0 to"),
        ({"seed": -1}, "the seed must be between 0 and"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(small, change, message):
    with pytest.raises(CalibrationError, match=message):
        collect(small.bundle, replace(small.calibration.plan, **change))


def test_other_real_images_than_planned_are_refused(small, real):
    plan = make_plan(small.spec, images=6, seed=1, batch_size=4, real=real)
    more = replace(plan, images=9, class_ids=(0,) * 9)
    with pytest.raises(CalibrationError, match="9 images were planned with 9 class ids and 6 real images"):
        collect(small.bundle, more, real=real)


def test_a_quantized_bundle_is_no_source_of_ranges(small):
    with pytest.raises(CalibrationError, match="is quantized already; quantize the fp32 bundle it was made from"):
        collect(small.quantized("int8"), small.calibration.plan)


def test_weights_that_are_not_numbers_stop_the_command_by_name(bundle_copy, reseal):
    path = bundle_copy / weights.FILE_NAME
    place = weights.read_places(path)["blocks.1.attn.proj.weight"]
    with path.open("r+b") as file:
        file.seek(place.offset)
        file.write(np.full(64, np.nan, dtype=np.float32).tobytes())
    reseal(bundle_copy)
    bundle = Bundle.open(bundle_copy)
    with pytest.raises(CalibrationError, match="was NaN or infinite at") as caught:
        collect(bundle, make_plan(bundle.spec, images=4, seed=1, batch_size=4), threads=1)
    assert re.match(r"the input of (blocks\.[12]|latent_cond|lm_head)\S* was", str(caught.value))  # what comes after it


def test_classes_are_spread_over_the_models(small):
    for images, classes in ((4, 1000), (1000, 1000), (2048, 1000), (7, 10), (25, 10)):
        found = np.array(trajectories.spread_classes(images, classes))
        assert len(found) == images and found.min() == 0 and found.max() == min(classes, max(images, classes)) - 1
        counts = np.bincount(found, minlength=classes)
        assert counts.max() - counts[counts > 0].min() <= 1
        assert (counts > 0).sum() == min(images, classes)
