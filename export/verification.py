"""`verify --against`: bits, latents and pixels of a bundle beside the checkpoint it came from."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from bar_edge.export.checkpoint import Checkpoint
from bar_edge.export.model import build_decoder, build_generator
from bar_edge.export.replay import TIE, replay
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_uint8


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


def compare(runtime: Generator, checkpoint: Checkpoint, *, images: int, seed: int) -> Comparison:
    """Draw `images` images of classes spread over the model's and repeat every decision with the reference."""
    spec, recipe = checkpoint.spec, runtime.bundle.recipe
    class_ids = np.linspace(0, spec.num_classes - 1, images).astype(np.int64)
    noise = SeededNoise(seed, range(images))
    bits = runtime.sample(class_ids, recipe, noise)
    latents = runtime.last_latents()
    pixels = to_uint8(runtime.decode_raw(bits)).astype(int)
    checked = replay(build_generator(checkpoint), bits, class_ids.tolist(), recipe, noise)
    with torch.inference_mode():
        reference = to_uint8(build_decoder(checkpoint)(torch.from_numpy(bits)).numpy())
    expected = checked.latents[:, -1]
    latent_error = float(np.abs(latents - expected).max() / np.abs(expected).max())
    pixel_error = int(np.abs(pixels - reference).max())
    return Comparison(
        engine=runtime.engine_name,
        images=images,
        tokens=checked.margins.size,
        tokens_differing=int((checked.differing_bits > 0).sum()),
        tokens_differing_without_tie=checked.unexplained,
        closest_decision=float(checked.margins.min()),
        latent_error=latent_error,
        pixel_error=pixel_error,
        passed=checked.unexplained == 0 and latent_error < 1e-3 and pixel_error <= 1,
    )
