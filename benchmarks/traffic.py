"""The bytes a batch cannot avoid reading and the operations it cannot avoid, by stage: one side of the roofline.

Weights once per use (a token, a head pass, an image; docs/model.md section 6) and the filled part of the KV cache once
per token. Activations, and the copies that a growing cache makes, are not counted: the figures are what a perfect
implementation would still read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.graphs import ITEMSIZE
from bar_edge.runtime.engines.cuda.resident import NAME as CUDA
from bar_edge.runtime.errors import CompatibilityError
from bar_edge.runtime.parts import DECODER, HEAD_MODULATION, HEAD_PASS, TRUNK, part_of, reads_per_token
from bar_edge.runtime.precisions import WEIGHT_TENSORS
from bar_edge.runtime.spec import ModelSpec, Recipe
from bar_edge.runtime.weights import StoredTensor

_CACHE_ITEM = 4  # bytes: ONNX Runtime keeps an fp32 cache
_MATRICES = tuple(f".{tensor}" for tensor in WEIGHT_TENSORS.values())


@dataclass(frozen=True)
class Work:
    """Of one batch."""

    bytes: int
    flops: int  # additions and multiplications of the linear layers


@dataclass(frozen=True)
class Traffic:
    """Weight bytes and weights read per token in the trunk and head, and per batch in the decoder."""

    trunk: tuple[int, int]
    head: tuple[int, int]
    decode: tuple[int, int]
    cache_item: int = _CACHE_ITEM

    def of_batch(self, spec: ModelSpec, recipe: Recipe, images: int) -> dict[str, Work]:
        """Work of a batch by stage: trunk, head and decode."""
        rows = images * (2 if recipe.guidance > 1 else 1)
        tokens = spec.num_tokens
        position = 2 * spec.num_layers * spec.hidden_size * self.cache_item  # keys and values of a row
        cache = rows * position * sum(range(spec.prefix_length, spec.prefix_length + tokens))
        (trunk_bytes, trunk), (head_bytes, head), (decode_bytes, decode) = self.trunk, self.head, self.decode
        return {
            "trunk": Work(tokens * trunk_bytes + cache, 2 * tokens * rows * trunk),
            "head": Work(tokens * head_bytes, 2 * tokens * rows * head),
            "decode": Work(decode_bytes, 2 * images * spec.image_seq_len * decode),
        }


def of_bundle(bundle: Bundle) -> Traffic:
    """From the sizes of the stored weights. Raises CompatibilityError for a bundle of plans, which does not tell."""
    engines = bundle.manifest.get("engines", {})
    if engines.keys() - {CUDA}:
        raise CompatibilityError(f"{bundle.path}: holds plans and not weights, so the bytes it must read are not known")
    places = weights.read_places(bundle.path / weights.FILE_NAME)
    passes = len(bundle.recipe.allocation)
    counts = _prepacked_weights(places, engines[CUDA]) if engines else {n: _weights(n, p) for n, p in places.items()}
    # the loop on a GPU computes the head's modulation beside the trunk
    trunk, head = ((TRUNK, HEAD_MODULATION), (HEAD_PASS,)) if engines else ((TRUNK,), (HEAD_MODULATION, HEAD_PASS))
    decoder = [name for name in places if part_of(name) == DECODER]

    def read(parts: tuple[str, ...]) -> tuple[int, int]:
        times = {name: reads_per_token(name, passes) for name in places if part_of(name) in parts}
        stored = sum(n * places[name].length for name, n in times.items())
        return stored, sum(n * counts[name] for name, n in times.items())

    return Traffic(
        trunk=read(trunk),
        head=read(head),
        decode=(sum(places[name].length for name in decoder), sum(counts[name] for name in decoder)),
        cache_item=ITEMSIZE if engines else _CACHE_ITEM,
    )


def of_modules(generator: Any, decoder: Any, passes: int) -> Traffic:
    """From the parameters of the PyTorch reference, which computes modulation in the loop, the head's in every pass."""
    loop = (generator.blocks, generator.input_merge, generator.latent_condition_proj)
    trunk = [parameter for module in loop for parameter in module.parameters()]
    head = list(generator.lm_head.parameters())

    def read(parameters: list[Any], times: int = 1) -> tuple[int, int]:
        matrices = sum(p.numel() for p in parameters if p.ndim >= 2)
        return times * sum(p.numel() * p.element_size() for p in parameters), times * matrices

    return Traffic(read(trunk), read(head, passes), read(list(decoder.parameters())), trunk[0].element_size())


def _prepacked_weights(places: Mapping[str, StoredTensor], account: Mapping[str, Any]) -> dict[str, int]:
    """Elements of the weight matrix that every tensor of a bundle for `cuda` holds, 0 for anything else."""
    counts = dict.fromkeys(places, 0)
    for layer, entry in account["layers"].items():
        counts[f"{layer}.weight_chunks"] = entry["in_features"] * places[f"{layer}.bias"].shape[0]
    return counts


def _weights(name: str, place: StoredTensor) -> int:
    """Elements of a weight matrix, 0 for anything else."""
    if len(place.shape) < 2 or not name.endswith(_MATRICES):
        return 0
    return place.length // place.dtype.itemsize * (2 if name.endswith("blocks4") else 1)
