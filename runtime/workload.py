"""What drawing images takes, counted: the linear layers of every part of the model, their bytes and multiply-adds.

Which part a layer belongs to says how often it is read (docs/model.md section 6): the trunk and the head's modulation
once per token, the head once per pass, the trunk's modulation and the decoder once per image. A workload is counted
from the shapes of a published variant, or from what a bundle really stores.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from bar_edge.runtime.bundle import compiled_already
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.inspection import linear_layers
from bar_edge.runtime.parts import PARTS, PER_IMAGE, part_of
from bar_edge.runtime.precisions import FP16, FP32, INT4_WEIGHT, INT8, INT8_WEIGHT, WEIGHT_TENSORS
from bar_edge.runtime.spec import ModelSpec, Recipe, Variant, padded
from bar_edge.runtime.weights import StoredTensor

DECODER_WIDTH, DECODER_LAYERS = 1024, 24  # of the published tokenizers
_BLOCK = 128  # weights that share a scale, in the weight-only precisions
_WEIGHT_BYTES = {FP32: 4.0, FP16: 2.0, INT8: 1.0, INT8_WEIGHT: 1.0, INT4_WEIGHT: 0.5}
_SMALLEST_QUANTIZED = 64  # features in and out, below which a layer stays as it is


@dataclass(frozen=True)
class Layer:
    """One linear layer, weights [out, in]."""

    weights: int  # multiply-adds for one row
    outputs: int  # values written for one row
    bytes: int  # stored, scales and bias included
    precision: str


@dataclass(frozen=True)
class Workload:
    """A model with its recipe in one precision. `precision` is what most of a token's weights are stored in."""

    spec: ModelSpec
    recipe: Recipe
    precision: str
    trunk: tuple[Layer, ...]
    head_modulation: tuple[Layer, ...]
    head_pass: tuple[Layer, ...]
    modulation: tuple[Layer, ...]
    decoder: tuple[Layer, ...]
    stored_bytes: int  # tables included
    decoder_width: int
    decoder_layers: int

    @property
    def passes(self) -> int:
        """S, head passes per token."""
        return len(self.recipe.allocation)

    @property
    def guided(self) -> bool:
        """Whether every image runs a conditional and an unconditional row."""
        return self.recipe.guidance > 1

    @property
    def precisions(self) -> set[str]:
        """Everything any layer is stored in."""
        parts = (self.trunk, self.head_modulation, self.head_pass, self.modulation, self.decoder)
        return {layer.precision for part in parts for layer in part}

    @property
    def bytes_per_token(self) -> int:
        """Weight bytes read for one token."""
        return stored(self.trunk) + stored(self.head_modulation) + self.passes * stored(self.head_pass)


def stored(layers: tuple[Layer, ...]) -> int:
    """Bytes of several layers."""
    return sum(layer.bytes for layer in layers)


def of_variant(variant: Variant, precision: str) -> Workload:
    """A published variant as `bar-edge quantize` would store it.

    Weight-only precisions serve a token's few rows; the parts that run once per image have many and become static
    INT8. fp16 is every layer in fp16, for engines that can.
    """
    spec = variant.spec
    layers = {
        name: _layer(
            out, in_features, INT8 if precision.endswith("-weight") and _part(name) in PER_IMAGE else precision
        )
        for name, (out, in_features) in _shapes(spec).items()
    }
    tables = _table_values(spec) * (2 if precision == FP16 else 4)
    return _workload(spec, variant.recipe, precision, layers, tables, DECODER_WIDTH, DECODER_LAYERS)


def of_bundle(spec: ModelSpec, recipe: Recipe, places: Mapping[str, StoredTensor]) -> Workload:
    """A bundle, from where its weights lie. Raises RequestError for a compiled one, whose layers are not there."""
    precisions = linear_layers(places)
    if not precisions:
        raise compiled_already("the bundle")
    lengths: dict[str, int] = defaultdict(int)
    for name, place in places.items():
        lengths[name.rpartition(".")[0]] += place.length
    layers = {}
    for name, precision in precisions.items():
        values = math.prod(places[f"{name}.{WEIGHT_TENSORS[precision]}"].shape)  # 4-bit values lie two in a byte
        weights = 2 * values if precision == INT4_WEIGHT else values
        layers[name] = Layer(weights, places[f"{name}.bias"].shape[0], lengths[name], precision)
    share: dict[str, int] = defaultdict(int)
    for name, layer in layers.items():
        if _part(name) not in PER_IMAGE:
            share[layer.precision] += layer.weights
    tables = sum(place.length for place in places.values()) - sum(layer.bytes for layer in layers.values())
    decoder_layers = sum(name.startswith("decoder.") and name.endswith(".attn.qkv") for name in layers)
    width = places["decoder.class_embedding"].shape[-1]
    return _workload(spec, recipe, max(share, key=lambda key: share[key]), layers, tables, width, decoder_layers)


