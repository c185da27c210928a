"""Evaluation sets: every image once, the same however the work is cut, interrupted or resumed; nothing half-written."""

import io
import json
import shutil
import signal
import tracemalloc
import zipfile
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from bar_edge.runtime import evaluation_set
from bar_edge.runtime.cli import app
from bar_edge.runtime.errors import BarEdgeError, RequestError
from bar_edge.runtime.evaluation_set import EvaluationSet
from bar_edge.runtime.evaluation_settings import SHARD_IMAGES, EvaluationSettings
from bar_edge.runtime.pictures import read_settings

SEED = 7
NUM = 14
SHARD = 4  # 14 images are four shards, the last of 2
DRAW_UNTIL_KILLED = """
import os, signal, sys
from pathlib import Path
from bar_edge.runtime import Generator
from bar_edge.runtime.evaluation_set import EvaluationSet
from bar_edge.runtime.evaluation_settings import EvaluationSettings

def progress(what, done, total):
    if done > 9:
        os.kill(os.getpid(), signal.SIGKILL)

with Generator(sys.argv[1], threads=1) as generator:
    settings = EvaluationSettings.from_json(sys.argv[3])
    with EvaluationSet.begin(Path(sys.argv[2]), settings) as folder:
        folder.draw(generator, batch_size=3, progress=progress)
"""
WITHOUT_RAY = """
import sys
sys.modules["ray"] = None
from bar_edge.runtime.cli import main
main()
"""


@pytest.fixture(scope="module")
def settings(patch1) -> EvaluationSettings:
    made = EvaluationSettings.of(patch1.bundle, engine="onnxruntime", num=NUM, seed=SEED)
    return replace(made, shard_images=SHARD)


@pytest.fixture(scope="module")
def whole(patch1, settings, tmp_path_factory) -> Path:
    """A set drawn without interruption; not to be changed."""
    return draw(patch1, settings, tmp_path_factory.mktemp("whole") / "set")


def draw(case, settings: EvaluationSettings, path: Path, batch_size: int = 3) -> Path:
    with EvaluationSet.begin(path, settings) as folder:
        folder.draw(case.runtime, batch_size=batch_size)
        folder.assemble()
    return path


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def pixels(path: Path) -> np.ndarray:
    with np.load(path / "samples.npz", allow_pickle=False) as stored:
        assert stored.files == ["arr_0"]
        return stored["arr_0"]


def pretend_drawn(path: Path, settings: EvaluationSettings) -> EvaluationSet:
    """A set whose shards are finished, of black images."""
    with EvaluationSet.begin(path, settings) as folder:
        folder.shards.mkdir()
        for shard in folder.missing():
            shape = (len(folder.indices(shard)), settings.image_size, settings.image_size, 3)
            np.save(folder.shard_file(shard), np.zeros(shape, dtype=np.uint8))
    return folder


# -- what is drawn -----------------------------------------------------------------------------------------------------


def test_the_set_holds_the_images_the_generator_draws(patch1, settings, whole):
    """For image i of class i, `generate` has the same index and class."""
    drawn = pixels(whole)
    assert drawn.shape == (NUM, 64, 64, 3) and drawn.dtype == np.uint8
    for i, image in enumerate(patch1.runtime.generate(range(10), seed=SEED)):
        assert np.array_equal(drawn[i], np.asarray(image))


def test_the_pngs_are_the_images_of_the_npz_with_their_settings(patch1, settings, whole):
    files = sorted((whole / "images").iterdir())
    assert [file.name for file in files] == [f"{i:06d}.png" for i in range(NUM)]
    for i, (file, expected) in enumerate(zip(files, pixels(whole), strict=True)):
        with Image.open(file) as image:
            assert np.array_equal(np.asarray(image), expected)
        found = read_settings(file)
        assert (found["index"], found["class_id"], found["seed"]) == (i, i % 10, SEED)
        assert found["bundle"] == patch1.bundle.digest
        assert found["allocation"] == list(patch1.bundle.recipe.allocation)
        assert (found["guidance"], found["temperature"]) == (settings.guidance, settings.temperature)
        assert (found["engine"], found["order"], found["variant"]) == ("onnxruntime", "raster", None)


def test_only_the_results_are_left(whole):
    assert sorted(entry.name for entry in whole.iterdir()) == ["images", "samples.npz", "sampling.json"]


@pytest.mark.parametrize(("shard_images", "batch_size"), [(1, 1), (5, 2), (SHARD_IMAGES, 8)])
def test_images_do_not_depend_on_shards_and_batches(patch1, settings, whole, tmp_path, shard_images, batch_size):
    other = draw(patch1, replace(settings, shard_images=shard_images), tmp_path / "other", batch_size)
    assert np.array_equal(pixels(other), pixels(whole))


