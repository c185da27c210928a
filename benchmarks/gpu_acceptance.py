"""Does it work on this GPU, and how fast is it? One command, one JSON, within a budget of 8 minutes.

    python -m bar_edge.benchmarks.gpu_acceptance -o acceptance.json

From the root of a checkout, on a machine with an NVIDIA GPU and a PyTorch that runs on it; nothing is downloaded. It
imports numpy, pillow, torch, onnx, onnxruntime, safetensors, packaging, pyyaml, ml_dtypes, rich, typer, cuda-bindings
(with NVRTC), nvidia-ml-py for GPU memory and energy, and pytest for the kernels' tests; torch.compile needs triton and
a C compiler. Where bar-edge is not installed, a link and what setuptools (77 or newer) writes about a package will do:

    mkdir site && ln -s "$PWD" site/bar_edge
    python -c "import setuptools; setuptools.setup()" -q egg_info --egg-base site
    PYTHONPATH=site python -m bar_edge.benchmarks.gpu_acceptance -o acceptance.json

Parts, in order: which engines work here and why the others do not; the tests of our kernels that run on a GPU; the demo
as it is and quantized, led along what ONNX Runtime draws; products of our own beside PyTorch's; random weights in
published shapes, fp16 and with 8-bit weights, timed by `bench` beside PyTorch on the GPU, alone; the token of the
first, kernel by kernel, and what fusing could gain; then beside compiled PyTorch, replayed as CUDA graphs; then in
growing batches. What fails is in the report with its reason, and the other parts go on; what runs on the GPU runs in
processes of its own, which are killed where they hang. A part for which too little of the budget is left is in the
report as not run. The report is written anew, whole, after every part.

It takes about 20 GB of memory and 30 GB under TMPDIR. Not yet run on a GPU.
"""

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from bar_edge.benchmarks import gpu_products, gpu_token, tables
from bar_edge.benchmarks.bench import Bench
from bar_edge.benchmarks.eight_bit import eight_bit
from bar_edge.benchmarks.measure import Contender, ContenderError, Report, Worker, save, stamp
from bar_edge.benchmarks.plan import Baseline, Plan
from bar_edge.benchmarks.random_checkpoint import random_generator, random_tokenizer, write_checkpoint
from bar_edge.calibration.quantizer import PRECISIONS, quantize_bundle
from bar_edge.calibration.trajectories import collect, make_plan
from bar_edge.export import demo
from bar_edge.export.compile import compile_bundle
from bar_edge.export.exporter import export_bundle
from bar_edge.export.prepack import prepack_bundle
from bar_edge.runtime import engines, selftest
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.cuda.device import driver_version, host_sm
from bar_edge.runtime.engines.cuda.module import compile_model
from bar_edge.runtime.engines.onnxruntime import cpu_count
from bar_edge.runtime.errors import BarEdgeError, EngineError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.spec import VARIANTS
from bar_edge.runtime.tables import redirected_width
from bar_edge.runtime.terminal import run_function

_MODULE = "bar_edge.benchmarks.gpu_acceptance"  # by which other processes know it, also where it is run as a command
_KERNEL_TESTS = ("-q", "tests/runtime/engines/cuda", "-k", "gpu and not cubin", "-p", "no:cacheprovider")
_TOLD_LINES = 20  # of the tests' output: what failed, and why tests were skipped
_DEMO_IMAGES, _DEMO_CALIBRATION = 16, 8
_EAGER, _COMPILED = ("fp32", "tf32", "bf16"), ("fp32", "compiled-bf16")  # fp32 proves the others and is not timed
_ROUNDS, _FEWER_ROUNDS = 5, 2  # of single images, and of larger batches
_LEAST_SECONDS = 1.0  # that everyone draws in a round: NVML counts energy in steps of about a tenth
# What a part is reckoned to take at most on an H200 with 16 cores, not measured yet: it is not begun if less is left.
# Eager PyTorch launches about 1,000 kernels a token whatever the batch, 3 to 5 s for BAR-B; compiling takes a minute.
_SECONDS = {"kernels": 60, "demo": 60, "products": 40, "bundles": 90, "token": 40}
_EAGER_SECONDS = {"bar_b": 120, "bar_b_patch4": 60}  # batch 1, and processes
_COMPILED_SECONDS = {"bar_b": 110, "bar_b_patch4": 90}
_BATCH_SECONDS = {"bar_b": 100, "bar_b_patch4": 45}  # a larger batch, and processes
_HANGS = 2  # times what a part is reckoned to take: then its process is killed
_ANSWER_SECONDS = 150  # then a contender is: the longest answer, compiling and drawing, should take half of that


