"""Export end to end: the bundle holds the checkpoint's model, and nothing appears unless it is whole and proven."""

import json
from dataclasses import replace
from importlib.metadata import version

import numpy as np
import pytest
import safetensors.torch
import torch

from bar_edge.export import exporter
from bar_edge.export.exporter import export_bundle
from bar_edge.export.replay import Replay
from bar_edge.runtime.bundle import MANIFEST, Bundle, sha256
from bar_edge.runtime.errors import BundleError, CheckpointError, EngineError
from bar_edge.runtime.selftest import Record


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out" / "bundle"


def left_behind(output) -> list[str]:
    return [entry.name for entry in output.parent.iterdir()] if output.parent.exists() else []


def test_a_golden_model_becomes_a_sound_bundle(golden):
    bundle = Bundle.open(golden.bundle.path)
    assert bundle.spec == golden.spec
    assert bundle.recipe == golden.checkpoint.recipe
    assert bundle.variant is None
    assert {entry["precision"] for entry in bundle.manifest["graphs"].values()} == {"fp32"}


def test_a_bundle_holds_no_pickle_and_no_code(golden):
    suffixes = {path.suffix for path in golden.bundle.path.iterdir()}
    assert suffixes == {".json", ".onnx", ".npz", ".safetensors"}


def test_provenance_names_the_sources_by_hash_and_no_folder(patch1):
    provenance = patch1.bundle.manifest["provenance"]
    assert provenance["sources"] == [
        {"file": path.name, "bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in (patch1.generator, patch1.tokenizer, patch1.config)
    ]
    assert provenance["made_by"]["torch"] == version("torch")
    text = (patch1.bundle.path / MANIFEST).read_text()
    assert str(patch1.generator.parent) not in text and str(patch1.output.parent) not in text


def test_the_self_test_is_what_the_reference_draws(patch1):
    record = Record.load(patch1.bundle.path / "selftest.npz", patch1.spec)
    assert record.bits.shape == (patch1.spec.image_seq_len, patch1.spec.token_size)
    assert record.image.shape == (64, 64, 3) and record.image.dtype == np.uint8
    assert record.latent.shape == (48,)
    assert record.first_logits.shape == (patch1.spec.bits_per_token, 2)
    assert 0 <= record.class_id < patch1.spec.num_classes
    assert (patch1.bundle.path / "selftest.npz").stat().st_size < 2**20


@pytest.mark.parametrize("sure", [0, 1])
def test_the_image_that_is_farthest_from_a_tie_is_recorded(patch1, output, monkeypatch, sure):
    def with_a_tie(*arguments) -> Replay:
        found = repeat(*arguments)
        margins = np.ones_like(found.margins)
        margins[sure], margins[1 - sure, 3] = 0.1, 0.01  # one token near a tie counts, not the mean
        return replace(found, margins=margins)

    repeat = exporter.replay
    monkeypatch.setattr(exporter, "replay", with_a_tie)
    bundle = export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output)
    assert Record.load(bundle.path / "selftest.npz", bundle.spec).image_index == sure


def test_the_same_checkpoint_gives_the_same_bundle(patch1, output):
    again = export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output)
    assert again.digest == patch1.bundle.digest


@pytest.mark.parametrize("kind", ["fp16 .bin", "bf16 .bin", "fp16 .safetensors", "fp32 .safetensors", "wrapped .pt"])
def test_every_kind_of_checkpoint_exports_with_its_values_in_float32(patch1, tmp_path, output, kind):
    dtype, _, suffix = kind.partition(" ")
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    tensors = {
        name: tensor.to(dtypes.get(dtype, torch.float32)).clone()
        for name, tensor in patch1.checkpoint.generator.items()
    }
    path = tmp_path / f"generator{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(tensors, path)
    elif dtype == "wrapped":
        torch.save({"ema": {f"_orig_mod.module.{name}": tensor for name, tensor in tensors.items()}}, path)
    else:
        torch.save(tensors, path)
    bundle = export_bundle(path, patch1.tokenizer, patch1.config, output)
    with safetensors.safe_open(bundle.path / "weights.safetensors", framework="pt") as stored:
        for name in ("blocks.1.attn.qkv.weight", "lm_head.output_embed.weight", "blocks.0.attn.proj.bias"):
            assert torch.equal(stored.get_tensor(name), tensors[name].float())


