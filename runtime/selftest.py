"""`selftest.npz`: what the reference model drew at export, so that a device can prove itself without it.

Contents (no pickles): seed, class_id, bits packed, latent [W] of the last token's conditional row, first_logits [K, 2]
that its first head pass makes of it, when no bit is known, image [H, W, 3] uint8. The sampling settings are the
bundle's recipe in raster order.

The engine that recorded it must draw the same bits, if the bundle is one of floats. A compiled engine rounds otherwise,
as another CPU does with integers (a sum in another order moves an activation to the next integer), and one decision
that falls the other way changes every token after it; so these are led along the recorded bits (teacher forcing), and
each decision counts alone.
"""

import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.bundle import SELFTEST, Bundle
from bar_edge.runtime.errors import BundleError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_uint8
from bar_edge.runtime.spec import ModelSpec


@dataclass(frozen=True)
class Tolerance:
    """What may differ from the record."""

    decisions: float  # fraction of bits, in tokens of up to `_FEW_BITS` (`allowed`)
    values: float  # of latents and logits, of the largest value
    largest: int  # levels, decoding the recorded bits: truncation to uint8 may fall either way
    root_mean_square: float  # levels, likewise

    def allowed(self, bits_per_token: int) -> float:
        """Fraction of decisions that may differ: a wrong one changes those of the passes after it in its token."""
        return self.decisions * math.sqrt(max(1, bits_per_token / _FEW_BITS))


_RECORDER = "onnxruntime"
_SAME = Tolerance(0, 1e-3, 1, 1)
# What sound engines reached, executed on the CPU (benchmarks/results/cuda_on_cpu_*.json; the tests on random weights):
# in fp16 0.7 % of decisions of 256 bits a token and none of up to 64, values 6e-4, 1 level; with integers, whose
# activations ONNX Runtime rounds otherwise, 0.4 % (the demo) to 2.5 % of up to 24 bits a token, 3.9 % of 64, 5.8 % of
# 256, values 1.9e-2, 11 levels, 1.9 root mean square; ONNX Runtime with floats moved by 1e-7 to 1e-6, in the place of
# another CPU, 0.3 % (the demo), 1.3e-2, 2 levels. Something else altogether draws half of all bits wrong.
_FLOATS = Tolerance(0.01, 5e-3, 16, 4)
_COARSE = Tolerance(0.03, 3e-2, 16, 4)  # integers, and bf16, which has 3 bits less than fp16
_FEW_BITS = 16


