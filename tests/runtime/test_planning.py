"""Plans: what is counted, what is predicted, and how far that is from everything measured."""

import itertools
import json
import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bar_edge.calibration import quantize
from bar_edge.export.prepack import prepack_bundle
from bar_edge.runtime import planning, weights, workload
from bar_edge.runtime.cli import app
from bar_edge.runtime.devices import DEVICES, Device, device_of, find_device
from bar_edge.runtime.engines.onnxruntime import DECODE_IMAGES, MODULATION_BYTES, PREFIX_ROWS
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.plan_accuracy import PEAK_MEMORY, TARGET, Deviation, deviations
from bar_edge.runtime.plan_tables import PROJECTION
from bar_edge.runtime.planning import (
    USABLE_MEMORY,
    BatchCost,
    Cost,
    largest_batch,
    memory_bytes,
    predict,
)
from bar_edge.runtime.precisions import FP16, FP32, INT4_WEIGHT, INT8, INT8_WEIGHT, PRECISIONS
from bar_edge.runtime.spec import VARIANTS
from bar_edge.runtime.workload import Workload

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PARTS = ("trunk", "head_modulation", "head_pass", "modulation", "decoder")
CPU = DEVICES["epyc-2core"]
GPUS = [device for device in DEVICES.values() if not device.measured]
FREE = replace(  # a device on which nothing takes time: tests give it the one thing that does
    CPU, bandwidth=math.inf, rates=dict.fromkeys(CPU.rates, math.inf), elementwise_bandwidth=math.inf, phase_seconds=0.0
)

# the only ones off target (docs/planning.md says why)
MISSES = {
    ("cpu_bench_bar_b.json", INT8, 1, "first_token"),
    ("cpu_bench_bar_b_patch4.json", INT8, 1, "token"),
    ("cpu_bench_bar_b_patch4.json", INT8, 1, "decode"),
    ("cpu_scaling_batch64.json", INT8, 64, "token"),
}


def run(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)], catch_exceptions=False, env={"COLUMNS": "200"})


def counted(work: Workload) -> dict[str, Counter]:
    """The layers of every part, whatever their order."""
    return {part: Counter(getattr(work, part)) for part in PARTS}


def bar_b(precision: str = INT8) -> Workload:
    return workload.of_variant(VARIANTS["bar_b"], precision)


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_counts_what_its_exported_bundle_stores(name, places_of):
    variant = VARIANTS[name]
    spec, places = variant.spec, places_of(name)
    stored, expected = workload.of_bundle(spec, variant.recipe, places), workload.of_variant(variant, FP32)
    assert counted(stored) == counted(expected)
    assert stored.stored_bytes == expected.stored_bytes
    assert (stored.precision, stored.decoder_width, stored.decoder_layers) == (FP32, 1024, 24)


@pytest.mark.parametrize("precision", [INT8, INT8_WEIGHT, INT4_WEIGHT])
def test_a_quantized_layer_counts_the_bytes_the_quantizer_writes(precision):
    out, in_features = 256, 768
    weight = np.random.default_rng(0).standard_normal((out, in_features), dtype=np.float32)
    choice = quantize.Choice(precision, 0.0, None, 0.1, None, 40.0)
    written = quantize.stored("layer", choice, weight, np.ones(in_features, dtype=np.float32))
    bias = 4 * out
    expected = sum(array.nbytes for array in written.values()) + bias
    assert workload._layer(out, in_features, precision).bytes == pytest.approx(expected, abs=4)  # the input's scale


def test_a_quantized_bundle_counts_the_weights_of_the_fp32_one(small, precision):
    places = [weights.read_places(b.path / weights.FILE_NAME) for b in (small.bundle, small.quantized(precision))]
    before, after = (workload.of_bundle(small.spec, small.bundle.recipe, found) for found in places)
    assert after.precision == precision and before.precision == FP32
    for part in PARTS:
        first, second = getattr(before, part), getattr(after, part)
        assert sum(layer.weights for layer in first) == sum(layer.weights for layer in second)
        assert sum(layer.outputs for layer in first) == sum(layer.outputs for layer in second)
    assert after.bytes_per_token < before.bytes_per_token
    assert after.stored_bytes == sum(place.length for place in places[1].values())


