"""TensorRT's own parser accepts the canonical graphs (no GPU is needed to parse)."""

import pytest

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed: pip install tensorrt-rtx-cu13")

CANONICAL = ("modulation", "prefix", "trunk_step", "mask_ratio", "head_modulation", "head_pass", "decode")


def parse_errors(path):
    logger = trt.Logger(trt.Logger.ERROR)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = trt.Builder(logger).create_network(0 if flag is None else 1 << int(flag))
    parser = trt.OnnxParser(network, logger)
    parser.parse_from_file(str(path))
    return [str(parser.get_error(i)) for i in range(parser.num_errors)]


@pytest.mark.parametrize("graph", CANONICAL)
def test_fp32_graphs_are_accepted(digits, graph):
    assert parse_errors(digits.bundle.graph(graph)) == []


@pytest.fixture(scope="module")
def int8(digits, tmp_path_factory):
    from bar_edge.calibration.quantizer import quantize_bundle
    from bar_edge.calibration.trajectories import collect, make_plan

    plan = make_plan(digits.bundle.spec, images=4, seed=5, batch_size=4)
    output = tmp_path_factory.mktemp("parser") / "int8"
    return quantize_bundle(digits.bundle, collect(digits.bundle, plan), output, precision="int8", measure=False)


@pytest.mark.parametrize("graph", CANONICAL)
def test_int8_graphs_are_accepted(int8, graph):
    assert parse_errors(int8.graph(graph)) == []
