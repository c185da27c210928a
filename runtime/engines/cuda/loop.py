"""The bit-sampling loop on a GPU, shared by every engine that runs there.

A token is one captured CUDA graph: kernels of ours (`kernels.cu`) around the trunk's step and the S head passes. It
is launched N times without the host waiting for anything: bits, noise, KV cache, latents and the token's index stay on
the device. Prefix, modulation and decoder are captured graphs as well. The engine gives what is in them (`Graphs`); the
loop owns every buffer, allocates them once, and knows their sizes before.

With a `Timeline` a token is two graphs, the trunk's part and the head's, so that the GPU's time can be told apart.

A profile has a fixed number of rows. Fewer images than fit are drawn beside copies of the first one, whose bits are
thrown away; an image does not depend on its company.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bar_edge.runtime.engines import Batch, TokenProgress
from bar_edge.runtime.engines.cuda.device import Address, CudaGraph, Device, DeviceArray, address_of
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.cuda.timeline import Timeline
from bar_edge.runtime.errors import CompatibilityError, EngineError
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import Schedule, guidance_at
from bar_edge.runtime.spec import FIRST_CLASS_SYMBOL, ModelSpec, Recipe

ALIGNMENT = 256  # of every buffer
TABLES = (  # what the kernels read, in fp32, by their names in `weights.safetensors`
    "symbol_embedding",
    "bit_embedding",
    "pos_embed",
    "target_aware_pos_embed",
    "lm_head.bit_embedding",
    "lm_head.masked_embedding",
)
MAX_BITS = 256  # of a token, in kernels.cu
ITEMSIZES = {"fp16": 2, "bf16": 2, "fp32": 4}  # of modulation, keys and values, by the precision of products
GRAPHS = ("modulation", "mask_ratio", "prefix", "step", "head_pass", "decode")
Floats = NDArray[np.float32]
_i32, _u64 = np.int32, np.uint64


class Graphs(Protocol):
    """The compiled graphs of one profile (`export/tensorrt_graphs.py` says what each reads and gives)."""

    profile: Profile
    itemsize: int  # bytes of the type of modulation, keys and values
    in_place: bool  # the step updates the caches itself; else it gives kv

    def enqueue(self, graph: str, addresses: Mapping[str, Address]) -> None:
        """Put a call of a graph into the device's stream; capturable. Raises EngineError."""

    def close(self) -> None:
        """Release what it holds."""


def check_bits(spec: ModelSpec) -> None:
    """Raise CompatibilityError for tokens of more bits than the kernels that draw them take."""
    if spec.bits_per_token > MAX_BITS:
        raise CompatibilityError(
            f"tokens of this model have {spec.bits_per_token} bits, GPU engines draw {MAX_BITS} at most; use "
            "--engine onnxruntime"
        )


