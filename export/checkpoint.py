"""Reading what a user has: a generator `.bin`, its YAML and a tokenizer `.bin`, safely and completely.

`load_checkpoint` returns the shapes (`ModelSpec`), the sampling recipe and the named tensors, or raises
CheckpointError naming what is wrong. It never runs code from a file: pickles are read with `weights_only=True`,
which is safe from torch 2.10 on (earlier releases had remote code execution and heap corruption). Tensor names and
shapes are those of docs/model.md section 1; nothing is computed here.
"""

import math
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from packaging.version import Version

from bar_edge.export.settings import check_config, choose_recipe, first_line, listing, read_config
from bar_edge.runtime.errors import CheckpointError
from bar_edge.runtime.spec import DECODER_HEADS, ModelSpec, Recipe, find_variant

Tensors = dict[str, torch.Tensor]

_WRAPPERS = ("_orig_mod.", "module.")
_NESTING_KEYS = ("model", "state_dict", "ema")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MINIMUM_TORCH = Version("2.10")
_EXPECTED = "a state dict of tensors alone is needed, saved by torch.save (.pt, .bin) or as .safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A generator and tokenizer that were checked to fit together.

    `generator` and `tokenizer` map checkpoint names to tensors in their stored dtype (fp32, fp16 or bf16), memory
    mapped where the file allows it. `variant` is the published name or None.
    """

    spec: ModelSpec
    recipe: Recipe
    variant: str | None
    generator: Tensors
    tokenizer: Tensors


def load_checkpoint(
    generator: Path, tokenizer: Path, config: Path | None = None, overrides: Iterable[str] = ()
) -> Checkpoint:
    """Read and check a generator with its tokenizer.

    Args:
        generator: `.bin`/`.pt` (a pickled state dict) or `.safetensors`.
        tokenizer: the same; only `decoder.*` and `quantize.out_proj.*` are kept.
        config: the authors' YAML. Optional for the published variants, which their tensor shapes identify.
        overrides: `dotted.key=value` settings applied over the YAML; only those that are read.

    Raises:
        CheckpointError: unreadable file, missing, extra or misshaped tensors, or a generator and a tokenizer that
            do not belong together.
    """
    overrides = list(overrides)
    overridden = {override.partition("=")[0] for override in overrides}
    tokenizer_tensors = read_tokenizer(tokenizer)
    generator_tensors = _with_shared_tables(read_state_dict(generator))
    settings = read_config(config, overrides)
    spec = infer_spec(generator_tensors, tokenizer_tensors, generator, tokenizer)
    check_config(spec, settings, overridden, generator)
    _check_tensors(generator_tensors, generator_shapes(spec), generator)
    variant = find_variant(spec)
    recipe = choose_recipe(settings, variant.recipe if variant else None, overridden, spec)
    return Checkpoint(spec, recipe, variant.name if variant else None, generator_tensors, tokenizer_tensors)


def read_state_dict(path: Path) -> Tensors:
    """Read a flat state dict and strip wrapper prefixes key by key.

    Returns tensors in their stored dtype, on the CPU, memory mapped where possible. Raises CheckpointError.
    """
    if not path.is_file():
        found = "not a plain file" if path.exists() else "no such file"
        raise CheckpointError(f"{path}: {found}; {_EXPECTED}")
    if path.suffix == ".safetensors":
        try:
            loaded: Any = safetensors.torch.load_file(path)
        except OSError as error:
            raise _unreadable(path, error) from error
        except Exception as error:
            raise CheckpointError(f"{path}: not a readable safetensors file ({first_line(error)})") from error
    else:
        loaded = _read_pickle(path)
    flat = _strip_prefixes(_unnest(loaded, path), path)
    bad = [name for name, tensor in flat.items() if tensor.dtype not in _FLOATS]
    if bad:
        kinds = sorted({str(flat[name].dtype) for name in bad})
        raise CheckpointError(
            f"{path}: {listing(bad)} stored as {', '.join(kinds)}; weights must be float32, float16 or bfloat16"
        )
    return flat


def read_tokenizer(path: Path) -> Tensors:
    """Read a tokenizer and keep what decoding needs, checked for completeness.

    The encoder, `quantize.in_proj` and `decoder.clip_projector` take no part in decoding and are skipped.
    """
    everything = read_state_dict(path)
    kept = {
        name: tensor
        for name, tensor in everything.items()
        if (name.startswith("decoder.") and not name.startswith("decoder.clip_projector."))
        or name.startswith("quantize.out_proj.")
    }
    if not kept:
        raise CheckpointError(f"{path}: holds no decoder.* tensors; is this the tokenizer's file?")
    _check_tensors(kept, _tokenizer_shapes(kept, path), path)
    return kept


def infer_spec(generator: Tensors, tokenizer: Tensors, generator_path: Path, tokenizer_path: Path) -> ModelSpec:
    """Read every size off the tensors. Raises CheckpointError if a defining tensor is missing or sizes disagree."""
    defining = {
        "cls_token": 3, "pos_embed": 3, "embeddings.weight": 2, "blocks.0.attn.q_norm.weight": 1,
        "blocks.0.attn.rope.freqs_cos": 2, "lm_head.output_embed.weight": 2, "lm_head.ln_pre.weight": 1,
    }  # fmt: skip
    missing = [name for name in defining if name not in generator]
    if missing:
        hint = " (this looks like a tokenizer)" if any(name.startswith("decoder.") for name in generator) else ""
        raise CheckpointError(f"{generator_path}: not a BAR generator{hint}; missing {listing(missing)}")
    _check_ranks(generator, defining, generator_path)
    hidden_size = generator["cls_token"].shape[-1]
    head_dim = generator["blocks.0.attn.q_norm.weight"].shape[0]
    num_tokens = generator["pos_embed"].shape[1] - 128
    prefix_length = generator["blocks.0.attn.rope.freqs_cos"].shape[0] - num_tokens
    bits_per_token = generator["lm_head.output_embed.weight"].shape[0] // 2
    token_size = tokenizer["quantize.out_proj.weight"].shape[1]
    cells = tokenizer["decoder.positional_embedding"].shape[0] - 1
    pixels = math.isqrt(tokenizer["decoder.ffn.0.weight"].shape[0] // 3)
    patch_size = math.isqrt(bits_per_token // token_size)
    if patch_size < 1 or patch_size**2 * token_size != bits_per_token:
        raise CheckpointError(
            f"{generator_path} draws {bits_per_token} bits per token, {tokenizer_path} decodes {token_size} bits per "
            f"cell: no patch size makes these fit. Use the tokenizer the generator was trained with"
        )
    image_seq_len = num_tokens * patch_size**2
    if image_seq_len != cells:
        raise CheckpointError(
            f"{generator_path} draws {image_seq_len} cells an image, {tokenizer_path} decodes {cells}: "
            f"they were trained for different resolutions. Use the tokenizer the generator was trained with"
        )
    if min(num_tokens, prefix_length - 1) < 1 or math.isqrt(num_tokens) ** 2 != num_tokens:
        raise CheckpointError(f"{generator_path}: {num_tokens} tokens do not form a square grid; only those are known")
    if math.isqrt(cells) ** 2 != cells or hidden_size % head_dim:
        raise CheckpointError(f"{generator_path}: sizes are inconsistent (D={hidden_size}, d={head_dim}, {cells=})")
    return ModelSpec(
        hidden_size=hidden_size,
        num_layers=_count(generator, r"blocks\.(\d+)\."),
        num_heads=hidden_size // head_dim,
        image_seq_len=image_seq_len,
        token_size=token_size,
        patch_size=patch_size,
        num_classes=generator["embeddings.weight"].shape[0] - 4,
        repeat_class_condition=prefix_length - 1,
        head_width=generator["lm_head.ln_pre.weight"].shape[0],
        head_layers=_count(generator, r"lm_head\.transformer\.(\d+)\."),
        decoder_patch_size=pixels,
    )


def generator_shapes(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Every tensor of a generator with these sizes, by checkpoint name (docs/model.md sections 2 and 3)."""
    d, w, k = spec.hidden_size, spec.head_width, spec.bits_per_token
    hidden, head_hidden = int(2 / 3 * 4 * d), int(2 / 3 * 4 * w)
    rows = spec.prefix_length + spec.num_tokens
    bit_width, head_bit_width = math.ceil(d / k), math.ceil(w / k)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, spec.num_tokens + 128, d),
        "target_aware_pos_embed": (1, spec.num_tokens + 128, d),
        "timesteps_embeddings": (1, spec.num_tokens + 100, d),
        "embeddings.weight": (spec.num_classes + 4, d),
        "input_embeddings.weight": (3, bit_width),
        **_linear("input_merge", d, k * bit_width),
        "norm.weight": (d,),
        **_linear("latent_condition_proj", w, d),
        "lm_head.input_embed.weight": (3, head_bit_width),
        **_linear("lm_head.input_proj", w, k * head_bit_width),
        "lm_head.ln_pre.weight": (w,),
        "lm_head.t_embedder.W": (256,),
        **_linear("lm_head.t_embedder.mlp.0", w, 512),
        **_linear("lm_head.t_embedder.mlp.2", w, w),
        "lm_head.adaln_before_head.norm_final.weight": (w,),
        **_linear("lm_head.adaln_before_head.adaLN_modulation.1", 2 * w, w),
        **_linear("lm_head.output_embed", 2 * k, w),
    }
    for i in range(spec.num_layers):
        block = f"blocks.{i}"
        shapes |= {
            f"{block}.norm1.weight": (d,),
            **_linear(f"{block}.attn.qkv", 3 * d, d),
            f"{block}.attn.q_norm.weight": (spec.head_dim,),
            f"{block}.attn.k_norm.weight": (spec.head_dim,),
            **_linear(f"{block}.attn.proj", d, d),
            f"{block}.attn.rope.freqs_cos": (rows, spec.head_dim),
            f"{block}.attn.rope.freqs_sin": (rows, spec.head_dim),
            f"{block}.norm2.weight": (d,),
            **_linear(f"{block}.mlp.w12", 2 * hidden, d),
            **_linear(f"{block}.mlp.w3", d, hidden),
            **_linear(f"{block}.adaLN_modulation.1", 6 * d, d),
        }
    for i in range(spec.head_layers):
        block = f"lm_head.transformer.{i}"
        shapes |= {
            f"{block}.in_ln.weight": (w,),
            **_linear(f"{block}.mlp.w12", 2 * head_hidden, w),
            **_linear(f"{block}.mlp.w3", w, head_hidden),
            **_linear(f"{block}.adaLN_modulation.1", 3 * w, w),
        }
    return shapes


