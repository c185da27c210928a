"""The graphs of a bundle, written node by node from one set of functions.

Canonical graphs use standard operators only (opset 24) and no sampling; other engines are compiled from them:

    modulation       class ids, positions -> every block's shift, scale and gate (outside the token loop)
    prefix           the F positions before the first token and the KV cache -> latent
    trunk_step       one position and the KV cache -> latent
    mask_ratio       mask ratios of an allocation -> embeddings (once per allocation)
    head_modulation  latent -> the head's shift, scale and gate for all S passes
    head_pass        known bits -> logits (one pass of the masked-bit head)
    decode           bits of an image -> pixels

The `onnxruntime_*` graphs are derived from the same functions for ONNX Runtime, with that runtime's own operators:
`onnxruntime_step` holds trunk, all S passes and the sampling. The passes are a Scan: the head's weights are packed
once, and any allocation runs on the same graph.

Symbolic dimensions: rows (image rows, conditional first, then unconditional if guided), images (B), T (positions in
this call), S (passes); fixed ones: D, H, d, N, F, K, W, L as in `runtime/spec.py`.
"""

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import onnx

from bar_edge.export.builder import MICROSOFT, GraphBuilder
from bar_edge.export.linear import linear, table_sum
from bar_edge.runtime.spec import DECODER_HEADS, FIRST_CLASS_SYMBOL, LAYER_NORM_EPS, RMS_NORM_EPS, ModelSpec
from bar_edge.runtime.weights import StoredTensor

Weights = Mapping[str, StoredTensor]
Precisions = Mapping[str, str]  # linear layer -> what it is not fp32 in (`export/linear.py`)
F32, I64, I32, U8 = np.float32, np.int64, np.int32, np.uint8
HEAD_PIECES = 3  # shift, scale, gate of a head block
FINAL_PIECES = 2  # scale, shift in front of the output


def build_graphs(spec: ModelSpec, weights: Weights, precisions: Precisions | None = None) -> dict[str, onnx.ModelProto]:
    """All graphs of a bundle by name."""

    def builder(*, onnxruntime: bool = False) -> GraphBuilder:
        return GraphBuilder(weights, precisions, onnxruntime=onnxruntime)

    return {
        "modulation": modulation_graph(builder(), spec),
        "prefix": trunk_graph(builder(), spec, "prefix"),
        "trunk_step": trunk_graph(builder(), spec, "trunk_step"),
        "mask_ratio": mask_ratio_graph(builder(), spec),
        "head_modulation": head_modulation_graph(builder(), spec),
        "head_pass": head_pass_graph(builder(), spec),
        "decode": decode_graph(builder(), spec),
        "onnxruntime_modulation": modulation_graph(builder(onnxruntime=True), spec),
        "onnxruntime_step": step_graph(builder(onnxruntime=True), spec),
        "onnxruntime_decode": decode_graph(builder(onnxruntime=True), spec),
    }


def modulation_graph(g: GraphBuilder, spec: ModelSpec, *, probe: bool = False) -> onnx.ModelProto:
    """class_id [U], positions [T] -> modulation [T, 6L, U, D] (section 2, "Modulation" and "Block").

    Rows of the second dimension: shift, scale, gate for attention, then for the MLP, layer by layer. Scales already
    contain the 1 and the norm's weight.
    """
    class_id = g.input("class_id", I64, ["U"], "0..C-1, or C for the unconditional embedding")
    positions = g.input("positions", I64, ["T"], "sequence positions, 0..F+N-1")
    rows = g.op("Add", class_id, g.constant([FIRST_CLASS_SYMBOL], I64))
    embedding = g.op("Gather", g.weight("symbol_embedding"), rows)  # [U, D]
    steps = g.op("Unsqueeze", g.op("Gather", g.weight("timesteps_embeddings"), positions), g.constant([1], I64))
    m = g.op("Reshape", g.op("Add", steps, embedding), g.constant([-1, spec.hidden_size], I64))  # [T*U, D]
    m = silu(g, m)
    split = g.op(
        "Concat", g.op("Shape", positions), g.op("Shape", class_id), g.constant([6, spec.hidden_size], I64), axis=0
    )
    layers = []
    for i in range(spec.num_layers):
        flat = linear(g, m, f"blocks.{i}.adaLN_modulation.1")  # [T*U, 6D]
        layers.append(g.op("Transpose", g.op("Reshape", flat, split), perm=[0, 2, 1, 3]))  # [T, 6, U, D]
    g.op("Concat", *layers, axis=1, name="modulation")
    g.output("modulation", F32, ["T", 6 * spec.num_layers, "U", spec.hidden_size])
    if probe:
        _probe_inputs(g)
    return g.model("modulation", "adaLN of many positions in one product")