def test_a_layer_kept_in_fp16_counts_half_the_bytes(small):
    places = weights.read_places(small.bundle.path / weights.FILE_NAME)
    kept = places.pop("blocks.0.mlp.w12.weight")
    before = workload.of_bundle(small.spec, small.bundle.recipe, {**places, "blocks.0.mlp.w12.weight": kept})
    places["blocks.0.mlp.w12.weight_fp16"] = replace(kept, dtype=np.dtype(np.float16))
    after = workload.of_bundle(small.spec, small.bundle.recipe, places)
    assert before.bytes_per_token - after.bytes_per_token == kept.length // 2
    assert [layer.weights for layer in before.trunk] == [layer.weights for layer in after.trunk]


@pytest.mark.parametrize("kind", ["chunks", "tables alone"])
def test_a_compiled_bundle_is_refused_with_the_remedy(patch1, tmp_path, kind):
    places = weights.read_places(prepack_bundle(patch1.bundle, tmp_path / "packed").path / weights.FILE_NAME)
    if kind == "tables alone":  # as beside the plans of TensorRT
        places = {name: place for name, place in places.items() if "embed" in name and "." not in name}
    with pytest.raises(RequestError, match="is compiled already; use the bundle it was made from"):
        workload.of_bundle(patch1.spec, patch1.bundle.recipe, places)


def test_weight_only_variants_are_static_int8_where_there_are_many_rows():
    work = bar_b(INT4_WEIGHT)
    assert {layer.precision for layer in work.modulation} == {INT8}
    assert {layer.precision for layer in work.trunk} == {INT4_WEIGHT}
    assert FP32 in {layer.precision for layer in work.head_pass}  # the bits' logits are too few to quantize


# -- what is predicted -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found() -> dict[str, list[Deviation]]:
    """What is found of every published variant."""
    return {name: deviations(RESULTS, variant, CPU) for name, variant in VARIANTS.items()}


def test_every_measured_figure_is_within_the_target(found):
    every = list(itertools.chain.from_iterable(found.values()))
    assert {one.stage for one in every} == {"token", "first_token", "decode", "image", PEAK_MEMORY}
    assert {one.precision for one in every} == {FP32, INT8, INT4_WEIGHT}
    assert {one.batch for one in every} == {1, 2, 8, 32, 64}
    assert {(one.file, one.precision, one.batch, one.stage) for one in every if abs(one.error) > TARGET} == MISSES


def test_the_documents_table_is_what_is_found_today(found):
    page = (RESULTS.parents[1] / "docs" / "planning.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| `cpu_")]
    rows = [[cell.strip(" `*") for cell in line.split("|")[1:-1]] for line in lines]
    told = [
        (file, model, precision, int(batch), stage, error) for file, model, precision, batch, stage, *_, error in rows
    ]
    today = [
        (one.file, name, one.precision, one.batch, one.stage.replace("_", " "), f"{one.error:+.1%}")
        for name, those in found.items()
        for one in those
    ]
    assert told == today
    assert f"{len(today) - len(MISSES)} of {len(today)} within 25 %" in page


def test_the_cpus_constants_are_those_of_the_files_they_cite():
    products = json.loads((RESULTS / "products.json").read_text())["weights_per_second"]
    readings = [entry["memory_bytes_per_second"] for shapes in products.values() for entry in shapes.values()]
    assert CPU.bandwidth == pytest.approx(statistics.median(readings), rel=0.01)
    for form, precision in (("MatMulNBits 8, block 128", INT8_WEIGHT), ("MatMulNBits 4, block 128", INT4_WEIGHT)):
        head = [16 * products[form][shape]["rows"]["16"] for shape in ("2048x11008", "5504x2048")]
        assert CPU.rates[precision] == pytest.approx(statistics.mean(head), rel=0.01)


def test_batches_larger_than_the_chunks_cost_what_their_groups_cost():
    one, many = (BatchCost(bar_b(), CPU, batch).decode().seconds for batch in (DECODE_IMAGES, 3 * DECODE_IMAGES))
    assert many == pytest.approx(3 * one)


def test_one_image_waits_for_memory_and_many_for_arithmetic():
    assert predict(bar_b(), CPU, 1).token.limit == "memory"
    assert predict(bar_b(), CPU, 64).token.limit == "arithmetic"
    assert predict(bar_b(INT4_WEIGHT), DEVICES["h200"], 1).token.limit == "waiting"