def tokenizer_shapes(width: int, layers: int, token_size: int, cells: int, pixels: int) -> dict[str, tuple[int, ...]]:
    """Every tensor that decoding needs (docs/model.md section 5), for `cells` cells of `pixels` x `pixels` pixels."""
    shapes: dict[str, tuple[int, ...]] = {
        **_linear("quantize.out_proj", width, token_size),
        "decoder.class_embedding": (1, width),
        "decoder.positional_embedding": (1 + cells, width),
        **_norm("decoder.ln_pre", width),
        **_norm("decoder.ln_post", width),
        "decoder.ffn.0.weight": (3 * pixels**2, width, 1, 1),
        "decoder.ffn.0.bias": (3 * pixels**2,),
        "decoder.conv_out.weight": (3, 3, 3, 3),
        "decoder.conv_out.bias": (3,),
    }
    for i in range(layers):
        block = f"decoder.transformer.{i}"
        shapes |= {
            **_norm(f"{block}.norm1", width),
            **_linear(f"{block}.attn.qkv", 3 * width, width),
            **_linear(f"{block}.attn.proj", width, width),
            **_norm(f"{block}.norm2", width),
            **_linear(f"{block}.mlp.fc1", 4 * width, width),
            **_linear(f"{block}.mlp.fc2", width, 4 * width),
        }
    return shapes


