"""`bar-edge quantize`: an fp32 bundle and a calibration become a quantized bundle that says what it is.

Order of work: search each layer's smoothing and scales; write one scratch weights file that holds every layer both
ways; measure on this machine, graph by graph, whether integers are faster, and keep what is; write the bundle; read
the graphs back and refuse a layer that is not what it should be; draw the self-test. Nothing appears under its final
name before all of that has passed.
"""

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from bar_edge.calibration import sensitivity, smoothing
from bar_edge.calibration.observers import OBSERVERS
from bar_edge.calibration.probe import ProbeEngine, linear_layers
from bar_edge.calibration.quality import Recorded, probe, record, teacher_forced
from bar_edge.calibration.quantize import Choice, choose, quantizable, stored
from bar_edge.calibration.trajectories import Calibration, check_source, make_batch
from bar_edge.export.builder import GraphBuilder
from bar_edge.export.graphs import build_graphs, decode_graph, modulation_graph, step_graph
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import SELFTEST, Bundle, check_output, derived_provenance, publish, write_manifest
from bar_edge.runtime.engines.onnxruntime import Step, cpu_count, library, load_session
from bar_edge.runtime.errors import CalibrationError, EngineError
from bar_edge.runtime.precisions import BITS, FP16, FP32, INT8
from bar_edge.runtime.progress import Progress, silent
from bar_edge.runtime.sampling import Schedule, sample_token, to_fine_grid, to_uint8
from bar_edge.runtime.selftest import Record
from bar_edge.runtime.weights import PendingTensor, StoredTensor

PRECISIONS = (INT8, *BITS)
MANY_ROWS = ("modulation", "decode")  # graphs that run hundreds of rows at once: weight-only does not pay there
_FASTER = 1.05  # a quantized graph must be at least this much faster to be kept
_TIMED_RUNS = 20
_GRAPH_BYTES = 16 * 2**20
_SELFTEST_SEED, _SELFTEST_IMAGES = 1, 4
_HELD_OUT = 16  # images quality and budget are measured on
SENSITIVITY_PLOT = "sensitivity.png"


@dataclass(frozen=True)
class Timing:
    """fp32 against quantized, seconds per call on this machine."""

    graph: str
    fp32: float
    quantized: float
    kept: bool

    @property
    def sentence(self) -> str:
        """For people."""
        ratio = self.fp32 / self.quantized
        outcome = "kept" if self.kept else "not faster enough, kept fp32"
        if self.graph == "prefix":
            outcome = "goes with the trunk, whose layers it shares"
        measured = f"{self.quantized * 1e3:.1f} ms against {self.fp32 * 1e3:.1f} ms"
        other = {"trunk": "head", "head": "trunk"}.get(self.graph)
        whole = "" if other is None else f" for a token with its {other} in fp32"
        return f"{self.graph}: {ratio:.2f} x fp32 ({measured}{whole}), {outcome}"


