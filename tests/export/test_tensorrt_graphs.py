"""The graphs that TensorRT compiles: well-formed, bound as the loop binds them, and the canonical graphs' numbers."""

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from bar_edge.export.builder import BLOCKS_OPSET, OPSET, PORTABLE_OPSET
from bar_edge.export.linear import PRODUCT
from bar_edge.runtime import weights
from bar_edge.runtime.engines.cuda.loop import ALIGNMENT, buffer_sizes
from bar_edge.runtime.engines.onnxruntime import load_session
from bar_edge.runtime.inspection import linear_layers
from bar_edge.runtime.sampling import Schedule

from .conftest import FORMS, MODELS, products_of

FLOAT, HALF, BF16, INT32 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT32
ITEMSIZES = {FLOAT: 4, HALF: 2, BF16: 2, INT32: 4}
GRAPHS = ("modulation", "mask_ratio", "prefix", "step", "head_pass", "decode")
NEWER = {"TensorScatter", "Attention", "RMSNormalization", "RotaryEmbedding", "Swish"}  # than opset 22
TOKENS = 4  # of every image that are compared


@pytest.fixture(scope="module", params=MODELS)
def case(request, models):
    """Every model in turn."""
    return models(request.param)


@pytest.fixture(scope="module", params=[True, False], ids=["in_place", "portable"])
def in_place(request):
    return request.param


def form_of(case, form):
    return case.bundle if form == "fp16" else case.quantized(form)


# -- form --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16], ids=["fp32", "fp16", "bf16"])
def test_graphs_pass_the_full_check(case, written, in_place, dtype):
    made = written(case.bundle, dtype, in_place=in_place)
    assert tuple(made.graphs) == GRAPHS
    for name in GRAPHS:
        onnx.checker.check_model(made.save(name), full_check=True)


@pytest.mark.parametrize("form", FORMS[1:])
def test_quantized_graphs_pass_the_full_check(small, written, in_place, form):
    made = written(small.quantized(form), HALF, in_place=in_place)
    for name in GRAPHS:
        onnx.checker.check_model(made.save(name), full_check=True)


@pytest.mark.parametrize("images", [1, 3])
def test_inferred_shapes_are_those_declared(case, written, in_place, images):
    """The declared shapes of outputs are taken away; all that is inferred is static."""
    made = written(case.bundle, HALF, in_place=in_place, images=images)
    for name, model in made.graphs.items():
        stripped = onnx.ModelProto()
        stripped.CopyFrom(model)
        for output in stripped.graph.output:
            output.type.tensor_type.ClearField("shape")
        inferred = onnx.shape_inference.infer_shapes(stripped, check_type=True, strict_mode=True, data_prop=True)
        assert described(inferred.graph.output) == described(model.graph.output), name
        dims = [d for value in inferred.graph.value_info for d in value.type.tensor_type.shape.dim]
        assert dims and all(d.HasField("dim_value") for d in dims), name


def described(values):
    """name -> (dims, TensorProto's type)."""
    return {
        value.name: (
            tuple(d.dim_value for d in value.type.tensor_type.shape.dim),
            value.type.tensor_type.elem_type,
        )
        for value in values
    }


