"""Who takes part: the PyTorch reference, a bundle on an engine, and the machine and its GPU themselves.

Objects of these classes live in a process of their own (`measure.py`); everything they are asked for draws whole images
of classes 0, 1, 2, … with seeded noise, so that all of them draw the same ones.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.benchmarks import profiles, traffic
from bar_edge.benchmarks.profiles import SplitGenerator
from bar_edge.runtime import selftest
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import TokenProgress
from bar_edge.runtime.engines.cuda.device import CudaDevice
from bar_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from bar_edge.runtime.noise import NoiseSource, RecordedNoise, SeededNoise
from bar_edge.runtime.sampling import to_fine_grid, to_uint8
from bar_edge.runtime.spec import ModelSpec, Recipe

Bits = NDArray[np.uint8]


@dataclass(frozen=True)
class Drawn:
    """One batch.

    `seconds` are samples of image (the whole batch, per image: noise, prefix, tokens, decoder, pixels; PyTorch on a GPU
    finds its noise made) and, on the CPU, of first_token (from the request on), token (between two) and decode (from
    the last token to pixels): on a GPU the host could hear of a token only by waiting for it. Bits and pixels are those
    drawn last.
    """

    bits: Bits  # [B, cells, token_size]
    pixels: NDArray[np.uint8]  # [B, H, W, 3]
    seconds: dict[str, list[float]]


@dataclass(frozen=True)
class Judgement:
    """Bits beside what the reference draws from the same past with the same noise."""

    differing_bits: int
    total_bits: int
    tokens_differing: int
    tokens_unexplained: int  # differ although no decision was a floating-point tie


class PyTorch:
    """The reference model of `export/model.py`: eager as the authors run it, or compiled over a static cache.

    Compiled, its functions and the decoder are CUDA graphs on a GPU (`static_cache.py`).
    """

    def __init__(
        self,
        *,
        generator: str,
        tokenizer: str,
        config: str | None,
        recipe: dict[str, Any],
        threads: int,
        dtype: str,
        compiled: bool,
        tf32: bool = False,
    ) -> None:
        import torch

        from bar_edge.benchmarks.static_cache import Captured
        from bar_edge.export.checkpoint import load_checkpoint
        from bar_edge.export.model import build_decoder, build_generator

        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32  # or the decoder's convolutions round to it anyway
        checkpoint = load_checkpoint(Path(generator), Path(tokenizer), Path(config) if config else None)
        kind = getattr(torch, dtype)
        self._torch, self._compiled = torch, compiled
        self._spec = checkpoint.spec
        self._recipe = Recipe(recipe["guidance"], recipe["temperature"], tuple(recipe["allocation"]))
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = build_generator(checkpoint, kind).to(self._device)
        decoder = build_decoder(checkpoint, kind).to(self._device)
        self._to_pixels = Captured(decoder) if compiled and self._device == "cuda" else decoder
        self._traffic = traffic.of_modules(self._model, decoder, len(self._recipe.allocation))
        self._samplers: dict[int, Any] = {}
        self._noise: dict[tuple[int, int], RecordedNoise] = {}  # of (images, seed), the last one's

    def spec(self) -> ModelSpec:
        """Of the checkpoint."""
        return self._spec

    def device(self) -> str:
        """What it computes on: cpu or gpu."""
        return "gpu" if self._device == "cuda" else "cpu"

    def draw(self, images: int, seed: int, least_seconds: float = 0) -> Drawn:
        """Draw, decode and time a batch, again and again until so many seconds have passed."""

        def draw(
            class_ids: NDArray[np.int64], noise: NoiseSource, progress: TokenProgress
        ) -> tuple[Bits, NDArray[np.uint8]]:
            bits = self._sample(class_ids, noise, None if self.device() == "gpu" else progress)
            return bits, to_uint8(self._decode(bits))

        return _timed(draw, self._spec, *self._request(images, seed), least_seconds)

    def judge(self, bits: Bits, seed: int) -> Judgement:
        """Repeat the decisions behind someone's `bits` [B, cells, token_size]."""
        from bar_edge.export.replay import replay

        class_ids, noise = _request(self._spec, len(bits), seed)
        found = replay(self._model, bits, class_ids.tolist(), self._recipe, noise)
        return Judgement(
            int(found.differing_bits.sum()), bits.size, int((found.differing_bits > 0).sum()), found.unexplained
        )

    def profile(self, images: int, seed: int) -> dict[str, Any]:
        """Where the time of one image goes (`profiles.StageSplit` as a dict)."""
        class_ids, noise = self._request(images, seed)
        owner = self._sampler(images) if self._compiled else self._model
        split = profiles.split_pytorch(
            owner, self._sample, self._decode, self._spec, self._recipe, class_ids, noise, compiled=self._compiled,
            clock=profiles.TorchEvents() if self.device() == "gpu" else profiles.HostClock(),
        )  # fmt: skip
        return asdict(split)

    def traffic(self, images: int) -> dict[str, Any]:
        """Least bytes and operations of a batch, by stage."""
        return {name: asdict(work) for name, work in self._traffic.of_batch(self._spec, self._recipe, images).items()}

    def _request(self, images: int, seed: int) -> tuple[NDArray[np.int64], NoiseSource]:
        """On a GPU with the noise made: engines compute theirs on the GPU, PyTorch's would come from one CPU core.

        It is kept for the next time, because energy is measured around whole calls.
        """
        class_ids, noise = _request(self._spec, images, seed)
        if self.device() == "cpu":
            return class_ids, noise
        if (images, seed) not in self._noise:
            uniforms = noise.uniforms(self._spec.num_tokens, len(self._recipe.allocation), self._spec.bits_per_token)
            self._noise = {(images, seed): RecordedNoise(*uniforms)}
        return class_ids, self._noise[images, seed]

    def _sample(self, class_ids: NDArray[np.int64], noise: NoiseSource, progress: TokenProgress | None) -> Bits:
        from bar_edge.export.model import generate_bits

        if self._compiled:
            drawn = self._sampler(len(class_ids)).sample(class_ids.tolist(), noise, progress)
        else:
            drawn = generate_bits(self._model, class_ids.tolist(), self._recipe, noise, progress)
        bits: Bits = to_fine_grid(drawn.cpu().numpy(), self._spec)
        return bits

    def _decode(self, bits: Bits) -> NDArray[np.float32]:
        with self._torch.inference_mode():
            pixels: NDArray[np.float32] = (
                self._to_pixels(self._torch.from_numpy(bits).to(self._device)).float().cpu().numpy()
            )
        return pixels

    def _sampler(self, images: int) -> Any:
        """The static cache is of one batch size: asking for another one compiles again."""
        from bar_edge.benchmarks.static_cache import StaticCacheSampler

        if images not in self._samplers:
            self._samplers = {images: StaticCacheSampler(self._model, images, self._recipe)}
        return self._samplers[images]