def quantize_bundle(
    source: Bundle,
    calibration: Calibration,
    output: Path,
    *,
    precision: str,
    observer: str = "mse",
    asymmetric: bool = False,
    keep_fp32: tuple[str, ...] = (),
    keep_fp16: tuple[str, ...] = (),
    budget: float | None = None,
    measure: bool = True,
    force: bool = False,
    threads: int = 0,
    progress: Progress = silent,
) -> Bundle:
    """Quantize an fp32 bundle.

    Args:
        precision: `int8` (static W8A8), `int8-weight` or `int4-weight`; the last two concern trunk and head, while
            modulation and decoder, which run many rows at once, become `int8`.
        asymmetric: give static activations a zero point. A little closer to fp32, most where they are positive (after
            SiLU and GELU); TensorRT refuses such graphs.
        keep_fp32: linear layers to leave alone.
        keep_fp16: linear layers whose weights are stored as float16; ONNX Runtime computes them in fp32.
        budget: the fraction of decisions that may flip, teacher-forced on held-out trajectories; the most harmful
            layers of trunk and head stay fp32 until it holds.
        measure: keep a graph's fp32 form where it is not slower on this machine; off, everything is quantized.

    Raises CalibrationError for settings that do not fit, RequestError for a compiled bundle, EngineError if a graph is
    not what was asked for.
    """
    check_output(output, force=force, sources=[source.path])
    check_settings(source, precision=precision, observer=observer, keep=(*keep_fp32, *keep_fp16), budget=budget)
    calibration.check_bundle(source)
    spec = source.spec
    tensors = weights.open_weights(source.path)
    places = weights.read_places(source.path / weights.FILE_NAME)
    layers = linear_layers(spec, places)
    known = [layer for group in layers.values() for layer in group]
    wanted = {
        layer: INT8 if graph in MANY_ROWS else precision
        for graph, group in layers.items()
        for layer in group
        if layer not in (*keep_fp32, *keep_fp16) and quantizable(*places[f"{layer}.weight"].shape)
    }
    choices = _choices(tensors, wanted, calibration, observer=observer, asymmetric=asymmetric, progress=progress)
    smoothed: smoothing.Tensors = dict(tensors)
    for layer, choice in choices.items():
        if choice.factors is not None:
            smoothing.apply(smoothed, layer, choice.factors)
    halves = {f"{layer}.weight_fp16": smoothed[f"{layer}.weight"].astype(np.float16) for layer in keep_fp16}
    held = {**smoothed, **_quantized(smoothed, choices, calibration, progress), **halves}
    needed = 2 * sum(array.nbytes for array in held.values()) + _GRAPH_BYTES
    with publish(output, needed, force=force, sources=[source.path]) as folder:
        scratch = folder / "scratch"
        scratch.mkdir()
        places_both = write_weights(scratch, held, progress)
        bench = _Bench(source, scratch, places_both, threads)
        timings = _measure(bench, layers, wanted, spec.num_tokens, progress) if measure else []
        slow = {timing.graph for timing in timings if not timing.kept}
        final = {
            layer: wanted[layer]
            for graph, group in layers.items()
            if graph not in slow
            for layer in group
            if layer in wanted
        }
        if not final:
            raise CalibrationError(
                "nothing is faster quantized on this machine, so no bundle was written: "
                + "; ".join(timing.sentence for timing in timings)
                + ". To quantize for another machine, pass --no-measure"
            )
        recorded = _record(source, calibration, threads, progress)
        searched = None
        if budget is not None:
            in_step = {layer: final[layer] for group in ("trunk", "head") for layer in layers[group] if layer in final}
            sizes = {layer: places[f"{layer}.weight"].length for layer in in_step}
            both = _unpublished(source, scratch, source.graphs)
            fixed = {layer: kind for layer, kind in final.items() if layer not in in_step}
            searched = sensitivity.search(
                recorded, both, in_step, fixed, sizes, budget=budget, threads=threads, progress=progress
            )
            final = {layer: kind for layer, kind in final.items() if layer not in searched.kept_fp32}
            if not final:
                raise CalibrationError(
                    f"a budget of {budget:.2%} flips leaves nothing quantized, so no bundle was written"
                )
            if searched.harm:
                sensitivity.plot(searched, folder / SENSITIVITY_PLOT)
        final |= dict.fromkeys(keep_fp16, FP16)
        shutil.rmtree(scratch)
        unused = {f"{layer}.weight" for layer in final}
        unused |= {f"{layer}.{part}" for layer in set(wanted) - set(final) for part in _parts(wanted[layer])}
        placed = write_weights(folder, {name: held[name] for name in held if name not in unused}, progress)
        described = _write_graphs(folder, build_graphs(spec, placed, final), known, final)
        unpublished = _unpublished(source, folder, {name: entry["file"] for name, entry in described.items()})
        engine = ProbeEngine(unpublished, final, threads)
        quality = teacher_forced(recorded, engine, progress)
        _self_test(source, engine, progress).save(folder / SELFTEST)
        engine.close()
        quantization = {
            "precision": precision,
            "observer": observer,
            "activations": "asymmetric" if asymmetric else "symmetric",
            "calibration": {
                "data": calibration.plan.data, "images": calibration.plan.images, "seed": calibration.plan.seed,
                "bundle": calibration.bundle,
            },
            "timings": [timing.sentence for timing in timings],
            "quality": quality.to_dict(),
            "sensitivity": _sensitivity_entry(searched),
            "layers": {layer: _layer_entry(final.get(layer, FP32), choices.get(layer)) for layer in known},
        }  # fmt: skip
        write_manifest(
            folder, spec=spec, recipe=source.recipe, variant=source.variant, graphs=described,
            provenance=derived_provenance(source, "onnx", "onnxruntime", "numpy"), quantization=quantization,
            progress=progress,
        )  # fmt: skip
    return Bundle.open(output, progress)


