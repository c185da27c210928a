"""How far a quantized bundle is from the fp32 one, measured on the graphs that execute.

`teacher_forced`: fp32 draws and every decision is recorded; the other is led along those bits, token by token and
pass by pass, so that every decision is compared in the same state. `paired_images`: both draw freely from the same
noise.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.calibration.probe import ProbeEngine
from bar_edge.calibration.trajectories import make_batch, spread_classes
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.errors import CalibrationError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.progress import Progress, silent

_PERFECT_DB = 300.0  # of equal values: JSON has no infinity


@dataclass(frozen=True)
class Recorded:
    """One batch that a bundle drew, decision by decision."""

    batch: Batch
    drawn: NDArray[np.uint8]  # [B, N, K] by generation step
    known: NDArray[np.bool_]  # [N, S, B, K] bits each pass began with
    logits: NDArray[np.float32]  # [N, S, B, K, 2] guided, noiseless
    latents: NDArray[np.float32]  # [N, rows, W]


def record(
    engine: ProbeEngine,
    bundle: Bundle,
    *,
    images: int,
    seed: int,
    batch_size: int = 16,
    progress: Progress = silent,
) -> list[Recorded]:
    """Draw `images` images of classes spread over the model's, and keep every decision."""
    spec = bundle.spec
    class_ids = spread_classes(images, spec.num_classes)
    recorded = []
    for begin in range(0, images, batch_size):
        ids = np.array(class_ids[begin : begin + batch_size], dtype=np.int64)
        batch = make_batch(bundle, ids, seed, range(begin, begin + len(ids)))
        drawn, known, logits, latents = [], [], [], []
        for n, step in engine.probe_walk(batch):
            step.run()
            drawn.append(step.drawn.copy())
            known.append(step.seen["known"].copy())  # the next run writes over what was seen
            logits.append(step.seen["logits"].copy())
            latents.append(step.latent.copy())
            what = f"recording fp32: images {begin + 1}-{begin + len(ids)} of {images}, tokens"
            progress(what, n + 1, spec.num_tokens)
        recorded.append(Recorded(batch, np.stack(drawn, axis=1), np.stack(known), np.stack(logits), np.stack(latents)))
    return recorded


@dataclass(frozen=True)
class TeacherForced:
    """Decisions of an engine beside the recorded ones, in the same states."""

    images: int
    decisions: int  # masked bits, over all passes
    flips: float  # fraction whose argmax of guided, noiseless logits differs
    flips_per_pass: list[float]
    flips_per_quarter: list[float]  # of the image's tokens
    kl: float  # mean KL divergence of the bit's distribution, nats
    kl_per_pass: list[float]
    kl_per_quarter: list[float]
    latent_snr_db: float
    logit_snr_db: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def teacher_forced(
    recorded: list[Recorded], engine: ProbeEngine, progress: Progress = silent, what: str = "teacher-forced"
) -> TeacherForced:
    """Lead `engine` along recorded trajectories and compare. Use trajectories that were not calibrated on."""
    tokens, passes = recorded[0].known.shape[:2]
    flipped, counted = np.zeros((tokens, passes), dtype=np.int64), np.zeros((tokens, passes), dtype=np.int64)
    divergence = np.zeros((tokens, passes))
    latent, logit = _Snr(), _Snr()
    for i, exact in enumerate(recorded):
        for n, step in engine.probe_walk(exact.batch):
            step.lead(exact.known[n], exact.drawn[:, n].astype(bool))
            step.run()
            a, b, masked = exact.logits[n], step.seen["logits"], ~exact.known[n]
            flipped[n] += ((a.argmax(-1) != b.argmax(-1)) & masked).sum(axis=(1, 2))
            counted[n] += masked.sum(axis=(1, 2))
            divergence[n] += np.where(masked, _kl(a, b), 0).sum(axis=(1, 2))
            latent.add(exact.latents[n], step.latent)
            logit.add(a[masked], b[masked])
            step.drawn[:] = exact.drawn[:, n]
            progress(what, i * tokens + n + 1, len(recorded) * tokens)
    quarters = np.array_split(np.arange(tokens), 4)
    return TeacherForced(
        images=sum(len(exact.drawn) for exact in recorded),
        decisions=int(counted.sum()),
        flips=float(flipped.sum() / counted.sum()),
        flips_per_pass=(flipped.sum(0) / counted.sum(0)).tolist(),
        flips_per_quarter=[float(flipped[q].sum() / counted[q].sum()) for q in quarters],
        kl=float(divergence.sum() / counted.sum()),
        kl_per_pass=(divergence.sum(0) / counted.sum(0)).tolist(),
        kl_per_quarter=[float(divergence[q].sum() / counted[q].sum()) for q in quarters],
        latent_snr_db=latent.db,
        logit_snr_db=logit.db,
    )


