"""The ONNX Runtime engine: the default, which needs nothing but the CPU.

One call of the fused step graph per token, bound once to buffers that stay where they are: the KV cache is the same
memory as input and output. The prefix runs through the same graph, all but its last position at once; the last
position is the step that draws the first token. Modulation is computed ahead for many positions in one product
(docs/model.md section 6), the unconditional class only once.
"""

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch, TokenProgress
from bar_edge.runtime.errors import CompatibilityError, EngineError
from bar_edge.runtime.noise import gumbel
from bar_edge.runtime.sampling import Schedule, guidance_at, to_fine_grid, to_raster
from bar_edge.runtime.spec import FIRST_CLASS_SYMBOL, ModelSpec

MINIMUM_VERSION = (1, 24)
NAME = "onnxruntime"
_MODULATION, _MASK_RATIO, _STEP, _DECODE = (
    "onnxruntime_modulation",
    "mask_ratio",
    "onnxruntime_step",
    "onnxruntime_decode",
)
MODULATION_BYTES = 32 * 2**20  # of one chunk: large enough for full-speed products, small beside any model
UNCONDITIONAL_BYTES = 256 * 2**20  # keep the unconditional modulation if it is not larger (BAR-B: 128 MB)
PREFIX_ROWS = 4  # rows whose prefix runs together: bounds the activations
DECODE_IMAGES = 8
_CPUINFO = Path("/proc/cpuinfo")

Floats = NDArray[np.float32]


def status() -> tuple[bool, str]:
    """(usable, versions or reason)."""
    try:
        ort = library()
    except EngineError as error:
        return False, str(error)
    int8 = "" if exact_int8_products() else "; no VNNI instructions, so quantized bundles are refused"
    return True, f"onnxruntime {ort.__version__} on the CPU, {cpu_count()} cores{int8}"


def start(bundle: Bundle, threads: int, stream: Any = None) -> "OnnxRuntimeEngine":
    """An engine on a verified bundle. `threads` 0 means all cores. Raises EngineError, CompatibilityError."""
    if stream is not None:
        raise EngineError("a CUDA stream was given, and onnxruntime runs on the CPU; leave it out")
    static = {layer["precision"] for layer in bundle.manifest.get("quantization", {}).get("layers", {}).values()}
    if "int8" in static and not exact_int8_products():
        raise CompatibilityError(
            f"{bundle.path}: has static INT8 layers, and this processor has no VNNI instructions, without which ONNX "
            "Runtime's INT8 products saturate silently; run the fp32 bundle here"
        )
    engine = OnnxRuntimeEngine(bundle, threads)
    engine.load()
    return engine


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exact_int8_products() -> bool:
    """Whether ONNX Runtime's unsigned-by-signed INT8 products are exact here.

    On x86 without VNNI they add pairs of products in 16 bits, which saturates. Elsewhere, and where the system does not
    tell, they are taken to be exact; `bar-edge verify` would show otherwise.
    """
    if platform.machine().lower() not in ("x86_64", "amd64") or not _CPUINFO.exists():
        return True
    flags = next((line for line in _CPUINFO.read_text().splitlines() if line.startswith("flags")), "")
    return bool({"avx512_vnni", "avx_vnni"} & set(flags.split()))


