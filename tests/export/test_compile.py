"""`compile_bundle` with TensorRT-RTX itself, which builds without a GPU: what the plans really hold, and refusals."""

import errno
import re
import shutil
import signal
import sys
from collections import Counter
from math import prod
from types import SimpleNamespace

import numpy as np
import pytest
from onnx import TensorProto, helper

from bar_edge.benchmarks.random_checkpoint import random_generator, random_tokenizer, write_checkpoint
from bar_edge.calibration.quantizer import quantize_bundle
from bar_edge.export import compile as compiler
from bar_edge.export.compile import Builder, check_program, compile_bundle, sentence
from bar_edge.export.exporter import export_bundle
from bar_edge.export.plan_report import Kernel, Program, read_plan
from bar_edge.export.targets import RTX_SMS, resolve
from bar_edge.export.tensorrt_graphs import build_tensorrt_graphs
from bar_edge.runtime import weights
from bar_edge.runtime.bundle import SELFTEST, Bundle
from bar_edge.runtime.engines.cuda.loop import TABLES, buffer_sizes
from bar_edge.runtime.engines.cuda.profile import Profile
from bar_edge.runtime.engines.tensorrt import load_library
from bar_edge.runtime.errors import BundleError, CompatibilityError, EngineError, RequestError
from bar_edge.runtime.inspection import linear_layers
from bar_edge.runtime.precisions import BITS
from bar_edge.runtime.spec import ModelSpec, Recipe

from .conftest import FORMS, MODELS, products_of

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")

GRAPHS = ["modulation", "mask_ratio", "prefix", "step", "head_pass", "decode"]
IN_THE_LOOP = ("step", "head_pass")
KERNELS_PER_BLOCK = {"fp16": 10, "int8": 12, "int8-weight": 12, "int4-weight": 13}
SMALL = "patch1_10bit"  # every graph of it has layers large enough to quantize
_MAIN = re.compile(rb"\nmain \{\n label \w+: \n(.*?)\n\}", re.DOTALL)
_DIMS = re.compile(rb'\n {2}(?:sub_)?tensor=\{[^\n]*? dims=\{([^}]*)\}[^\n]*? name="([^"]+)"')
_OUTPUTS = re.compile(rb" output(?:_args)?=\{([^}]*)\}")


@pytest.fixture(scope="module", params=[(model, form) for model in MODELS for form in FORMS], ids="-".join)
def made(request, compiled):
    """Every model in every precision."""
    return compiled(*request.param)


@pytest.fixture
def builder():
    """TensorRT-RTX, set up for all RTX cards."""
    return Builder(load_library("tensorrt_rtx"), resolve("rtx", None), lambda what, done, total: None)


@pytest.fixture
def compile_small(patch1, tmp_path):
    """Compile the plainest bundle into a folder that is checked to be empty after a refusal."""
    bundle = patch1.bundle  # exported before anything is made to fail
    return lambda **settings: compile_bundle(bundle, tmp_path / "out", **{"target": "rtx", **settings})


@pytest.fixture
def one_graph(monkeypatch):
    """Only the smallest graph is compiled."""

    def build(*arguments):
        return {"mask_ratio": build_tensorrt_graphs(*arguments)["mask_ratio"]}

    monkeypatch.setattr(compiler, "build_tensorrt_graphs", build)


# -- what the plans hold -----------------------------------------------------------------------------------------------


def test_one_plan_of_each_graph_is_made_for_four_generations(made):
    assert made.facts["library"] == "tensorrt_rtx" and made.facts["sms"] == list(RTX_SMS) == [80, 86, 89, 120]
    (profile,) = made.facts["profiles"]
    assert list(profile["plans"]) == GRAPHS
    assert len({plan["file"] for plan in profile["plans"].values()}) == len(GRAPHS)


def test_products_of_the_token_loop_are_exactly_what_was_asked_for(made):
    """No fp32 product where INT8 was asked for, no weight-only layer whose weights are made floats first."""
    for name in IN_THE_LOOP:
        layers = products_of(made.graph(name))
        assert made.programs[name].products == {layer: made.asked_for[layer] for layer in layers}, name