class OnEngine:
    """A bundle on an engine."""

    def __init__(self, *, bundle: str, engine: str, threads: int) -> None:
        self._bundle, self._threads = Bundle.open(bundle), threads
        self._bar: SplitGenerator | None = SplitGenerator(self._bundle, engine=engine, threads=threads)
        self._engine = engine
        self._traffic = traffic.of_bundle(self._bundle)

    def self_test(self) -> dict[str, Any]:
        """The bundle's own record of what the reference drew (`selftest.SelfTest` as a dict)."""
        return selftest.run(self._running()).to_dict()

    def device(self) -> str:
        """What it computes on: cpu or gpu."""
        return "cpu" if self._engine == OnnxRuntimeEngine.name else "gpu"

    def draw(self, images: int, seed: int, least_seconds: float = 0) -> Drawn:
        """Draw, decode and time a batch, again and again until so many seconds have passed."""
        bar = self._running()

        def draw(
            class_ids: NDArray[np.int64], noise: NoiseSource, progress: TokenProgress
        ) -> tuple[Bits, NDArray[np.uint8]]:
            bits, pictures = bar.draw(class_ids, self._bundle.recipe, noise, progress)
            return bits, np.stack([np.asarray(picture) for picture in pictures])

        return _timed(draw, self._bundle.spec, *_request(self._bundle.spec, images, seed), least_seconds)

    def profile(self, images: int, seed: int) -> dict[str, Any]:
        """Where the time of one image goes. On ONNX Runtime the last thing to ask for: the engine is closed first."""
        class_ids, noise = _request(self._bundle.spec, images, seed)
        if self.device() == "gpu":
            return asdict(self._running().split(class_ids, noise))
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        return asdict(profiles.split_onnxruntime(self._bundle, self._threads, class_ids, noise))

    def traffic(self, images: int) -> dict[str, Any]:
        """Least bytes and operations of a batch, by stage."""
        works = self._traffic.of_batch(self._bundle.spec, self._bundle.recipe, images)
        return {name: asdict(work) for name, work in works.items()}

    def _running(self) -> SplitGenerator:
        assert self._bar is not None, "timed after it was profiled"
        return self._bar