def _choices(
    tensors: Mapping[str, NDArray[Any]], wanted: Mapping[str, str], calibration: Calibration, *, observer: str,
    asymmetric: bool, progress: Progress,
) -> dict[str, Choice]:  # fmt: skip
    """Smoothing and scales of every layer that becomes integers."""
    choices = {}
    for i, (layer, kind) in enumerate(wanted.items()):
        progress("choosing scales, layers", i, len(wanted))
        if layer not in calibration.stats:
            raise CalibrationError(f"the calibration has nothing for {layer}; it was collected from another model")
        choices[layer] = choose(
            calibration.stats[layer],
            np.asarray(tensors[f"{layer}.weight"]),
            kind,
            observer,
            foldable=bool(smoothing.producers(layer)),
            asymmetric=asymmetric,
        )
    return choices


def _write_graphs(
    folder: Path, graphs: Mapping[str, onnx.ModelProto], known: list[str], final: Mapping[str, str]
) -> dict[str, dict[str, str]]:
    """Save the graphs, read back what each layer became, and give their entries in the manifest."""
    described = {}
    for name, model in graphs.items():
        onnx.save(model, folder / f"{name}.onnx")
        onnx.checker.check_model(folder / f"{name}.onnx", full_check=True)
        found = read_precisions(model, known)
        if wrong := {layer: kind for layer, kind in found.items() if kind != final.get(layer, FP32)}:
            raise EngineError(f"{name}.onnx: layers are not what was asked for: {wrong}; please report this bug")
        described[name] = {"file": f"{name}.onnx", "precision": summary(found)}
    return described


def check_settings(
    source: Bundle, *, precision: str, observer: str, keep: tuple[str, ...], budget: float | None
) -> None:
    """Raise CalibrationError for settings that do not fit `source`, RequestError if that is compiled.

    Long work asks before it begins.
    """
    check_source(source)
    if precision not in PRECISIONS or observer not in OBSERVERS:
        raise CalibrationError(
            f"precision {precision!r} and observer {observer!r}: known are {', '.join(PRECISIONS)} "
            f"and {', '.join(OBSERVERS)}"
        )
    if budget is not None and not 0 <= budget <= 1:
        raise CalibrationError(f"the budget is a fraction of flips, 0 to 1, not {budget}")
    layers = linear_layers(source.spec, weights.read_places(source.path / weights.FILE_NAME))
    known = {layer for group in layers.values() for layer in group}
    if unknown := sorted(set(keep) - known):
        raise CalibrationError(f"unknown layers {', '.join(unknown)}; `bar-edge inspect` lists the layers of a bundle")


def _layer_entry(precision: str, choice: Choice | None) -> dict[str, Any]:
    if precision == FP32 or choice is None:
        return {"precision": precision}
    return {"precision": precision, "snr_db": round(choice.snr_db, 2), "smoothing": choice.strength}


def read_precisions(model: onnx.ModelProto, layers: list[str]) -> dict[str, str]:
    """What every linear layer of a graph is really executed in, by the operator that reads its weights."""
    wanted = set(layers)
    found: dict[str, str] = {}

    def visit(graph: onnx.GraphProto) -> None:
        dequantized: dict[str, str] = {}
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    visit(attribute.g)
            for name in node.input:
                layer, _, kind = name.rpartition(".")
                if layer not in wanted:
                    continue
                if node.op_type == "DequantizeLinear" and kind in ("weight_int8", "weight"):
                    bits = {onnx.TensorProto.UINT4: "int4-weight", onnx.TensorProto.UINT8: "int8-weight"}
                    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
                    dequantized[node.output[0]] = bits.get(types[name], INT8)
                    found[layer] = dequantized[node.output[0]]
                elif node.op_type == "MatMulIntegerToFloat" and kind == "weight_int8":
                    found[layer] = INT8
                elif node.op_type == "MatMulNBits" and kind.startswith("weight_blocks"):
                    found[layer] = {8: "int8-weight", 4: "int4-weight"}[int(kind.removeprefix("weight_blocks"))]
                elif kind == "weight_fp16":
                    found[layer] = FP16
                elif kind == "weight":
                    found.setdefault(layer, FP32)

    visit(model.graph)
    return found


