"""Which tensors a model has, by their names and shapes, and what of it the kernels of `model.cu` can do."""

import numpy as np

from bar_edge.runtime.engines.cuda.resident import Weights
from bar_edge.runtime.errors import BundleError, CompatibilityError
from bar_edge.runtime.spec import DECODER_HEADS, ModelSpec

MAX_POSITIONS, MAX_HEAD_DIM, DECODER_HEAD_DIMS = 2048, 256, (64, 128)  # of attention.cuh


def check(spec: ModelSpec, weights: Weights) -> None:
    """Raise CompatibilityError for a model that the kernels cannot do, BundleError for weights of another model."""
    decoder_dim = weights.features("quantize.out_proj")[1] // DECODER_HEADS
    positions = max(spec.prefix_length + spec.num_tokens, 1 + spec.image_seq_len)
    if spec.head_dim % 8 or decoder_dim % 4 or spec.head_dim > MAX_HEAD_DIM or decoder_dim > DECODER_HEAD_DIMS[-1]:
        raise CompatibilityError(
            f"{weights.path}: heads have {spec.head_dim} channels and {decoder_dim} in the decoder; this engine takes "
            f"multiples of 8 and of 4, up to {MAX_HEAD_DIM} and {DECODER_HEAD_DIMS[-1]}: use TensorRT"
        )
    if positions > MAX_POSITIONS:
        raise CompatibilityError(
            f"{weights.path}: attends to {positions} positions, this engine to {MAX_POSITIONS} at most: use TensorRT"
        )
    if spec.head_width % 8:
        raise CompatibilityError(
            f"{weights.path}: the head is {spec.head_width} wide, this engine takes multiples of 8: use TensorRT"
        )
    for layer, expected in _layer_sizes(spec, weights).items():
        if (found := weights.features(layer)) != expected:
            raise BundleError(f"{weights.path}: {layer} is {found[0]} to {found[1]}, its model needs {expected}")
    for name, shape in _table_shapes(spec, weights).items():
        place = weights.place(name)
        if (place.dtype, place.shape) != (np.dtype(np.float32), shape):
            raise BundleError(
                f"{weights.path}: {name} is {place.dtype} {list(place.shape)}, its model needs float32 {list(shape)}"
            )


def trunk_block(i: int) -> str:
    """Prefix of the names of a layer of the trunk."""
    return f"blocks.{i}"


def head_block(i: int) -> str:
    """Prefix of the names of a block of the head."""
    return f"lm_head.transformer.{i}"


def decoder_block(i: int) -> str:
    """Prefix of the names of a block of the decoder."""
    return f"decoder.transformer.{i}"


def decoder_layers(weights: Weights) -> int:
    """Blocks of the decoder, which only its tensors tell."""
    return weights.count(r"decoder\.transformer\.\d+\.attn\.qkv")


def _layer_sizes(spec: ModelSpec, weights: Weights) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of every layer that the graphs compute; the widths of MLPs are their own."""
    d, w = spec.hidden_size, spec.head_width
    frequencies = weights.place("lm_head.t_embedder.W").shape[0]
    width = weights.features("quantize.out_proj")[1]
    sizes = {
        "latent_condition_proj": (d, w), "lm_head.adaln_before_head.adaLN_modulation.1": (w, 2 * w),
        "lm_head.output_embed": (w, 2 * spec.bits_per_token), "lm_head.t_embedder.mlp.0": (2 * frequencies, w),
        "lm_head.t_embedder.mlp.2": (w, w), "quantize.out_proj": (-(-spec.token_size // 8) * 8, width),
        "decoder.ffn.0": (width, 3 * spec.decoder_patch_size**2),
    }  # fmt: skip
    hidden = {name: weights.features(f"{name}.mlp.w3")[0] for name in (trunk_block(0), head_block(0))}
    for i in range(spec.num_layers):
        block, mlp = trunk_block(i), hidden[trunk_block(0)]
        sizes |= {f"{block}.adaLN_modulation.1": (d, 6 * d), f"{block}.attn.qkv": (d, 3 * d)}
        sizes |= {f"{block}.attn.proj": (d, d), f"{block}.mlp.w12": (d, 2 * mlp), f"{block}.mlp.w3": (mlp, d)}
    for i in range(spec.head_layers):
        block, mlp = head_block(i), hidden[head_block(0)]
        sizes |= {f"{block}.adaLN_modulation.1": (w, 3 * w)}
        sizes |= {f"{block}.mlp.w12": (w, 2 * mlp), f"{block}.mlp.w3": (mlp, w)}
    for i in range(decoder_layers(weights)):
        block, mlp = decoder_block(i), weights.features(f"{decoder_block(i)}.mlp.fc1")[1]
        sizes |= {f"{block}.attn.qkv": (width, 3 * width), f"{block}.attn.proj": (width, width)}
        sizes |= {f"{block}.mlp.fc1": (width, mlp), f"{block}.mlp.fc2": (mlp, width)}
    return sizes


def _table_shapes(spec: ModelSpec, weights: Weights) -> dict[str, tuple[int, ...]]:
    """Whatever else the kernels read; what the loop's kernels read is the loop's."""
    d, positions = spec.hidden_size, spec.prefix_length + spec.num_tokens
    width = weights.features("quantize.out_proj")[1]
    shapes: dict[str, tuple[int, ...]] = {
        "rope_cos": (positions, spec.head_dim // 2), "rope_sin": (positions, spec.head_dim // 2),
        "timesteps_embeddings": (positions, d), "symbol_embedding": (spec.num_symbols, d),
        "lm_head.ln_pre.weight": (spec.head_width,), "decoder.class_embedding": (1, width),
        "decoder.positional_embedding": (1 + spec.image_seq_len, width), "decoder.conv_out.weight": (3, 3, 3, 3),
        "decoder.conv_out.bias": (3,),
    }  # fmt: skip
    norms = ["decoder.ln_pre", "decoder.ln_post"]
    norms += [f"{decoder_block(i)}.norm{n}" for i in range(decoder_layers(weights)) for n in (1, 2)]
    shapes |= {f"{norm}.{part}": (width,) for norm in norms for part in ("weight", "bias")}
    shapes |= {
        f"{trunk_block(i)}.attn.qk_norm.weight": (2 * spec.num_heads, spec.head_dim) for i in range(spec.num_layers)
    }
    return shapes