def test_products_once_an_image_are_integers_or_the_floats_they_stand_for(made):
    for name in ("modulation", "prefix", "decode"):
        found = made.programs[name].products
        assert found and found.keys() <= products_of(made.graph(name))
        for layer, kind in found.items():
            asked = made.asked_for[layer]
            assert kind == asked or (asked in BITS and kind == "fp16"), f"{name}: {layer} is {kind}, not {asked}"
    last = made.source.spec.num_layers - 1
    of_last = {layer for layer in made.programs["prefix"].products if layer.startswith(f"blocks.{last}.")}
    assert of_last == {f"blocks.{last}.attn.qkv"}  # nothing reads the rest of the last layer
    assert set(made.programs["mask_ratio"].products.values()) == {"fp32"}


def test_no_product_may_overflow(made):
    for name, program in made.programs.items():
        assert program.overflowing == [], name


def test_kernels_of_a_token_stay_within_their_budget(made):
    """Launches decide a token's time where images are few; the demo's step has 57, 66, 65 and 70 of them today."""
    spec = made.source.spec
    per_block = KERNELS_PER_BLOCK[made.bundle.manifest.get("quantization", {}).get("precision", "fp16")]
    assert len(made.programs["step"].kernels) <= per_block * spec.num_layers + 8
    assert len(made.programs["head_pass"].kernels) <= 5 * spec.head_layers + 2


def test_attention_over_the_cache_is_one_kernel_a_block(made):
    step = made.programs["step"]
    kernels = [kernel for kernel in step.kernels if any(layer.startswith("Attention_") for layer in kernel.layers)]
    assert len(kernels) == made.source.spec.num_layers


def cache_sized_outputs(plan, size):
    """(layers of a kernel, tensor) for every tensor of `size` elements that a kernel gives."""
    listing = _MAIN.search(plan)
    assert listing is not None
    sizes = {name: prod(map(int, dims.split())) for dims, name in _DIMS.findall(plan[: listing.start()])}
    found = []
    for line in listing[1].splitlines():
        for outputs in _OUTPUTS.findall(line):
            layers = re.findall(rb"\[ONNX Layer: ([^\]]+)\]", line)
            names = re.findall(rb'"([^"]+)"', outputs)
            found += [(layers, name.decode()) for name in names if sizes.get(name) == size]
    return found


def cache_size(profile, spec):
    return profile.rows * spec.hidden_size * profile.cache_length(spec)


@pytest.mark.parametrize("form", FORMS)
def test_no_kernel_of_a_step_copies_a_cache(compiled, form):
    """Each is given once, by the kernel that scatters the new position into it."""
    demo = compiled("digits", form)
    profile = Profile.from_dict(demo.facts["profiles"][0]["sizes"])
    given = cache_sized_outputs(demo.plan("step"), cache_size(profile, demo.source.spec))
    assert len(given) == 2 * demo.source.spec.num_layers
    for layers, name in given:
        assert re.match(r"[kv]_cache_out\.\d+", name) and name.rsplit(".", 1)[0].encode() in layers


def test_a_copy_of_a_cache_would_be_seen(digits, written, builder):
    """Written out, attention over a cache transposes all of it at every token."""
    portable = written(digits.bundle, TensorProto.FLOAT16, in_place=False)
    plan = builder.build(portable.save("step"), "step")
    assert len(cache_sized_outputs(plan, cache_size(portable.profile, digits.spec))) == 2 * digits.spec.num_layers


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_other_floats_are_computed_as_asked(compiled, precision):
    made = compiled(SMALL, precision)
    for name in GRAPHS:
        expected = "fp32" if name == "mask_ratio" else precision
        assert set(made.programs[name].products.values()) == {expected}, name
    assert made.programs["step"].products.keys() == products_of(made.graph("step"))


@pytest.mark.parametrize("form", ["fp16", "int8-weight"])
def test_profiles_share_equal_plans_and_have_the_same_kernels(compiled, form):
    made = compiled(SMALL, form, (1, 3))
    one, three = made.plans(0), made.plans(1)
    assert {name for name in GRAPHS if one[name]["file"] == three[name]["file"]} == {"modulation", "mask_ratio"}
    assert len([file for file in made.bundle.manifest["files"] if file.endswith(".plan")]) == 10
    for name in IN_THE_LOOP:
        first, second = (read_plan(made.plan(name, profile)) for profile in (0, 1))
        assert len(first.kernels) == len(second.kernels) and first.products == second.products
    assert [profile["sizes"]["rows"] for profile in made.facts["profiles"]] == [2, 6]


