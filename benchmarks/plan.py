"""What `bar-edge bench` is asked to measure, and the contenders that follow from it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bar_edge.benchmarks.measure import Contender
from bar_edge.runtime import engines
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines.onnxruntime import cpu_count
from bar_edge.runtime.errors import CompatibilityError, EngineError, RequestError

FP32 = "fp32"
CONTENDERS = "bar_edge.benchmarks.contenders"


@dataclass(frozen=True)
class Form:
    """A form of the PyTorch reference."""

    name: str
    precision: str
    dtype: str
    compiled: bool
    tf32: bool = False


FORMS = {
    "fp32": Form("PyTorch fp32", FP32, "float32", False),
    "tf32": Form("PyTorch TF32", "tf32", "float32", False, tf32=True),
    "bf16": Form("PyTorch bf16", "bf16", "bfloat16", False),
    "compiled": Form("PyTorch fp32 compiled", FP32, "float32", True),
    "compiled-bf16": Form("PyTorch bf16 compiled", "bf16", "bfloat16", True),
}
DEFAULT_FORMS = ("fp32", "bf16", "compiled")


@dataclass(frozen=True)
class Baseline:
    """A checkpoint, and which forms of the PyTorch reference take part."""

    generator: Path
    tokenizer: Path
    config: Path | None
    forms: tuple[str, ...] = DEFAULT_FORMS
    reference_timed: bool = True  # or fp32 draws only what the others are proven by


@dataclass(frozen=True)
class Entrant:
    """A contender with what is known of it beforehand. `unavailable` says why it cannot run here."""

    contender: Contender
    kind: str  # pytorch or bundle
    precision: str
    graphs: Mapping[str, str] = field(default_factory=dict)  # graph -> precision, of bundles
    unavailable: str = ""
    timed: bool = True


@dataclass(frozen=True)
class Plan:
    """What to measure: every bundle on each of `engines`, or, if that is empty, on the engines it was made for.

    Raises RequestError if the bundles are of different models or share a name, if an engine or a form is unknown, or
    if nothing draws in fp32: then nothing could be proven.
    """

    bundles: tuple[Bundle, ...]
    baseline: Baseline | None
    engines: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    rounds: int
    warmup: int
    threads: int
    seed: int
    command: str

    @classmethod
    def of(
        cls,
        bundles: Sequence[Bundle],
        *,
        engines: Sequence[str],
        batch_sizes: Sequence[int],
        threads: int,
        **others: Any,
    ) -> "Plan":
        """A plan from options: every batch size once and in rising order, `threads` 0 for all cores."""
        sizes = tuple(sorted(set(batch_sizes)))
        return cls(tuple(bundles), engines=tuple(engines), batch_sizes=sizes, threads=threads or cpu_count(), **others)

    def __post_init__(self) -> None:
        first = self.bundles[0]
        for bundle in self.bundles[1:]:
            if bundle.spec != first.spec or bundle.recipe != first.recipe:
                raise RequestError(f"{bundle.path} and {first.path} are different models; bench one model at a time")
        names = [name_of(bundle) for bundle in self.bundles]
        if twice := {name for name in names if names.count(name) > 1}:
            raise RequestError(f"two bundles are called {twice.pop()!r}; their names tell them apart, so rename one")
        for name in self.engines:
            if name not in engines.NAMES:
                raise RequestError(f"unknown engine {name!r}; known: {', '.join(engines.NAMES)}")
        for form in self.baseline.forms if self.baseline else ():
            if form not in FORMS:
                raise RequestError(f"unknown form of the baseline {form!r}; known: {', '.join(FORMS)}")
        if self.baseline is not None and FP32 not in self.baseline.forms:
            raise RequestError("the baseline takes part in fp32 too: its other forms are proven against that; add fp32")
        if not any(entrant.precision == FP32 for entrant in self.entrants()):
            raise RequestError(
                "nothing here draws in fp32, so nothing can be proven; add --baseline or the fp32 bundle"
            )

    def entrants(self) -> Iterator[Entrant]:
        """Everyone who takes part, the reference first."""
        if self.baseline is not None:
            for form in self.baseline.forms:
                yield self._pytorch(self.baseline, FORMS[form])
        for bundle in self.bundles:
            for engine in self.engines or bundle.engines:
                yield self._bundle(bundle, engine)

    def _pytorch(self, baseline: Baseline, form: Form) -> Entrant:
        arguments = {
            "generator": str(baseline.generator), "tokenizer": str(baseline.tokenizer),
            "config": str(baseline.config) if baseline.config else None, "recipe": asdict(self.bundles[0].recipe),
            "threads": self.threads, "dtype": form.dtype, "compiled": form.compiled,
            "tf32": form.tf32,
        }  # fmt: skip
        contender = Contender(form.name, f"{CONTENDERS}:PyTorch", arguments)
        timed = baseline.reference_timed or form != FORMS[FP32]
        return Entrant(contender, "pytorch", form.precision, timed=timed)

    def _bundle(self, bundle: Bundle, engine: str) -> Entrant:
        arguments = {"bundle": str(bundle.path), "engine": engine, "threads": self.threads}
        contender = Contender(f"{name_of(bundle)}, {engine}", f"{CONTENDERS}:OnEngine", arguments)
        precision = _precision(bundle, engine)
        graphs = {graph: str(entry["precision"]) for graph, entry in bundle.manifest["graphs"].items()}
        return Entrant(contender, "bundle", precision, graphs, _obstacle(bundle, engine))


def _obstacle(bundle: Bundle, engine: str) -> str:
    """Why a bundle cannot run on an engine here; empty if it can."""
    try:
        engines.choose(engine, bundle)
    except (CompatibilityError, EngineError) as error:
        return str(error)
    return ""


def _precision(bundle: Bundle, engine: str) -> str:
    """What it was quantized to, or else what its engine computes in."""
    computed = bundle.manifest.get("engines", {}).get(engine, {}).get("precision", FP32)
    return str(bundle.manifest.get("quantization", {}).get("precision", computed))


def name_of(bundle: Bundle) -> str:
    """The name of a bundle's folder, by which reports call it."""
    return bundle.path.absolute().name
