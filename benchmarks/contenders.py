"""Contenders of the harness: the PyTorch reference, the runtime, and the machine's memory."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bar_edge.benchmarks.measure import Samples
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise

_SEED = 3


class _EnoughError(Exception):
    """Raised by the progress callback to end an image after the tokens that are timed."""


def pytorch(
    generator: str, tokenizer: str, config: str | None, batch: int, tokens: int, threads: int, dtype: str = "float32"
) -> Callable[[], Samples]:
    """The reference model in eager PyTorch. `tokens` 0 draws and decodes whole images."""
    import torch

    from bar_edge.export.checkpoint import load_checkpoint
    from bar_edge.export.model import build_decoder, build_generator, generate_bits
    from bar_edge.runtime.sampling import to_fine_grid, to_uint8

    torch.set_num_threads(threads)
    checkpoint = load_checkpoint(Path(generator), Path(tokenizer), Path(config) if config else None)
    kind = getattr(torch, dtype)
    model, decoder = build_generator(checkpoint, kind), build_decoder(checkpoint, kind)
    class_ids = [i % checkpoint.spec.num_classes for i in range(batch)]
    noise = SeededNoise(_SEED, range(batch))

    def sample(progress: Callable[[int, int], None]) -> np.ndarray:
        return to_fine_grid(
            generate_bits(model, class_ids, checkpoint.recipe, noise, progress).numpy(), checkpoint.spec
        )

    def decode(bits: np.ndarray) -> None:
        with torch.inference_mode():
            to_uint8(decoder(torch.from_numpy(bits)).float().numpy())

    return _timed(sample, decode, tokens)


def runtime(bundle: str, engine: str, batch: int, tokens: int, threads: int) -> Callable[[], Samples]:
    """A bundle on an engine. `tokens` 0 draws and decodes whole images."""
    bar = Generator(bundle, engine=engine, threads=threads)
    class_ids = np.arange(batch) % bar.spec.num_classes
    noise = SeededNoise(_SEED, range(batch))
    return _timed(lambda progress: bar.sample(class_ids, bar.bundle.recipe, noise, progress), bar.decode, tokens)


def memory(threads: int, mebibytes: int = 1024) -> Callable[[], Samples]:
    """Read bandwidth of the machine: a reduction over a buffer far larger than any cache, one slice a thread."""
    buffer = np.ones((threads, mebibytes * 2**20 // 8 // threads), dtype=np.uint64)
    pool = ThreadPoolExecutor(threads)

    def run() -> Samples:
        begin = time.perf_counter()
        list(pool.map(np.bitwise_or.reduce, buffer))  # 64 GB/s where a dot product reached 32
        return {"bytes_per_second": [buffer.nbytes / (time.perf_counter() - begin)]}

    return run


def _timed(
    sample: Callable[[Callable[[int, int], None]], np.ndarray], decode: Callable[[np.ndarray], object], tokens: int
) -> Callable[[], Samples]:
    """Times between tokens; with whole images also the first token (prefix included), the decoder and the image."""

    def run() -> Samples:
        begin = time.perf_counter()
        stamps: list[float] = []

        def progress(done: int, total: int) -> None:
            stamps.append(time.perf_counter())
            if done == tokens and done < total:
                raise _EnoughError

        try:
            bits = sample(progress)
        except _EnoughError:
            return {"token": np.diff(stamps).tolist(), "first_token": [stamps[0] - begin]}
        sampled = time.perf_counter()
        decode(bits)
        end = time.perf_counter()
        return {
            "token": np.diff(stamps).tolist(),
            "first_token": [stamps[0] - begin],
            "decode": [end - sampled],
            "image": [(end - begin) / len(bits)],
        }

    return run