@dataclass(frozen=True)
class Made:
    """A variant with random weights: its checkpoint, its bundles for the engines here, and which could not be made."""

    checkpoint: tuple[Path, Path, Path]
    bundles: tuple[Bundle, ...]
    refused: Mapping[str, str]


class Acceptance:
    """The report on its way: parts, a budget for them, and a file that always has what there is."""

    def __init__(self, output: Path, console: Console, *, budget: float, command: str) -> None:
        """`budget` in seconds, from now on."""
        self._output, self._console, self._budget, self._begin = output, console, budget, time.monotonic()
        self.report: Report = {
            **stamp(command), "commit": _commit(), "sm": host_sm(), "driver_cuda": driver_version(),
            "budget_seconds": budget, "parts": {},
        }  # fmt: skip

    def tell(self, what: str, done: int, total: int) -> None:
        """What comes next within a part."""
        self._console.print(f"  {what}", highlight=False)

    def part(self, name: str, seconds: float, work: Callable[[], Any], *, key: str | None = None) -> Any:
        """Do one part, which takes so many seconds, and keep what it gives under its key; None if it gave nothing."""
        begin, found = time.monotonic(), None
        left = self._begin + self._budget - begin
        if left < seconds:
            outcome = f"not run: out of time, it takes up to {seconds:.0f} s and {max(left, 0):.0f} s were left"
        else:
            self._console.print(f"{name} …", highlight=False)
            try:
                found = work()
            except Exception as error:  # whatever it is: the other parts go on
                outcome = f"failed: {type(error).__name__}: {error}"
            else:
                outcome = "done"
                self.report[key or name] = found
        self.report["parts"][name] = {"outcome": outcome, "seconds": round(time.monotonic() - begin, 1)}
        self._console.print(f"{name}: {outcome}", highlight=False)
        save(self.report, self._output)
        return found


def accept(acceptance: Acceptance, folder: Path, variants: Sequence[str], batches: Sequence[int]) -> None:
    """All parts, with what they make in `folder`; what tells most comes first, if there is no time for all."""
    acceptance.part("engines", 0, _engines)
    with ThreadPoolExecutor(len(variants)) as pool:
        making = {name: pool.submit(_making, name, folder / name) for name in variants}
        acceptance.part("kernels", _SECONDS["kernels"], _kernels)
        acceptance.part("demo", _SECONDS["demo"], lambda: _demo(folder))
        made = {name: _made(acceptance, name, worker) for name, worker in making.items()}
    acceptance.part("products", _SECONDS["products"], lambda: _products(folder))
    for name, one in made.items():
        _time(acceptance, name, one, _EAGER, (1,), _EAGER_SECONDS[name])
    acceptance.part("token", _SECONDS["token"], lambda: _token(made[variants[0]], folder))
    for name, one in made.items():
        _time(acceptance, f"{name}, compiled PyTorch", one, _COMPILED, (1,), _COMPILED_SECONDS[name])
    for name, one in made.items():
        _time(acceptance, f"{name}, batched", one, _EAGER, batches, _BATCH_SECONDS[name])


class Maker:
    """`make` as a contender: its process is not waited for while the GPU is not timed."""

    def __init__(self, *, name: str, folder: str) -> None:
        self._name, self._folder = name, Path(folder)

    def made(self) -> Made:
        """What `make` makes."""
        return make(self._name, self._folder)