def test_balanced_takes_the_classes_in_turn(settings):
    assert settings.class_ids(range(8, 13)).tolist() == [8, 9, 0, 1, 2]
    assert Counter(replace(settings, num_classes=1000).class_ids(range(50_000)).tolist()) == dict.fromkeys(
        range(1000), 50
    )
    assert set(Counter(settings.class_ids(range(NUM)).tolist()).values()) == {1, 2}


def test_given_classes_are_taken_in_turn(patch1):
    made = EvaluationSettings.of(patch1.bundle, engine="onnxruntime", num=5, classes="7,2")
    assert made.class_ids(range(5)).tolist() == [7, 2, 7, 2, 7]


def test_the_recipe_is_the_bundles_unless_given(patch1, settings):
    assert settings.recipe == patch1.bundle.recipe
    made = EvaluationSettings.of(
        patch1.bundle, engine="onnxruntime", num=1, guidance=2.0, temperature=0.0, allocation=[2, 4]
    )
    assert (made.guidance, made.temperature, made.allocation) == (2.0, 0.0, (2, 4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num": 0}, "num must be at least 1"),
        ({"seed": -1}, "seed must be between"),
        ({"classes": "3,10"}, "class 10 is not there: this model has classes 0 to 9"),
        ({"classes": "cat"}, "this model has no class names"),
        ({"allocation": [1, 2]}, "does not fit"),
        ({"guidance": -1.0}, "guidance must be"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(patch1, options, message):
    with pytest.raises(RequestError, match=message):
        EvaluationSettings.of(patch1.bundle, **{"engine": "onnxruntime", "num": 1, **options})


# -- interruption ------------------------------------------------------------------------------------------------------


def test_an_interrupted_set_is_finished_by_the_same_call(patch1, settings, whole, tmp_path):
    def interrupt(what, done, total):
        if done > 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), EvaluationSet.begin(tmp_path / "set", settings) as folder:
        folder.draw(patch1.runtime, batch_size=3, progress=interrupt)
    assert [file.name for file in sorted(folder.shards.iterdir())] == ["00000.npy", "00001.npy"]
    assert folder.missing() == [2, 3] and folder.images_done == 8
    kept = folder.shard_file(0).stat().st_mtime_ns
    seen = []
    with EvaluationSet.begin(tmp_path / "set", settings) as folder:
        folder.draw(patch1.runtime, batch_size=3, progress=lambda what, done, total: seen.append(done))
        assert folder.shard_file(0).stat().st_mtime_ns == kept
        folder.assemble()
    assert seen == sorted(seen) and 8 < seen[0] < 11 and seen[-1] == NUM
    assert content(tmp_path / "set") == content(whole)


def test_a_killed_set_is_finished_by_the_same_call(patch1, settings, whole, tmp_path, python):
    done = python(DRAW_UNTIL_KILLED, patch1.bundle.path, tmp_path / "set", settings.to_json())
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(file.name for file in (tmp_path / "set" / "shards").iterdir())
    assert left[0].startswith(".00002.") and left[1:] == ["00000.npy", "00001.npy"]
    assert not (tmp_path / "set" / "samples.npz").exists()
    draw(patch1, settings, tmp_path / "set")
    assert content(tmp_path / "set") == content(whole)


def test_what_killed_workers_left_is_removed_when_the_command_ends(settings, tmp_path):
    with EvaluationSet.begin(tmp_path / "set", settings) as folder:
        (folder.shards / ".00001.99.x.partial").mkdir(parents=True)
    assert not list(folder.shards.iterdir())


def test_a_shard_drawn_twice_is_the_same(patch1, settings, whole, tmp_path):
    with EvaluationSet.begin(tmp_path / "set", settings) as folder:
        folder.draw(patch1.runtime, batch_size=3)
        EvaluationSet.open(folder.path).draw_shard(1, patch1.runtime, batch_size=3)
        folder.assemble()
    assert content(tmp_path / "set") == content(whole)


def test_a_failed_png_leaves_the_shard_missing(patch1, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(Image.Image, "save", lambda self, path, **options: Path(path).write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError), EvaluationSet.begin(tmp_path / "set", settings) as folder:
        folder.draw(patch1.runtime, batch_size=3)
    assert folder.missing() == [0, 1, 2, 3]
    assert not list(folder.shards.iterdir()) and not list(folder.images.iterdir())


def test_a_finished_set_is_left_as_it_is(settings, whole):
    before = content(whole)
    with EvaluationSet.begin(whole, settings) as folder:
        assert folder.missing() == [] and folder.images_done == NUM
        folder.assemble()
    assert content(whole) == before


def test_shards_left_beside_a_finished_set_are_removed(settings, tmp_path):
    folder = pretend_drawn(tmp_path / "set", settings)
    saved = Path(shutil.copytree(folder.shards, tmp_path / "saved"))
    folder.assemble()
    saved.rename(folder.shards)
    folder.assemble()
    assert not folder.shards.exists() and folder.complete


# -- the npz -----------------------------------------------------------------------------------------------------------


def test_the_npz_is_what_numpy_writes(settings, whole):
    """Stored, not compressed, with a version 1.0 header: evaluators stream it without numpy.load."""
    expected = io.BytesIO()
    np.save(expected, pixels(whole))
    with zipfile.ZipFile(whole / "samples.npz") as archive:
        (member,) = archive.infolist()
        assert (member.filename, member.compress_type) == ("arr_0.npy", zipfile.ZIP_STORED)
        assert archive.read(member) == expected.getvalue()


def test_the_npz_is_written_shard_by_shard(settings, tmp_path):
    many = replace(settings, num=400, shard_images=10, png=False)
    folder = pretend_drawn(tmp_path / "set", many)
    tracemalloc.start()
    folder.assemble()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * many.shard_images * many.image_bytes
    assert pixels(folder.path).shape == (400, 64, 64, 3)


def test_writing_the_npz_is_told_in_images(settings, tmp_path):
    told = []
    pretend_drawn(tmp_path / "set", settings).assemble(lambda what, done, total: told.append((done, total)))
    assert told == [(4, NUM), (8, NUM), (12, NUM), (NUM, NUM)]


@pytest.mark.parametrize("damage", ["truncated", "empty", "shape", "dtype"])
def test_a_damaged_shard_is_refused_by_name(settings, tmp_path, damage):
    folder = pretend_drawn(tmp_path / "set", settings)
    file = folder.shard_file(2)
    right = np.load(file)
    if damage in ("truncated", "empty"):
        file.write_bytes(file.read_bytes()[: -1 if damage == "truncated" else 0])
    else:
        np.save(file, right[1:] if damage == "shape" else right.astype(np.int16))
    with pytest.raises(RequestError, match=r"00002\.npy: .*delete it and run the command again"):
        folder.assemble()
    assert not folder.complete and not list(folder.path.glob(".*"))
    assert len(list(folder.shards.iterdir())) == 4
    file.unlink()
    assert folder.missing() == [2]


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num": NUM + 1}, "num 14, not 15"),
        ({"seed": 8}, "seed 7, not 8"),
        ({"classes": (7, 2)}, r"classes balanced, not \(7, 2\)"),
        ({"bundle": "0" * 64}, "bundle [0-9a-f]{64}, not 0{64}"),
        ({"guidance": 9.5}, "guidance 5.0, not 9.5"),
        ({"png": False}, "png True, not False"),
        ({"engine": "cuda", "seed": 8}, "engine onnxruntime, not cuda; seed 7, not 8"),
    ],
)
def test_resuming_with_other_settings_is_refused_by_name(settings, whole, change, message):
    with (
        pytest.raises(RequestError, match=f"was begun with {message}; give the same options"),
        EvaluationSet.begin(whole, replace(settings, **change)),
    ):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"num": 4}'])
