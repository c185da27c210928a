"""Real images in the authors' layout: the right bits under the right labels, and one sentence for what does not fit."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bar_edge.calibration.pretokenized import read_pretokenized
from bar_edge.calibration.trajectories import RealImages, collect, make_plan
from bar_edge.runtime.errors import CalibrationError
from bar_edge.runtime.spec import ModelSpec

FOLDERS = {"n02": 3, "n10": 4, "n1": 2}  # by name: n02, n1, n10
LABELS = {"n02": 0, "n1": 1, "n10": 2}


def write_image(path: Path, spec: ModelSpec, **arrays: Any) -> None:
    """As the authors' tools do: the image and its mirror image, flat bools."""
    bits = np.random.default_rng(list(path.as_posix().encode()[-12:])).integers(
        0, 2, (2, spec.image_seq_len, spec.token_size)
    )
    tokens, flipped = (half.astype(bool).reshape(-1) for half in bits)
    np.savez_compressed(path, **{"tokens": tokens, "tokens_flip": flipped, **arrays})  # fmt: skip


def write_root(root: Path, spec: ModelSpec, folders: Mapping[str, int]) -> Path:
    for name, count in folders.items():
        (root / "train" / name).mkdir(parents=True)
        for i in range(count):
            write_image(root / "train" / name / f"{name}_{i}.npz", spec)
    metadata = {"token_size": spec.token_size, "codebook_size": 2**spec.token_size, "img_size": spec.image_size}
    (root / "metadata.json").write_text(json.dumps({**metadata, "num_samples": sum(folders.values())}))
    return root


@pytest.fixture
def root(small, tmp_path) -> Path:
    return write_root(tmp_path / "data", small.spec, FOLDERS)


@pytest.fixture
def read(small, root) -> Callable[..., RealImages]:
    return lambda images=9, seed=0: read_pretokenized(root, small.spec, images=images, seed=seed)


def stored(root: Path, spec: ModelSpec) -> dict[bytes, int]:
    """Bits of every image -> its label."""
    found = {}
    for path in (root / "train").rglob("*.npz"):
        with np.load(path) as arrays:
            found[arrays["tokens"].astype(np.uint8).tobytes()] = LABELS[path.parent.name]
    assert len(found) == sum(FOLDERS.values())
    return found


def test_every_image_comes_with_the_rank_of_its_folder(small, root, read):
    expected, found = stored(root, small.spec), read()
    assert found.bits.shape == (9, small.spec.image_seq_len, small.spec.token_size) and found.bits.dtype == np.uint8
    assert {bits.tobytes(): int(label) for bits, label in zip(found.bits, found.class_ids, strict=True)} == expected


def test_an_empty_class_folder_keeps_its_rank(small, root, read):
    (root / "train" / "n0").mkdir()
    assert sorted(read().class_ids) == [1] * 3 + [2] * 2 + [3] * 4


def test_other_files_are_neither_classes_nor_images(root, read):
    before = read()
    (root / "train" / "A README.txt").write_text("no class, though the first by name")
    (root / "train" / "n1" / "list.txt").write_text("no image")
    after = read()
    assert after.digest == before.digest
    np.testing.assert_array_equal(after.class_ids, before.class_ids)


def test_the_same_images_in_another_place_are_the_same(root, small, read, tmp_path):
    moved = root.rename(tmp_path / "elsewhere")
    found = read_pretokenized(moved, small.spec, images=9, seed=0)
    moved.rename(root)
    assert found.digest == read().digest


def test_a_folder_for_every_class_of_the_model_is_read(small, tmp_path):
    data = write_root(tmp_path / "all", small.spec, {f"class {i:02}": 1 for i in range(10)})
    assert sorted(read_pretokenized(data, small.spec, images=10, seed=0).class_ids) == list(range(10))


def test_images_are_spread_over_the_classes(read):
    assert sorted(read(images=6).class_ids) == [0, 0, 1, 1, 2, 2]
    assert sorted(read(images=8).class_ids) == [0, 0, 0, 1, 1, 2, 2, 2]


def test_the_seed_decides_the_choice_and_the_digest_tells_it(root, small, read):
    one, again, other = read(4, 1), read(4, 1), read(4, 2)
    assert one.digest == again.digest and (one.bits == again.bits).all()
    assert one.digest != other.digest and not np.array_equal(one.bits, other.bits)
    before = read().digest
    write_image(
        root / "train" / "n1" / "n1_0.npz", small.spec, tokens=np.zeros(small.spec.image_seq_len * 10, dtype=bool)
    )
    assert read().digest != before  # fmt: skip


