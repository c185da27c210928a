"""The kernels of the engine `cuda` against numpy, executed on the CPU, and on the GPU where there is one."""

import math

import numpy as np
import pytest

from bar_edge.calibration.quantize import from_blocks, per_channel, to_blocks
from bar_edge.export.prepack import prepacked
from bar_edge.runtime.engines.cuda.graphs import Activation, Destination
from bar_edge.runtime.engines.cuda.module import THREADS
from bar_edge.runtime.precisions import BITS
from bar_edge.runtime.spec import LAYER_NORM_EPS, RMS_NORM_EPS

from .host import Part, Table

FORMS = ("fp16", "int8", "int8-weight", "int4-weight")
INPUT_SCALE, OUT_SCALE = np.float32(0.02), np.float32(0.03)
ACTIVATIONS = pytest.mark.parametrize("out_scale", [np.float32(0), OUT_SCALE], ids=["float16", "int8"])
KERNELS = (16, 32, 64, None)  # rows of a block of few_rows; many_rows
LAUNCHES = """
from host import walled

i32, f32 = np.int32, np.float32
rng = np.random.default_rng(0)

def floats(*shape):
    return walled(rng.standard_normal(shape, dtype=np.float32))

def halves(*shape):
    return walled(rng.standard_normal(shape, dtype=np.float32).astype(np.float16).view(np.uint16))

def product(kernel, blocks, inputs, activation, rows=3, outputs=68):
    weight = walled(rng.integers(0, 99, (9, 2 * 512), dtype=np.uint8))
    scale = floats(outputs) if "int8" in kernel else halves(outputs, inputs // 32)
    integers = "int8" in kernel and "weight" not in kernel
    x = walled(rng.integers(0, 99, (rows, inputs), dtype=np.uint8)) if integers else halves(rows, inputs)
    sizes = [i32(size) for size in (rows, outputs, inputs, 32)]
    out = (floats(rows, outputs // 2 if activation == 3 else outputs), None)
    rest = (f32(1), i32(activation), i32(0), f32(0), i32(1), i32(0), i32(0))
    kernels.launch(kernel, blocks, 256, weight, scale, floats(outputs), x, *out, *sizes, *rest)

for form, inputs in (("fp16", 48), ("int8", 80), ("int8_weight", 80), ("int4_weight", 192)):
    product(f"few_rows_{form}_16", 9, inputs, 3)
    product(f"many_rows_{form}", 2, inputs, 3)
x, weight = floats(2, 150), floats(150)
kernels.launch("norm_modulate", 2, 256, x, weight, None, None, halves(2, 150), i32(150), i32(0), f32(0))
kernels.launch("layer_norm", 2, 256, x, weight, weight, halves(2, 150), i32(150), i32(1), i32(0), f32(0))
kernels.launch("layer_norm_in_place", 2, 256, x, weight, weight, i32(150))
rows, heads, d, length = 2, 2, 40, 24
qkv, norm, cos, sin = floats(6, 3 * heads, d), floats(2 * heads, d), floats(4, d // 2), floats(4, d // 2)
where, start = np.arange(6, dtype=np.int32) % 4, np.full(rows, 18, dtype=np.int32)
keys, values, out = halves(rows, heads, length, d), halves(rows, heads, length, d), halves(rows, heads, d)
tables = (where, where, norm, cos, sin)
sizes = (i32(heads), i32(d))
step = (where, where, start, norm, cos, sin, keys, values, out, *sizes, i32(length), f32(0))
kernels.launch("attend_step", rows * heads, 256, qkv, *step)
keys, values, out = halves(rows, heads, 3, d), halves(rows, heads, 3, d), halves(6, heads, d)
kernels.launch("rotate_prefix", 5, 256, qkv, *tables, keys, values, i32(6), i32(3), *sizes)
kernels.launch("attend_prefix", 6 * heads, 256, qkv, keys, values, out, i32(3), *sizes, f32(0))
qkv, out = halves(140, 3 * heads, d), halves(140, heads, d)  # two images of two tiles of keys
kernels.launch("attend_image_64", 2 * heads, 256, qkv, out, i32(70), *sizes, f32(0))
"""