class Machine:
    """What the machine can do at best: read memory, and multiply fp32 matrices."""

    def __init__(self, *, threads: int, mebibytes: int = 1024, matrix: int = 2048) -> None:
        self._buffer = np.ones((threads, mebibytes * 2**20 // 8 // threads), dtype=np.uint64)
        self._pool = ThreadPoolExecutor(threads)
        self._matrix = np.ones((matrix, matrix), dtype=np.float32)

    def bytes_per_second(self) -> float:
        """The fastest of some reductions over a buffer far larger than any cache, one slice a thread.

        Which of the two is faster depends on the processor, and one pass may meet cores that still wake up.
        """
        return max(self._read(reduction) for _ in range(3) for reduction in (np.bitwise_or, np.maximum))

    def _read(self, reduction: np.ufunc) -> float:
        begin = time.perf_counter()
        list(self._pool.map(reduction.reduce, self._buffer))
        return self._buffer.nbytes / (time.perf_counter() - begin)

    def flops_per_second(self) -> float:
        """numpy's fp32 matrix product."""
        begin = time.perf_counter()
        self._matrix @ self._matrix
        return 2 * len(self._matrix) ** 3 / (time.perf_counter() - begin)


class Gpu:
    """What the first GPU can do at best: copy its own memory."""

    def __init__(self, *, mebibytes: int = 512, copies: int = 20, awake_after: float = 0.2) -> None:
        """Two buffers of a size far beyond any cache, and seconds of copying first. Raises EngineError, MemoryError."""
        self._device, self._size, self._copies = CudaDevice(), mebibytes * 2**20, copies
        self._awake_after = awake_after
        with self._device.current():
            self._source, self._target = (self._device.allocate(self._size) for _ in range(2))

    def gpu_bytes_per_second(self) -> float:
        """Bytes read plus bytes written, by the median of some copies, when its clocks have risen."""
        device, begin = self._device, time.perf_counter()
        with device.current():
            seconds = self._copy_seconds()
            while time.perf_counter() < begin + self._awake_after:
                seconds = self._copy_seconds()
        return 2 * self._size / seconds

    def _copy_seconds(self) -> float:
        device = self._device
        marks = [device.record()]
        for _ in range(self._copies):
            device.copy(self._target, self._source, self._size)
            marks.append(device.record())
        return float(np.median([device.seconds(*pair) for pair in pairwise(marks)]))


def _request(spec: ModelSpec, images: int, seed: int) -> tuple[NDArray[np.int64], SeededNoise]:
    return np.arange(images) % spec.num_classes, SeededNoise(seed, range(images))


def _timed(
    draw: Callable[[NDArray[np.int64], NoiseSource, TokenProgress], tuple[Bits, NDArray[np.uint8]]],
    spec: ModelSpec,
    class_ids: NDArray[np.int64],
    noise: NoiseSource,
    least_seconds: float,
) -> Drawn:
    samples: dict[str, list[float]] = {}
    started = time.perf_counter()
    while True:
        stamps: list[float] = []

        def stamp(done: int, total: int, stamps: list[float] = stamps) -> None:
            stamps.append(time.perf_counter())

        begin = time.perf_counter()
        bits, pixels = draw(class_ids, noise, stamp)
        end = time.perf_counter()
        samples.setdefault("image", []).append((end - begin) / len(class_ids))
        if len(stamps) == spec.num_tokens:  # engines on a GPU tell of the last token only, PyTorch there of none
            samples.setdefault("first_token", []).append(stamps[0] - begin)
            samples.setdefault("token", []).extend(np.diff(stamps).tolist())
            samples.setdefault("decode", []).append(end - stamps[-1])
        if end - started >= least_seconds:
            return Drawn(bits, pixels, samples)
