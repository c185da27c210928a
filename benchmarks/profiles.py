"""Where the time of an image goes: prefix, trunk, head passes, sampling, decoder, host.

Measured in a pass of its own, because looking costs time: the wall time of that pass is told beside the split, and no
other figure comes from it but the times of tokens on a GPU. ONNX Runtime runs trunk, head and sampling as one graph, so
the split adds up the kernel times of its profiler by what each node computes; a GPU of ours is asked by events around
the parts of the loop; PyTorch is split by timers around its modules. The host's part is what remains: noise, buffers,
dispatch, and the profiler itself.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch
from bar_edge.runtime.engines.cuda.gpu_engine import GpuEngine
from bar_edge.runtime.engines.cuda.timeline import Timeline
from bar_edge.runtime.engines.onnxruntime import OnnxRuntimeEngine
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import NoiseSource, RecordedNoise, SeededNoise
from bar_edge.runtime.sampling import to_fine_grid, to_uint8
from bar_edge.runtime.spec import ModelSpec, Recipe

STAGES = ("prefix", "trunk", "head", "sampling", "decode", "host")
MAX_OVERHEAD = 1.5  # profiled over unprofiled time; beyond it the split shows the profiler more than the model
_STEP = "onnxruntime_step"
_KERNEL = "_kernel_time"  # what ONNX Runtime's profiler appends to a node's name
_LAST_OF_TRUNK, _LAST_OF_HEAD = "latent_condition_proj.bias", "lm_head.output_embed.bias"

Bits = NDArray[np.uint8]
Sample = Callable[[NDArray[np.int64], NoiseSource, Any], Bits]


class Clock(Protocol):
    """What the parts of an image are timed with: the host's clock, or a GPU's."""

    on_gpu: bool

    def mark(self) -> Any:
        """This moment."""

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to another."""


class HostClock:
    """Where everything is done when a call returns."""

    on_gpu = False

    def mark(self) -> float:
        """Seconds."""
        return time.perf_counter()

    def seconds(self, begin: float, end: float) -> float:
        """From one mark to another."""
        return end - begin


class TorchEvents:
    """CUDA events in PyTorch's stream, which nobody waits for before the end."""

    on_gpu = True

    def mark(self) -> Any:
        """An event that is recorded."""
        import torch

        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """From one event to another; waits for them."""
        end.synchronize()
        return 1e-3 * float(begin.elapsed_time(end))


@dataclass(frozen=True)
class StageSplit:
    """Seconds of one batch by stage; a stage that could not be told apart is missing and `method` says so."""

    seconds: dict[str, float]
    wall_seconds: float
    method: str
    overhead: float | None = None  # wall time over that of an unprofiled batch just before; None: timers only
    token_seconds: list[float] | None = None  # where the host does not hear of tokens while an image is timed


class SplitGenerator(Generator):
    """A generator that tells where a batch's time goes, if its engine runs on a GPU."""

    def split(self, class_ids: NDArray[np.int64], noise: SeededNoise) -> StageSplit:
        """Split one batch. Raises EngineError on an engine without a timeline."""
        engine = self._running()
        if not isinstance(engine, GpuEngine):
            raise EngineError(f"engine {engine.name} does not tell its stages apart")
        batch = self._batch(class_ids, self.bundle.recipe, noise)

        def seconds_of(timeline: Timeline | None) -> float:
            begin = time.perf_counter()
            to_uint8(engine.draw(batch, timeline=timeline)[1])
            return time.perf_counter() - begin

        with self._lock:
            for timeline in (None, Timeline(engine.device)):
                seconds_of(timeline)  # what is captured once is captured
            unsplit = seconds_of(None)
            timeline = Timeline(engine.device)
            wall = seconds_of(timeline)
            spans = timeline.seconds()
        seconds = {stage: sum(of_stage) for stage, of_stage in spans.items()}
        seconds["host"] = wall - sum(seconds.values())
        tokens = np.add(spans["trunk"], spans["head"]).reshape(-1, self.spec.num_tokens).sum(axis=0)
        method = (
            "CUDA events around what each part puts into the stream, a token as two graphs; the trunk's includes the "
            "head's modulation, the head's sampling, the prefix's all other modulation; the host's part is the wall "
            "time that lies in none"
        )
        return StageSplit(seconds, wall, method, wall / unsplit, tokens.tolist())


