"""What the layers of a bundle really see while it draws, collected along its own trajectories.

Each linear layer sees different data at each position, head pass and guidance branch; ordinary calibration on flat
arrays does not. `collect` draws images with the real recipe (or follows real, pretokenized ones), streams every
layer's input into `InputStats`, and survives interruption: a partial file is written after every batch.
"""

import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.calibration.observers import InputStats, from_arrays, to_arrays
from bar_edge.calibration.probe import Inputs, ProbeEngine, ProbeStep
from bar_edge.runtime.bundle import Bundle, check_not_compiled
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.errors import CalibrationError
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.progress import Progress, silent
from bar_edge.runtime.sampling import to_fine_grid, to_tokens
from bar_edge.runtime.spec import ModelSpec

MINIMUM_IMAGES = 4
_POSITION_GROUPS = 4
_MODULATION_POSITIONS = 64
_FORMAT = 1


@dataclass(frozen=True)
class Plan:
    """What to calibrate on; with the bundle it decides the result."""

    images: int
    seed: int
    batch_size: int
    class_ids: tuple[int, ...]  # one per image
    data: str = "trajectories"  # or the digest of the pretokenized images


@dataclass
class Calibration:
    """Statistics of every linear layer, with where they come from."""

    bundle: str  # digest of the bundle
    plan: Plan
    images_done: int = 0
    stats: dict[str, InputStats] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every image asked for was used."""
        return self.images_done == self.plan.images

    def save(self, path: Path) -> None:
        """Write a file without pickles; it appears whole."""
        arrays: dict[str, NDArray[Any]] = {}
        for layer, stats in self.stats.items():
            arrays |= {f"{layer}/{key}": value for key, value in to_arrays(stats).items()}
        header = {
            "format": _FORMAT, "bundle": self.bundle, "images_done": self.images_done, "plan": asdict(self.plan),
            "layers": list(self.stats),
        }  # fmt: skip
        arrays["header"] = np.array(json.dumps(header))
        partial = path.with_name(f".{path.name}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> "Calibration":
        """Read a file that `save` wrote. Raises CalibrationError."""
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
                header = json.loads(str(stored["header"]))
                if (found := header["format"]) != _FORMAT:
                    raise CalibrationError(f"{path}: calibration format {found}, this version reads {_FORMAT}")
                plan = Plan(**{**header["plan"], "class_ids": tuple(header["plan"]["class_ids"])})
                loaded = cls(str(header["bundle"]), plan, int(header["images_done"]))
                for layer in header["layers"]:
                    prefix = f"{layer}/"
                    arrays = {key.removeprefix(prefix): stored[key] for key in stored.files if key.startswith(prefix)}
                    loaded.stats[layer] = from_arrays(layer, arrays)
                return loaded
        except CalibrationError:
            raise
        except OSError as error:
            raise CalibrationError(
                f"{path}: not a calibration file that can be read ({error.strerror or error})"
            ) from error
        except Exception as error:  # numpy and zipfile raise a dozen kinds for damaged files
            raise CalibrationError(
                f"{path}: not a calibration file, or damaged; give one that --calibration wrote, or a new name"
            ) from error

    def check_bundle(self, bundle: Bundle, path: Path | str = "the calibration") -> None:
        """Raise CalibrationError unless this was collected, completely, from that bundle."""
        if self.bundle != bundle.digest:
            raise CalibrationError(
                f"{path}: collected from another bundle ({self.bundle[:12]}…, this one is {bundle.digest[:12]}…); "
                "ranges of one model do not fit another. Collect again without --calibration"
            )
        if not self.complete:
            raise CalibrationError(
                f"{path}: only {self.images_done} of {self.plan.images} images were used; collect again to finish it"
            )


@dataclass(frozen=True)
class RealImages:
    """Pretokenized images: bits [B, image_seq_len, token_size] of the fine grid, and class ids [B]."""

    bits: NDArray[np.uint8]
    class_ids: NDArray[np.int64]
    digest: str


def collect(
    bundle: Bundle,
    plan: Plan,
    *,
    real: RealImages | None = None,
    partial: Path | None = None,
    threads: int = 0,
    progress: Progress = silent,
) -> Calibration:
    """Stream every linear layer's inputs while `bundle` draws (or follows) the planned images.

    `partial` is written after every batch, and is where an interrupted run is taken up again.
    Raises CalibrationError for a plan or bundle that does not fit, a value that is not finite, or too few images;
    RequestError for a compiled bundle.
    """
    check_source(bundle)
    _check_plan(plan, bundle.spec, real)
    result = _resume(partial, bundle, plan) or Calibration(bundle.digest, plan)
    spec = bundle.spec
    rng = np.random.default_rng((plan.seed, result.images_done))
    collector = _Collector(result.stats, spec, rng)
    engine = ProbeEngine(bundle, {}, threads, collector.visit)
    for begin in range(result.images_done, plan.images, plan.batch_size):
        part = slice(begin, min(begin + plan.batch_size, plan.images))
        class_ids = np.array(plan.class_ids[part], dtype=np.int64)
        indices = range(begin, begin + len(class_ids))
        batch = make_batch(bundle, class_ids, plan.seed, indices)
        bits = None if real is None else to_tokens(real.bits[part], spec)
        collector.guided = batch.recipe.guidance > 1
        drawn = np.empty((len(class_ids), spec.num_tokens, spec.bits_per_token), dtype=np.uint8)
        for n, step in engine.probe_walk(batch):
            collector.token = n
            if bits is not None:
                step.lead(_random_known(batch, spec, rng), bits[:, n].astype(bool))
            step.run()
            collector.token = -1
            if bits is not None:
                step.drawn[:] = bits[:, n]
            drawn[:, n] = step.drawn
            what = f"calibrating: images {begin + 1}-{begin + len(class_ids)} of {plan.images}, tokens"
            progress(what, n + 1, spec.num_tokens)
        collector.modulation(engine.modulation_inputs, class_ids)
        collector.decoder(engine.decoder_inputs(to_fine_grid(drawn, spec)))
        collector.flush()
        result.images_done = begin + len(class_ids)
        if partial is not None:
            result.save(partial)
    engine.close()
    return result


def make_plan(spec: ModelSpec, *, images: int, seed: int, batch_size: int, real: RealImages | None = None) -> Plan:
    """Classes spread over the model's, or those of real images."""
    class_ids = spread_classes(images, spec.num_classes) if real is None else tuple(map(int, real.class_ids))
    return Plan(images, seed, batch_size, class_ids, "trajectories" if real is None else real.digest)


