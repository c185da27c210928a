"""Moving a layer's outlier channels into its weights, where the algebra is exact.

A linear layer `W·x` equals `(W·diag(s))·(x/s)`. Where x comes out of something linear in stored tensors, dividing by s
is a change of those tensors, so the model computes the same function (to rounding) and quantizes better:

    input of                      the division goes into
    attn.qkv, mlp.w12             shift and scale rows of the modulation in front (decoder: its LayerNorm)
    attn.proj                     the v rows of attn.qkv: attention is linear in v
    mlp.w3                        the second half of mlp.w12: SwiGLU is linear in it
    output_embed, ffn.0           the modulation or LayerNorm in front

Not foldable: the decoder's fc2 (its GELU is not linear), inputs of the modulations themselves, `latent_condition_proj`.
"""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Tensors = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Rows:
    """Rows of a tensor: piece `index` of `pieces` equal pieces along the first dimension."""

    tensor: str
    index: int
    pieces: int


def producers(layer: str) -> list[Rows]:
    """What has to be divided when the input of `layer` is; empty if the input is not foldable."""
    if match := re.fullmatch(r"(blocks\.\d+)\.(attn\.qkv|mlp\.w12)", layer):
        first = 0 if match[2] == "attn.qkv" else 3  # shift, scale, gate of attention, then of the MLP
        return _linear_rows(f"{match[1]}.adaLN_modulation.1", (first, first + 1), 6)
    if match := re.fullmatch(r"(lm_head\.transformer\.\d+)\.mlp\.w12", layer):
        return _linear_rows(f"{match[1]}.adaLN_modulation.1", (0, 1), 3)
    if layer == "lm_head.output_embed":
        return _linear_rows("lm_head.adaln_before_head.adaLN_modulation.1", (0, 1), 2)
    if match := re.fullmatch(r"(.+)\.attn\.proj", layer):
        return _linear_rows(f"{match[1]}.attn.qkv", (2,), 3)
    if match := re.fullmatch(r"(.+)\.mlp\.w3", layer):
        return _linear_rows(f"{match[1]}.mlp.w12", (1,), 2)
    norm = None
    if match := re.fullmatch(r"(decoder\.transformer\.\d+)\.(attn\.qkv|mlp\.fc1)", layer):
        norm = f"{match[1]}.norm1" if match[2] == "attn.qkv" else f"{match[1]}.norm2"
    elif layer == "decoder.ffn.0":
        norm = "decoder.ln_post"
    return [Rows(f"{norm}.{part}", 0, 1) for part in ("weight", "bias")] if norm else []


def _linear_rows(layer: str, indices: tuple[int, ...], pieces: int) -> list[Rows]:
    return [Rows(f"{layer}.{part}", index, pieces) for part in ("weight", "bias") for index in indices]


def apply(tensors: Tensors, layer: str, factors: Floats) -> None:
    """Divide the input of `layer` by factors [in], in place of the mapping (stored arrays are not touched)."""
    for rows in producers(layer):
        changed = np.array(tensors[rows.tensor])
        piece = changed.reshape(rows.pieces, -1, *changed.shape[1:])[rows.index]
        piece /= factors.reshape(-1, *([1] * (piece.ndim - 1)))
        tensors[rows.tensor] = changed
    tensors[f"{layer}.weight"] = tensors[f"{layer}.weight"] * factors[None]


def factors(channel_max: Floats, weight: Floats, strength: float) -> Floats:
    """s = max|x|^strength / max|w|^(1-strength) per input channel (SmoothQuant, arXiv 2211.10438, equation 4).

    channel_max [in], weight [out, in]. Channels without data or weights, such as padding, keep 1.
    """
    weight_max = np.abs(weight).max(axis=0)
    live = (channel_max > 0) & (weight_max > 0)
    s = np.ones_like(channel_max)
    s[live] = channel_max[live] ** strength / weight_max[live] ** (1 - strength)
    s[live] /= np.exp(np.log(s[live]).mean()) if live.any() else 1
    return np.clip(s, 1e-3, 1e3).astype(np.float32)