def buffer_sizes(spec: ModelSpec, profile: Profile, *, itemsize: int, in_place: bool) -> dict[str, int]:
    """Bytes of every buffer of the loop but the tables. An unguided batch has as many images as there are rows."""
    rows, passes, group = profile.rows, profile.passes, profile.prefix_rows
    n, k, d, w = spec.num_tokens, spec.bits_per_token, spec.hidden_size, spec.head_width
    length, pairs, layers = spec.prefix_length - 1, profile.modulation_pairs, spec.num_layers
    flat, kv_row = group * length, d * itemsize
    decoded = -(-rows // profile.decode_images) * profile.decode_images
    sizes = {
        "token": 4, "zero": 4, "classes": 4 * rows, "class_slot": 4 * rows, "chunk": 8, "orders": 4 * rows * n,
        "guidance": 4 * n, "temperature": 4 * passes, "remask_count": 4 * passes, "mask_ratio": 4 * passes,
        "image_index": 4 * rows, "u_bits": 8 * n * passes * rows * k, "u_confidence": 4 * n * passes * rows * k,
        "pair_classes": 4 * pairs * _chunks(n, pairs, rows), "pair_positions": 4 * pairs * _chunks(n, pairs, rows),
        "class_id": 4 * pairs, "positions": 4 * pairs, "modulation": 6 * layers * pairs * d * itemsize,
        "prefix.symbols": 4 * flat, "prefix.own": 4 * flat, "prefix.targets": 4 * flat, "prefix.index": 4 * flat,
        "prefix.x": 4 * flat * d, "prefix.modulation": 6 * layers * flat * d * itemsize,
        "prefix.kv": 2 * layers * flat * kv_row,
        "caches": 2 * layers * rows * profile.cache_length(spec) * kv_row,
        "symbols": 4 * rows, "own": 4 * rows, "targets": 4 * rows, "start": 4 * rows, "modulation_index": 4 * rows,
        "x": 4 * rows * d, "step.modulation": 6 * layers * rows * d * itemsize,
        "step.kv": 0 if in_place else 2 * layers * rows * kv_row,
        "ratio_embedding": 4 * passes * w, "latent": 4 * rows * w,
        **{f"head_modulation.{s}": rows * profile.head_modulation_width(spec) * itemsize for s in range(passes)},
        "head.x": 4 * rows * w, "logits": 8 * rows * k, "known": rows * k, "bits": rows * k,
        "tokens": rows * n * k, "history": rows * n * k,
        "cells": 4 * decoded * spec.image_seq_len * spec.token_size, "image": 12 * decoded * spec.image_size**2,
        "decode.bits": 4 * profile.decode_images * spec.image_seq_len * spec.token_size,
        "decode.image": 12 * profile.decode_images * spec.image_size**2,
    }  # fmt: skip
    return {name: -(-size // ALIGNMENT) * ALIGNMENT for name, size in sizes.items()}


class Loop:
    """Samples and decodes batches of at most `profile.rows` rows on a device."""

    def __init__(self, spec: ModelSpec, tables: Mapping[str, Floats], graphs: Graphs, device: Device) -> None:
        """Allocates every buffer. Raises EngineError, with the batch that would fit, if memory does not suffice.

        Raises CompatibilityError for tokens of too many bits.
        """
        check_bits(spec)
        self._spec, self._graphs, self._device, self._profile = spec, graphs, device, graphs.profile
        self._row_bytes = spec.head_dim * graphs.itemsize
        # by part of a token and images of a batch: the rows stay, what they mean changes
        self._tokens: dict[tuple[str, int], CudaGraph] = {}
        self._calls: dict[str, CudaGraph] = {}
        self._images = self._profile.rows  # of the last batch, copies included
        sizes = buffer_sizes(spec, self._profile, itemsize=graphs.itemsize, in_place=graphs.in_place)
        self._table_bytes = sum(tables[name].nbytes for name in TABLES)
        self.bytes = sum(sizes.values()) + self._table_bytes
        self._at: dict[str, Address] = {}
        with device.current():
            try:
                for name, size in sizes.items():
                    self._at[name] = device.allocate(size) if size else 0
                for name in TABLES:
                    self._at[name] = device.allocate(tables[name].nbytes)
                    device.upload(self._at[name], np.ascontiguousarray(tables[name]))
            except MemoryError as error:
                for address in filter(None, self._at.values()):
                    device.free(address)
                raise EngineError(self._too_large(device.free_bytes())) from error

    def capacity(self, recipe: Recipe) -> int:
        """Images that fit in one batch."""
        return self._profile.rows // copies_of(recipe)

    def sample(
        self, batch: Batch, progress: TokenProgress | None = None, history: NDArray[np.uint8] | None = None
    ) -> NDArray[np.uint8]:
        """Bits [B, N, K] by generation step."""
        spec = self._spec
        with self._device.current():
            images = self._sample(batch, history, None)
            tokens = np.empty((images, spec.num_tokens, spec.bits_per_token), dtype=np.uint8)
            self._device.download(self._at["tokens"], tokens)
        if progress is not None:
            progress(spec.num_tokens, spec.num_tokens)
        return tokens[: len(batch.class_ids)]

    def draw(
        self, batch: Batch, progress: TokenProgress | None = None, timeline: Timeline | None = None
    ) -> tuple[NDArray[np.uint8], Floats]:
        """`sample`, and the images [B, 3, H, W] of what was drawn, decoded without leaving the device."""
        spec, at, count = self._spec, self._at, len(batch.class_ids)
        with self._device.current():
            images = self._sample(batch, None, timeline)
            sizes = (images, spec.num_tokens, spec.bits_per_token, spec.patch_size)
            arguments = (at["tokens"], at["orders"], at["cells"], *map(_i32, sizes))
            with _stage(timeline, "decode"):
                self._elementwise("to_cells", images * spec.num_tokens * spec.bits_per_token, *arguments)
                self._decode(count)
            tokens = np.empty((images, spec.num_tokens, spec.bits_per_token), dtype=np.uint8)
            self._device.download(at["tokens"], tokens)
            decoded = np.empty((count, 3, spec.image_size, spec.image_size), dtype=np.float32)
            self._device.download(at["image"], decoded)
        if progress is not None:
            progress(spec.num_tokens, spec.num_tokens)
        return tokens[:count], decoded

    def decode(self, bits: Any) -> Floats:
        """Bits of the fine grid [B, cells, token_size], an array or a float32 one on the device -> [B, 3, H, W]."""
        spec, most = self._spec, self._profile.rows
        shape = (spec.image_seq_len, spec.token_size)
        images = np.empty((len(bits), 3, spec.image_size, spec.image_size), dtype=np.float32)
        on_device = hasattr(bits, "__cuda_array_interface__")
        begin_address = address_of(bits, (len(bits), *shape), np.float32) if on_device else 0
        size = 4 * spec.image_seq_len * spec.token_size
        with self._device.current():
            if on_device:
                self._wait_for_maker(bits.__cuda_array_interface__)
            for begin in range(0, len(bits), most):
                part = images[begin : begin + most]
                if on_device:
                    self._device.copy(self._at["cells"], begin_address + begin * size, len(part) * size)
                else:
                    cells = np.ascontiguousarray(bits[begin : begin + most], dtype=np.float32)
                    self._device.upload(self._at["cells"], cells)
                self._decode(len(part))
                self._device.download(self._at["image"], part)
        return images

    def _wait_for_maker(self, facts: Mapping[str, Any]) -> None:
        """Of an array on the device: its stream if it names one, everything if it does not say that it need not be."""
        if "stream" not in facts or facts["stream"] is not None:
            self._device.wait_for(facts.get("stream"))

    def images_on_device(self, count: int, stream: int) -> DeviceArray:
        """The images [count, 3, H, W] decoded last."""
        size = self._spec.image_size
        return DeviceArray(self._at["image"], (count, 3, size, size), np.dtype(np.float32), stream)

    def last_latents(self, images: int) -> Floats:
        """Latents [rows, W] that conditioned the last token of the first `images` images, conditional rows first."""
        latents = np.empty((self._profile.rows, self._spec.head_width), dtype=np.float32)
        with self._device.current():
            self._device.download(self._at["latent"], latents)
        return self._rows_of(images, latents)

    def first_logits(self, images: int) -> Floats:
        """Logits [rows, K, 2] of the last token's first head pass, computed again; rows as of `last_latents`."""
        logits = np.empty((self._profile.rows, self._spec.bits_per_token, 2), dtype=np.float32)
        with self._device.current():
            self._head_pass(self._images, 0)
            self._device.download(self._at["logits"], logits)
        return self._rows_of(images, logits)

    def close(self) -> None:
        """Release graphs and memory; the device stays."""
        with self._device.current():
            self._graphs.close()
            for address in filter(None, self._at.values()):
                self._device.free(address)
        self._at.clear()

    def _sample(self, batch: Batch, history: NDArray[np.uint8] | None, timeline: Timeline | None) -> int:
        """Put everything up to the last token into the stream; returns the images it draws, copies included."""
        spec, device, at = self._spec, self._device, self._at
        images = self.capacity(batch.recipe)
        self._check(batch, images)
        placed = self._place(batch, images)
        with _stage(timeline, "prefix"):
            self._noise(batch, images)
            self._call("mask_ratio", {name: name for name in ("mask_ratio", "ratio_embedding")})
            self._prefix(placed)
        positions = self._profile.modulation_pairs // len(placed.distinct)  # of one chunk
        self._upload("class_slot", placed.slots)
        self._upload("chunk", np.array([positions, len(placed.distinct)]))
        self._upload_pairs(placed.distinct, positions)
        if history is not None:
            self._upload("history", _padded(history, images).transpose(1, 0, 2), np.uint8)
        with _stage(timeline, "prefix"):
            self._chunk(0)
        token = self._token(images, apart=timeline is not None)
        token_bytes = images * spec.bits_per_token
        for n in range(spec.num_tokens):
            if n and n % positions == 0:
                with _stage(timeline, "prefix"):
                    self._chunk(n // positions)
            for part, graph in token.items():
                with _stage(timeline, part):
                    device.replay(graph)
            if history is not None:
                device.copy(at["bits"], at["history"] + n * token_bytes, token_bytes)
        self._images = images
        return images

    def _check(self, batch: Batch, images: int) -> None:
        if len(batch.class_ids) > images:
            raise EngineError(f"{len(batch.class_ids)} images in a batch, these engines were compiled for {images}")
        if len(batch.recipe.allocation) != self._profile.passes:
            raise CompatibilityError(
                f"allocation {','.join(map(str, batch.recipe.allocation))}: these engines were compiled for "
                f"{self._profile.passes} head passes; choose an allocation with as many"
            )

    def _place(self, batch: Batch, images: int) -> "_Placed":
        """Upload what a batch is."""
        spec, recipe = self._spec, batch.recipe
        orders = _padded(batch.orders, images)
        classes = _padded(batch.class_ids, images)
        if copies_of(recipe) == 2:
            classes = np.concatenate((classes, np.full_like(classes, spec.unconditional_class)))
        classes = _padded(classes, self._profile.rows)  # an odd row is left over with guidance
        distinct, slots = np.unique(classes, return_inverse=True)
        schedule = Schedule.of(recipe, spec.bits_per_token)
        scales = [guidance_at(n, recipe.guidance, spec.num_tokens) for n in range(spec.num_tokens)]
        self._upload("token", np.zeros(1))
        self._upload("classes", classes)
        self._upload("orders", orders)
        self._upload("temperature", schedule.temperature, np.float32)
        self._upload("mask_ratio", schedule.mask_ratio, np.float32)
        self._upload("remask_count", schedule.remask_count)
        self._upload("guidance", np.array(scales), np.float32)
        first_targets = spec.prefix_length + _padded(np.tile(orders[:, 0], copies_of(recipe)), self._profile.rows)
        return _Placed(classes, slots.reshape(-1), distinct, first_targets)

    def _noise(self, batch: Batch, images: int) -> None:
        """Uniforms of the whole image: drawn on the device from a seed, uploaded if they were recorded."""
        spec, at = self._spec, self._at
        sizes = (spec.num_tokens, self._profile.passes, images, spec.bits_per_token)
        if isinstance(batch.noise, SeededNoise):
            indices = _padded(np.array(batch.noise.image_indices, dtype=np.uint32), images)
            self._upload("image_index", indices, np.uint32)
            arguments = (_u64(batch.noise.seed), at["image_index"], at["u_bits"], at["u_confidence"], *map(_i32, sizes))
            self._elementwise("fill_uniforms", 3 * int(np.prod(sizes)) // 4, *arguments)
            return
        u_bits, u_confidence = batch.noise.uniforms(sizes[0], sizes[1], sizes[3])
        self._upload("u_bits", _padded(u_bits, images, axis=2), np.float32)
        self._upload("u_confidence", _padded(u_confidence, images, axis=2), np.float32)

    def _prefix(self, placed: "_Placed") -> None:
        """Fill the caches with all prefix positions but the last, a group of rows at a time."""
        spec, profile, at = self._spec, self._profile, self._at
        group, length = profile.prefix_rows, spec.prefix_length - 1
        flat = group * length
        for begin in range(0, len(placed.classes), group):
            ids = placed.classes[begin : begin + group]
            symbols = np.repeat(ids[:, None] + FIRST_CLASS_SYMBOL, length, axis=1)
            symbols[:, 0] = spec.first_position_symbol
            self._upload("prefix.symbols", symbols)
            self._upload("prefix.own", np.tile(np.arange(length), group))
            self._upload("prefix.targets", np.repeat(placed.first_targets[begin : begin + group], length))
            distinct, slots = np.unique(ids, return_inverse=True)
            positions = profile.modulation_pairs // len(distinct)
            for first in range(0, length, positions):
                chunk = np.arange(first, first + positions)
                self._modulation(distinct, np.minimum(chunk, length - 1))
                here = np.arange(length) - first
                index = here * len(distinct) + slots.reshape(-1, 1)  # [group, length]
                index[:, (here < 0) | (here >= positions)] = -1  # of another chunk
                self._upload("prefix.index", index)
                self._gather("prefix.index", "prefix.modulation", flat)
            self._embed("prefix.", flat, bits=False)
            bound = ("x", "own", "targets", "modulation", "kv")
            self._call("prefix", {name: f"prefix.{name}" for name in bound})
            self._write_kv("prefix.kv", at["zero"], begin, group, length)

    def _modulation(self, classes: NDArray[np.int64], positions: NDArray[np.int64]) -> None:
        """Modulation of every class at every position, positions major; the rest of the chunk repeats the last pair."""
        pairs = self._profile.modulation_pairs
        for name, values in (
            ("class_id", np.tile(classes, len(positions))),
            ("positions", np.repeat(positions, len(classes))),
        ):
            self._upload(name, _padded(values, pairs))
        self._call("modulation", {name: name for name in ("class_id", "positions", "modulation")})

    def _upload_pairs(self, classes: NDArray[np.int64], positions: int) -> None:
        """The (class, position) pairs of all chunks of the token loop, so that it needs nothing from the host."""
        spec, pairs = self._spec, self._profile.modulation_pairs
        last = spec.prefix_length + spec.num_tokens - 2
        chunks = _chunks(spec.num_tokens, pairs, len(classes))
        of_chunk = np.full((2, chunks, pairs), last)
        of_chunk[0] = classes[-1]
        for i in range(chunks):
            begin = spec.prefix_length - 1 + i * positions
            chunk = np.minimum(np.arange(begin, begin + positions), last)
            of_chunk[0, i, : positions * len(classes)] = np.tile(classes, positions)
            of_chunk[1, i, : positions * len(classes)] = np.repeat(chunk, len(classes))
        self._upload("pair_classes", of_chunk[0])
        self._upload("pair_positions", of_chunk[1])

    def _chunk(self, number: int) -> None:
        """Modulation of the next positions of the token loop."""
        at, size = self._at, 4 * self._profile.modulation_pairs
        self._device.copy(at["class_id"], at["pair_classes"] + number * size, size)
        self._device.copy(at["positions"], at["pair_positions"] + number * size, size)
        self._call("modulation", {name: name for name in ("class_id", "positions", "modulation")})

    def _token(self, images: int, *, apart: bool) -> dict[str, CudaGraph]:
        """One token, captured: in one graph, or in two that are timed apart."""
        parts = {"trunk": self._trunk_part, "head": self._head_part} if apart else {"token": self._one_token}
        for part, work in parts.items():
            if (part, images) not in self._tokens:
                self._tokens[part, images] = self._captured(partial(work, images))
                self._upload("token", np.zeros(1))
        return {part: self._tokens[part, images] for part in parts}

    def _captured(self, work: Callable[[], None]) -> CudaGraph:
        """The work has run once then, because an engine may allocate at its first call."""
        work()
        return self._device.capture(work)

    def _one_token(self, images: int) -> None:
        self._trunk_part(images)
        self._head_part(images)

    def _trunk_part(self, images: int) -> None:
        """From the bits of the last token to the latents of this one."""
        spec, at, rows = self._spec, self._at, self._profile.rows
        place = ("token", "classes", "class_slot", "chunk", "orders", "symbols", "own", "targets", "start")
        sizes = (rows, images, spec.num_tokens, spec.prefix_length, spec.num_classes)
        self._elementwise("place_token", rows, *(at[name] for name in place), at["modulation_index"], *map(_i32, sizes))
        self._gather("modulation_index", "step.modulation", rows)
        self._embed("", rows, bits=True, images=images)
        self._enqueue("step", self._step_bindings())
        if not self._graphs.in_place:
            self._write_kv("step.kv", at["start"], 0, rows, 1)

    def _head_part(self, images: int) -> None:
        """From the latents to the bits."""
        spec, at, rows = self._spec, self._at, self._profile.rows
        k, passes = spec.bits_per_token, self._profile.passes
        schedule = ("u_bits", "u_confidence", "guidance", "temperature", "remask_count", "known", "bits", "tokens")
        for s in range(passes):
            self._head_pass(images, s)
            drawn = (s, passes, spec.num_tokens, images, k, rows // images - 1)
            buffers = [at[name] for name in ("logits", *schedule, "token")]
            self._device.launch("sample_pass", images, [*buffers, *map(_i32, drawn)])
        self._device.launch("advance", 1, (at["token"],))

    def _head_pass(self, images: int, s: int) -> None:
        """From the bits known before pass s, none in the first one, to its logits."""
        spec, at = self._spec, self._at
        state = ("known", "bits", "lm_head.bit_embedding", "lm_head.masked_embedding", "head.x")
        sizes = (self._profile.rows, images, spec.bits_per_token, spec.head_width, s)
        self._elementwise("head_embed", images * spec.head_width, *(at[name] for name in state), *map(_i32, sizes))
        self._enqueue("head_pass", {"x": "head.x", "head_modulation": f"head_modulation.{s}", "logits": "logits"})

    def _step_bindings(self) -> dict[str, str | Address]:
        spec, profile = self._spec, self._profile
        names = ("x", "own", "targets", "start", "ratio_embedding", "latent")
        bound: dict[str, str | Address] = {name: name for name in names}
        bound["modulation"] = "step.modulation"
        bound |= {f"head_modulation.{s}": f"head_modulation.{s}" for s in range(profile.passes)}
        size = profile.rows * spec.num_heads * profile.cache_length(spec) * self._row_bytes
        for i in range(2 * spec.num_layers):
            name = f"{'kv'[i % 2]}_cache"
            bound[f"{name}.{i // 2}"] = self._at["caches"] + i * size
            if self._graphs.in_place:
                bound[f"{name}_out.{i // 2}"] = self._at["caches"] + i * size
        if not self._graphs.in_place:
            bound["kv"] = "step.kv"
        return bound

    def _decode(self, images: int) -> None:
        """Cells of so many images to pixels, as many at a time as the decoder takes."""
        spec, at, together = self._spec, self._at, self._profile.decode_images
        cells, image = 4 * spec.image_seq_len * spec.token_size, 12 * spec.image_size**2  # bytes of one
        for begin in range(0, images, together):  # through buffers of their own, which are aligned
            self._device.copy(at["decode.bits"], at["cells"] + begin * cells, together * cells)
            self._call("decode", {"bits": "decode.bits", "image": "decode.image"})
            self._device.copy(at["image"] + begin * image, at["decode.image"], together * image)

    def _rows_of(self, images: int, values: Floats) -> Floats:
        """Of the first `images` images of the last batch, conditional rows first."""
        return np.concatenate([values[i * self._images :][:images] for i in range(len(values) // self._images)])

    def _embed(self, prefix: str, positions: int, *, bits: bool, images: int = 1) -> None:
        spec, at = self._spec, self._at
        rows = (at[f"{prefix}{name}"] for name in ("symbols", "own", "targets"))
        tables = (at[name] for name in TABLES[:4])
        sizes = (positions, spec.hidden_size, spec.bits_per_token, images)
        arguments = (*rows, at["bits"] if bits else 0, *tables, at[f"{prefix}x"], *map(_i32, sizes))
        self._elementwise("embed", positions * spec.hidden_size, *arguments, at["token"] if bits else 0)

    def _gather(self, index: str, out: str, count: int) -> None:
        """Rows of the modulation table."""
        spec, at = self._spec, self._at
        row = spec.hidden_size * self._graphs.itemsize
        sizes = (6 * spec.num_layers, self._profile.modulation_pairs, count, row)
        units = sizes[0] * count * (row // 16 or 1)
        self._elementwise("gather_rows", units, at["modulation"], at[index], at[out], *map(_i32, sizes))

    def _write_kv(self, source: str, start: Address, row: int, rows: int, positions: int) -> None:
        spec, profile, at = self._spec, self._profile, self._at
        length = profile.cache_length(spec)
        sizes = (row, spec.num_layers, rows, spec.num_heads, positions, profile.rows, length, self._row_bytes)
        units = 2 * spec.num_layers * rows * spec.num_heads * positions * (self._row_bytes // 16 or 1)
        self._elementwise("write_kv", units, at[source], at["caches"], start, *map(_i32, sizes))

    def _call(self, graph: str, bindings: Mapping[str, str]) -> None:
        """A graph that is always bound to the same buffers: the host launches its kernels one by one only once."""
        if graph in self._calls:
            self._device.replay(self._calls[graph])
        else:
            self._calls[graph] = self._captured(partial(self._enqueue, graph, bindings))

    def _enqueue(self, graph: str, bindings: Mapping[str, str | Address]) -> None:
        at = self._at
        self._graphs.enqueue(graph, {name: at[to] if isinstance(to, str) else to for name, to in bindings.items()})

    def _elementwise(self, kernel: str, items: int, *arguments: Any) -> None:
        blocks = max(1, min(self._device.blocks, -(-items // self._device.threads)))
        self._device.launch(kernel, blocks, arguments)

    def _upload(self, name: str, values: NDArray[Any], dtype: Any = np.int32) -> None:
        self._device.upload(self._at[name], np.ascontiguousarray(values, dtype=dtype))

    def _too_large(self, free: int) -> str:
        """A sentence about memory: what is needed, what there is, and the rows that would fit."""
        fits = 0
        for rows in range(self._profile.rows - 1, 0, -1):
            smaller = Profile.of(rows, guided=False, passes=self._profile.passes)
            sizes = buffer_sizes(self._spec, smaller, itemsize=self._graphs.itemsize, in_place=self._graphs.in_place)
            if sum(sizes.values()) + self._table_bytes <= free:
                fits = rows
                break
        remedy = f"{fits} rows would fit, choose a batch of {fits // 2}"
        if fits < 2:
            remedy = "not one guided image would fit; free some memory, or use a smaller model"
        return (
            f"the loop needs {self.bytes / 2**20:.0f} MiB of device memory for {self._profile.rows} rows (two an image "
            f"with guidance), {free / 2**20:.0f} MiB are free: {remedy}"
        )


@dataclass(frozen=True)
class _Placed:
    """The rows of a batch."""

    classes: NDArray[np.int64]  # [R]
    slots: NDArray[np.int64]  # [R] which of the distinct classes
    distinct: NDArray[np.int64]  # [U]
    first_targets: NDArray[np.int64]  # [R] table row of what the first token predicts


def _stage(timeline: Timeline | None, name: str) -> AbstractContextManager[None]:
    """A stage of a timeline, if there is one."""
    return nullcontext() if timeline is None else timeline.stage(name)


def _chunks(tokens: int, pairs: int, classes: int) -> int:
    """Chunks of modulation in the token loop."""
    return -(-tokens // (pairs // classes))


def copies_of(recipe: Recipe) -> int:
    """Rows of an image."""
    return 2 if recipe.guidance > 1 else 1


def _padded(values: NDArray[Any], count: int, axis: int = 0) -> NDArray[Any]:
    """`count` values along an axis: those given, then the first one again and again."""
    index = np.arange(count)
    index[index >= values.shape[axis]] = 0
    return values.take(index, axis=axis)