def check_source(bundle: Bundle) -> None:
    """Raise CalibrationError for a quantized bundle, RequestError for a compiled one: neither holds fp32 layers."""
    check_not_compiled(bundle)
    if "quantization" in bundle.manifest:
        raise CalibrationError(f"{bundle.path}: is quantized already; quantize the fp32 bundle it was made from")


def make_batch(bundle: Bundle, class_ids: NDArray[np.int64], seed: int, indices: range) -> Batch:
    """A batch with the bundle's recipe, raster order and seeded noise."""
    spec, recipe = bundle.spec, bundle.recipe
    noise = SeededNoise(seed, indices)
    return Batch(class_ids, recipe, noise, noise.orders(spec.num_tokens))


def spread_classes(images: int, num_classes: int) -> tuple[int, ...]:
    """Class ids of `images` images, spread evenly over the model's classes."""
    if images <= num_classes:
        return tuple(int(c) for c in np.linspace(0, num_classes - 1, images).astype(int))
    return tuple(i % num_classes for i in range(images))


def _check_plan(plan: Plan, spec: ModelSpec, real: RealImages | None) -> None:
    if not 0 <= plan.seed < 2**63:
        raise CalibrationError(f"the seed must be between 0 and 2**63 - 1, is {plan.seed}")
    if plan.images < MINIMUM_IMAGES:
        raise CalibrationError(f"{plan.images} images are too few to calibrate on; use at least {MINIMUM_IMAGES}")
    if plan.batch_size < 1:
        raise CalibrationError(f"the batch size must be at least 1, is {plan.batch_size}")
    if len(plan.class_ids) != plan.images or (real is not None and len(real.bits) != plan.images):
        followed = "" if real is None else f" and {len(real.bits)} real images"
        raise CalibrationError(f"{plan.images} images were planned with {len(plan.class_ids)} class ids{followed}")
    if wrong := [c for c in plan.class_ids if not 0 <= c <= spec.unconditional_class]:
        raise CalibrationError(f"class {wrong[0]} is not there: this model has classes 0 to {spec.num_classes - 1}")


