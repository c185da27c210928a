"""A checkpoint becomes a bundle: weights rewritten as a stream, graphs, a self-test, and only then its name.

Before publishing, the new bundle draws images with ONNX Runtime and the reference model repeats every decision
(`export/replay.py`). A bundle that does not draw what PyTorch would have drawn is never published.
"""

import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from bar_edge.export.checkpoint import Checkpoint, load_checkpoint
from bar_edge.export.graphs import build_graphs
from bar_edge.export.model import build_decoder, build_generator
from bar_edge.export.replay import TIE, Replay, replay
from bar_edge.export.rewrite import Rewriter
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import SELFTEST, Bundle, publish, sha256, write_manifest
from bar_edge.runtime.errors import CheckpointError, EngineError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.progress import Progress, silent
from bar_edge.runtime.sampling import Schedule, to_uint8
from bar_edge.runtime.selftest import Record

_SELFTEST_SEED = 1
_SELFTEST_IMAGES = 2  # the one whose closest decision is farthest from a tie is recorded
_IMAGE_TOLERANCE = 1e-4  # of the largest value, decoder against the reference, fp32
_GRAPH_BYTES = 8 * 2**20
_OVERFLOW = "overflow in float32, so that it draws nothing; export a checkpoint whose weights are as they were trained"


def export_bundle(
    generator: Path,
    tokenizer: Path,
    config: Path | None,
    output: Path,
    *,
    overrides: Iterable[str] = (),
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Export a checkpoint to an fp32 bundle at `output`.

    Raises CheckpointError for inputs that do not fit, BundleError if `output` cannot be written, EngineError if the
    exported graphs do not reproduce the reference model.
    """
    overrides = list(overrides)
    progress("reading the checkpoint", 0, 1)
    checkpoint = load_checkpoint(generator, tokenizer, config, overrides)
    _check_heads(checkpoint)
    rewriter = Rewriter(checkpoint)
    header, places = weights.lay_out(rewriter.pending)
    total = sum(place.length for place in places.values())
    sources = [generator, tokenizer, *([config] if config else [])]
    with publish(output, total + _GRAPH_BYTES, force=force, sources=sources) as folder:
        done = 0
        with (folder / weights.FILE_NAME).open("wb") as file:
            for _, size in weights.write(file, header, places, rewriter.pending):
                done += size
                progress("writing weights", done, total)
        graphs = build_graphs(checkpoint.spec, places)
        for i, (name, model) in enumerate(graphs.items()):
            progress("checking graphs", i, len(graphs))
            path = folder / f"{name}.onnx"
            onnx.save(model, path)
            onnx.checker.check_model(path, full_check=True)
        described = {name: {"file": f"{name}.onnx", "precision": "fp32"} for name in graphs}
        files = {name: entry["file"] for name, entry in described.items()}
        unpublished = Bundle(folder, checkpoint.spec, checkpoint.recipe, checkpoint.variant, files, {})
        _self_test(checkpoint, unpublished, progress).save(folder / SELFTEST)
        progress("hashing the sources", 0, 1)
        write_manifest(
            folder,
            spec=checkpoint.spec,
            recipe=checkpoint.recipe,
            variant=checkpoint.variant,
            graphs=described,
            provenance=_provenance(sources, overrides),
            progress=progress,
        )
    return Bundle.open(output, progress)


def _check_heads(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError for heads that ONNX Runtime's attention refuses; no published variant has any."""
    spec = checkpoint.spec
    positions = spec.prefix_length + spec.num_tokens
    if spec.head_dim % 8 or 2 * spec.num_heads > positions:
        raise CheckpointError(
            f"{spec.num_heads} heads of {spec.head_dim} channels over {positions} positions: "
            "ONNX Runtime needs a multiple of 8 channels and no more heads than half of the positions"
        )


def _self_test(checkpoint: Checkpoint, bundle: Bundle, progress: Progress) -> Record:
    """Draw images on the engine, prove them with the reference, and return the most robust one."""
    spec, recipe = checkpoint.spec, checkpoint.recipe
    class_id = 207 % spec.num_classes
    noise = SeededNoise(_SELFTEST_SEED, range(_SELFTEST_IMAGES))
    class_ids = np.full(_SELFTEST_IMAGES, class_id)
    with Generator(bundle, engine="onnxruntime") as runtime:
        bits = runtime.sample(class_ids, recipe, noise, lambda done, total: progress("self-test: drawing", done, total))
        decoded = runtime.decode_raw(bits)
    progress("self-test: repeating with the reference model", 0, 1)
    reference = build_generator(checkpoint)
    checked = replay(reference, bits, class_ids.tolist(), recipe, noise)
    _check_finite(checked)
    if checked.unexplained:
        raise EngineError(
            f"the exported graphs do not draw what the reference model draws: {checked.unexplained} of "
            f"{checked.margins.size} tokens differ without a tie (margin {TIE}); this is a bug, please report it"
        )
    best = int(checked.margins.min(axis=1).argmax())
    latent = checked.latents[best, -1]
    with torch.inference_mode():
        nothing_known = torch.full((1, spec.bits_per_token), 2)
        ratio = torch.from_numpy(Schedule.of(recipe, spec.bits_per_token).mask_ratio[:1])
        first_logits = reference.lm_head(nothing_known, torch.from_numpy(latent[None]), ratio).numpy()[0]
        image = build_decoder(checkpoint)(torch.from_numpy(bits)).numpy()
    if not np.isfinite(image).all():
        raise CheckpointError(
            f"the reference decoder draws NaN or infinite pixels: the tokenizer's activations {_OVERFLOW}"
        )
    error = float(np.abs(decoded - image).max() / max(1, np.abs(image).max()))
    if not error < _IMAGE_TOLERANCE:
        raise EngineError(f"the exported decoder differs from the reference by {error:.1e}; please report this bug")
    pixels = to_uint8(image[best : best + 1])[0]
    return Record(_SELFTEST_SEED, best, class_id, bits[best], latent, first_logits, pixels)


def _check_finite(checked: Replay) -> None:
    """Raise CheckpointError unless every decision of the reference model was made of numbers."""
    if lost := int(np.isnan(checked.margins).sum()):
        raise CheckpointError(
            f"the reference model's latents or logits are NaN or infinite in {lost} of {checked.margins.size} tokens: "
            f"the generator's activations {_OVERFLOW}"
        )


def _provenance(sources: list[Path], overrides: list[str]) -> dict[str, Any]:
    return {
        "made_by": {name: metadata.version(name) for name in ("bar-edge", "torch", "onnx", "onnxruntime", "numpy")},
        "python": platform.python_version(),
        "sources": [{"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)} for path in sources],
        "overrides": overrides,
    }
