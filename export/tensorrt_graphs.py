"""The graphs that TensorRT compiles: one token of the loop in two engines, with everything around them in kernels.

Static shapes, floats of `GraphBuilder.device` in products, attention and caches, fp32 elsewhere. Written by the same
functions as the canonical graphs (`export/graphs.py`); what differs is where a graph begins and ends. Embeddings,
noise and sampling are kernels of the loop (`runtime/engines/cuda/`), so a graph begins with embedded rows:

    modulation   class_id, positions [P] -> modulation [6L, P, D]          P pairs, a chunk of positions at a time
    mask_ratio   mask_ratio [S] -> ratio_embedding [S, W]                   once per allocation
    prefix       x [G*T, D], own, targets [G*T], modulation -> kv           T = F-1 positions of G rows, an empty cache
    step         x [R, D], own, targets, start [R], modulation, ratio_embedding, caches
                     -> latent [R, W], head_modulation.s [R, M], and the caches or kv
    head_pass    x [R, W], head_modulation [R, M] -> logits [R, K, 2]
    decode       bits [I, cells, token_size] -> image [I, 3, H, W]

M is (3 * head_layers + 2) * W. kv is [2L, rows, H, T, d], k then v of each layer: new keys and values, which a kernel
writes to the cache. With native operators the step writes its one position itself, in place (TensorScatter); else it
gets the caches to read and gives kv as well.

Attention over the cache is the operator, which TensorRT-RTX 1.7 turns into one kernel on the cache itself; written
out, it copies the whole cache at every token. With several queries (prefix, decoder) it is the other way round: written
out it becomes `_gemm_mha_v2` with fewer kernels around it, with a softmax in fp32, and for any size of heads.
"""

from collections.abc import Mapping

import numpy as np
import onnx

from bar_edge.export.builder import DeviceForm, GraphBuilder
from bar_edge.export.graphs import (
    F32,
    FINAL_PIECES,
    HEAD_PIECES,
    I32,
    I64,
    Weights,
    attention,
    attention_scores,
    decode_graph,
    head_layers,
    head_modulation,
    head_norm,
    latent_of,
    mask_ratio_graph,
    silu,
    trunk_layers,
)
from bar_edge.export.linear import linear
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.spec import FIRST_CLASS_SYMBOL, ModelSpec

_OPERATOR_MULTIPLE = 8  # head sizes for which TensorRT-RTX has a kernel for `Attention`
_OPERATOR_HEADS = 4  # of all rows together, from which on it has one


def build_tensorrt_graphs(
    spec: ModelSpec, weights: Weights, precisions: Mapping[str, str], device: DeviceForm, profile: Profile
) -> dict[str, onnx.ModelProto]:
    """All graphs of a profile by name; `weights` are those that `export/compile.py` makes for the device."""

    def builder() -> GraphBuilder:
        return GraphBuilder(weights, precisions, device=device)

    return {
        "modulation": _modulation(builder(), spec, profile),
        "mask_ratio": mask_ratio_graph(builder(), spec, passes=profile.passes),
        "prefix": _prefix(builder(), spec, profile),
        "step": _step(builder(), spec, profile),
        "head_pass": _head_pass(builder(), spec, profile),
        "decode": decode_graph(builder(), spec, images=profile.decode_images),
    }


def _modulation(g: GraphBuilder, spec: ModelSpec, profile: Profile) -> onnx.ModelProto:
    pairs, d = profile.modulation_pairs, spec.hidden_size
    class_id = g.input("class_id", I32, [pairs], "0..C-1, or C for the unconditional embedding")
    positions = g.input("positions", I32, [pairs], "sequence position that goes with each class")
    rows = g.op("Add", class_id, g.constant([FIRST_CLASS_SYMBOL], I32))
    embedding = g.op("Gather", g.weight("symbol_embedding"), rows)
    m = silu(g, g.op("Add", g.op("Gather", g.weight("timesteps_embeddings"), positions), embedding))  # [P, D]
    shape = g.constant([pairs, 6, d], I64)
    layers = [
        g.op("Transpose", g.op("Reshape", linear(g, m, f"blocks.{i}.adaLN_modulation.1"), shape), perm=[1, 0, 2])
        for i in range(spec.num_layers)
    ]
    g.op("Identity", g.to_device(g.op("Concat", *layers, axis=0)), name="modulation")
    g.output("modulation", g.device_type, [6 * spec.num_layers, pairs, d])
    return g.model("modulation", "adaLN of a chunk of positions")