class _Collector:
    def __init__(self, stats: dict[str, InputStats], spec: ModelSpec, rng: np.random.Generator) -> None:
        self._stats = stats
        self._spec = spec
        self._rng = rng
        self.guided = True
        self.token = -1

    def visit(self, step: ProbeStep) -> None:
        """Take the inputs of one run: of the prefix if no token is being drawn."""
        prefix = self.token < 0
        quarter = self.token * _POSITION_GROUPS // self._spec.num_tokens + 1
        group = "prefix" if prefix else f"tokens {quarter}/{_POSITION_GROUPS}"
        for layer, value in step.inputs().items():
            in_head = layer.startswith("lm_head.")
            if prefix:
                # a prefix run's latent conditions nothing, and the token it draws is nobody's
                if not in_head and layer != "latent_condition_proj":
                    self._add(layer, value, group)
            elif value.ndim == 3 or "adaLN_modulation" in layer:
                for s, rows in enumerate(value.reshape(len(step.temperature), -1, value.shape[-1])):
                    self._branches(layer, rows, f"pass {s + 1}")
            else:
                self._branches(layer, value, group)

    def modulation(self, inputs: Callable[..., Inputs], class_ids: NDArray[np.int64]) -> None:
        """The trunk's modulation sees the same input in every layer."""
        spec = self._spec
        classes = np.unique(np.append(class_ids, spec.unconditional_class))
        total = spec.prefix_length + spec.num_tokens - 1
        positions = np.unique(np.linspace(0, total - 1, min(total, _MODULATION_POSITIONS)).astype(np.int64))
        for layer, value in inputs(classes, positions).items():
            self._add(layer, value, "positions")

    def decoder(self, inputs: Inputs) -> None:
        for layer, value in inputs.items():
            self._add(layer, value, "cells")

    def flush(self) -> None:
        for stats in self._stats.values():
            stats.flush(self._rng)

    def _branches(self, layer: str, rows: NDArray[np.float32], stratum: str) -> None:
        half = len(rows) // 2 if self.guided else len(rows)
        self._add(layer, rows[:half], f"{stratum} conditional")
        if self.guided:
            self._add(layer, rows[half:], f"{stratum} unconditional")

    def _add(self, layer: str, rows: NDArray[np.float32], stratum: str) -> None:
        if layer not in self._stats:
            self._stats[layer] = InputStats(layer, rows.shape[-1])
        self._stats[layer].add(rows, stratum, self._rng)


def _random_known(batch: Batch, spec: ModelSpec, rng: np.random.Generator) -> NDArray[np.bool_]:
    """[S, B, K]: real images are unmasked in a random order, by the allocation."""
    ranks = rng.permuted(np.tile(np.arange(spec.bits_per_token), (len(batch.class_ids), 1)), axis=1)  # [B, K]
    done = np.cumsum((0, *batch.recipe.allocation))[:-1]
    return np.asarray(ranks[None] < done[:, None, None])


def _resume(partial: Path | None, bundle: Bundle, plan: Plan) -> Calibration | None:
    if partial is None or not partial.is_file():
        return None
    try:
        stored = Calibration.load(partial)
    except CalibrationError:
        return None  # damaged: begin anew
    if stored.bundle != bundle.digest or stored.plan != plan:
        return None  # another bundle or plan: begin anew, the old partial file is overwritten
    return stored
