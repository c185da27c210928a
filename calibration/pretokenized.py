"""Real images as the authors' training tools store them: bits and labels, no pixels.

`ROOT/train/<class folder>/<name>.npz` with `tokens` (and `tokens_flip`, the mirrored image): flat bools of
image_seq_len · token_size bits in raster order on the fine grid. The class id is the rank of the folder's name.
`ROOT/metadata.json` states token_size.
"""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bar_edge.calibration.trajectories import RealImages
from bar_edge.runtime.errors import CalibrationError
from bar_edge.runtime.spec import ModelSpec


def read_pretokenized(root: Path, spec: ModelSpec, *, images: int, seed: int) -> RealImages:
    """Choose `images` images, spread over the classes and then at random, and read their bits.

    Raises CalibrationError for folders, labels or files that do not fit the model, naming the first one.
    """
    train = root / "train"
    if not train.is_dir():
        raise CalibrationError(f"{root}: has no folder `train`; give the root of pretokenized data")
    _check_metadata(root / "metadata.json", spec)
    folders = sorted(entry for entry in train.iterdir() if entry.is_dir())
    if len(folders) > spec.num_classes:
        raise CalibrationError(f"{train}: {len(folders)} class folders, but the model has {spec.num_classes} classes")
    files = {label: sorted(folder.glob("*.npz")) for label, folder in enumerate(folders)}
    total = sum(map(len, files.values()))
    if seed < 0:
        raise CalibrationError(f"the seed must not be negative, is {seed}")
    if total < images:
        raise CalibrationError(f"{train}: holds {total} images, {images} were asked for")
    rng = np.random.default_rng(seed)
    queues = {label: list(rng.permutation(len(found))) for label, found in files.items()}
    chosen: list[tuple[int, Path]] = []
    while len(chosen) < images:
        for label in queues:
            if queues[label] and len(chosen) < images:
                chosen.append((label, files[label][queues[label].pop()]))
    digest = hashlib.sha256()
    bits = []
    for _, path in chosen:
        data = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {hashlib.sha256(data).hexdigest()}\n".encode())
        bits.append(_read_tokens(path, data, spec))
    labels: NDArray[np.int64] = np.array([label for label, _ in chosen], dtype=np.int64)
    return RealImages(np.stack(bits), labels, digest.hexdigest())


def _check_metadata(path: Path, spec: ModelSpec) -> None:
    try:
        metadata = json.loads(path.read_text())
        token_size = metadata["token_size"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(
            f"{path}: not readable metadata ({error!r}); give the root of pretokenized data"
        ) from error
    if token_size != spec.token_size:
        raise CalibrationError(f"{path}: tokens of {token_size} bits, the model has {spec.token_size}")


def _read_tokens(path: Path, data: bytes, spec: ModelSpec) -> NDArray[np.uint8]:
    expected = spec.image_seq_len * spec.token_size
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as stored:
            tokens = np.asarray(stored["tokens"])
    except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
        raise CalibrationError(f"{path}: not a readable pretokenized image ({error!r})") from error
    if tokens.size != expected or not np.isin(tokens, (0, 1)).all():
        raise CalibrationError(f"{path}: {tokens.size} values of {tokens.dtype}, expected {expected} bits")
    return tokens.astype(np.uint8).reshape(spec.image_seq_len, spec.token_size)
