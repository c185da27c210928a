"""`weights.safetensors`: what is written can be read by the format's own library, and no lying header is believed."""

import io
import json
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from bar_edge.runtime import weights
from bar_edge.runtime.errors import BundleError
from bar_edge.runtime.weights import ALIGNMENT, PendingTensor

RNG = np.random.default_rng(0)
ARRAYS = {
    "small": np.arange(3, dtype=np.float32),
    "bytes": RNG.integers(0, 255, (5, 7)).astype(np.uint8),
    "half": RNG.standard_normal((32, 4)).astype(np.float16),
    "large": RNG.standard_normal((16, 48)).astype(np.float32),
    "integers": RNG.integers(-128, 127, (64, 2)).astype(np.int8),
}


def write(path, arrays):
    """Write the arrays; the places they were planned with, and the sizes that were told."""
    pending = {
        name: PendingTensor(array.dtype, array.shape, lambda array=array: array) for name, array in arrays.items()
    }
    header, places = weights.lay_out(pending)
    with path.open("wb") as file:
        sizes = dict(weights.write(file, header, places, pending))
    return places, sizes


@pytest.fixture
def written(tmp_path):
    """A file with all arrays, and the places it was planned with."""
    path = tmp_path / "weights.safetensors"
    places, sizes = write(path, ARRAYS)
    assert sizes == {name: array.nbytes for name, array in ARRAYS.items()}
    return path, places


def test_the_safetensors_library_reads_the_same_arrays(written):
    found = safetensors.numpy.load_file(written[0])
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_a_scalar_is_written_as_one(tmp_path):
    path = tmp_path / "scalar.safetensors"
    write(path, {"input_scale": np.array(3.5, dtype=np.float32)})
    assert safetensors.numpy.load_file(path)["input_scale"].shape == ()
    assert weights.read_places(path)["input_scale"].shape == ()


def test_places_are_read_back_as_they_were_planned(written):
    path, places = written
    assert weights.read_places(path) == places


def test_places_point_at_the_bytes(written):
    path, places = written
    content = path.read_bytes()
    for name, array in ARRAYS.items():
        assert content[places[name].offset :][: places[name].length] == array.tobytes()


def test_tensors_of_whole_cache_lines_begin_on_one(written):
    aligned = [place for place in written[1].values() if place.length % ALIGNMENT == 0]
    assert len(aligned) == 3
    assert all(place.offset % ALIGNMENT == 0 for place in aligned)


def test_files_of_the_safetensors_library_are_read(tmp_path):
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(dict(ARRAYS), path, metadata={"made by": "somebody"})
    places, content = weights.read_places(path), path.read_bytes()
    assert places.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert (places[name].dtype, places[name].shape) == (array.dtype, array.shape)
        assert content[places[name].offset :][: places[name].length] == array.tobytes()


def test_a_tensor_that_is_not_as_planned_is_not_written():
    pending = {"x": PendingTensor(np.dtype(np.float32), (3,), lambda: np.zeros(4, dtype=np.float32))}
    header, places = weights.lay_out(pending)
    with pytest.raises(AssertionError, match="planned"):
        list(weights.write(io.BytesIO(), header, places, pending))


def f32(begin: int, end: int, shape=None) -> dict:
    return {"dtype": "F32", "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


LIES = {
    "a hole": {"a": f32(0, 16), "b": f32(20, 32)},
    "an overlap": {"a": f32(0, 16), "b": f32(8, 32)},
    "the same place twice": {"a": f32(0, 32), "b": f32(0, 32)},
    "a hole in front": {"a": f32(4, 32)},
    "less than the file": {"a": f32(0, 28)},
    "more than the file": {"a": f32(0, 36)},
    "a shape larger than its place": {"a": f32(0, 32, [64])},
    "a shape smaller than its place": {"a": f32(0, 32, [4])},
    "an end beyond its shape": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 3200]}},
    "an end before its beginning": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, -32]}},
    "a negative beginning": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [-8, 24]}},
    "a negative size": {"a": f32(0, 32, [-8])},
    "two negative sizes": {"a": f32(0, 32, [-2, -4])},
    "a size that wraps to nothing": {"a": f32(0, 32), "b": f32(32, 32, [2**32, 2**32])},
    "a size that wraps to the file's": {"a": f32(0, 32, [2**62 + 8])},
    "a size that is no integer": {"a": f32(0, 32, [8.5])},
    "a size that is infinite": {"a": {"dtype": "F32", "shape": [float("inf")], "data_offsets": [0, 32]}},
    "an offset that is infinite": {"a": {"dtype": "F32", "shape": [8], "data_offsets": [float("inf"), 32]}},
    "an unknown dtype": {"a": {"dtype": "F8_E4M3", "shape": [32], "data_offsets": [0, 32]}},
    "no dtype": {"a": {"shape": [8], "data_offsets": [0, 32]}},
    "no offsets": {"a": {"dtype": "F32", "shape": [8]}},
    "empty offsets": {"a": {"dtype": "F32", "shape": [8], "data_offsets": []}},
    "a list": [f32(0, 32)],
    "a list in place of a tensor": {"a": [0, 32]},
    "a shape that is a number": {"a": {"dtype": "F32", "shape": 8, "data_offsets": [0, 32]}},
}


def crafted(path, header: object, data: bytes = bytes(32)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_does_not_describe_the_file_is_refused(tmp_path, lie):
    with pytest.raises(BundleError, match=r"lie\.safetensors"):
        weights.read_places(crafted(tmp_path / "lie.safetensors", LIES[lie]))


def test_an_honest_header_of_the_same_kind_is_read(tmp_path):
    places = weights.read_places(crafted(tmp_path / "honest.safetensors", {"a": f32(0, 16), "b": f32(16, 32)}))
    assert places["b"].offset == places["a"].offset + 16
    assert places["b"].length == 16


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x10\0\0",
        struct.pack("<Q", 0),
        struct.pack("<Q", 2**63) + b"{}",
        struct.pack("<Q", 2**40) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        struct.pack("<Q", 2) + b"{]",
        struct.pack("<Q", 4) + b"\xff\xfe{}",
        struct.pack("<Q", 4) + b"null",
        struct.pack("<Q", 2) + b"{}" + b"trailing",
        struct.pack("<Q", 200_000) + b"[" * 200_000,
    ],
    ids=["empty", "cut length", "no header", "absurd length", "huge header", "cut header", "not JSON", "not UTF-8",
         "null", "trailing data", "deeply nested"],
)  # fmt: skip
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    path = tmp_path / "odd.safetensors"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=r"odd\.safetensors"):
        weights.read_places(path)


def test_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**30 + 8)
    with pytest.raises(BundleError, match="header of 1073741824 bytes"):
        weights.read_places(path)