def trunk_graph(g: GraphBuilder, spec: ModelSpec, name: str) -> onnx.ModelProto:
    """T new positions of every row -> latent [rows, W] of the last one, caches updated in place (section 2).

    `prefix` and `trunk_step` are this graph with T = F and T = 1: engines with static shapes are built of each.
    """
    g.op("Identity", _trunk(g, spec), name="latent")
    g.output("latent", F32, ["rows", spec.head_width], "conditions the next token")
    return g.model(name, "trunk over a preallocated KV cache")


def mask_ratio_graph(g: GraphBuilder, spec: ModelSpec, *, passes: int = 0) -> onnx.ModelProto:
    """mask_ratio [S] -> ratio_embedding [S, W] (section 3): constant for an allocation. `passes` fixes S."""
    ratio = g.input("mask_ratio", F32, [passes or "S"], "fraction of bits still masked at each pass")
    angle = g.op("Mul", g.op("Unsqueeze", ratio, g.constant([1], I64)), g.weight("lm_head.t_embedder.W"))
    angle = g.op("Mul", angle, g.constant(2 * np.pi, F32))
    x = linear(g, g.op("Concat", g.op("Sin", angle), g.op("Cos", angle), axis=-1), "lm_head.t_embedder.mlp.0")
    linear(g, silu(g, x), "lm_head.t_embedder.mlp.2", name="ratio_embedding")
    g.output("ratio_embedding", F32, [passes or "S", spec.head_width])
    return g.model("mask_ratio", "embedding of the mask ratios of an allocation")


def head_modulation_graph(g: GraphBuilder, spec: ModelSpec) -> onnx.ModelProto:
    """latent [rows, W], ratio_embedding [S, W] -> modulation.i [S, rows, 3W] of each block, and of the output, 2W."""
    latent = g.input("latent", F32, ["rows", spec.head_width])
    ratio = g.input("ratio_embedding", F32, ["S", spec.head_width])
    for i, (value, pieces) in enumerate(head_modulation(g, spec, latent, ratio)):
        g.op("Identity", value, name=f"modulation.{i}")
        g.output(f"modulation.{i}", F32, ["S", "rows", pieces * spec.head_width])
    return g.model("head_modulation", "adaLN of the head for all passes in one product")


def head_pass_graph(g: GraphBuilder, spec: ModelSpec) -> onnx.ModelProto:
    """One pass of the masked-bit head (section 3): known, bits [B, K] -> logits [rows, K, 2]."""
    k, w = spec.bits_per_token, spec.head_width
    known = g.input("known", np.bool_, ["images", k], "false where the bit is masked")
    bits = g.input("bits", np.bool_, ["images", k], "ignored where not known")
    modulation = [
        g.input(f"modulation.{i}", F32, ["rows", pieces * w])
        for i, pieces in enumerate([HEAD_PIECES] * spec.head_layers + [FINAL_PIECES])
    ]
    rows = g.op("Gather", g.op("Shape", modulation[0]), g.constant(0, I64))
    image_of_row = _image_of_row(g, rows, g.op("Gather", g.op("Shape", known), g.constant(0, I64)))
    logits = _head_pass(g, spec, known, g.op("And", bits, known), modulation, image_of_row)
    g.op("Identity", logits, name="logits")
    g.output("logits", F32, ["rows", k, 2])
    return g.model("head_pass", "one pass of the masked-bit head")


