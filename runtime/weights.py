"""`weights.safetensors`: every weight of a bundle once, mapped by the graphs and readable without any library.

The layout is that of the safetensors format (https://github.com/huggingface/safetensors, README): an 8-byte length, a
JSON header of names, dtypes, shapes and offsets, then the data without holes. Written here as a stream, so that a
model is never in memory twice; large tensors come first and the header is padded, so they start on 64-byte boundaries.
"""

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.errors import BundleError
from bar_edge.runtime.spec import ModelSpec

FILE_NAME = "weights.safetensors"
ALIGNMENT = 64
_MAX_HEADER = 64 * 2**20
_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "U16": np.dtype(np.uint16),
}
_REMEDY = "copy the bundle again, or export it again"
_COUNTED = {  # fields of a model by a tensor that each of its layers has
    "num_layers": re.compile(r"blocks\.\d+\.attn\.qk_norm\.weight"),
    "head_layers": re.compile(r"lm_head\.transformer\.\d+\.mlp\.w3\.bias"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: byte offset from the start of the file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def length(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class PendingTensor:
    """A tensor to be written: its dtype and shape are known before `make` computes it."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    make: Callable[[], NDArray[Any]]


def lay_out(tensors: Mapping[str, PendingTensor]) -> tuple[bytes, dict[str, StoredTensor]]:
    """The file's header and the place of every tensor, in file order."""

    def size(name: str) -> int:
        return tensors[name].dtype.itemsize * math.prod(tensors[name].shape)

    names = sorted(tensors, key=lambda name: (size(name) % ALIGNMENT != 0, -tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {}
    position = 0
    for name in names:
        pending = tensors[name]
        end = position + size(name)
        header[name] = {
            "dtype": _CODES[pending.dtype],
            "shape": list(pending.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    places = {
        name: StoredTensor(tensors[name].dtype, tensors[name].shape, start + header[name]["data_offsets"][0])
        for name in names
    }
    return struct.pack("<Q", len(text)) + text, places


def write(
    file: BinaryIO, header: bytes, places: Iterable[str], tensors: Mapping[str, PendingTensor]
) -> Iterable[tuple[str, int]]:
    """Write the file tensor by tensor; yields each name and its size in bytes once it is written."""
    file.write(header)
    for name in places:
        pending = tensors[name]
        array = np.asarray(pending.make(), dtype=pending.dtype, order="C")
        if array.shape != pending.shape:
            raise AssertionError(f"{name}: planned {pending.shape}, made {array.shape}")
        file.write(array.data)
        yield name, array.nbytes


def read_places(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file and check that it describes the file exactly. Raises BundleError."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            raise BundleError(f"{path}: not a safetensors file (header of {length} bytes in a file of {size})")
        try:
            header = json.loads(file.read(length))
            places = {name: _place(entry, 8 + length) for name, entry in header.items() if name != "__metadata__"}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise BundleError(f"{path}: its safetensors header is malformed ({error!r})") from error
    expected = 8 + length
    for name, place in sorted(places.items(), key=lambda item: item[1].offset):
        if place.offset != expected:
            raise BundleError(f"{path}: tensor {name} does not follow its neighbour; the file was tampered with")
        expected += place.length
    if expected != size:
        raise BundleError(f"{path}: its header describes {expected} bytes, the file has {size}")
    return places


def check_sizes(path: Path, spec: ModelSpec) -> None:
    """Raise BundleError unless the tensors that tell a model's sizes are those of `spec`.

    Every bundle has the tables; the layers of a compiled one may be in its plans.
    """
    shapes = {name: place.shape for name, place in read_places(path).items()}
    d, k = spec.hidden_size, spec.bits_per_token
    expected: dict[str, tuple[int, ...]] = {
        "symbol_embedding": (spec.num_symbols, d),
        "bit_embedding": (k, d),
        "pos_embed": (spec.prefix_length + spec.num_tokens, d),
        "lm_head.bit_embedding": (2 * k, spec.head_width),
    }
    of_layers: dict[str, tuple[int, ...]] = {
        "blocks.0.attn.qk_norm.weight": (2 * spec.num_heads, spec.head_dim),
        "decoder.positional_embedding": (1 + spec.image_seq_len, *shapes.get("decoder.class_embedding", ())[1:]),
        "decoder.ffn.0.bias": (3 * spec.decoder_patch_size**2,),
    }
    expected |= {name: shape for name, shape in of_layers.items() if name in shapes}
    for name, shape in expected.items():
        if (found := shapes.get(name)) != shape:
            is_there = "missing" if found is None else f"of shape {list(found)}"
            raise BundleError(f"{path}: {name} is {is_there}, the manifest's model needs {list(shape)}; {_REMEDY}")
    for field, pattern in _COUNTED.items():
        count, stated = sum(pattern.fullmatch(name) is not None for name in shapes), getattr(spec, field)
        if count not in (0, stated):
            raise BundleError(f"{path}: holds {count} layers, {field} of the manifest's model is {stated}; {_REMEDY}")


def _place(entry: dict[str, Any], start: int) -> StoredTensor:
    """One entry of the header, whose data begin `start` bytes into the file. Raises ValueError, KeyError, TypeError."""
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if any(type(n) is not int or n < 0 for n in (begin, end, *shape)):
        raise ValueError(f"sizes must be whole numbers: {entry}")
    place = StoredTensor(_DTYPES[entry["dtype"]], shape, start + begin)
    if begin + place.length != end:
        raise ValueError(f"shape {list(shape)} does not fill bytes {begin} to {end}")
    return place


def open_weights(folder: Path) -> dict[str, NDArray[Any]]:
    """Every tensor of a folder's weights file, memory mapped and read-only. Raises BundleError."""
    path = folder / FILE_NAME
    return {
        name: np.memmap(path, dtype=place.dtype, mode="r", offset=place.offset, shape=place.shape or (1,)).reshape(
            place.shape
        )
        for name, place in read_places(path).items()
    }
