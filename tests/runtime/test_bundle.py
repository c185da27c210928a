"""The bundle: nothing that differs from its manifest gets past `open`, and nothing half-written gets its name."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from bar_edge.export.prepack import prepack_bundle
from bar_edge.runtime import bundle as bundle_module
from bar_edge.runtime import engines
from bar_edge.runtime.bundle import MANIFEST, SELFTEST, Bundle, check_output, publish, write_manifest
from bar_edge.runtime.errors import BundleError, CompatibilityError
from bar_edge.runtime.generator import Generator
from bar_edge.runtime.manifest import COMPILED_FOR


@pytest.fixture(autouse=True)
def parsed(monkeypatch, patch1):
    """What was handed to ONNX Runtime: refusals must come before."""
    assert patch1.bundle  # its export does need that library
    seen = []
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *args, **kwargs: seen.append(args))
    return seen


def refused(folder: Path, parsed: list, kind: type[Exception] = BundleError) -> str:
    """The one sentence a damaged bundle is refused with, by `Bundle.open` and by `Generator` alike."""
    with pytest.raises(kind) as opened:
        Bundle.open(folder)
    with pytest.raises(kind) as started:
        Generator(folder)
    assert str(started.value) == str(opened.value)
    assert "\n" not in str(opened.value)
    assert parsed == []
    return str(opened.value)


# -- opening -----------------------------------------------------------------------------------------------------------


def test_a_fresh_bundle_opens(patch1):
    bundle = Bundle.open(patch1.bundle.path)
    assert (bundle.spec, bundle.recipe, bundle.variant) == (patch1.spec, patch1.checkpoint.recipe, None)
    assert bundle.graph("decode").is_file()
    assert bundle.file_bytes("decode.onnx") == (bundle.path / "decode.onnx").stat().st_size


def test_a_moved_bundle_opens_with_the_same_digest(patch1, bundle_copy):
    moved = bundle_copy.rename(bundle_copy.with_name("else where"))
    assert Bundle.open(str(moved)).digest == patch1.bundle.digest


def test_the_digest_changes_with_the_content(patch1, bundle_copy, reseal):
    (bundle_copy / "selftest.npz").write_bytes(b"other")
    reseal(bundle_copy)
    assert Bundle.open(bundle_copy).digest != patch1.bundle.digest


def test_the_digest_does_not_depend_on_the_order_of_the_manifest(patch1, bundle_copy, edit_manifest):
    edit_manifest(bundle_copy, lambda m: m.update(files=dict(reversed(m["files"].items()))))
    assert Bundle.open(bundle_copy).digest == patch1.bundle.digest


def test_progress_reaches_the_whole_size(patch1):
    told = []
    Bundle.open(patch1.bundle.path, lambda *args: told.append(args))
    total = sum(file.stat().st_size for file in patch1.bundle.path.iterdir() if file.name != MANIFEST)
    assert told[-1] == ("verifying", total, total)


def test_a_graph_that_is_not_there_is_a_compatibility_error(patch1):
    with pytest.raises(CompatibilityError, match=r"has no graph 'tensorrt'.*export it again"):
        Bundle.open(patch1.bundle.path).graph("tensorrt")


# -- tampering ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["weights.safetensors", "decode.onnx", "selftest.npz"])
def test_one_changed_byte_is_refused(bundle_copy, parsed, name):
    content = bytearray((bundle_copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle_copy / name).write_bytes(content)
    assert f"{name}: its content was changed" in refused(bundle_copy, parsed)


@pytest.mark.parametrize("name", ["weights.safetensors", "decode.onnx"])
def test_a_truncated_file_is_refused_with_both_sizes(bundle_copy, parsed, name):
    content = (bundle_copy / name).read_bytes()
    (bundle_copy / name).write_bytes(content[:-10])
    message = refused(bundle_copy, parsed)
    assert f"{name}: truncated, {len(content) - 10} bytes where the manifest says {len(content)}" in message


def test_a_grown_file_is_refused(bundle_copy, parsed):
    with (bundle_copy / "weights.safetensors").open("ab") as file:
        file.write(b"more")
    assert "weights.safetensors: grown" in refused(bundle_copy, parsed)


def test_a_missing_file_is_refused(bundle_copy, parsed):
    (bundle_copy / "weights.safetensors").unlink()
    assert "missing weights.safetensors" in refused(bundle_copy, parsed)


@pytest.mark.parametrize("name", ["extra.onnx", ".hidden", "folder"])
def test_an_extra_file_is_refused(bundle_copy, parsed, name):
    if name == "folder":
        (bundle_copy / name).mkdir()
    else:
        (bundle_copy / name).write_bytes(b"x")
    assert f"holds {name}, not listed in its manifest" in refused(bundle_copy, parsed)


@pytest.mark.parametrize("name", ["weights.safetensors", "decode.onnx"])
def test_a_link_is_refused_even_to_the_same_content(bundle_copy, parsed, name):
    outside = bundle_copy.with_name("outside")
    (bundle_copy / name).rename(outside)
    (bundle_copy / name).symlink_to(outside)
    assert f"{name}: is a link, and a bundle holds only plain files; copy its folder with" in refused(
        bundle_copy, parsed
    )


def test_a_folder_in_the_place_of_a_file_is_refused(bundle_copy, parsed):
    (bundle_copy / "decode.onnx").unlink()
    (bundle_copy / "decode.onnx").mkdir()
    assert "decode.onnx: not a plain file" in refused(bundle_copy, parsed)


def test_a_pipe_in_the_place_of_a_file_is_refused_and_not_waited_for(bundle_copy, parsed):
    (bundle_copy / "decode.onnx").unlink()
    os.mkfifo(bundle_copy / "decode.onnx")
    assert "decode.onnx: not a plain file" in refused(bundle_copy, parsed)


def test_a_linked_manifest_is_refused(bundle_copy, parsed):
    outside = bundle_copy.with_name("outside.json")
    (bundle_copy / MANIFEST).rename(outside)
    (bundle_copy / MANIFEST).symlink_to(outside)
    assert "manifest.json: is a link, and a bundle holds only plain files" in refused(bundle_copy, parsed)


@pytest.mark.parametrize("name", [MANIFEST, "decode.onnx", "weights.safetensors"])
def test_a_file_that_cannot_be_read_is_refused_by_name(bundle_copy, parsed, monkeypatch, name):
    opened = Path.open

    def forbidden(self, *args, **kwargs):
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return opened(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", forbidden)
    assert refused(bundle_copy, parsed) == f"{bundle_copy / name}: cannot be read (Permission denied)"


@pytest.mark.parametrize("name", ["weights.safetensors", SELFTEST])
def test_a_bundle_without_what_all_have_is_refused(bundle_copy, parsed, reseal, name):
    (bundle_copy / name).unlink()
    reseal(bundle_copy)
    assert f"manifest.json: lists no {name}, which every bundle has" in refused(bundle_copy, parsed)


@pytest.mark.parametrize(
    "name", ["../outside", "/etc/passwd", "sub/file", "..", ".", "", "sub\\file", "decode.onnx\0", "./decode.onnx"]
)
def test_a_path_out_of_the_bundle_is_refused(bundle_copy, parsed, edit_manifest, name):
    (bundle_copy.parent / "outside").write_bytes(b"secret")
    edit_manifest(bundle_copy, lambda m: m["files"].update({name: {"bytes": 6, "sha256": "0" * 64}}))
    assert f"lists {name!r}, a path out of the bundle" in refused(bundle_copy, parsed)


@pytest.mark.parametrize("file", ["../decode.onnx", "/etc/passwd", "absent.onnx", MANIFEST])
def test_a_graph_in_a_file_that_is_not_listed_is_refused(bundle_copy, parsed, edit_manifest, file):
    edit_manifest(bundle_copy, lambda m: m["graphs"]["decode"].update(file=file))
    assert f"graph decode is in {file!r}, which is not listed" in refused(bundle_copy, parsed)


def graph_pointing_at(location: str) -> bytes:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Identity", ["w"], ["y"])], "decode", [], [output], [tensor])
    return helper.make_model(graph).SerializeToString()


@pytest.mark.parametrize(
    "location", ["../outside", "/etc/passwd", "sub/../../outside", "./weights.safetensors", "absent", MANIFEST, ""]
)
def test_a_graph_whose_weights_lie_outside_is_refused(bundle_copy, parsed, reseal, location):
    bundle_copy.with_name("outside").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    (bundle_copy / "decode.onnx").write_bytes(graph_pointing_at(location))
    reseal(bundle_copy)
    message = refused(bundle_copy, parsed)
    assert f"decode.onnx: its external data point to {location!r}, which is not in the bundle" in message


@pytest.mark.parametrize("name", ["decode.bin", "decode.ONNX", "decode.ort", "decode"])
def test_a_graph_cannot_hide_behind_another_suffix(bundle_copy, parsed, reseal, edit_manifest, name):
    (bundle_copy / "decode.onnx").unlink()
    (bundle_copy / name).write_bytes(graph_pointing_at("../outside"))
    reseal(bundle_copy)
    edit_manifest(bundle_copy, lambda m: m["graphs"]["decode"].update(file=name))
    assert name in refused(bundle_copy, parsed)


def test_graphs_that_changed_places_are_refused(bundle_copy, parsed, reseal):
    (bundle_copy / "decode.onnx").rename(bundle_copy / "other")
    (bundle_copy / "prefix.onnx").rename(bundle_copy / "decode.onnx")
    (bundle_copy / "other").rename(bundle_copy / "prefix.onnx")
    reseal(bundle_copy)
    assert "decode.onnx: holds the graph 'prefix', the manifest says decode" in refused(bundle_copy, parsed)


def test_a_graph_that_is_no_protobuf_is_refused(bundle_copy, parsed, reseal):
    (bundle_copy / "decode.onnx").write_bytes(b"\x0f not a graph")
    reseal(bundle_copy)
    assert "decode.onnx: not a well-formed ONNX graph" in refused(bundle_copy, parsed)


@pytest.mark.parametrize("version", [0, 2, "1", None, 99])
def test_another_format_version_is_a_compatibility_error(bundle_copy, parsed, edit_manifest, version):
    edit_manifest(bundle_copy, lambda m: m.update(format_version=version))
    message = refused(bundle_copy, parsed, CompatibilityError)
    assert f"bundle format {version!r}, this version reads 1" in message


@pytest.mark.parametrize("fraction", [0.2, 0.9, 0.999])
def test_a_cut_manifest_is_refused(bundle_copy, parsed, fraction):
    text = (bundle_copy / MANIFEST).read_text().rstrip()
    (bundle_copy / MANIFEST).write_text(text[: int(len(text) * fraction)])
    assert "manifest.json: cut short or not JSON" in refused(bundle_copy, parsed)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe\x00", b"[]", b"{}", b'"bar-edge bundle"', b'{"format": "other"}', b"[" * 200_000],
    ids=["empty", "not UTF-8", "list", "no format", "text", "another format", "deeply nested"],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused(bundle_copy, parsed, content):
    (bundle_copy / MANIFEST).write_bytes(content)
    assert "manifest.json" in refused(bundle_copy, parsed)


def test_a_manifest_too_large_to_be_one_is_refused_unread(bundle_copy, parsed):
    os.truncate(bundle_copy / MANIFEST, 2**34)
    assert "too large to be a manifest" in refused(bundle_copy, parsed)


CHANGES = {
    "no files": lambda m: m.pop("files"),
    "no graphs": lambda m: m.pop("graphs"),
    "no model": lambda m: m.pop("model"),
    "no recipe": lambda m: m.pop("recipe"),
    "no variant": lambda m: m.pop("variant"),
    "files is a list": lambda m: m.update(files=[]),
    "a file without hash": lambda m: m["files"]["decode.onnx"].pop("sha256"),
    "a size that is text": lambda m: m["files"]["decode.onnx"].update(bytes="many"),
    "a size that is infinite": lambda m: m["files"]["decode.onnx"].update(bytes=float("inf")),
    "graphs is text": lambda m: m.update(graphs="decode.onnx"),
    "a graph without file": lambda m: m["graphs"]["decode"].pop("file"),
    "a model field too many": lambda m: m["model"].update(colour=3),
    "a model field too few": lambda m: m["model"].pop("hidden_size"),
    "a negative model field": lambda m: m["model"].update(patch_size=-1),
    "a zero model field": lambda m: m["model"].update(num_heads=0),
    "guidance that is text": lambda m: m["recipe"].update(guidance="high"),
    "an allocation that is a number": lambda m: m["recipe"].update(allocation=4),
    "an allocation that is infinite": lambda m: m["recipe"].update(allocation=[float("inf")]),
    "an allocation of other bits": lambda m: m["recipe"].update(allocation=[1, 2]),
    "guidance that is not a number": lambda m: m["recipe"].update(guidance=float("nan")),
    "guidance that is true": lambda m: m["recipe"].update(guidance=True),
    "a variant that is a list": lambda m: m.update(variant=["x"]),
    "no provenance": lambda m: m.pop("provenance"),
    "quantization that is text": lambda m: m.update(quantization="x"),
    "engines that are text": lambda m: m.update(engines="cuda"),
    "engines of none": lambda m: m.update(engines={}),
    "an engine that is text": lambda m: m.update(engines={"cuda": "x"}),
    "a graph without precision": lambda m: m["graphs"]["decode"].pop("precision"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_malformed_manifest_is_refused(bundle_copy, parsed, edit_manifest, change):
    edit_manifest(bundle_copy, CHANGES[change])
    assert "manifest.json: incomplete or malformed" in refused(bundle_copy, parsed)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"variant": ["x"]}, r"variant is \['x'\], expected text or null"),
        ({"files": {"decode.onnx": {"bytes": "3"}}}, r"files\.decode\.onnx\.bytes is '3', expected a whole number"),
    ],
)
def test_the_field_that_is_malformed_is_named(bundle_copy, edit_manifest, change, sentence):
    edit_manifest(bundle_copy, lambda m: m.update(change))
    with pytest.raises(BundleError, match=sentence):
        Bundle.open(bundle_copy)


def test_an_unknown_engine_is_a_compatibility_error(bundle_copy, parsed, edit_manifest):
    edit_manifest(bundle_copy, lambda m: m.update(engines={"foo": {}}))
    assert "was compiled for foo, this version knows tensorrt, cuda" in refused(bundle_copy, parsed, CompatibilityError)


def test_every_engine_but_onnxruntime_is_compiled_for():
    assert {*COMPILED_FOR, "onnxruntime"} == set(engines.NAMES)


SIZES = {
    "hidden_size": 128, "num_layers": 4, "num_heads": 8, "image_seq_len": 64, "num_classes": 1000,
    "repeat_class_condition": 16, "head_width": 64, "head_layers": 3, "decoder_patch_size": 8,
}  # fmt: skip


@pytest.mark.parametrize("field", SIZES)
@pytest.mark.parametrize("kind", ["exported", "for cuda"])
def test_sizes_that_are_not_those_of_the_weights_are_refused(patch1, tmp_path, parsed, edit_manifest, field, kind):
    if kind == "exported":
        folder = Path(shutil.copytree(patch1.bundle.path, tmp_path / "bundle"))
    else:
        folder = prepack_bundle(patch1.bundle, tmp_path / "bundle").path
    assert getattr(patch1.spec, field) != SIZES[field]
    edit_manifest(folder, lambda m: m["model"].update({field: SIZES[field]}))
    with pytest.raises(BundleError, match=r"weights\.safetensors: .* the manifest's model"):
        Bundle.open(folder)


def test_what_is_no_bundle_is_refused_and_says_how_to_make_one(tmp_path, patch1, parsed):
    file = tmp_path / "file"
    file.write_text("x")
    (tmp_path / "empty").mkdir()
    for path, what in (
        (tmp_path / "absent", "no such folder"),
        (file, "is a file, not a bundle folder"),
        (patch1.generator, "is a file, not a bundle folder"),
        (tmp_path / "empty", "has no manifest.json"),
    ):
        message = refused(path, parsed)
        assert what in message and "bar-edge export" in message


# -- publishing --------------------------------------------------------------------------------------------------------


def fill(folder: Path, patch1, text: str = "content") -> None:
    (folder / "data.bin").write_text(text)
    for name in ("weights.safetensors", SELFTEST):
        shutil.copyfile(patch1.bundle.path / name, folder / name)
    write_manifest(
        folder, spec=patch1.spec, recipe=patch1.checkpoint.recipe, variant=None, graphs={}, provenance={}
    )  # fmt: skip


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_a_bundle_appears_only_when_it_is_whole(tmp_path, patch1):
    output = tmp_path / "deep" / "bundle"
    with publish(output, 0, force=False) as folder:
        assert folder.parent == output.parent
        fill(folder, patch1)
        assert not output.exists()
    assert Bundle.open(output).spec == patch1.spec
    assert names(output.parent) == ["bundle"]


def test_an_existing_output_is_refused_without_force(tmp_path, patch1):
    output = tmp_path / "bundle"
    with publish(output, 0, force=False) as folder:
        fill(folder, patch1)
    with pytest.raises(BundleError, match="exists already; choose another folder or pass --force"), publish(
        output, 0, force=False
    ):  # fmt: skip
        raise AssertionError("not reached")
    assert Bundle.open(output).spec == patch1.spec


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("target", ["nowhere", "a folder", "a bundle"])
def test_a_link_is_never_replaced(tmp_path, bundle_copy, target, force):
    (tmp_path / "a folder").mkdir()
    places = {"nowhere": tmp_path / "nowhere", "a folder": tmp_path / "a folder", "a bundle": bundle_copy}
    link = tmp_path / "link"
    link.symlink_to(places[target])
    before = names(tmp_path)
    with pytest.raises(BundleError, match="link: is a link; give the folder itself"), publish(link, 0, force=force):
        raise AssertionError("not reached")
    assert names(tmp_path) == before and link.is_symlink()
    Bundle.open(bundle_copy)


def test_force_replaces_a_bundle_completely(tmp_path, patch1):
    output = tmp_path / "bundle"
    for text in ("old", "new"):
        with publish(output, 0, force=True) as folder:
            fill(folder, patch1, text)
            if text == "old":
                (folder / "surplus").write_text("gone later")
                fill(folder, patch1, text)
    assert names(output) == ["data.bin", MANIFEST, SELFTEST, "weights.safetensors"]
    assert (output / "data.bin").read_text() == "new"
    assert names(tmp_path) == ["bundle"]


def test_force_uses_an_empty_folder(tmp_path, patch1):
    output = tmp_path / "bundle"
    output.mkdir()
    with publish(output, 0, force=True) as folder:
        fill(folder, patch1)
    assert Bundle.open(output).spec == patch1.spec


@pytest.mark.parametrize("kind", ["folder", "file", "another program's manifest", "beside a bundle"])
def test_force_does_not_replace_what_is_no_bundle(tmp_path, patch1, kind):
    output = tmp_path / "precious"
    if kind == "file":
        output.write_text("mine")
    elif kind == "beside a bundle":
        with publish(output, 0, force=False) as folder:
            fill(folder, patch1)
    else:
        output.mkdir()
    if kind == "another program's manifest":
        (output / MANIFEST).write_text('{"name": "an extension", "files": {"thesis.txt": {}}}')
    if output.is_dir():
        (output / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match="is not a bundle, or not only one, so --force will not replace it"), publish(
        output, 0, force=True
    ):  # fmt: skip
        raise AssertionError("not reached")
    assert (output / "thesis.txt" if output.is_dir() else output).read_text() == "mine"


def test_force_replaces_a_damaged_bundle(tmp_path, patch1):
    output = tmp_path / "bundle"
    with publish(output, 0, force=False) as folder:
        fill(folder, patch1, "old")
    (output / SELFTEST).unlink()
    with publish(output, 0, force=True) as folder:
        fill(folder, patch1, "new")
    assert (output / "data.bin").read_text() == "new"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, BundleError, MemoryError])
def test_an_interruption_leaves_nothing_and_is_passed_on(tmp_path, error):
    with pytest.raises(error), publish(tmp_path / "bundle", 0, force=False) as folder:
        (folder / "half").write_text("x")
        raise error("stop")
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_replacement_keeps_the_old_bundle(tmp_path, patch1, error):
    output = tmp_path / "bundle"
    with publish(output, 0, force=False) as folder:
        fill(folder, patch1, "old")
    with pytest.raises((KeyboardInterrupt, BundleError)), publish(output, 0, force=True) as folder:
        fill(folder, patch1, "new")
        raise error
    assert names(tmp_path) == ["bundle"]
    Bundle.open(output)
    assert (output / "data.bin").read_text() == "old"


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_replacement_that_fails_at_its_last_step_gives_the_old_bundle_back(tmp_path, patch1, monkeypatch, error):
    output = tmp_path / "bundle"
    with publish(output, 0, force=False) as folder:
        fill(folder, patch1, "old")
    rename = Path.rename

    def failing(self, target):
        if self.name.endswith(".partial"):
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((BundleError, KeyboardInterrupt)), publish(output, 0, force=True) as folder:
        fill(folder, patch1, "new")
    assert (output / "data.bin").read_text() == "old"
    assert names(tmp_path) == ["bundle"]


def test_replacing_through_a_link_leaves_no_debris_and_tells_the_truth(tmp_path, patch1):
    """Either the link is refused with everything as it was, or a whole new bundle is there without remains."""
    output, real = tmp_path / "bundle", tmp_path / "real"
    with publish(real, 0, force=False) as folder:
        fill(folder, patch1, "old")
    output.symlink_to(real)
    try:
        with publish(output, 0, force=True) as folder:
            fill(folder, patch1, "new")
        expected = "new"
    except BundleError:
        expected = "old"
    assert (output / "data.bin").read_text() == expected
    assert names(tmp_path) == ["bundle", "real"]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    free = 100 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(BundleError, match=r"100 MiB free, 264 MiB needed"), publish(
        tmp_path / "bundle", 200 * 2**20, force=False
    ):  # fmt: skip
        raise AssertionError("not reached")
    assert names(tmp_path) == []


def test_an_error_while_writing_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(BundleError) as caught, publish(tmp_path / "bundle", 0, force=False) as folder:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")
    assert "writing failed (No space left on device); nothing was left behind" in str(caught.value)
    assert names(tmp_path) == []


def test_an_error_while_reading_names_what_cannot_be_read(tmp_path):
    absent = tmp_path / "bundle2" / "selftest.npz"  # beside the output, and its name begins alike
    with pytest.raises(BundleError) as caught, publish(tmp_path / "bundle", 0, force=False) as folder:
        shutil.copyfile(absent, folder / "selftest.npz")
    assert (
        str(caught.value) == f"{absent}: cannot be read or written (No such file or directory); nothing was left behind"
    )
    assert names(tmp_path) == []


@pytest.mark.parametrize("spelling", ["bundle", "./bundle/", "bundle/../bundle", "bundle/inside", "by link/inside", ""])
@pytest.mark.parametrize("force", [False, True])
def test_what_a_bundle_is_made_of_is_never_its_output(bundle_copy, monkeypatch, spelling, force):
    monkeypatch.chdir(bundle_copy.parent)
    (bundle_copy.parent / "by link").symlink_to(bundle_copy)
    output = Path(spelling) if spelling else bundle_copy.resolve()
    with pytest.raises(BundleError, match="which it is made of; choose another folder"), publish(
        output, 0, force=force, sources=[bundle_copy]
    ):  # fmt: skip
        raise AssertionError("not reached")
    Bundle.open(bundle_copy)


def test_an_output_that_holds_what_it_is_made_of_is_refused(bundle_copy):
    source = bundle_copy / "checkpoint.bin"
    source.write_text("mine")
    with pytest.raises(BundleError, match="which it is made of"):
        check_output(bundle_copy, force=True, sources=[source])
    check_output(bundle_copy.with_name("bundle2"), force=False, sources=[bundle_copy, source])


def test_of_two_at_once_the_slower_one_is_refused(tmp_path, patch1):
    output = tmp_path / "bundle"
    with pytest.raises(BundleError, match="exists already"), publish(output, 0, force=False) as slower:
        fill(slower, patch1, "slower")
        with publish(output, 0, force=False) as faster:
            fill(faster, patch1, "faster")
    assert (output / "data.bin").read_text() == "faster"
    assert names(tmp_path) == ["bundle"]


def as_anyone_but_root(monkeypatch) -> None:
    """In a read-only folder nothing can be removed."""
    rmtree = shutil.rmtree

    def remove(path, ignore_errors=False):
        if Path(path).exists() and not Path(path).stat().st_mode & 0o200:
            if ignore_errors:
                return
            raise PermissionError(13, "Permission denied", str(path))
        rmtree(path, ignore_errors)

    monkeypatch.setattr(shutil, "rmtree", remove)


def test_force_replaces_a_read_only_bundle_completely(tmp_path, bundle_copy, patch1, monkeypatch):
    as_anyone_but_root(monkeypatch)
    bundle_copy.chmod(0o555)
    with publish(bundle_copy, 0, force=True) as folder:
        fill(folder, patch1)
    assert (bundle_copy / "data.bin").is_file()
    assert names(tmp_path) == ["bundle"]


def test_what_remains_of_a_replaced_bundle_is_named(tmp_path, bundle_copy, patch1, monkeypatch):
    as_anyone_but_root(monkeypatch)
    bundle_copy.chmod(0o555)
    monkeypatch.setattr(Path, "chmod", lambda self, mode: None)
    with pytest.raises(BundleError) as caught, publish(bundle_copy, 0, force=True) as folder:
        fill(folder, patch1)
    (left,) = tmp_path.glob(".bundle.*.old")
    assert str(left) in str(caught.value) and "remove that by hand" in str(caught.value)
    assert (bundle_copy / "data.bin").is_file()


def test_an_output_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match="cannot be written to"), publish(
        tmp_path / "file" / "bundle", 0, force=False
    ):  # fmt: skip
        raise AssertionError("not reached")


def test_files_and_folders_are_synced_before_the_bundle_gets_its_name(tmp_path, patch1, monkeypatch):
    output, events = tmp_path / "bundle", []
    sync, rename = bundle_module._sync, Path.rename
    monkeypatch.setattr(bundle_module, "_sync", lambda path: (events.append(path.name), sync(path)))
    monkeypatch.setattr(Path, "rename", lambda self, target: (events.append("renamed"), rename(self, target))[1])
    with publish(output, 0, force=False) as folder:
        fill(folder, patch1)
    at = events.index("renamed")
    assert {"data.bin", MANIFEST, SELFTEST, "weights.safetensors", folder.name} == set(events[:at])
    assert events[at + 1 :] == [tmp_path.name]


def test_a_manifest_lists_every_file_with_size_and_hash(patch1):
    manifest = json.loads((patch1.bundle.path / MANIFEST).read_text())
    for file in patch1.bundle.path.iterdir():
        if file.name != MANIFEST:
            assert manifest["files"][file.name] == {
                "bytes": file.stat().st_size, "sha256": bundle_module.sha256(file)
            }  # fmt: skip


def test_crafted_graphs_of_these_tests_are_real_ones():
    onnx.load_model_from_string(graph_pointing_at("../outside"))
