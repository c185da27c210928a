"""Distance between sets of digits: a Fréchet distance in the features of a small CNN, and its class accuracy.

The CNN and the statistics of real digits ship with the demo (made by `benchmarks/digits_cnn.py`). For ImageNet models
use an evaluator with Inception features on the `.npz` of samples; this one judges the demo only.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.engines.onnxruntime import library

CNN, REAL = "digits_cnn.onnx", "digits_real.npz"
_BATCH = 256


@dataclass(frozen=True)
class Judgement:
    """One set of drawn digits."""

    images: int
    frechet: float  # to the real digits
    accuracy: float  # fraction that the CNN takes for the class asked for

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def judge(pixels: NDArray[np.uint8], class_ids: NDArray[np.int64], folder: Path) -> Judgement:
    """pixels [B, H, W, 3] of asked class_ids [B]; `folder` holds the CNN and the statistics of real digits."""
    logits, features = run_cnn(folder / CNN, pixels)
    mean, covariance = statistics(features)
    with np.load(folder / REAL, allow_pickle=False) as real:
        distance = frechet_distance(mean, covariance, real["mean"], real["covariance"])
    return Judgement(len(pixels), distance, float((logits.argmax(1) == class_ids).mean()))


def run_cnn(path: Path, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Logits [B, classes] and features [B, n]."""
    session = library().InferenceSession(path, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {"pixels": pixels[i : i + _BATCH]}) for i in range(0, len(pixels), _BATCH)]
    logits, features = (np.concatenate(values) for values in zip(*parts, strict=True))
    return logits, features


def statistics(features: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean [n] and covariance [n, n]."""
    values = features.astype(np.float64)
    return values.mean(axis=0), np.cov(values, rowvar=False)


def frechet_distance(
    mean1: NDArray[np.float64], cov1: NDArray[np.float64], mean2: NDArray[np.float64], cov2: NDArray[np.float64]
) -> float:
    """|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½) of two Gaussians (Heusel et al., arXiv 1706.08500)."""
    values, vectors = np.linalg.eigh(cov1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ cov2 @ root), 0)).sum()
    return float(np.square(mean1 - mean2).sum() + np.trace(cov1) + np.trace(cov2) - 2 * cross)
