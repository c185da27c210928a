"""What a bundle is, in facts: sizes, precision, and the bytes that decide its speed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import BundleError
from bar_edge.runtime.parts import PER_IMAGE, part_of, reads_per_token
from bar_edge.runtime.precisions import WEIGHT_TENSORS
from bar_edge.runtime.spec import VARIANTS
from bar_edge.runtime.weights import StoredTensor


def bytes_per_token(places: Mapping[str, StoredTensor], passes: int) -> int:
    """Weight bytes read for one token with S head passes."""
    return sum(reads_per_token(name, passes) * place.length for name, place in places.items())


def linear_layers(places: Mapping[str, StoredTensor]) -> dict[str, str]:
    """Every linear layer and what its weights are stored in: fp32, fp16, int8, int8-weight or int4-weight."""
    stored = {tensor: precision for precision, tensor in WEIGHT_TENSORS.items()}
    layers = {}
    for name, place in places.items():
        layer, _, part = name.rpartition(".")
        if (
            part in stored
            and ".t_embedder." not in layer
            and f"{layer}.bias" in places
            and (part != "weight" or len(place.shape) == 2)
        ):
            layers[layer] = stored[part]
    return dict(sorted(layers.items()))


def describe_bundle(bundle: Bundle) -> dict[str, Any]:
    """JSON-ready facts of a verified bundle."""
    places = weights.read_places(bundle.path / weights.FILE_NAME)
    spec = bundle.spec
    total = spec.prefix_length + spec.num_tokens
    dtypes = sorted({str(place.dtype) for place in places.values()})
    compiled = bundle.manifest.get("engines")  # then the weights are in the plans, and the file holds tables
    return {
        "kind": "bundle",
        "variant": bundle.variant,
        "published_parameters": VARIANTS[bundle.variant].parameters if bundle.variant in VARIANTS else None,
        "model": spec.to_dict(),
        "image": f"{spec.image_size}x{spec.image_size}, {spec.num_tokens} tokens of {spec.bits_per_token} bits",
        "recipe": asdict(bundle.recipe),
        "graphs": {
            name: {**entry, "bytes": bundle.file_bytes(entry["file"])}
            for name, entry in bundle.manifest["graphs"].items()
        },
        "weights": {"tensors": len(places), "bytes": sum(p.length for p in places.values()), "dtypes": dtypes},
        "engines": compiled or list(bundle.engines),
        "bytes_read_per_token": None if compiled else bytes_per_token(places, len(bundle.recipe.allocation)),
        "bytes_read_per_image_once": None
        if compiled
        else sum(p.length for name, p in places.items() if part_of(name) in PER_IMAGE),
        "kv_cache_bytes_per_row_fp32": 2 * spec.num_layers * total * spec.hidden_size * 4,
        "quantization": _quantization(bundle),
        "linear_layers": linear_layers(places),
        "provenance": bundle.manifest["provenance"],
        "digest": bundle.digest,
    }


def summarized(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `describe_bundle` found, for people: a sentence for each engine that a compiled bundle is for.

    Raises BundleError if the manifest's account of an engine is malformed.
    """
    engines = facts["engines"]
    if isinstance(engines, Mapping):
        engines = {name: _sentence_of(name, account) for name, account in engines.items()}
    return {**facts, "engines": engines}


def engine_sentence(account: Mapping[str, Any]) -> str:
    """What a compiled bundle's manifest says of an engine, for people.

    `kernel family 1, fp16, layers int8 x96, fp16 x4` or `tensorrt_rtx 1.7.1, SM 8.0, 8.9, fp16, plans for 2, 16 rows`.
    """
    if "layers" in account:
        forms = Counter(entry["form"] for entry in account["layers"].values())
        listed = ", ".join(f"{form} x{count}" for form, count in forms.most_common())
        return f"kernel family {account['family']}, {account['precision']}, layers {listed}"
    rows = ", ".join(str(profile["sizes"]["rows"]) for profile in account["profiles"])
    return f"{library_sentence(account)}, plans for {rows} rows"


def _sentence_of(name: str, account: Mapping[str, Any]) -> str:
    try:
        return engine_sentence(account)
    except (KeyError, TypeError, AttributeError) as error:
        raise BundleError(
            f"the account of {name} in the manifest is malformed ({error!r}); compile it again"
        ) from error


def library_sentence(account: Mapping[str, Any]) -> str:
    """What made a bundle's plans and for which GPUs: `tensorrt_rtx 1.7.1, SM 8.0, 8.9, fp16`."""
    capabilities = ", ".join(f"{sm / 10:.1f}" for sm in account["sms"])
    return f"{account['library']} {account['version']}, SM {capabilities}, {account['precision']}"


def _quantization(bundle: Bundle) -> dict[str, Any] | None:
    """The manifest's account without its layers, which are listed as they are stored."""
    account = bundle.manifest.get("quantization")
    return None if account is None else {key: value for key, value in account.items() if key != "layers"}