class OnnxRuntimeEngine:
    """Samples and decodes with ONNX Runtime on the CPU. Sessions start with `load`, or when they are first needed."""

    name = NAME

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self.spec = bundle.spec
        self._ort = library()
        self._threads = threads or cpu_count()
        self._sessions: dict[str, Any] = {}
        self._step: Step | None = None
        self._modulation: _Modulation | None = None
        self._paths = {graph: bundle.graph(graph) for graph in (_MODULATION, _MASK_RATIO, _STEP, _DECODE)}

    def load(self) -> None:
        """Start every session: later, the files might be other ones than those that were verified."""
        for graph in self._paths:
            self._session(graph)

    def sample(
        self, batch: Batch, progress: TokenProgress | None = None, history: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        spec = self.spec
        images = len(batch.class_ids)
        drawn = np.empty((images, spec.num_tokens, spec.bits_per_token), dtype=np.uint8)
        with _enough_memory(images):
            for n, step in self.walk(batch, history):
                step.run()
                drawn[:, n] = step.drawn
                if progress is not None:
                    progress(n + 1, spec.num_tokens)
        return drawn

    def draw(self, batch: Batch, progress: TokenProgress | None = None) -> tuple[NDArray[np.uint8], Floats]:
        drawn = self.sample(batch, progress)
        return drawn, self.decode(to_fine_grid(to_raster(drawn, batch.orders), self.spec))

    def walk(self, batch: Batch, history: NDArray[np.uint8] | None = None) -> Iterator[tuple[int, "Step"]]:
        """Prepare the step of each token in turn; the caller runs it.

        The next token follows from `step.drawn`, or from `history` [B, N, K].
        """
        spec = self.spec
        images = len(batch.class_ids)
        u_bits, u_confidence = batch.noise.uniforms(spec.num_tokens, len(batch.recipe.allocation), spec.bits_per_token)
        schedule = Schedule.of(batch.recipe, spec.bits_per_token)
        guided = batch.recipe.guidance > 1
        unconditional = np.full_like(batch.class_ids, spec.unconditional_class)
        rows = np.concatenate((batch.class_ids, unconditional)) if guided else batch.class_ids
        copies = len(rows) // images
        targets = spec.prefix_length + np.tile(batch.orders, (copies, 1))  # [rows, N] table rows
        (ratio,) = self._session(_MASK_RATIO).run(None, {"mask_ratio": schedule.mask_ratio})
        if self._modulation is None:
            self._modulation = _Modulation(self._session(_MODULATION), spec)
        step = self._step_for(len(rows), images, len(schedule.mask_ratio))
        step.ratio_embedding[:] = ratio
        step.temperature[:, 0] = schedule.temperature
        step.remask_count[:, 0] = schedule.remask_count

        modulation = self._modulation.rows(rows)
        self._prefix(step, rows, targets[:, 0], self._modulation)
        last_prefix = spec.prefix_length - 1
        step.bits[:] = 0  # prefix positions carry none
        for n in range(spec.num_tokens):
            # the position before token n: the end of the prefix, then the token just drawn
            modulation.fill(last_prefix + n, step.modulation)
            step.symbols[:] = rows[:, None] + FIRST_CLASS_SYMBOL if n == 0 else spec.token_symbol
            step.positions[:] = last_prefix if n == 0 else targets[:, n - 1]
            step.targets[:] = targets[:, n]
            step.set_filled(last_prefix + n + 1)
            step.guidance[...] = guidance_at(n, batch.recipe.guidance, spec.num_tokens)
            step.gumbel_bits[:] = gumbel(u_bits[n])
            step.gumbel_confidence[:] = gumbel(u_confidence[n])
            yield n, step
            step.bits[:] = np.tile(step.drawn if history is None else history[:, n], (copies, 1))

    def last_latents(self) -> Floats:
        if self._step is None:
            raise EngineError("no token was sampled yet")
        return self._step.latent.copy()

    def decode(self, bits: NDArray[np.uint8]) -> Floats:
        size = self.spec.image_size
        if not len(bits):
            return np.empty((0, 3, size, size), dtype=np.float32)
        session = self._session(_DECODE)
        with _enough_memory(len(bits)):
            parts = [
                session.run(None, {"bits": bits[i : i + DECODE_IMAGES].astype(np.float32)})[0]
                for i in range(0, len(bits), DECODE_IMAGES)
            ]
            return np.concatenate(parts)

    def close(self) -> None:
        self._step = self._modulation = None
        self._sessions.clear()

    def make_step(self, rows: int, images: int, passes: int, positions: int) -> "Step":
        """Buffers for one call of the step graph."""
        return Step(self._ort, self._session(_STEP), self.spec, rows, images, passes, positions)

    def _prefix(
        self, step: "Step", rows: NDArray[np.int64], first_targets: NDArray[np.int64], modulation: "_Modulation"
    ) -> None:
        """Fill the cache with all prefix positions but the last. Equal (class, first target) rows run once."""
        spec = self.spec
        length = spec.prefix_length - 1
        pairs, where = np.unique(np.stack((rows, first_targets), axis=1), axis=0, return_inverse=True)
        where = where.reshape(-1)
        classes, class_of_pair = np.unique(pairs[:, 0], return_inverse=True)
        table = modulation.table(classes, 0, length)  # [F-1, 6L, U, D]
        for begin in range(0, len(pairs), PREFIX_ROWS):
            group = pairs[begin : begin + PREFIX_ROWS]
            count = len(group)
            prefix = self.make_step(count, count, 1, length)
            prefix.symbols[:, 0] = spec.first_position_symbol
            prefix.symbols[:, 1:] = group[:, :1] + FIRST_CLASS_SYMBOL
            prefix.positions[:] = np.tile(np.arange(length), count)
            prefix.targets[:] = np.repeat(group[:, 1], length)
            of_row = table[:, :, class_of_pair.reshape(-1)[begin : begin + count]]
            prefix.modulation[:] = of_row.transpose(1, 2, 0, 3).reshape(prefix.modulation.shape)
            prefix.set_filled(length)
            prefix.run()  # draws a token too, which nobody asks for: one pass of noise-free bits
            for row in np.flatnonzero((begin <= where) & (where < begin + count)):
                for full, filled in zip(step.caches, prefix.caches, strict=True):
                    full[row, :, :length] = filled[where[row] - begin, :, :length]

    def _step_for(self, rows: int, images: int, passes: int) -> "Step":
        if self._step is None or self._step.shape != (rows, images, passes):
            self._step = None  # release the old cache before the new one is allocated
            self._step = self.make_step(rows, images, passes, 1)
        return self._step

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            self._sessions[graph] = load_session(self._ort, self._paths[graph], self._threads)
        return self._sessions[graph]


class _Modulation:
    """Shift, scale and gate rows of any class at any position, computed in chunks of positions."""

    def __init__(self, session: Any, spec: ModelSpec) -> None:
        self._session = session
        self._spec = spec
        self._positions = spec.prefix_length + spec.num_tokens - 1
        self._bytes = 4 * 6 * spec.num_layers * spec.hidden_size  # of one class at one position
        self._unconditional: Floats | None = None

    def table(self, classes: NDArray[np.int64], begin: int, end: int) -> Floats:
        """[end - begin, 6L, U, D] for U classes."""
        feeds = {"class_id": classes, "positions": np.arange(begin, min(end, self._positions))}
        result: Floats = self._session.run(None, feeds)[0]
        return result

    def rows(self, rows: NDArray[np.int64]) -> "_ModulationRows":
        """Rows of one batch: `rows` [rows] class ids."""
        known = None
        if self._spec.unconditional_class in rows:
            known = self._unconditional_table()
        return _ModulationRows(self, rows, known, self._spec.unconditional_class)

    def chunk(self, classes: int) -> int:
        """Positions to compute at once for that many classes."""
        return max(1, MODULATION_BYTES // (self._bytes * max(1, classes)))

    def _unconditional_table(self) -> Floats | None:
        if self._unconditional is None and self._bytes * self._positions <= UNCONDITIONAL_BYTES:
            spec = self._spec
            table = np.empty((self._positions, 6 * spec.num_layers, spec.hidden_size), dtype=np.float32)
            chunk = self.chunk(1)
            for begin in range(0, self._positions, chunk):
                ids = np.array([spec.unconditional_class])
                table[begin : begin + chunk] = self.table(ids, begin, begin + chunk)[:, :, 0]
            self._unconditional = table
        return self._unconditional


class _ModulationRows:
    """One batch's view of the modulation: fills [6L, rows, D] for a position, in rising order of positions."""

    def __init__(self, source: _Modulation, rows: NDArray[np.int64], known: Floats | None, known_class: int) -> None:
        self._source = source
        self._known = known
        self._known_rows = np.flatnonzero(rows == known_class) if known is not None else np.empty(0, dtype=np.int64)
        self._other_rows = np.setdiff1d(np.arange(len(rows)), self._known_rows)
        self._classes, self._class_of_row = np.unique(rows[self._other_rows], return_inverse=True)
        self._begin = 0
        self._table: Floats | None = None

    def fill(self, position: int, out: Floats) -> None:
        if self._known is not None:
            out[:, self._known_rows] = self._known[position][:, None]
        if len(self._classes):
            if self._table is None or position >= self._begin + len(self._table):
                self._table = None
                self._begin = position
                end = position + self._source.chunk(len(self._classes))
                self._table = self._source.table(self._classes, position, end)
            out[:, self._other_rows] = self._table[position - self._begin][:, self._class_of_row]


class Step:
    """The step graph bound to buffers of a fixed shape: rows, images, passes, and positions T of each row.

    The public arrays are the graph's inputs and outputs: write into them, `run`, read from them.
    """

    def __init__(
        self, ort: ModuleType, session: Any, spec: ModelSpec, rows: int, images: int, passes: int, positions: int
    ) -> None:
        self.shape = (rows, images, passes)
        self._ort = ort
        self._session = session
        self._binding = session.io_binding()
        k, w, d, flat = spec.bits_per_token, spec.head_width, spec.hidden_size, rows * positions
        self.symbols = self.input("symbols", (rows, positions), np.int64)
        self.bits = self.input("bits", (flat, k), np.float32)
        self.positions = self.input("positions", (flat,), np.int64)
        self.targets = self.input("targets", (flat,), np.int64)
        self.modulation = self.input("modulation", (6 * spec.num_layers, flat, d), np.float32)
        self._last_position = self.input("last_position", (rows,), np.int32)
        self._filled = self.input("filled", (1,), np.int32)
        self.guidance = self.input("guidance", (), np.float32)
        self.ratio_embedding = self.input("ratio_embedding", (passes, w), np.float32)
        self.temperature = self.input("temperature", (passes, 1), np.float32)
        self.remask_count = self.input("remask_count", (passes, 1), np.int64)
        self.gumbel_bits = self.input("gumbel_bits", (passes, images, k, 2), np.float32)
        self.gumbel_confidence = self.input("gumbel_confidence", (passes, images, k), np.float32)
        self.drawn = self.output("drawn", (images, k), np.uint8)
        self.latent = self.output("latent", (rows, w), np.float32)
        shape = (rows, spec.num_heads, spec.prefix_length + spec.num_tokens, spec.head_dim)
        self.caches = [self._cache(f"{kind}_cache", i, shape) for i in range(spec.num_layers) for kind in ("k", "v")]

    def set_filled(self, filled: int) -> None:
        """Positions in the cache after this call."""
        self._filled[:] = filled
        self._last_position[:] = filled - 1

    def run(self) -> None:
        """Run the graph once."""
        self._session.run_with_iobinding(self._binding)

    def input(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A zeroed array that the graph reads as input `name`."""
        array = np.zeros(shape, dtype=dtype)
        self._binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def output(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        """A zeroed array that the graph writes output `name` to."""
        array = np.zeros(shape, dtype=dtype)
        self._binding.bind_ortvalue_output(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def _cache(self, name: str, layer: int, shape: tuple[int, ...]) -> Floats:
        array = np.zeros(shape, dtype=np.float32)
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        self._binding.bind_ortvalue_input(f"{name}.{layer}", value)
        self._binding.bind_ortvalue_output(f"{name}_out.{layer}", value)
        return array


def load_session(ort: ModuleType, model: Path | bytes, threads: int, folder: Path | None = None) -> Any:
    """A session of a graph file, or of a graph in memory whose external data lie in `folder`. Raises EngineError."""
    options = ort.SessionOptions()
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # The default spins so long that on a shared machine it takes the core the other thread needs: 87 ms a token became
    # 53 to 58 beside another process (BAR-B int8, 2 cores), and a quiet machine shows no difference (28.5 and 27.0).
    options.add_session_config_entry("session.intra_op.spin_duration_us", "100")
    options.log_severity_level = 3  # errors; what the runtime warns of is checked by tests instead
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = model if isinstance(model, Path) else f"a graph over {folder}"
        raise EngineError(f"onnxruntime {ort.__version__} cannot load {name}: {str(error).splitlines()[0]}") from error


@contextmanager
def _enough_memory(images: int) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise EngineError(f"too little memory for {images} images at once ({error}); draw fewer at once") from error


def library() -> ModuleType:
    """The module `onnxruntime`. Raises EngineError if it is not installed or too old.

    From 1.29 on its own builds report sessions to their maker unless this is set before it is imported; a device that
    runs a bundle reports to nobody unless its owner says so (`ORT_DISABLE_TELEMETRY=0`).
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        ort = import_module("onnxruntime")
    except ImportError as error:
        remedy = "pip install onnxruntime" if sys.version_info >= (3, 11) else "it needs Python 3.11 or newer"
        raise EngineError(f"onnxruntime is not installed ({error}); {remedy}") from error
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION))
        raise EngineError(f"onnxruntime {ort.__version__} is too old; pip install 'onnxruntime>={needed}'")
    return ort