def _prefix(g: GraphBuilder, spec: ModelSpec, profile: Profile) -> onnx.ModelProto:
    """All prefix positions but the last, which is the first step.

    The last layer gives its keys and values alone; what it computes beyond leads to no output, and builders drop it.
    """
    cache = _Fresh(g, spec, profile.prefix_rows, spec.prefix_length - 1)
    _trunk(g, spec, cache.rows * cache.positions, cache)
    cache.output()
    return g.model("prefix", "keys and values of the prefix")


def _step(g: GraphBuilder, spec: ModelSpec, profile: Profile) -> onnx.ModelProto:
    rows, w, passes = profile.rows, spec.head_width, profile.passes
    cache = (_InPlace if g.native else _Apart)(g, spec, rows, profile.cache_length(spec))
    latent = latent_of(g, spec, _trunk(g, spec, rows, cache))
    g.op("Identity", latent, name="latent")
    g.output("latent", F32, [rows, w])
    cache.output()
    ratio = g.input("ratio_embedding", F32, [passes, w])
    width = profile.head_modulation_width(spec)
    flat = [
        g.op("Reshape", value, g.constant([passes * rows, -1], I64))
        for value, _ in head_modulation(g, spec, latent, ratio)
    ]
    together = g.to_device(g.op("Concat", *flat, axis=1))
    names = [f"head_modulation.{s}" for s in range(passes)]
    if passes == 1:
        g.op("Identity", together, name=names[0])
    else:
        g.node("Split", (together,), names, axis=0, num_outputs=passes)
    for name in names:
        g.output(name, g.device_type, [rows, width])
    return g.model("step", "trunk over one position, and the head's modulation for all passes")


def _head_pass(g: GraphBuilder, spec: ModelSpec, profile: Profile) -> onnx.ModelProto:
    rows, w = profile.rows, spec.head_width
    x = g.input("x", F32, [rows, w], "embedded bits")
    modulation = g.input("head_modulation", g.device_type, [rows, profile.head_modulation_width(spec)])
    count = HEAD_PIECES * spec.head_layers + FINAL_PIECES
    flat = [g.from_device(piece) for piece in g.op("Split", modulation, axis=1, num_outputs=count, outputs=count)]
    pieces = [flat[i : i + HEAD_PIECES] for i in range(0, count, HEAD_PIECES)]
    g.op("Identity", head_layers(g, spec, head_norm(g, x), pieces), name="logits")
    g.output("logits", F32, [rows, spec.bits_per_token, 2])
    return g.model("head_pass", "one pass of the masked-bit head")


def _trunk(g: GraphBuilder, spec: ModelSpec, count: int, cache: "_Fresh | _InPlace | _Apart") -> str:
    """The trunk over `count` embedded rows [count, D]."""
    x = g.input("x", F32, [count, spec.hidden_size], "embedded positions")
    own = g.input("own", I32, [count], "table row of each position: 0..F-1, or F + its grid index")
    targets = g.input("targets", I32, [count], "table row of what it predicts: F + grid index")
    modulation = g.input("modulation", g.device_type, [6 * spec.num_layers, count, spec.hidden_size])
    return trunk_layers(g, spec, x, own, targets, modulation, cache)


class _Heads:
    """Splits new queries, keys and values of `positions` positions of each row into heads, in the device's type."""

    def __init__(self, g: GraphBuilder, spec: ModelSpec, rows: int, positions: int) -> None:
        self.g, self.spec, self.rows, self.positions = g, spec, rows, positions
        self._shape = g.constant([rows, positions, spec.num_heads, spec.head_dim], I64)
        self.new: list[str] = []  # k and v of each layer [rows, H, T, d]

    def split(self, qk: str, v: str) -> tuple[str, str, str]:
        """qk [M, 2H, d], v [M, D] -> three of [rows, H, T, d]."""
        g, heads = self.g, self.spec.num_heads
        q, k = g.op("Split", qk, g.constant([heads, heads], I64), axis=1, outputs=2)
        q, k, v = (
            g.to_device(g.op("Transpose", g.op("Reshape", x, self._shape), perm=[0, 2, 1, 3])) for x in (q, k, v)
        )
        self.new += [k, v]
        return q, k, v

    def merge(self, out: str) -> str:
        """[rows, H, T, d] -> [rows, T, H, d]."""
        return str(self.g.op("Transpose", out, perm=[0, 2, 1, 3]))

    def output_new(self) -> None:
        """New keys and values as the output kv [2L, rows, H, T, d]."""
        g, spec = self.g, self.spec
        shape = [2 * spec.num_layers, self.rows, spec.num_heads, self.positions, spec.head_dim]
        g.op("Reshape", g.op("Concat", *self.new, axis=0), g.constant(shape, I64), name="kv")
        g.output("kv", g.device_type, shape)


