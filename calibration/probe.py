"""The runtime's own loop on graphs that tell what they see, and that can be led along recorded bits.

Calibration and quality both run this: the graphs that execute, with the real recipe, plus outputs.
"""

from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bar_edge.export.builder import GraphBuilder
from bar_edge.export.graphs import decode_graph, mask_ratio_graph, modulation_graph, step_graph
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine, Step, load_session
from bar_edge.runtime.spec import ModelSpec

INPUT = "input:"
_TOLD = ("logits", "row_logits", "known")  # other than the inputs of layers
Inputs = Mapping[str, NDArray[np.float32]]  # layer -> its input


class ProbeStep(Step):
    """A step whose `seen` holds the extra outputs of its last run."""

    def __init__(
        self,
        ort: ModuleType,
        session: Any,
        spec: ModelSpec,
        shape: tuple[int, int, int, int],
        visit: Callable[["ProbeStep"], None] | None,
    ) -> None:
        rows, images, passes, self.positions_per_row = shape
        super().__init__(ort, session, spec, rows, images, passes, self.positions_per_row)
        self._names = [output.name for output in session.get_outputs()]
        self._visit = visit
        self.seen: dict[str, NDArray[Any]] = {}
        state = (passes, images, spec.bits_per_token)
        self.forced = self.input("forced", (), np.bool_)
        self.forced_known = self.input("forced_known", state, np.bool_)
        self.forced_bits = self.input("forced_bits", state, np.bool_)
        self._extra = [name for name in self._names if name.startswith(INPUT) or name in _TOLD]
        for name in self._extra:
            self._binding.bind_output(name)

    def run(self) -> None:
        super().run()
        bound = dict(zip(self._binding_order(), self._binding.get_outputs(), strict=True))
        self.seen = {name: bound[name].numpy() for name in self._extra}
        if self._visit is not None:
            self._visit(self)

    def inputs(self) -> Inputs:
        """The input of every linear layer of this run: [M, in], or [S, rows, in] in the head's passes."""
        return {name.removeprefix(INPUT): value for name, value in self.seen.items() if name.startswith(INPUT)}

    def lead(self, known: NDArray[np.bool_], bits: NDArray[np.bool_]) -> None:
        """Begin pass s with `known[s]` and `bits` where known: known [S, B, K], bits [B, K]."""
        self.forced[...] = True
        self.forced_known[:] = known
        self.forced_bits[:] = bits[None]

    def _binding_order(self) -> list[str]:
        caches = [f"{kind}_cache_out.{i}" for i in range(len(self.caches) // 2) for kind in ("k", "v")]
        return ["drawn", "latent", *caches, *self._extra]


class ProbeEngine(OnnxRuntimeEngine):
    """The ONNX Runtime engine over a folder of weights, with probes in its graphs.

    `precisions` says what each linear layer is executed in (see `export/linear.py`), so that one folder that holds
    a layer in several precisions can be run in any mixture. `visit` is called after every run of the step graph.
    """

    def __init__(
        self,
        bundle: Bundle,
        precisions: Mapping[str, str],
        threads: int = 0,
        visit: Callable[[ProbeStep], None] | None = None,
    ) -> None:
        super().__init__(bundle, threads)
        self._folder = bundle.path
        self._places = weights.read_places(bundle.path / weights.FILE_NAME)
        self._precisions = precisions
        self.visit = visit

    def make_step(self, rows: int, images: int, passes: int, positions: int) -> ProbeStep:
        shape = (rows, images, passes, positions)
        return ProbeStep(self._ort, self._probed("step", step_graph), self.spec, shape, self.visit)

    def probe_walk(self, batch: Batch) -> Iterator[tuple[int, ProbeStep]]:
        """`walk`, with the steps as what they are here."""
        for n, step in self.walk(batch):
            assert isinstance(step, ProbeStep)
            yield n, step

    def modulation_inputs(self, class_ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Inputs:
        """Inputs [M, D] of the trunk's modulation layers."""
        feeds = {"class_id": class_ids, "positions": positions}
        return self._run_probed(self._probed("modulation", modulation_graph), feeds)

    def decoder_inputs(self, bits: NDArray[np.uint8]) -> Inputs:
        """Inputs [M, in] of the decoder's layers for bits [B, cells, token_size]."""
        return self._run_probed(self._probed("decode", decode_graph), {"bits": bits.astype(np.float32)})

    def _run_probed(self, session: Any, feeds: dict[str, NDArray[Any]]) -> Inputs:
        names = [output.name for output in session.get_outputs() if output.name.startswith(INPUT)]
        values = session.run(names, feeds)
        return {name.removeprefix(INPUT): value for name, value in zip(names, values, strict=True)}

    def _probed(self, name: str, build: Callable[..., onnx.ModelProto]) -> Any:
        return self._built(f"probed {name}", lambda g, spec: build(g, spec, probe=True))

    def _session(self, graph: str) -> Any:
        build = {
            "mask_ratio": mask_ratio_graph,
            "onnxruntime_modulation": modulation_graph,
            "onnxruntime_decode": decode_graph,
        }[graph]
        return self._built(graph, build)

    def _built(self, name: str, build: Callable[..., onnx.ModelProto]) -> Any:
        """A session of a graph written now, so that any mixture of precisions can be run over the same weights."""
        if name not in self._sessions:
            builder = GraphBuilder(self._places, self._precisions, onnxruntime=True)
            model = build(builder, self.spec).SerializeToString()
            self._sessions[name] = load_session(self._ort, model, self._threads, self._folder)
        return self._sessions[name]


def linear_layers(spec: ModelSpec, places: Mapping[str, weights.StoredTensor]) -> dict[str, list[str]]:
    """Every linear layer by the graph it runs in: modulation, trunk, head, decode."""
    builders = {name: GraphBuilder(places, onnxruntime=True) for name in ("modulation", "step", "decode")}
    modulation_graph(builders["modulation"], spec)
    body = step_layers(builders["step"], spec)
    decode_graph(builders["decode"], spec)
    return {
        "modulation": [layer for layer, _ in builders["modulation"].linear_inputs],
        "trunk": [layer for layer in body if not layer.startswith("lm_head.")],
        "head": [layer for layer in body if layer.startswith("lm_head.")],
        "decode": [layer for layer, _ in builders["decode"].linear_inputs],
    }


def step_layers(builder: GraphBuilder, spec: ModelSpec) -> list[str]:
    """Linear layers of the step graph, those of the passes included."""
    model = step_graph(builder, spec, probe=True)
    return [output.name.removeprefix(INPUT) for output in model.graph.output if output.name.startswith(INPUT)]
