"""The public class: class ids and a seed in, images out.

    with Generator("bar_b/") as bar:
        images = bar.generate(class_ids=[207, 360], seed=1)  # list of PIL.Image

The image index, which with the seed decides an image's noise, is its position in the request, class-major: with two
classes and `num=2`, indices 0 and 1 are the first class. Batch size, threads and engine never change a bit beyond
floating-point ties.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from bar_edge.runtime import engines
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.errors import EngineError, RequestError
from bar_edge.runtime.noise import NoiseSource, SeededNoise
from bar_edge.runtime.sampling import to_fine_grid, to_raster, to_tokens, to_uint8
from bar_edge.runtime.spec import Recipe, whole_number

DEFAULT_BATCH_SIZE = 8
_MOST_THREADS = 1024  # far more than help; a slip of the keyboard must not take all that a machine has
Order = Literal["raster", "random"]
Progress = Callable[[int, int, int, int], None]
Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class Drawn:
    """One image: its index in the request, class id (None: unconditional), pixels, bits [image_seq_len, token_size]."""

    index: int
    class_id: int | None
    image: Image.Image
    bits: Bits


class Generator:
    """Draws images from a bundle. Usable from several threads: calls are carried out one after the other.

    The bundle's files are mapped, not copied: replace a bundle that is in use by renaming, never write into its files.
    """

    def __init__(
        self, bundle: Bundle | Path | str, *, engine: str = "auto", threads: int = 0, stream: Any = None
    ) -> None:
        """Verify the bundle and start an engine.

        Args:
            bundle: a bundle folder, or one already opened.
            engine: `auto` or a name; a named engine that cannot run is an error, never replaced.
            threads: 0 for all cores; CPU engines.
            stream: a CUDA stream to work in (a handle, or an object of cuda-core, PyCUDA, PyTorch, CuPy); GPU engines.
                The context is the calling thread's, if it has one.

        Raises: BundleError, CompatibilityError, EngineError, RequestError.
        """
        threads = whole_number(threads, "threads")
        if not 0 <= threads <= _MOST_THREADS:
            raise RequestError(f"threads must be 0, for all cores, to {_MOST_THREADS}, is {threads}")
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        name, self.engine_reason = engines.choose(engine, self.bundle)
        self.spec = self.bundle.spec
        self._engine: engines.Engine | None = engines.start(name, self.bundle, threads, stream)
        self.engine_name = name
        self._lock = threading.Lock()
        self._user: int | None = None  # the thread that holds the lock

    def __enter__(self) -> "Generator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the engine."""
        with self._alone():
            if self._engine is not None:
                self._engine.close()
            self._engine = None

    def stream(
        self,
        class_ids: Sequence[int | None],
        *,
        seed: int = 0,
        num: int = 1,
        guidance: float | None = None,
        temperature: float | None = None,
        allocation: Sequence[int] | None = None,
        order: Order = "raster",
        batch_size: int = DEFAULT_BATCH_SIZE,
        progress: Progress | None = None,
    ) -> Iterator[Drawn]:
        """Draw `num` images of each class, class-major, giving each as soon as its batch is decoded.

        Args:
            class_ids: 0..C-1, or None for an unconditional image.
            seed: 0..2**64-1.
            guidance, temperature, allocation: the bundle's recipe (the authors' for a published model) unless given.
            order: tokens in raster order, or in a random order of each image's own.
            batch_size: images sampled together; changes speed and memory, not images.
            progress: called after every token, on a GPU after the last one, with (images finished, images in all,
                tokens of this batch done, N); it cannot use the generator, but raise to stop it.

        Raises RequestError, before anything is drawn, for options that do not fit the model.
        """
        num, batch_size = whole_number(num, "num"), whole_number(batch_size, "batch_size")
        if num < 1 or batch_size < 1:
            raise RequestError(f"num and batch_size must be at least 1, are {num} and {batch_size}")
        if order not in ("raster", "random"):
            raise RequestError(f"order must be raster or random, is {order!r}")
        recipe = self.recipe(guidance, temperature, allocation)
        ids = np.repeat(self._class_ids(class_ids), num)
        seed = SeededNoise(seed, ()).seed  # refuses one out of range
        return self._batches(ids, recipe, seed, order == "random", batch_size, progress)

    @overload
    def generate(
        self, class_ids: Sequence[int | None], *, return_bits: Literal[False] = False, **options: Any
    ) -> list[Image.Image]: ...

    @overload
    def generate(
        self, class_ids: Sequence[int | None], *, return_bits: Literal[True], **options: Any
    ) -> tuple[list[Image.Image], Bits]: ...

    def generate(
        self, class_ids: Sequence[int | None], *, return_bits: bool = False, **options: Any
    ) -> list[Image.Image] | tuple[list[Image.Image], Bits]:
        """All images of `stream`, which see for the options; with `return_bits` also their bits.

        Returns RGB images, class-major; bits are [B, image_seq_len, token_size] uint8 of the fine grid.
        """
        drawn = list(self.stream(class_ids, **options))
        images = [one.image for one in drawn]
        return (images, np.stack([one.bits for one in drawn])) if return_bits else images

    def _batches(
        self,
        ids: NDArray[np.int64],
        recipe: Recipe,
        seed: int,
        random: bool,
        batch_size: int,
        progress: Progress | None,
    ) -> Iterator[Drawn]:
        for begin in range(0, len(ids), batch_size):
            part = ids[begin : begin + batch_size]
            noise = SeededNoise(seed, range(begin, begin + len(part)), random_order=random)

            def report(done: int, tokens: int, begin: int = begin) -> None:
                if progress is not None:
                    progress(begin, len(ids), done, tokens)

            bits, images = self.draw(part, recipe, noise, report)
            for i, image in enumerate(images):
                class_id = int(part[i])
                yield Drawn(begin + i, None if class_id == self.spec.num_classes else class_id, image, bits[i])

    def sample(
        self,
        class_ids: NDArray[np.int64],
        recipe: Recipe,
        noise: NoiseSource,
        progress: engines.TokenProgress | None = None,
        history: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """Draw one batch with given noise (seeded or recorded).

        class_ids [B], C for unconditional -> bits [B, image_seq_len, token_size] uint8 on the fine grid. With `history`
        (bits of the same shape) every token is drawn after those recorded there, not after those just drawn.

        Raises RequestError for class ids, a recipe, noise or a history that do not fit the model or each other.
        """
        batch = self._batch(class_ids, recipe, noise)
        steps = None
        if history is not None:
            tokens = to_tokens(self._bits(history, len(batch.class_ids)), self.spec)
            steps = np.take_along_axis(tokens, batch.orders[:, :, None], axis=1)
        with self._alone():
            drawn = self._running().sample(batch, progress, steps)  # [B, N, K] by generation step
        return to_fine_grid(to_raster(drawn, batch.orders), self.spec)

    def draw(
        self,
        class_ids: NDArray[np.int64],
        recipe: Recipe,
        noise: NoiseSource,
        progress: engines.TokenProgress | None = None,
    ) -> tuple[NDArray[np.uint8], list[Image.Image]]:
        """As `sample`, and the images of what was drawn, which then never leave the device in between."""
        batch = self._batch(class_ids, recipe, noise)
        with self._alone():
            drawn, raw = self._running().draw(batch, progress)
        images = [Image.fromarray(pixels) for pixels in to_uint8(raw)]
        return to_fine_grid(to_raster(drawn, batch.orders), self.spec), images

    def _batch(self, class_ids: NDArray[np.int64], recipe: Recipe, noise: NoiseSource) -> Batch:
        spec = self.spec
        recipe.validated(spec.bits_per_token)
        class_ids = np.asarray(class_ids)
        if class_ids.ndim != 1 or class_ids.dtype.kind not in "iu" or not self._known(class_ids):
            raise RequestError(f"class ids must be whole numbers 0 to {spec.num_classes} (unconditional): {class_ids}")
        if noise.images != len(class_ids):
            raise RequestError(f"noise for {noise.images} images, but {len(class_ids)} class ids")
        return Batch(class_ids.astype(np.int64), recipe, noise, noise.orders(spec.num_tokens))

    def last_latents(self) -> NDArray[np.float32]:
        """Latents [rows, W] that conditioned the last token drawn, conditional rows first; for self-tests."""
        with self._alone():
            return self._running().last_latents()

    def first_logits(self) -> NDArray[np.float32]:
        """Logits [rows, K, 2] of the last token's first head pass, conditional rows first; for self-tests.

        Of a GPU engine. Raises EngineError elsewhere.
        """
        with self._alone():
            return self._on_device().first_logits()

    def images_on_device(self) -> Any:
        """The images [B, 3, H, W] drawn last, float32 before clamping, in device memory until the next call.

        Of a GPU engine: an object with `__cuda_array_interface__` and `to_pycuda()`. Raises EngineError elsewhere.
        """
        with self._alone():
            return self._on_device().images_on_device()

    def decode(self, bits: Any) -> list[Image.Image]:
        """Bits [B, image_seq_len, token_size] of the fine grid (0 or 1) -> RGB images.

        A GPU engine also takes them as float32 in device memory (PyCUDA, PyTorch, CuPy), unchecked.
        """
        return [Image.fromarray(pixels) for pixels in to_uint8(self.decode_raw(bits))]

    def decode_raw(self, bits: Any) -> NDArray[np.float32]:
        """As `decode`, but the decoder's output [B, 3, H, W] before clamping."""
        if hasattr(bits, "__cuda_array_interface__"):
            with self._alone():
                return self._on_device().decode(bits)
        bits = self._bits(bits)
        with self._alone():
            return self._running().decode(bits)

    def recipe(
        self,
        guidance: float | None = None,
        temperature: float | None = None,
        allocation: Sequence[int] | None = None,
    ) -> Recipe:
        """The bundle's recipe with what is given in its place. Raises RequestError if it does not fit."""
        return self.bundle.recipe.overridden(
            self.spec.bits_per_token, guidance=guidance, temperature=temperature, allocation=allocation
        )

    def _class_ids(self, class_ids: Sequence[int | None]) -> NDArray[np.int64]:
        try:
            given = list(class_ids)
        except TypeError as error:
            raise RequestError(f"class ids must be a list of whole numbers or None, is {class_ids!r}") from error
        known = self.spec.num_classes
        ids = [known if c is None else whole_number(c, "class id") for c in given]
        wrong = [i for c, i in zip(given, ids, strict=True) if c is not None and not 0 <= i < known]
        if wrong or not ids:
            found = f"{wrong[0]} is not" if wrong else "none is given"
            raise RequestError(f"class ids: {found}; this model has classes 0 to {known - 1}")
        return np.array(ids, dtype=np.int64)

    def _bits(self, bits: Any, images: int | None = None) -> Bits:
        """Bits of that many images, checked."""
        bits = np.asarray(bits)
        of_image = (self.spec.image_seq_len, self.spec.token_size)
        fits = bits.ndim == 3 and bits.shape[1:] == of_image and images in (None, len(bits))
        if not fits or not np.isin(bits, (0, 1)).all():
            expected = f"[{'B' if images is None else images}, {of_image[0]}, {of_image[1]}]"
            raise RequestError(f"bits must be 0 or 1 of shape {expected}, got {list(bits.shape)}")
        return np.asarray(bits, dtype=np.uint8)

    def _known(self, class_ids: NDArray[Any]) -> bool:
        return bool(((class_ids >= 0) & (class_ids <= self.spec.unconditional_class)).all()) and len(class_ids) > 0

    def _on_device(self) -> engines.OnDevice:
        engine = self._running()
        if not isinstance(engine, engines.OnDevice):
            raise EngineError(f"{self.engine_name} keeps nothing in device memory")
        return engine

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out. Raises EngineError in a thread that is within already: it would wait for itself."""
        if self._user == threading.get_ident():
            raise EngineError(
                "this generator is drawing and cannot be used from its own progress callback or a signal handler; "
                "raise an exception there to stop it"
            )
        with self._lock:
            self._user = threading.get_ident()
            try:
                yield
            finally:
                self._user = None

    def _running(self) -> engines.Engine:
        if self._engine is None:
            raise EngineError("this generator is closed")
        return self._engine
