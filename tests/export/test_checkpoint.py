"""Reading checkpoints: every format, every wrapper, nothing executed, and one sentence for what does not fit."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml

from bar_edge.benchmarks.random_checkpoint import config_of
from bar_edge.export.checkpoint import (
    generator_shapes,
    infer_spec,
    load_checkpoint,
    read_state_dict,
    read_tokenizer,
    tokenizer_shapes,
)
from bar_edge.export.settings import read_config
from bar_edge.runtime.errors import BarEdgeError, CheckpointError
from bar_edge.runtime.spec import VARIANTS, Recipe

PREVIEW = Recipe(1.25, 0.75, (1, 1))  # what a YAML says that nobody should sample with
SOME = {"cls_token": torch.randn(1, 1, 8), "norm.weight": torch.randn(8), "blocks.0.attn.qkv.bias": torch.randn(24)}


def save(tensors: dict[str, Any], path: Path) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


@pytest.fixture
def generator(patch1) -> dict[str, torch.Tensor]:
    """The tensors of a sound generator, to be damaged."""
    return dict(patch1.checkpoint.generator)


def shallow(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Tensors of any size that take four bytes each, in memory and in a file."""
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


@pytest.fixture
def published(tmp_path):
    """Files in the shapes of a published variant, with a YAML that holds preview values."""

    def write(name: str) -> tuple[Path, Path, Path]:
        spec = VARIANTS[name].spec
        config = tmp_path / "config.yaml"
        preview = Recipe(PREVIEW.guidance, PREVIEW.temperature, (spec.bits_per_token,))
        config.write_text(yaml.safe_dump(config_of(spec, preview)))
        tokenizer = shallow(tokenizer_shapes(1024, 24, spec.token_size, spec.image_seq_len, spec.decoder_patch_size))
        return (
            save(shallow(generator_shapes(spec)), tmp_path / "generator.bin"),
            save(tokenizer, tmp_path / "tokenizer.bin"),
            config,
        )

    return write


# -- formats -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".safetensors"])
def test_every_format_keeps_values_and_stored_dtype(tmp_path, suffix, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in SOME.items()}
    found = read_state_dict(save(stored, tmp_path / f"weights{suffix}"))
    assert found.keys() == stored.keys()
    for name, tensor in stored.items():
        assert found[name].dtype == dtype
        assert torch.equal(found[name], tensor)


def test_files_of_old_torch_releases_are_read(tmp_path):
    torch.save(SOME, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert not (tmp_path / "old.bin").read_bytes().startswith(b"PK")
    found = read_state_dict(tmp_path / "old.bin")
    assert all(torch.equal(found[name], tensor) for name, tensor in SOME.items())


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])
def test_a_wrappers_prefix_is_stripped(tmp_path, prefix):
    wrapped = {prefix + name: tensor for name, tensor in SOME.items()}
    assert read_state_dict(save(wrapped, tmp_path / "wrapped.bin")).keys() == SOME.keys()


def test_prefixes_are_stripped_key_by_key(tmp_path):
    mixed = {p + name: t for p, (name, t) in zip(("", "module.", "_orig_mod.module."), SOME.items(), strict=True)}
    found = read_state_dict(save(mixed, tmp_path / "mixed.bin"))
    assert all(torch.equal(found[name], tensor) for name, tensor in SOME.items())


def test_only_the_beginning_of_a_name_is_a_prefix(tmp_path):
    tensors = {"block.module.weight": torch.ones(2), "modules.weight": torch.ones(2)}
    assert read_state_dict(save(tensors, tmp_path / "names.bin")).keys() == tensors.keys()


def test_a_tensor_stored_with_and_without_prefix_is_refused(tmp_path):
    path = save({**SOME, "module.norm.weight": torch.zeros(8)}, tmp_path / "twice.bin")
    with pytest.raises(CheckpointError, match=r"norm\.weight is there twice"):
        read_state_dict(path)


@pytest.mark.parametrize("key", ["model", "state_dict", "ema"])
def test_a_nested_state_dict_is_found(tmp_path, key):
    nest = {key: {f"module.{name}": tensor for name, tensor in SOME.items()}, "step": 3, "optimizer": {"lr": 0.1}}
    assert read_state_dict(save(nest, tmp_path / "nested.bin")).keys() == SOME.keys()


