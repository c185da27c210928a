"""The ONNX Runtime engine: the CPU default, in place of nothing and needing nothing else.

One call of the fused step graph per token, bound once to buffers that stay where they are: the KV cache is the same
memory as input and output. The prefix runs through the same graph, all but its last position at once; the last
position is the step that draws the first token. Modulation is computed ahead for many positions in one product
(docs/model.md section 6), the unconditional class only once.
"""

import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.engines import Batch, TokenProgress
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.noise import gumbel
from bar_edge.runtime.sampling import Schedule, guidance_at
from bar_edge.runtime.spec import ModelSpec

MINIMUM_VERSION = (1, 24)
NAME = "onnxruntime"
_MODULATION, _MASK_RATIO, _STEP, _DECODE = (
    "onnxruntime_modulation",
    "mask_ratio",
    "onnxruntime_step",
    "onnxruntime_decode",
)
_MODULATION_BYTES = 64 * 2**20  # of one chunk: large enough for full-speed products, small beside any model
_UNCONDITIONAL_BYTES = 256 * 2**20  # keep the unconditional modulation if it is not larger (BAR-B: 128 MB)
_PREFIX_ROWS = 4  # rows whose prefix runs together: bounds the activations
_DECODE_IMAGES = 8

Floats = NDArray[np.float32]


def status() -> tuple[bool, str]:
    """(usable, versions or reason)."""
    try:
        ort = _library()
    except EngineError as error:
        return False, str(error)
    return True, f"onnxruntime {ort.__version__} on the CPU, {cpu_count()} cores"


