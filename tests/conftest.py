"""Shared fixtures: recorded data, and bundles exported once per test session."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # the models are tiny: more threads would only wait for each other
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # some tests import onnxruntime themselves
import numpy as np
import pytest
import torch
import yaml

from bar_edge.benchmarks.random_checkpoint import random_tokenizer
from bar_edge.calibration.quantizer import quantize_bundle
from bar_edge.calibration.trajectories import Calibration, collect, make_plan
from bar_edge.export import demo
from bar_edge.export.checkpoint import Checkpoint, generator_shapes, load_checkpoint, tokenizer_shapes
from bar_edge.export.exporter import export_bundle
from bar_edge.export.model import Decoder, build_decoder, build_generator
from bar_edge.export.model import Generator as Reference
from bar_edge.export.rewrite import Rewriter
from bar_edge.runtime.bundle import MANIFEST, Bundle
from bar_edge.runtime.engines.onnxruntime import exact_int8_products
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import RecordedNoise
from bar_edge.runtime.spec import VARIANTS, ModelSpec, Recipe
from bar_edge.runtime.weights import StoredTensor, lay_out

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
GENERATORS = ("patch1", "patch1_10bit", "patch2", "patch4")
SAMPLINGS = ("cfg", "nocfg", "greedy", "random_order")
PRECISIONS = ("int8", "int8-weight", "int4-weight")
torch.set_num_threads(1)
RECORDED_TOKENIZERS = {"patch1": "decoder_6bit"}  # the others get one with random weights


class Case:
    """A generator with its tokenizer, and what is made of them once per session; tests must not change any of it."""

    def __init__(self, generator: Path, tokenizer: Path, config: Path, output: Path) -> None:
        self.generator, self.tokenizer, self.config = generator, tokenizer, config
        self.output = output
        self._quantized: dict[str, Bundle] = {}

    def recorded(self, name: str) -> dict[str, np.ndarray]:
        """The arrays of a recorded `name.npz` beside the generator."""
        with np.load(self.generator.with_name(f"{name}.npz")) as stored:
            return dict(stored)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        return load_checkpoint(self.generator, self.tokenizer, self.config)

    @property
    def spec(self) -> ModelSpec:
        return self.checkpoint.spec

    @cached_property
    def reference(self) -> Reference:
        return build_generator(self.checkpoint)

    @cached_property
    def decoder(self) -> Decoder:
        return build_decoder(self.checkpoint)

    @cached_property
    def bundle(self) -> Bundle:
        return export_bundle(self.generator, self.tokenizer, self.config, self.output)

    @cached_property
    def runtime(self) -> Generator:
        return Generator(self.bundle, engine="onnxruntime", threads=1)

    @cached_property
    def calibration(self) -> Calibration:
        return collect(self.bundle, make_plan(self.spec, images=8, seed=1000, batch_size=4), threads=1)

    def quantized(self, precision: str) -> Bundle:
        """Every layer that can be, whether or not it is faster here. Skips where INT8 products are not exact."""
        if not exact_int8_products():
            pytest.skip("this processor has no VNNI instructions: its INT8 products saturate")
        if precision not in self._quantized:
            output = self.output.with_name(f"bundle-{precision}")
            self._quantized[precision] = quantize_bundle(
                self.bundle, self.calibration, output, precision=precision, measure=False, threads=1
            )
        return self._quantized[precision]

    def close(self) -> None:
        if "runtime" in self.__dict__:
            self.runtime.close()


def sampling_of(recorded: dict[str, np.ndarray]) -> tuple[Recipe, RecordedNoise]:
    """The recipe and the noise of a recorded sampling."""
    recipe = Recipe(
        float(recorded["guidance_scale"]),
        float(recorded["randomize_temperature"]),
        tuple(recorded["tokens_allocation"].tolist()),
    )
    return recipe, RecordedNoise(recorded["u_bits"], recorded["u_confidence"], recorded.get("orders"))


def spec_of(config: Path) -> ModelSpec:
    """The sizes a golden YAML states, with the authors' defaults for what it leaves out."""
    model = yaml.safe_load(config.read_text())["model"]
    generator, tokenizer = model["generator"], model["vq_model"]
    return ModelSpec(
        hidden_size=generator["hidden_size"],
        num_layers=generator["num_hidden_layers"],
        num_heads=generator["num_attention_heads"],
        image_seq_len=generator["image_seq_len"],
        token_size=tokenizer["token_size"],
        patch_size=generator.get("patch_size", 1),
        num_classes=generator["condition_num_classes"],
        repeat_class_condition=generator.get("repeat_class_condition", 32),
        head_width=generator["mbm_head"]["width"],
        head_layers=generator["mbm_head"]["num_layers"],
        decoder_patch_size=tokenizer["vit_dec_patch_size"],
    )


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of recorded data."""
    return DATA


@pytest.fixture(scope="session")
def read_sampling() -> Callable[[dict[str, np.ndarray]], tuple[Recipe, RecordedNoise]]:
    return sampling_of


@pytest.fixture(scope="session")
def stated_spec() -> Callable[[Path], ModelSpec]:
    return spec_of


@pytest.fixture(scope="session")
def cases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Case]]:
    """Golden generators by name, each with a tokenizer that fits."""
    known: dict[str, Case] = {}

    def case(name: str) -> Case:
        if name not in known:
            source, made = GOLDEN / name, tmp_path_factory.mktemp(name)
            tokenizer = made / "tokenizer.bin"
            if name in RECORDED_TOKENIZERS:
                tokenizer = GOLDEN / RECORDED_TOKENIZERS[name] / "tokenizer.bin"
            else:
                torch.save(random_tokenizer(spec_of(source / "config.yaml"), width=64, layers=1), tokenizer)
            known[name] = Case(source / "generator.bin", tokenizer, source / "config.yaml", made / "bundle")
        return known[name]

    yield case
    for one in known.values():
        one.close()


@pytest.fixture(scope="session", params=GENERATORS)
def golden(request: pytest.FixtureRequest, cases: Callable[[str], Case]) -> Case:
    """Every golden generator in turn."""
    return cases(request.param)


@pytest.fixture(scope="session")
def patch1(cases: Callable[[str], Case]) -> Case:
    """The plainest golden generator, with a recorded tokenizer."""
    return cases("patch1")


@pytest.fixture(scope="session")
def small(cases: Callable[[str], Case]) -> Case:
    """A golden generator whose trunk, modulation, head and decoder all have layers large enough to quantize."""
    return cases("patch1_10bit")


@pytest.fixture(scope="session", params=PRECISIONS)
def precision(request: pytest.FixtureRequest) -> str:
    """What linear layers are quantized to, in turn."""
    return str(request.param)


@pytest.fixture(params=SAMPLINGS)
def sampling(request: pytest.FixtureRequest) -> str:
    """The name of every recorded sampling in turn."""
    return f"sample_{request.param}"


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """The small trained model that ships with the package."""
    with demo.data() as folder:
        made = tmp_path_factory.mktemp("digits")
        case = Case(folder / "generator.bin", folder / "tokenizer.bin", folder / "config.yaml", made / "bundle")
        yield case
        case.close()


@pytest.fixture
def bundle_copy(patch1: Case, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return Path(shutil.copytree(patch1.bundle.path, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def reseal() -> Callable[[Path], None]:
    """Make a bundle's manifest list exactly the files that are there, with their true sizes and hashes."""

    def fix(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"] = {
            file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
            for file in sorted(folder.iterdir())
            if file.name != MANIFEST
        }
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return fix


@pytest.fixture(scope="session")
def edit_manifest() -> Callable[[Path, Callable[[dict[str, Any]], Any]], None]:
    """Change a bundle's manifest in place."""

    def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        change(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return edit


@pytest.fixture(scope="session")
def places_of() -> Callable[[str], dict[str, StoredTensor]]:
    """Where the weights of a published variant would lie, without any weights."""

    def places(name: str) -> dict[str, StoredTensor]:
        variant = VARIANTS[name]
        spec = variant.spec
        shapes = (
            generator_shapes(spec),
            tokenizer_shapes(1024, 24, spec.token_size, spec.image_seq_len, spec.decoder_patch_size),
        )
        tensors = [{key: torch.empty(shape, device="meta") for key, shape in part.items()} for part in shapes]
        return lay_out(Rewriter(Checkpoint(spec, variant.recipe, name, *tensors)).pending)[1]

    return places


@pytest.fixture(scope="session")
def python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program in a fresh interpreter."""

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    return run