def test_several_nested_state_dicts_are_refused_by_name(tmp_path):
    path = save({"model": SOME, "ema": SOME, "step": 1}, tmp_path / "both.bin")
    with pytest.raises(CheckpointError, match=r"several state dicts \(model, ema\)"):
        read_state_dict(path)


@pytest.mark.parametrize("how", ["zip", "legacy", "plain pickle"])
def test_code_in_a_pickle_is_refused_and_does_not_run(tmp_path, how):
    marker, path = tmp_path / "it-ran", tmp_path / "evil.bin"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    payload = {**SOME, "norm.bias": Evil()}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(payload, protocol=2))
    else:
        torch.save(payload, path, _use_new_zipfile_serialization=how == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.bin"):
        read_state_dict(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("version", "safe"), [("2.9.1+cpu", False), ("1.13.0", False), ("2.10.0", True), ("3.0", True)]
)
def test_pickles_are_read_only_by_a_torch_that_reads_them_safely(tmp_path, monkeypatch, version, safe):
    path = save(SOME, tmp_path / "weights.bin")
    monkeypatch.setattr(torch, "__version__", version)
    if safe:
        assert read_state_dict(path).keys() == SOME.keys()
    else:
        with pytest.raises(CheckpointError, match=r"reads pickles unsafely; install torch >= 2\.10, or convert"):
            read_state_dict(path)


@pytest.mark.parametrize("name", ["empty.bin", "text.bin", "cut.bin", "cut.safetensors", "empty.safetensors"])
def test_unreadable_files_are_refused_by_name(tmp_path, name):
    path = tmp_path / name
    if name.startswith("cut"):
        whole = save(SOME, tmp_path / f"whole{path.suffix}").read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    else:
        path.write_bytes(b"" if name.startswith("empty") else b"model:\n  generator: none\n")
    with pytest.raises(CheckpointError, match=name):
        read_state_dict(path)


@pytest.mark.parametrize(("name", "found"), [("absent.bin", "no such file"), ("folder.bin", "not a plain file")])
def test_what_is_not_a_file_is_refused(tmp_path, name, found):
    (tmp_path / "folder.bin").mkdir()
    with pytest.raises(CheckpointError, match=rf"{name}: {found}"):
        read_state_dict(tmp_path / name)


def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", forbidden)
    with pytest.raises(CheckpointError, match=r"weights\.bin: cannot be read \(Permission denied\); copy it again"):
        read_state_dict(save(SOME, tmp_path / "weights.bin"))


ODD = {
    "text": (b"hello world\n", "not a checkpoint of PyTorch"),
    "YAML": (b"model:\n  generator: none\n", "not a checkpoint of PyTorch"),
    "safetensors": (safetensors.torch.save(SOME), "not a checkpoint of PyTorch"),
    "a late protocol": (pickle.dumps({"a": 1}, protocol=4), "not a checkpoint of PyTorch"),
    "a call": (pickle.dumps({"a": os.getcwd}, protocol=2), "holds posix.getcwd, which was not loaded"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ODD)
def test_a_refusal_is_our_own_sentence_and_never_torchs_advice(tmp_path, kind):
    content, found = ODD[kind]
    path = tmp_path / "odd.bin"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: {found}") and "a state dict of tensors alone is needed" in message
    assert "weights_only" not in message and "\n" not in message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.bool], ids=str)
def test_other_dtypes_are_refused_by_tensor(tmp_path, dtype):
    path = save({**SOME, "norm.weight": torch.zeros(8, dtype=dtype)}, tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match=rf"norm\.weight stored as {dtype}"):
        read_state_dict(path)


@pytest.mark.parametrize("content", [[torch.zeros(2)], {}, torch.zeros(2), {"weight": 3.0}, {"epoch": 1, **SOME}])
def test_anything_but_named_tensors_is_refused(tmp_path, content):
    path = save(content, tmp_path / "odd.bin")
    with pytest.raises(CheckpointError, match="state dict"):
        read_state_dict(path)


# -- completeness ------------------------------------------------------------------------------------------------------


