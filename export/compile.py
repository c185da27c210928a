"""`bar-edge compile`: the graphs of a bundle become TensorRT engines, on one path for TensorRT and TensorRT-RTX.

Always strongly typed with explicit Q/DQ, which is the only way that exists in every version. The plan is read back
(`export/plan_report.py`): a product that is not computed in the precision that was asked for is an error. A compiled
bundle holds plans, the tables that the loop's own kernels read, and the self-test; it runs on a machine without the
bundle it was made from, and without onnx.
"""

import hashlib
import json
import shutil
import signal
import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto

from bar_edge.export.builder import DeviceForm
from bar_edge.export.device_weights import device_weights, write
from bar_edge.export.plan_report import BF16, Program, read_plan
from bar_edge.export.targets import Target, check_compilable, resolve
from bar_edge.export.tensorrt_graphs import build_tensorrt_graphs
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import SELFTEST, Bundle, derived_provenance, publish, write_manifest
from bar_edge.runtime.engines.cuda import cache
from bar_edge.runtime.engines.cuda.device import driver_version
from bar_edge.runtime.engines.cuda.loop import ITEMSIZES, TABLES, buffer_sizes
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.tensorrt import NAME, load_library
from bar_edge.runtime.errors import EngineError, RequestError
from bar_edge.runtime.inspection import linear_layers
from bar_edge.runtime.precisions import BITS, FP16, FP32
from bar_edge.runtime.progress import Progress, silent
from bar_edge.runtime.weights import PendingTensor

PRECISIONS = {FP16: TensorProto.FLOAT16, BF16: TensorProto.BFLOAT16, FP32: TensorProto.FLOAT}
_IN_PLACE_SINCE = (10, 15)  # TensorRT whose parser turns TensorScatter into a cache update
_LOG_LINES = 12
ONCE_AN_IMAGE = ("modulation", "prefix", "decode")  # graphs outside the token loop


