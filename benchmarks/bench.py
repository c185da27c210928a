"""`bar-edge bench`: prove that all contenders do the same work, time them in turn, say where the time went.

The report (schema: docs/benchmarking.md) is plain JSON; `tables.py`, `charts.py` and `page.py` show it.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from time import sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.benchmarks import energy, proof, verdicts
from bar_edge.benchmarks.contenders import Drawn
from bar_edge.benchmarks.figures import summarize
from bar_edge.benchmarks.machine import power_state
from bar_edge.benchmarks.measure import Contender, ContenderError, Report, Worker, stamp
from bar_edge.benchmarks.plan import FORMS, FP32, Entrant, Plan, name_of
from bar_edge.benchmarks.profiles import MAX_OVERHEAD
from bar_edge.runtime import engines
from bar_edge.runtime.errors import RequestError

FORMAT, FORMAT_VERSION = "bar-edge bench", 1
# Threads of whoever ran before spin on for a while: right after the matrix product of the machine's best, PyTorch's
# first token took around 100 ms in most rounds, and 16 where another contender came between.
_SETTLE_SECONDS = 0.2
_BEST = ("bytes_per_second", "flops_per_second")

Progress = Callable[[str, int, int], None]  # what comes next, pieces done, pieces in all
Images = dict[str, list[NDArray[np.uint8]]]  # contender -> the images [H, W, 3] of its last proof


def run(plan: Plan, progress: Progress) -> tuple[Report, Images]:
    """Carry out a plan. Contenders that fail are in the report with their reason; nothing is raised for them."""
    bench = _Bench(plan, progress)
    before = power_state()
    with ExitStack() as stack:
        bench.start(stack)
        for batch_size in plan.batch_sizes:
            bench.prove(batch_size)
            bench.time(batch_size)
        after = power_state()
        bench.explain()
    first = plan.bundles[0]
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
            "before": before, "after": after, "energy_sources": [meter.source for meter in bench.meters],
            "without_energy": bench.unmetered,
        },
        "machine_best": {name: {**summarize(samples), "samples": samples} for name, samples in bench.best.items()},
        "contenders": [run.to_dict() for run in bench.runs],
    }  # fmt: skip
    report["verdicts"] = verdicts.of_report(report, {name_of(bundle): bundle.manifest for bundle in plan.bundles})
    return report, bench.images


def _engine_states(plan: Plan) -> list[engines.Status]:
    names = {engine: None for bundle in plan.bundles for engine in plan.engines or bundle.engines}
    return [engines.status(name) for name in names]


class _Run:
    """One entrant on its way through the bench; `worker` is None before it starts and once it has failed."""

    def __init__(self, entrant: Entrant) -> None:
        self.entrant, self.name = entrant, entrant.contender.name
        self.state, self.reason = ("unavailable", entrant.unavailable) if entrant.unavailable else ("timed", "")
        self.worker: Worker | None = None
        self.load_seconds = 0.0
        self.proofs: list[dict[str, Any]] = []
        self.batches: list[dict[str, Any]] = []

    def fail(self, reason: str) -> None:
        self.state, self.reason, self.batches = "failed", reason, []
        if self.worker is not None:
            self.worker.stop()
        self.worker = None

    def to_dict(self) -> dict[str, Any]:
        described = {
            "name": self.name, "kind": self.entrant.kind, "precision": self.entrant.precision,
            "graphs": dict(self.entrant.graphs), "state": self.state, "reason": self.reason, "proofs": self.proofs,
        }  # fmt: skip
        return {**described, "load_seconds": self.load_seconds, "batches": self.batches} if self.batches else described


class _Bench:
    def __init__(self, plan: Plan, progress: Progress) -> None:
        self._plan, self._progress = plan, progress
        self.runs = [_Run(entrant) for entrant in plan.entrants()]
        self.meters, self.unmetered = energy.find_meters()
        self.best: dict[str, list[float]] = {name: [] for name in _BEST}
        self.images: Images = {}

    def start(self, stack: ExitStack) -> None:
        """Start everyone's process; all live until `stack` is closed, so that they can take turns."""
        threads = self._plan.threads
        for meter in self.meters:
            stack.callback(meter.close)
        described = Contender("machine", "bar_edge.benchmarks.contenders:Machine", {"threads": threads})
        self._machine = stack.enter_context(Worker(described, threads))
        for i, run in enumerate(self.runs):
            if run.state != "timed":
                continue
            self._progress(f"loading {run.name}", i, len(self.runs))
            try:
                run.worker = stack.enter_context(Worker(run.entrant.contender, threads))
            except ContenderError as error:
                run.fail(f"does not load: {error}")
            else:
                run.load_seconds = run.worker.load_seconds
                self._check_model(run, run.worker)

    def prove(self, batch_size: int) -> None:
        """Compare everyone's first images, which are not counted, with those of the reference."""
        reference: Drawn | None = None
        running = sorted(self._running(), key=lambda pair: pair[0].entrant.precision != FP32)
        for i, (run, worker) in enumerate(running):
            self._progress(f"proving {run.name}, batch {batch_size}", i, len(running))
            try:
                drawn, seconds = self._warm_up(run, worker, batch_size)
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

    def time(self, batch_size: int) -> None:
        """Whole images of everyone in turn, with the machine's best measured in every round."""
        samples: dict[str, dict[str, list[float]]] = {run.name: {} for run, _ in self._running()}
        joules: dict[str, dict[str, list[float]]] = {name: {} for name in samples}
        for round_number in range(self._plan.rounds):
            for name in _BEST:
                self.best[name].append(self._machine.call(name))
            for run, worker in self._running():
                self._progress(f"timing {run.name}, batch {batch_size}", round_number, self._plan.rounds)
                sleep(_SETTLE_SECONDS)
                before = [meter.joules() for meter in self.meters]
                try:
                    drawn = worker.call("draw", batch_size, self._plan.seed)
                except ContenderError as error:
                    run.fail(f"batch {batch_size}: {error}")
                    continue
                for meter, begin in zip(self.meters, before, strict=True):
                    used = (meter.joules() - begin) / batch_size
                    joules[run.name].setdefault(meter.source, []).append(used)
                for stage, seconds in drawn.seconds.items():
                    samples[run.name].setdefault(stage, []).extend(seconds)
        for run, worker in self._running():
            run.batches.append(_figures(batch_size, samples[run.name], joules[run.name]))
            run.batches[-1]["peak_rss_bytes"] = worker.peak_rss_bytes()
            run.batches[-1]["gpu_memory_bytes"] = energy.gpu_memory_bytes(worker.pid)

    def explain(self) -> None:
        """Split everyone's time by stage, in passes that nothing else is taken from."""
        bandwidth = max(self.best["bytes_per_second"])
        for run, worker in self._running():
            for batch in run.batches:
                batch_size = batch["batch_size"]
                self._progress(f"profiling {run.name}, batch {batch_size}", 0, 1)
                works = worker.call("traffic", batch_size)
                batch["work"] = works
                token = (works["trunk"]["bytes"] + works["head"]["bytes"]) / self._plan.bundles[0].spec.num_tokens
                batch["bytes_per_token"] = round(token)
                batch["fraction_of_bandwidth"] = token / bandwidth / batch["token"]["p50"]
                try:
                    split = worker.call("profile", batch_size, self._plan.seed)
                except ContenderError as error:
                    batch["stages"] = {"seconds": {}, "method": f"not split: {error}"}
                    continue
                batch["stages"] = split
                if (split["overhead"] or 1) <= MAX_OVERHEAD:
                    batch["roofline"] = _roofline(works, split["seconds"], bandwidth)

    def _running(self) -> list[tuple[_Run, Worker]]:
        return [(run, run.worker) for run in self.runs if run.worker is not None]

    def _check_model(self, run: _Run, worker: Worker) -> None:
        model = self._plan.bundles[0]
        if run.entrant.kind == "pytorch" and worker.call("spec") != model.spec:
            raise RequestError(f"the checkpoint is not that of {model.path}: their shapes differ; give its own")

    def _warm_up(self, run: _Run, worker: Worker, batch_size: int) -> tuple[Drawn, list[float]]:
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
    """By stage: what it read and computed a second, and the fraction of the machine's bandwidth."""
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