def decode_graph(g: GraphBuilder, spec: ModelSpec, *, probe: bool = False, images: int = 0) -> onnx.ModelProto:
    """bits [B, cells, token_size] of the fine grid -> image [B, 3, H, W] as it leaves conv_out (section 5).

    `images` fixes B.
    """
    cells, grid, p, size = spec.image_seq_len, spec.grid_size, spec.decoder_patch_size, spec.image_size
    width = g.shape_of("decoder.class_embedding")[-1]
    head_dim = width // DECODER_HEADS
    batch = images or "images"
    bits = g.input("bits", F32, [batch, cells, spec.token_size], "0 or 1, cells in raster order")
    x = linear(g, g.op("Reshape", bits, g.constant([-1, spec.token_size], I64)), "quantize.out_proj")
    x = g.op("Reshape", x, g.constant([-1, cells, width], I64))
    first_shape = g.op("Concat", g.op("Shape", bits, start=0, end=1), g.constant([1, width], I64), axis=0)
    first = g.op("Expand", g.weight("decoder.class_embedding"), first_shape)
    x = g.op("Add", g.op("Concat", first, x, axis=1), g.weight("decoder.positional_embedding"))
    x = g.op("Reshape", x, g.constant([-1, width], I64))  # [B*(1+cells), width]
    x = _layer_norm(g, x, "decoder.ln_pre")
    heads = g.constant([-1, 1 + cells, 3, DECODER_HEADS, head_dim], I64)
    i = 0
    while g.has(f"decoder.transformer.{i}.norm1.weight"):
        block = f"decoder.transformer.{i}"
        qkv = g.op("Reshape", linear(g, _layer_norm(g, x, f"{block}.norm1"), f"{block}.attn.qkv"), heads)
        q, k, v = g.op("Split", g.op("Transpose", qkv, perm=[2, 0, 3, 1, 4]), axis=0, num_outputs=3, outputs=3)
        q, k, v = (g.op("Squeeze", part, g.constant([0], I64)) for part in (q, k, v))  # [B, heads, 1+cells, d]
        out = attention(g, head_dim, *map(g.to_device, (q, k, v)), written_out=g.device is not None)
        out = g.op("Transpose", out, perm=[0, 2, 1, 3])
        out = g.op("Reshape", out, g.constant([-1, width], I64))
        x = g.op("Add", x, linear(g, out, f"{block}.attn.proj"))
        hidden = _gelu(g, linear(g, _layer_norm(g, x, f"{block}.norm2"), f"{block}.mlp.fc1"))
        x = g.op("Add", x, linear(g, hidden, f"{block}.mlp.fc2"))
        i += 1
    x = g.op("Reshape", x, g.constant([-1, 1 + cells, width], I64))
    x = g.op("Slice", x, g.constant([1], I64), g.constant([1 + cells], I64), g.constant([1], I64))
    x = _layer_norm(g, g.op("Reshape", x, g.constant([-1, width], I64)), "decoder.ln_post")
    x = linear(g, x, "decoder.ffn.0")  # [B*cells, p*p*3]
    x = g.op("Reshape", x, g.constant([-1, grid, grid, p, p, 3], I64))
    x = g.op("Reshape", g.op("Transpose", x, perm=[0, 5, 1, 3, 2, 4]), g.constant([-1, 3, size, size], I64))
    conv = (g.weight("decoder.conv_out.weight"), g.weight("decoder.conv_out.bias"))
    g.op("Conv", x, *conv, kernel_shape=[3, 3], pads=[1, 1, 1, 1], name="image")
    g.output("image", F32, [batch, 3, size, size], "RGB, about -1 to 1, not clamped")
    if probe:
        _probe_inputs(g)
    return g.model("decode", "tokenizer decoder")