def test_damaged_settings_are_refused_by_name(settings, tmp_path, text):
    (tmp_path / "sampling.json").write_text(text)
    with pytest.raises(RequestError, match="not the settings of an evaluation set"):
        EvaluationSet.open(tmp_path)


def test_settings_of_any_integer_type_are_the_same(patch1, settings):
    made = EvaluationSettings.of(
        patch1.bundle, engine="onnxruntime", num=np.int32(NUM), seed=np.uint8(SEED),
        allocation=np.array(settings.allocation), guidance=np.float32(settings.guidance),
    )  # fmt: skip
    assert EvaluationSettings.from_json(made.to_json()) == replace(settings, shard_images=SHARD_IMAGES)


def test_settings_come_back(settings):
    for one in (settings, replace(settings, classes=(3, 4))):
        assert EvaluationSettings.from_json(one.to_json()) == one


def test_a_folder_with_other_files_is_refused(settings, tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(RequestError, match="has files but no"), EvaluationSet.begin(tmp_path, settings):
        pass
    with pytest.raises(RequestError, match="is a file"), EvaluationSet.begin(tmp_path / "mine.txt", settings):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ["mine.txt"]


def test_a_finished_set_whose_images_were_deleted_is_not_called_finished(settings, tmp_path):
    with EvaluationSet.begin(tmp_path / "set", settings) as folder:
        folder.images.mkdir()
        for index in range(settings.num):
            (folder.images / f"{index:06d}.png").touch()
        folder.samples.write_bytes(bytes(settings.num * settings.image_bytes))
    with EvaluationSet.begin(tmp_path / "set", settings):
        pass
    (folder.images / "000002.png").unlink()
    with (
        pytest.raises(RequestError, match=r"1 of its images are gone, the first 000002\.png; delete samples\.npz"),
        EvaluationSet.begin(tmp_path / "set", settings),
    ):
        pass


def test_a_finished_set_that_was_truncated_is_not_called_finished(settings, whole, tmp_path):
    path = shutil.copytree(whole, tmp_path / "set")
    with EvaluationSet.begin(path, settings) as folder:
        assert folder.complete
    with folder.samples.open("r+b") as file:
        file.truncate(1000)
    with (
        pytest.raises(RequestError, match=r"samples\.npz: truncated, 1,000 bytes where the pixels alone are 172,032"),
        EvaluationSet.begin(path, settings),
    ):
        pass


def test_what_a_faster_command_began_is_not_written_over(settings, tmp_path, monkeypatch):
    """The record would be of other images than those that are drawn."""
    record = tmp_path / "set" / "sampling.json"

    def overtaken(path: Path):
        record.write_text(replace(settings, seed=8).to_json())
        return nullcontext()

    monkeypatch.setattr(evaluation_set, "locked", overtaken)
    with (
        pytest.raises(RequestError, match="was begun with seed 8, not 7"),
        EvaluationSet.begin(tmp_path / "set", settings),
    ):
        pass
    assert EvaluationSet.open(tmp_path / "set").settings.seed == 8


def test_two_commands_on_one_folder_are_refused(settings, tmp_path):
    with (
        EvaluationSet.begin(tmp_path / "set", settings),
        pytest.raises(RequestError, match="another command is writing into it"),
        EvaluationSet.begin(tmp_path / "set", settings),
    ):
        pass


@pytest.mark.parametrize(("png", "copies"), [(True, 3), (False, 2)])
def test_a_disk_too_small_is_refused_before_anything_is_drawn(settings, tmp_path, monkeypatch, png, copies):
    """Shards and npz are there at the same time, and PNGs as large as both if they must."""
    settings = replace(settings, num=50_000, image_size=256, png=png)
    needed = copies * 50_000 * 256 * 256 * 3
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    with (
        pytest.raises(RequestError, match=r"MiB free, up to .* MiB needed; free some space"),
        EvaluationSet.begin(tmp_path / "new" / "set", settings),
    ):
        pass
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed + 2**27))
    with EvaluationSet.begin(tmp_path / "new" / "set", settings):
        pass


