"""No tensor of a graph can point out of the bundle unnoticed, wherever in the graph it is."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bar_edge.runtime.onnx_locations import external_locations, graph_name


def external(name: str, location: str) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="offset", value="0")
    tensor.external_data.add(key="location", value=location)
    return tensor


def graph_with(initializers=(), nodes=(), name="g") -> onnx.GraphProto:
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    return helper.make_graph(list(nodes), name, [], [output], list(initializers))


def model_with(graph: onnx.GraphProto | None = None, **more) -> onnx.ModelProto:
    return helper.make_model(graph or graph_with(), opset_imports=[helper.make_opsetid("", 20)], **more)


def constant(attribute: str, value) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["y"], **{attribute: value})


def sparse(values: TensorProto | None = None, indices: TensorProto | None = None) -> onnx.SparseTensorProto:
    inside = TensorProto(name="i", data_type=TensorProto.INT64, dims=[4], int64_data=[0, 1, 2, 3])
    return onnx.SparseTensorProto(values=values or TensorProto(), indices=indices or inside, dims=[9])


def in_sparse_initializer(tensor):
    graph = graph_with()
    graph.sparse_initializer.append(sparse(tensor))
    return model_with(graph)


def in_subgraph(tensor):
    then = graph_with([tensor], name="then")
    node = helper.make_node("If", ["c"], ["y"], then_branch=then, else_branch=graph_with(name="else"))
    return model_with(graph_with(nodes=[node]))


def in_subgraphs_list(tensor):
    node = helper.make_node("Custom", [], ["y"], domain="x", graphs=[graph_with(), graph_with([tensor])])
    return model_with(graph_with(nodes=[node]))


def in_function(tensor):
    function = helper.make_function(
        "x", "F", [], ["y"], [constant("value", tensor)], [helper.make_opsetid("", 20)]
    )  # fmt: skip
    return model_with(functions=[function])


def in_function_default(tensor):
    function = helper.make_function(
        "x", "F", [], ["y"], [], [helper.make_opsetid("", 20)],
        attribute_protos=[helper.make_attribute("value", tensor)],
    )  # fmt: skip
    return model_with(functions=[function])


def in_training(field):
    def build(tensor):
        model = model_with()
        getattr(model.training_info.add(), field).CopyFrom(graph_with([tensor]))
        return model

    return build


PLACES = {
    "an initializer": lambda tensor: model_with(graph_with([tensor])),
    "a node's attribute": lambda tensor: model_with(graph_with(nodes=[constant("value", tensor)])),
    "a list of an attribute": lambda tensor: model_with(graph_with(nodes=[constant("tensors", [tensor])])),
    "a sparse initializer": in_sparse_initializer,
    "a sparse attribute": lambda tensor: model_with(graph_with(nodes=[constant("sparse_value", sparse(tensor))])),
    "sparse indices": lambda tensor: model_with(graph_with(nodes=[constant("sparse_value", sparse(None, tensor))])),
    "a list of sparse ones": lambda tensor: model_with(graph_with(nodes=[constant("values", [sparse(tensor)])])),
    "a subgraph": in_subgraph,
    "a list of subgraphs": in_subgraphs_list,
    "a function": in_function,
    "a function's default": in_function_default,
    "training's beginning": in_training("initialization"),
    "training's algorithm": in_training("algorithm"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("location", ["../secret.bin", "/etc/passwd", "weights.safetensors"])
def test_a_location_is_found_wherever_it_is(place, location):
    model = PLACES[place](external("w", location)).SerializeToString()
    assert external_locations(model) == {location}


def test_all_locations_are_found():
    graph = graph_with([external(str(i), f"file{i}") for i in range(3)], [constant("value", external("c", "constant"))])
    assert external_locations(model_with(graph).SerializeToString()) == {"file0", "file1", "file2", "constant"}


def test_a_graph_without_external_data_has_none():
    values = onnx.numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")
    assert external_locations(model_with(graph_with([values])).SerializeToString()) == set()


def test_text_that_only_looks_like_a_location_is_none():
    model = model_with(graph_with(), doc_string="location ../secret.bin")
    assert external_locations(model.SerializeToString()) == set()


def test_the_graphs_of_a_bundle_point_at_their_weights_only(golden):
    for name in golden.bundle.graphs:
        assert external_locations(golden.bundle.graph(name).read_bytes()) == {"weights.safetensors"}


# -- bytes as an attacker writes them ----------------------------------------------------------------------------------


def varint(number: int) -> bytes:
    result = b""
    while number > 127:
        result += bytes([number & 127 | 128])
        number >>= 7
    return result + bytes([number])


def message(field: int, content: bytes, tag: bytes | None = None) -> bytes:
    return (tag or varint(field << 3 | 2)) + varint(len(content)) + content


ENTRY = message(1, b"location") + message(2, b"../secret.bin")


def handmade(entry: bytes = ENTRY, *, tag: bytes | None = None) -> bytes:
    """Model > graph > initializer > external data, with the last tag as given."""
    return message(7, message(5, message(13, entry, tag)))


def test_handmade_bytes_are_what_onnx_reads():
    (tensor,) = onnx.load_model_from_string(handmade()).graph.initializer
    assert [(entry.key, entry.value) for entry in tensor.external_data] == [("location", "../secret.bin")]
    assert external_locations(handmade()) == {"../secret.bin"}


def test_the_last_of_repeated_fields_counts_as_it_does_for_parsers():
    entry = message(1, b"offset") + message(2, b"weights.safetensors") + ENTRY
    assert external_locations(handmade(entry)) == {"../secret.bin"}


def test_parts_of_a_message_that_comes_twice_are_all_looked_at():
    assert external_locations(handmade(b"") + handmade()) == {"../secret.bin"}


def test_a_tag_in_more_bytes_than_it_needs_is_no_hiding_place():
    assert external_locations(handmade(tag=b"\xea\x80\x00")) == {"../secret.bin"}


@pytest.mark.parametrize(
    "tag", [varint((13 << 3 | 2) + 2**32), varint((13 << 3 | 2) + 2**33), b"\x02"], ids=["bit 32", "bit 33", "field 0"]
)
def test_a_tag_that_parsers_read_differently_is_refused(tag):
    """Some parsers cut a tag to 32 bits and see external data here; field 0 does not exist."""
    with pytest.raises(ValueError, match=r".+"):
        external_locations(handmade(tag=tag))


@pytest.mark.parametrize(
    "content",
    [b"\x0b", b"\x0c", b"\x0f\x00", b"\x0a\x05abc", b"\x0a", b"\x80", b"\x80" * 11 + b"\x01", b"\x0d\x00", b"\x09\x00"],
)
def test_malformed_bytes_are_refused(content):
    with pytest.raises(ValueError, match=r"cut short|wire type"):
        external_locations(content)


def test_a_location_that_is_not_text_is_refused():
    with pytest.raises(ValueError, match="utf-8"):
        external_locations(handmade(message(1, b"location") + message(2, b"\xff\xfe")))


def test_graphs_nested_deeper_than_any_parser_goes_are_refused():
    graph = message(5, message(13, ENTRY))
    for _ in range(200):
        graph = message(1, message(5, message(6, graph)))  # node > attribute > graph
    with pytest.raises(ValueError, match="nested too deeply"):
        external_locations(message(7, graph))


def test_every_cut_of_a_graph_is_refused_or_read_but_never_a_crash(patch1):
    model = patch1.bundle.graph("mask_ratio").read_bytes()
    for end in range(len(model)):
        try:
            assert external_locations(model[:end]) <= {"weights.safetensors"}
        except ValueError:
            continue


def test_flipped_bytes_are_refused_or_read_but_never_a_crash(patch1):
    model, rng = patch1.bundle.graph("mask_ratio").read_bytes(), np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(model)
        damaged[rng.integers(len(model))] = rng.integers(256)
        try:
            external_locations(bytes(damaged))
        except ValueError:
            continue


def test_the_graph_tells_its_name():
    assert graph_name(model_with(graph_with(name="decode")).SerializeToString()) == "decode"
    assert graph_name(onnx.ModelProto(producer_name="nobody").SerializeToString()) == ""
    with pytest.raises(ValueError, match="cut short"):
        graph_name(model_with().SerializeToString()[:-1])