def split_onnxruntime(bundle: Bundle, threads: int, class_ids: NDArray[np.int64], noise: SeededNoise) -> StageSplit:
    """Split one batch of a bundle on ONNX Runtime."""
    unprofiled = _unprofiled_seconds(bundle, threads, class_ids, noise)
    with tempfile.TemporaryDirectory() as folder:
        profiled = _ProfiledEngine(bundle, threads, Path(folder))
        try:
            profiled.draw(_batch(bundle, class_ids, noise))  # sessions start, and what is computed once is computed
            profiled.reset_timers()
            begin = time.perf_counter()
            drawn = profiled.sample(_batch(bundle, class_ids, noise))
            bits = to_fine_grid(drawn, bundle.spec)
            sampled = time.perf_counter()
            to_uint8(profiled.decode(bits))
            end = time.perf_counter()
            runs = _runs(profiled.step_events())
        finally:
            profiled.close()
    stage_of = stages_of_nodes(bundle.graph(_STEP))
    runs = runs[len(runs) // 2 :]  # the first half is the image drawn before
    prefix, tokens = runs[: -bundle.spec.num_tokens], runs[-bundle.spec.num_tokens :]
    seconds = dict.fromkeys(STAGES, 0.0)
    seconds["prefix"] = sum(sum(_by_stage(run, stage_of).values()) for run in prefix)
    seconds["prefix"] += profiled.timers["onnxruntime_modulation"]
    for run in tokens:
        for stage, value in _by_stage(run, stage_of).items():
            seconds[stage] += value
    seconds["head"] += profiled.timers["mask_ratio"]
    seconds["decode"] = end - sampled
    seconds["host"] = end - begin - sum(seconds.values())
    method = (
        "kernel times of ONNX Runtime's profiler, grouped by the part of the graph they belong to; modulation, "
        "computed ahead for many positions, counts as prefix; the host's part is the rest, the profiler included"
    )
    return StageSplit(seconds, end - begin, method, (end - begin) / unprofiled)


def split_pytorch(
    owner: Any,
    sample: Sample,
    decode: Callable[[Bits], NDArray[np.float32]],
    spec: ModelSpec,
    recipe: Recipe,
    class_ids: NDArray[np.int64],
    noise: NoiseSource,
    *,
    compiled: bool,
    clock: Clock,
) -> StageSplit:
    """Split one batch of the reference. `owner` is the generator, or the sampler with the compiled functions.

    With the clock of a GPU, tokens are timed here as well, from the second on.
    """
    if compiled:
        sample(class_ids, noise, None)  # compiles
        parts = ((owner, "prefix", "prefix"), (owner, "trunk", "trunk"), (owner, "head", "head"))
        method = "timers around the compiled functions; the head's one includes sampling"
    else:
        parts = (
            (owner, "prefix_latents", "prefix"), (owner, "token_latents", "trunk"), (owner.lm_head, "forward", "head"),
        )  # fmt: skip
        method = "timers around modules; sampling is the rest of the token loop"
    if clock.on_gpu:
        method = method.replace("timers", "CUDA events")
        method += "; these are CUDA graphs" if compiled else "; what the GPU waits for the host's launches is in each"
    begin = time.perf_counter()
    recorded = RecordedNoise(*noise.uniforms(spec.num_tokens, len(recipe.allocation), spec.bits_per_token))
    noised = time.perf_counter()
    stamps: list[Any] = []

    def stamp(done: int, total: int) -> None:
        if clock.on_gpu:
            stamps.append(clock.mark())

    with _timers(parts, clock) as spans:
        bits = sample(class_ids, recorded, stamp)
    sampled = time.perf_counter()
    seconds = {stage: sum(clock.seconds(*pair) for pair in of_stage) for stage, of_stage in spans.items()}
    before_decode = time.perf_counter()
    pixels = decode(bits)
    decoded = time.perf_counter()
    to_uint8(pixels)
    end = time.perf_counter()
    loop = sampled - noised - sum(seconds.values())
    host = (noised - begin) + (end - decoded)
    wall = (sampled - begin) + (end - before_decode)
    if compiled:
        host += loop
    else:
        seconds["sampling"] = loop
    tokens = [clock.seconds(*pair) for pair in pairwise(stamps)] or None
    return StageSplit({**seconds, "decode": decoded - before_decode, "host": host}, wall, method, token_seconds=tokens)


def stages_of_nodes(path: Path) -> dict[str, str]:
    """Which stage each node of the fused step graph belongs to: trunk, head or sampling."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    stage_of = _split_at(graph.node, _LAST_OF_TRUNK, "trunk", "head")
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                stage_of |= _split_at(attribute.g.node, _LAST_OF_HEAD, "head", "sampling")
    return stage_of


def _split_at(nodes: Sequence[Any], weight: str, upstream: str, others: str) -> dict[str, str]:
    """`upstream` for the node that reads `weight` and all it depends on, `others` for the rest."""
    maker = {output: node for node in nodes for output in node.output if output}
    waiting = [node for node in nodes if weight in node.input]
    found: set[str] = set()
    while waiting:
        node = waiting.pop()
        if node.name not in found:
            found.add(node.name)
            waiting += [maker[name] for name in node.input if name in maker]
    return {node.name: upstream if node.name in found else others for node in nodes}


class _TimedSession:
    """A session whose calls are timed."""

    def __init__(self, session: Any, timers: dict[str, float], name: str) -> None:
        self._session, self._timers, self._name = session, timers, name

    def run(self, outputs: Any, feeds: Mapping[str, Any]) -> Any:
        begin = time.perf_counter()
        result = self._session.run(outputs, feeds)
        self._timers[self._name] += time.perf_counter() - begin
        return result


class _ProfiledEngine(OnnxRuntimeEngine):
    """The engine with ONNX Runtime's profiler on its step graph and timers around the other graphs."""

    def __init__(self, bundle: Bundle, threads: int, folder: Path) -> None:
        super().__init__(bundle, threads)
        self._folder = folder
        self.timers = dict.fromkeys(self._paths, 0.0)

    def reset_timers(self) -> None:
        self.timers.update(dict.fromkeys(self.timers, 0.0))

    def step_events(self) -> list[dict[str, Any]]:
        """End profiling and give every event of the step graph."""
        recorded = Path(self._sessions[_STEP].end_profiling()).read_text(encoding="utf-8")
        events: list[dict[str, Any]] = json.loads(recorded)
        return events

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            session = super()._session(graph)
            if graph == _STEP:  # again, with the options that the engine chose and the profiler
                options = session.get_session_options()
                options.enable_profiling = True
                options.profile_file_prefix = str(self._folder / graph)
                providers = session.get_providers()
                del session, self._sessions[graph]
                session = self._ort.InferenceSession(self._paths[graph], options, providers=providers)
            else:
                session = _TimedSession(session, self.timers, graph)
            self._sessions[graph] = session
        return self._sessions[graph]


def _unprofiled_seconds(bundle: Bundle, threads: int, class_ids: NDArray[np.int64], noise: SeededNoise) -> float:
    """A batch without the profiler, at the same hour: the machine may have been faster when images were timed."""
    engine = OnnxRuntimeEngine(bundle, threads)
    try:
        engine.draw(_batch(bundle, class_ids, noise))
        begin = time.perf_counter()
        to_uint8(engine.draw(_batch(bundle, class_ids, noise))[1])
        return time.perf_counter() - begin
    finally:
        engine.close()


def _batch(bundle: Bundle, class_ids: NDArray[np.int64], noise: SeededNoise) -> Batch:
    return Batch(class_ids, bundle.recipe, noise, noise.orders(bundle.spec.num_tokens))


def _runs(events: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The kernels of each run of a session, in order of execution; control flow is left out, its inner nodes are in."""
    kernels = sorted((e for e in events if e["name"].endswith(_KERNEL)), key=lambda event: event["ts"])
    whole = sorted((e for e in events if e["name"] == "model_run"), key=lambda event: event["ts"])
    runs: list[list[Mapping[str, Any]]] = []
    position = 0
    for run in whole:
        end = run["ts"] + run["dur"]
        first = position
        while position < len(kernels) and kernels[position]["ts"] <= end:
            position += 1
        runs.append([k for k in kernels[first:position] if k["args"]["op_name"] not in ("Scan", "Loop", "If")])
    return runs


def _by_stage(run: Iterable[Mapping[str, Any]], stage_of: Mapping[str, str]) -> dict[str, float]:
    """Seconds by stage. A node that an optimizer made belongs where the node before it does."""
    seconds: dict[str, float] = {}
    stage = "trunk"
    for kernel in run:
        stage = stage_of.get(kernel["name"].removesuffix(_KERNEL), stage)
        seconds[stage] = seconds.get(stage, 0.0) + kernel["dur"] * 1e-6
    return seconds


@contextmanager
def _timers(parts: Iterable[tuple[Any, str, str]], clock: Clock) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """Mark begin and end of every call of (object, method) under a stage's name while the block runs."""
    spans: dict[str, list[tuple[Any, Any]]] = {}
    before = []
    for owner, method, stage in parts:
        spans[stage] = []
        before.append((owner, method, owner.__dict__.get(method)))
        setattr(owner, method, _timed(getattr(owner, method), spans[stage], clock))
    try:
        yield spans
    finally:
        for owner, method, own in before:
            if own is None:
                delattr(owner, method)
            else:
                setattr(owner, method, own)


def _timed(function: Callable[..., Any], spans: list[tuple[Any, Any]], clock: Clock) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        begin = clock.mark()
        result = function(*arguments, **named)
        spans.append((begin, clock.mark()))
        return result

    return call