def bindings(spec, profile, dtype, in_place):
    """Inputs and outputs of every graph, each with the buffer of the loop that it is bound to."""
    rows, passes, group, pairs = profile.rows, profile.passes, profile.prefix_rows, profile.modulation_pairs
    n, d, w, k = spec.num_layers, spec.hidden_size, spec.head_width, spec.bits_per_token
    heads, head_dim, length = spec.num_heads, spec.head_dim, spec.prefix_length - 1
    width, flat = profile.head_modulation_width(spec), group * length
    cells, image = (spec.image_seq_len, spec.token_size), (3, spec.image_size, spec.image_size)
    cached = (rows, heads, profile.cache_length(spec), head_dim)
    caches = {f"{kind}_cache.{i}": (cached, dtype, "caches") for i in range(n) for kind in "kv"}
    new = {"kv": ((2 * n, rows, heads, 1, head_dim), dtype, "step.kv")}
    updated = {name.replace("cache", "cache_out"): value for name, value in caches.items()}
    return {
        "modulation": (
            {"class_id": ((pairs,), INT32, "class_id"), "positions": ((pairs,), INT32, "positions")},
            {"modulation": ((6 * n, pairs, d), dtype, "modulation")},
        ),
        "mask_ratio": (
            {"mask_ratio": ((passes,), FLOAT, "mask_ratio")},
            {"ratio_embedding": ((passes, w), FLOAT, "ratio_embedding")},
        ),
        "prefix": (
            {
                "x": ((flat, d), FLOAT, "prefix.x"),
                "own": ((flat,), INT32, "prefix.own"),
                "targets": ((flat,), INT32, "prefix.targets"),
                "modulation": ((6 * n, flat, d), dtype, "prefix.modulation"),
            },
            {"kv": ((2 * n, group, heads, length, head_dim), dtype, "prefix.kv")},
        ),
        "step": (
            {
                "x": ((rows, d), FLOAT, "x"),
                "own": ((rows,), INT32, "own"),
                "targets": ((rows,), INT32, "targets"),
                "start": ((rows,), INT32, "start"),
                "modulation": ((6 * n, rows, d), dtype, "step.modulation"),
                "ratio_embedding": ((passes, w), FLOAT, "ratio_embedding"),
                **caches,
            },
            {
                "latent": ((rows, w), FLOAT, "latent"),
                **{f"head_modulation.{s}": ((rows, width), dtype, f"head_modulation.{s}") for s in range(passes)},
                **(updated if in_place else new),
            },
        ),
        "head_pass": (
            {"x": ((rows, w), FLOAT, "head.x"), "head_modulation": ((rows, width), dtype, "head_modulation.0")},
            {"logits": ((rows, k, 2), FLOAT, "logits")},
        ),
        "decode": (
            {"bits": ((profile.decode_images, *cells), FLOAT, "cells")},
            {"image": ((profile.decode_images, *image), FLOAT, "image")},
        ),
    }


@pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("images", "guided"), [(1, True), (3, True), (5, False), (9, True)])
def test_inputs_and_outputs_fit_the_buffers_they_are_bound_to(small, written, in_place, dtype, images, guided):
    made = written(small.bundle, dtype, in_place=in_place, images=images, guided=guided)
    sizes = buffer_sizes(small.spec, made.profile, itemsize=ITEMSIZES[dtype], in_place=in_place)
    for name, (inputs, outputs) in bindings(small.spec, made.profile, dtype, in_place).items():
        graph = made.graphs[name].graph
        assert described(graph.input) == {key: value[:2] for key, value in inputs.items()}, name
        assert described(graph.output) == {key: value[:2] for key, value in outputs.items()}, name
        for shape, kind, buffer in (inputs | outputs).values():
            needed = int(np.prod(shape)) * ITEMSIZES[kind]
            if buffer == "caches":
                needed *= 2 * small.spec.num_layers
            if buffer in ("cells", "image"):  # several calls of the decoder
                assert sizes[buffer] >= needed * -(-made.profile.rows // made.profile.decode_images)
            else:
                assert sizes[buffer] == -(-needed // ALIGNMENT) * ALIGNMENT, (name, buffer)


@pytest.mark.parametrize("form", FORMS)
def test_portable_graphs_hold_nothing_newer_than_tensorrt_10_3_reads(small, written, form):
    made = written(form_of(small, form), HALF, in_place=False)
    for name, model in made.graphs.items():
        (opset,) = model.opset_import
        blocks = any(attribute.name == "block_size" for node in model.graph.node for attribute in node.attribute)
        assert opset.domain == "" and opset.version == (BLOCKS_OPSET if blocks else PORTABLE_OPSET), name
        assert not {node.op_type for node in model.graph.node} & NEWER
        for node in model.graph.node:
            schema = onnx.defs.get_schema(node.op_type, opset.version, "")  # raises for a newer operator
            assert {attribute.name for attribute in node.attribute} <= schema.attributes.keys(), node.op_type
    versions = {name: model.opset_import[0].version for name, model in made.graphs.items()}
    assert (versions["step"] == BLOCKS_OPSET) == (form == "int4-weight")


def test_native_graphs_use_the_operators_that_take_fewer_kernels(small, written):
    step = written(small.bundle, HALF).graphs["step"]
    count = {kind: sum(node.op_type == kind for node in step.graph.node) for kind in NEWER}
    assert step.opset_import[0].version == OPSET
    assert (count["Attention"], count["TensorScatter"]) == (small.spec.num_layers, 2 * small.spec.num_layers)
    assert all(count.values())


@pytest.mark.parametrize("form", FORMS)
def test_attention_is_masked_and_knows_no_lengths(small, written, form):
    """TensorRT drops `nonpad_kv_seqlen` with a mere warning, and gave wrong tokens with lengths."""
    for model in written(form_of(small, form), HALF).graphs.values():
        names = {name for node in model.graph.node for name in (*node.input, node.name)}
        names |= {value.name for value in model.graph.input}
        assert not any("seqlen" in name or "lengths" in name for name in names)
        masks = [node.input[3] for node in model.graph.node if node.op_type == "Attention"]
        assert all(len(node.input) == 4 for node in model.graph.node if node.op_type == "Attention")
        kinds = described(onnx.shape_inference.infer_shapes(model, data_prop=True).graph.value_info)
        assert all(kinds[mask][1] == TensorProto.BOOL for mask in masks)


@pytest.mark.parametrize("form", FORMS)
def test_every_linear_layer_is_a_named_product(case, written, form):
    """By these names a plan is read back. The embedding of mask ratios is none that can be quantized."""
    bundle = form_of(case, form)
    made = written(bundle, HALF)
    layers = linear_layers(weights.read_places(bundle.path / weights.FILE_NAME))
    found = [layer for name, model in made.graphs.items() if name != "mask_ratio" for layer in products_of(model)]
    trunk = {layer for layer in layers if layer.startswith("blocks.") and "adaLN" not in layer}
    assert len(trunk) == 4 * case.spec.num_layers
    assert sorted(found) == sorted([*layers, *trunk])  # the prefix and the step both have the trunk


@pytest.mark.parametrize("form", FORMS)
def test_what_a_product_reads_is_what_was_asked_for(small, written, form):
    """Static INT8 with fp32 scales and an fp32 sum: nothing unscaled is ever a half."""
    bundle = form_of(small, form)
    layers = linear_layers(weights.read_places(bundle.path / weights.FILE_NAME))
    for name, model in written(bundle, HALF).graphs.items():
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        kinds = {key: kind for key, (_, kind) in described(inferred.value_info).items()}
        kinds |= {tensor.name: tensor.data_type for tensor in inferred.initializer}
        made_by = {output: node for node in inferred.node for output in node.output}
        for node in inferred.node:
            if not node.name.endswith(PRODUCT):
                continue
            precision = layers.get(node.name.removesuffix(PRODUCT), "fp32")
            reads = [made_by.get(operand) for operand in node.input]
            if precision == "int8":
                assert [source.op_type for source in reads] == ["DequantizeLinear"] * 2
                assert {kinds[source.input[0]] for source in reads} == {TensorProto.INT8}
                assert {kinds[source.input[1]] for source in reads} == {FLOAT}
                assert kinds[node.output[0]] == FLOAT
            else:
                assert kinds[node.output[0]] == (FLOAT if name == "mask_ratio" else HALF)


@pytest.mark.parametrize("name", ["prefix", "step"])
def test_attention_in_halves_is_normalised_and_summed_in_fp32(small, written, name):
    """Where it is written out: halves are what its products read."""
    model = written(small.bundle, HALF, in_place=False).graphs[name]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    kinds = {key: kind for key, (_, kind) in described(inferred.value_info).items()}
    cast_from = {node.output[0]: node.input[0] for node in inferred.node if node.op_type == "Cast"}
    products = {output for node in inferred.node if node.op_type == "MatMul" for output in node.output}
    softmaxes = [node for node in inferred.node if node.op_type == "Softmax"]
    sums = [  # of two products: what the cache and the new position give
        node for node in inferred.node
        if node.op_type == "Add" and all(cast_from.get(operand, operand) in products for operand in node.input)
    ]  # fmt: skip
    layers = small.spec.num_layers
    assert (len(softmaxes), len(sums)) == (layers, layers if name == "step" else 0)
    assert {kinds[operand] for node in (*softmaxes, *sums) for operand in node.input} == {FLOAT}


def test_equal_profiles_give_equal_graphs_and_rows_change_only_what_has_rows(small, written):
    one, three = (written(small.bundle, HALF, images=images) for images in (1, 3))
    same = {name for name in GRAPHS if one.graphs[name] == three.graphs[name]}
    assert same == {"modulation", "mask_ratio"}


# -- numbers -----------------------------------------------------------------------------------------------------------


@cache
def session_of(graph):
    return load_session(onnxruntime, graph, 1)


def canonical(bundle, graph, **feeds):
    """Outputs of a canonical graph by name."""
    session = session_of(bundle.graph(graph))
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


class Sequence:
    """Positions of R rows with random classes, orders and bits, fed to the canonical graphs and to a device's."""

    def __init__(self, made, seed=0):
        self.made, self.spec = made, made.bundle.spec
        rng = np.random.default_rng(seed)
        spec, rows = self.spec, made.profile.rows
        self.rows, self.length = rows, spec.prefix_length
        self.tables = weights.open_weights(made.bundle.path)
        images = rows // made.copies
        self.classes = rng.integers(0, spec.num_classes, images)
        if made.copies == 2:
            self.classes = np.concatenate([self.classes, np.full(images, spec.unconditional_class)])
        self.orders = np.tile([rng.permutation(spec.num_tokens) for _ in range(images)], (made.copies, 1))
        self.bits = np.tile(rng.integers(0, 2, (images, TOKENS, spec.bits_per_token)), (made.copies, 1, 1))
        shape = (rows, spec.num_heads, spec.prefix_length + spec.num_tokens, spec.head_dim)
        names = [f"{kind}_cache.{i}" for i in range(spec.num_layers) for kind in "kv"]
        self.expected_caches = {name: np.zeros(shape, np.float32) for name in names}
        # what an earlier batch left behind must not matter
        shape = (rows, spec.num_heads, made.profile.cache_length(spec), spec.head_dim)
        kind = np.float16 if made.device.dtype == HALF else np.float32
        self.kind = kind
        self.caches = {name: rng.normal(size=shape).astype(kind) for name in names}
        self.mask_ratio = Schedule.of(made.bundle.recipe, spec.bits_per_token).mask_ratio.astype(np.float32)
        self.ratio = canonical(made.bundle, "mask_ratio", mask_ratio=self.mask_ratio)["ratio_embedding"]

    def run(self, graph, **feeds):
        """Outputs of a device's graph by name."""
        session = session_of(self.made.save(graph))
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, feeds), strict=True))

    def modulation(self, positions):
        """[6L, R*T, D]."""
        feeds = {"class_id": self.classes.astype(np.int64), "positions": np.asarray(positions, np.int64)}
        found = canonical(self.made.bundle, "modulation", **feeds)["modulation"]  # [T, 6L, R, D]
        return found.transpose(1, 2, 0, 3).reshape(found.shape[1], -1, found.shape[3])

    def prefix(self):
        """symbols, bits, own, targets of all rows, [R, F] each."""
        symbols = np.repeat(self.classes[:, None] + 3, self.length, axis=1)
        symbols[:, 0] = self.spec.num_classes + 4
        own = np.tile(np.arange(self.length), (self.rows, 1))
        targets = np.repeat(self.length + self.orders[:, :1], self.length, axis=1)
        return symbols, np.zeros((self.rows, self.length, self.spec.bits_per_token)), own, targets

    def token(self, n):
        """The same of the position after token n - 1, [R, 1] each."""
        symbols = np.full((self.rows, 1), self.spec.num_classes + 5)
        own, targets = (self.length + self.orders[:, i : i + 1] for i in (n - 1, n))
        return symbols, self.bits[:, n - 1 : n], own, targets

    def expect(self, position, symbols, bits, own, targets, modulation):
        """The canonical trunk over these positions: latent [R, W]."""
        out = canonical(
            self.made.bundle, "prefix" if position == 0 else "trunk_step", symbols=symbols.astype(np.int64),
            bits=bits.reshape(-1, self.spec.bits_per_token).astype(np.float32),
            positions=own.reshape(-1).astype(np.int64), targets=targets.reshape(-1).astype(np.int64),
            modulation=modulation, start=np.full(self.rows, position, np.int64), **self.expected_caches,
        )  # fmt: skip
        self.expected_caches = {name: out[name.replace("cache", "cache_out")] for name in self.expected_caches}
        return out["latent"]

    def feeds(self, symbols, bits, own, targets, modulation):
        """What the loop's kernels put in front of a device's trunk."""
        tables = self.tables
        x = bits.reshape(-1, self.spec.bits_per_token) @ tables["bit_embedding"]
        x += tables["symbol_embedding"][symbols.ravel()] + tables["pos_embed"][own.ravel()]
        x += tables["target_aware_pos_embed"][targets.ravel()]
        return {
            "x": x.astype(np.float32), "own": own.ravel().astype(np.int32), "targets": targets.ravel().astype(np.int32),
            "modulation": modulation.astype(self.kind),
        }  # fmt: skip

    def fill(self, kv, rows, begin):
        """New keys and values [2L, G, H, T, d] into the caches."""
        for cache_, new in zip(self.caches.values(), kv, strict=True):
            cache_[rows, :, begin : begin + new.shape[2]] = new

    def step(self, position, **feeds):
        out = self.run(
            "step", start=np.full(self.rows, position, np.int32), ratio_embedding=self.ratio, **feeds, **self.caches
        )
        if self.made.device.in_place:
            self.caches = {name: out[name.replace("cache", "cache_out")] for name in self.caches}
        else:
            self.fill(out["kv"], slice(None), position)
        return out