def i32(*values):
    return [np.int32(value) for value in values]


def floats(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def halves(*shape, seed=0):
    return floats(*shape, seed=seed).astype(np.float16)


def bits(array):
    """float16 as the kernels take it."""
    return array.view(np.uint16)


def levels(x, scale):
    return np.clip(np.rint(x / scale), -128, 127).astype(np.int8)


def activations(out_scale, *shape):
    """Room for what a product reads; float16 as the kernels take it."""
    return np.full(shape, 99, dtype=np.int8) if out_scale else bits(np.full(shape, np.nan, dtype=np.float16))


def assert_activations(found, value, out_scale, *, rtol=1e-3, atol=1e-4):
    if out_scale:
        assert np.abs(np.clip(value / out_scale, -128, 127) - found).max() <= 0.5 + atol / out_scale
    else:
        np.testing.assert_allclose(found.view(np.float16), value, rtol=rtol, atol=atol)


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def rms_norm(x):
    return x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=-1, keepdims=True) + RMS_NORM_EPS)


def layer_norm(x):
    centred = x.astype(np.float64) - x.astype(np.float64).mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + LAYER_NORM_EPS)


class Layer:
    """A linear layer of random weights, as it is packed and as what it stands for."""

    def __init__(self, form, inputs, outputs, name="layer"):
        weight, self.bias = floats(outputs, inputs) / np.float32(np.sqrt(inputs)), floats(outputs, seed=1)
        stored = {"bias": self.bias}
        if form == "fp16":
            stored["weight"] = weight
            self.weight = weight.astype(np.float16).astype(np.float64)
        elif form == "int8":
            values, scale = per_channel(weight)
            stored |= {"weight_int8": values.T.copy(), "weight_scale": scale, "input_scale": np.array(INPUT_SCALE)}
            self.weight = values.astype(np.float64) * scale[:, None]
        else:
            values, scale = to_blocks(weight, BITS[form], np.ones(inputs, dtype=np.float32))
            stored |= {f"weight_blocks{BITS[form]}": values, "block_scale": scale}
            if form == "int4-weight":  # a weight is a float16
                self.weight = from_blocks(values, scale.astype(np.float16), 4).astype(np.float16).astype(np.float64)
            else:
                self.weight = from_blocks(values, scale, 8)
        made, self.account = prepacked({f"{name}.{part}": array for part, array in stored.items()}, {name: form})
        self.form, self.stored = form, {part.removeprefix(f"{name}."): one.make() for part, one in made.items()}
        self.inputs, self.outputs = self.account[name]["in_features"], outputs

    def activation(self, x):
        """x [M, in] as the layer reads it, and what that stands for."""
        if self.form == "int8":
            return levels(x, INPUT_SCALE), levels(x, INPUT_SCALE).astype(np.float64) * INPUT_SCALE
        padded = np.zeros((len(x), self.inputs), dtype=np.float16)
        padded[:, : x.shape[1]] = x
        return bits(padded), x.astype(np.float16).astype(np.float64)

    def run(self, model, x, out, *, rows, gate=None, activation=0, destination=0, out_scale=0, shape=(1, 0, 0)):
        """One launch; rows: of a block of few_rows, or None for many_rows."""
        kernel, name = self.form.replace("-", "_"), "many_rows" if rows is None else "few_rows"
        per_block = 64 if rows is None else 8
        blocks = -(-self.outputs // per_block) * -(-len(x) // (rows or 128))
        scale = self.stored.get("weight_scale", self.stored.get("block_scale"))
        block = self.inputs // scale.shape[1] if self.form == "int4-weight" else 0
        if scale is not None and scale.dtype == np.float16:
            scale = bits(scale)
        model.launch(
            f"{name}_{kernel}" + (f"_{rows}" if rows else ""), blocks, THREADS, self.stored["weight_chunks"], scale,
            self.stored["bias"], x, out, gate, *i32(len(x), self.outputs, self.inputs, block),
            INPUT_SCALE if self.form == "int8" else np.float32(0), *i32(activation, destination),
            np.float32(out_scale), *i32(*shape),
        )  # fmt: skip
        return out

    def product(self, model, x, rows):
        out = np.full((len(x), self.outputs), np.nan, dtype=np.float32)
        return self.run(model, self.activation(x)[0], out, rows=rows)

    def expected(self, x):
        return self.activation(x)[1] @ self.weight.T + self.bias


# -- products ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", KERNELS)
@pytest.mark.parametrize("form", FORMS)
def test_products_are_those_of_numpy(model, form, rows):
    layer = Layer(form, 80, 70)  # chunks and tiles that are not whole
    x = floats(2 * rows + 3 if rows else 131, 80)
    np.testing.assert_allclose(layer.product(model, x, rows), layer.expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs", [16, 256, 1152, 4112])
@pytest.mark.parametrize("form", FORMS)
def test_warps_share_any_number_of_inputs(model, form, inputs):
    layer, x = Layer(form, inputs, 6), floats(3, inputs)
    np.testing.assert_allclose(layer.product(model, x, 16), layer.expected(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("inputs", [16, 32, 64, 128])
def test_int4_blocks_have_scales_of_their_own(model, inputs):
    layer, x = Layer("int4-weight", 3 * inputs, 9), floats(3, 3 * inputs)
    assert layer.stored["block_scale"].shape == (9, 3)
    for rows in (16, None):
        np.testing.assert_allclose(layer.product(model, x, rows), layer.expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_lies_where_its_lane_takes_it(model, form):
    """A row of x that is a single one reads a column of weights."""
    layer, x = Layer(form, 272, 11), np.eye(272, dtype=np.float32)
    expected = layer.expected(x) - layer.bias
    found = layer.product(model, x, 64) - layer.bias
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert len(np.unique(np.round(expected, 4))) > 15  # weights that change places would show


def test_inputs_that_fill_no_step_are_filled_up(model):
    layer, x = Layer("fp16", 6, 9), floats(3, 6)
    assert layer.inputs == 8
    for rows in (16, None):
        np.testing.assert_allclose(layer.product(model, x, rows), layer.expected(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_is_the_same_bits_whatever_rows_are_beside_it(model, form):
    layer, x = Layer(form, 528, 33), floats(17, 528)
    alone = np.concatenate([layer.product(model, x[i : i + 1], 16) for i in range(17)])
    for rows in KERNELS:
        np.testing.assert_array_equal(layer.product(model, x, rows), alone)


@pytest.mark.parametrize("rows", [16, None])
class TestEpilogues:
    @pytest.fixture
    def x(self):
        return floats(5, 48)

    def run(self, model, layer, x, out, rows, **epilogue):
        return layer.run(model, layer.activation(x)[0], out, rows=rows, **epilogue)

    def test_activations(self, model, x, rows):
        layer = Layer("fp16", 48, 12)
        value = layer.expected(x)
        erf = np.vectorize(math.erf)
        for code, expected in (
            (Activation.SILU, silu(value)),
            (Activation.GELU, value * (1 + erf(value / np.sqrt(2))) / 2),
        ):
            found = self.run(model, layer, x, np.empty((5, 12), dtype=np.float32), rows, activation=code)
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("form", FORMS)
    def test_swiglu_takes_pairs_that_prepacking_brought_together(self, model, x, rows, form):
        layer = Layer(form, 48, 24, name="a.mlp.w12")
        x1, x2 = np.split(layer.expected(x), 2, axis=1)
        out = np.full((5, 12), np.nan, dtype=np.float32)
        self.run(model, layer, x, out, rows, activation=Activation.SWIGLU)
        np.testing.assert_allclose(out, silu(x1) * x2, rtol=1e-5, atol=1e-5)

    def test_the_input_of_another_product(self, model, x, rows):
        layer = Layer("fp16", 48, 12)
        out = np.empty((5, 12), dtype=np.float16)
        self.run(model, layer, x, bits(out), rows, destination=Destination.INPUT)
        np.testing.assert_allclose(out, layer.expected(x), rtol=1e-3)
        out = np.empty((5, 12), dtype=np.int8)
        self.run(model, layer, x, out, rows, destination=Destination.INPUT, out_scale=OUT_SCALE)
        wanted = layer.expected(x) / OUT_SCALE
        assert (np.abs(wanted) > 127).any()  # some of them saturate
        assert np.abs(np.clip(wanted, -128, 127) - out).max() <= 0.5 + 1e-3

    def test_a_gated_residual(self, model, x, rows):
        layer, residual, gate = Layer("fp16", 48, 12), floats(5, 12, seed=2), halves(5, 20)
        for gates, expected in (
            (bits(gate), residual + gate[:, :12].astype(np.float64) * layer.expected(x)),
            (None, residual + layer.expected(x)),
        ):
            out = residual.copy()
            self.run(model, layer, x, out, rows, gate=gates, destination=Destination.ADD, shape=(1, 20, 0))
            np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)

    def test_pieces(self, model, x, rows):
        layer, out = Layer("fp16", 48, 12), np.empty((3, 5, 4), dtype=np.float16)
        self.run(model, layer, x, bits(out), rows, destination=Destination.PIECES, shape=(4, 0, 0))
        expected = layer.expected(x).reshape(5, 3, 4).transpose(1, 0, 2)
        np.testing.assert_allclose(out.astype(np.float64), expected, rtol=1e-3, atol=1e-5)

    def test_a_table_of_buffers(self, model, rows):
        layer, x = Layer("fp16", 48, 12), floats(6, 48)
        buffers = [np.zeros((2, 20), dtype=np.float16) for _ in range(3)]
        table = Table([bits(buffer) for buffer in buffers])
        self.run(model, layer, x, table, rows, destination=Destination.TABLE, shape=(2, 20, 5))
        found = np.concatenate(buffers).astype(np.float64)
        np.testing.assert_allclose(found[:, 5:17], layer.expected(x), rtol=1e-3, atol=1e-5)
        assert not found[:, :5].any() and not found[:, 17:].any()


# -- norms -------------------------------------------------------------------------------------------------------------


@ACTIVATIONS
@pytest.mark.parametrize("size", [1, 1e-3])  # the epsilon counts in the second
def test_norm_and_modulation(model, size, out_scale):
    x, modulation = floats(3, 600) * np.float32(size), halves(3, 1500)
    scale, shift = modulation[:, 600:1200], modulation[:, :600]
    out = activations(out_scale, 3, 600)
    pieces = (Part(bits(modulation), 600), Part(bits(modulation), 0))
    model.launch("norm_modulate", 3, THREADS, x, None, *pieces, out, *i32(600, 1500), out_scale)
    assert_activations(out, rms_norm(x) * scale + shift, out_scale)


def test_the_first_norm_stays_in_x(model):
    x, weight, out = floats(2, 600) * 3, floats(600), np.empty((2, 600), dtype=np.float16)
    first = rms_norm(x) * weight
    model.launch("norm_modulate", 2, THREADS, x, weight, None, None, bits(out), *i32(600, 0), np.float32(0))
    np.testing.assert_allclose(x, first, rtol=1e-5)
    np.testing.assert_allclose(out, rms_norm(first), rtol=1e-3)


def test_layer_norm_may_leave_rows_out(model):
    x, weight, bias = floats(2, 4, 600) + 5, floats(600), floats(600, seed=1)
    out = np.empty((2, 3, 600), dtype=np.int8)
    model.launch("layer_norm", 6, THREADS, x, weight, bias, out, *i32(600, 3, 1), OUT_SCALE)
    assert_activations(out, (layer_norm(x) * weight + bias)[:, 1:], OUT_SCALE)


def test_levels_are_rounded_to_even_and_saturate(model):
    bias = np.array([0.5, 1.5, -2.5, 126.5, 127.5, -128.5, 500, -500], dtype=np.float32) / 4
    out = np.empty((1, 8), dtype=np.int8)
    operands = (floats(1, 8), np.zeros(8, dtype=np.float32), bias, out)  # of the norm nothing is left
    model.launch("layer_norm", 1, THREADS, *operands, *i32(8, 1, 0), np.float32(0.25))
    np.testing.assert_array_equal(out[0], levels(bias, np.float32(0.25)))


@pytest.mark.parametrize("size", [1, 3e-3])  # the epsilon counts in the second
def test_layer_norm_in_place(model, size):
    x, weight, bias = (floats(2, 600) + 5) * np.float32(size), floats(600), floats(600, seed=1)
    expected = layer_norm(x) * weight + bias
    model.launch("layer_norm_in_place", 2, THREADS, x, weight, bias, *i32(600))
    np.testing.assert_allclose(x, expected, rtol=1e-4, atol=1e-5)


# -- attention ---------------------------------------------------------------------------------------------------------


class Heads:
    """Queries, keys and values of some positions, and the rotary tables' rows they go with."""

    def __init__(self, positions, heads, d):
        self.heads, self.d = heads, d
        self.qkv = floats(positions, 3 * heads, d)
        self.weight = floats(2 * heads, d, seed=1)
        angle = floats(9, d // 2)
        self.cos, self.sin = np.cos(angle), np.sin(angle)
        rng = np.random.default_rng(0)
        self.own, self.targets = (rng.integers(0, 9, positions, dtype=np.int32) for _ in range(2))

    @property
    def tables(self):
        return self.own, self.targets, self.weight, self.cos, self.sin

    def rotated(self):
        """Queries, keys (float16) and values (float16), [M, H, d] each."""
        heads, which = self.heads, np.tile(self.own[:, None], 2 * self.heads)
        which[:, heads // 2 : heads] = self.targets[:, None]
        x = rms_norm(self.qkv[:, : 2 * heads]) * self.weight
        cos, sin, even, odd = self.cos[which], self.sin[which], x[..., 0::2], x[..., 1::2]
        x = np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)
        return x[:, :heads], x[:, heads:].astype(np.float16), self.qkv[:, 2 * heads :].astype(np.float16)


@ACTIVATIONS
@pytest.mark.parametrize(
    ("d", "length", "start"), [(16, 24, 18), (40, 24, 18), (64, 24, 0), (8, 600, 590), (256, 2048, 2047)]
)
def test_a_new_position_attends_to_the_filled_cache(model, d, length, start, out_scale):
    rows, heads = 3, 4
    new = Heads(rows, heads, d)
    q, k, v = new.rotated()
    keys, values = halves(rows, heads, length, d), halves(rows, heads, length, d, seed=1)
    rows_of, starts = np.arange(rows), np.maximum(start - np.arange(rows, dtype=np.int32), 0)
    expected_values = values.copy()
    expected_values[rows_of, :, starts] = v
    for r, at in enumerate(starts):  # nobody may read what is not filled
        keys[r, :, at + 1 :, 0], values[r, :, at + 1 :] = np.inf, np.nan
    out = activations(out_scale, rows, heads, d)
    own, targets, *tables = new.tables
    model.launch(
        "attend_step", rows * heads, THREADS, new.qkv, own, targets, starts, *tables,
        bits(keys), bits(values), out, *i32(heads, d, length), out_scale,
    )  # fmt: skip
    np.testing.assert_array_max_ulp(keys[rows_of, :, starts], k, 1)
    for r, at in enumerate(starts):
        filled = slice(0, at + 1)
        np.testing.assert_array_equal(values[r, :, filled], expected_values[r, :, filled])
        scores = np.einsum("hd,hsd->hs", q[r], keys[r, :, filled].astype(np.float64)) / np.sqrt(d)
        expected = np.einsum("hs,hsd->hd", softmax(scores), values[r, :, filled].astype(np.float64))
        assert_activations(out[r], expected, out_scale)


@ACTIVATIONS
@pytest.mark.parametrize("d", [16, 256])
def test_a_prefix_sees_itself_and_what_is_before(model, d, out_scale):
    rows, length, heads = 2, 5, 3
    new = Heads(rows * length, heads, d)
    q, k, v = (x.reshape(rows, length, heads, d).transpose(0, 2, 1, 3) for x in new.rotated())
    keys, values = (np.zeros((rows, heads, length, d), dtype=np.float16) for _ in range(2))
    sizes = i32(rows * length, length, heads, d)
    blocks = -(-rows * length * 3 * heads // (THREADS // 32))
    model.launch("rotate_prefix", blocks, THREADS, new.qkv, *new.tables, bits(keys), bits(values), *sizes)
    np.testing.assert_array_max_ulp(keys, np.ascontiguousarray(k), 1)
    np.testing.assert_array_equal(values, v)
    out = activations(out_scale, rows, length, heads, d)
    launch = ("attend_prefix", rows * length * heads, THREADS, new.qkv, bits(keys), bits(values), out)
    model.launch(*launch, *i32(length, heads, d), out_scale)
    scores = q @ keys.transpose(0, 1, 3, 2).astype(np.float64) / np.sqrt(d)
    scores = np.where(np.tril(np.ones((length, length), dtype=bool)), scores, -np.inf)
    expected = (softmax(scores) @ v.astype(np.float64)).transpose(0, 2, 1, 3)
    assert_activations(out, expected, out_scale)


@ACTIVATIONS
@pytest.mark.parametrize(
    ("d", "positions", "dim"),
    [(4, 21, 64), (12, 64, 64), (64, 150, 64), (4, 21, 128), (76, 64, 128), (128, 150, 128)],
)
def test_the_decoder_attends_to_the_whole_image(model, d, positions, dim, out_scale):
    images, heads = 2, 3
    qkv = (2 * floats(images, positions, 3, heads, d)).astype(np.float16)
    out = activations(out_scale, images, positions, heads, d)
    sizes = (*i32(positions, heads, d), out_scale)
    blocks = images * heads * -(-positions // 128)
    model.launch(f"attend_image_{dim}", blocks, THREADS, bits(qkv), out, *sizes)
    q, k, v = qkv.astype(np.float64).transpose(2, 0, 3, 1, 4)
    expected = (softmax(q @ k.transpose(0, 1, 3, 2) / np.sqrt(d)) @ v).transpose(0, 2, 1, 3)
    assert_activations(out, expected, out_scale, rtol=2e-3, atol=2e-3)


FAR_APART = pytest.mark.parametrize("ends", [(-60, 60), (60, -60), (-120, -60)], ids=["up", "down", "negative"])


@FAR_APART
def test_scores_far_apart_are_softened_alike(model, ends):
    """Sums are relative to the largest score so far."""
    qkv = np.ones((130, 3, 1, 16), dtype=np.float16)
    qkv[:, 1] *= np.linspace(*ends, 130, dtype=np.float16)[:, None, None]
    qkv[:, 2] = halves(130, 1, 16)
    out = np.empty((130, 1, 16), dtype=np.float16)
    model.launch("attend_image_64", 2, THREADS, bits(qkv), bits(out), *i32(130, 1, 16), np.float32(0))
    q, k, v = qkv[:, :, 0].astype(np.float64).transpose(1, 0, 2)
    np.testing.assert_allclose(out[:, 0], softmax(q @ k.T / 4) @ v, rtol=2e-3, atol=2e-3)


@FAR_APART
def test_scores_of_a_prefix_may_be_far_apart(model, ends):
    qkv = np.full((130, 3, 16), 0.25, dtype=np.float32)  # queries are scaled
    keys = np.tile(np.linspace(*ends, 130, dtype=np.float16)[:, None], 16)
    values, out = halves(130, 16), np.empty((130, 16), dtype=np.float16)
    model.launch(
        "attend_prefix", 130, THREADS, qkv, bits(keys), bits(values), bits(out), *i32(130, 1, 16), np.float32(0)
    )
    scores = np.where(np.tri(130, dtype=bool), 4 * keys[:, 0].astype(np.float64), -np.inf)
    np.testing.assert_allclose(out, softmax(scores) @ values.astype(np.float64), rtol=1e-3, atol=1e-4)


# -- the rest ----------------------------------------------------------------------------------------------------------


@ACTIVATIONS
def test_modulation_begins_with_class_and_position(model, out_scale):
    symbols, steps = floats(9, 200), floats(7, 200, seed=1)
    class_id, positions = np.array([0, 5, 2], dtype=np.int32), np.array([6, 0, 3], dtype=np.int32)
    out = activations(out_scale, 3, 200)
    model.launch("modulation_input", 1, THREADS, class_id, positions, symbols, steps, out, *i32(3, 200, 3), out_scale)
    assert_activations(out, silu(symbols[3 + class_id] + steps[positions]), out_scale, atol=1e-6)


def test_ratios_are_sines_and_cosines(model):
    ratio, frequencies, out = np.array([1, 0.25], dtype=np.float32), floats(200) * 16, np.empty((2, 400), np.float16)
    model.launch("ratio_features", 1, THREADS, ratio, frequencies, bits(out), *i32(2, 200))
    angle = 2 * np.pi * ratio[:, None] * frequencies.astype(np.float64)
    np.testing.assert_allclose(out, np.concatenate([np.sin(angle), np.cos(angle)], axis=1), rtol=1e-3, atol=1e-5)


@ACTIVATIONS
def test_the_head_is_conditioned_for_every_pass(model, out_scale):
    ratio, latent, out = floats(3, 80), floats(2, 80, seed=1), activations(out_scale, 3, 2, 80)
    model.launch("head_condition", 1, THREADS, ratio, latent, out, *i32(3, 2, 80), out_scale)
    assert_activations(out, silu(silu(ratio[:, None] + latent)), out_scale, atol=1e-6)


def test_rows_are_filled_up(model):
    x, out = floats(60, 6), np.full((60, 8), np.nan, dtype=np.float16)
    model.launch("pad_rows", 1, THREADS, x, bits(out), *i32(60, 6, 8))
    np.testing.assert_array_equal(out, np.pad(x, [(0, 0), (0, 2)]).astype(np.float16))


def test_the_class_position_comes_before_the_cells(model):
    cells, first, embedding = floats(2, 4, 60), floats(60), floats(5, 60)
    out = np.empty((2, 5, 60), dtype=np.float32)
    model.launch("embed_image", 1, THREADS, cells, first, embedding, out, *i32(2, 4, 60))
    whole = np.concatenate([np.broadcast_to(first, (2, 1, 60)), cells], axis=1)
    np.testing.assert_array_equal(out, whole + embedding)


def test_patches_become_an_image(model):
    patches, weight, bias = floats(2, 3, 3, 4, 4, 3), floats(3, 3, 3, 3), floats(3)
    out = np.empty((2, 3, 12, 12), dtype=np.float32)
    model.launch("conv_out", 3, THREADS, patches, weight, bias, out, *i32(2, 3, 4))
    image = patches.transpose(0, 5, 1, 3, 2, 4).reshape(2, 3, 12, 12).astype(np.float64)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(image, [(0, 0), (0, 0), (1, 1), (1, 1)]), (3, 3), (2, 3))
    expected = np.einsum("icyxkl,ockl->ioyx", windows, weight) + bias[:, None, None]
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("compiled", ["host_model", "ptx_model"])
def test_no_launch_leaves_its_arrays_or_races(request, apart, compiled):
    """Where rows, inputs, outputs and chunks fill no tile; what can be found is in test_host.py and test_ptx.py."""
    done = apart(LAUNCHES, request.getfixturevalue(compiled))
    assert done.returncode == 0, done.stderr