def test_all_problems_of_a_checkpoint_come_in_one_error(tmp_path, patch1, generator):
    missing = [f"blocks.{i}.{part}" for i in range(3) for part in ("mlp.w3.bias", "norm1.weight", "attn.proj.weight")]
    for name in missing:
        del generator[name]
    generator["blocks.1.mlp.w12.bias"] = torch.zeros(7)
    generator["surplus.weight"] = torch.zeros(2, 5)
    generator["surplus.bias"] = torch.zeros(2)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(save(generator, tmp_path / "bad.bin"), patch1.tokenizer, patch1.config)
    message = str(caught.value)
    assert all(f"{name} missing, expected [" in message for name in missing)
    assert "blocks.1.mlp.w12.bias has shape [7], expected [340]" in message
    assert message.endswith("and 2 more") and "surplus" not in message
    assert "blocks.0.attn.proj.weight missing, expected [64, 64]" in message
    assert "\n" not in message


def test_an_unknown_tensor_is_refused_by_name(tmp_path, patch1, generator):
    generator["blocks.0.attn.lora.weight"] = torch.zeros(4, 64)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.attn\.lora\.weight \[4, 64\] is unknown"):
        load_checkpoint(save(generator, tmp_path / "more.bin"), patch1.tokenizer, patch1.config)