@dataclass(frozen=True)
class Record:
    """The recorded image."""

    seed: int
    image_index: int
    class_id: int
    bits: NDArray[np.uint8]  # [image_seq_len, token_size]
    latent: NDArray[np.float32]  # [W]
    first_logits: NDArray[np.float32]  # [K, 2]
    image: NDArray[np.uint8]  # [H, W, 3]

    def save(self, path: Path) -> None:
        """Write the record."""
        np.savez_compressed(
            path, seed=np.uint64(self.seed), image_index=np.int64(self.image_index), class_id=np.int64(self.class_id),
            bits=np.packbits(self.bits), latent=self.latent,
            first_logits=self.first_logits, image=self.image,
        )  # fmt: skip

    @classmethod
    def load(cls, path: Path, spec: ModelSpec) -> "Record":
        """Read a record and check that it is one of this model. Raises BundleError."""
        shapes = {
            "seed": (np.uint64, ()),
            "image_index": (np.int64, ()),
            "class_id": (np.int64, ()),
            "bits": (np.uint8, (-(-spec.image_seq_len * spec.token_size // 8),)),
            "latent": (np.float32, (spec.head_width,)),
            "first_logits": (np.float32, (spec.bits_per_token, 2)),
            "image": (np.uint8, (spec.image_size, spec.image_size, 3)),
        }
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
                found = {name: stored[name] for name in shapes if name in stored}
        except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
            raise BundleError(f"{path}: not a readable self-test ({error!r}); export the bundle again") from error
        if missing := [name for name in shapes if name not in found]:
            raise BundleError(f"{path}: holds no {missing[0]}; another version made it: export the bundle again")
        for name, (dtype, shape) in shapes.items():
            if found[name].dtype != dtype or found[name].shape != shape:
                raise BundleError(f"{path}: {name} is {found[name].dtype} {list(found[name].shape)}, expected "
                                  f"{np.dtype(dtype)} {list(shape)}; export the bundle again")  # fmt: skip
        seed, index, class_id = (int(found[name]) for name in ("seed", "image_index", "class_id"))
        if not (0 <= class_id <= spec.num_classes and 0 <= index < 2**32):
            raise BundleError(f"{path}: class {class_id}, image {index} is not of this model; export the bundle again")
        bits = np.unpackbits(found["bits"], count=spec.image_seq_len * spec.token_size)
        cells = bits.reshape(spec.image_seq_len, spec.token_size)
        return cls(seed, index, class_id, cells, found["latent"], found["first_logits"], found["image"])


@dataclass(frozen=True)
class SelfTest:
    """What this machine drew beside what was recorded."""

    engine: str
    passed: bool
    differing_bits: int
    total_bits: int
    first_differing_cell: int | None  # of the fine grid
    latent_error: float  # largest difference as a fraction of the largest recorded value
    logit_error: float | None  # likewise, of a compiled engine
    pixel_error: int  # largest difference in levels, decoding the recorded bits
    pixel_root_mean_square: float  # levels, likewise
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def run(generator: Generator) -> SelfTest:
    """Draw and decode the recorded image on the generator's engine and compare."""
    spec = generator.spec
    record = Record.load(generator.bundle.path / SELFTEST, spec)
    recorder = generator.engine_name == _RECORDER
    tolerance = _tolerance(generator.bundle, generator.engine_name)
    noise = SeededNoise(record.seed, [record.image_index])
    history = None if tolerance is _SAME else record.bits[None]
    bits = generator.sample(np.array([record.class_id]), generator.bundle.recipe, noise, history=history)[0]
    latent_error = _error(generator.last_latents()[0], record.latent)
    logit_error = None if recorder else _error(generator.first_logits()[0], record.first_logits)
    pixels = to_uint8(generator.decode_raw(record.bits[None]))[0]
    difference = pixels.astype(int) - record.image
    pixel_error, pixel_rms = int(np.abs(difference).max()), float(np.sqrt(np.square(difference).mean()))
    wrong = bits != record.bits
    first = int(np.flatnonzero(wrong.any(axis=1))[0]) if wrong.any() else None
    failures = []
    if wrong.mean() > tolerance.allowed(spec.bits_per_token):
        failures.append(f"{int(wrong.sum())} of {wrong.size} bits differ, the first in grid cell {first}")
    for what, error in (("latents", latent_error), ("logits", logit_error)):
        if error is not None and not error <= tolerance.values:  # NaN fails
            failures.append(f"{what} differ by {error:.1e} of their size, {tolerance.values:.0e} is allowed")
    if pixel_error > tolerance.largest:
        failures.append(f"pixels differ by {pixel_error} levels, {tolerance.largest} is allowed")
    if pixel_rms > tolerance.root_mean_square:
        allowed = f"{tolerance.root_mean_square:.0f} is allowed"
        failures.append(f"pixels differ by {pixel_rms:.1f} levels (root mean square), {allowed}")
    equal = f"{wrong.size - int(wrong.sum())} of {wrong.size}" if wrong.any() else f"all {wrong.size}"
    levels = f"{pixel_error} level{'' if pixel_error == 1 else 's'}"
    sentence = "; ".join(failures) or f"{equal} bits equal, pixels within {levels}"
    return SelfTest(
        generator.engine_name, not failures, int(wrong.sum()), wrong.size, first, latent_error, logit_error,
        pixel_error, pixel_rms, sentence,
    )  # fmt: skip


def _tolerance(bundle: Bundle, engine: str) -> Tolerance:
    """Of an engine, by what it computes in."""
    if "quantization" in bundle.manifest:
        return _COARSE
    if engine == _RECORDER:
        return _SAME
    return _COARSE if bundle.manifest["engines"][engine]["precision"] == "bf16" else _FLOATS


def _error(found: NDArray[np.float32], recorded: NDArray[np.float32]) -> float:
    """Largest difference as a fraction of the largest recorded value; NaN where a value is not finite."""
    with np.errstate(invalid="ignore"):
        return float(np.abs(found - recorded).max() / max(np.abs(recorded).max(), 1e-12))