def make(name: str, folder: Path) -> Made:
    """Random weights of a variant, exported, 8-bit weights as well, and compiled for the engines that work here."""
    known = VARIANTS[name]
    checkpoint = folder / "checkpoint"
    write_checkpoint(checkpoint, known.spec, known.recipe, random_generator(known.spec), random_tokenizer(known.spec))
    files = (checkpoint / "generator.bin", checkpoint / "tokenizer.bin", checkpoint / "config.yaml")
    exact = export_bundle(*files, folder / f"{name}-fp16")
    bundles, refused = [], {}
    for source in (exact, eight_bit(exact, folder / f"{name}-int8-weight")):
        for engine, found in compiled(source):
            if isinstance(found, Bundle):
                bundles.append(found)
            else:
                refused[f"{source.path.name}, {engine}"] = found
        shutil.rmtree(source.path)  # gigabytes, and ONNX Runtime is not timed here
    return Made(files, tuple(bundles), refused)


def compiled(source: Bundle) -> Iterator[tuple[str, Bundle | str]]:
    """The bundle for every GPU engine that is usable here, beside its source, or why it could not be made."""
    makers = {
        "cuda": lambda output: prepack_bundle(source, output),
        "tensorrt": lambda output: compile_bundle(source, output, target="host", host_sm=host_sm()),
    }
    for name, maker in makers.items():
        if engines.status(name).usable:
            try:
                yield name, maker(source.path.with_name(f"{source.path.name}-{name}"))
            except BarEdgeError as error:
                yield name, str(error)


def judged(source: Bundle, made: Bundle) -> dict[str, Any]:
    """The self-test, and decisions beside those of ONNX Runtime from the same past with the same noise."""
    classes, noise = np.arange(_DEMO_IMAGES) % source.spec.num_classes, SeededNoise(3, range(_DEMO_IMAGES))
    try:
        with Generator(source, engine="onnxruntime") as reference, Generator(made) as ours:
            bits = reference.sample(classes, source.recipe, noise)
            led = ours.sample(classes, source.recipe, noise, history=bits)
            drawn, again = (ours.sample(classes, source.recipe, noise) for _ in range(2))
            alone = ours.sample(classes[:1], source.recipe, noise.part(0, 1))
            return {
                "self_test": selftest.run(ours).to_dict(),
                "decisions": bits.size,
                "decisions_differing": int((led != bits).sum()),
                "same_bits_again": bool((again == drawn).all()),
                "same_bits_in_any_batch": bool((drawn[:1] == alone).all()),
            }
    except BarEdgeError as error:
        return {"failed": str(error)}


class Judge:
    """`judged` as a contender: after an error of CUDA its process can do nothing more, and no other bundle is in it."""

    def __init__(self, *, source: str, made: str) -> None:
        self._source, self._made = Bundle.open(Path(source)), Bundle.open(Path(made))

    def verdict(self) -> dict[str, Any]:
        """What `judged` says."""
        return judged(self._source, self._made)


def summary(report: Report) -> Iterator[Any]:
    """What was found, as tables."""
    parts = tables.plain("parts", "part", "outcome", "s")
    for name, part in report["parts"].items():
        parts.add_row(name, part["outcome"], f"{part['seconds']:.0f}")
    yield parts
    found = tables.plain("the demo beside ONNX Runtime", "bundle", "engine", "decisions differing", "self-test")
    for name, made in report.get("demo", {}).items():
        for engine, verdict in made.items():
            if "failed" in verdict:
                found.add_row(name, engine, "failed", verdict["failed"])
            else:
                differing = f"{verdict['decisions_differing']:,} of {verdict['decisions']:,}"
                found.add_row(name, engine, differing, verdict["self_test"]["sentence"])
    yield found
    if "products" in report:
        yield gpu_products.table([gpu_products.Figure.from_dict(figure) for figure in report["products"]])
    if "token" in report:
        yield from gpu_token.tables(report["token"])
    for measured in report.values():
        if isinstance(measured, dict) and "contenders" in measured:
            yield from tables.tables(measured)