@pytest.mark.parametrize("form", FORMS)
def test_the_portable_form_builds_as_well(small, written, builder, form):
    bundle = small.bundle if form == "fp16" else small.quantized(form)
    graphs = written(bundle, TensorProto.FLOAT16, in_place=False)
    stored = linear_layers(weights.read_places(bundle.path / weights.FILE_NAME))
    asked_for = {layer: "fp16" if kind == "fp32" else kind for layer, kind in stored.items()}
    for name in GRAPHS:
        program = read_plan(builder.build(graphs.save(name), name))
        check_program(name, program, asked_for)
        assert len(program.products) > 0


@pytest.mark.parametrize(("heads", "head_dim"), [(3, 8), (1, 16), (4, 8)])
def test_few_heads_one_row_and_one_pass_compile(tmp_path, heads, head_dim):
    """TensorRT-RTX has no attention kernel for fewer than four heads of all rows together."""
    spec = ModelSpec(
        hidden_size=heads * head_dim, num_layers=2, num_heads=heads, image_seq_len=16, token_size=4, patch_size=2,
        num_classes=10, repeat_class_condition=6, head_width=32, head_layers=1, decoder_patch_size=16,
    )  # fmt: skip
    tensors = random_generator(spec), random_tokenizer(spec, width=32, layers=1)
    write_checkpoint(tmp_path, spec, Recipe(1.0, 1.0, (16,)), *tensors)
    checkpoint = (tmp_path / name for name in ("generator.bin", "tokenizer.bin", "config.yaml"))
    made = compile_bundle(export_bundle(*checkpoint, tmp_path / "bundle"), tmp_path / "out", target="rtx")
    (profile,) = made.manifest["engines"]["tensorrt"]["profiles"]
    assert (profile["sizes"]["rows"], profile["sizes"]["passes"]) == (1, 1)
    assert profile["plans"]["step"]["products"] == {"fp16": 4 * 2 + 1 + 2}  # blocks, latent, the head's modulation


# -- the bundle that is made -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_manifest_tells_what_was_made_and_how(compiled, form):
    made = compiled(SMALL, form)
    facts = made.facts
    assert facts["version"] == trt.__version__ and facts["precision"] == "fp16" and facts["in_place"] is True
    assert facts["builder"] == {"strongly_typed": True, "tf32": False}
    (described,) = facts["profiles"]
    spec, recipe = made.source.spec, made.source.recipe
    profile = Profile.of(1, guided=True, passes=len(recipe.allocation))
    assert Profile.from_dict(described["sizes"]) == profile
    assert described["buffer_bytes"] == sum(buffer_sizes(spec, profile, itemsize=2, in_place=True).values())
    for name, plan in described["plans"].items():
        assert plan["bytes"] == (made.bundle.path / plan["file"]).stat().st_size
        assert plan["kernels"] == len(made.programs[name].kernels)
        assert plan["products"] == Counter(made.programs[name].products.values())
    assert made.bundle.manifest.get("quantization") == made.source.manifest.get("quantization")
    provenance = made.bundle.manifest["provenance"]
    assert provenance["source"]["digest"] == made.source.digest
    assert provenance["made_by"].keys() == {"bar-edge", "onnx", "numpy"}


@pytest.mark.parametrize("form", FORMS)
def test_a_compiled_bundle_is_whole_and_needs_no_other(compiled, form):
    made = compiled(SMALL, form)
    again = Bundle.open(made.bundle.path)
    assert again.engines == ("tensorrt",) and again.graphs == {}
    assert (again.spec, again.recipe, again.variant) == (made.source.spec, made.source.recipe, made.source.variant)
    plans = {plan["file"] for plan in made.plans().values()}
    assert set(again.manifest["files"]) == plans | {SELFTEST, weights.FILE_NAME}
    assert (again.path / SELFTEST).read_bytes() == (made.source.path / SELFTEST).read_bytes()
    held, given = weights.open_weights(again.path), weights.open_weights(made.source.path)
    assert set(held) == set(TABLES)
    for name in TABLES:
        np.testing.assert_array_equal(held[name], given[name], strict=True)
    assert again.digest not in (made.source.digest, compiled(SMALL, "bf16").bundle.digest)
    with pytest.raises(CompatibilityError, match="has no graph 'decode'"):
        again.graph("decode")