def test_overrides_decide_the_recipe_and_are_recorded(patch1, output):
    overrides = ["model.generator.guidance_scale=2.5"]
    bundle = export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output, overrides=overrides)
    assert bundle.recipe.guidance == 2.5
    assert bundle.manifest["provenance"]["overrides"] == overrides


def test_progress_goes_through_the_stages_and_never_past_the_end(patch1, output):
    told = []
    export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output, progress=lambda *args: told.append(args))
    stages = list(dict.fromkeys(what for what, _, _ in told))
    assert stages[0] == "reading the checkpoint" and "writing weights" in stages and stages[-1] == "verifying"
    assert all(0 <= done <= total for _, done, total in told)


def test_an_existing_folder_is_refused_and_kept(patch1, output):
    output.mkdir(parents=True)
    (output / "notes.txt").write_text("mine")
    for force, message in ((False, "exists already"), (True, "is not a bundle")):
        with pytest.raises(BundleError, match=message):
            export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output, force=force)
    assert [entry.name for entry in output.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["blocks.1.mlp.w12.weight", "lm_head.t_embedder.W", "pos_embed"])
def test_nan_weights_are_refused_by_name_and_leave_nothing(patch1, tmp_path, output, name):
    tensors = {key: tensor.clone() for key, tensor in patch1.checkpoint.generator.items()}
    tensors[name].view(-1)[5] = torch.nan
    torch.save(tensors, tmp_path / "nan.bin")
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        export_bundle(tmp_path / "nan.bin", patch1.tokenizer, patch1.config, output)
    assert left_behind(output) == []


@pytest.mark.parametrize("name", ["blocks.2.mlp.w12.weight", "lm_head.output_embed.weight"])
def test_a_generator_that_overflows_is_refused_in_one_sentence(patch1, tmp_path, output, name):
    """Its weights are finite, and ONNX Runtime and PyTorch draw the same bits from NaN."""
    tensors = dict(patch1.checkpoint.generator)
    tensors[name] = (tensors[name].sign() + 0.5) * 1e38
    torch.save(tensors, tmp_path / "large.bin")
    with pytest.raises(CheckpointError, match=r"NaN or infinite in \d+ of 32 tokens: .* overflow in float32"):
        export_bundle(tmp_path / "large.bin", patch1.tokenizer, patch1.config, output)
    assert left_behind(output) == []


def test_a_decoder_that_overflows_is_refused_in_one_sentence(patch1, tmp_path, output):
    tensors = dict(patch1.checkpoint.tokenizer)
    tensors["decoder.ffn.0.weight"] = (tensors["decoder.ffn.0.weight"].sign() + 0.5) * 1e38
    torch.save(tensors, tmp_path / "large.bin")
    with pytest.raises(CheckpointError, match=r"NaN or infinite pixels: .* overflow in float32"):
        export_bundle(patch1.generator, tmp_path / "large.bin", patch1.config, output)
    assert left_behind(output) == []


def test_a_checkpoint_is_not_replaced_by_its_bundle(patch1, bundle_copy):
    generator = bundle_copy / "generator.bin"
    generator.write_bytes(patch1.generator.read_bytes())
    with pytest.raises(BundleError, match="which it is made of"):
        export_bundle(generator, patch1.tokenizer, patch1.config, bundle_copy, force=True)
    assert generator.is_file()


def test_a_checkpoint_that_does_not_fit_its_tokenizer_leaves_nothing(patch1, data, output):
    with pytest.raises(CheckpointError, match="Use the tokenizer the generator was trained with"):
        export_bundle(patch1.generator, data / "golden" / "decoder_10bit_clip" / "tokenizer.bin", patch1.config, output)
    assert left_behind(output) == []


