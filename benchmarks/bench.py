"""`bar-edge bench`: prove that all contenders do the same work, time them in turn, say where the time went.

The report (schema: docs/benchmarking.md) is plain JSON; `tables.py`, `charts.py` and `page.py` show it.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from time import sleep
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.benchmarks import energy, proof, verdicts
from bar_edge.benchmarks.contenders import Drawn
from bar_edge.benchmarks.figures import summarize
from bar_edge.benchmarks.machine import power_state
from bar_edge.benchmarks.measure import Contender, ContenderError, Report, Worker, stamp
from bar_edge.benchmarks.plan import CONTENDERS, FORMS, FP32, Entrant, Plan, name_of
from bar_edge.benchmarks.profiles import MAX_OVERHEAD
from bar_edge.runtime import engines
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.progress import Progress

FORMAT, FORMAT_VERSION = "bar-edge bench", 1
# Threads of whoever ran before spin on for a while: right after the matrix product of the machine's best, PyTorch's
# first token took around 100 ms in most rounds, and 16 where another contender came between.
_SETTLE_SECONDS = 0.2
_BEST = ("bytes_per_second", "flops_per_second")
_GPU_BEST = "gpu_bytes_per_second"

Images = dict[str, list[NDArray[np.uint8]]]  # contender -> the images [H, W, 3] of its last proof


def run(plan: Plan, progress: Progress) -> tuple[Report, Images]:
    """Carry out a plan. Contenders that fail are in the report with their reason; nothing is raised for them."""
    with Bench(plan, progress) as bench:
        for batch_size in plan.batch_sizes:
            bench.measure(batch_size, plan.rounds)
        bench.explain()
        return bench.report(), bench.images


def _engine_states(plan: Plan) -> list[engines.Status]:
    names = {engine: None for bundle in plan.bundles for engine in plan.engines or bundle.engines}
    return [engines.status(name) for name in names]


class _Run:
    """One entrant on its way through the bench; `worker` is None before it starts and once it has failed."""

    def __init__(self, entrant: Entrant) -> None:
        self.entrant, self.name = entrant, entrant.contender.name
        self.state, self.reason = "timed", ""
        if entrant.unavailable:
            self.state, self.reason = "unavailable", entrant.unavailable
        elif not entrant.timed:
            self.state, self.reason = "reference", "the others are proven by it; it is not timed"
        self.worker: Worker | None = None
        self.device: str | None = None
        self.load_seconds = 0.0
        self.proofs: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []

    def fail(self, reason: str) -> None:
        self.state, self.reason = "failed", reason
        if self.worker is not None:
            self.worker.stop()
        self.worker = None

    def to_dict(self) -> dict[str, Any]:
        described = {
            "name": self.name, "kind": self.entrant.kind, "precision": self.entrant.precision,
            "graphs": dict(self.entrant.graphs), "device": self.device, "state": self.state, "reason": self.reason,
            "proofs": self.proofs,
        }  # fmt: skip
        explained = [batch for batch in self.batches if "stages" in batch]
        return {**described, "load_seconds": self.load_seconds, "batches": explained} if explained else described


class Bench:
    """A plan on its way. Within `with` everyone's process lives, so that all can take turns.

    They load one after the other, or `load_together`, which is faster and makes their `load_seconds` those of a crowd.
    Who takes longer than `answer_seconds` to load or to answer has failed; None waits for everyone.
    """

    def __init__(
        self, plan: Plan, progress: Progress, *, load_together: bool = False, answer_seconds: float | None = None
    ) -> None:
        self._plan, self._progress, self._together = plan, progress, load_together
        self._answer_seconds = answer_seconds
        self._stack = ExitStack()
        self._runs = [_Run(entrant) for entrant in plan.entrants()]
        self._meters, self._unmetered = energy.find_meters()
        self._best: dict[str, list[float]] = {name: [] for name in _BEST}
        self._no_gpu_best = ""  # why there is none
        self._power = power_state()
        self.images: Images = {}

    def __enter__(self) -> "Bench":
        with ExitStack() as undo:
            self._start(undo)
            self._stack = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def measure(self, batch_size: int, rounds: int, least_seconds: float = 0) -> None:
        """Prove and time one batch size; in a round everyone draws for at least so many seconds."""
        self._prove(batch_size)
        self._time(batch_size, rounds, least_seconds)

    def report(self) -> Report:
        """All that has been measured so far, and explained."""
        plan, first = self._plan, self._plan.bundles[0]
        report = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            **stamp(plan.command),
            "settings": {
                "variant": first.variant, "model": first.spec.to_dict(),
                "recipe": {**asdict(first.recipe), "allocation": list(first.recipe.allocation)}, "seed": plan.seed,
                "batch_sizes": list(plan.batch_sizes), "rounds": plan.rounds, "warmup": plan.warmup,
                "threads": plan.threads,
            },
            "engines": {state.name: {"usable": state.usable, "detail": state.detail} for state in _engine_states(plan)},
            "power": {
                "before": self._power, "after": power_state(),
                "energy_sources": [meter.source for meter in self._meters], "without_energy": self._unmetered,
            },
            "machine_best": {name: {**summarize(of), "samples": of} for name, of in self._best.items() if of},
            **({"without_gpu_best": self._no_gpu_best} if self._no_gpu_best else {}),
            "contenders": [run.to_dict() for run in self._runs],
        }  # fmt: skip
        report["verdicts"] = verdicts.of_report(report, {name_of(bundle): bundle.manifest for bundle in plan.bundles})
        return report

    def explain(self) -> None:
        """Split everyone's time by stage where that was not done yet, in passes that nothing else is taken from."""
        for run, worker in self._running():
            for batch in run.batches:
                if "stages" not in batch:
                    self._progress(f"profiling {run.name}, batch {batch['batch_size']}", 0, 1)
                    self._explain(run, worker, batch)

    def _start(self, stack: ExitStack) -> None:
        for meter in self._meters:
            stack.callback(meter.close)
        described = Contender("machine", f"{CONTENDERS}:Machine", {"threads": self._plan.threads})
        self._machine = stack.enter_context(self._worker(described))
        waiting = [run for run in self._runs if not run.entrant.unavailable]
        loads = [partial(self._worker, run.entrant.contender) for run in waiting]
        with ThreadPoolExecutor(len(self._runs)) as pool:
            if self._together:
                loads = [pool.submit(load).result for load in loads]
            for i, (run, load) in enumerate(zip(waiting, loads, strict=True)):
                self._progress(f"loading {run.name}", i, len(loads))
                try:
                    run.worker = stack.enter_context(load())
                except ContenderError as error:
                    run.fail(f"does not load: {error}")
                else:
                    run.load_seconds = run.worker.load_seconds
                    run.device = run.worker.call("device")
                    self._check_model(run, run.worker)
        self._gpu = self._start_gpu(stack) if any(run.device == "gpu" for run in self._runs) else None

    def _worker(self, contender: Contender) -> Worker:
        return Worker(contender, self._plan.threads, self._answer_seconds)

    def _start_gpu(self, stack: ExitStack) -> Worker | None:
        try:
            gpu = stack.enter_context(self._worker(Contender("GPU", f"{CONTENDERS}:Gpu")))
        except ContenderError as error:
            self._no_gpu_best = f"the GPU's memory cannot be measured: {error}"
            return None
        self._best[_GPU_BEST] = []
        return gpu

    def _measure_best(self) -> None:
        for name in _BEST:
            self._best[name].append(self._machine.call(name))
        if self._gpu is not None:
            self._best[_GPU_BEST].append(self._gpu.call(_GPU_BEST))

    def _prove(self, batch_size: int) -> None:
        """Compare everyone's first images, which are not counted, with those of the reference."""
        reference: Drawn | None = None
        running = sorted(self._running(), key=lambda pair: pair[0].entrant.precision != FP32)
        for i, (run, worker) in enumerate(running):
            self._progress(f"proving {run.name}, batch {batch_size}", i, len(running))
            try:
                drawn, seconds = self._warm_up(worker, batch_size)
                if reference is None:
                    found = self._proof_of_reference(run, worker)
                    reference = drawn if found.passed else None
                else:
                    exact = run.entrant.precision == FP32
                    equal = bool((drawn.bits == reference.bits).all())
                    judgement = None if exact and equal else self._judge(drawn)
                    found = proof.compare(reference, drawn, judgement, exact=exact)
            except ContenderError as error:
                run.fail(f"batch {batch_size}: {error}")
                continue
            run.proofs.append({"batch_size": batch_size, "warmup_image_seconds": seconds, **asdict(found)})
            self.images[run.name] = list(drawn.pixels)
            if not found.passed:
                run.fail(f"batch {batch_size}: {found.sentence}")

    def _time(self, batch_size: int, rounds: int, least_seconds: float) -> None:
        """Whole images of everyone in turn, with the machine's best measured in every round."""
        samples: dict[str, dict[str, list[float]]] = {run.name: {} for run, _ in self._timed()}
        joules: dict[str, dict[str, list[float]]] = {name: {} for name in samples}
        for round_number in range(rounds):
            self._measure_best()
            for run, worker in self._timed():
                self._progress(f"timing {run.name}, batch {batch_size}", round_number, rounds)
                sleep(_SETTLE_SECONDS)
                before = [meter.joules() for meter in self._meters]
                try:
                    drawn = worker.call("draw", batch_size, self._plan.seed, least_seconds)
                except ContenderError as error:
                    run.fail(f"batch {batch_size}: {error}")
                    continue
                images = batch_size * len(drawn.seconds["image"])
                for meter, begin in zip(self._meters, before, strict=True):
                    used = (meter.joules() - begin) / images
                    joules[run.name].setdefault(meter.source, []).append(used)
                for stage, seconds in drawn.seconds.items():
                    samples[run.name].setdefault(stage, []).extend(seconds)
        for run, worker in self._timed():
            figures = _figures(batch_size, samples[run.name], joules[run.name])
            try:
                figures["peak_rss_bytes"] = worker.peak_rss_bytes()
            except ContenderError as error:
                run.fail(f"batch {batch_size}: {error}")
                continue
            figures["gpu_memory_bytes"] = energy.gpu_memory_bytes(worker.pid)
            run.batches.append(figures)

    def _explain(self, run: _Run, worker: Worker, batch: dict[str, Any]) -> None:
        """Where the time of a batch went, and what that was of the best that its device can do."""
        try:
            split = worker.call("profile", batch["batch_size"], self._plan.seed)
        except ContenderError as error:
            split = {"seconds": {}, "method": f"not split: {error}"}
        tokens = split.pop("token_seconds", None)
        if tokens:
            batch["token"] = summarize(tokens)
        batch["stages"] = split
        batch |= {"work": {}, "bytes_per_token": None, "fraction_of_bandwidth": None}
        try:
            works = worker.call("traffic", batch["batch_size"])
        except ContenderError as error:
            split["method"] += f"; {error}"
            return
        token = (works["trunk"]["bytes"] + works["head"]["bytes"]) / self._plan.bundles[0].spec.num_tokens
        batch |= {"work": works, "bytes_per_token": round(token)}
        best = self._best.get(_GPU_BEST if run.device == "gpu" else _BEST[0])
        if not best:
            return
        if "token" in batch:
            batch["fraction_of_bandwidth"] = token / max(best) / batch["token"]["p50"]
        if split["seconds"] and (split["overhead"] or 1) <= MAX_OVERHEAD:
            batch["roofline"] = _roofline(works, split["seconds"], max(best))

    def _running(self) -> list[tuple[_Run, Worker]]:
        return [(run, run.worker) for run in self._runs if run.worker is not None]

    def _timed(self) -> list[tuple[_Run, Worker]]:
        return [(run, worker) for run, worker in self._running() if run.entrant.timed]

    def _check_model(self, run: _Run, worker: Worker) -> None:
        model = self._plan.bundles[0]
        if run.entrant.kind == "pytorch" and worker.call("spec") != model.spec:
            raise RequestError(f"the checkpoint is not that of {model.path}: their shapes differ; give its own")

    def _warm_up(self, worker: Worker, batch_size: int) -> tuple[Drawn, list[float]]:
        drawn: Sequence[Drawn] = [
            worker.call("draw", batch_size, self._plan.seed) for _ in range(max(1, self._plan.warmup))
        ]
        return drawn[0], [one.seconds["image"][0] for one in drawn]

    def _proof_of_reference(self, run: _Run, worker: Worker) -> proof.Proof:
        """PyTorch in fp32 is the reference; without it, a fp32 bundle that draws what PyTorch drew at export."""
        if run.entrant.precision != FP32:
            return proof.refused("no fp32 contender ran, so there is nothing to compare it with")
        if run.entrant.kind == "bundle":
            tested = worker.call("self_test")
            if not tested["passed"]:
                return proof.refused(f"does not draw its recorded image: {tested['sentence']}")
        return proof.of_reference()

    def _judge(self, drawn: Drawn) -> Any:
        for run, worker in self._running():
            if run.name == FORMS[FP32].name:
                return worker.call("judge", drawn.bits, self._plan.seed)
        return None


def _figures(batch_size: int, samples: dict[str, list[float]], joules: dict[str, list[float]]) -> dict[str, Any]:
    images_per_second = 1 / float(np.median(samples["image"]))
    figures: dict[str, Any] = {"batch_size": batch_size, "images_per_second": images_per_second}
    for stage, values in samples.items():
        figures[stage] = summarize(values)
        if stage != "token":  # thousands of them: the percentiles must do
            figures[stage]["samples"] = values
    figures["joules_per_image"] = {source: summarize(values) for source, values in joules.items()}
    return figures


def _roofline(
    works: dict[str, dict[str, int]], seconds: dict[str, float], bandwidth: float
) -> dict[str, dict[str, float]]:
    """By stage: what it read and computed a second, and the fraction of the device's bandwidth."""
    return {
        stage: {
            "bytes_per_second": work["bytes"] / seconds[stage],
            "flops_per_second": work["flops"] / seconds[stage],
            "flops_per_byte": work["flops"] / work["bytes"],
            "fraction_of_bandwidth": work["bytes"] / seconds[stage] / bandwidth,
        }
        for stage, work in works.items()
        if seconds.get(stage)
    }