class _Fresh(_Heads):
    """No cache yet: positions see themselves and those before."""

    def __init__(self, g: GraphBuilder, spec: ModelSpec, rows: int, positions: int) -> None:
        super().__init__(g, spec, rows, positions)
        self._mask = g.constant(np.tril(np.ones((1, 1, positions, positions), dtype=bool)), np.bool_, "causal")

    def attend(self, layer: int, qk: str, v: str) -> str:
        q, k, v = self.split(qk, v)
        return self.merge(attention(self.g, self.spec.head_dim, q, k, v, self._mask, written_out=True))

    output = _Heads.output_new


class _Cached(_Heads):
    """One new position of each row at `start`, and what the caches [rows, H, S, d] hold before it."""

    def __init__(self, g: GraphBuilder, spec: ModelSpec, rows: int, length: int) -> None:
        super().__init__(g, spec, rows, 1)
        start = g.input("start", I32, [rows], "sequence position of the new position, the same in every row")
        self._start = g.cast(start, onnx.TensorProto.INT64)
        self.cache_shape = [rows, spec.num_heads, length, spec.head_dim]
        first = g.op("Gather", self._start, g.constant([0], I64))
        compare = "LessOrEqual" if g.native else "Less"
        mask = g.op(compare, g.constant(np.arange(length), I64, "slots"), first)  # [S]
        self.mask = g.op("Reshape", mask, g.constant([1, 1, 1, length], I64))
        for i in range(spec.num_layers):
            for kind in ("k", "v"):
                g.input(f"{kind}_cache.{i}", g.device_type, self.cache_shape)


class _InPlace(_Cached):
    """The step writes its position to the cache itself."""

    def attend(self, layer: int, qk: str, v: str) -> str:
        q, k, v = self.split(qk, v)
        present = []
        for kind, new in (("k", k), ("v", v)):
            past, updated = f"{kind}_cache.{layer}", f"{kind}_cache_out.{layer}"
            self.g.node("TensorScatter", (past, new, self._start), (updated,), axis=-2, mode="linear")
            present.append(updated)
        head_dim = self.spec.head_dim
        written_out = head_dim % _OPERATOR_MULTIPLE != 0 or self.rows * self.spec.num_heads < _OPERATOR_HEADS
        return self.merge(attention(self.g, head_dim, q, *present, self.mask, written_out=written_out))

    def output(self) -> None:
        """The caches again, to be bound to the buffers of the inputs."""
        for i in range(self.spec.num_layers):
            for kind in ("k", "v"):
                self.g.output(f"{kind}_cache_out.{i}", self.g.device_type, self.cache_shape)


class _Apart(_Cached):
    """The step reads the cache and gives its own keys and values apart; scores are joined before the softmax."""

    def attend(self, layer: int, qk: str, v: str) -> str:
        g, head_dim = self.g, self.spec.head_dim
        q, k, v = self.split(qk, v)
        length = self.cache_shape[2]
        before = attention_scores(g, head_dim, q, f"k_cache.{layer}", self.mask)  # [rows, H, 1, S]
        both = g.op("Concat", before, attention_scores(g, head_dim, q, k), axis=3)
        weights = g.to_device(g.op("Softmax", both, axis=-1))
        old, own = g.op("Split", weights, g.constant([length, 1], I64), axis=3, outputs=2)
        products = (g.op("MatMul", old, f"v_cache.{layer}"), g.op("MatMul", own, v))
        return self.merge(g.op("Add", *map(g.from_device, products)))

    output = _Heads.output_new