def step_graph(g: GraphBuilder, spec: ModelSpec, *, probe: bool = False) -> onnx.ModelProto:
    """The fused step of ONNX Runtime: trunk, then S head passes with sampling -> drawn [B, K] (section 4).

    With `probe` the graph computes the same and tells more: the input of every linear layer (`input:LAYER`, those of
    the head with a leading S), guided `logits` [S, B, K, 2], `row_logits` [S, rows, K, 2] before guidance, and `known`
    [S, B, K], which bits each pass began with.
    It can then also be led: where `forced` is true, passes begin with `forced_known` and `forced_bits` [S, B, K].
    """
    k, w = spec.bits_per_token, spec.head_width
    latent = _trunk(g, spec)
    ratio = g.input("ratio_embedding", F32, ["S", w], "output of mask_ratio for this allocation")
    guidance = g.input("guidance", F32, [], "scale of this token; unused where rows = images")
    temperature = g.input("temperature", F32, ["S", 1], "of each pass")
    remask = g.input("remask_count", I64, ["S", 1], "bits left masked after each pass; 0 in the last")
    gumbel_bits = g.input("gumbel_bits", F32, ["S", "images", k, 2])
    gumbel_confidence = g.input("gumbel_confidence", F32, ["S", "images", k])
    scanned = [value for value, _ in head_modulation(g, spec, latent, ratio)]
    scanned += [temperature, remask, gumbel_bits, gumbel_confidence]
    if probe:
        scanned += [g.input(name, np.bool_, ["S", "images", k]) for name in ("forced_known", "forced_bits")]
        g.input("forced", np.bool_, [])
    images = g.op("Gather", g.op("Shape", gumbel_bits), g.constant(1, I64))
    rows = g.op("Gather", g.op("Shape", latent), g.constant(0, I64))
    image_of_row = _image_of_row(g, rows, images)
    zero, one = g.constant(0, I64), g.constant(1, I64)
    conditional = g.op("Range", zero, images, one)
    unconditional = g.op("Range", g.op("Sub", rows, images), rows, one)
    masked = g.op("Expand", g.constant(True, np.bool_), g.op("Shape", gumbel_bits, start=1, end=3))

    body = g.subgraph()
    state = ["images", k]
    masked_in, bits_in = body.input("masked_in", np.bool_, state), body.input("bits_in", np.bool_, state)
    modulation = [
        body.input(f"modulation_{i}", F32, ["rows", pieces * w])
        for i, pieces in enumerate([HEAD_PIECES] * spec.head_layers + [FINAL_PIECES])
    ]
    t, count = body.input("pass_temperature", F32, [1]), body.input("pass_remask_count", I64, [1])
    noise, confidence_noise = body.input("noise", F32, [*state, 2]), body.input("confidence_noise", F32, state)
    known = body.op("Not", masked_in)
    if probe:
        known = _led(body, known, body.input("pass_forced_known", np.bool_, state))
        bits_in = _led(body, bits_in, body.input("pass_forced_bits", np.bool_, state))
        masked_in = body.op("Not", known)
    known_ones = body.op("And", bits_in, known)
    row_logits = _head_pass(body, spec, known, known_ones, modulation, image_of_row)
    c, u = body.op("Gather", row_logits, conditional), body.op("Gather", row_logits, unconditional)
    logits = body.op("Add", u, body.op("Mul", guidance, body.op("Sub", c, u)))  # [B, K, 2]
    logit0, logit1 = _last_pair(body, logits)
    noisy0, noisy1 = _last_pair(body, body.op("Add", logits, body.op("Mul", t, noise)))
    fresh = body.op("And", masked_in, body.op("Greater", noisy1, noisy0))
    drawn = body.op("Or", known_ones, fresh)
    infinity = body.constant(np.inf, F32)
    confidence = body.op("Where", masked_in, body.op("Where", drawn, logit1, logit0), infinity)
    confidence = body.op("Add", confidence, body.op("Mul", t, confidence_noise))
    at_least_one = body.op("Max", count, body.constant([1], I64))
    smallest, _ = body.op("TopK", confidence, at_least_one, axis=-1, largest=0, sorted=0, outputs=2)
    cutoff = body.op("ReduceMax", smallest, body.constant([-1], I64), keepdims=1)
    unsure = body.op("LessOrEqual", confidence, cutoff)
    body.op("And", unsure, body.op("Greater", count, body.constant([0], I64)), name="masked_out")
    body.op("Identity", drawn, name="bits_out")
    body.output("masked_out", np.bool_, state)
    body.output("bits_out", np.bool_, state)
    outputs = ["final_masked", "final_bits"]
    if probe:
        told = (
            ("logits", logits, F32, [*state, 2]),
            ("row_logits", row_logits, F32, ["rows", k, 2]),
            ("known", known, np.bool_, state),
        )
        for name, value, dtype, shape in told:
            body.op("Identity", value, name=f"pass_{name}")
            body.output(f"pass_{name}", dtype, shape)
            g.output(name, dtype, ["S", *shape])
            outputs.append(name)
        for layer, value in body.linear_inputs:
            body.op("Identity", value, name=f"pass_input:{layer}")
            body.output(f"pass_input:{layer}", F32, ["rows", None])
            g.output(f"input:{layer}", F32, ["S", "rows", None])
            outputs.append(f"input:{layer}")
    initial = (masked, g.op("Not", masked), *scanned)
    g.node("Scan", initial, outputs, num_scan_inputs=len(scanned), body=body.graph("head_passes"))
    g.op("Cast", "final_bits", to=onnx.TensorProto.UINT8, name="drawn")
    g.output("drawn", U8, ["images", k], "the bits of this token")
    g.op("Identity", latent, name="latent")
    g.output("latent", F32, ["rows", w])
    if probe:
        _probe_inputs(g)
    return g.model("onnxruntime_step", "trunk, head passes and sampling of one token for ONNX Runtime")