@pytest.mark.parametrize(
    "name",
    ["cls_token", "pos_embed", "embeddings.weight", "blocks.0.attn.q_norm.weight", "blocks.0.attn.rope.freqs_cos",
     "lm_head.output_embed.weight", "lm_head.ln_pre.weight"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [None, (), (1,), (0,), (0, 0, 0)], ids=str)
def test_a_damaged_defining_tensor_is_a_checkpoint_error(tmp_path, patch1, generator, name, shape):
    if shape is None:  # the rotary tables of all blocks are one: it is missing when it is in no block
        table = name.partition(".attn.rope.")[2] or "none"
        for key in [key for key in generator if key == name or key.endswith(f".attn.rope.{table}")]:
            del generator[key]
    else:
        generator[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError):
        load_checkpoint(save(generator, tmp_path / "bad.bin"), patch1.tokenizer, patch1.config)


@pytest.mark.parametrize("kept", [0, 2])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_a_rotary_table_kept_in_one_block_serves_them_all(tmp_path, patch1, generator, kept, suffix):
    """Writers that drop shared tensors keep one of them, and which one is theirs to choose."""
    tables = [name for name in generator if ".attn.rope." in name]
    for name in tables:
        if not name.startswith(f"blocks.{kept}."):
            del generator[name]
    assert len(generator) == len(patch1.checkpoint.generator) - 4
    loaded = load_checkpoint(save(generator, tmp_path / f"shared{suffix}"), patch1.tokenizer, patch1.config)
    assert loaded.spec == patch1.spec
    for name in tables:
        assert torch.equal(loaded.generator[name], patch1.checkpoint.generator[name]), name


def test_a_rotary_table_of_its_own_is_kept_by_its_block(tmp_path, patch1, generator):
    """Whether they are all equal is for who uses them to judge."""
    own = generator["blocks.1.attn.rope.freqs_cos"] + 1
    generator["blocks.1.attn.rope.freqs_cos"] = own
    loaded = load_checkpoint(save(generator, tmp_path / "own.bin"), patch1.tokenizer, patch1.config)
    assert torch.equal(loaded.generator["blocks.1.attn.rope.freqs_cos"], own)


@pytest.mark.parametrize("table", ["freqs_cos", "freqs_sin"])
def test_a_rotary_table_that_no_block_has_is_missed_by_name(tmp_path, patch1, generator, table):
    for i in range(3):
        del generator[f"blocks.{i}.attn.rope.{table}"]
    with pytest.raises(CheckpointError, match=rf"missing.*blocks\.0\.attn\.rope\.{table}|rope\.{table} missing"):
        load_checkpoint(save(generator, tmp_path / "bad.bin"), patch1.tokenizer, patch1.config)


@pytest.mark.parametrize(
    "name",
    ["quantize.out_proj.weight", "decoder.positional_embedding", "decoder.ffn.0.weight", "decoder.conv_out.bias"],
)
@pytest.mark.parametrize("shape", [None, (), (1,), (16, 0), (0, 0, 0)], ids=str)
def test_a_damaged_tokenizer_tensor_is_a_checkpoint_error(tmp_path, patch1, name, shape):
    tensors = dict(patch1.checkpoint.tokenizer)
    if shape is None:
        del tensors[name]
    else:
        tensors[name] = torch.zeros(shape)
    with pytest.raises(CheckpointError):
        load_checkpoint(patch1.generator, save(tensors, tmp_path / "bad.bin"), patch1.config)


def test_encoder_and_clip_projector_are_skipped(data):
    path = data / "golden" / "decoder_10bit_clip" / "tokenizer.bin"
    everything = read_state_dict(path)
    skipped = {name for name in everything if name.startswith(("encoder.", "decoder.clip_projector."))}
    assert any(name.startswith("encoder.") for name in skipped)
    assert any(name.startswith("decoder.clip_projector.") for name in skipped)
    kept = read_tokenizer(path)
    assert not skipped & kept.keys()
    assert all(name.startswith(("decoder.", "quantize.out_proj.")) for name in kept)


def test_a_generator_and_a_tokenizer_given_the_wrong_way_round_are_told_apart(patch1):
    with pytest.raises(CheckpointError, match="is this the tokenizer's file"):
        load_checkpoint(patch1.tokenizer, patch1.generator, patch1.config)
    with pytest.raises(CheckpointError, match="looks like a tokenizer"):
        load_checkpoint(patch1.tokenizer, patch1.tokenizer, patch1.config)


# -- belonging together ------------------------------------------------------------------------------------------------


def test_golden_sizes_are_read_off_the_tensors(golden, stated_spec):
    assert golden.spec == stated_spec(golden.config)
    assert golden.checkpoint.variant is None


@pytest.mark.parametrize("head_dim", [24, 65])
def test_heads_that_do_not_divide_the_width_are_refused(tmp_path, patch1, generator, head_dim):
    generator["blocks.0.attn.q_norm.weight"] = torch.ones(head_dim)
    with pytest.raises(CheckpointError, match=rf"sizes are inconsistent \(D=64, d={head_dim}"):
        load_checkpoint(save(generator, tmp_path / "bad.bin"), patch1.tokenizer, patch1.config)


def test_a_decoder_that_does_not_divide_into_its_heads_is_refused(tmp_path):
    path = save(shallow(tokenizer_shapes(40, 1, 6, 16, 16)), tmp_path / "narrow.bin")
    with pytest.raises(CheckpointError, match=r"narrow\.bin: decoder width 40 does not divide into 16 heads"):
        read_tokenizer(path)


def test_an_absurd_layer_number_is_not_believed(patch1, generator):
    """Nothing is planned or allocated for a million layers that are not there."""
    generator["blocks.1000000.norm1.weight"] = torch.ones(64)
    spec = infer_spec(generator, patch1.checkpoint.tokenizer, patch1.generator, patch1.tokenizer)
    assert spec.num_layers <= len(generator)


def test_a_tokenizer_of_other_bits_is_refused(patch1, data):
    with pytest.raises(CheckpointError, match=r"6 bits per token.*decodes 10 bits"):
        load_checkpoint(patch1.generator, data / "golden" / "decoder_10bit_clip" / "tokenizer.bin", patch1.config)


def test_a_tokenizer_of_another_resolution_is_refused(cases, data):
    case = cases("patch1_10bit")
    with pytest.raises(CheckpointError, match=r"16 cells an image.*decodes 64.*resolutions"):
        load_checkpoint(case.generator, data / "golden" / "decoder_10bit_clip" / "tokenizer.bin", case.config)


CONTRADICTIONS = {
    "model.generator.hidden_size": 65,
    "model.generator.num_hidden_layers": 4,
    "model.generator.num_attention_heads": 2,
    "model.generator.image_seq_len": 64,
    "model.generator.condition_num_classes": 1000,
    "model.generator.target_codebook_size": 3,
    "model.generator.patch_size": 2,
    "model.generator.repeat_class_condition": 16,
    "model.generator.latent_height": 8,
    "model.generator.latent_width": 2,
    "model.generator.mbm_head.width": 64,
    "model.generator.mbm_head.num_layers": 3,
    "model.vq_model.token_size": 10,
    "model.vq_model.vit_dec_patch_size": 8,
    "dataset.preprocessing.crop_size": 256,
}


@pytest.mark.parametrize(("key", "value"), CONTRADICTIONS.items(), ids=CONTRADICTIONS.keys())
def test_a_yaml_that_contradicts_the_tensors_is_refused(tmp_path, patch1, key, value):
    settings = read_config(patch1.config, [f"{key}={value}"])
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(CheckpointError, match=rf"{key} is {value} in the YAML, \d+ in the tensors"):
        load_checkpoint(patch1.generator, patch1.tokenizer, config)


def test_the_yaml_of_another_model_is_refused(patch1, cases):
    with pytest.raises(CheckpointError, match="do not belong together"):
        load_checkpoint(patch1.generator, patch1.tokenizer, cases("patch4").config)


def test_interpolations_in_the_yaml_are_left_alone(tmp_path, patch1):
    settings = read_config(patch1.config)
    settings["model"]["generator"]["image_seq_len"] = "${model.vq_model.latent_tokens}"
    settings["training"] = {"lr": "${optimizer.lr}"}
    config = tmp_path / "interpolated.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert load_checkpoint(patch1.generator, patch1.tokenizer, config).spec == patch1.spec


@pytest.mark.parametrize("text", ["- a\n- b\n", "model: 3\n", "", "model: {\n", "x: 1\n"])
def test_a_file_that_is_not_the_authors_yaml_is_refused(tmp_path, text):
    config = tmp_path / "config.yaml"
    config.write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.yaml"):
        read_config(config)


def test_an_absent_yaml_is_refused_by_name(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.yaml"):
        read_config(tmp_path / "nowhere.yaml")


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_an_unpublished_model_samples_as_its_yaml_says(golden):
    generator = yaml.safe_load(golden.config.read_text())["model"]["generator"]
    head = generator["mbm_head"]
    assert golden.checkpoint.recipe == Recipe(
        generator["guidance_scale"], head["randomize_temperature"], tuple(head["tokens_allocation"])
    )


def test_overrides_win_over_the_yaml(patch1):
    overrides = ["model.generator.guidance_scale=1.5", "model.generator.mbm_head.tokens_allocation=[3,3]"]
    found = load_checkpoint(patch1.generator, patch1.tokenizer, patch1.config, overrides).recipe
    assert found == Recipe(1.5, patch1.checkpoint.recipe.temperature, (3, 3))


def test_overrides_can_stand_in_for_the_yaml(golden):
    recipe = golden.checkpoint.recipe
    overrides = [
        f"model.generator.guidance_scale={recipe.guidance}",
        f"model.generator.mbm_head.randomize_temperature={recipe.temperature}",
        f"model.generator.mbm_head.tokens_allocation={list(recipe.allocation)}",
    ]
    found = load_checkpoint(golden.generator, golden.tokenizer, None, overrides)
    assert (found.spec, found.recipe) == (golden.spec, recipe)


@pytest.mark.parametrize("override", ["", "=3", "model.generator.guidance_scale", "model.generator.hidden_size.x=3"])
def test_a_malformed_override_is_refused_with_its_text(patch1, override):
    with pytest.raises(CheckpointError, match=f"override {override!r}".replace(".", r"\.")):
        read_config(patch1.config, [override])


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("model.generator.guidance_scal", "did you mean model.generator.guidance_scale?"),
        ("generator.mbm_head.tokens_allocation", "did you mean model.generator.mbm_head.tokens_allocation?"),
        ("foo.bar", "these are: model.generator.guidance_scale, "),
        ("model.generator", "these are|did you mean"),
    ],
)
def test_an_override_that_nobody_reads_is_refused_with_what_is(patch1, key, remedy):
    with pytest.raises(CheckpointError, match=f"override '{key}=9': {key} is not read; ({remedy.replace('?', '[?]')})"):
        read_config(patch1.config, [f"{key}=9"])


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("mbm_head.tokens_allocation=1,2,3", r"is '1,2,3' on the command line, expected a list .* as \[2,2,5,7\]"),
        ("mbm_head.tokens_allocation=[1,2.5,3]", "on the command line, expected a list of whole numbers"),
        ("mbm_head.randomize_temperature=hot", "is 'hot' on the command line, expected a number"),
        ("guidance_scale=true", "is True on the command line, expected a number"),
        ("hidden_size=9", "hidden_size is 9 on the command line, 64 in the tensors"),
        ("mbm_head.tokens_allocation=[1,1]", "with what the command line overrides does not fit"),
    ],
)
def test_a_value_that_does_not_fit_is_told_where_it_came_from(patch1, override, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        load_checkpoint(patch1.generator, patch1.tokenizer, patch1.config, [f"model.generator.{override}"])


def test_a_malformed_recipe_of_the_yaml_is_told_to_be_there(tmp_path, patch1):
    settings = read_config(patch1.config, ["model.generator.mbm_head.tokens_allocation=1,2,3"])
    config = tmp_path / "other.yaml"
    config.write_text(yaml.safe_dump(settings))
    with pytest.raises(CheckpointError, match="is '1,2,3' in the YAML, expected a list"):
        load_checkpoint(patch1.generator, patch1.tokenizer, config)


def test_an_override_whose_value_is_not_yaml_is_refused(patch1):
    with pytest.raises(CheckpointError, match="not YAML"):
        read_config(patch1.config, ["model.generator.guidance_scale=[1,"])


def test_without_a_recipe_the_missing_settings_are_named(patch1):
    with pytest.raises(CheckpointError, match=r"no sampling recipe: model\.generator\.guidance_scale"):
        load_checkpoint(patch1.generator, patch1.tokenizer)


@pytest.mark.parametrize("value", ["[2,2]", "[3,2,1]", "[0,6]", "[]", "six", "[a,b]", "6", "[true,5]"])
def test_an_allocation_that_does_not_fit_is_refused(patch1, value):
    with pytest.raises(BarEdgeError, match="allocation"):
        load_checkpoint(
            patch1.generator, patch1.tokenizer, patch1.config, [f"model.generator.mbm_head.tokens_allocation={value}"]
        )


# -- published variants ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_shapes_and_parameters_are_those_of_the_published_files(data, name):
    recorded = json.loads((data / "checkpoints" / f"{name}.json").read_text())
    shapes = generator_shapes(VARIANTS[name].spec)
    assert {key: list(shape) for key, shape in shapes.items()} == recorded["tensors"]
    parameters = sum(torch.Size(shape).numel() for key, shape in shapes.items() if ".rope." not in key)
    assert parameters == VARIANTS[name].parameters == recorded["parameters"]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_variant_is_recognised_from_shapes_alone(name):
    spec = VARIANTS[name].spec
    tokenizer = tokenizer_shapes(1024, 24, spec.token_size, spec.image_seq_len, spec.decoder_patch_size)
    generator, decoder = (
        {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        for shapes in (generator_shapes(spec), tokenizer)
    )
    assert infer_spec(generator, decoder, Path("generator.bin"), Path("tokenizer.bin")) == spec


@pytest.mark.parametrize("with_yaml", [True, False], ids=["with yaml", "without yaml"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_published_variant_samples_with_its_authors_recipe(published, name, with_yaml):
    generator, tokenizer, config = published(name)
    found = load_checkpoint(generator, tokenizer, config if with_yaml else None)
    assert found.variant == name
    assert found.recipe == VARIANTS[name].recipe


@pytest.mark.parametrize("with_yaml", [True, False], ids=["with yaml", "without yaml"])
@pytest.mark.parametrize("name", ["bar_b", "bar_b_patch2"])
def test_an_override_wins_over_the_authors_recipe(published, name, with_yaml):
    generator, tokenizer, config = published(name)
    override = "model.generator.guidance_scale=2.25"
    found = load_checkpoint(generator, tokenizer, config if with_yaml else None, [override]).recipe
    known = VARIANTS[name].recipe
    assert found == Recipe(2.25, known.temperature, known.allocation)


def test_overrides_may_be_any_iterable(published):
    generator, tokenizer, config = published("bar_b")
    found = load_checkpoint(generator, tokenizer, config, iter(["model.generator.guidance_scale=2.25"]))
    assert found.recipe.guidance == 2.25


def test_a_fine_tuned_size_is_no_published_variant(published, tmp_path):
    generator, tokenizer, config = published("bar_b")
    tensors = read_state_dict(generator)
    tensors["embeddings.weight"] = torch.zeros(1).expand(104, 768)
    settings = read_config(config, ["model.generator.condition_num_classes=100"])
    config.write_text(yaml.safe_dump(settings))
    found = load_checkpoint(save(tensors, tmp_path / "hundred.bin"), tokenizer, config)
    assert found.variant is None
    assert found.recipe == Recipe(PREVIEW.guidance, PREVIEW.temperature, (16,))