def _workload(
    spec: ModelSpec, recipe: Recipe, precision: str, layers: Mapping[str, Layer], table_bytes: int,
    decoder_width: int, decoder_layers: int,
) -> Workload:  # fmt: skip
    parts: dict[str, list[Layer]] = {part: [] for part in PARTS}
    for name, layer in layers.items():
        parts[_part(name)].append(layer)
    total = table_bytes + sum(layer.bytes for layer in layers.values())
    return Workload(
        spec, recipe, precision, stored_bytes=total, decoder_width=decoder_width, decoder_layers=decoder_layers,
        **{part: tuple(members) for part, members in parts.items()},
    )  # fmt: skip


def _part(layer: str) -> str:
    found = part_of(layer)
    if found is None:
        raise RequestError(f"{layer}: not a layer of BAR, so its cost is unknown; plan a published variant instead")
    return found


def _layer(out: int, in_features: int, precision: str) -> Layer:
    if precision != FP16 and min(out, in_features) < _SMALLEST_QUANTIZED:
        precision = FP32
    scales = {INT8: 1, INT8_WEIGHT: in_features // _BLOCK, INT4_WEIGHT: in_features // _BLOCK}.get(precision, 0)
    bias_bytes = 2 if precision == FP16 else 4
    size = _WEIGHT_BYTES[precision] * out * in_features + out * (4 * scales + bias_bytes)
    return Layer(out * in_features, out, round(size), precision)


def _hidden(width: int) -> int:
    """SwiGLU's hidden width, padded."""
    return padded(int(2 / 3 * 4 * width))


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    """(out, in) of every layer a workload counts, by the names bundles use."""
    d, w, decoder = spec.hidden_size, spec.head_width, DECODER_WIDTH
    shapes = {
        "latent_condition_proj": (w, d),
        "lm_head.adaln_before_head.adaLN_modulation.1": (2 * w, w),
        "lm_head.output_embed": (2 * spec.bits_per_token, w),
        "quantize.out_proj": (decoder, spec.token_size),
        "decoder.ffn.0": (3 * spec.decoder_patch_size**2, decoder),
    }
    for i in range(spec.num_layers):
        shapes |= {
            f"blocks.{i}.attn.qkv": (3 * d, d),
            f"blocks.{i}.attn.proj": (d, d),
            f"blocks.{i}.mlp.w12": (2 * _hidden(d), d),
            f"blocks.{i}.mlp.w3": (d, _hidden(d)),
            f"blocks.{i}.adaLN_modulation.1": (6 * d, d),
        }
    for i in range(spec.head_layers):
        shapes |= {
            f"lm_head.transformer.{i}.mlp.w12": (2 * _hidden(w), w),
            f"lm_head.transformer.{i}.mlp.w3": (w, _hidden(w)),
            f"lm_head.transformer.{i}.adaLN_modulation.1": (3 * w, w),
        }
    for i in range(DECODER_LAYERS):
        shapes |= {
            f"decoder.transformer.{i}.attn.qkv": (3 * decoder, decoder),
            f"decoder.transformer.{i}.attn.proj": (decoder, decoder),
            f"decoder.transformer.{i}.mlp.fc1": (4 * decoder, decoder),
            f"decoder.transformer.{i}.mlp.fc2": (decoder, 4 * decoder),
        }
    return shapes


def _table_values(spec: ModelSpec) -> int:
    """Values of everything that is not a counted layer: embeddings, positions, norms, the ratio's embedding."""
    d, w, k = spec.hidden_size, spec.head_width, spec.bits_per_token
    positions, cells, decoder = spec.prefix_length + spec.num_tokens, spec.image_seq_len, DECODER_WIDTH
    trunk = (spec.num_symbols + k + 3 * positions) * d + positions * spec.head_dim
    norms = spec.num_layers * 2 * spec.num_heads * spec.head_dim
    ratio = 256 + 2 * 256 * w + w + w * w + w
    head = (2 * k + 2) * w
    decoder_tables = (2 + cells) * decoder + (4 + 4 * DECODER_LAYERS) * decoder + 3 * 3 * 3 * 3 + 3
    return trunk + norms + ratio + head + decoder_tables
