"""Write a checkpoint with random weights in the shapes of a published variant, for timing without the real files.

    python -m bar_edge.benchmarks.random_checkpoint bar_b -o bar_b-random

makes generator.bin, tokenizer.bin and config.yaml. Nothing is zero by initialization, activations keep a scale of
about one, and the rotary tables are the real ones, so numbers stay finite and every product is really done.
"""

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
import yaml

from bar_edge.benchmarks.measure import replacing
from bar_edge.export.checkpoint import Tensors, generator_shapes, tokenizer_shapes
from bar_edge.runtime.spec import VARIANTS, ModelSpec, Recipe
from bar_edge.runtime.terminal import run_function

DECODER_WIDTH, DECODER_LAYERS = 1024, 24


def random_generator(spec: ModelSpec, seed: int = 0) -> Tensors:
    """Every tensor of a generator with these shapes, fp32."""
    rng = torch.Generator().manual_seed(seed)
    tensors = {name: _random(name, shape, rng) for name, shape in generator_shapes(spec).items()}
    cos, sin = rope_tables(spec)
    for i in range(spec.num_layers):
        tensors[f"blocks.{i}.attn.rope.freqs_cos"] = cos
        tensors[f"blocks.{i}.attn.rope.freqs_sin"] = sin
    return tensors


def random_tokenizer(
    spec: ModelSpec, width: int = DECODER_WIDTH, layers: int = DECODER_LAYERS, seed: int = 1
) -> Tensors:
    """The decoding half of a tokenizer that fits the generator, fp32."""
    rng = torch.Generator().manual_seed(seed)
    shapes = tokenizer_shapes(width, layers, spec.token_size, spec.image_seq_len, spec.decoder_patch_size)
    return {name: _random(name, shape, rng) for name, shape in shapes.items()}


def rope_tables(spec: ModelSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin [F+N, d]: identity for the prefix, then row and column of every token (docs/model.md section 2)."""
    grid = math.isqrt(spec.num_tokens)
    quarter = spec.head_dim // 4
    frequencies = 10000.0 ** (-2 * torch.arange(quarter) / (spec.head_dim / 2))
    rows, columns = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    angles = torch.cat([axis.flatten()[:, None] * frequencies for axis in (rows, columns)], dim=1)
    angles = angles.repeat_interleave(2, dim=1)
    angles = torch.cat((torch.zeros(spec.prefix_length, spec.head_dim), angles))
    return angles.cos(), angles.sin()


def config_of(spec: ModelSpec, recipe: Recipe) -> dict[str, object]:
    """A YAML in the authors' form."""
    return {
        "model": {
            "vq_model": {"token_size": spec.token_size, "vit_dec_patch_size": spec.decoder_patch_size},
            "generator": {
                "hidden_size": spec.hidden_size,
                "num_hidden_layers": spec.num_layers,
                "num_attention_heads": spec.num_heads,
                "image_seq_len": spec.image_seq_len,
                "condition_num_classes": spec.num_classes,
                "target_codebook_size": 2,
                "patch_size": spec.patch_size,
                "repeat_class_condition": spec.repeat_class_condition,
                "guidance_scale": recipe.guidance,
                "mbm_head": {
                    "width": spec.head_width,
                    "num_layers": spec.head_layers,
                    "randomize_temperature": recipe.temperature,
                    "tokens_allocation": list(recipe.allocation),
                },
            },
        },
        "dataset": {"preprocessing": {"crop_size": spec.image_size}},
    }


def write_checkpoint(folder: Path, spec: ModelSpec, recipe: Recipe, generator: Tensors, tokenizer: Tensors) -> None:
    """Write generator.bin, tokenizer.bin and config.yaml into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, tensors in (("generator.bin", generator), ("tokenizer.bin", tokenizer)):
        with replacing(folder / name) as partial, partial.open("wb") as file:
            torch.save(tensors, file)
    with replacing(folder / "config.yaml") as partial:
        partial.write_text(yaml.safe_dump(config_of(spec, recipe)), encoding="utf-8")


def _random(name: str, shape: tuple[int, ...], rng: torch.Generator) -> torch.Tensor:
    values = torch.randn(shape, generator=rng)
    if name.endswith(".bias"):
        return values * 0.02
    if len(shape) == 1 and name.endswith("weight"):  # a norm
        return 1 + 0.1 * values
    if "adaLN_modulation" in name:
        return values * (0.2 / math.sqrt(shape[1]))
    if len(shape) >= 2 and name.endswith("weight") and "embed" not in name.split(".")[-2]:
        return values / math.sqrt(math.prod(shape[1:]))
    return values * 0.5


def main(
    variant: Annotated[str, typer.Argument(help=f"one of {', '.join(VARIANTS)}")],
    output: Annotated[Path, typer.Option("-o", "--output", help="folder to write")],
) -> None:
    """Write a random checkpoint of a published variant."""
    if variant not in VARIANTS:
        raise typer.BadParameter(f"unknown variant {variant}; known: {', '.join(VARIANTS)}")
    known = VARIANTS[variant]
    write_checkpoint(output, known.spec, known.recipe, random_generator(known.spec), random_tokenizer(known.spec))
    typer.echo(f"wrote {output}/generator.bin, tokenizer.bin and config.yaml ({variant}, random weights)")


if __name__ == "__main__":
    run_function(main)