@dataclass(frozen=True)
class PairedImages:
    """Images of both bundles from the same noise."""

    images: int
    identical_images: float  # fraction
    differing_bits: float  # fraction, after the trajectories may have parted
    psnr_db: float  # median over images
    decoder_psnr_db: float  # both decoders on fp32's bits: what the decoder alone does

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def paired_images(reference: Bundle, bundle: Bundle, *, images: int, seed: int, threads: int = 0) -> PairedImages:
    """Draw freely with both from the same noise."""
    check_pair(reference, bundle)
    class_ids = list(spread_classes(images, bundle.spec.num_classes))
    with Generator(reference, engine="onnxruntime", threads=threads) as exact:
        expected, expected_bits = exact.generate(class_ids, seed=seed, return_bits=True)
    with Generator(bundle, engine="onnxruntime", threads=threads) as ours:
        found, bits = ours.generate(class_ids, seed=seed, return_bits=True)
        decoded = ours.decode(expected_bits)
    wrong = (bits != expected_bits).reshape(images, -1)
    return PairedImages(
        images=images,
        identical_images=float((~wrong.any(axis=1)).mean()),
        differing_bits=float(wrong.mean()),
        psnr_db=float(np.median([_psnr(a, b) for a, b in zip(expected, found, strict=True)])),
        decoder_psnr_db=float(np.median([_psnr(a, b) for a, b in zip(expected, decoded, strict=True)])),
    )


def compare_bundles(
    reference: Bundle, bundle: Bundle, *, images: int, seed: int, threads: int = 0, progress: Progress = silent
) -> dict[str, Any]:
    """Teacher-forced decisions and paired images of a quantized bundle beside its fp32, JSON-ready.

    Raises CalibrationError unless that is what they are.
    """
    check_pair(reference, bundle)
    _check_origin(reference, bundle)
    exact = probe(reference, threads)
    recorded = record(exact, reference, images=images, seed=seed, progress=progress)
    exact.close()
    engine = probe(bundle, threads)
    forced = teacher_forced(recorded, engine, progress)
    engine.close()
    return {
        "teacher_forced": forced.to_dict(),
        "paired_images": paired_images(reference, bundle, images=images, seed=seed, threads=threads).to_dict(),
    }


def precisions_of(bundle: Bundle) -> dict[str, str]:
    """What each linear layer of a bundle is executed in; empty for fp32."""
    layers = bundle.manifest.get("quantization", {}).get("layers", {})
    return {layer: entry["precision"] for layer, entry in layers.items() if entry["precision"] != "fp32"}


def probe(bundle: Bundle, threads: int = 0) -> ProbeEngine:
    """A bundle's step as it executes, with probes."""
    return ProbeEngine(bundle, precisions_of(bundle), threads)


def check_pair(reference: Bundle, bundle: Bundle) -> None:
    """Raise CalibrationError unless both are the same model with the same recipe."""
    if reference.spec != bundle.spec or reference.recipe != bundle.recipe:
        raise CalibrationError(
            f"{bundle.path} and {reference.path} are different models; compare a bundle with its own fp32"
        )


def _check_origin(reference: Bundle, bundle: Bundle) -> None:
    if "engines" in bundle.manifest:
        raise CalibrationError(f"{bundle.path}: is compiled; compare the bundle that it was compiled from")
    made_from = bundle.manifest.get("quantization", {}).get("calibration", {}).get("bundle")
    if reference.digest not in (made_from, bundle.digest):
        raise CalibrationError(
            f"{bundle.path}: was not quantized from {reference.path}; compare it with the very bundle that it was "
            "quantized from"
        )


class _Snr:
    """Signal to noise over everything added."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0

    def add(self, exact: NDArray[np.float32], found: NDArray[np.float32]) -> None:
        self._signal += float(np.square(exact, dtype=np.float64).sum())
        self._noise += float(np.square(found - exact, dtype=np.float64).sum())

    @property
    def db(self) -> float:
        return 10 * float(np.log10(self._signal / self._noise)) if self._noise else _PERFECT_DB


def _kl(exact: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL divergence of two-way softmax distributions [..., 2] -> [...]."""

    def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
        y = x.astype(np.float64)
        return y - np.logaddexp(y[..., :1], y[..., 1:])

    p, q = log_softmax(exact), log_softmax(found)
    return np.asarray((np.exp(p) * (p - q)).sum(-1))


def _psnr(a: Any, b: Any) -> float:
    error = float(np.square(np.asarray(a, dtype=np.float64) - np.asarray(b)).mean())
    return 10 * float(np.log10(255**2 / error)) if error else 99.0
