"""What a report says in words."""

import copy

import pytest

from bar_edge.benchmarks import verdicts

STAGES = {"prefix": 1.0, "trunk": 4.0, "head": 3.9, "sampling": 1.0, "decode": 0.9, "host": 0.1}


def contender(name, kind, precision, seconds, stages=STAGES, graphs=None, overhead=1.0):
    batch = {"batch_size": 1, "image": {"p50": seconds}, "stages": {"seconds": dict(stages), "overhead": overhead}}
    facts = {"name": name, "kind": kind, "precision": precision, "graphs": graphs or {}, "state": "timed"}
    return {**facts, "batches": [batch]}


@pytest.fixture
def report():
    graphs = {"modulation": "int8 x24", "trunk_step": "int8 x97", "head_pass": "int8 x6, fp32 x1", "decode": "fp32"}
    quantized = dict.fromkeys(STAGES, 1.0) | {"trunk": 5.0}
    return {
        "contenders": [
            contender("PyTorch fp32", "pytorch", "fp32", 20.0),
            contender("b, onnxruntime", "bundle", "fp32", 10.0),
            contender("b-int8, onnxruntime", "bundle", "int8", 5.0, quantized, graphs),
        ]
    }


MANIFESTS = {"b-int8": {"quantization": {"timings": ["decode: 0.93 x fp32 (…), not faster enough, kept fp32"]}}}


def sentences(report, name):
    return [v["sentence"] for v in verdicts.of_report(report, MANIFESTS) if v["contender"] == name]


def test_every_bundle_is_held_against_every_baseline(report):
    assert sentences(report, "b, onnxruntime") == ["2.0 × PyTorch fp32"]
    assert sentences(report, "b-int8, onnxruntime")[0] == "4.0 × PyTorch fp32"


def test_every_graph_of_a_quantized_bundle_has_a_verdict(report):
    found = sentences(report, "b-int8, onnxruntime")[1:]
    assert found == [
        "prefix and modulation int8 1.0 × fp32",
        "trunk int8 0.8 × fp32 (slower: keep it fp32)",
        "head int8 3.9 × fp32",
        "decoder kept fp32 (when it was quantized, decode: 0.93 x fp32 (…), not faster enough, kept fp32)",
    ]


def test_a_graph_is_held_against_its_fp32_on_the_same_engine_at_the_same_batch_size(report):
    other = copy.deepcopy(report)
    slow = {stage: 100 * seconds for stage, seconds in STAGES.items()}
    for name in ("b, onnxruntime", "b, tensorrt"):
        elsewhere = contender(name, "bundle", "fp32", 10.0, slow)["batches"][0]
        if name.endswith("onnxruntime"):
            other["contenders"][1]["batches"].insert(0, {**elsewhere, "batch_size": 8})
        else:
            other["contenders"].insert(1, {**contender(name, "bundle", "fp32", 10.0), "batches": [elsewhere]})
    assert sentences(other, "b-int8, onnxruntime") == sentences(report, "b-int8, onnxruntime")


def test_a_split_that_shows_the_profiler_gives_no_verdict_on_graphs(report):
    slowed = copy.deepcopy(report)
    slowed["contenders"][1]["batches"][0]["stages"]["overhead"] = 4.0
    assert not any("int8" in text for text in sentences(slowed, "b-int8, onnxruntime"))


def test_what_was_not_timed_is_compared_with_nothing(report):
    failed = copy.deepcopy(report)
    failed["contenders"][0] |= {"state": "failed"}
    assert sentences(failed, "b, onnxruntime") == []
