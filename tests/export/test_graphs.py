"""Every graph in ONNX Runtime against the reference model, and what other engines rely on in their files."""

import re
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch

from bar_edge.calibration.probe import ProbeEngine
from bar_edge.calibration.quality import precisions_of
from bar_edge.calibration.trajectories import make_batch
from bar_edge.export.checkpoint import generator_shapes
from bar_edge.export.graphs import build_graphs
from bar_edge.export.replay import teacher_forced_latents
from bar_edge.export.rewrite import NEW_NAMES, Rewriter
from bar_edge.runtime import weights
from bar_edge.runtime.noise import RecordedNoise, SeededNoise, gumbel
from bar_edge.runtime.sampling import Schedule, guidance_at, sample_token, to_fine_grid, to_tokens
from bar_edge.runtime.spec import Recipe

CANONICAL = ("modulation", "prefix", "trunk_step", "mask_ratio", "head_modulation", "head_pass", "decode")
DERIVED = ("onnxruntime_modulation", "onnxruntime_step", "onnxruntime_decode")  # with that runtime's own operators
LATENT_TOLERANCE, LOGIT_TOLERANCE, IMAGE_TOLERANCE = 1e-5, 1e-4, 1e-5
MODULATION_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


class Graphs:
    """The graphs of one bundle, run by name, with the caches of the trunk bound in place."""

    def __init__(self, case) -> None:
        self.bundle, self.spec = case.bundle, case.spec
        self._sessions = {}

    def session(self, name: str) -> onnxruntime.InferenceSession:
        if name not in self._sessions:
            path = self.bundle.graph(name)
            self._sessions[name] = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return self._sessions[name]

    def run(self, graph: str, **inputs: np.ndarray) -> list[np.ndarray]:
        return self.session(graph).run(None, {name.replace("__", "."): value for name, value in inputs.items()})

    def modulation(self, classes: np.ndarray, begin: int, length: int) -> np.ndarray:
        """[6L, rows*T, D] as the trunk takes it."""
        (table,) = self.run("modulation", class_id=classes, positions=np.arange(begin, begin + length))
        return np.ascontiguousarray(table.transpose(1, 2, 0, 3)).reshape(table.shape[1], -1, table.shape[3])

    def head(self, latent: np.ndarray, mask_ratio: np.ndarray):
        """The head of all passes over one latent, as `sample_token` takes it."""
        (ratio,) = self.run("mask_ratio", mask_ratio=mask_ratio)
        modulation = self.run("head_modulation", latent=latent, ratio_embedding=ratio)

        def one_pass(known, bits, s):
            pieces = {f"modulation.{i}": value[s] for i, value in enumerate(modulation)}
            return self.run("head_pass", known=known, bits=bits, **pieces)[0]

        return one_pass