def test_a_layer_takes_the_longer_of_reading_and_multiplying():
    layer = workload.Layer(weights=1000, outputs=10, bytes=4000, precision=FP32)
    work = replace(bar_b(FP32), trunk=(layer,), head_modulation=(), head_pass=())
    device = replace(CPU, bandwidth=1e6, bandwidth_fraction=0.5, rates={**CPU.rates, FP32: 2e6}, phase_seconds=0)
    assert BatchCost(work, device, 1).token(0).memory == pytest.approx(4000 / 0.5e6)  # 2 rows: 1 ms to multiply
    many = BatchCost(work, device, 10).token(0)
    assert (many.memory, many.arithmetic) == (0, pytest.approx(20 * 1000 / 2e6))
    assert many.elementwise == pytest.approx(2 * 20 * 10 * 4 / device.elementwise_bandwidth)


def test_the_heads_modulation_runs_for_all_passes_at_once_and_its_products_once_a_pass():
    layer = workload.Layer(weights=1000, outputs=10, bytes=4000, precision=FP32)
    none = replace(bar_b(FP32), trunk=(), head_modulation=(), head_pass=())
    modulation, passes = (
        BatchCost(replace(none, **{part: (layer,)}), CPU, 1).token(0) for part in ("head_modulation", "head_pass")
    )
    assert modulation.memory == pytest.approx(4000 / CPU.read_bandwidth)
    assert passes.memory == pytest.approx(4 * 4000 / CPU.read_bandwidth)
    assert modulation.elementwise == passes.elementwise == pytest.approx(8 * 10 * 8 / CPU.elementwise_bandwidth)