def start(bundle: Bundle, threads: int) -> "OnnxRuntimeEngine":
    """An engine on a verified bundle. `threads` 0 means all cores. Raises EngineError."""
    return OnnxRuntimeEngine(bundle, threads or cpu_count())


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class OnnxRuntimeEngine:
    """Samples and decodes with ONNX Runtime on the CPU. Sessions start when they are first needed."""

    name = NAME

    def __init__(self, bundle: Bundle, threads: int) -> None:
        self._ort = _library()
        self._bundle = bundle
        self._spec = bundle.spec
        self._threads = threads
        self._sessions: dict[str, Any] = {}
        self._step: _Step | None = None
        self._modulation: _Modulation | None = None
        self._paths = {graph: bundle.graph(graph) for graph in (_MODULATION, _MASK_RATIO, _STEP, _DECODE)}

    def sample(self, batch: Batch, progress: TokenProgress | None = None) -> NDArray[np.uint8]:
        spec = self._spec
        images, tokens = len(batch.class_ids), spec.num_tokens
        schedule = Schedule.of(batch.recipe, spec.bits_per_token)
        guided = batch.recipe.guidance > 1
        unconditional = np.full_like(batch.class_ids, spec.unconditional_class)
        rows = np.concatenate((batch.class_ids, unconditional)) if guided else batch.class_ids
        targets = spec.prefix_length + np.tile(batch.orders, (len(rows) // images, 1))  # [rows, N] table rows
        (ratio,) = self._session(_MASK_RATIO).run(None, {"mask_ratio": schedule.mask_ratio})
        if self._modulation is None:
            self._modulation = _Modulation(self._session(_MODULATION), spec)
        step = self._step_for(len(rows), images, len(schedule.mask_ratio))
        step.set_schedule(schedule, ratio)

        modulation = self._modulation.rows(rows)
        self._prefix(step, rows, targets[:, 0], self._modulation)
        drawn = np.empty((images, tokens, spec.bits_per_token), dtype=np.uint8)
        last_prefix = spec.prefix_length - 1
        step.bits[:] = 0  # prefix positions carry none
        for n in range(tokens):
            # the position before token n: the end of the prefix, then the token just drawn
            modulation.fill(last_prefix + n, step.modulation)
            step.symbols[:] = rows[:, None] + 3 if n == 0 else step.token_symbol
            step.positions[:] = last_prefix if n == 0 else targets[:, n - 1]
            step.targets[:] = targets[:, n]
            step.last_position[:] = last_prefix + n
            step.filled[:] = last_prefix + n + 1
            step.guidance[...] = guidance_at(n, batch.recipe.guidance, tokens)
            step.gumbel_bits[:] = gumbel(batch.u_bits[n])
            step.gumbel_confidence[:] = gumbel(batch.u_confidence[n])
            step.run()
            drawn[:, n] = step.drawn
            step.bits[:] = np.tile(step.drawn, (len(rows) // images, 1))
            if progress is not None:
                progress(n + 1, tokens)
        return drawn

    def last_latents(self) -> Floats:
        if self._step is None:
            raise EngineError("no token was sampled yet")
        return self._step.latent.copy()

    def decode(self, bits: NDArray[np.uint8]) -> Floats:
        session = self._session(_DECODE)
        parts = [
            session.run(None, {"bits": bits[i : i + _DECODE_IMAGES].astype(np.float32)})[0]
            for i in range(0, len(bits), _DECODE_IMAGES)
        ]
        return np.concatenate(parts)

    def close(self) -> None:
        self._step = self._modulation = None
        self._sessions.clear()

    def _prefix(
        self, step: "_Step", rows: NDArray[np.int64], first_targets: NDArray[np.int64], modulation: "_Modulation"
    ) -> None:
        """Fill the cache with all prefix positions but the last. Equal (class, first target) rows run once."""
        spec = self._spec
        length = spec.prefix_length - 1
        pairs, where = np.unique(np.stack((rows, first_targets), axis=1), axis=0, return_inverse=True)
        where = where.reshape(-1)
        classes, class_of_pair = np.unique(pairs[:, 0], return_inverse=True)
        table = modulation.table(classes, 0, length)  # [F-1, 6L, U, D]
        for begin in range(0, len(pairs), _PREFIX_ROWS):
            group = slice(begin, begin + _PREFIX_ROWS)
            count = len(pairs[group])
            symbols = np.full((count, length), spec.num_classes + 4)
            symbols[:, 1:] = pairs[group, :1] + 3
            feeds = {
                "symbols": symbols,
                "bits": np.zeros((count * length, spec.bits_per_token), dtype=np.float32),
                "positions": np.tile(np.arange(length), count),
                "targets": np.repeat(pairs[group, 1], length),
                "modulation": np.ascontiguousarray(
                    table[:, :, class_of_pair.reshape(-1)[group]].transpose(1, 2, 0, 3)
                ).reshape(table.shape[1], count * length, -1),
            }
            caches = step.run_prefix(feeds, count, length)
            for row, pair in enumerate(where):
                if begin <= pair < begin + count:
                    for full, filled in zip(step.caches, caches, strict=True):
                        full[row, :, :length] = filled[pair - begin, :, :length]

    def _step_for(self, rows: int, images: int, passes: int) -> "_Step":
        if self._step is None or self._step.shape != (rows, images, passes):
            self._step = None  # release the old cache before the new one is allocated
            self._step = _Step(self._ort, self._session(_STEP), self._spec, rows, images, passes)
        return self._step

    def _session(self, graph: str) -> Any:
        if graph not in self._sessions:
            self._sessions[graph] = _session(self._ort, self._paths[graph], self._threads)
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
        return max(1, _MODULATION_BYTES // (self._bytes * max(1, classes)))

    def _unconditional_table(self) -> Floats | None:
        if self._unconditional is None and self._bytes * self._positions <= _UNCONDITIONAL_BYTES:
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


class _Step:
    """The step graph bound to buffers for a fixed number of rows, images and passes.

    The public arrays are the graph's inputs and outputs: write into them, `run`, read from them.
    """

    def __init__(self, ort: ModuleType, session: Any, spec: ModelSpec, rows: int, images: int, passes: int) -> None:
        self._ort = ort
        self._session = session
        self._spec = spec
        self.shape = (rows, images, passes)
        self.token_symbol = spec.num_classes + 5
        self._binding = session.io_binding()
        k, w, d = spec.bits_per_token, spec.head_width, spec.hidden_size
        self.symbols = self._input("symbols", (rows, 1), np.int64)
        self.bits = self._input("bits", (rows, k), np.float32)
        self.positions = self._input("positions", (rows,), np.int64)
        self.targets = self._input("targets", (rows,), np.int64)
        self.modulation = self._input("modulation", (6 * spec.num_layers, rows, d), np.float32)
        self.last_position = self._input("last_position", (rows,), np.int32)
        self.filled = self._input("filled", (1,), np.int32)
        self.guidance = self._input("guidance", (), np.float32)
        self.ratio_embedding = self._input("ratio_embedding", (passes, w), np.float32)
        self.temperature = self._input("temperature", (passes, 1), np.float32)
        self.remask_count = self._input("remask_count", (passes, 1), np.int64)
        self.gumbel_bits = self._input("gumbel_bits", (passes, images, k, 2), np.float32)
        self.gumbel_confidence = self._input("gumbel_confidence", (passes, images, k), np.float32)
        self.drawn = self._output("drawn", (images, k), np.uint8)
        self.latent = self._output("latent", (rows, w), np.float32)
        self.caches = [self._cache(self._binding, name, rows) for name in self._cache_names()]

    def set_schedule(self, schedule: Schedule, ratio_embedding: Floats) -> None:
        self.ratio_embedding[:] = ratio_embedding
        self.temperature[:, 0] = schedule.temperature
        self.remask_count[:, 0] = schedule.remask_count

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)

    def run_prefix(self, feeds: dict[str, NDArray[Any]], rows: int, length: int) -> list[Floats]:
        """Run `length` positions of `rows` rows into a cache of their own; nothing is drawn. Returns the caches."""
        spec = self._spec
        binding = self._session.io_binding()
        caches = [self._cache(binding, name, rows) for name in self._cache_names()]
        one_pass = {
            "last_position": np.full(rows, length - 1, dtype=np.int32),
            "filled": np.array([length], dtype=np.int32),
            "guidance": np.float32(1),
            "ratio_embedding": self.ratio_embedding[:1],
            "temperature": self.temperature[:1],
            "remask_count": np.zeros((1, 1), dtype=np.int64),
            "gumbel_bits": np.zeros((1, rows, spec.bits_per_token, 2), dtype=np.float32),
            "gumbel_confidence": np.zeros((1, rows, spec.bits_per_token), dtype=np.float32),
        }
        for name, value in {**feeds, **one_pass}.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name in ("drawn", "latent"):
            binding.bind_output(name)
        self._session.run_with_iobinding(binding)
        return caches

    def _cache_names(self) -> Iterator[str]:
        for i in range(self._spec.num_layers):
            yield f"k_cache.{i}"
            yield f"v_cache.{i}"

    def _cache(self, binding: Any, name: str, rows: int) -> Floats:
        spec = self._spec
        shape = (rows, spec.num_heads, spec.prefix_length + spec.num_tokens, spec.head_dim)
        array = np.zeros(shape, dtype=np.float32)
        value = self._ort.OrtValue.ortvalue_from_numpy(array)
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("_cache", "_cache_out"), value)
        return array

    def _input(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        array = np.zeros(shape, dtype=dtype)
        self._binding.bind_ortvalue_input(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        return array

    def _output(self, name: str, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        array = np.zeros(shape, dtype=dtype)
        self._binding.bind_ortvalue_output(name, self._ort.OrtValue.ortvalue_from_numpy(array))
        return array


def _session(ort: ModuleType, path: Path, threads: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors; what the runtime warns of is checked by tests instead
    try:
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise EngineError(f"onnxruntime {ort.__version__} cannot load {path}: {str(error).splitlines()[0]}") from error


def _library() -> ModuleType:
    try:
        ort = import_module("onnxruntime")
    except ImportError as error:
        raise EngineError(f"onnxruntime is not installed ({error}); pip install onnxruntime") from error
    version = tuple(int(part) for part in ort.__version__.split(".")[:2])
    if version < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION))
        raise EngineError(f"onnxruntime {ort.__version__} is too old; pip install 'onnxruntime>={needed}'")
    return ort