def assert_close(found, expected, tolerance):
    """Within a fraction of the largest number expected."""
    found = found.astype(np.float32)
    assert found.shape == expected.shape and np.isfinite(found).all()
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def assert_token_loop(made, tolerance):
    sequence = Sequence(made)
    spec, rows, length = made.bundle.spec, made.profile.rows, made.bundle.spec.prefix_length
    fed, modulation = sequence.prefix(), sequence.modulation(range(length))
    expected = sequence.expect(0, *fed, modulation)
    per_row = modulation.reshape(6 * spec.num_layers, rows, length, -1)
    for begin in range(0, rows, made.profile.prefix_rows):
        group = slice(begin, begin + made.profile.prefix_rows)
        part = per_row[:, group, :-1].reshape(6 * spec.num_layers, -1, spec.hidden_size)
        kv = sequence.run("prefix", **sequence.feeds(*(value[group, :-1] for value in fed), part))["kv"]
        for new, cached in zip(kv, sequence.expected_caches.values(), strict=True):
            assert_close(new, cached[group, :, : length - 1], tolerance)
        sequence.fill(kv, group, 0)
    for n in range(TOKENS):
        position = length - 1 + n
        if n > 0:
            fed, modulation = sequence.token(n), sequence.modulation([position])
            expected = sequence.expect(position, *fed, modulation)
            feeds = sequence.feeds(*fed, modulation)
        else:
            feeds = sequence.feeds(*(value[:, -1:] for value in fed), per_row[:, :, -1])
        out = sequence.step(position, **feeds)
        assert_close(out["latent"], expected, tolerance)
        for name, cached in sequence.expected_caches.items():
            assert_close(sequence.caches[name][:, :, position], cached[:, :, position], tolerance)
        head = canonical(made.bundle, "head_modulation", latent=expected, ratio_embedding=sequence.ratio)
        together = np.concatenate(list(head.values()), axis=2)  # [S, R, M]
        for s, one in enumerate(together):
            assert_close(out[f"head_modulation.{s}"], one, tolerance)


