"""One small bench, run once, for everything that shows or compares reports."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bar_edge.benchmarks import bench
from bar_edge.benchmarks.plan import Baseline, Plan
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle

ROUNDS = 6


@pytest.fixture(scope="session")
def other_weights(small: Any, tmp_path_factory: pytest.TempPathFactory, reseal: Callable[[Path], None]) -> Bundle:
    """A sound bundle of the same shapes that draws something else."""
    folder = tmp_path_factory.mktemp("other") / "other-weights"
    shutil.copytree(small.bundle.path, folder)
    place = weights.read_places(folder / weights.FILE_NAME)["latent_condition_proj.weight"]
    values = np.memmap(folder / weights.FILE_NAME, np.float32, "r+", place.offset, place.shape)
    values *= -1
    values.flush()
    reseal(folder)
    return Bundle.open(folder)


@pytest.fixture(scope="session")
def measured(small: Any, other_weights: Bundle) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """(report, images) of the reference, an exact, a quantized and a wrong bundle at two batch sizes."""
    plan = Plan.of(
        [small.bundle, small.quantized("int8"), other_weights],
        baseline=Baseline(small.generator, small.tokenizer, small.config, ("fp32",)), engines=(), batch_sizes=(2, 1, 2),
        rounds=ROUNDS, warmup=2, threads=1, seed=4, command="bar-edge bench <the command>",
    )  # fmt: skip
    return bench.run(plan, lambda what, done, total: None)
