"""The ranges that `quantize` works with: those in a file, or collected now and kept in it."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from bar_edge.calibration.pretokenized import read_pretokenized
from bar_edge.calibration.trajectories import Calibration, Plan, RealImages, collect, make_plan
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.progress import Progress

IMAGES, SEED, BATCH_SIZE = 32, 1000, 8


@dataclass(frozen=True)
class Asked:
    """What to calibrate on; None where it was left open."""

    images: int | None = None
    seed: int | None = None
    batch_size: int | None = None
    data: Path | None = None  # root of pretokenized images, in the place of drawn ones

    def plan(self, bundle: Bundle, known: Plan | None = None) -> tuple[Plan, RealImages | None]:
        """What is left open is as in a known plan, or the default. Raises CalibrationError for unusable data."""
        default = known or Plan(IMAGES, SEED, BATCH_SIZE, ())
        images, seed, batch_size = (
            getattr(default, name) if getattr(self, name) is None else getattr(self, name)
            for name in ("images", "seed", "batch_size")
        )
        real = read_pretokenized(self.data, bundle.spec, images=images, seed=seed) if self.data else None
        return make_plan(bundle.spec, images=images, seed=seed, batch_size=batch_size, real=real), real


def load(file: Path, bundle: Bundle, asked: Asked) -> Calibration:
    """The ranges in a file. Raises CalibrationError, and RequestError if they are not what was asked for."""
    found = Calibration.load(file)
    found.check_bundle(bundle, file)
    wanted, real = asked.plan(bundle, found.plan)
    if real is None:  # nothing was said of the data: any will do
        wanted = replace(wanted, class_ids=found.plan.class_ids, data=found.plan.data)
    fields = {"images": "images", "seed": "seed", "batch_size": "batch size", "data": "data"}
    different = [
        f"{what} {getattr(found.plan, name)}, not {getattr(wanted, name)}"
        for name, what in fields.items()
        if getattr(found.plan, name) != getattr(wanted, name)
    ]
    if different:
        raise RequestError(
            f"{file}: was collected with {'; '.join(different)}; leave those options out, or choose a new file"
        )
    return found


def obtain(
    bundle: Bundle, asked: Asked, *, file: Path | None, partial: Path, threads: int, progress: Progress
) -> Calibration:
    """The ranges in `file`; collected, and kept there, if it is not there or None. `partial` keeps what is half done.

    Raises CalibrationError or RequestError.
    """
    if file is not None and not os.access(file.absolute().parent, os.W_OK):
        raise RequestError(f"{file}: its folder does not exist or cannot be written; make it first")
    if file is not None and file.exists():
        return load(file, bundle, asked)
    plan, real = asked.plan(bundle)
    partial.parent.mkdir(parents=True, exist_ok=True)
    collected = collect(bundle, plan, real=real, partial=partial, threads=threads, progress=progress)
    if file is not None:
        collected.save(file)
    return collected