def _probe_inputs(g: GraphBuilder) -> None:
    """Make the input of every linear layer of this graph an output."""
    for layer, value in g.linear_inputs:
        g.op("Identity", value, name=f"input:{layer}")
        g.output(f"input:{layer}", F32, ["M", None])


def _led(g: GraphBuilder, own: str, forced: str) -> str:
    """`forced` where the graph is led, `own` otherwise."""
    return str(g.op("Or", g.op("And", "forced", forced), g.op("And", g.op("Not", "forced"), own)))


def _trunk(g: GraphBuilder, spec: ModelSpec) -> str:
    """Declare the trunk's inputs and outputs and write its nodes; returns the latent [rows, W]."""
    d = spec.hidden_size
    symbols = g.input("symbols", I64, ["rows", "T"], "rows of symbol_embedding: class, first position or a token")
    bits = g.input("bits", F32, ["rows_T", spec.bits_per_token], "0 or 1; zeros at prefix positions")
    own = g.input("positions", I64, ["rows_T"], "table row of each position: 0..F-1, or F + its grid index")
    target = g.input("targets", I64, ["rows_T"], "table row of what it predicts: F + grid index")
    modulation = g.input("modulation", F32, [6 * spec.num_layers, "rows_T", d], "from the modulation graph")
    cache = _Cache(g, spec, symbols)

    x = table_sum(g, bits, "bit_embedding")  # [rows*T, D]
    embedded = g.op("Gather", g.weight("symbol_embedding"), g.op("Reshape", symbols, g.constant([-1], I64)))
    x = g.op("Add", x, embedded)
    x = g.op("Add", x, g.op("Gather", g.weight("pos_embed"), own))
    x = g.op("Add", x, g.op("Gather", g.weight("target_aware_pos_embed"), target))
    x = trunk_layers(g, spec, x, own, target, modulation, cache)
    x = g.op("Reshape", x, cache.sequence_shape)  # [rows, T, D]
    return latent_of(g, spec, g.op("Gather", x, g.constant(-1, I64), axis=1))


class Cache(Protocol):
    """Where the keys and values of all positions are."""

    def attend(self, layer: int, qk: str, v: str) -> str:
        """Add the new positions and attend: qk [M, 2H, d], v [M, D] -> M * D values in that order, fp32."""