def _engines() -> dict[str, Any]:
    """Every engine, and whether it works here or why not. Compiles our kernels, which all processes then find."""
    states = [engines.status(name) for name in engines.NAMES]
    sm = host_sm()
    if sm is not None and any(state.usable for state in states if state.name == "cuda"):
        compile_model(sm)
    return {state.name: {"usable": state.usable, "detail": state.detail} for state in states}


def _kernels() -> dict[str, Any]:
    """The kernels' own tests, those of them that run on the GPU; the others run in continuous integration."""
    if importlib.util.find_spec("pytest") is None:
        raise EngineError("pytest is not installed; the kernels' tests need it")
    command = [sys.executable, "-m", "pytest", *_KERNEL_TESTS]
    done = _run(command, "kernels")
    counts = done.stdout.strip().rpartition("\n")[2]  # pytest is content where every test was skipped
    told = (done.stdout + done.stderr).strip().splitlines()[-_TOLD_LINES:]
    passed = done.returncode == 0 and " skipped" not in counts
    return {"passed": passed, "summary": told, "command": shlex.join(command[1:])}


def _demo(folder: Path) -> dict[str, dict[str, Any]]:
    """The demo's bundle and its quantized forms on every engine."""
    with demo.data() as data:
        exact = export_bundle(data / "generator.bin", data / "tokenizer.bin", data / "config.yaml", folder / "demo")
    sources: dict[str, Bundle | str] = {"fp32": exact}
    plan = make_plan(exact.spec, images=_DEMO_CALIBRATION, seed=1000, batch_size=_DEMO_CALIBRATION)
    calibration = collect(exact, plan)
    for precision in PRECISIONS:
        try:
            output = folder / f"demo-{precision}"
            sources[precision] = quantize_bundle(exact, calibration, output, precision=precision, measure=False)
        except BarEdgeError as error:
            sources[precision] = str(error)
    with ThreadPoolExecutor() as pool:  # at once: if all hang, that takes no longer than one
        judging = {
            name: {engine: pool.submit(_judged_apart, source, made) for engine, made in compiled(source)}
            for name, source in sources.items()
            if isinstance(source, Bundle)
        }
    return {
        name: {"quantize": {"failed": source}}
        if isinstance(source, str)
        else {engine: verdict.result() for engine, verdict in judging[name].items()}
        for name, source in sources.items()
    }


def _judged_apart(source: Bundle, made: Bundle | str) -> dict[str, Any]:
    """`judged` in a process of its own, or why there is no verdict."""
    if isinstance(made, str):
        return {"failed": made}
    judge = Contender(made.path.name, f"{_MODULE}:Judge", {"source": str(source.path), "made": str(made.path)})
    try:
        with Worker(judge, 1, _SECONDS["demo"]) as worker:
            verdict: dict[str, Any] = worker.call("verdict")
            return verdict
    except ContenderError as error:
        return {"failed": str(error)}


def _products(folder: Path) -> list[dict[str, Any]]:
    """`gpu_products`."""
    found: list[dict[str, Any]] = _apart("products", "gpu_products", (), folder)["products"]
    return found


def _token(made: Made | None, folder: Path) -> Report:
    """`gpu_token` of what the engine `cuda` runs."""
    bundles = [bundle for bundle in made.bundles if "cuda" in bundle.engines] if made else []
    if not bundles:
        raise EngineError("there is no bundle of it for the engine cuda")
    return _apart("token", "gpu_token", [str(bundle.path) for bundle in bundles], folder)


def _apart(part: str, program: str, arguments: Sequence[str], folder: Path) -> Report:
    """The report of a benchmark, in a process that gives the GPU's memory back."""
    output = folder / f"{part}.json"
    command = [sys.executable, "-m", f"bar_edge.benchmarks.{program}", *arguments, "-o", str(output)]
    done = _run(command, part)
    if done.returncode:
        raise EngineError("\n".join(done.stderr.strip().splitlines()[-_TOLD_LINES:]))
    report: Report = json.loads(output.read_text())
    return report


