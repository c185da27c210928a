"""What a set of compiled graphs was compiled for: static shapes, the same for every GPU engine."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from bar_edge.runtime.spec import ModelSpec

_CACHE_MULTIPLE = 8  # positions: keeps every layer's cache aligned for vector loads
_PREFIX_ROWS = 8  # rows whose prefix runs together: bounds the activations and the modulation they need
_DECODE_IMAGES = 8
_LEAST_PAIRS = 64  # (position, class) pairs of modulation in one call: enough for full-speed products


@dataclass(frozen=True)
class Profile:
    """Static sizes of one set of graphs. Rows: images, twice if guided."""

    rows: int
    passes: int
    prefix_rows: int
    modulation_pairs: int
    decode_images: int

    @classmethod
    def of(cls, images: int, *, guided: bool, passes: int) -> "Profile":
        """The profile that samples `images` together."""
        rows = images * (2 if guided else 1)
        together = max(n for n in range(1, _PREFIX_ROWS + 1) if rows % n == 0)
        return cls(rows, passes, together, max(_LEAST_PAIRS, rows), min(images, _DECODE_IMAGES))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Profile":
        """Inverse of `to_dict`. Raises TypeError, ValueError."""
        if not all(isinstance(value, int) and value >= 1 for value in values.values()):
            raise ValueError(f"sizes must be positive whole numbers: {dict(values)}")
        return cls(**values)

    def to_dict(self) -> dict[str, int]:
        """JSON-ready."""
        return asdict(self)

    def cache_length(self, spec: ModelSpec) -> int:
        """Positions the KV cache has room for."""
        return -(-(spec.prefix_length + spec.num_tokens) // _CACHE_MULTIPLE) * _CACHE_MULTIPLE

    def head_modulation_width(self, spec: ModelSpec) -> int:
        """Values in a row of the head's modulation: shift, scale, gate of each block; scale, shift of the output."""
        return (3 * spec.head_layers + 2) * spec.head_width