def trunk_layers(g: GraphBuilder, spec: ModelSpec, x: str, own: str, target: str, modulation: str, cache: Cache) -> str:
    """The blocks of the trunk (section 2): x [M, D], table rows own and target [M], modulation [6L, M, D] -> [M, D]."""
    d, heads, head_dim = spec.hidden_size, spec.num_heads, spec.head_dim
    # queries of the first H/2 heads and all keys rotate by where they are, queries of the last H/2 by what they predict
    both = g.op("Concat", *(g.op("Unsqueeze", rows, g.constant([1], I64)) for rows in (own, target)), axis=1)
    which = [0] * (heads // 2) + [1] * (heads - heads // 2) + [0] * heads
    rope_rows = g.op("Gather", both, g.constant(which, I64, "rope_source"), axis=1)  # [M, 2H]
    count = 6 * spec.num_layers
    flat = g.op("Reshape", modulation, g.constant([-1, d], I64))  # so that each piece is [M, D] without a Squeeze
    pieces = [g.from_device(piece) for piece in g.op("Split", flat, axis=0, num_outputs=count, outputs=count)]
    rotate = _Rotation(g, rope_rows, head_dim)
    residual: str | None = None
    for i in range(spec.num_layers):
        block = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = pieces[6 * i : 6 * i + 6]
        x, normed = _add_norm(g, x, residual, d)
        qkv = linear(g, g.op("Add", g.op("Mul", normed, scale1), shift1), f"{block}.attn.qkv")
        qk, v = g.op("Split", qkv, g.constant([2 * d, d], I64), axis=1, outputs=2)
        qk = _rms_norm(g, g.op("Reshape", qk, g.constant([-1, 2 * heads, head_dim], I64)), _ones(g, head_dim))
        qk = g.op("Mul", qk, g.weight(f"{block}.attn.qk_norm.weight"))
        out = g.op("Reshape", cache.attend(i, rotate(qk), v), g.constant([-1, d], I64))
        residual = g.op("Mul", gate1, linear(g, out, f"{block}.attn.proj"))
        x, normed = _add_norm(g, x, residual, d)
        hidden = g.op("Add", g.op("Mul", normed, scale2), shift2)
        residual = g.op("Mul", gate2, _swiglu(g, hidden, f"{block}.mlp"))
    return str(g.op("Add", x, residual))


def latent_of(g: GraphBuilder, spec: ModelSpec, x: str) -> str:
    """x [rows, D] of the last position -> latent [rows, W]."""
    return linear(g, _rms_norm(g, x, _ones(g, spec.hidden_size)), "latent_condition_proj")


class _Rotation:
    """Rotary embedding of [M, 2H, d] by table rows [M, 2H]: heads stand in the place of the sequence."""

    def __init__(self, g: GraphBuilder, rows: str, head_dim: int) -> None:
        self._g = g
        self._rows = rows if g.device is None else g.cast(rows, onnx.TensorProto.INT64)
        if not g.native:
            self._pairs = g.constant([0, 0, head_dim // 2, 2], I64)
            self._cos, self._sin = (
                g.op("Unsqueeze", g.op("Gather", g.weight(table), rows), g.constant([-1], I64))
                for table in ("rope_cos", "rope_sin")
            )  # [M, 2H, d/2, 1]

    def __call__(self, x: str) -> str:
        g = self._g
        if g.native:
            tables = (g.weight("rope_cos"), g.weight("rope_sin"))
            return str(g.op("RotaryEmbedding", x, *tables, self._rows, interleaved=1, num_heads=1))
        even, odd = g.op("Split", g.op("Reshape", x, self._pairs), axis=3, num_outputs=2, outputs=2)
        real = g.op("Sub", g.op("Mul", even, self._cos), g.op("Mul", odd, self._sin))
        imaginary = g.op("Add", g.op("Mul", even, self._sin), g.op("Mul", odd, self._cos))
        return str(g.op("Reshape", g.op("Concat", real, imaginary, axis=3), g.op("Shape", x)))


class _Cache:
    """The KV cache of one graph: inputs, in-place update and attention over what is filled."""

    def __init__(self, g: GraphBuilder, spec: ModelSpec, symbols: str) -> None:
        self._g, self._spec = g, spec
        d, head_dim = spec.hidden_size, spec.head_dim
        shape = ["rows", spec.num_heads, spec.prefix_length + spec.num_tokens, head_dim]
        self.sequence_shape = g.op("Concat", g.op("Shape", symbols), g.constant([d], I64), axis=0)  # rows, T, D
        self._pair_shape = g.op("Concat", g.op("Shape", symbols), g.constant([2 * d], I64), axis=0)
        if g.onnxruntime:
            self._last = g.input("last_position", I32, ["rows"], "sequence position of the last new position")
            self._filled = g.input("filled", I32, [1], "positions in the cache after this call")
        else:
            self._start = g.input("start", I64, ["rows"], "sequence position of the first new position")
            total = g.constant(spec.prefix_length + spec.num_tokens, I64)
            zero, one = g.constant(0, I64), g.constant(1, I64)
            length = g.op("Gather", g.op("Shape", symbols), one)
            new = g.op("Add", g.op("Range", zero, length, one), g.op("Gather", self._start, zero))  # [T]
            mask = g.op("LessOrEqual", g.op("Range", zero, total, one), g.op("Unsqueeze", new, g.constant([1], I64)))
            self._mask = g.op("Unsqueeze", mask, g.constant([0, 1], I64))  # [1, 1, T, F+N]
            self._heads_shape = g.op(
                "Concat", g.op("Shape", symbols), g.constant([spec.num_heads, head_dim], I64), axis=0
            )  # rows, T, H, d
        for i in range(spec.num_layers):
            for kind in ("k", "v"):
                g.input(f"{kind}_cache.{i}", F32, shape)
                g.output(f"{kind}_cache_out.{i}", F32, shape, "bind to the buffer of the input")

    def attend(self, layer: int, qk: str, v: str) -> str:
        """qk [rows*T, 2H, d], v [rows*T, D] -> [rows, T, D] or [rows, T, H, d]."""
        g = self._g
        past = (f"k_cache.{layer}", f"v_cache.{layer}")
        present = (f"k_cache_out.{layer}", f"v_cache_out.{layer}")
        out = f"attention.{layer}"
        qk = g.op("Reshape", qk, self._pair_shape)  # [rows, T, 2D]
        q, k = g.op("Split", qk, axis=2, num_outputs=2, outputs=2)
        v = g.op("Reshape", v, self.sequence_shape)
        if g.onnxruntime:
            heads = self._spec.num_heads
            operands = (q, k, v, *past, self._last, self._filled)
            outputs = (out, *present)
            g.node("GroupQueryAttention", operands, outputs, domain=MICROSOFT, num_heads=heads, kv_num_heads=heads)
            return out
        q, k, v = (
            g.op("Transpose", g.op("Reshape", x, self._heads_shape), perm=[0, 2, 1, 3]) for x in (q, k, v)
        )  # [rows, H, T, d]
        for new, old, updated in zip((k, v), past, present, strict=True):
            g.node("TensorScatter", (old, new, self._start), (updated,), axis=-2, mode="linear")
        g.op("Transpose", attention(g, self._spec.head_dim, q, *present, self._mask), perm=[0, 2, 1, 3], name=out)
        return out


def head_modulation(g: GraphBuilder, spec: ModelSpec, latent: str, ratio: str) -> list[tuple[str, int]]:
    """For each head block, then the output: (modulation [S, rows, pieces*W], pieces)."""
    w = spec.head_width
    c = g.op("Add", g.op("Unsqueeze", ratio, g.constant([1], I64)), latent)  # [S, rows, W]
    shape = g.op("Concat", g.op("Shape", c, start=0, end=2), g.constant([-1], I64), axis=0)
    c = g.op("Reshape", silu(g, silu(g, c)), g.constant([-1, w], I64))
    names = [(f"lm_head.transformer.{i}", HEAD_PIECES) for i in range(spec.head_layers)]
    names.append(("lm_head.adaln_before_head", FINAL_PIECES))
    return [(g.op("Reshape", linear(g, c, f"{name}.adaLN_modulation.1"), shape), n) for name, n in names]


def _head_pass(
    g: GraphBuilder, spec: ModelSpec, known: str, known_ones: str, modulation: list[str], image_of_row: str
) -> str:
    """known, known_ones [B, K] bool, modulation of each block [rows, 3W] and of the output -> logits [rows, K, 2]."""
    state = g.op("Cast", g.op("Concat", known, known_ones, axis=1), to=onnx.TensorProto.FLOAT)  # [B, 2K]
    x = table_sum(g, state, "lm_head.bit_embedding", "lm_head.masked_embedding")
    # the norm before the rows are doubled: half the work
    x = g.op("Gather", head_norm(g, x), image_of_row)  # [rows, W]
    pieces = [
        g.op("Split", value, axis=1, num_outputs=count, outputs=count)
        for value, count in zip(modulation, [HEAD_PIECES] * spec.head_layers + [FINAL_PIECES], strict=True)
    ]
    return head_layers(g, spec, x, pieces)


def head_norm(g: GraphBuilder, x: str) -> str:
    """The head's first norm, of the embedded bits [M, W]."""
    return _rms_norm(g, x, g.weight("lm_head.ln_pre.weight"))


def head_layers(g: GraphBuilder, spec: ModelSpec, x: str, pieces: list[list[str]]) -> str:
    """The blocks of the head (section 3): x [rows, W], shift, scale, gate of each and scale, shift of the output, all
    [rows, W] -> logits [rows, K, 2]."""
    w = spec.head_width
    residual: str | None = None
    for i in range(spec.head_layers):
        shift, scale, gate = pieces[i]
        x, normed = _add_norm(g, x, residual, w)
        hidden = g.op("Add", g.op("Mul", normed, scale), shift)
        residual = g.op("Mul", gate, _swiglu(g, hidden, f"lm_head.transformer.{i}.mlp"))
    scale, shift = pieces[-1]
    _, normed = _add_norm(g, x, residual, w)
    logits = linear(g, g.op("Add", g.op("Mul", normed, scale), shift), "lm_head.output_embed")
    return str(g.op("Reshape", logits, g.constant([-1, spec.bits_per_token, 2], I64)))


def _image_of_row(g: GraphBuilder, rows: str, images: str) -> str:
    return str(g.op("Mod", g.op("Range", g.constant(0, I64), rows, g.constant(1, I64)), images))


def _last_pair(g: GraphBuilder, x: str) -> tuple[str, str]:
    """[B, K, 2] -> two of [B, K]."""
    zero, one = (g.op("Gather", x, g.constant(i, I64), axis=2) for i in (0, 1))
    return zero, one


def _swiglu(g: GraphBuilder, x: str, name: str) -> str:
    x1, x2 = g.op("Split", linear(g, x, f"{name}.w12"), axis=1, num_outputs=2, outputs=2)
    return linear(g, g.op("Mul", silu(g, x1), x2), f"{name}.w3")


def attention(
    g: GraphBuilder, head_dim: int, q: str, k: str, v: str, mask: str = "", *, written_out: bool = False
) -> str:
    """Heads [B, H, T, d] over [B, H, S, d], all in the device's type -> fp32; mask bool, true where a key is seen."""
    if not written_out:
        return g.from_device(g.op("Attention", q, k, v, *([mask] if mask else [])))
    scores = attention_scores(g, head_dim, q, k, mask)
    return g.from_device(g.op("MatMul", g.to_device(g.op("Softmax", scores, axis=-1)), v))


def attention_scores(g: GraphBuilder, head_dim: int, q: str, k: str, mask: str = "") -> str:
    """Scaled scores in fp32 [B, H, T, S] before the softmax, in operators of opset 20."""
    scores = g.from_device(g.op("MatMul", q, g.op("Transpose", k, perm=[0, 1, 3, 2])))
    scores = g.op("Mul", scores, g.constant(head_dim**-0.5, F32))
    return str(g.op("Where", mask, scores, g.constant(np.finfo(np.float32).min, F32)) if mask else scores)


def silu(g: GraphBuilder, x: str) -> str:
    if g.onnxruntime:
        return str(g.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0))
    return str(g.op("Swish", x) if g.native else g.op("Mul", x, g.op("Sigmoid", x)))


def _gelu(g: GraphBuilder, x: str) -> str:
    if g.native:
        return str(g.op("Gelu", x))
    erf = g.op("Erf", g.op("Mul", x, g.constant(np.sqrt(0.5), F32)))
    return str(g.op("Mul", g.op("Mul", x, g.constant(0.5, F32)), g.op("Add", erf, g.constant(1, F32))))


def _ones(g: GraphBuilder, width: int) -> str:
    return g.constant(np.ones(width), F32, f"ones_{width}")


def _rms_norm(g: GraphBuilder, x: str, weight: str) -> str:
    if g.native:
        return str(g.op("RMSNormalization", x, weight, epsilon=RMS_NORM_EPS, axis=-1))
    square = g.op("ReduceMean", g.op("Mul", x, x), g.constant([-1], I64), keepdims=1)
    root = g.op("Sqrt", g.op("Add", square, g.constant(RMS_NORM_EPS, F32)))
    return str(g.op("Mul", g.op("Div", x, root), weight))


def _add_norm(g: GraphBuilder, x: str, residual: str | None, width: int) -> tuple[str, str]:
    """x + residual, and its RMS norm without weight."""
    if residual is None:
        return x, _rms_norm(g, x, _ones(g, width))
    if g.onnxruntime:
        normed, total = f"{residual}/norm", f"{residual}/sum"
        operands, outputs = (x, residual, _ones(g, width)), (normed, "", "", total)
        g.node("SkipSimplifiedLayerNormalization", operands, outputs, domain=MICROSOFT, epsilon=RMS_NORM_EPS)
        return total, normed
    total = str(g.op("Add", x, residual))
    return total, _rms_norm(g, total, _ones(g, width))


def _layer_norm(g: GraphBuilder, x: str, name: str) -> str:
    weights = (g.weight(f"{name}.weight"), g.weight(f"{name}.bias"))
    return str(g.op("LayerNormalization", x, *weights, epsilon=LAYER_NORM_EPS, axis=-1))
