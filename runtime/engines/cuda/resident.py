"""The weights of a bundle compiled for the engine `cuda`, checked and copied to the device in one piece."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.device import Address, Device
from bar_edge.runtime.engines.cuda.loop import TABLES
from bar_edge.runtime.errors import BundleError, CompatibilityError, EngineError
from bar_edge.runtime.weights import StoredTensor

NAME = "cuda"
FAMILY = 2  # of kernels: how weights lie, and the order of every sum. Another one draws slightly other numbers
TILE = 8  # outputs whose weights lie together
CHUNK_BYTES = 512  # of a tile, that a warp loads at once
CHUNK_INPUTS = {"fp16": 32, "int8": 64, "int8-weight": 64, "int4-weight": 128}  # by the form of a layer's weights
_ALIGNMENT = 16  # of weights, which are loaded 16 bytes at a time
_BLOCKS = (16, 32, 64, 128)  # INT4 values that may share a scale
_REMEDY = "compile the bundle it was made from again, with --target cuda"


@dataclass(frozen=True)
class Layer:
    """A linear layer, on the device."""

    form: str
    in_features: int  # as filled up
    out_features: int
    weight: Address
    scale: Address  # 0 for fp16
    bias: Address
    block: int  # values that share a scale; 0 unless int4-weight
    input_scale: float  # of static INT8 activations; 0 for float16 ones


class Weights:
    """A compiled bundle's file of weights and what its manifest says of it, checked; nothing is on a device yet."""

    def __init__(self, bundle: Bundle) -> None:
        """Raises BundleError if they do not fit together, CompatibilityError if other kernels are meant."""
        self.path = bundle.path
        self._file = bundle.path / weights.FILE_NAME
        self._places = weights.read_places(self._file)
        try:
            account = bundle.manifest["engines"][NAME]
            family = account["family"]
            self._forms = {
                str(layer): (str(entry["form"]), int(entry["in_features"]))
                for layer, entry in account["layers"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise BundleError(f"{bundle.path}: its account of engines is malformed ({error!r}); {_REMEDY}") from error
        if family != FAMILY:
            raise CompatibilityError(
                f"{bundle.path}: is for kernel family {family}, this is family {FAMILY}; {_REMEDY}"
            )
        self._layers = {name: self._checked(name, *facts) for name, facts in self._forms.items()}
        self._tensors = weights.open_weights(bundle.path)

    @property
    def bytes(self) -> int:
        """What the device must hold."""
        return self._file.stat().st_size

    @property
    def tables(self) -> dict[str, NDArray[np.float32]]:
        """What the loop's kernels read."""
        for name in TABLES:
            self.place(name)
        return {name: np.asarray(self._tensors[name]) for name in TABLES}

    def features(self, layer: str) -> tuple[int, int]:
        """(inputs as filled up, outputs) of a layer. Raises BundleError if there is none of that name."""
        if layer not in self._layers:
            raise BundleError(f"{self.path}: has no linear layer {layer}; {_REMEDY}")
        found = self._layers[layer]
        return found.in_features, found.out_features

    def place(self, name: str) -> StoredTensor:
        """Where a tensor lies. Raises BundleError if there is none of that name."""
        if name not in self._places:
            raise BundleError(f"{self.path}: has no tensor {name}; {_REMEDY}")
        return self._places[name]

    def count(self, pattern: str) -> int:
        """Layers whose names match."""
        return sum(re.fullmatch(pattern, layer) is not None for layer in self._layers)

    def load(self, device: Device) -> "Resident":
        """Copy the file to the device. Raises EngineError if memory does not suffice."""
        try:
            address = device.allocate(self.bytes)
        except MemoryError as error:
            raise EngineError(
                f"{self.path}: its weights need {self.bytes / 2**20:.0f} MiB of device memory, "
                f"{device.free_bytes() / 2**20:.0f} MiB are free: free some, or quantize to fewer bits"
            ) from error
        try:
            device.upload(address, np.memmap(self._file, dtype=np.uint8, mode="r"))
        except EngineError:
            device.free(address)
            raise
        return Resident(device, address, self._layers, {name: place.offset for name, place in self._places.items()})

    def _checked(self, name: str, form: str, in_features: int) -> Layer:
        """A layer of this form, at offsets in the file. Raises BundleError unless its tensors are what it needs."""
        bias = self.place(f"{name}.bias")
        outputs, input_scale, block = bias.shape[0], 0.0, 0
        chunks = -(-in_features // CHUNK_INPUTS.get(form, 1))
        weight, scale = self.place(f"{name}.weight_chunks"), None
        expected: list[tuple[StoredTensor, Any, tuple[int, ...]]] = [
            (bias, np.float32, (outputs,)),
            (weight, np.uint8, (-(-outputs // TILE), CHUNK_BYTES * chunks)),
        ]
        if form in ("int8", "int8-weight"):
            scale = self.place(f"{name}.weight_scale")
            expected.append((scale, np.float32, (outputs,)))
        if form == "int4-weight":
            scale = self.place(f"{name}.block_scale")
            block = in_features // scale.shape[-1]
            expected.append((scale, np.float16, (outputs, in_features // max(block, 1))))
        if form == "int8":
            place = self.place(f"{name}.input_scale")
            expected.append((place, np.float32, ()))
            input_scale = float(np.memmap(self._file, dtype=np.float32, mode="r", offset=place.offset, shape=(1,))[0])
        fits = all((place.dtype, place.shape) == (np.dtype(dtype), shape) for place, dtype, shape in expected)
        blocks_fit = block in _BLOCKS if form == "int4-weight" else True
        if form not in CHUNK_INPUTS or not fits or not blocks_fit or in_features % 8 or weight.offset % _ALIGNMENT:
            raise BundleError(f"{self.path}: the tensors of {name} do not fit its form {form!r}; {_REMEDY}")
        at = 0 if scale is None else scale.offset
        return Layer(form, in_features, outputs, weight.offset, at, bias.offset, block, input_scale)


class Resident:
    """Weights in device memory."""

    def __init__(
        self, device: Device, address: Address, layers: Mapping[str, Layer], offsets: Mapping[str, int]
    ) -> None:
        self._device, self._address = device, address
        self._layers = {name: _moved(layer, address) for name, layer in layers.items()}
        self._offsets = offsets

    def layer(self, name: str) -> Layer:
        """A linear layer."""
        return self._layers[name]

    def __getitem__(self, name: str) -> Address:
        """The address of a tensor."""
        return self._address + self._offsets[name]

    def close(self) -> None:
        """Give the memory back."""
        self._device.free(self._address)


def _moved(layer: Layer, by: int) -> Layer:
    """A layer whose file begins at an address."""
    scale = layer.scale + by if layer.scale else 0
    return Layer(
        layer.form, layer.in_features, layer.out_features, layer.weight + by, scale, layer.bias + by, layer.block,
        layer.input_scale,
    )  # fmt: skip
