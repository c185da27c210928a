"""The exact algebra: rewritten tensors compute what the checkpoint's do, and damaged checkpoints are named."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from bar_edge.export.checkpoint import generator_shapes
from bar_edge.export.rewrite import NEW_NAMES, Rewriter
from bar_edge.runtime.errors import CheckpointError
from bar_edge.runtime.spec import HIDDEN_MULTIPLE, padded

EXACT_ENOUGH = {"rtol": 1e-5, "atol": 1e-6}  # float32 sums in another order


@pytest.fixture(scope="session")
def rewritten(golden):
    """All tensors of a golden bundle, computed."""
    return {name: pending.make() for name, pending in Rewriter(golden.checkpoint).pending.items()}


def stored(golden, name) -> np.ndarray:
    return {**golden.checkpoint.generator, **golden.checkpoint.tokenizer}[name].float().numpy()


def test_every_tensor_has_the_shape_and_dtype_it_was_planned_with(golden, rewritten):
    for name, pending in Rewriter(golden.checkpoint).pending.items():
        assert rewritten[name].shape == pending.shape, name
        assert rewritten[name].astype(pending.dtype).dtype == np.float32


def test_tensors_keep_their_checkpoint_names_or_are_documented(golden, rewritten):
    known = generator_shapes(golden.spec).keys() | golden.checkpoint.tokenizer.keys()
    new = {re.sub(r"blocks\.\d+\.", "blocks.i.", name) for name in rewritten.keys() - known}
    assert new == NEW_NAMES.keys()


@pytest.mark.parametrize(("hidden", "expected"), [(1, 128), (128, 128), (129, 256), (3413, 3456), (5461, 5504)])
def test_hidden_widths_are_padded_to_a_multiple_of_128(hidden, expected):
    assert padded(hidden) == expected


def test_swiglu_padding_is_exactly_zero_and_the_rest_is_untouched(golden, rewritten):
    names = [name.removesuffix(".w3.weight") for name in rewritten if name.endswith(".w3.weight")]
    assert len(names) == golden.spec.num_layers + golden.spec.head_layers
    for name in names:
        w3 = stored(golden, f"{name}.w3.weight")
        hidden = w3.shape[1]
        assert rewritten[f"{name}.w3.weight"].shape[1] % HIDDEN_MULTIPLE == 0
        np.testing.assert_array_equal(rewritten[f"{name}.w3.weight"][:, :hidden], w3)
        assert not rewritten[f"{name}.w3.weight"][:, hidden:].any()
        for part in ("weight", "bias"):
            halves = np.split(rewritten[f"{name}.w12.{part}"], 2)
            for half, original in zip(halves, np.split(stored(golden, f"{name}.w12.{part}"), 2), strict=True):
                np.testing.assert_array_equal(half[:hidden], original)
                assert not half[hidden:].any()


@pytest.mark.parametrize(
    ("layer", "pieces", "folded"),
    [
        ("blocks.0", 6, {1: "norm1", 4: "norm2"}),
        ("blocks.1", 6, {1: "norm1", 4: "norm2"}),
        ("lm_head.transformer.0", 3, {1: "in_ln"}),
        ("lm_head.adaln_before_head", 2, {0: "norm_final"}),
    ],
)
def test_norm_weights_are_folded_into_the_scale_rows_and_nowhere_else(golden, rewritten, layer, pieces, folded):
    name = f"{layer}.adaLN_modulation.1"
    m = np.random.default_rng(0).standard_normal((5, stored(golden, f"{name}.weight").shape[1]), dtype=np.float32)
    expected = np.split(m @ stored(golden, f"{name}.weight").T + stored(golden, f"{name}.bias"), pieces, axis=1)
    found = np.split(m @ rewritten[f"{name}.weight"].T + rewritten[f"{name}.bias"], pieces, axis=1)
    for piece in range(pieces):
        if piece in folded:
            weight = stored(golden, f"{layer}.{folded[piece]}.weight")
            np.testing.assert_allclose(found[piece], weight * (1 + expected[piece]), **EXACT_ENOUGH)
        else:
            np.testing.assert_array_equal(found[piece], expected[piece])


def test_the_final_norm_is_folded_into_the_latent_projection(golden, rewritten):
    x = np.random.default_rng(1).standard_normal((5, golden.spec.hidden_size), dtype=np.float32)
    weight, bias = (stored(golden, f"latent_condition_proj.{part}") for part in ("weight", "bias"))
    expected = (x * stored(golden, "norm.weight")) @ weight.T + bias
    found = x @ rewritten["latent_condition_proj.weight"].T + rewritten["latent_condition_proj.bias"]
    np.testing.assert_allclose(found, expected, **EXACT_ENOUGH)


@torch.inference_mode()
def test_bit_embeddings_add_up_to_the_merged_embedding(golden, rewritten):
    bits = np.random.default_rng(2).integers(0, 2, (7, golden.spec.bits_per_token))
    reference = golden.reference
    expected = reference.input_merge(reference.input_embeddings(torch.from_numpy(bits)).flatten(1)).numpy()
    token = golden.spec.token_symbol
    found = rewritten["symbol_embedding"][token] + bits.astype(np.float32) @ rewritten["bit_embedding"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_the_heads_bit_embeddings_add_up_for_known_and_masked_bits(golden, rewritten):
    ids = np.random.default_rng(3).integers(0, 3, (7, golden.spec.bits_per_token))
    head = golden.reference.lm_head
    expected = head.input_proj(head.input_embed(torch.from_numpy(ids)).flatten(1)).numpy()
    state = np.concatenate((ids != 2, ids == 1), axis=1).astype(np.float32)
    found = rewritten["lm_head.masked_embedding"] + state @ rewritten["lm_head.bit_embedding"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_symbols_are_the_classes_then_the_first_position_then_a_token(golden, rewritten):
    first, token = golden.spec.first_position_symbol, golden.spec.token_symbol
    table = rewritten["symbol_embedding"]
    assert len(table) == token + 1 == first + 2
    np.testing.assert_array_equal(table[:first], stored(golden, "embeddings.weight"))
    np.testing.assert_array_equal(table[first], stored(golden, "cls_token")[0, 0])


def test_tables_are_cut_to_the_positions_in_use(golden, rewritten):
    rows = golden.spec.prefix_length + golden.spec.num_tokens
    for name in ("pos_embed", "target_aware_pos_embed", "timesteps_embeddings"):
        np.testing.assert_array_equal(rewritten[name], stored(golden, name)[0, :rows])
    for kind in ("cos", "sin"):
        np.testing.assert_array_equal(
            np.repeat(rewritten[f"rope_{kind}"], 2, axis=1), stored(golden, f"blocks.0.attn.rope.freqs_{kind}")
        )


def test_the_decoder_takes_bits_of_zero_and_one(golden, rewritten):
    bits = np.random.default_rng(4).integers(0, 2, (9, golden.spec.token_size)).astype(np.float32)
    weight, bias = (stored(golden, f"quantize.out_proj.{part}") for part in ("weight", "bias"))
    found = bits @ rewritten["quantize.out_proj.weight"].T + rewritten["quantize.out_proj.bias"]
    np.testing.assert_allclose(found, (2 * bits - 1) @ weight.T + bias, **EXACT_ENOUGH)


def test_what_is_not_rewritten_is_copied(golden, rewritten):
    copied = [name for name in rewritten if name.endswith((".attn.qkv.weight", ".attn.proj.bias", ".attn.proj.weight"))]
    copied += ["lm_head.output_embed.weight", "lm_head.t_embedder.W", "decoder.conv_out.weight"]
    assert len(copied) > 3 * golden.spec.num_layers
    for name in copied:
        np.testing.assert_array_equal(rewritten[name], stored(golden, name), err_msg=name)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_refused_wherever_it_is(patch1, value):
    sound = patch1.checkpoint
    for part in ("generator", "tokenizer"):
        for name, tensor in getattr(sound, part).items():
            damaged = tensor.clone()
            damaged.view(-1)[-1] = value
            checkpoint = replace(sound, **{part: {**getattr(sound, part), name: damaged}})
            with pytest.raises(CheckpointError, match=f"^{name} holds NaN or infinite"):
                for pending in Rewriter(checkpoint).pending.values():
                    pending.make()


@pytest.mark.parametrize("where", ["another block", "within a pair"])
def test_rotary_tables_that_differ_are_refused(patch1, where):
    sound = patch1.checkpoint
    damaged = sound.generator["blocks.0.attn.rope.freqs_cos"].clone()
    damaged[40, 3] += 0.25
    blocks = [2] if where == "another block" else range(sound.spec.num_layers)
    tables = {f"blocks.{i}.attn.rope.freqs_cos": damaged for i in blocks}
    rewriter = Rewriter(replace(sound, generator={**sound.generator, **tables}))
    with pytest.raises(CheckpointError, match="freqs_cos differs"):
        rewriter.pending["rope_cos"].make()