def summary(found: Mapping[str, str]) -> str:
    """`int8 x96, fp32 x1`; `fp32` for a graph without linear layers."""
    return ", ".join(f"{kind} x{count}" for kind, count in Counter(found.values()).most_common()) or FP32


def write_weights(folder: Path, arrays: Mapping[str, NDArray[Any]], progress: Progress) -> dict[str, StoredTensor]:
    """Write a weights file of arrays that are held already; returns their places."""
    pending = {
        name: PendingTensor(array.dtype, array.shape, lambda array=array: array)  # type: ignore[misc]
        for name, array in arrays.items()
    }
    header, places = weights.lay_out(pending)
    done, total = 0, sum(place.length for place in places.values())
    with (folder / weights.FILE_NAME).open("wb") as file:
        for _, size in weights.write(file, header, places, pending):
            done += size
            progress("writing weights", done, total)
    return places


def _parts(precision: str) -> tuple[str, ...]:
    """Suffixes of the tensors a layer is stored as (`export/linear.py`)."""
    if precision == INT8:
        return ("weight_int8", "weight_scale", "input_scale", "input_zero_point")
    return (f"weight_blocks{BITS[precision]}", "block_scale")


def _quantized(
    smoothed: smoothing.Tensors, choices: Mapping[str, Choice], calibration: Calibration, progress: Progress
) -> dict[str, NDArray[Any]]:
    """The stored tensors of every chosen layer, and the zero points that weight-only layers share."""
    arrays: dict[str, NDArray[Any]] = {}
    zero_points = {4: 0, 8: 0}
    for i, (layer, choice) in enumerate(choices.items()):
        progress("quantizing, layers", i, len(choices))
        mean_square = calibration.stats[layer].mean_square
        if choice.factors is not None:
            mean_square = mean_square / choice.factors**2
        arrays |= stored(layer, choice, np.asarray(smoothed[f"{layer}.weight"]), mean_square)
        if choice.precision in BITS:
            bits = BITS[choice.precision]
            zero_points[bits] = max(zero_points[bits], -(-arrays[f"{layer}.block_scale"].size * bits // 8))
    for bits, value in ((4, 0x88), (8, 0x80)):
        if zero_points[bits]:
            arrays[f"zero_points{bits}"] = np.full(zero_points[bits], value, dtype=np.uint8)
    return arrays


def _measure(
    bench: "_Bench", layers: Mapping[str, list[str]], wanted: Mapping[str, str], tokens: int, progress: Progress
) -> list[Timing]:
    """Time every graph in fp32 and quantized; what is kept is what makes an image faster.

    Trunk and head are parts of one graph, timed by what their layers change in it. The prefix runs the trunk's layers
    over many positions at once, and shares their fate.
    """

    def timed(part: str, graph: str) -> tuple[float, float]:
        progress("measuring graphs", len(timings), len(layers) + 1)
        return bench.seconds(graph, {}, {layer: wanted[layer] for layer in layers[part] if layer in wanted})

    timings: list[Timing] = []
    for part in filter(lambda part: any(layer in wanted for layer in layers[part]), ("modulation", "decode", "head")):
        fp32, ours = timed(part, "step" if part == "head" else part)
        timings.append(Timing(part, fp32, ours, kept=fp32 / ours >= _FASTER))
    if any(layer in wanted for layer in layers["trunk"]):
        prefix, step = timed("trunk", "prefix"), timed("trunk", "step")
        of_image = [once + tokens * each for once, each in zip(prefix, step, strict=True)]
        kept = of_image[0] / of_image[1] >= _FASTER
        timings += [Timing("prefix", *prefix, kept), Timing("trunk", *step, kept)]
    return timings


def _record(source: Bundle, calibration: Calibration, threads: int, progress: Progress) -> list[Recorded]:
    """Held-out fp32 trajectories: the seed after the one that was calibrated on."""
    engine = probe(source, threads)
    try:
        return record(engine, source, images=_HELD_OUT, seed=calibration.plan.seed + 1, progress=progress)
    finally:
        engine.close()


def _unpublished(source: Bundle, folder: Path, graphs: Mapping[str, str]) -> Bundle:
    return Bundle(folder, source.spec, source.recipe, source.variant, graphs, {})


def _sensitivity_entry(found: sensitivity.Sensitivity | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "budget": found.budget,
        "flips_before": found.before.flips,
        "flips_after": found.after.flips,
        "kept_fp32": list(found.kept_fp32),
        "kl_alone": {layer: float(f"{kl:.3g}") for layer, kl in found.harm.items()},
    }


class _Bench:
    """Seconds per call of a graph in two precisions: batch 1 with guidance, in the middle of an image.

    The two take turns, and the fastest call of each counts: beside another program, medians of a few calls say more
    about that program than about the graph.
    """

    def __init__(self, source: Bundle, folder: Path, places: Mapping[str, StoredTensor], threads: int) -> None:
        self._source, self._folder, self._places, self._threads = source, folder, places, threads

    def seconds(self, graph: str, first: Mapping[str, str], second: Mapping[str, str]) -> tuple[float, float]:
        """Seconds with layers in the precisions of `first` and of `second`."""
        runs = [self._run(graph, precisions) for precisions in (first, second)]
        times: list[list[float]] = [[], []]
        for _ in range(_TIMED_RUNS):
            for run, taken in zip(runs, times, strict=True):
                begin = time.perf_counter()
                run()
                taken.append(time.perf_counter() - begin)
        return min(times[0]), min(times[1])

    def _run(self, graph: str, precisions: Mapping[str, str]) -> Callable[[], Any]:
        ort, spec, recipe = library(), self._source.spec, self._source.recipe
        build = {"modulation": modulation_graph, "decode": decode_graph}.get(graph, step_graph)
        model = build(GraphBuilder(self._places, precisions, onnxruntime=True), spec).SerializeToString()
        session = load_session(ort, model, self._threads or cpu_count(), self._folder)
        if graph == "modulation":
            feeds = {"class_id": np.zeros(1, dtype=np.int64), "positions": np.arange(min(64, spec.num_tokens))}
            return lambda: session.run(None, feeds)
        if graph == "decode":
            bits = np.zeros((1, spec.image_seq_len, spec.token_size), dtype=np.float32)
            return lambda: session.run(None, {"bits": bits})
        rows = 2 if recipe.guidance > 1 else 1
        if graph == "prefix":
            prefix = Step(ort, session, spec, rows, rows, 1, spec.prefix_length - 1)
            prefix.set_filled(spec.prefix_length - 1)
            return prefix.run
        step = Step(ort, session, spec, rows, 1, len(recipe.allocation), 1)
        step.temperature[:, 0] = 1
        step.remask_count[:, 0] = Schedule.of(recipe, spec.bits_per_token).remask_count
        step.set_filled(spec.prefix_length + spec.num_tokens // 2)
        return step.run


def _self_test(source: Bundle, engine: ProbeEngine, progress: Progress) -> Record:
    """Draw images on the quantized graphs and record the one whose closest decision is farthest from a tie."""
    spec, recipe = source.spec, source.recipe
    class_id = 207 % spec.num_classes
    batch = make_batch(source, np.full(_SELFTEST_IMAGES, class_id), _SELFTEST_SEED, range(_SELFTEST_IMAGES))
    drawn = np.empty((_SELFTEST_IMAGES, spec.num_tokens, spec.bits_per_token), dtype=np.uint8)
    margins = np.full(_SELFTEST_IMAGES, np.inf)
    schedule = Schedule.of(recipe, spec.bits_per_token)
    for n, step in engine.probe_walk(batch):
        step.run()
        drawn[:, n] = step.drawn
        logits = step.seen["logits"]
        _, margin = sample_token(
            lambda known, bits, s, logits=logits: logits[s], schedule, 1.0, step.gumbel_bits, step.gumbel_confidence
        )
        margins = np.minimum(margins, margin)
        progress("self-test: drawing", n + 1, spec.num_tokens)
    bits = to_fine_grid(drawn, spec)
    best = int(margins.argmax())
    latent, first_logits = engine.last_latents()[best].copy(), step.seen["row_logits"][0, best].copy()
    image = to_uint8(engine.decode(bits[best : best + 1]))[0]
    return Record(_SELFTEST_SEED, best, class_id, bits[best], latent, first_logits, image)