class Trunk:
    """Runs positions of some rows through a graph whose caches are the same memory as input and output."""

    def __init__(self, graphs: Graphs, classes: np.ndarray, name: str = "canonical") -> None:
        spec = graphs.spec
        self.graphs, self.classes, self.name = graphs, classes, name
        shape = (len(classes), spec.num_heads, spec.prefix_length + spec.num_tokens, spec.head_dim)
        self.caches = {
            f"{kind}_cache.{i}": np.full(shape, 7, dtype=np.float32) for i in range(spec.num_layers) for kind in "kv"
        }
        self._values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in self.caches.items()}

    def run(self, start, symbols, bits, positions, targets, **more) -> dict[str, np.ndarray]:
        """symbols [rows, T], bits [rows, T, K], positions and targets [rows, T]: all outputs but the caches."""
        rows, length = symbols.shape
        feeds = {
            "symbols": symbols.astype(np.int64),
            "bits": bits.reshape(rows * length, -1).astype(np.float32),
            "positions": positions.reshape(-1).astype(np.int64),
            "targets": targets.reshape(-1).astype(np.int64),
            "modulation": self.graphs.modulation(self.classes, start, length),
            **more,
        }
        name = self.name
        if name == "canonical":
            name = "prefix" if start < self.graphs.spec.prefix_length else "trunk_step"
            feeds["start"] = np.full(rows, start, dtype=np.int64)
        else:
            feeds["last_position"] = np.full(rows, start + length - 1, dtype=np.int32)
            feeds["filled"] = np.array([start + length], dtype=np.int32)
        session = self.graphs.session(name)
        binding = session.io_binding()
        for name, value in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        for name, value in self._values.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("_cache", "_cache_out"), value)
        others = [output.name for output in session.get_outputs() if "_cache_out" not in output.name]
        for name in others:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        values = binding.get_outputs()[len(self._values) :]  # in the order they were bound
        return {name: value.numpy() for name, value in zip(others, values, strict=True)}

    def prefix(self, first_targets: np.ndarray, **more) -> dict[str, np.ndarray]:
        """All F prefix positions at once."""
        spec, rows, f = self.graphs.spec, len(self.classes), self.graphs.spec.prefix_length
        symbols = np.tile(self.classes[:, None] + 3, f)
        symbols[:, 0] = spec.num_classes + 4
        positions = np.tile(np.arange(f), (rows, 1))
        targets = np.tile(f + first_targets[:, None], f)
        return self.run(0, symbols, np.zeros((rows, f, spec.bits_per_token)), positions, targets, **more)

    def token(self, step: int, bits: np.ndarray, grid: np.ndarray, target: np.ndarray, **more) -> dict[str, np.ndarray]:
        """The token generated at `step`."""
        spec, f = self.graphs.spec, self.graphs.spec.prefix_length
        symbols = np.full((len(self.classes), 1), spec.num_classes + 5)
        return self.run(f + step, symbols, bits[:, None], f + grid[:, None], f + target[:, None], **more)

    def latents(self, tokens: np.ndarray, orders: np.ndarray) -> np.ndarray:
        """[rows, N, W] given the tokens [rows, N, K] in their order [rows, N]."""
        result = [self.prefix(orders[:, 0])["latent"]]
        for n in range(tokens.shape[1] - 1):
            result.append(self.token(n, tokens[:, n], orders[:, n], orders[:, n + 1])["latent"])
        return np.stack(result, axis=1)


@pytest.fixture(scope="session")
def graphs(golden) -> Graphs:
    return Graphs(golden)


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


# -- the files ---------------------------------------------------------------------------------------------------------


def test_a_bundle_has_the_canonical_graphs_and_those_of_onnxruntime(golden):
    assert set(golden.bundle.graphs) == {*CANONICAL, *DERIVED}


@pytest.mark.parametrize("name", CANONICAL + DERIVED)
def test_graphs_pass_the_full_check_of_onnx(golden, name):
    onnx.checker.check_model(golden.bundle.graph(name), full_check=True)


@pytest.mark.parametrize("name", CANONICAL + DERIVED)
def test_canonical_graphs_use_standard_operators_only(golden, name):
    model = onnx.load(golden.bundle.graph(name), load_external_data=False)
    allowed = {"", "com.microsoft"} if name in DERIVED else {""}
    assert {entry.domain for entry in model.opset_import} <= allowed
    assert {node.domain for node in nodes_of(model.graph)} <= allowed
    assert not model.functions


@pytest.mark.parametrize("name", CANONICAL + DERIVED)
def test_every_weight_points_at_its_place_in_the_weights_file(golden, name):
    places = weights.read_places(golden.bundle.path / weights.FILE_NAME)
    model = onnx.load(golden.bundle.graph(name), load_external_data=False)
    dtypes = {onnx.TensorProto.FLOAT: np.float32}
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    assert external
    for tensor in external:
        place = places[tensor.name]
        entries = {entry.key: entry.value for entry in tensor.external_data}
        assert entries == {
            "location": "weights.safetensors", "offset": str(place.offset), "length": str(place.length),
        }  # fmt: skip
        assert tuple(tensor.dims) == place.shape
        assert dtypes[tensor.data_type] == place.dtype


@pytest.mark.parametrize("name", CANONICAL + DERIVED)
def test_no_weight_is_inside_a_graph_file(golden, name):
    model = onnx.load(golden.bundle.graph(name), load_external_data=False)
    inside = [tensor for tensor in model.graph.initializer if tensor.data_location != onnx.TensorProto.EXTERNAL]
    widest = max(golden.spec.hidden_size, golden.spec.head_width)
    assert all(np.prod(tensor.dims) <= widest for tensor in inside)