def _run(command: Sequence[str], part: str) -> "subprocess.CompletedProcess[str]":
    """Run a part of the acceptance and keep what it says. Raises TimeoutExpired where it hangs."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_HANGS * _SECONDS[part])


def _making(name: str, folder: Path) -> Worker:
    """Begin to make a variant, and leave cores to what goes on beside it."""
    contender = Contender(name, f"{_MODULE}:Maker", {"name": name, "folder": str(folder)})
    worker = Worker(contender, max(1, cpu_count() // 4), _HANGS * _SECONDS["bundles"])
    worker.begin("made")
    return worker


def _made(acceptance: Acceptance, name: str, making: "Future[Worker]") -> Made | None:
    """Wait for a variant; the report says what of it could not be made."""
    kept: list[Made] = []

    def wait() -> dict[str, Any]:
        with making.result() as worker:
            kept.append(worker.answer())
        return {"bundles": [bundle.path.name for bundle in kept[0].bundles], "refused": dict(kept[0].refused)}

    acceptance.part(f"{name}, bundles", _SECONDS["bundles"], wait)
    return kept[0] if kept else None


def _time(
    acceptance: Acceptance,
    name: str,
    made: Made | None,
    forms: tuple[str, ...],
    batches: Sequence[int],
    seconds: float,
) -> None:
    """A bench of a variant's bundles beside forms of PyTorch, a part of so many seconds for every batch size."""
    with ExitStack() as stack:
        running: list[Bench] = []

        def start() -> Bench:
            if made is None or not made.bundles:
                raise EngineError("there is no bundle of it for an engine that works here")
            plan = Plan.of(
                made.bundles, baseline=Baseline(*made.checkpoint, forms=forms, reference_timed=False), engines=(),
                batch_sizes=batches, rounds=_ROUNDS, warmup=1, threads=0, seed=0, command=acceptance.report["command"],
            )  # fmt: skip
            return stack.enter_context(Bench(plan, acceptance.tell, load_together=True, answer_seconds=_ANSWER_SECONDS))

        def measure(batch_size: int) -> Report:
            if not running:
                running.append(start())
            running[0].measure(batch_size, _ROUNDS if batch_size == 1 else _FEWER_ROUNDS, _LEAST_SECONDS)
            running[0].explain()
            return running[0].report()

        for batch_size in sorted(set(batches)):
            acceptance.part(f"{name}, batch {batch_size}", seconds, partial(measure, batch_size), key=name)


def _commit() -> dict[str, Any] | None:
    """The commit of the tree and whether it was changed since; None where git does not answer."""

    def ask(*question: str) -> str:
        return subprocess.run(["git", *question], capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"hash": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def main(
    output: Annotated[Path, typer.Option("-o", "--output", help="JSON to write.")],
    batches: Annotated[list[int], typer.Option("--batch", min=2, help="Beside 1; repeat.")] = [8, 64],  # noqa: B006
    minutes: Annotated[float, typer.Option(help="Parts that would end later are not begun.")] = 8,
) -> None:
    """Run everything and write the report."""
    if host_sm() is None:
        raise EngineError(f"no NVIDIA GPU answers here, so there is nothing to accept: {engines.status('cuda').detail}")
    console = Console(width=redirected_width())
    command = f"python -m bar_edge.benchmarks.gpu_acceptance {shlex.join(sys.argv[1:])}"
    acceptance = Acceptance(output, console, budget=60 * minutes, command=command)
    with tempfile.TemporaryDirectory() as folder:
        accept(acceptance, Path(folder), tuple(_EAGER_SECONDS), batches)
    for table in summary(acceptance.report):
        console.print(table)


if __name__ == "__main__":
    run_function(main)
