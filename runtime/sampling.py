"""The masked-bit sampling loop in numpy: the readable statement of docs/model.md section 4.

Engines run the same loop inside their graphs or kernels; tests hold them to this one bit by bit. Everything an engine
needs besides the model is here too: the schedule of an allocation, and the way bits travel between tokens, the fine
grid and pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.spec import ModelSpec, Recipe

Floats = NDArray[np.float32]
Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class Schedule:
    """What each of the S head passes of a token does; the same for all tokens."""

    mask_ratio: Floats  # [S] fraction still masked when the pass begins
    temperature: Floats  # [S]
    remask_count: NDArray[np.int64]  # [S] bits left masked after the pass, 0 in the last

    @classmethod
    def of(cls, recipe: Recipe, bits_per_token: int) -> "Schedule":
        """Raises RequestError if the allocation does not fit K."""
        recipe.validated(bits_per_token)
        passes = len(recipe.allocation)
        done = np.cumsum((0, *recipe.allocation))
        return cls(
            np.asarray(1 - done[:-1] / bits_per_token, dtype=np.float32),
            np.asarray(recipe.temperature * (1 - np.arange(passes) / passes), dtype=np.float32),
            bits_per_token - done[1:],
        )


def guidance_at(token: int, guidance: float, num_tokens: int) -> float:
    """The guidance scale of one token: it grows linearly from 1 (section 4.1)."""
    return 1 + (guidance - 1) * token / num_tokens


def sample_token(
    head: Callable[[NDArray[np.bool_], NDArray[np.bool_], int], Floats],
    schedule: Schedule,
    guidance: float | Floats,
    gumbel_bits: Floats,
    gumbel_confidence: Floats,
) -> tuple[NDArray[np.bool_], Floats]:
    """Draw the K bits of one token for B images (section 4.2).

    Args:
        head: known, bits [B, K] and the pass -> logits [rows, K, 2], conditional rows first; rows is B or 2B.
        guidance: the token's scale, or one per image [B, 1, 1].
        gumbel_bits: [S, B, K, 2] float32.
        gumbel_confidence: [S, B, K] float32; the last pass is not used.

    Returns bits [B, K], and how far from a tie the closest decision of each image was, [B], as a fraction of the
    largest logit. Arithmetic is float32, in the order written, so that an engine can match it bit for bit.
    """
    passes, images, bits_per_token, _ = gumbel_bits.shape
    known = np.zeros((images, bits_per_token), dtype=bool)
    bits = np.zeros_like(known)
    margin = np.full(images, np.inf, dtype=np.float32)
    for s in range(passes):
        logits = head(known, bits & known, s)
        conditional, unconditional = logits[:images], logits[-images:]
        logits = unconditional + np.float32(guidance) * (conditional - unconditional)
        noisy = logits + schedule.temperature[s] * gumbel_bits[s]
        bits = np.where(known, bits, noisy[..., 1] > noisy[..., 0])
        scale = np.abs(logits).max(axis=(1, 2))
        distance = np.where(known, np.inf, np.abs(noisy[..., 1] - noisy[..., 0]))
        margin = np.minimum(margin, distance.min(axis=1) / scale)
        left = int(schedule.remask_count[s])
        if left == 0:
            break
        confidence = np.where(bits, logits[..., 1], logits[..., 0])  # of the value drawn, without its noise
        confidence = np.where(known, np.float32(np.inf), confidence)
        confidence = confidence + schedule.temperature[s] * gumbel_confidence[s]
        ranked = np.sort(confidence, axis=1)
        margin = np.minimum(margin, (ranked[:, left] - ranked[:, left - 1]) / scale)
        known = confidence > ranked[:, left - 1 : left]
    return bits, margin


def to_raster(drawn: NDArray[Any], orders: NDArray[np.int64]) -> NDArray[Any]:
    """Tokens by generation step [B, N, K], drawn at grid indices `orders` [B, N] -> in raster order."""
    raster = np.empty_like(drawn)
    np.put_along_axis(raster, orders[:, :, None], drawn, axis=1)
    return raster


def to_fine_grid(tokens: NDArray[Any], spec: ModelSpec) -> NDArray[Any]:
    """Bits by token in raster order [B, N, K] -> by cell of the fine grid [B, image_seq_len, token_size].

    The K bits of a token are its P x P patch of cells in row-major order (section 4).
    """
    p, side = spec.patch_size, spec.grid_size // spec.patch_size
    cells = tokens.reshape(-1, side, side, p, p, spec.token_size)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(-1, spec.image_seq_len, spec.token_size)


def to_tokens(cells: NDArray[Any], spec: ModelSpec) -> NDArray[Any]:
    """Inverse of `to_fine_grid`: [B, image_seq_len, token_size] -> [B, N, K]."""
    p, side = spec.patch_size, spec.grid_size // spec.patch_size
    patches = cells.reshape(-1, side, p, side, p, spec.token_size)
    return patches.transpose(0, 1, 3, 2, 4, 5).reshape(-1, spec.num_tokens, spec.bits_per_token)


def to_uint8(image: Floats) -> NDArray[np.uint8]:
    """Decoder output [B, 3, H, W] -> pixels [B, H, W, 3] (section 5)."""
    pixels = np.clip((image + 1) / 2, 0, 1) * np.float32(255)
    return np.ascontiguousarray(pixels.astype(np.uint8).transpose(0, 2, 3, 1))