def assert_head_pass(made, tolerance):
    sequence, spec, images = Sequence(made), made.bundle.spec, made.profile.rows // made.copies
    rng = np.random.default_rng(1)
    widths = [3] * spec.head_layers + [2]
    pieces = [rng.normal(size=(made.profile.rows, n * spec.head_width)).astype(np.float32) for n in widths]
    known, bits = rng.integers(0, 2, (2, images, spec.bits_per_token)).astype(bool)
    inputs = {f"modulation.{i}": piece for i, piece in enumerate(pieces)}
    expected = canonical(made.bundle, "head_pass", known=known, bits=bits, **inputs)["logits"]
    tables = sequence.tables
    state = np.concatenate([known, bits & known], axis=1).astype(np.float32)
    x = np.tile(state @ tables["lm_head.bit_embedding"] + tables["lm_head.masked_embedding"], (made.copies, 1))
    together = np.concatenate(pieces, axis=1).astype(sequence.kind)
    assert_close(sequence.run("head_pass", x=x, head_modulation=together)["logits"], expected, tolerance)


def assert_around_the_loop(made, tolerance):
    """modulation, mask_ratio and decode."""
    sequence, spec, profile = Sequence(made), made.bundle.spec, made.profile
    rng = np.random.default_rng(2)
    classes = rng.integers(0, spec.num_classes + 1, profile.modulation_pairs)
    positions = rng.integers(0, spec.prefix_length + spec.num_tokens, profile.modulation_pairs)
    found = sequence.run("modulation", class_id=classes.astype(np.int32), positions=positions.astype(np.int32))
    distinct = np.arange(spec.num_classes + 1)
    every = canonical(made.bundle, "modulation", class_id=distinct, positions=np.unique(positions))["modulation"]
    at = np.searchsorted(np.unique(positions), positions)
    assert_close(found["modulation"], every[at, :, classes].transpose(1, 0, 2), tolerance)
    assert_close(sequence.run("mask_ratio", mask_ratio=sequence.mask_ratio)["ratio_embedding"], sequence.ratio, 1e-6)
    cells = rng.integers(0, 2, (profile.decode_images, spec.image_seq_len, spec.token_size)).astype(np.float32)
    expected = canonical(made.bundle, "decode", bits=cells)["image"]
    assert_close(sequence.run("decode", bits=cells)["image"], expected, tolerance)


