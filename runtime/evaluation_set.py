"""Evaluation sets: many images under one seed, in a folder that can be left at any time and taken up again.

    sampling.json         what is drawn; written first, never changed
    images/000000.png …   every image with its settings inside, unless PNGs are off
    shards/00000.npy …    pixels of the finished shards; gone once samples.npz is there
    samples.npz           arr_0, uint8 [num, H, W, 3], which the ADM evaluator reads

Image i is of class `i mod C`, as the authors' evaluation and others order it: any stretch of the set holds all classes
alike, which the Inception score needs, since the evaluator takes it over stretches of 5,000 images. An image depends
on the seed, its index and its class alone, and a shard is a fixed range of indices: who draws a shard, when, and how
often, changes nothing. A shard's `.npy` appears last and whole, so a shard is either finished or not there.
"""

import os
import shutil
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bar_edge.runtime.classes import class_name
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.evaluation_settings import EvaluationSettings
from bar_edge.runtime.folders import locked
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.pictures import save_png
from bar_edge.runtime.progress import Progress, silent
from bar_edge.runtime.sampling import to_uint8

SETTINGS, SAMPLES = "sampling.json", "samples.npz"
_SPARE_DISK = 64 * 2**20

Pixels = NDArray[np.uint8]
ImagesDone = Callable[[float], None]  # images of a shard done, in part, too