def test_the_graphs_can_be_kept_with_their_weights(compiled):
    made = compiled(SMALL, "int8")
    assert {path.name for path in made.onnx.iterdir()} == {*(f"{name}-2.onnx" for name in GRAPHS), weights.FILE_NAME}
    for name in GRAPHS:
        network = trt.Builder(compiler._log_of(trt)).create_network(0)
        assert trt.OnnxParser(network, compiler._log_of(trt)).parse_from_file(str(made.onnx / f"{name}-2.onnx"))


@pytest.mark.parametrize("changed", ["plan", "weights"])
def test_a_damaged_plan_never_opens(compiled, tmp_path, changed):
    made = compiled(SMALL, "fp16")
    folder = shutil.copytree(made.bundle.path, tmp_path / "copy")
    file = folder / (made.plans()["step"]["file"] if changed == "plan" else weights.FILE_NAME)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=f"{file.name}.*SHA-256"):
        Bundle.open(folder)


def test_sentence_says_size_kernels_and_products():
    plan = {"file": "a.plan", "bytes": 2 * 2**20, "kernels": 57, "products": {"int8": 20, "fp16": 4}}
    assert sentence(plan) == "2.0 MiB, 57 kernels, int8 x20, fp16 x4"
    assert sentence({"bytes": 2**19, "layers": 7}) == "0.5 MiB"


@pytest.mark.usefixtures("one_graph")
def test_progress_is_reported_and_ends(compile_small):
    reports = []
    compile_small(progress=lambda *report: reports.append(report))
    phases = [what for what, _, _ in reports if what.startswith("compiling mask_ratio, 2 rows: ")]
    assert len(phases) > 3
    assert all(done <= total for what, done, total in reports if not what.startswith("compiling"))


@pytest.mark.usefixtures("one_graph")
def test_force_replaces_a_bundle(compile_small, tmp_path):
    first = compile_small(batches=(1,))
    with pytest.raises(BundleError, match="exists already"):
        compile_small(batches=(2,))
    assert Bundle.open(first.path).digest == first.digest
    again = compile_small(batches=(2,), force=True)
    assert again.manifest["engines"]["tensorrt"]["profiles"][0]["sizes"]["rows"] == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


# -- refusals ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown precision": ({"precision": "fp8"}, RequestError, "precision 'fp8'.*fp16, bf16, fp32.*from quantize"),
    "a stored precision": ({"precision": "int8"}, RequestError, "precision 'int8'.*INT8 and INT4 come from quantize"),
    "an unknown target": ({"target": "rtx2080"}, EngineError, "unknown target 'rtx2080'; known: rtx, host"),
    "no images": ({"batches": (0,)}, RequestError, "batches must be at least 1, are 0"),
    "no batches": ({"batches": ()}, RequestError, "batches must be at least 1, are none"),
    "one batch of none": ({"batches": (4, -1)}, RequestError, "batches must be at least 1, are 4, -1"),
    "a Jetson elsewhere": ({"target": "orin"}, EngineError, "Jetson Orin.*has no GPU.*bar-edge compile.*--target host"),
    "a Thor elsewhere": ({"target": "thor", "host_sm": 86}, EngineError, "Jetson Thor.*SM 8.6.*--target host"),
    "an H200 elsewhere": ({"target": "h200"}, EngineError, "H200 is SM 9.0.*--target host"),
    "a host without a GPU": ({"target": "host"}, EngineError, "no NVIDIA GPU answers here.*`rtx`"),
    "a host without its library": (
        {"target": "host", "host_sm": 87},
        EngineError,
        "TensorRT is not installed.*JetPack",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(compile_small, tmp_path, monkeypatch, mistake):
    settings, kind, message = REFUSED[mistake]
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(kind, match=message):
        compile_small(**settings)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_named_with_its_package(compile_small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError, match=r"TensorRT-RTX is not installed .*; pip install tensorrt-rtx-cu13$"):
        compile_small()
    assert list(tmp_path.iterdir()) == []


def test_a_compiled_bundle_is_not_compiled_again(compiled, tmp_path):
    with pytest.raises(RequestError, match="is compiled already; use the bundle it was made from"):
        compile_bundle(compiled(SMALL, "fp16").bundle, tmp_path / "out", target="rtx")
    assert list(tmp_path.iterdir()) == []


def test_asymmetric_activations_are_refused_with_the_remedy(small, tmp_path):
    small.quantized("int8")  # skips where INT8 is not exact
    bundle = quantize_bundle(
        small.bundle, small.calibration, tmp_path / "asymmetric", precision="int8", asymmetric=True, measure=False,
        threads=1,
    )  # fmt: skip
    with pytest.raises(CompatibilityError, match=r"asymmetric activations.*quantize without --asymmetric"):
        compile_bundle(bundle, tmp_path / "out", target="rtx")
    assert not (tmp_path / "out").exists()


def test_a_folder_for_graphs_that_exists_is_refused(compile_small, tmp_path):
    (tmp_path / "kept").mkdir()
    with pytest.raises(RequestError, match="kept: exists already; choose a new folder"):
        compile_small(keep_onnx=tmp_path / "kept")
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]


