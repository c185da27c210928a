"""Graphs for TensorRT and plans of TensorRT-RTX, each made once per session."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import pytest

from bar_edge.export.builder import DeviceForm
from bar_edge.export.device_weights import device_weights, write
from bar_edge.export.linear import PRODUCT
from bar_edge.export.plan_report import Program, read_plan
from bar_edge.export.tensorrt_graphs import build_tensorrt_graphs
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.inspection import linear_layers

MODELS = ("digits", "patch1", "patch1_10bit", "patch2", "patch4")  # P = 1, 1, 1, 2, 4
FORMS = ("fp16", "int8", "int8-weight", "int4-weight")


def products_of(model: onnx.ModelProto) -> set[str]:
    """The linear layers that a graph computes."""
    return {node.name.removesuffix(PRODUCT) for node in model.graph.node if node.name.endswith(PRODUCT)}


@dataclass(frozen=True)
class Written:
    """The graphs of one profile, and the folder of the weights they read."""

    bundle: Bundle
    device: DeviceForm
    profile: Profile
    copies: int  # rows of an image: two with guidance
    folder: Path
    graphs: dict[str, onnx.ModelProto]

    def save(self, name: str) -> Path:
        """The file of a graph, beside its weights."""
        path = self.folder / f"{name}-{self.profile.rows}-{self.copies}-{self.device.in_place}.onnx"
        onnx.save(self.graphs[name], path)
        return path


@dataclass(frozen=True)
class Compiled:
    """A compiled bundle, the bundle it was made from, and the graphs that were compiled."""

    source: Bundle
    bundle: Bundle
    onnx: Path

    @property
    def facts(self) -> dict[str, Any]:
        return dict(self.bundle.manifest["engines"]["tensorrt"])

    def plans(self, profile: int = 0) -> dict[str, dict[str, Any]]:
        """What the manifest says of the plans of a profile."""
        return dict(self.facts["profiles"][profile]["plans"])

    def plan(self, name: str, profile: int = 0) -> bytes:
        return (self.bundle.path / self.plans(profile)[name]["file"]).read_bytes()

    def graph(self, name: str, profile: int = 0) -> onnx.ModelProto:
        rows = self.facts["profiles"][profile]["sizes"]["rows"]
        return onnx.load(self.onnx / f"{name}-{rows}.onnx", load_external_data=False)

    @cached_property
    def programs(self) -> dict[str, Program]:
        return {name: read_plan(self.plan(name)) for name in self.plans()}

    @cached_property
    def asked_for(self) -> dict[str, str]:
        """Every linear layer, and what its product must be computed in."""
        stored = linear_layers(weights.read_places(self.source.path / weights.FILE_NAME))
        return {layer: self.facts["precision"] if kind in ("fp32", "fp16") else kind for layer, kind in stored.items()}


@pytest.fixture(scope="session")
def models(cases: Callable[[str], Any], digits: Any) -> Callable[[str], Any]:
    """The demo and the golden generators, by name."""
    return lambda name: digits if name == "digits" else cases(name)


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Written]:
    """The graphs that TensorRT would compile of a bundle."""
    known: dict[tuple[Any, ...], Written] = {}
    stored: dict[tuple[Any, ...], tuple[Path, dict[str, Any]]] = {}

    def make(bundle: Bundle, dtype: int, *, in_place: bool = True, images: int = 1, guided: bool = True) -> Written:
        key = (bundle.path, dtype, in_place, images, guided)
        if key not in known:
            precisions = linear_layers(weights.read_places(bundle.path / weights.FILE_NAME))
            if key[:2] not in stored:
                folder = tmp_path_factory.mktemp("written")
                pending = device_weights(weights.open_weights(bundle.path), precisions, dtype)
                stored[key[:2]] = folder, write(folder, pending)
            folder, places = stored[key[:2]]
            device = DeviceForm(dtype, in_place)
            profile = Profile.of(images, guided=guided, passes=len(bundle.recipe.allocation))
            graphs = build_tensorrt_graphs(bundle.spec, places, precisions, device, profile)
            known[key] = Written(bundle, device, profile, 2 if guided else 1, folder, graphs)
        return known[key]

    return make


@pytest.fixture(scope="session")
def compiled(models: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Compiled]:
    """Bundles compiled for four RTX generations, by model and precision; one plan covers all four."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")
    from bar_edge.export.compile import PRECISIONS, compile_bundle

    known: dict[tuple[Any, ...], Compiled] = {}

    def make(model: str, precision: str, batches: tuple[int, ...] = (1,)) -> Compiled:
        key = (model, precision, batches)
        if key not in known:
            floats = precision in PRECISIONS
            case = models(model)
            source = case.bundle if floats else case.quantized(precision)
            folder = tmp_path_factory.mktemp(f"{model}-{precision}")
            made = compile_bundle(
                source, folder / "compiled", target="rtx", precision=precision if floats else "fp16", batches=batches,
                keep_onnx=folder / "onnx",
            )  # fmt: skip
            known[key] = Compiled(source, made, folder / "onnx")
        return known[key]

    return make