def test_a_bundle_that_draws_something_else_is_never_published(patch1, output, monkeypatch):
    def disagree(generator, bits, class_ids, recipe, noise) -> Replay:
        shape = (len(class_ids), generator.spec.num_tokens)
        latents = np.ones((*shape, generator.spec.head_width), dtype=np.float32)
        return Replay(np.ones(shape, dtype=np.int64), np.full(shape, 0.1, dtype=np.float32), latents)

    monkeypatch.setattr(exporter, "replay", disagree)
    with pytest.raises(EngineError, match="do not draw what the reference model draws: 32 of 32 tokens"):
        export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output)
    assert left_behind(output) == []


def test_a_decoder_that_differs_is_never_published(patch1, output, monkeypatch):
    other = {name: tensor * 1.01 for name, tensor in patch1.decoder.state_dict().items()}

    def build_other(checkpoint):
        decoder = build(checkpoint)
        decoder.load_state_dict(other)
        return decoder

    build = exporter.build_decoder
    monkeypatch.setattr(exporter, "build_decoder", build_other)
    with pytest.raises(EngineError, match="decoder differs from the reference"):
        export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output)
    assert left_behind(output) == []


def test_an_exported_decoder_that_draws_no_numbers_is_never_published(patch1, output, monkeypatch):
    monkeypatch.setattr(exporter.Generator, "decode_raw", lambda self, bits: np.full((len(bits), 3, 64, 64), np.nan))
    with pytest.raises(EngineError, match="decoder differs from the reference by nan"):
        export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output)
    assert left_behind(output) == []


@pytest.mark.parametrize(("heads", "head_dim"), [(10, 8), (4, 12)])
def test_heads_that_onnxruntime_refuses_are_refused_before_anything_is_written(
    patch1, output, monkeypatch, heads, head_dim
):
    """18 positions: at most 9 heads."""
    sizes = replace(
        patch1.spec, hidden_size=heads * head_dim, num_heads=heads, image_seq_len=4, token_size=4, patch_size=2,
        repeat_class_condition=16,
    )  # fmt: skip
    monkeypatch.setattr(exporter, "load_checkpoint", lambda *arguments: replace(patch1.checkpoint, spec=sizes))
    with pytest.raises(CheckpointError, match=rf"{heads} heads of {head_dim} channels over 18 positions"):
        export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output)
    assert left_behind(output) == []


def test_an_interruption_leaves_nothing(patch1, output, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "write_manifest", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output)
    assert left_behind(output) == []


def test_force_replaces_a_bundle_and_a_failure_keeps_the_old_one(patch1, tmp_path, output):
    export_bundle(patch1.generator, patch1.tokenizer, patch1.config, output)
    before = Bundle.open(output).digest
    tensors = {key: tensor.clone() for key, tensor in patch1.checkpoint.generator.items()}
    tensors["norm.weight"][0] = torch.nan
    torch.save(tensors, tmp_path / "nan.bin")
    with pytest.raises(CheckpointError, match=r"norm\.weight"):
        export_bundle(tmp_path / "nan.bin", patch1.tokenizer, patch1.config, output, force=True)
    assert Bundle.open(output).digest == before
    tensors["norm.weight"][0] = 3
    torch.save(tensors, tmp_path / "other.bin")
    replaced = export_bundle(tmp_path / "other.bin", patch1.tokenizer, patch1.config, output, force=True)
    assert Bundle.open(output).digest == replaced.digest != before
    assert left_behind(output) == ["bundle"]


def test_the_manifest_is_readable_json(patch1):
    manifest = json.loads((patch1.bundle.path / MANIFEST).read_text())
    assert manifest["format_version"] == 1
    assert manifest["model"] == patch1.spec.to_dict()
    assert manifest["files"].keys() == {entry.name for entry in patch1.bundle.path.iterdir()} - {MANIFEST}
