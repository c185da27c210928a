"""The reference model against what the authors' implementation recorded."""

import numpy as np
import pytest
import torch

from bar_edge.benchmarks.random_checkpoint import rope_tables
from bar_edge.export.checkpoint import load_checkpoint, read_tokenizer
from bar_edge.export.model import Decoder, build_decoder, build_generator, generate_bits
from bar_edge.runtime.noise import SeededNoise
from bar_edge.runtime.sampling import to_fine_grid, to_uint8

LATENT_TOLERANCE, LOGIT_TOLERANCE, IMAGE_TOLERANCE = 1e-5, 1e-4, 1e-5


@torch.inference_mode()
def latents_token_by_token(model, class_ids, tokens, orders):
    """[B, N, W]: the latent that conditions each token, given the tokens [B, N, K] before it in their order [B, N]."""
    latent, caches = model.prefix_latents(class_ids, orders[:, 0])
    result = [latent[:, -1]]
    for n in range(model.spec.num_tokens - 1):
        latent, caches = model.token_latents(tokens[:, n], class_ids, n, orders[:, n], orders[:, n + 1], caches)
        result.append(latent[:, -1])
    return torch.stack(result, dim=1).numpy()


def test_latents_in_raster_order(golden):
    recorded = golden.recorded("forward")
    tokens = torch.from_numpy(recorded["teacher_tokens"])
    orders = torch.arange(golden.spec.num_tokens).expand(len(tokens), -1)
    conditional = torch.from_numpy(recorded["class_ids"])
    unconditional = torch.full_like(conditional, golden.spec.unconditional_class)
    for class_ids, expected in ((conditional, "latents_cond"), (unconditional, "latents_uncond")):
        found = latents_token_by_token(golden.reference, class_ids, tokens, orders)
        np.testing.assert_allclose(found, recorded[expected], rtol=0, atol=LATENT_TOLERANCE)


def test_latents_in_random_order(golden):
    recorded = golden.recorded("forward_random_order")
    tokens, orders = (torch.from_numpy(recorded[name]) for name in ("tokens_in_order", "orders"))
    found = latents_token_by_token(golden.reference, torch.from_numpy(recorded["class_ids"]), tokens, orders)
    np.testing.assert_allclose(found, recorded["latents_cond"], rtol=0, atol=LATENT_TOLERANCE)


@torch.inference_mode()
def test_head_logits(golden):
    recorded = golden.recorded("forward")
    found = golden.reference.lm_head(
        torch.from_numpy(recorded["head_ids"]).long(),
        torch.from_numpy(recorded["head_conditions"]),
        torch.from_numpy(recorded["head_mask_ratio"]),
    )
    np.testing.assert_allclose(found.numpy(), recorded["head_logits"], rtol=0, atol=LOGIT_TOLERANCE)


def test_recorded_samplings_are_drawn_again_bit_by_bit(golden, sampling, read_sampling):
    recorded = golden.recorded(sampling)
    recipe, noise = read_sampling(recorded)
    found = generate_bits(golden.reference, recorded["class_ids"].tolist(), recipe, noise)
    np.testing.assert_array_equal(to_fine_grid(found.numpy(), golden.spec), recorded["ids"])


def test_progress_is_told_after_every_token(patch1, read_sampling):
    recorded = patch1.recorded("sample_nocfg")
    told = []
    generate_bits(
        patch1.reference, recorded["class_ids"].tolist(), *read_sampling(recorded), lambda *args: told.append(args)
    )
    assert told == [(n, 16) for n in range(1, 17)]


@pytest.mark.parametrize(
    ("name", "generator", "bits", "cells"), [("decoder_6bit", "patch1", 6, 16), ("decoder_10bit_clip", "", 10, 64)]
)
@torch.inference_mode()
def test_decoder_images(data, cases, name, generator, bits, cells):
    folder = data / "golden" / name
    with np.load(folder / "decode.npz") as stored:
        recorded = dict(stored)
    if generator:
        decoder = cases(generator).decoder
    else:  # no golden generator has this grid
        tensors = read_tokenizer(folder / "tokenizer.bin")
        layers = sum(key.endswith(".norm1.weight") for key in tensors)
        decoder = Decoder(tensors["quantize.out_proj.weight"].shape[0], layers, bits, cells, 16)
        decoder.load_state_dict(tensors)
    image = decoder(torch.from_numpy(recorded["bits"])).numpy()
    np.testing.assert_allclose(image, recorded["image"], rtol=0, atol=IMAGE_TOLERANCE)
    quantized = decoder.quantize["out_proj"](torch.from_numpy(recorded["bits"]).float() * 2 - 1)
    np.testing.assert_allclose(quantized.numpy(), recorded["quantized"], rtol=0, atol=IMAGE_TOLERANCE)


@torch.inference_mode()
def test_recorded_digits_are_drawn_again(digits, read_sampling):
    recorded = digits.recorded("reference_samples")
    recipe, noise = read_sampling(recorded)
    assert recipe == digits.checkpoint.recipe
    found = generate_bits(digits.reference, recorded["class_ids"].tolist(), recipe, noise)
    bits = to_fine_grid(found.numpy(), digits.spec)
    np.testing.assert_array_equal(bits, recorded["ids"])
    images = to_uint8(digits.decoder(torch.from_numpy(bits)).numpy())
    assert np.abs(images.astype(int) - recorded["images"]).max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_copy_in_half_precision_is_computed_in_float32_from_its_stored_values(tmp_path, patch1, dtype):
    stored = {name: tensor.to(dtype) for name, tensor in patch1.checkpoint.generator.items()}
    torch.save(stored, tmp_path / "half.bin")
    model = build_generator(load_checkpoint(tmp_path / "half.bin", patch1.tokenizer, patch1.config))
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, stored[name].float()), name


def test_building_the_model_leaves_the_checkpoint_as_it_was(patch1):
    before = {name: tensor.clone() for name, tensor in patch1.checkpoint.tokenizer.items()}
    build_decoder(patch1.checkpoint, torch.bfloat16)
    assert all(torch.equal(patch1.checkpoint.tokenizer[name], tensor) for name, tensor in before.items())


def test_rotary_tables_are_those_of_the_recorded_checkpoints(golden):
    for kind, expected in zip(("cos", "sin"), rope_tables(golden.spec), strict=True):
        found = golden.checkpoint.generator[f"blocks.0.attn.rope.freqs_{kind}"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_sampling_stays_on_the_models_device(golden):
    """A tensor made on the CPU would meet one of another device, which PyTorch refuses."""
    model = build_generator(golden.checkpoint).to("meta")
    recipe = golden.bundle.recipe
    drawn = generate_bits(model, [1, 0], recipe, SeededNoise(0, [0, 1]))
    assert drawn.device.type == "meta"
    assert drawn.shape == (2, golden.spec.num_tokens, golden.spec.bits_per_token)