def test_patches_are_cut_from_the_fine_grid(cases, tmp_path):
    """A model whose tokens are patches of cells reads the same files and follows them."""
    case = cases("patch4")
    data = write_root(tmp_path / "data", case.spec, {"a": 3, "b": 3})
    real = read_pretokenized(data, case.spec, images=6, seed=0)
    plan = make_plan(case.spec, images=6, seed=1, batch_size=3, real=real)
    assert plan.class_ids == (0, 1, 0, 1, 0, 1) and plan.data == real.digest
    found = collect(case.bundle, plan, real=real, threads=1)
    cells = {cell.tobytes() for cell in real.bits.reshape(-1, case.spec.token_size).astype(np.float32)}
    assert {row.tobytes() for row in found.stats["quantize.out_proj"].strata["cells"].rows} <= cells


# -- what does not fit -------------------------------------------------------------------------------------------------


def test_a_folder_that_is_no_root_is_refused(small, root, tmp_path):
    for place in (tmp_path / "absent", root / "train", root / "metadata.json"):
        with pytest.raises(CalibrationError, match="has no folder `train`; give the root"):
            read_pretokenized(place, small.spec, images=4, seed=0)


METADATA = {
    "absent": (None, "not readable metadata"),
    "not JSON": ("token_size: 10", "not readable metadata"),
    "a list": ("[10]", "not readable metadata"),
    "without token_size": ('{"img_size": 256}', "not readable metadata"),
    "another token_size": ('{"token_size": 12}', "tokens of 12 bits, the model has 10"),
}


def test_metadata_that_do_not_fit_are_refused_by_name(root, read):
    for text, message in METADATA.values():
        path = root / "metadata.json"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(CalibrationError, match=rf"metadata\.json: {message}"):
            read()


def test_more_classes_than_the_models_are_refused(small, tmp_path):
    data = write_root(tmp_path / "many", small.spec, {f"class {i:02}": 1 for i in range(11)})
    with pytest.raises(CalibrationError, match="train: 11 class folders, but the model has 10 classes"):
        read_pretokenized(data, small.spec, images=4, seed=0)


def test_fewer_images_than_asked_for_are_refused(root, read):
    with pytest.raises(CalibrationError, match="train: holds 9 images, 10 were asked for"):
        read(images=10)
    for path in (root / "train").rglob("*.npz"):
        path.unlink()
    with pytest.raises(CalibrationError, match="holds 0 images"):
        read(images=4)


def plain_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(160, dtype=bool))


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_bytes(b"not an archive"),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:150]),
    "a single array": plain_array,
    "without tokens": lambda path: np.savez(path, bits=np.zeros(160, dtype=bool)),
    "a pickle": lambda path: np.savez(path, tokens=np.array([{"code": 1}] * 160, dtype=object)),
    "too few bits": lambda path: np.savez(path, tokens=np.zeros(159, dtype=bool)),
    "another grid": lambda path: np.savez(path, tokens=np.zeros(640, dtype=bool)),
    "codes instead of bits": lambda path: np.savez(path, tokens=np.full(160, 2, dtype=np.int64)),
    "numbers that are none": lambda path: np.savez(path, tokens=np.full(160, np.nan)),
    "words": lambda path: np.savez(path, tokens=np.full(160, "a")),
}


def test_a_broken_file_is_refused_by_name(root, read):
    path, wrong = root / "train" / "n1" / "n1_1.npz", {}
    content = path.read_bytes()
    for how, damage in BROKEN.items():
        path.write_bytes(content)
        damage(path)
        try:
            wrong[how] = read()
        except CalibrationError as error:
            assert "n1_1.npz: " in str(error), how
        except Exception as error:
            wrong[how] = error
    assert not wrong


def test_flipped_bytes_are_a_calibration_error_or_an_image_but_never_a_crash(root, read):
    path = root / "train" / "n1" / "n1_1.npz"
    content, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        damaged = bytearray(content)
        for place in rng.integers(len(content), size=2):
            damaged[place] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            assert set(np.unique(read().bits)) <= {0, 1}
        except CalibrationError as error:
            assert "n1_1.npz" in str(error)
