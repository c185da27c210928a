"""A full-size model on the engine `cuda`, executed kernel by kernel on the CPU, beside ONNX Runtime.

    python -m tests.runtime.engines.cuda.whole_model BUNDLE BUNDLE-cuda -o benchmarks/results/FILE.json

Takes 20 s a token of BAR-B or so. One guided image, led along ONNX Runtime's tokens, then decoded from the same bits.
"""

import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from bar_edge.benchmarks.measure import save, stamp
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.cuda.compiler import KERNELS
from bar_edge.runtime.engines.cuda.module import PRODUCTS
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_fine_grid, to_uint8
from bar_edge.runtime.terminal import run_function

from .emulated_engine import kernel_loop
from .host import NATIVE, HostKernels, build


def compare(source: Bundle, compiled: Bundle, folder: Path) -> dict[str, Any]:
    """Decisions, latents and pixels of both."""
    noise = SeededNoise(3, range(1))
    batch = Batch(np.array([7]), source.recipe, noise, noise.orders(source.spec.num_tokens))
    with Generator(source, engine="onnxruntime") as reference:
        history = reference._engine.sample(batch)
        latents = reference._engine.last_latents()
        cells = to_fine_grid(history, source.spec)
        image = reference._engine.decode(cells)
    kernels, products = HostKernels(build(KERNELS, folder)), HostKernels(build(PRODUCTS, folder, NATIVE))
    profile = Profile.of(1, guided=True, passes=len(source.recipe.allocation))
    gpu = kernel_loop(compiled, kernels, products, profile)
    wrong = gpu.loop.sample(batch, None, history) != history
    found, decoded = gpu.loop.last_latents(1), gpu.loop.decode(cells)
    gpu.device.check_guards()
    levels = to_uint8(decoded).astype(int) - to_uint8(image)
    return {
        "variant": source.variant, "kernel_family": compiled.manifest["engines"]["cuda"]["family"],
        "bits": wrong.size, "bits_differing": int(wrong.sum()), "tokens": wrong[..., 0].size,
        "tokens_differing": int(wrong.any(axis=-1).sum()),
        "latent_error": float(np.abs(found - latents).max() / np.abs(latents).max()),
        "image_relative_rms": float(np.sqrt(np.square(decoded - image).mean() / np.square(image).mean())),
        "pixel_levels_largest": int(np.abs(levels).max()),
        "pixel_levels_root_mean_square": float(np.sqrt(np.square(levels).mean())),
    }  # fmt: skip


def main(
    source: Path, compiled: Path, output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")]
) -> None:
    """Compare, and write what was found."""
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Bundle.open(source), Bundle.open(compiled), Path(folder))
    names = shlex.join([source.name, compiled.name, "-o", output.name])
    report = {**stamp(f"python -m tests.runtime.engines.cuda.whole_model {names}"), **found}
    save(report, output)
    print(found, file=sys.stderr)


if __name__ == "__main__":
    run_function(main)
