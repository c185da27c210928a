"""A whole bench on a small model: who is timed, who is not, and what the report holds."""

import json
from dataclasses import replace

import pytest

from bar_edge.benchmarks import bench, measure
from bar_edge.benchmarks.plan import Baseline, Plan
from bar_edge.runtime import engines
from bar_edge.runtime.errors import RequestError

PYTORCH, EXACT, INT8, WRONG = (
    "PyTorch fp32", "bundle, onnxruntime", "bundle-int8, onnxruntime", "other-weights, onnxruntime",
)  # fmt: skip


@pytest.fixture
def report(measured):
    return measured[0]


@pytest.fixture
def entry(report):
    return lambda name: next(entry for entry in report["contenders"] if entry["name"] == name)


def test_exact_contenders_draw_the_same_bits(entry):
    assert entry(PYTORCH)["proofs"][0]["sentence"] == "the reference"
    for proof in entry(EXACT)["proofs"]:
        assert proof["passed"] and proof["differing_bits"] == 0


def test_a_quantized_contender_comes_with_its_quality(entry):
    for proof in entry(INT8)["proofs"]:
        assert proof["passed"] and 0 <= proof["judged_differing_bits"] < 0.25


def test_a_contender_that_draws_something_else_is_shown_failing_and_not_timed(entry):
    wrong = entry(WRONG)
    assert wrong["state"] == "failed" and "batches" not in wrong
    assert "not what the reference draws" in wrong["reason"]


@pytest.mark.parametrize("name", [PYTORCH, EXACT, INT8])
def test_figures_are_of_counted_whole_images_at_every_batch_size(entry, name):
    assert [batch["batch_size"] for batch in entry(name)["batches"]] == [1, 2]
    for batch in entry(name)["batches"]:
        image = batch["image"]
        assert image["count"] == len(image["samples"]) == 6 and "p99" not in image
        assert 0 < image["min"] <= image["p50"] <= image["p90"] <= image["max"]
        assert batch["images_per_second"] == pytest.approx(1 / image["p50"])
        assert batch["token"]["p50"] < batch["first_token"]["p50"] < batch["batch_size"] * image["p50"]
        assert "samples" not in batch["token"]
        assert batch["bytes_per_token"] > 0 and 0 < batch["fraction_of_bandwidth"] < 1
        assert batch["peak_rss_bytes"] > 2**20
        assert batch["stages"]["seconds"]["trunk"] > 0
        assert set(batch["work"]) == {"trunk", "head", "decode"}
    assert [len(proof["warmup_image_seconds"]) for proof in entry(name)["proofs"]] == [2, 2]


def test_the_report_says_what_it_was_taken_on_and_is_json(report):
    assert report["format"] == bench.FORMAT and report["format_version"] == bench.FORMAT_VERSION
    assert report["command"] == "bar-edge bench <the command>"
    assert report["settings"]["batch_sizes"] == [1, 2] and report["settings"]["threads"] == 1
    assert report["power"].keys() == {"before", "after", "energy_sources", "without_energy"}
    assert report["machine_best"]["bytes_per_second"]["count"] == 12  # once in every round of both batch sizes
    assert report["engines"]["onnxruntime"]["usable"]
    assert json.loads(json.dumps(report)) == report


def test_images_of_all_are_kept_to_be_looked_at(measured, small):
    size = small.spec.image_size
    assert {name: len(images) for name, images in measured[1].items()} == {PYTORCH: 2, EXACT: 2, INT8: 2, WRONG: 1}
    assert measured[1][EXACT][0].shape == (size, size, 3)


@pytest.fixture
def plan(small):
    """A plan, for variations."""
    options = {"rounds": 1, "warmup": 1, "threads": 1, "seed": 0, "command": ""}
    return Plan.of([small.bundle], baseline=None, engines=(), batch_sizes=(1,), **options)


def test_without_pytorch_an_exact_bundle_proves_itself_by_its_record(plan):
    report, _ = bench.run(plan, lambda what, done, total: None)
    (entry,) = report["contenders"]
    assert entry["state"] == "timed" and entry["proofs"][0]["sentence"] == "the reference"


def test_without_pytorch_a_bundle_that_fails_its_record_is_not_timed(plan, other_weights):
    report, _ = bench.run(replace(plan, bundles=(other_weights,)), lambda what, done, total: None)
    (entry,) = report["contenders"]
    assert entry["state"] == "failed" and "recorded image" in entry["reason"]
    assert "batches" not in entry


def test_an_engine_that_cannot_run_here_is_unavailable_with_its_reason(plan, monkeypatch):
    monkeypatch.setattr(engines, "status", lambda name: engines.Status(name, False, "no such device"))
    (entrant,) = plan.entrants()
    assert "onnxruntime: no such device" in entrant.unavailable
    report, _ = bench.run(plan, lambda what, done, total: None)
    (entry,) = report["contenders"]
    assert (entry["state"], entry["reason"]) == ("unavailable", entrant.unavailable)


def test_what_a_bundle_was_made_for_is_told_before_the_state_of_a_driver(plan, monkeypatch):
    monkeypatch.setattr(engines, "status", lambda name: engines.Status(name, False, "no driver"))
    (entrant,) = replace(plan, engines=("cuda",)).entrants()
    assert "was made for onnxruntime, not for cuda" in entrant.unavailable and "driver" not in entrant.unavailable


def test_ctrl_c_while_contenders_load_ends_them(plan, monkeypatch):
    started = []

    def interrupted(self, question):
        started.append(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure.Worker, "_ask", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.run(plan, lambda what, done, total: None)
    assert len(started) == 1 and not started[0]._process.is_alive()


def test_a_compiled_bundle_is_not_held_to_exact_bits_unless_it_computes_in_fp32(plan, small):
    compiled = {precision: {"tensorrt": {"precision": precision}} for precision in ("fp16", "fp32")}
    for precision, facts in compiled.items():
        bundle = replace(small.bundle, manifest={**small.bundle.manifest, "engines": facts})
        entrants = list(replace(plan, bundles=(small.bundle, replace(bundle, path=small.bundle.path / "c"))).entrants())
        assert [entrant.precision for entrant in entrants] == ["fp32", precision]
        assert entrants[1].contender.name == "c, tensorrt"


def test_a_checkpoint_of_another_model_is_refused(plan, patch1):
    baseline = Baseline(patch1.generator, patch1.tokenizer, patch1.config, ("fp32",))
    with pytest.raises(RequestError, match="shapes differ"):
        bench.run(replace(plan, baseline=baseline), lambda what, done, total: None)


def test_plans_that_prove_nothing_or_mix_models_are_refused(plan, small, patch1):
    baseline = Baseline(small.generator, small.tokenizer, small.config, ("bf16",))
    quantized = small.quantized("int8")
    for changes, message in (
        ({"bundles": (small.bundle, patch1.bundle)}, "different models"),
        ({"bundles": (small.bundle, small.bundle)}, "two bundles are called 'bundle'"),
        ({"bundles": (quantized,)}, "nothing here draws in fp32"),
        ({"engines": ("abacus",)}, "unknown engine 'abacus'"),
        ({"baseline": baseline}, "takes part in fp32 too"),
        ({"baseline": replace(baseline, forms=("fp8",))}, "unknown form of the baseline 'fp8'"),
    ):
        with pytest.raises(RequestError, match=message):
            replace(plan, **changes)