@pytest.mark.parametrize("name", CANONICAL + DERIVED)
def test_weights_keep_their_checkpoint_names(golden, name):
    known = generator_shapes(golden.spec).keys() | golden.checkpoint.tokenizer.keys() | NEW_NAMES.keys()
    model = onnx.load(golden.bundle.graph(name), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            assert tensor.name in known or re.sub(r"blocks\.\d+\.", "blocks.i.", tensor.name) in known


def test_every_weight_is_used_by_a_graph(golden):
    used = set()
    for name in golden.bundle.graphs:
        model = onnx.load(golden.bundle.graph(name), load_external_data=False)
        used |= {tensor.name for tensor in model.graph.initializer}
    assert weights.read_places(golden.bundle.path / weights.FILE_NAME).keys() <= used


def test_the_places_of_the_graphs_hold_the_rewritten_values(golden):
    path = golden.bundle.path / weights.FILE_NAME
    content = path.read_bytes()
    places = weights.read_places(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        for name, pending in Rewriter(golden.checkpoint).pending.items():
            place, expected = places[name], pending.make().astype(np.float32)
            found = np.frombuffer(content, place.dtype, int(np.prod(place.shape)), place.offset).reshape(place.shape)
            np.testing.assert_array_equal(found, expected, err_msg=name)
            np.testing.assert_array_equal(file.get_tensor(name), expected, err_msg=name)


CACHES = [f"{kind}_cache.{i}" for i in range(3) for kind in "kv"]
CACHES_OUT = [f"{kind}_cache_out.{i}" for i in range(3) for kind in "kv"]
POSITIONS = ["symbols", "bits", "positions", "targets", "modulation"]
HEAD = ["modulation.0", "modulation.1", "modulation.2"]
INTERFACES = {
    "modulation": (["class_id", "positions"], ["modulation"]),
    "prefix": ([*POSITIONS, "start", *CACHES], [*CACHES_OUT, "latent"]),
    "trunk_step": ([*POSITIONS, "start", *CACHES], [*CACHES_OUT, "latent"]),
    "mask_ratio": (["mask_ratio"], ["ratio_embedding"]),
    "head_modulation": (["latent", "ratio_embedding"], HEAD),
    "head_pass": (["known", "bits", *HEAD], ["logits"]),
    "decode": (["bits"], ["image"]),
    "onnxruntime_modulation": (["class_id", "positions"], ["modulation"]),
    "onnxruntime_decode": (["bits"], ["image"]),
    "onnxruntime_step": (
        [*POSITIONS, "last_position", "filled", *CACHES, "ratio_embedding", "guidance", "temperature", "remask_count",
         "gumbel_bits", "gumbel_confidence"],
        [*CACHES_OUT, "drawn", "latent"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", INTERFACES)
def test_inputs_and_outputs_have_their_documented_names(patch1, name):
    graph = onnx.load(patch1.bundle.graph(name), load_external_data=False).graph
    inputs, outputs = INTERFACES[name]
    assert [value.name for value in graph.input] == inputs
    assert [value.name for value in graph.output] == outputs


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("modulation", "class_id", ["U"]),
        ("modulation", "modulation", ["T", 18, "U", 64]),
        ("prefix", "symbols", ["rows", "T"]),
        ("trunk_step", "symbols", ["rows", "T"]),
        ("trunk_step", "k_cache.0", ["rows", 4, 49, 16]),
        ("trunk_step", "latent", ["rows", 48]),
        ("mask_ratio", "ratio_embedding", ["S", 48]),
        ("head_modulation", "modulation.2", ["S", "rows", 96]),
        ("head_pass", "known", ["images", 6]),
        ("head_pass", "logits", ["rows", 6, 2]),
        ("decode", "bits", ["images", 16, 6]),
        ("decode", "image", ["images", 3, 64, 64]),
        ("onnxruntime_step", "gumbel_bits", ["S", "images", 6, 2]),
        ("onnxruntime_step", "drawn", ["images", 6]),
    ],
)
def test_rows_images_positions_and_passes_are_dynamic_and_the_rest_fixed(patch1, name, value, expected):
    graph = onnx.load(patch1.bundle.graph(name), load_external_data=False).graph
    found = next(v for v in [*graph.input, *graph.output] if v.name == value)
    assert [d.dim_param or d.dim_value for d in found.type.tensor_type.shape.dim] == expected


def test_graphs_are_the_same_every_time_they_are_written(golden):
    places = weights.read_places(golden.bundle.path / weights.FILE_NAME)
    for name, model in build_graphs(golden.spec, places).items():
        assert model.SerializeToString() == golden.bundle.graph(name).read_bytes()


# -- trunk -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["cond", "uncond"])
def test_trunk_in_raster_order(graphs, golden, kind, rows):
    recorded = golden.recorded("forward")
    tokens = recorded["teacher_tokens"][:rows]
    classes = recorded["class_ids"][:rows]
    if kind == "uncond":
        classes = np.full_like(classes, golden.spec.unconditional_class)
    orders = np.tile(np.arange(golden.spec.num_tokens), (rows, 1))
    found = Trunk(graphs, classes).latents(tokens, orders)
    np.testing.assert_allclose(found, recorded[f"latents_{kind}"][:rows], rtol=0, atol=LATENT_TOLERANCE)


@pytest.mark.parametrize("rows", [1, 3])
def test_trunk_in_random_order(graphs, golden, rows):
    recorded = golden.recorded("forward_random_order")
    trunk = Trunk(graphs, recorded["class_ids"][:rows])
    found = trunk.latents(recorded["tokens_in_order"][:rows], recorded["orders"][:rows])
    np.testing.assert_allclose(found, recorded["latents_cond"][:rows], rtol=0, atol=LATENT_TOLERANCE)


def test_trunk_writes_only_the_new_positions_of_its_cache(graphs, golden):
    recorded = golden.recorded("forward")
    f = golden.spec.prefix_length
    trunk = Trunk(graphs, recorded["class_ids"])
    trunk.prefix(np.zeros(3, dtype=np.int64))
    before = {name: array.copy() for name, array in trunk.caches.items()}
    trunk.token(0, recorded["teacher_tokens"][:, 0], np.zeros(3, dtype=np.int64), np.ones(3, dtype=np.int64))
    for name, array in trunk.caches.items():
        assert (before[name][:, :, :f] != 7).all() and (before[name][:, :, f:] == 7).all()
        np.testing.assert_array_equal(array[:, :, :f], before[name][:, :, :f])
        assert (array[:, :, f] != 7).all() and (array[:, :, f + 1 :] == 7).all()


def test_trunk_takes_several_tokens_at_once(graphs, golden):
    """A prefix in pieces and teacher forcing in one call give what token by token gives."""
    recorded, spec = golden.recorded("forward_random_order"), golden.spec
    f, n, rows = spec.prefix_length, spec.num_tokens, 3
    orders, tokens = recorded["orders"], recorded["tokens_in_order"]
    trunk = Trunk(graphs, recorded["class_ids"])
    symbols = np.tile(trunk.classes[:, None] + 3, f)
    symbols[:, 0] = spec.num_classes + 4
    nothing = np.zeros((rows, f, spec.bits_per_token))
    positions, targets = np.tile(np.arange(f), (rows, 1)), np.tile(f + orders[:, :1], f)
    for piece in (slice(0, 2), slice(2, f)):
        found = trunk.run(
            piece.start, symbols[:, piece], nothing[:, piece], positions[:, piece], targets[:, piece]
        )["latent"]  # fmt: skip
    np.testing.assert_allclose(found, recorded["latents_cond"][:, 0], rtol=0, atol=LATENT_TOLERANCE)
    symbols = np.full((rows, n - 1), spec.num_classes + 5)
    found = trunk.run(f, symbols, tokens[:, :-1], f + orders[:, :-1], f + orders[:, 1:])["latent"]
    np.testing.assert_allclose(found, recorded["latents_cond"][:, -1], rtol=0, atol=LATENT_TOLERANCE)


@pytest.mark.parametrize("name", ["modulation", "onnxruntime_modulation"])
@torch.inference_mode()
def test_modulation_is_every_blocks_with_the_norms_weight_in_the_scales(graphs, golden, name):
    spec, reference = golden.spec, golden.reference
    classes, positions = np.array([0, 7, spec.unconditional_class]), np.array([0, 1, spec.prefix_length + 2])
    (found,) = graphs.run(name, class_id=classes, positions=positions)
    condition = reference.class_embedding(torch.from_numpy(classes))[:, 0] + reference.timesteps_embeddings[
        0, torch.from_numpy(positions)
    ].unsqueeze(1)  # [T, U, D]
    for i, block in enumerate(reference.blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition).chunk(6, dim=-1)
        expected = (
            shift1, block.norm1.weight * (1 + scale1), gate1, shift2, block.norm2.weight * (1 + scale2), gate2
        )  # fmt: skip
        for piece, value in enumerate(expected):
            np.testing.assert_allclose(found[:, 6 * i + piece], value.numpy(), **MODULATION_TOLERANCE)


# -- head --------------------------------------------------------------------------------------------------------------


def test_head_logits(graphs, golden):
    recorded = golden.recorded("forward")
    ids = recorded["head_ids"]
    (ratio,) = graphs.run("mask_ratio", mask_ratio=recorded["head_mask_ratio"])
    modulation = graphs.run("head_modulation", latent=recorded["head_conditions"], ratio_embedding=ratio)
    for rows in (slice(0, 1), slice(1, 4), slice(0, 12)):
        which = np.arange(12)[rows]
        pieces = {f"modulation.{i}": value[which, which] for i, value in enumerate(modulation)}
        (found,) = graphs.run("head_pass", known=ids[rows] != 2, bits=ids[rows] == 1, **pieces)
        np.testing.assert_allclose(found, recorded["head_logits"][rows], rtol=0, atol=LOGIT_TOLERANCE)


def test_head_gives_conditional_and_unconditional_rows_the_same_bits(graphs, golden):
    recorded = golden.recorded("forward")
    known, bits = recorded["head_ids"][:3] != 2, recorded["head_ids"][:3] == 1
    conditions = recorded["head_conditions"]
    ratio = recorded["head_mask_ratio"][:2]
    guided = graphs.head(conditions[:6], ratio)(known, bits, 1)
    for rows in (slice(0, 3), slice(3, 6)):
        alone = graphs.head(conditions[rows], ratio)(known, bits, 1)
        np.testing.assert_allclose(guided[rows], alone, rtol=0, atol=LOGIT_TOLERANCE)


def test_head_ignores_the_bits_of_masked_positions(graphs, golden):
    recorded = golden.recorded("forward")
    known = recorded["head_ids"][:4] != 2
    bits = recorded["head_ids"][:4] == 1
    head = graphs.head(recorded["head_conditions"][:4], recorded["head_mask_ratio"][:1])
    np.testing.assert_array_equal(head(known, bits, 0), head(known, bits | ~known, 0))


@torch.inference_mode()
def test_mask_ratio_embeddings(graphs, golden):
    ratio = np.array([1, 0.875, 0.5, 0.0625], dtype=np.float32)
    expected = golden.reference.lm_head.t_embedder(torch.from_numpy(ratio)).numpy()
    np.testing.assert_allclose(graphs.run("mask_ratio", mask_ratio=ratio)[0], expected, rtol=0, atol=1e-5)


# -- decoder -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["decode", "onnxruntime_decode"])
@pytest.mark.parametrize("images", [1, 3])
@torch.inference_mode()
def test_decoder_against_the_reference(graphs, golden, images, name):
    shape = (images, golden.spec.image_seq_len, golden.spec.token_size)
    bits = np.random.default_rng(images).integers(0, 2, shape).astype(np.float32)
    (found,) = graphs.run(name, bits=bits)
    expected = golden.decoder(torch.from_numpy(bits)).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=IMAGE_TOLERANCE * np.abs(expected).max())


def test_decoder_against_the_recorded_image(patch1, data):
    with np.load(data / "golden" / "decoder_6bit" / "decode.npz") as recorded:
        (found,) = Graphs(patch1).run("decode", bits=recorded["bits"].astype(np.float32))
        np.testing.assert_allclose(found, recorded["image"], rtol=0, atol=IMAGE_TOLERANCE)


# -- the fused step ----------------------------------------------------------------------------------------------------


def draw_with_the_step(graphs: Graphs, class_ids: np.ndarray, recipe: Recipe, noise) -> tuple[np.ndarray, float]:
    """Bits [B, N, K] by generation step from the fused step, each token compared with the numpy loop.

    The numpy loop gets the step's own latent and the canonical head. Returns also the closest decision of all.
    """
    spec, images = graphs.spec, len(class_ids)
    guided = recipe.guidance > 1
    copies = 2 if guided else 1
    rows = np.concatenate((class_ids, np.full(images if guided else 0, spec.unconditional_class))).astype(np.int64)
    schedule = Schedule.of(recipe, spec.bits_per_token)
    orders = np.tile(noise.orders(spec.num_tokens), (copies, 1))
    u_bits, u_confidence = noise.uniforms(spec.num_tokens, len(recipe.allocation), spec.bits_per_token)
    (ratio,) = graphs.run("mask_ratio", mask_ratio=schedule.mask_ratio)
    trunk = Trunk(graphs, rows, "onnxruntime_step")
    drawn, closest = [], np.inf
    for n in range(spec.num_tokens):
        scale = guidance_at(n, recipe.guidance, spec.num_tokens)
        sampling = {
            "ratio_embedding": ratio,
            "guidance": np.float32(scale),
            "temperature": schedule.temperature[:, None],
            "remask_count": schedule.remask_count[:, None],
            "gumbel_bits": gumbel(u_bits[n]),
            "gumbel_confidence": gumbel(u_confidence[n]),
        }
        if n == 0:
            found = trunk.prefix(orders[:, 0], **sampling)
        else:
            bits = np.tile(drawn[-1], (copies, 1))
            found = trunk.token(n - 1, bits, orders[:, n - 1], orders[:, n], **sampling)
        head = graphs.head(found["latent"], schedule.mask_ratio)
        expected, margin = sample_token(head, schedule, scale, sampling["gumbel_bits"], sampling["gumbel_confidence"])
        np.testing.assert_array_equal(found["drawn"], expected, err_msg=f"token {n}, closest decision {margin}")
        drawn.append(found["drawn"])
        closest = min(closest, margin.min())
    return np.stack(drawn, axis=1), closest


def test_fused_step_is_the_numpy_loop_bit_by_bit(graphs, golden, sampling, read_sampling):
    recorded = golden.recorded(sampling)
    recipe, noise = read_sampling(recorded)
    drawn, _ = draw_with_the_step(graphs, recorded["class_ids"], recipe, noise)
    raster = np.empty_like(drawn)
    np.put_along_axis(raster, noise.orders(golden.spec.num_tokens)[:, :, None], drawn, axis=1)
    np.testing.assert_array_equal(to_fine_grid(raster, golden.spec), recorded["ids"])


@pytest.mark.parametrize("passes", ["one", "two", "every bit"])
@pytest.mark.parametrize("images", [1, 3])
def test_fused_step_runs_any_allocation(graphs, golden, images, passes):
    k = golden.spec.bits_per_token
    allocation = {"one": (k,), "two": (k // 3, k - k // 3), "every bit": (1,) * k}[passes]
    noise = SeededNoise(images, range(images), random_order=True)
    draw_with_the_step(graphs, np.arange(images), Recipe(3.0, 1.5, allocation), noise)


def test_fused_step_gives_the_latents_of_the_reference(graphs, golden):
    recorded = golden.recorded("sample_nocfg")
    noise = RecordedNoise(recorded["u_bits"], recorded["u_confidence"])
    recipe = Recipe(1.0, 1.0, tuple(recorded["tokens_allocation"].tolist()))
    classes, orders = recorded["class_ids"], noise.orders(golden.spec.num_tokens)
    drawn, _ = draw_with_the_step(graphs, classes, recipe, noise)
    expected = teacher_forced_latents(
        golden.reference, torch.from_numpy(classes), torch.from_numpy(drawn), torch.from_numpy(orders)
    )
    found = Trunk(graphs, classes).latents(drawn, orders)
    np.testing.assert_allclose(found, expected.numpy(), rtol=0, atol=LATENT_TOLERANCE)


# -- quantized ---------------------------------------------------------------------------------------------------------


def decibels(exact: np.ndarray, found: np.ndarray) -> float:
    """Signal to noise."""
    noise = np.square(found - exact, dtype=np.float64).sum()
    return 10 * float(np.log10(np.square(exact, dtype=np.float64).sum() / max(noise, 1e-30)))


@pytest.fixture(scope="module")
def integer_graphs(digits, precision) -> Graphs:
    return Graphs(SimpleNamespace(bundle=digits.quantized(precision), spec=digits.spec))


@pytest.fixture(scope="module")
def float_graphs(digits) -> Graphs:
    return Graphs(digits)


@pytest.fixture(scope="module")
def drawn_digits(digits) -> np.ndarray:
    """[2, N, K]"""
    bits = digits.runtime.generate([3, 8], seed=2, return_bits=True)[1]
    return to_tokens(bits, digits.spec)


def led_latents(graphs: Graphs, name: str, classes: np.ndarray, tokens: np.ndarray, count: int) -> np.ndarray:
    """[rows, count, W] of the trunk or of the fused step, led along the first tokens."""
    spec = graphs.spec
    sampling = {}
    if name == "onnxruntime_step":
        shape = (1, len(classes), spec.bits_per_token)
        sampling = {
            "ratio_embedding": np.zeros((1, spec.head_width), dtype=np.float32),
            "guidance": np.float32(1),
            "temperature": np.zeros((1, 1), dtype=np.float32),
            "remask_count": np.zeros((1, 1), dtype=np.int64),
            "gumbel_bits": np.zeros((*shape, 2), dtype=np.float32),
            "gumbel_confidence": np.zeros(shape, dtype=np.float32),
        }
    trunk, order = Trunk(graphs, classes, name), np.tile(np.arange(spec.num_tokens), (len(classes), 1))
    found = [trunk.prefix(order[:, 0], **sampling)["latent"].copy()]
    for n in range(count - 1):
        found.append(trunk.token(n, tokens[:, n], order[:, n], order[:, n + 1], **sampling)["latent"].copy())
    return np.stack(found, axis=1)


def test_both_forms_of_a_quantized_trunk_agree(integer_graphs, float_graphs, drawn_digits, precision):
    """Closer to each other than to float32: rounding falls the other way in a few values.

    The runtime's weight-only product rounds activations to 8 bits as well, which costs it what int8-weight would gain.
    """
    classes, count = np.array([3, 8]), 8
    exact = led_latents(float_graphs, "canonical", classes, drawn_digits, count)
    canonical = led_latents(integer_graphs, "canonical", classes, drawn_digits, count)
    runtime = led_latents(integer_graphs, "onnxruntime_step", classes, drawn_digits, count)
    assert decibels(canonical, runtime) > 36
    assert decibels(exact, runtime) > {"int8": 20, "int8-weight": 36, "int4-weight": 18}[precision]
    if precision != "int8-weight":
        assert decibels(exact, runtime) == pytest.approx(decibels(exact, canonical), abs=1)
        assert decibels(canonical, runtime) > decibels(exact, canonical) + 6


def test_both_forms_of_a_quantized_modulation_and_decoder_agree(integer_graphs, float_graphs, drawn_digits, digits):
    """Both are int8 in every bundle."""
    feeds = {
        "modulation": {"class_id": np.array([3, digits.spec.num_classes]), "positions": np.arange(20)},
        "decode": {"bits": to_fine_grid(drawn_digits, digits.spec).astype(np.float32)},
    }
    found = {}
    for name, inputs in feeds.items():
        (canonical,) = integer_graphs.run(name, **inputs)
        (found[name],) = integer_graphs.run(f"onnxruntime_{name}", **inputs)
        assert decibels(canonical, found[name]) > 60, name
    assert decibels(float_graphs.run("decode", **feeds["decode"])[0], found["decode"]) > 35


def test_both_forms_of_a_quantized_head_agree(integer_graphs, digits, precision):
    """Logits of every pass before and after guidance, in the same states."""
    bundle, spec = integer_graphs.bundle, digits.spec
    rng = np.random.default_rng(3)
    batch = make_batch(bundle, np.array([3, 8]), 5, range(2))
    schedule = Schedule.of(batch.recipe, spec.bits_per_token)
    engine = ProbeEngine(bundle, precisions_of(bundle), threads=1)
    passes = len(schedule.mask_ratio)
    for n, step in engine.probe_walk(batch):
        known = rng.random((passes, 2, spec.bits_per_token)) > schedule.mask_ratio[:, None, None]
        bits = rng.random((2, spec.bits_per_token)) < 0.5
        step.lead(known, bits)
        step.run()
        head = integer_graphs.head(step.latent, schedule.mask_ratio)
        of_rows = np.stack([head(known[s], bits, s) for s in range(passes)])
        conditional, unconditional = np.split(of_rows, 2, axis=1)
        scale = np.float32(guidance_at(n, batch.recipe.guidance, spec.num_tokens))
        expected = unconditional + scale * (conditional - unconditional)
        np.testing.assert_array_equal(step.seen["known"], known)
        assert decibels(expected, step.seen["logits"]) > 28, (precision, n)
        assert decibels(of_rows, step.seen["row_logits"]) > 28, (precision, n)
        if n == 7:
            break
    engine.close()
