"""What a BAR model is in numbers: shapes, the sampling recipe, and the five published variants.

Notation as in the paper (arXiv 2602.09024): B images, D hidden size, H heads, d head size, P patch size, N tokens,
K bits per token, F prefix length, W head width, S head passes per token. Plain data, no tensor library.
"""

import itertools
import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from bar_edge.runtime.errors import RequestError

RMS_NORM_EPS = 1e-6
LAYER_NORM_EPS = 1e-5
DECODER_HEADS = 16  # fixed by the authors' decoder, not visible in any tensor


HIDDEN_MULTIPLE = 128  # of SwiGLU's hidden width, which bundles pad with zeros
FIRST_CLASS_SYMBOL = 3  # row of `symbol_embedding` for class 0; the authors' embeddings begin with three others


def padded(hidden: int) -> int:
    """A hidden width of SwiGLU as bundles have it: the next multiple of `HIDDEN_MULTIPLE`."""
    return -(-hidden // HIDDEN_MULTIPLE) * HIDDEN_MULTIPLE


@dataclass(frozen=True)
class ModelSpec:
    """The shape of one generator and the tokenizer decoder that belongs to it."""

    hidden_size: int
    num_layers: int
    num_heads: int
    image_seq_len: int  # cells of the fine grid, before patches
    token_size: int  # bits per cell of the fine grid
    patch_size: int
    num_classes: int
    repeat_class_condition: int
    head_width: int
    head_layers: int
    decoder_patch_size: int  # pixels per cell of the fine grid, each way

    @property
    def num_tokens(self) -> int:
        """N: tokens drawn one after the other."""
        return self.image_seq_len // self.patch_size**2

    @property
    def bits_per_token(self) -> int:
        """K."""
        return self.token_size * self.patch_size**2

    @property
    def prefix_length(self) -> int:
        """F: the class-independent first position and the repeated class."""
        return 1 + self.repeat_class_condition

    @property
    def head_dim(self) -> int:
        """d, channels per attention head."""
        return self.hidden_size // self.num_heads

    @property
    def grid_size(self) -> int:
        """Cells along one side of the fine grid."""
        return math.isqrt(self.image_seq_len)

    @property
    def image_size(self) -> int:
        """Pixels along one side of the image."""
        return self.grid_size * self.decoder_patch_size

    @property
    def unconditional_class(self) -> int:
        """The class id that selects the unconditional embedding (one past the last class, plus the unused row)."""
        return self.num_classes

    @property
    def first_position_symbol(self) -> int:
        """Row of `symbol_embedding` for the sequence's first position."""
        return self.num_classes + 4

    @property
    def token_symbol(self) -> int:
        """Row of `symbol_embedding` for a drawn token, whose bits are added to it."""
        return self.num_classes + 5

    @property
    def num_symbols(self) -> int:
        """Rows of `symbol_embedding`."""
        return self.num_classes + 6

    def to_dict(self) -> dict[str, int]:
        """The fields as JSON-ready numbers."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelSpec":
        """Inverse of `to_dict`. Raises ValueError unless exactly the known fields are there, as positive integers."""
        names = {field.name for field in fields(cls)}
        if set(values) != names:
            raise ValueError(f"model fields differ: {sorted(set(values) ^ names)}")
        for name, value in values.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model field {name} must be a positive integer, is {value!r}")
        return cls(**values)


@dataclass(frozen=True)
class Recipe:
    """How tokens are sampled (docs/model.md section 4)."""

    guidance: float
    temperature: float
    allocation: tuple[int, ...]  # bits unmasked per head pass

    def validated(self, bits_per_token: int) -> "Recipe":
        """Return self if it can be sampled with K bits per token. Raises RequestError otherwise."""
        check_allocation(self.allocation, bits_per_token)
        for name, value in (("guidance", self.guidance), ("temperature", self.temperature)):
            if not math.isfinite(value) or value < 0:
                raise RequestError(f"{name} must be a finite number that is not negative, is {value}")
        return self

    def overridden(
        self,
        bits_per_token: int,
        *,
        guidance: float | None = None,
        temperature: float | None = None,
        allocation: Sequence[int] | None = None,
    ) -> "Recipe":
        """With what is given in its place. Raises RequestError if that cannot be sampled with K bits per token."""
        return Recipe(
            self.guidance if guidance is None else _number(guidance, "guidance"),
            self.temperature if temperature is None else _number(temperature, "temperature"),
            self.allocation if allocation is None else whole_numbers(allocation, "allocation"),
        ).validated(bits_per_token)


def whole_number(value: Any, what: str) -> int:
    """`value`, of any integer type, as int. Raises RequestError for anything else."""
    try:
        return operator.index(value)
    except TypeError as error:
        raise RequestError(f"{what} must be a whole number, is {value!r}") from error


def whole_numbers(values: Any, what: str) -> tuple[int, ...]:
    """Likewise, of several."""
    try:
        listed = list(values)
    except TypeError as error:
        raise RequestError(f"{what} must be a list of whole numbers, is {values!r}") from error
    return tuple(whole_number(value, what) for value in listed)


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise RequestError(f"{what} must be a finite number that is not negative, is {value!r}") from error


def check_allocation(allocation: Sequence[int], bits_per_token: int) -> None:
    """Raise RequestError unless `allocation` is positive, non-decreasing and sums to K."""
    ok = len(allocation) > 0 and all(a >= 1 for a in allocation) and sum(allocation) == bits_per_token
    if not ok or any(b < a for a, b in itertools.pairwise(allocation)):
        raise RequestError(
            f"allocation {','.join(map(str, allocation)) or '(empty)'} does not fit: it must be positive, "
            f"non-decreasing and sum to {bits_per_token}, the bits per token of this model"
        )


@dataclass(frozen=True)
class Variant:
    """A published generator with its authors' evaluation recipe."""

    name: str
    spec: ModelSpec
    recipe: Recipe
    tokenizer: str
    parameters: int


def _variant(
    name: str,
    size: tuple[int, int, int],
    grid: tuple[int, int, int],
    recipe: Recipe,
    tokenizer: str,
    parameters: int,
) -> Variant:
    hidden_size, num_layers, num_heads = size
    image_seq_len, token_size, patch_size = grid
    spec = ModelSpec(
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        image_seq_len=image_seq_len,
        token_size=token_size,
        patch_size=patch_size,
        num_classes=1000,
        repeat_class_condition=32,
        head_width=2048,
        head_layers=3,
        decoder_patch_size=16,
    )
    return Variant(name, spec, recipe, tokenizer, parameters)


_B, _L = (768, 24, 12), (1280, 32, 16)

VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _variant("bar_b_patch4", _B, (256, 16, 4), Recipe(9.6, 1.4, (64, 64, 64, 64)), "bar_fsq_16bits", 415_752_223),
        _variant("bar_b_patch2", _B, (256, 16, 2), Recipe(5.5, 2.0, (16, 16, 16, 16)), "bar_fsq_16bits", 415_076_098),
        _variant("bar_b", _B, (256, 16, 1), Recipe(5.0, 2.5, (2, 2, 5, 7)), "bar_fsq_16bits_ft", 415_322_158),
        _variant("bar_l", _L, (256, 16, 1), Recipe(5.3, 3.0, (2, 2, 5, 7)), "bar_fsq_16bits_ft", 1_107_798_990),
        _variant(
            "bar_l_res512", _L, (1024, 10, 1), Recipe(4.2, 2.8, (2, 2, 2, 4)), "bar_sfq_10bits_res512", 1_110_727_993
        ),
    )
}


def find_variant(spec: ModelSpec) -> Variant | None:
    """The published variant with exactly these shapes, if any."""
    return next((variant for variant in VARIANTS.values() if variant.spec == spec), None)