def test_the_numbers_of_float32_are_those_of_the_canonical_graphs(case, written, in_place):
    made = written(case.bundle, FLOAT, in_place=in_place)
    for check in (assert_token_loop, assert_head_pass, assert_around_the_loop):
        check(made, 1e-5)


def test_one_row_without_guidance_is_that_of_the_canonical_graphs(case, written, in_place):
    """With fewer than four heads attention is written out in place as well."""
    made = written(case.bundle, FLOAT, in_place=in_place, guided=False)
    for check in (assert_token_loop, assert_head_pass):
        check(made, 1e-5)
    if in_place:
        operators = {node.op_type for node in made.graphs["step"].graph.node}
        assert ("Attention" in operators) == (case.spec.num_heads >= 4)


def test_many_rows_are_those_of_the_canonical_graphs(patch1, written, in_place):
    """18 rows: three groups of prefixes, two calls of the decoder."""
    made = written(patch1.bundle, FLOAT, in_place=in_place, images=9)
    assert made.profile.rows // made.profile.prefix_rows > 1 and made.profile.decode_images < 9
    assert_token_loop(made, 1e-5)


@pytest.mark.parametrize("form", FORMS[1:])
def test_the_numbers_of_quantized_layers_are_those_of_the_canonical_graphs(small, written, in_place, form):
    made = written(small.quantized(form), FLOAT, in_place=in_place)
    for check in (assert_token_loop, assert_head_pass, assert_around_the_loop):
        check(made, 1e-5)


def test_float16_is_close_to_float32(case, written, in_place):
    made = written(case.bundle, HALF, in_place=in_place)
    for check in (assert_token_loop, assert_head_pass, assert_around_the_loop):
        check(made, 5e-3)