def _linear(name: str, out_features: int, in_features: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}


def _norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({error.strerror or error}); copy it again if it was cut short, else see to its "
        "permissions and disk"
    )


def _read_pickle(path: Path) -> Any:
    if Version(torch.__version__).release < _MINIMUM_TORCH.release:
        raise CheckpointError(
            f"{path}: torch {torch.__version__} reads pickles unsafely; install torch >= {_MINIMUM_TORCH}, "
            "or convert the file to .safetensors"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of files that are refused right after
            return _load(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    except Exception as error:  # torch's own messages advise to execute what is in the file
        refused = re.search(r"GLOBAL (\S+)", str(error))
        found = f"holds {refused[1]}, which was not loaded" if refused else "not a checkpoint of PyTorch, or cut short"
        raise CheckpointError(f"{path}: {found}; {_EXPECTED}") from error


def _load(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):  # the format of torch < 1.6 cannot be memory mapped
            raise
    return torch.load(path, map_location="cpu", weights_only=True)


def _unnest(loaded: Any, path: Path) -> Mapping[str, torch.Tensor]:
    if not isinstance(loaded, Mapping) or not loaded:
        raise CheckpointError(f"{path}: holds a {type(loaded).__name__}, expected a state dict of named tensors")
    if all(isinstance(value, torch.Tensor) for value in loaded.values()):
        return loaded
    nested = [key for key in _NESTING_KEYS if isinstance(loaded.get(key), Mapping)]
    if len(nested) == 1:
        return _unnest(loaded[nested[0]], path)
    if nested:
        raise CheckpointError(
            f"{path}: holds several state dicts ({', '.join(nested)}); save the one you want alone: "
            f"torch.save(torch.load({path.name!r}, weights_only=True)[{nested[-1]!r}], 'chosen.bin')"
        )
    odd = [str(key) for key, value in loaded.items() if not isinstance(value, torch.Tensor)]
    raise CheckpointError(f"{path}: not a flat state dict; entries that are not tensors: {listing(odd)}")


def _strip_prefixes(tensors: Mapping[str, torch.Tensor], path: Path) -> Tensors:
    flat: Tensors = {}
    for key, tensor in tensors.items():
        name = str(key)
        while name.startswith(_WRAPPERS):
            name = name[name.index(".") + 1 :]
        if name in flat:
            raise CheckpointError(f"{path}: {name} is there twice, with and without a wrapper's prefix")
        flat[name] = tensor
    return flat


def _tokenizer_shapes(tensors: Tensors, path: Path) -> dict[str, tuple[int, ...]]:
    defining = {"quantize.out_proj.weight": 2, "decoder.positional_embedding": 2, "decoder.ffn.0.weight": 4}
    missing = [name for name in defining if name not in tensors]
    if missing:
        raise CheckpointError(f"{path}: not a BAR tokenizer; missing {listing(missing)}")
    _check_ranks(tensors, defining, path)
    width, token_size = tensors["quantize.out_proj.weight"].shape
    if width % DECODER_HEADS:
        raise CheckpointError(f"{path}: decoder width {width} does not divide into {DECODER_HEADS} heads")
    pixels = math.isqrt(tensors["decoder.ffn.0.weight"].shape[0] // 3)
    cells = tensors["decoder.positional_embedding"].shape[0] - 1
    return tokenizer_shapes(width, _count(tensors, r"decoder\.transformer\.(\d+)\."), token_size, cells, pixels)


def _check_ranks(tensors: Tensors, ranks: dict[str, int], path: Path) -> None:
    """Sizes are read off these tensors: they must have the dimensions expected, none of them empty."""
    wrong = [
        f"{name} has shape {list(tensors[name].shape)}, expected {rank} dimensions"
        for name, rank in ranks.items()
        if tensors[name].ndim != rank or not tensors[name].numel()
    ]
    if wrong:
        raise CheckpointError(f"{path}: tensors do not fit the model: {listing(wrong, '; ')}")


def _with_shared_tables(tensors: Tensors) -> Tensors:
    """Rotary tables are equal in all blocks; writers that drop shared tensors keep only one of them."""
    shared = {
        kind: next((t for name, t in tensors.items() if name.endswith(f".attn.rope.{kind}")), None)
        for kind in ("freqs_cos", "freqs_sin")
    }
    blocks = {name.split(".")[1] for name in tensors if re.match(r"blocks\.\d+\.attn\.qkv\.weight", name)}
    filled = {
        f"blocks.{block}.attn.rope.{kind}": table
        for block in blocks
        for kind, table in shared.items()
        if table is not None
    }
    return {**filled, **tensors}


def _check_tensors(tensors: Tensors, expected: dict[str, tuple[int, ...]], path: Path) -> None:
    problems = [f"{name} missing, expected {list(shape)}" for name, shape in expected.items() if name not in tensors]
    problems += [
        f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    problems += [f"{name} {list(tensors[name].shape)} is unknown" for name in tensors if name not in expected]
    if problems:
        raise CheckpointError(f"{path}: tensors do not fit the model: {listing(problems, '; ')}")


def _count(tensors: Tensors, pattern: str) -> int:
    found = {int(match.group(1)) for name in tensors if (match := re.match(pattern, name))}
    return min(max(found, default=-1) + 1, len(tensors))  # an absurd index is reported as unknown, not allocated