def test_a_token_waits_for_every_phase_and_a_chunk_of_modulation_for_one():
    waiting = replace(FREE, phase_seconds=1.0)
    assert BatchCost(bar_b(), waiting, 1).token(0) == Cost(waiting=5 * 24 + 2 + 4 * (2 * 3 + 1))  # 150, as documented
    chunks = 256 / (MODULATION_BYTES // (6 * 24 * 768 * 4))
    assert BatchCost(bar_b(), waiting, 1).modulation().waiting == pytest.approx(chunks)


def test_the_prefix_runs_every_class_once_in_groups_of_four():
    """All its positions but the last, and the head that is drawn with it."""
    trunk, modulation, head = (workload.Layer(weights, 10, 4, FP32) for weights in (1000, 100, 7))
    work = replace(bar_b(FP32), trunk=(trunk,), modulation=(modulation,), head_modulation=(), head_pass=(head,))
    counting = replace(FREE, rates={FP32: 1.0}, rate_fraction=1.0)
    for batch, guidance, classes, groups in ((1, 5.0, 2, 1), (3, 5.0, 4, 1), (4, 5.0, 5, 2), (4, 1.0, 4, 1)):
        asked = replace(work, recipe=replace(work.recipe, guidance=guidance))
        multiplied = classes * 32 * (trunk.weights + modulation.weights) + classes * head.weights
        assert BatchCost(asked, counting, batch).prefix().arithmetic == pytest.approx(multiplied)
        waiting = replace(FREE, phase_seconds=1.0)
        assert BatchCost(asked, waiting, batch).prefix() == Cost(waiting=5 * 24 * groups)


@pytest.mark.parametrize(("kept", "classes"), [(True, 2), (False, 3)])
def test_modulation_is_read_once_a_chunk_and_computed_once_a_position(monkeypatch, kept, classes):
    """Of every class that is drawn; the unconditional one is kept, if its table is not too large."""
    if not kept:
        monkeypatch.setattr(planning, "UNCONDITIONAL_BYTES", 2**20)
    layer = workload.Layer(weights=1000, outputs=10, bytes=4000, precision=FP32)
    work = replace(bar_b(FP32), modulation=(layer,))
    chunks = 256 / (MODULATION_BYTES // (6 * 24 * 768 * 4 * classes))
    reading = replace(FREE, bandwidth=1.0, bandwidth_fraction=1.0)
    assert BatchCost(work, reading, 2).modulation().memory == pytest.approx(4000 * chunks)
    counting = replace(FREE, rates={FP32: 1.0}, rate_fraction=1.0)
    assert BatchCost(work, counting, 2).modulation().arithmetic == pytest.approx(1000 * 256 * classes)


def test_the_first_token_is_the_prefix_a_chunk_of_modulation_and_a_token_behind_the_prefix():
    work = workload.of_variant(VARIANTS["bar_b_patch4"], INT8)  # its 16 tokens are one chunk
    run_of_one = BatchCost(work, CPU, 1)
    parts = (run_of_one.prefix(), run_of_one.modulation(), run_of_one.token(33))
    assert run_of_one.first_token().seconds == pytest.approx(sum(part.seconds for part in parts))


def test_decoding_multiplies_every_position_with_every_position_twice():
    """Scores, and what they weigh: in all layers of the decoder."""
    layer = workload.Layer(weights=1000, outputs=10, bytes=4, precision=FP32)
    counting = replace(FREE, rates={FP32: 1.0}, rate_fraction=1.0)
    decode = BatchCost(replace(bar_b(FP32), decoder=(layer,)), counting, 3).decode()
    assert decode.arithmetic == pytest.approx(3 * 257 * (1000 + 24 * 2 * 257 * 1024))


def test_the_cache_is_read_up_to_where_it_is_filled():
    run_of_two = BatchCost(bar_b(), CPU, 2)
    more = run_of_two.token(200).memory - run_of_two.token(100).memory
    assert more == pytest.approx(100 * 4 * 2 * 24 * 768 * 4 / CPU.read_bandwidth)  # 4 rows, K and V, 24 layers


def test_an_image_is_its_parts():
    run_of_one = BatchCost(bar_b(), CPU, 1)
    parts = (run_of_one.prefix(), run_of_one.modulation(), run_of_one.average_token() * 256, run_of_one.decode())
    assert run_of_one.images().seconds == pytest.approx(sum(part.seconds for part in parts))
    assert predict(bar_b(), CPU, 1).image_seconds == pytest.approx(run_of_one.images().seconds)


def test_what_is_told_of_an_image_is_a_share_of_its_batch():
    plan, whole = predict(bar_b(), CPU, 8), BatchCost(bar_b(), CPU, 8)
    assert 8 * plan.image_seconds == pytest.approx(whole.images().seconds)
    assert plan.to_dict()["images_per_second"] == pytest.approx(8 / whole.images().seconds)
    assert plan.token.seconds == whole.average_token().seconds and plan.decode_seconds == whole.decode().seconds
    reading = replace(CPU, bandwidth_fraction=1.0, rates=FREE.rates, elementwise_bandwidth=math.inf, phase_seconds=0.0)
    assert 8 * plan.reading_seconds == pytest.approx(BatchCost(bar_b(), reading, 8).images().seconds)


def test_reading_is_what_an_image_takes_where_nothing_else_takes_time():
    work, h200 = bar_b(INT8_WEIGHT), DEVICES["h200"]
    plan = predict(work, h200, 1)
    cache = 2 * (33 + 256 // 2) * 2 * 24 * 768 * 2  # 2 rows, half of the image, K and V in float16
    assert plan.token_bytes == pytest.approx(work.bytes_per_token + cache, abs=1)
    once = (plan.reading_seconds * h200.bandwidth - 256 * plan.token_bytes) / 1e6
    assert 0 < once < 3 * work.stored_bytes / 1e6  # prefix, modulation in a few chunks, decoder
    assert plan.reading_seconds < plan.image_seconds * h200.bandwidth_fraction
    assert predict(work, replace(h200, bandwidth_fraction=0.1), 1).reading_seconds == plan.reading_seconds


def test_costs_add_up_by_kind():
    assert (Cost(1, 2, 3, 4) + Cost(1, 1, 1, 1)) * 2 == Cost(4, 6, 8, 10)
    assert Cost(1, 2, 3, 4).seconds == 10 and Cost(1, 2, 4, 3).limit == "elementwise"


def test_without_guidance_half_the_rows_run():
    recipe = replace(VARIANTS["bar_b"].recipe, guidance=1.0)
    plain = replace(bar_b(), recipe=recipe)
    assert BatchCost(plain, CPU, 2).token(99).seconds == pytest.approx(BatchCost(bar_b(), CPU, 1).token(99).seconds)


def test_the_largest_batch_fits_and_the_next_does_not():
    work, device = bar_b(), DEVICES["orin-nano"]
    limit, best = device.memory_bytes * USABLE_MEMORY, largest_batch(work, device)
    assert memory_bytes(work, device, best) <= limit < memory_bytes(work, device, best + 1)
    assert predict(work, device, best).fits and not predict(work, device, best + 1).fits
    assert largest_batch(work, replace(device, memory_bytes=2**29)) == 0


@pytest.mark.parametrize("batch", [1, 3, 20])
def test_memory_is_all_that_is_held_at_once(batch):
    work, device = bar_b(FP32), replace(CPU, fixed_bytes=10**9)
    one = 6 * 24 * 768 * 4  # modulation of a class at a position
    cache = (2 * batch + min(batch + 1, PREFIX_ROWS)) * 289 * 2 * 24 * 768 * 4  # rows drawn, and those of a prefix
    chunk = MODULATION_BYTES // (one * batch)
    tables = 3 * max((batch + 1) * 32, chunk * batch) * one + min(batch + 1, PREFIX_ROWS) * 32 * one
    held = 10**9 + work.stored_bytes + 288 * one  # the unconditional table
    decoding = min(batch, DECODE_IMAGES) * 4 * (257 * 8 * 1024 + 16 * 257**2)
    assert memory_bytes(work, device, batch) == held + cache + tables + decoding


# -- devices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", GPUS, ids=lambda device: device.name)
def test_every_projection_says_so_and_names_its_sources(device: Device):
    assert set(device.rates) == set(PRECISIONS)
    assert {word for key in device.sources for word in key.split(", ")} >= {"memory", "bandwidth", "rates", "achieved"}
    assert "not measured on any GPU" in device.sources["achieved"]
    assert PROJECTION in run("bar_b", "--device", device.name).stdout


def test_plans_order_devices_and_precisions_as_their_bandwidth_does():
    seconds = {d.name: predict(bar_b(), d, 1).image_seconds for d in GPUS}
    assert sorted(seconds, key=seconds.__getitem__) == sorted(seconds, key=lambda name: -DEVICES[name].bandwidth)
    for device in GPUS:
        times = [predict(bar_b(p), device, 1).token.seconds for p in (FP32, FP16, INT8, INT4_WEIGHT)]
        assert times == sorted(times, reverse=True)


def test_a_device_without_a_precision_refuses_it():
    with pytest.raises(RequestError, match="epyc-2core runs fp32, int8, int8-weight, int4-weight, not fp16"):
        predict(bar_b(FP16), CPU, 1)


def test_devices_are_found_by_name_and_by_the_machine_of_a_result():
    machine = json.loads((RESULTS / "cpu_bench_bar_b.json").read_text())["machine"]
    assert device_of(machine) is CPU is find_device("epyc-2core")
    assert device_of({**machine, "cores": 64}) is None
    with pytest.raises(RequestError, match="unknown device 'tpu'; choose one of orin, "):
        find_device("tpu")


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def result(tmp_path):
    """A folder with one result, changed by what a test asks for."""
    report = json.loads((RESULTS / "cpu_bench_bar_b.json").read_text())

    def write(change=lambda report: None) -> Path:
        change(report)
        (tmp_path / "one.json").write_text(json.dumps(report))
        return tmp_path

    return write


def test_errors_are_relative_to_the_median(result):
    def twice(report):
        for entry in report["contenders"]:
            if entry["kind"] == "bundle":
                entry["batches"][0]["token"]["p50"] = 2 * predict(bar_b(entry["precision"]), CPU, 1).token.seconds

    found = [one for one in deviations(result(twice), VARIANTS["bar_b"], CPU) if one.stage == "token"]
    assert [one.error for one in found] == pytest.approx([-0.5] * 3)


def test_contenders_that_failed_and_files_of_other_kinds_are_passed_over(result):
    def fail(report):
        next(entry for entry in report["contenders"] if entry["precision"] == INT8 and entry["kind"] == "bundle").pop(
            "batches"
        )

    folder = result(fail)
    (folder / "other.json").write_text("[1, 2]")
    machine = {"cpu": "AMD EPYC", "cores": 2}
    (folder / "quality.json").write_text(json.dumps({"machine": machine, "fp32": {}}))
    (folder / "compiling.json").write_text(json.dumps({"machine": machine, "runs": [{"seconds": 3.0}]}))
    assert {one.precision for one in deviations(folder, VARIANTS["bar_b"], CPU)} == {FP32, INT4_WEIGHT}


def test_runs_of_scaling_count_on_all_cores(tmp_path):
    report = json.loads((RESULTS / "cpu_scaling_threads.json").read_text())
    (tmp_path / "scaling.json").write_text(json.dumps(report))
    assert {run["threads"] for run in report["runs"]} == {1}
    with pytest.raises(RequestError, match="no latency result of bar_b on epyc-2core"):
        deviations(tmp_path, VARIANTS["bar_b"], CPU)
    report["runs"][0]["threads"] = 2
    (tmp_path / "scaling.json").write_text(json.dumps(report))
    token, image, memory = deviations(tmp_path, VARIANTS["bar_b"], CPU)
    assert (token.samples, image.samples, memory.samples) == (255, 1, 1)
    assert image.predicted == predict(bar_b(token.precision), CPU, 1).image_seconds


def test_results_of_another_machine_or_variant_do_not_count(result):
    with pytest.raises(RequestError, match="no latency result of bar_l on epyc-2core"):
        deviations(result(), VARIANTS["bar_l"], CPU)
    with pytest.raises(RequestError, match="no latency result of bar_b on orin"):
        deviations(RESULTS, VARIANTS["bar_b"], DEVICES["orin"])
    with pytest.raises(RequestError, match="no latency result of bar_b on epyc-2core"):
        deviations(result(lambda report: report["machine"].update(cores=4)), VARIANTS["bar_b"], CPU)


def test_a_folder_that_is_not_there_and_a_damaged_result_are_named(tmp_path):
    with pytest.raises(RequestError, match="no such folder"):
        deviations(tmp_path / "none", VARIANTS["bar_b"], CPU)
    (tmp_path / "half.json").write_text('{"date": ')
    with pytest.raises(RequestError, match=r"half\.json: is not JSON"):
        deviations(tmp_path, VARIANTS["bar_b"], CPU)


@pytest.mark.parametrize(
    "left",
    [
        {"machine": "AMD EPYC"},
        {"settings": "bar_b"},
        {"settings": {"variant": "bar_b"}},
        {"settings": {"variant": "bar_b"}, "contenders": [{"kind": "bundle", "batches": [{"token": 3}]}]},
        {"runs": {"bar_b": 3}},
        {"runs": [{"variant": "bar_b", "threads": 2}]},
    ],
    ids=str,
)
def test_a_result_of_which_parts_are_missing_is_named(tmp_path, left):
    machine = {"cpu": "AMD EPYC", "cores": 2}
    (tmp_path / "part.json").write_text(json.dumps({"machine": machine, **left}))
    with pytest.raises(RequestError, match=r"part\.json: not a whole result file \(.*\); measure again"):
        deviations(tmp_path, VARIANTS["bar_b"], CPU)


# -- the command -------------------------------------------------------------------------------------------------------


def test_plan_prints_every_precision_and_batch():
    printed = run("bar_l", "--device", "orin", "--batch", 1, "--batch", 4).stdout
    assert "bar_l on Jetson AGX Orin 64 GB" in printed and "Technical Brief, 2022" in printed
    for precision in PRECISIONS:
        assert sum(line.split()[:1] == [precision] for line in printed.splitlines()) == 2
    assert "fp16" not in run("bar_l", "--device", "epyc-2core").stdout


def test_plan_says_what_does_not_fit():
    assert "does not fit" in run("bar_b", "--device", "orin-nano", "--batch", 500).stdout


def test_plan_prints_json():
    facts = json.loads(run("bar_b", "--device", "epyc-2core", "--batch", 1, "--against", RESULTS, "--json").stdout)
    assert facts["device"]["measured"] is True and len(facts["plans"]) == 4
    expected = predict(bar_b(), CPU, 1)
    plan = next(plan for plan in facts["plans"] if plan["precision"] == INT8)
    assert plan["token_seconds"] == expected.token.seconds and plan["memory_bytes"] == expected.memory_bytes
    assert plan["largest_batch"] == largest_batch(bar_b(), CPU)
    assert len(facts["deviations"]) == len(deviations(RESULTS, VARIANTS["bar_b"], CPU))


def test_plan_counts_its_errors(found):
    printed = run("bar_b", "--device", "epyc-2core", "--against", RESULTS).stdout
    errors = [abs(one.error) for one in found["bar_b"]]
    assert max(errors) > TARGET
    assert f"{sum(error <= TARGET for error in errors)} of {len(errors)} measured figures within 25%" in printed


def test_plan_reads_a_bundle(small):
    facts = json.loads(run(small.bundle.path, "--device", "thor", "--json").stdout)
    assert [(plan["precision"], plan["batch"]) for plan in facts["plans"]] == [(FP32, 1), (FP32, 8)]
    stored = weights.read_places(small.bundle.path / weights.FILE_NAME)
    assert facts["plans"][0]["memory_bytes"] > sum(place.length for place in stored.values())
    with pytest.raises(RequestError, match="--against compares published variants"):
        run(small.bundle.path, "--device", "thor", "--against", RESULTS)


def test_plan_refuses_what_is_neither_variant_nor_bundle(tmp_path):
    with pytest.raises(RequestError, match="neither a bundle folder nor a published variant"):
        run(tmp_path / "none", "--device", "orin")
