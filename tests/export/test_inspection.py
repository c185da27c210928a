"""What `inspect` says of checkpoints and ONNX files."""

import json

import pytest
import torch

from bar_edge.export.checkpoint import generator_shapes
from bar_edge.export.inspection import describe_file
from bar_edge.runtime.errors import CheckpointError
from bar_edge.runtime.spec import VARIANTS


def test_a_generator_is_described(patch1):
    facts = describe_file(patch1.generator)
    assert facts["kind"] == "generator checkpoint"
    assert facts["variant"] is None
    assert facts["tensors"] == len(patch1.checkpoint.generator) == sum(facts["dtypes"].values())
    assert facts["file_bytes"] == patch1.generator.stat().st_size
    assert facts["shapes"]["blocks.0.attn.qkv.weight"] == [192, 64]
    json.dumps(facts)


def test_rotary_tables_do_not_count_as_parameters(patch1):
    parameters = {name: t for name, t in patch1.checkpoint.generator.items() if ".rope.freqs_" not in name}
    assert describe_file(patch1.generator)["parameters"] == sum(t.numel() for t in parameters.values())


def test_stored_dtypes_are_told(digits):
    assert set(describe_file(digits.generator)["dtypes"]) == {"float16"}


def test_a_tokenizer_with_wrapper_prefixes_is_described(data):
    facts = describe_file(data / "golden" / "decoder_10bit_clip" / "tokenizer.bin")
    assert facts["kind"] == "tokenizer checkpoint"
    assert facts["shapes"]["quantize.out_proj.weight"] == [64, 10]


@pytest.mark.parametrize("name", VARIANTS)
def test_published_variants_are_recognised_without_their_tokenizer(tmp_path, name):
    path = tmp_path / "generator.bin"
    shapes = generator_shapes(VARIANTS[name].spec)
    torch.save({f"module.{key}": torch.zeros(1).expand(shape) for key, shape in shapes.items()}, path)
    facts = describe_file(path)
    assert facts["variant"] == name
    assert facts["parameters"] == VARIANTS[name].parameters


def test_an_unrelated_checkpoint_is_refused(tmp_path):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.bin")
    with pytest.raises(CheckpointError, match="neither a BAR generator nor a BAR tokenizer"):
        describe_file(tmp_path / "other.bin")


def test_a_graph_is_described_without_reading_its_weights(tmp_path, patch1):
    path = tmp_path / "trunk_step.onnx"
    path.write_bytes(patch1.bundle.graph("trunk_step").read_bytes())  # the weights stay behind
    facts = describe_file(path)
    assert (facts["kind"], facts["name"]) == ("ONNX graph", "trunk_step")
    assert facts["opsets"] == {"ai.onnx": 24}
    assert facts["inputs"]["symbols"] == "int64 [rows, T]"
    assert facts["outputs"]["latent"] == "float [rows, 48]"
    assert facts["operators"]["TensorScatter"] == 2 * patch1.spec.num_layers
    assert facts["external_data"] == ["weights.safetensors"]
    json.dumps(facts)


@pytest.mark.parametrize("content", [b"not a graph at all", b"\x0b\xff", b"\n\xff"], ids=["text", "group", "cut"])
def test_a_broken_graph_is_refused_in_one_line(tmp_path, content):
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.onnx: not a readable ONNX graph") as caught:
        describe_file(path)
    assert "\n" not in str(caught.value)


def test_the_weights_of_a_bundle_are_not_taken_for_a_checkpoint(patch1):
    with pytest.raises(CheckpointError, match="holds the weights of a bundle; inspect its folder"):
        describe_file(patch1.bundle.path / "weights.safetensors")
