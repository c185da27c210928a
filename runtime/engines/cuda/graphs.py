"""The graphs of the loop (`export/tensorrt_graphs.py` says what each is) as short lists of kernels.

A layer of the trunk takes 7 launches a token, a block of the head 3 a pass. The input x of prefix, step and head_pass
is overwritten: the residual lives there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from bar_edge.runtime.engines.cuda.device import Address, Argument, Device
from bar_edge.runtime.engines.cuda.layers import (
    DECODER_HEAD_DIMS,
    decoder_block,
    decoder_layers,
    head_block,
    trunk_block,
)
from bar_edge.runtime.engines.cuda.loop import ALIGNMENT
from bar_edge.runtime.engines.cuda.module import THREADS, Module
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.cuda.resident import TILE, Layer, Resident, Weights
from bar_edge.runtime.spec import DECODER_HEADS, FIRST_CLASS_SYMBOL, ModelSpec

ITEMSIZE = 2  # of modulation, keys and values, in float16
_HALF, _FLOAT = 2, 4  # bytes
BLOCK_ROWS = (16, 32, 64, 128)  # of `few_rows`, the last one of `many_rows`
_MANY_OUTPUTS = 64  # of a block of `many_rows`
_WARPS = THREADS // 32
_QUERIES = 16 * _WARPS  # of a block of `attend_image`
_i32, _f32 = np.int32, np.float32
Addresses = Mapping[str, Address]


class Activation(IntEnum):
    """What becomes of a product's values: as in `products.cuh`."""

    IDENTITY, SILU, GELU, SWIGLU = range(4)


class Destination(IntEnum):
    """Where they go: as in `products.cuh`."""

    STORE, INPUT, ADD, PIECES, TABLE = range(5)


@dataclass(frozen=True)
class Epilogue:
    """What is done with a product on its way out (`Product` of `products.cuh`)."""

    activation: Activation = Activation.IDENTITY
    destination: Destination = Destination.STORE
    gate: Address = 0
    out_scale: float = 0  # of the INT8 activation it writes; 0 for a float16 one
    group: int = 1
    stride: int = 0
    offset: int = 0


PLAIN = Epilogue()


