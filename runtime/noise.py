"""Random numbers as a pure function of (seed, image, token, pass, bit).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the key is the 64-bit seed,
the counter is (image index, token, pass and kind, block of four words). The same image of the same seed gets the same
numbers in any batch, on any engine, in any order of evaluation. This module is the definition; a device may compute
the uniforms itself, bit for bit the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.spec import whole_number

Floats = NDArray[np.float32]

KIND_BITS, KIND_CONFIDENCE, KIND_ORDER = 0, 1, 2
_KIND_SHIFT = 16  # counter word 2 is pass | kind << 16
_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint64(0x9E3779B9), np.uint64(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class NoiseSource(Protocol):
    """What a batch of images is sampled with: seeded or recorded."""

    @property
    def images(self) -> int:
        """B."""

    def uniforms(self, tokens: int, passes: int, bits: int) -> tuple[Floats, Floats]:
        """u_bits [N, S, B, K, 2] and u_confidence [N, S, B, K], float32 in [0, 1), by generation step."""

    def orders(self, tokens: int) -> NDArray[np.int64]:
        """[B, N]: the grid index generated at each step."""

    def part(self, begin: int, end: int) -> "NoiseSource":
        """The noise of some of the images."""


def philox(counter: Sequence[NDArray[np.uint64] | np.uint64], seed: int) -> NDArray[np.uint64]:
    """Philox4x32-10 of broadcastable counter words under a 64-bit seed: [..., 4] words below 2**32."""
    shape = np.broadcast_shapes(*(np.shape(word) for word in counter))
    c0, c1, c2, c3 = (np.broadcast_to(np.asarray(word, dtype=np.uint64), shape) for word in counter)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    for _ in range(10):
        p0, p1 = _MULTIPLIERS[0] * c0, _MULTIPLIERS[1] * c2  # 64-bit products of 32-bit words
        c0, c1, c2, c3 = (p1 >> _SHIFT) ^ c1 ^ k0, p1 & _LOW, (p0 >> _SHIFT) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return np.stack((c0, c1, c2, c3), axis=-1)


@dataclass(frozen=True)
class SeededNoise:
    """Noise of the images with the given indices under one seed, of any integer type."""

    seed: int
    image_indices: Sequence[int]
    random_order: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", whole_number(self.seed, "seed"))  # Philox splits 64 bits, whatever its type
        if not 0 <= self.seed < 2**64:
            raise RequestError(f"seed must be between 0 and 2**64 - 1, is {self.seed}")
        if any(not 0 <= whole_number(index, "image index") < 2**32 for index in self.image_indices):
            raise RequestError("image indices must be between 0 and 2**32 - 1")

    @property
    def images(self) -> int:
        return len(self.image_indices)

    def uniforms(self, tokens: int, passes: int, bits: int) -> tuple[Floats, Floats]:
        u_bits = np.empty((tokens, passes, self.images, bits, 2), dtype=np.float32)
        u_confidence = np.empty((tokens, passes, self.images, bits), dtype=np.float32)
        token, head_pass = np.arange(tokens)[:, None, None], np.arange(passes)[None, :, None]
        for i, index in enumerate(self.image_indices):
            words = self._words(index, token, head_pass, KIND_BITS, 2 * bits)
            u_bits[:, :, i] = _to_uniform(words).reshape(tokens, passes, bits, 2)
            u_confidence[:, :, i] = _to_uniform(self._words(index, token, head_pass, KIND_CONFIDENCE, bits))
        return u_bits, u_confidence

    def orders(self, tokens: int) -> NDArray[np.int64]:
        if not self.random_order:
            return raster_orders(self.images, tokens)
        words = [self._words(index, np.zeros(1), np.zeros(1), KIND_ORDER, tokens) for index in self.image_indices]
        return np.argsort(np.stack(words), axis=1, kind="stable")

    def part(self, begin: int, end: int) -> "SeededNoise":
        return replace(self, image_indices=self.image_indices[begin:end])

    def _words(
        self, image: int, token: NDArray[Any], head_pass: NDArray[Any], kind: int, count: int
    ) -> NDArray[np.uint64]:
        """The first `count` words of every (token, pass): [..., count]."""
        token, head_pass = token.astype(np.uint64), head_pass.astype(np.uint64)
        blocks = np.arange(-(-count // 4), dtype=np.uint64)
        kind_and_pass = head_pass | np.uint64(kind << _KIND_SHIFT)
        words = philox((np.uint64(image), token, kind_and_pass, blocks), self.seed)  # [..., blocks, 4]
        return words.reshape(*words.shape[:-2], -1)[..., :count]


@dataclass(frozen=True)
class RecordedNoise:
    """Uniforms drawn elsewhere: u_bits [N, S, B, K, 2], u_confidence [N, S, B, K], optionally orders [B, N]."""

    u_bits: Floats
    u_confidence: Floats
    recorded_orders: NDArray[np.int64] | None = None

    @property
    def images(self) -> int:
        return int(self.u_bits.shape[2])

    def uniforms(self, tokens: int, passes: int, bits: int) -> tuple[Floats, Floats]:
        expected = (tokens, passes, self.images, bits, 2)
        if self.u_bits.shape != expected or self.u_confidence.shape != expected[:-1]:
            raise RequestError(
                f"recorded noise has shapes {list(self.u_bits.shape)} and {list(self.u_confidence.shape)}, "
                f"this model and allocation need {list(expected)} and {list(expected[:-1])}"
            )
        return self.u_bits, self.u_confidence

    def orders(self, tokens: int) -> NDArray[np.int64]:
        if self.recorded_orders is None:
            return raster_orders(self.images, tokens)
        if not np.array_equal(np.sort(self.recorded_orders, axis=-1), raster_orders(self.images, tokens)):
            raise RequestError(f"recorded orders must be {self.images} permutations of {tokens} grid indices")
        return self.recorded_orders

    def part(self, begin: int, end: int) -> "RecordedNoise":
        orders = None if self.recorded_orders is None else self.recorded_orders[begin:end]
        return RecordedNoise(self.u_bits[:, :, begin:end], self.u_confidence[:, :, begin:end], orders)


def raster_orders(images: int, tokens: int) -> NDArray[np.int64]:
    """[images, tokens]: 0, 1, 2, … for every image."""
    return np.tile(np.arange(tokens), (images, 1))


def gumbel(u: Floats) -> Floats:
    """Gumbel noise from uniforms in [0, 1), in float32 as docs/model.md section 4.3 writes it."""
    tiny = np.float32(1e-20)
    return np.asarray(-np.log(np.maximum(-np.log(np.maximum(u, tiny)), tiny)), dtype=np.float32)


def _to_uniform(words: NDArray[np.uint64]) -> Floats:
    return (words >> np.uint64(8)).astype(np.float32) * np.float32(2.0**-24)
