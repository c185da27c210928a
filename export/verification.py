"""`verify --against`: bits, latents and pixels of a bundle beside the checkpoint it came from."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bar_edge.export.checkpoint import Checkpoint
from bar_edge.export.model import Decoder, build_decoder, build_generator
from bar_edge.export.model import Generator as Reference
from bar_edge.export.replay import TIE, Replay, replay
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.progress import Progress, silent
from bar_edge.runtime.sampling import to_uint8

_TOGETHER = 4  # images, whose keys and values, and the reference's activations, are in memory at once


@dataclass(frozen=True)
class Comparison:
    """One bundle on one engine against the PyTorch reference."""

    engine: str
    images: int
    tokens: int
    tokens_differing: int  # at least one bit falls otherwise in the reference
    tokens_differing_without_tie: int
    closest_decision: float  # distance from a tie, as a fraction of the largest logit
    latent_error: float  # last token, largest difference as a fraction of the largest value
    pixel_error: int  # levels
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "tie": TIE}


@dataclass(frozen=True)
class _Part:
    """Images that are compared together."""

    checked: Replay
    latent_difference: float  # largest
    latent_size: float  # largest of the reference
    pixel_error: int


def compare(
    runtime: Generator, checkpoint: Checkpoint, *, images: int, seed: int, progress: Progress = silent
) -> Comparison:
    """Draw `images` images of classes spread over the model's and repeat every decision with the reference."""
    generator, decoder = build_generator(checkpoint), build_decoder(checkpoint)
    class_ids = np.linspace(0, checkpoint.spec.num_classes - 1, images).astype(np.int64)
    parts = []
    for begin in range(0, images, _TOGETHER):
        progress("comparing with the checkpoint, images", begin, images)
        part = class_ids[begin : begin + _TOGETHER]
        noise = SeededNoise(seed, range(begin, begin + len(part)))
        parts.append(_compare(runtime, generator, decoder, part, noise))
    progress("comparing with the checkpoint, images", images, images)
    unexplained = sum(part.checked.unexplained for part in parts)
    differences, sizes = ([getattr(part, name) for part in parts] for name in ("latent_difference", "latent_size"))
    latent_error = float(np.max(differences) / np.max(sizes))  # NaN stays NaN, and does not pass
    pixel_error = max(part.pixel_error for part in parts)
    return Comparison(
        engine=runtime.engine_name,
        images=images,
        tokens=sum(part.checked.margins.size for part in parts),
        tokens_differing=sum(int((part.checked.differing_bits > 0).sum()) for part in parts),
        tokens_differing_without_tie=unexplained,
        closest_decision=float(np.min([part.checked.margins.min() for part in parts])),
        latent_error=latent_error,
        pixel_error=pixel_error,
        passed=unexplained == 0 and latent_error < 1e-3 and pixel_error <= 1,
    )


def _compare(
    runtime: Generator, generator: Reference, decoder: Decoder, class_ids: NDArray[np.int64], noise: SeededNoise
) -> _Part:
    recipe = runtime.bundle.recipe
    bits = runtime.sample(class_ids, recipe, noise)
    latents = runtime.last_latents()
    pixels = to_uint8(runtime.decode_raw(bits)).astype(int)
    checked = replay(generator, bits, class_ids.tolist(), recipe, noise)
    with torch.inference_mode():
        reference = to_uint8(decoder(torch.from_numpy(bits)).numpy())
    expected = checked.latents[:, -1]
    return _Part(
        checked,
        float(np.abs(latents - expected).max()),
        float(np.abs(expected).max()),
        int(np.abs(pixels - reference).max()),
    )