def compile_bundle(
    source: Bundle,
    output: Path,
    *,
    target: str,
    precision: str = FP16,
    batches: tuple[int, ...] = (1,),
    host_sm: int | None = None,
    keep_onnx: Path | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Compile a bundle, fp32 or quantized.

    Args:
        target: `rtx`, `host` or the name of a device (`export/targets.py`).
        precision: of products that the bundle does not hold in integers: `fp16`, `bf16` or `fp32`.
        batches: images sampled together; each has its own set of engines with static shapes.
        host_sm: compute capability of the GPU in this machine, as 87 for 8.7.
        keep_onnx: a new folder for the graphs that are compiled, to be inspected or compared with Polygraphy.

    Raises RequestError for settings that do not fit, EngineError if the builder fails or does not do what was asked.
    """
    _check(source, precision, batches, keep_onnx)
    resolved = resolve(target, host_sm)
    builder = Builder(load_library(resolved.package), resolved, progress)
    spec, recipe = source.spec, source.recipe
    places = weights.read_places(source.path / weights.FILE_NAME)
    precisions = linear_layers(places)
    device = DeviceForm(PRECISIONS[precision], builder.in_place)
    expected = {layer: precision if kind in (FP32, FP16) else kind for layer, kind in precisions.items()}
    tensors = weights.open_weights(source.path)
    pending = device_weights(tensors, precisions, device.dtype)
    profiles = [Profile.of(images, guided=recipe.guidance > 1, passes=len(recipe.allocation)) for images in batches]
    needed = 2 * len(batches) * source.file_bytes(weights.FILE_NAME)
    with publish(output, needed, force=force, sources=[source.path]) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        progress("writing weights for the device", 0, 1)
        device_places = write(scratch, pending)
        compiled: dict[str, dict[str, Any]] = {}  # by file, so that equal graphs of several profiles are one plan
        described = []
        for profile in profiles:
            plans = {}
            graphs = build_tensorrt_graphs(spec, device_places, precisions, device, profile)
            for name, model in graphs.items():
                file = f"{name}-{hashlib.sha256(model.SerializeToString()).hexdigest()[:12]}.plan"
                if file not in compiled:
                    graph = scratch / f"{name}-{profile.rows}.onnx"
                    onnx.save(model, graph)
                    plan = builder.build(graph, f"{name}, {profile.rows} rows")
                    compiled[file] = builder.describe(name, plan, expected)
                    (folder / file).write_bytes(plan)
                plans[name] = {"file": file, **compiled[file]}
            buffers = buffer_sizes(spec, profile, itemsize=ITEMSIZES[precision], in_place=builder.in_place)
            described.append({"sizes": profile.to_dict(), "buffer_bytes": sum(buffers.values()), "plans": plans})
        if keep_onnx is not None:
            shutil.copytree(scratch, keep_onnx)
        shutil.rmtree(scratch)
        write(folder, {name: _table(tensors[name]) for name in TABLES})
        shutil.copyfile(source.path / SELFTEST, folder / SELFTEST)
        write_manifest(
            folder, spec=spec, recipe=recipe, variant=source.variant, graphs={},
            provenance=derived_provenance(source, "onnx", "numpy"),
            quantization=source.manifest.get("quantization"),
            engines={NAME: {**builder.facts, "precision": precision, "profiles": described}},
            progress=progress,
        )  # fmt: skip
    return Bundle.open(output, progress)


class Builder:
    """One library, set up for one target."""

    def __init__(self, library: ModuleType, target: Target, progress: Progress) -> None:
        self._trt, self._target, self._progress = library, target, progress
        self._rtx = target.package == "tensorrt_rtx"
        self._log = _log_of(library)
        version = tuple(int(part) for part in library.__version__.split(".")[:2])
        self.in_place = self._rtx or version >= _IN_PLACE_SINCE

    @property
    def facts(self) -> dict[str, Any]:
        """What the engines were made with and need, for the manifest."""
        return {
            "library": self._target.package,
            "version": self._trt.__version__,
            "sms": list(self._target.sms),
            "driver": driver_version(),
            "in_place": self.in_place,
            "builder": {"strongly_typed": True, "tf32": False},
        }

    def build(self, path: Path, what: str) -> bytes:
        """The plan of an ONNX graph. Raises EngineError with the end of the builder's log."""
        with _signals_noted() as noted:
            return self._build(path, what, noted)

    def _build(self, path: Path, what: str, noted: list[int]) -> bytes:
        """`build`; it ends early when a signal is noted."""
        trt = self._trt
        self._log.lines.clear()
        builder = trt.Builder(self._log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse_from_file(str(path)):
            errors = [str(parser.get_error(i)) for i in range(parser.num_errors)]
            raise EngineError(f"{what}: {self._name} cannot read the graph: {'; '.join(errors)}")
        config = builder.create_builder_config()
        config.clear_flag(trt.BuilderFlag.TF32)
        timings = self._timing_cache(config)
        monitor = config.progress_monitor = _monitor_of(trt)(what, self._progress, noted)
        if self._rtx:
            config.num_compute_capabilities = len(self._target.sms)
            for i, sm in enumerate(self._target.sms):
                config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
        else:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        plan = builder.build_serialized_network(network, config)
        if monitor.raised is not None:
            raise monitor.raised
        if plan is None and noted:
            raise EngineError(f"{what}: {self._name} was interrupted by signal {noted[0]}; start it again")
        if plan is None:
            tail = " | ".join(self._log.lines) or "it said nothing"
            raise EngineError(f"{what}: {self._name} could not build an engine; the end of its log: {tail}")
        if timings is not None:
            cache.write(self._timings_name, bytes(timings.serialize()))
        return bytes(plan)

    def describe(self, name: str, plan: bytes, expected: Mapping[str, str]) -> dict[str, Any]:
        """What the builder made of a graph. Raises EngineError if a layer is not what was asked for.

        TensorRT's inspector tells the types that layers give, not what products read: it is recorded, not judged.
        """
        if self._rtx:
            program = read_plan(plan)
            check_program(name, program, expected)
            return {"bytes": len(plan), **program.to_dict()}
        with _signals_noted():
            engine = self._trt.Runtime(self._log).deserialize_cuda_engine(plan)
        inspector = engine.create_engine_inspector()
        listing = json.loads(inspector.get_engine_information(self._trt.LayerInformationFormat.JSON))
        layers = [layer for layer in listing.get("Layers", ()) if isinstance(layer, dict)]
        types = Counter(output.get("Format/Datatype", "unknown") for layer in layers for output in layer["Outputs"])
        return {"bytes": len(plan), "layers": len(layers), "output_types": dict(types.most_common())}

    @property
    def _timings_name(self) -> str:
        return f"{self._target.package}-{self._trt.__version__}-sm{self._target.sms[0]}.timings"

    def _timing_cache(self, config: Any) -> Any:
        """TensorRT's, so that a second build need not time the same kernels; TensorRT-RTX would ask for a GPU."""
        if self._rtx:
            return None
        timings = config.create_timing_cache(cache.read(self._timings_name) or b"")
        config.set_timing_cache(timings, False)
        return timings

    @property
    def _name(self) -> str:
        return f"{self._target.package} {self._trt.__version__}"


def sentence(plan: Mapping[str, Any]) -> str:
    """What the manifest says of a plan, for people: `1.9 MiB, 11 kernels, fp16 x5`."""
    parts = [f"{plan['bytes'] / 2**20:.1f} MiB"]
    if "kernels" in plan:
        parts += [f"{plan['kernels']} kernels", *(f"{kind} x{count}" for kind, count in plan["products"].items())]
    return ", ".join(parts)


def check_program(name: str, program: Program, expected: Mapping[str, str]) -> None:
    """Raise EngineError unless every product is computed as asked for and none can overflow.

    With many rows a builder may turn weight-only integers into floats before the product: the same numbers, once an
    image. In the token loop that would cost what the integers were to save.
    """
    wrong = {
        layer: f"{kind} instead of {expected[layer]}"
        for layer, kind in program.products.items()
        if kind != expected.get(layer, kind) and not (name in ONCE_AN_IMAGE and expected[layer] in BITS)
    }
    if wrong:
        listed = ", ".join(f"{layer} {how}" for layer, how in wrong.items())
        raise EngineError(f"{name}: the builder did not do what was asked for: {listed}; please report this")
    if program.overflowing:
        raise EngineError(
            f"{name}: {len(program.overflowing)} INT8 products store unscaled sums as float16, which overflow; please "
            "report this"
        )


def _check(source: Bundle, precision: str, batches: tuple[int, ...], keep_onnx: Path | None) -> None:
    check_compilable(source)
    if precision not in PRECISIONS:
        raise RequestError(
            f"precision {precision!r}: known are {', '.join(PRECISIONS)}; INT8 and INT4 come from quantize"
        )
    if keep_onnx is not None and keep_onnx.exists():
        raise RequestError(f"{keep_onnx}: exists already; choose a new folder for the graphs")
    if keep_onnx is not None and source.path.resolve() in keep_onnx.resolve().parents:
        raise RequestError(f"{keep_onnx}: lies in {source.path}, which it would spoil; choose another folder")
    if not batches or min(batches) < 1:
        raise RequestError(f"batches must be at least 1, are {', '.join(map(str, batches)) or 'none'}")


def _table(array: np.ndarray[Any, Any]) -> PendingTensor:
    return PendingTensor(array.dtype, array.shape, lambda: array)


_LOGS: dict[str, Any] = {}


def _log_of(trt: ModuleType) -> Any:
    """The library's only logger: the first one it is given is the one it keeps."""
    if trt.__name__ not in _LOGS:

        class Log(trt.ILogger):  # type: ignore[name-defined,misc]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.lines: deque[str] = deque(maxlen=_LOG_LINES)

            def log(self, severity: Any, message: str) -> None:
                if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                    self.lines.append(message.strip())

        _LOGS[trt.__name__] = Log()
    return _LOGS[trt.__name__]


@contextmanager
def _signals_noted() -> Iterator[list[int]]:
    """What would interrupt Python within is noted, and interrupts it afterwards.

    Else it would be raised in one of the builder's callbacks, and the builder swallows what these raise.
    """
    noted: list[int] = []

    def note(number: int, frame: Any) -> None:
        noted.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    in_main = threading.current_thread() is threading.main_thread()  # no other may change them
    caught = [number for number, handler in before.items() if in_main and callable(handler)]
    for number in caught:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number in caught:
            signal.signal(number, before[number])
        for number in noted[:1]:
            signal.raise_signal(number)


def _monitor_of(trt: ModuleType) -> Any:
    """A progress monitor that reports the builder's phases, and stops it when interrupted or when reporting fails."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[name-defined,misc]
        def __init__(self, what: str, progress: Progress, noted: list[int]) -> None:
            trt.IProgressMonitor.__init__(self)
            self._what, self._progress, self._noted = what, progress, noted
            self._steps: dict[str, int] = {}
            self.raised: BaseException | None = None  # by `progress`; the builder would swallow it

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            try:
                self._progress(f"compiling {self._what}: {phase_name}", step + 1, self._steps.get(phase_name, 0))
            except BaseException as error:
                self.raised = error
            return self.raised is None and not self._noted

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

    return Monitor