def test_too_little_disk_is_found_before_the_work(compile_small, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1))
    with pytest.raises(BundleError, match=r"0 MiB free, \d+ MiB needed; free some space"):
        compile_small()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing_behind(compile_small, tmp_path, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(compiler.onnx, "save", full)
    with pytest.raises(BundleError, match=r"out: writing failed \(No space .*\); nothing was left behind"):
        compile_small()
    assert list(tmp_path.iterdir()) == []


def refused_graph():
    """The parser knows no integer products without scales."""
    types = TensorProto.INT8, TensorProto.INT32
    values = [helper.make_tensor_value_info(name, types[name == "y"], [2, 2]) for name in "aby"]
    nodes = [helper.make_node("MatMulInteger", ["a", "b"], ["y"], "the_culprit")]
    graph = helper.make_graph(nodes, "refused", values[:2], values[2:])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def test_a_graph_that_the_parser_refuses_is_told_in_its_words(compile_small, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "build_tensorrt_graphs", lambda *arguments: {"step": refused_graph()})
    with pytest.raises(
        EngineError, match=r"^step, 2 rows: tensorrt_rtx 1\..* cannot read the graph: .*the_culprit.*MatMulInteger"
    ):
        compile_small()
    assert list(tmp_path.iterdir()) == []


def attention_of_no_size():
    """TensorRT-RTX reads it, and has no kernel for heads of 12 channels."""
    shapes = {"q": [2, 4, 1, 12], "k": [2, 4, 8, 12], "v": [2, 4, 8, 12], "y": [2, 4, 1, 12]}
    *inputs, output = (helper.make_tensor_value_info(name, TensorProto.FLOAT16, dims) for name, dims in shapes.items())
    graph = helper.make_graph([helper.make_node("Attention", ["q", "k", "v"], ["y"])], "no_kernel", inputs, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)


def test_a_builder_that_fails_is_told_in_its_words(compile_small, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "build_tensorrt_graphs", lambda *arguments: {"step": attention_of_no_size()})
    with pytest.raises(
        EngineError, match=r"could not build an engine; the end of its log: .*Attention .*not supported"
    ):
        compile_small()
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_is_not_what_was_asked_for_is_not_published(compile_small, tmp_path, monkeypatch):
    wrong = Kernel("gemm", ("blocks.0.attn.qkv.product",), ("float", "float"), ("float",))
    monkeypatch.setattr(compiler, "read_plan", lambda plan: Program((wrong,)))
    with pytest.raises(EngineError, match=r"blocks\.0\.attn\.qkv fp32 instead of fp16; please report this"):
        compile_small()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_graph")
def test_ctrl_c_within_the_builder_is_not_swallowed(compile_small, tmp_path, monkeypatch):
    """The builder goes on after what its callbacks raise."""
    log = type(compiler._log_of(pytest.importorskip("tensorrt_rtx")))
    pressed = []

    def press(self, severity, message):
        if not pressed:
            pressed.append(message)
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(log, "log", press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts behind itself
    try:
        with pytest.raises(KeyboardInterrupt):
            compile_small()
        assert pressed and list(tmp_path.iterdir()) == []
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("one_graph")
def test_a_signal_that_nobody_raises_an_error_for_stops_the_build_all_the_same(compile_small, tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(EngineError, match="was interrupted by signal 15"):
            compile_small(progress=lambda what, done, total: signal.raise_signal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert set(heard) == {signal.SIGTERM} and list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_graph")
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("when", ["compiling mask_ratio", "hashing", "writing weights"])
def test_an_interruption_leaves_nothing_behind_and_the_next_build_works(compile_small, tmp_path, when, error):
    def interrupted(what, done, total):
        if what.startswith(when):
            raise error

    with pytest.raises(error):
        compile_small(progress=interrupted)
    assert list(tmp_path.iterdir()) == []
    assert compile_small().engines == ("tensorrt",)