def block_rows(rows: int, outputs: int, multiprocessors: int) -> int:
    """Rows that a block of a product takes at once, if there are so many to multiply: one of `BLOCK_ROWS`.

    Sums are the same bits in any case. `many_rows` reads less, but only where it has a block for every multiprocessor.
    """
    *few_rows, many_rows = BLOCK_ROWS
    few = next((few for few in few_rows if few >= rows), None)
    if few is None and -(-outputs // _MANY_OUTPUTS) * -(-rows // many_rows) >= multiprocessors:
        return many_rows
    return few or few_rows[-1]


class Launch(NamedTuple):
    """What a `Module` launches."""

    kernel: str
    blocks: int
    arguments: tuple[Argument, ...]


def product(layer: Layer, x: Address, out: Address, rows: int, epilogue: Epilogue, block: int) -> Launch:
    """x [rows, in] through a layer, with the kernel that takes `block` rows at once."""
    form, outputs = layer.form.replace("-", "_"), layer.out_features
    many = block == BLOCK_ROWS[-1]
    kernel = f"many_rows_{form}" if many else f"few_rows_{form}_{block}"
    blocks = -(-outputs // (_MANY_OUTPUTS if many else TILE)) * -(-rows // block)
    sizes = (rows, outputs, layer.in_features, layer.block)
    codes = (epilogue.activation, epilogue.destination)
    shape = (epilogue.group, epilogue.stride, epilogue.offset)
    arguments: tuple[Argument, ...] = (
        layer.weight, layer.scale, layer.bias, x, out, epilogue.gate, *map(_i32, sizes), _f32(layer.input_scale),
        *map(_i32, codes), _f32(epilogue.out_scale), *map(_i32, shape),
    )  # fmt: skip
    return Launch(kernel, blocks, arguments)


def scratch_sizes(spec: ModelSpec, profile: Profile, weights: Weights) -> dict[str, dict[str, int]]:
    """Bytes of every buffer of activations, by graph. One graph runs at a time, so they all share memory."""
    d, w, passes = spec.hidden_size, spec.head_width, profile.passes
    trunk, head = weights.features("blocks.0.mlp.w3")[0], weights.features("lm_head.transformer.0.mlp.w3")[0]
    features, width = weights.features("lm_head.t_embedder.mlp.0")[0], weights.features("quantize.out_proj")[1]
    cells = profile.decode_images * spec.image_seq_len
    decoded = cells + profile.decode_images
    mlp = max((weights.features(f"{decoder_block(i)}.mlp.fc2")[0] for i in range(decoder_layers(weights))), default=0)

    def trunk_sizes(rows: int) -> dict[str, int]:
        inputs = {"normed": _HALF * rows * d, "attended": _HALF * rows * d, "hidden": _HALF * rows * trunk}
        return {**inputs, "qkv": 3 * _FLOAT * rows * d}

    sizes = {
        "modulation": {"input": _HALF * profile.modulation_pairs * d},
        "mask_ratio": {"features": _HALF * passes * features, "hidden": _HALF * passes * w},
        "prefix": trunk_sizes(profile.prefix_rows * (spec.prefix_length - 1)),
        "step": {**trunk_sizes(profile.rows), "condition": _HALF * passes * profile.rows * w},
        "head_pass": {"normed": _HALF * profile.rows * w, "hidden": _HALF * profile.rows * head},
        "decode": {
            "padded": _HALF * cells * weights.features("quantize.out_proj")[0], "projected": _FLOAT * cells * width,
            "x": _FLOAT * decoded * width, "normed": _HALF * decoded * width, "qkv": 3 * _HALF * decoded * width,
            "attended": _HALF * decoded * width, "hidden": _HALF * decoded * mlp,
            "patches": _FLOAT * cells * 3 * spec.decoder_patch_size**2,
        },
    }  # fmt: skip
    return {graph: {name: _aligned(size) for name, size in of.items()} for graph, of in sizes.items()}


def scratch_bytes(spec: ModelSpec, profile: Profile, weights: Weights) -> int:
    """Bytes that the graphs of a profile hold."""
    of_graphs = scratch_sizes(spec, profile, weights).values()
    return max(sum(sizes.values()) for sizes in of_graphs) + _aligned(8 * profile.passes)


class KernelGraphs:
    """`Graphs` of `cuda/loop.py`: every graph is put into the stream kernel by kernel."""

    itemsize, in_place = ITEMSIZE, True

    def __init__(
        self, spec: ModelSpec, profile: Profile, weights: Weights, resident: Resident, device: Device, module: Module
    ) -> None:
        """Allocates the activations. Raises MemoryError."""
        self.profile = profile
        self._spec, self._weights, self._device, self._module = spec, resident, device, module
        self._decoder_layers = decoder_layers(weights)
        self._memory = device.allocate(scratch_bytes(spec, profile, weights))
        self._table, begin = self._memory, self._memory + _aligned(8 * profile.passes)
        self._tabled: list[Address] = []  # what the table holds
        self._scratch = {graph: _placed(sizes, begin) for graph, sizes in scratch_sizes(spec, profile, weights).items()}
        self._graphs = {
            "modulation": self._modulation, "mask_ratio": self._mask_ratio, "prefix": self._prefix,
            "step": self._step, "head_pass": self._head_pass, "decode": self._decode,
        }  # fmt: skip

    def enqueue(self, graph: str, addresses: Addresses) -> None:
        self._graphs[graph](addresses, self._scratch[graph])

    def close(self) -> None:
        self._device.free(self._memory)

    def _modulation(self, at: Addresses, own: Addresses) -> None:
        spec, weights, pairs = self._spec, self._weights, self.profile.modulation_pairs
        tables = (weights["symbol_embedding"], weights["timesteps_embeddings"])
        size = pairs * spec.hidden_size * ITEMSIZE
        inputs = (at["class_id"], at["positions"], *tables, own["input"])
        sizes = (_i32(pairs), _i32(spec.hidden_size), _i32(FIRST_CLASS_SYMBOL))
        written = None  # the scale of what is in own["input"]
        for i in range(spec.num_layers):
            layer = weights.layer(f"{trunk_block(i)}.adaLN_modulation.1")
            if layer.input_scale != written:
                written = layer.input_scale
                self._elementwise("modulation_input", pairs * spec.hidden_size, *inputs, *sizes, _f32(written))
            out = at["modulation"] + 6 * i * size
            epilogue = Epilogue(destination=Destination.PIECES, group=spec.hidden_size)
            self._product(layer, own["input"], out, pairs, epilogue)

    def _mask_ratio(self, at: Addresses, own: Addresses) -> None:
        weights, passes = self._weights, self.profile.passes
        first, second = (weights.layer(f"lm_head.t_embedder.mlp.{i}") for i in (0, 2))
        count = first.in_features // 2
        operands = (at["mask_ratio"], weights["lm_head.t_embedder.W"], own["features"], _i32(passes), _i32(count))
        self._elementwise("ratio_features", passes * count, *operands)
        self._product(first, own["features"], own["hidden"], passes, Epilogue(Activation.SILU, Destination.INPUT))
        self._product(second, own["hidden"], at["ratio_embedding"], passes)

    def _prefix(self, at: Addresses, own: Addresses) -> None:
        """The last layer gives its keys and values alone."""
        spec, length = self._spec, self._spec.prefix_length - 1
        rows, heads = self.profile.prefix_rows * length, _i32(spec.num_heads)
        size = rows * spec.hidden_size * ITEMSIZE
        for i in range(spec.num_layers):
            keys, values = at["kv"] + 2 * i * size, at["kv"] + (2 * i + 1) * size
            self._qkv(i, at, own, rows)
            blocks = -(-rows * 3 * spec.num_heads // _WARPS)
            rotated = (own["qkv"], at["own"], at["targets"], *self._rotary(i), keys, values)
            self._launch("rotate_prefix", blocks, *rotated, _i32(rows), _i32(length), heads, _i32(spec.head_dim))
            if i == spec.num_layers - 1:
                return
            scale = _f32(self._weights.layer(f"{trunk_block(i)}.attn.proj").input_scale)
            operands = (own["qkv"], keys, values, own["attended"], _i32(length), heads, _i32(spec.head_dim), scale)
            self._launch("attend_prefix", rows * spec.num_heads, *operands)
            self._after_attention(i, at, own, rows)

    def _step(self, at: Addresses, own: Addresses) -> None:
        spec, weights, rows = self._spec, self._weights, self.profile.rows
        sizes = (spec.num_heads, spec.head_dim, self.profile.cache_length(spec))
        for i in range(spec.num_layers):
            self._qkv(i, at, own, rows)
            scale = _f32(weights.layer(f"{trunk_block(i)}.attn.proj").input_scale)
            caches = (at[f"k_cache.{i}"], at[f"v_cache.{i}"], own["attended"])
            operands = (own["qkv"], at["own"], at["targets"], at["start"], *self._rotary(i), *caches)
            self._launch("attend_step", rows * spec.num_heads, *operands, *map(_i32, sizes), scale)
            self._after_attention(i, at, own, rows)
        projection = weights.layer("latent_condition_proj")
        self._norm(at["x"], 0, 0, own["normed"], rows, spec.hidden_size, 0, projection)
        self._product(projection, own["normed"], at["latent"], rows)
        self._head_modulation(at, own)

    def _head_modulation(self, at: Addresses, own: Addresses) -> None:
        """For all passes at once: every one of their rows goes to its pass's buffer, through a table of addresses."""
        spec, rows, passes = self._spec, self.profile.rows, self.profile.passes
        buffers = [at[f"head_modulation.{s}"] for s in range(passes)]
        if buffers != self._tabled:
            self._device.upload(self._table, np.array(buffers, dtype=np.uint64))
            self._tabled = buffers
        width = self.profile.head_modulation_width(spec)
        names = [*map(head_block, range(spec.head_layers)), "lm_head.adaln_before_head"]
        operands = (at["ratio_embedding"], at["latent"], own["condition"])
        sizes = (_i32(passes), _i32(rows), _i32(spec.head_width))
        written = None  # the scale of what is in own["condition"]
        for i, name in enumerate(names):
            layer = self._weights.layer(f"{name}.adaLN_modulation.1")
            if layer.input_scale != written:
                written = layer.input_scale
                items = passes * rows * spec.head_width
                self._elementwise("head_condition", items, *operands, *sizes, _f32(written))
            offset = 3 * i * spec.head_width
            epilogue = Epilogue(destination=Destination.TABLE, group=rows, stride=width, offset=offset)
            self._product(layer, own["condition"], self._table, passes * rows, epilogue)

    def _head_pass(self, at: Addresses, own: Addresses) -> None:
        spec, weights, rows, w = self._spec, self._weights, self.profile.rows, self._spec.head_width
        width, modulation = self.profile.head_modulation_width(spec), at["head_modulation"]
        first_norm = weights["lm_head.ln_pre.weight"]
        for i in range(spec.head_layers):
            up, down = (weights.layer(f"{head_block(i)}.mlp.{name}") for name in ("w12", "w3"))
            shift, scale, gate = (modulation + (3 * i + piece) * w * ITEMSIZE for piece in range(3))
            self._norm(at["x"], scale, shift, own["normed"], rows, w, width, up, first_norm if i == 0 else 0)
            hidden = Epilogue(Activation.SWIGLU, Destination.INPUT, out_scale=down.input_scale)
            self._product(up, own["normed"], own["hidden"], rows, hidden)
            residual = Epilogue(destination=Destination.ADD, gate=gate, stride=width)
            self._product(down, own["hidden"], at["x"], rows, residual)
        scale, shift = (modulation + (3 * spec.head_layers + piece) * w * ITEMSIZE for piece in range(2))
        output = weights.layer("lm_head.output_embed")
        self._norm(at["x"], scale, shift, own["normed"], rows, w, width, output)
        self._product(output, own["normed"], at["logits"], rows)

    def _decode(self, at: Addresses, own: Addresses) -> None:
        spec, weights, images = self._spec, self._weights, self.profile.decode_images
        cells, x, normed = spec.image_seq_len, own["x"], own["normed"]
        positions, rows = 1 + cells, images * (1 + cells)
        first = weights.layer("quantize.out_proj")
        width, padded = first.out_features, first.in_features
        padding = (at["bits"], own["padded"], _i32(images * cells), _i32(spec.token_size), _i32(padded))
        self._elementwise("pad_rows", images * cells * padded, *padding)
        self._product(first, own["padded"], own["projected"], images * cells)
        tables = (weights["decoder.class_embedding"], weights["decoder.positional_embedding"])
        counts = map(_i32, (images, cells, width))
        self._elementwise("embed_image", rows * width, own["projected"], *tables, x, *counts)
        before = (weights["decoder.ln_pre.weight"], weights["decoder.ln_pre.bias"])
        self._launch("layer_norm_in_place", rows, x, *before, _i32(width))
        to_attention, residual = Epilogue(destination=Destination.INPUT), Epilogue(destination=Destination.ADD)
        head_dim = width // DECODER_HEADS
        attend = f"attend_image_{next(dim for dim in DECODER_HEAD_DIMS if dim >= head_dim)}"
        blocks = images * DECODER_HEADS * -(-positions // _QUERIES)
        for i in range(self._decoder_layers):
            block = decoder_block(i)
            qkv, proj, up, down = map(
                weights.layer, (f"{block}.attn.qkv", f"{block}.attn.proj", f"{block}.mlp.fc1", f"{block}.mlp.fc2")
            )
            self._layer_norm(f"{block}.norm1", x, normed, rows, width, qkv.input_scale)
            self._product(qkv, normed, own["qkv"], rows, to_attention)
            heads = map(_i32, (positions, DECODER_HEADS, head_dim))
            self._launch(attend, blocks, own["qkv"], own["attended"], *heads, _f32(proj.input_scale))
            self._product(proj, own["attended"], x, rows, residual)
            self._layer_norm(f"{block}.norm2", x, normed, rows, width, up.input_scale)
            hidden = Epilogue(Activation.GELU, Destination.INPUT, out_scale=down.input_scale)
            self._product(up, normed, own["hidden"], rows, hidden)
            self._product(down, own["hidden"], x, rows, residual)
        last = weights.layer("decoder.ffn.0")
        self._layer_norm("decoder.ln_post", x, normed, images * cells, width, last.input_scale, kept=cells, skipped=1)
        self._product(last, normed, own["patches"], images * cells)
        conv = (weights["decoder.conv_out.weight"], weights["decoder.conv_out.bias"], at["image"])
        sizes = (_i32(images), _i32(spec.grid_size), _i32(spec.decoder_patch_size))
        self._elementwise("conv_out", images * 3 * spec.image_size**2, own["patches"], *conv, *sizes)

    def _qkv(self, i: int, at: Addresses, own: Addresses, rows: int) -> None:
        layer = self._weights.layer(f"{trunk_block(i)}.attn.qkv")
        shift, scale, _ = self._pieces(at, i, 0, rows)
        self._norm(at["x"], scale, shift, own["normed"], rows, self._spec.hidden_size, self._spec.hidden_size, layer)
        self._product(layer, own["normed"], own["qkv"], rows)

    def _after_attention(self, i: int, at: Addresses, own: Addresses, rows: int) -> None:
        d, block = self._spec.hidden_size, trunk_block(i)
        proj, up, down = map(self._weights.layer, (f"{block}.attn.proj", f"{block}.mlp.w12", f"{block}.mlp.w3"))
        *_, gate = self._pieces(at, i, 0, rows)
        residual = Epilogue(destination=Destination.ADD, gate=gate, stride=d)
        self._product(proj, own["attended"], at["x"], rows, residual)
        shift, scale, gate = self._pieces(at, i, 1, rows)
        self._norm(at["x"], scale, shift, own["normed"], rows, d, d, up)
        hidden = Epilogue(Activation.SWIGLU, Destination.INPUT, out_scale=down.input_scale)
        self._product(up, own["normed"], own["hidden"], rows, hidden)
        residual = Epilogue(destination=Destination.ADD, gate=gate, stride=d)
        self._product(down, own["hidden"], at["x"], rows, residual)

    def _pieces(self, at: Addresses, i: int, part: int, rows: int) -> tuple[Address, Address, Address]:
        """Shift, scale and gate of a layer's attention (part 0) or MLP (1): [rows, D] each."""
        size = rows * self._spec.hidden_size * ITEMSIZE
        begin = at["modulation"] + (6 * i + 3 * part) * size
        return begin, begin + size, begin + 2 * size

    def _rotary(self, i: int) -> tuple[Address, ...]:
        return tuple(self._weights[name] for name in (f"{trunk_block(i)}.attn.qk_norm.weight", "rope_cos", "rope_sin"))

    def _norm(
        self, x: Address, scale: Address, shift: Address, out: Address, rows: int, width: int, stride: int,
        reader: Layer, first_weight: Address = 0,
    ) -> None:  # fmt: skip
        """RMS norm and modulation, in what the layer reads that comes next."""
        sizes = (_i32(width), _i32(stride), _f32(reader.input_scale))
        self._launch("norm_modulate", rows, x, first_weight, scale, shift, out, *sizes)

    def _layer_norm(
        self, name: str, x: Address, out: Address, rows: int, width: int, out_scale: float = 0, *, kept: int = 1,
        skipped: int = 0,
    ) -> None:  # fmt: skip
        weights = (self._weights[f"{name}.weight"], self._weights[f"{name}.bias"])
        sizes = (_i32(width), _i32(kept), _i32(skipped), _f32(out_scale))
        self._launch("layer_norm", rows, x, *weights, out, *sizes)

    def _product(self, layer: Layer, x: Address, out: Address, rows: int, epilogue: Epilogue = PLAIN) -> None:
        block = block_rows(rows, layer.out_features, self._device.multiprocessors)
        self._module.launch(*product(layer, x, out, rows, epilogue, block))

    def _elementwise(self, kernel: str, items: int, *arguments: Argument) -> None:
        self._launch(kernel, max(1, min(self._device.blocks, -(-items // THREADS))), *arguments)

    def _launch(self, kernel: str, blocks: int, *arguments: Argument) -> None:
        self._module.launch(kernel, blocks, arguments)


def _placed(sizes: Mapping[str, int], begin: Address) -> dict[str, Address]:
    """Buffers one behind the other."""
    addresses = {}
    for name, size in sizes.items():
        addresses[name] = begin
        begin += size
    return addresses


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