class EvaluationSet:
    """The folder of a set. `begin` makes or resumes one, `open` joins one that another process has begun."""

    def __init__(self, path: Path, settings: EvaluationSettings) -> None:
        self.path = path
        self.settings = settings
        self.shards = path / "shards"
        self.images = path / "images"
        self.samples = path / SAMPLES
        self._partial_samples = path / f".{SAMPLES}.partial"
        self._partial_settings = path / f".{SETTINGS}.partial"

    @classmethod
    @contextmanager
    def begin(cls, path: Path, settings: EvaluationSettings) -> Iterator["EvaluationSet"]:
        """Make the folder, or take up one with the same settings; no other process can until the block ends.

        Raises RequestError if the folder holds something else, another process is writing it, or the disk is too full.
        """
        folder = cls(path, settings)
        folder._check_begun()
        folder._check_whole()
        folder._check_disk()
        path.mkdir(parents=True, exist_ok=True)
        with locked(path):
            if not folder._check_begun():  # again, for another process may have been faster
                folder._partial_settings.write_text(settings.to_json())
                _publish(folder._partial_settings, path / SETTINGS)
            folder._remove_partial()  # what a killed run left
            try:
                yield folder
            finally:
                folder._remove_partial()  # what killed workers left

    @classmethod
    def open(cls, path: Path) -> "EvaluationSet":
        """A set that was begun. Raises RequestError if there is none, or another version made it."""
        file = path / SETTINGS
        try:
            return cls(path, EvaluationSettings.from_json(file.read_text()))
        except FileNotFoundError as error:
            raise RequestError(f"{file}: no such file, so {path} is no evaluation set that was begun") from error
        except (ValueError, TypeError) as error:
            raise RequestError(
                f"{file}: not the settings of an evaluation set ({error}); finish it with the bar-edge that began it, "
                "or choose another folder"
            ) from error

    @property
    def complete(self) -> bool:
        """Whether samples.npz is there, and so everything."""
        return self.samples.exists()

    @property
    def images_done(self) -> int:
        """Images in finished shards."""
        return self.settings.num - sum(len(self.indices(shard)) for shard in self.missing())

    def missing(self) -> list[int]:
        """The shards that are not finished."""
        if self.complete:
            return []
        count = -(-self.settings.num // self.settings.shard_images)
        return [shard for shard in range(count) if not self.shard_file(shard).exists()]

    def indices(self, shard: int) -> range:
        """The indices of a shard's images."""
        size = self.settings.shard_images
        return range(shard * size, min((shard + 1) * size, self.settings.num))

    def shard_file(self, shard: int) -> Path:
        """Where a shard's pixels appear when it is finished."""
        return self.shards / f"{shard:05d}.npy"

    def draw(self, generator: Generator, *, batch_size: int, progress: Progress = silent) -> None:
        """Draw every missing shard in this process."""
        done = self.images_done
        for shard in self.missing():

            def report(images: float, done: int = done) -> None:
                progress("images", done + images, self.settings.num)

            self.draw_shard(shard, generator, batch_size=batch_size, images_done=report)
            done += len(self.indices(shard))

    def draw_shard(
        self, shard: int, generator: Generator, *, batch_size: int, images_done: ImagesDone | None = None
    ) -> None:
        """Draw one shard, PNGs first, pixels last; harmless if it is finished or someone else draws it, too."""
        self.shards.mkdir(exist_ok=True)
        with TemporaryDirectory(prefix=f".{shard:05d}.{os.getpid()}.", suffix=".partial", dir=self.shards) as partial:
            pixels = self._pixels(self.indices(shard), generator, batch_size, images_done)
            if self.settings.png:
                self._write_pngs(self.indices(shard), pixels, generator, Path(partial))
            file = Path(partial) / "pixels.npy"
            np.save(file, pixels)
            _publish(file, self.shard_file(shard))

    def assemble(self, progress: Progress = silent) -> Path:
        """Stream all shards into samples.npz, then remove them; memory holds one shard. Returns the file.

        Raises RequestError if a shard is damaged.
        """
        if not self.complete:
            try:
                self._write_samples(progress)
                _publish(self._partial_samples, self.samples)
            finally:
                self._partial_samples.unlink(missing_ok=True)
        shutil.rmtree(self.shards, ignore_errors=True)
        return self.samples

    def _pixels(self, indices: range, generator: Generator, batch_size: int, images_done: ImagesDone | None) -> Pixels:
        settings = self.settings
        pixels = np.empty((len(indices), settings.image_size, settings.image_size, 3), dtype=np.uint8)
        for begin in range(0, len(indices), batch_size):
            part = indices[begin : begin + batch_size]

            def report(done: int, tokens: int, begin: int = begin, images: int = len(part)) -> None:
                if images_done is not None:
                    images_done(begin + images * done / tokens)

            noise = SeededNoise(settings.seed, part)
            bits = generator.sample(settings.class_ids(part), settings.recipe, noise, report)
            pixels[begin : begin + len(part)] = to_uint8(generator.decode_raw(bits))
        return pixels

    def _write_pngs(self, indices: range, pixels: Pixels, generator: Generator, partial: Path) -> None:
        self.images.mkdir(exist_ok=True)
        settings = self.settings
        text: dict[str, Any] = {
            "bundle": settings.bundle, "variant": generator.bundle.variant, "engine": settings.engine,
            "bar-edge": settings.bar_edge, "seed": settings.seed, "order": "raster", "guidance": settings.guidance,
            "temperature": settings.temperature, "allocation": list(settings.allocation),
        }  # fmt: skip
        for index, class_id, image in zip(indices, settings.class_ids(indices).tolist(), pixels, strict=True):
            name = _png(index)
            named = {"class_id": class_id, "class": class_name(class_id, generator.spec), "index": index}
            save_png(Image.fromarray(image), partial / name, text | named)
            _publish(partial / name, self.images / name)

    def _write_samples(self, progress: Progress) -> None:
        num, side = self.settings.num, self.settings.image_size
        header = {"descr": "|u1", "fortran_order": False, "shape": (num, side, side, 3)}
        with (
            zipfile.ZipFile(self._partial_samples, "w") as archive,
            archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            for first in range(0, num, self.settings.shard_images):
                member.write(self._read_shard(first // self.settings.shard_images).data)
                progress(f"writing {SAMPLES}, images", min(first + self.settings.shard_images, num), num)

    def _read_shard(self, shard: int) -> Pixels:
        file, side = self.shard_file(shard), self.settings.image_size
        expected = (len(self.indices(shard)), side, side, 3)
        try:
            pixels = np.load(file, allow_pickle=False)
        except (ValueError, EOFError) as error:
            raise RequestError(f"{file}: damaged ({error}); delete it and run the command again") from error
        if pixels.dtype != np.uint8 or pixels.shape != expected:
            raise RequestError(
                f"{file}: holds {pixels.dtype} {list(pixels.shape)}, not uint8 {list(expected)}; delete it and run the "
                "command again"
            )
        return np.ascontiguousarray(pixels)

    def _check_begun(self) -> bool:
        """Whether it was begun. Raises RequestError if that was with other settings, or other things are there."""
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"{self.path}: is a file; choose a folder")
        there = {entry.name for entry in self.path.iterdir()} if self.path.exists() else set()
        if SETTINGS not in there:
            if there - {self._partial_settings.name}:
                raise RequestError(
                    f"{self.path}: has files but no {SETTINGS}, so it is no evaluation set; choose another folder"
                )
            return False
        begun, wanted = asdict(self.open(self.path).settings), asdict(self.settings)
        different = [f"{name} {begun[name]}, not {wanted[name]}" for name in begun if begun[name] != wanted[name]]
        if different:
            raise RequestError(
                f"{self.path}: was begun with {'; '.join(different)}; give the same options, or choose another folder"
            )
        return True

    def _check_whole(self) -> None:
        if not self.complete:
            return
        found, pixels = self.samples.stat().st_size, self.settings.num * self.settings.image_bytes
        if found < pixels:
            raise RequestError(
                f"{self.samples}: truncated, {found:,} bytes where the pixels alone are {pixels:,}; delete it and run "
                "the command again to draw them"
            )
        if not self.settings.png:
            return
        there = {entry.name for entry in self.images.iterdir()} if self.images.is_dir() else set()
        missing = [index for index in range(self.settings.num) if _png(index) not in there]
        if missing:
            raise RequestError(
                f"{self.path}: is finished, but {len(missing):,} of its images are gone, the first {_png(missing[0])}; "
                f"delete {SAMPLES} and run the command again to draw them"
            )

    def _check_disk(self) -> None:
        if self.complete:
            return
        settings = self.settings
        copies = 2 if settings.png else 1  # a PNG is at most about as large as its pixels
        images = copies * (settings.num - self.images_done) + settings.num
        needed = images * settings.image_bytes + _SPARE_DISK
        there = self.path.absolute()
        free = shutil.disk_usage(next(place for place in (there, *there.parents) if place.exists())).free
        if free < needed:
            raise RequestError(
                f"{self.path}: {free / 2**20:,.0f} MiB free, up to {needed / 2**20:,.0f} MiB needed; free some space, "
                "choose another disk, or pass --no-png"
            )

    def _remove_partial(self) -> None:
        self._partial_samples.unlink(missing_ok=True)
        for folder in self.shards.glob(".*.partial"):
            shutil.rmtree(folder, ignore_errors=True)


def _png(index: int) -> str:
    return f"{index:06d}.png"


def _publish(file: Path, target: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())
    file.replace(target)