# -- the verb ----------------------------------------------------------------------------------------------------------


def run(*arguments: object):
    return CliRunner().invoke(app, ["sample", *map(str, arguments)], catch_exceptions=False)


def test_the_verb_draws_a_set_and_says_where_it_is(patch1, whole, tmp_path):
    output = tmp_path / "new" / "set"
    arguments = (
        patch1.bundle.path,
        "--num",
        NUM,
        "--classes",
        "balanced",
        "--seed",
        SEED,
        "--threads",
        1,
        "-o",
        output,
    )
    done = run(*arguments)
    assert done.exit_code == 0
    assert f"{NUM} images in {output}/samples.npz and {output}/images" in done.stdout
    assert np.array_equal(pixels(output), pixels(whole))
    assert content(output / "images") == content(whole / "images")
    facts = json.loads(run(*arguments, "--json").stdout)
    assert facts == {"samples": str(output / "samples.npz"), "images": str(output / "images")}
    with pytest.raises(RequestError, match="png True, not False"):
        run(*arguments, "--no-png")


def test_the_verb_writes_no_pngs_if_told(patch1, tmp_path):
    output = tmp_path / "set"
    done = run(patch1.bundle.path, "--num", 3, "--classes", "7", "--no-png", "--threads", 1, "-o", output)
    assert done.exit_code == 0
    assert sorted(entry.name for entry in output.iterdir()) == ["samples.npz", "sampling.json"]
    assert len(pixels(output)) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--classes", "cat"), "this model has no class names"),
        (("--engine", "tpu"), "unknown engine"),
        (("--allocation", "many"), "not a list of numbers"),
    ],
)
def test_the_verb_refuses_before_it_makes_the_folder(patch1, tmp_path, arguments, message):
    with pytest.raises(BarEdgeError, match=message):
        run(patch1.bundle.path, "-o", tmp_path / "set", *arguments)
    assert not (tmp_path / "set").exists()


def test_the_verb_says_that_ray_is_missing(patch1, tmp_path, python):
    done = python(WITHOUT_RAY, "sample", patch1.bundle.path, "--num", 2, "--ray", "local", "-o", tmp_path / "set")
    assert done.returncode == 2
    assert "this needs ray; pip install 'bar-edge[ray]'" in done.stderr
    assert not (tmp_path / "set").exists()


def test_the_verb_has_help_with_an_example():
    assert "bar-edge sample bar_b/" in run("--help").stdout
