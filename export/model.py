"""BAR in plain PyTorch, as trained: the reference that every other form is measured against.

Written the way the authors' sampler works, neither faster nor slower: conditional and unconditional rows run side by
side, the cache grows by concatenation, the modulation of every position is computed in the loop, and the head embeds
its mask ratio and modulates itself at every pass. Module attributes carry the checkpoint's names, so
`load_state_dict` is the whole loader. Section numbers are those of docs/model.md.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bar_edge.export.checkpoint import Checkpoint
from bar_edge.runtime.noise import NoiseSource
from bar_edge.runtime.sampling import guidance_at
from bar_edge.runtime.spec import DECODER_HEADS, LAYER_NORM_EPS, RMS_NORM_EPS, ModelSpec, Recipe


class RMSNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), self.weight.shape, None, RMS_NORM_EPS).to(x.dtype)
        return normed * self.weight


class SwiGLU(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w12 = nn.Linear(width, 2 * hidden)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(x1) * x2)


def modulation(width: int, pieces: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(width, pieces * width))


class Rope(nn.Module):
    def __init__(self, rows: int, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("freqs_cos", torch.empty(rows, head_dim))
        self.register_buffer("freqs_sin", torch.empty(rows, head_dim))

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rotate x [B, h, T, d] by table rows [B, T]; pairs are (even, odd) neighbours."""
        cos, sin = self.freqs_cos[rows].unsqueeze(1), self.freqs_sin[rows].unsqueeze(1)  # [B, 1, T, d]
        x0, x1 = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack((-x1, x0), dim=-1).flatten(-2)
        return x * cos + turned * sin


class Attention(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.heads = spec.num_heads
        self.qkv = nn.Linear(spec.hidden_size, 3 * spec.hidden_size)
        self.q_norm = RMSNorm(spec.head_dim)
        self.k_norm = RMSNorm(spec.head_dim)
        self.proj = nn.Linear(spec.hidden_size, spec.hidden_size)
        self.rope = Rope(spec.prefix_length + spec.num_tokens, spec.head_dim)

    def forward(
        self, x: Tensor, own: Tensor, target: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each [B, H, T, d]
        q, k = self.q_norm(q), self.k_norm(k)
        half = self.heads // 2  # the first half looks from where it is, the last half from where it predicts
        q = torch.cat((self.rope(q[:, :half], own), self.rope(q[:, half:], target)), dim=1)
        k = self.rope(k, own)
        if cache is not None:
            k, v = torch.cat((cache[0], k), dim=2), torch.cat((cache[1], v), dim=2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=cache is None)
        return self.proj(out.transpose(1, 2).reshape(b, t, width)), (k, v)


class Block(nn.Module):
    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.norm1 = RMSNorm(spec.hidden_size)
        self.attn = Attention(spec)
        self.norm2 = RMSNorm(spec.hidden_size)
        self.mlp = SwiGLU(spec.hidden_size)
        self.adaLN_modulation = modulation(spec.hidden_size, 6)

    def forward(
        self, x: Tensor, condition: Tensor, own: Tensor, target: Tensor, cache: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition).chunk(6, dim=-1)
        out, cache = self.attn(self.norm1(x) * (1 + scale1) + shift1, own, target, cache)
        x = x + gate1 * out
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2), cache


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.empty(256), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(512, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, mask_ratio: Tensor) -> Tensor:
        angle = mask_ratio[:, None] * self.W[None] * 2 * torch.pi
        return self.mlp(torch.cat((angle.sin(), angle.cos()), dim=-1).to(self.W.dtype))


class HeadBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = RMSNorm(width)
        self.mlp = SwiGLU(width)
        self.adaLN_modulation = modulation(width, 3)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate = self.adaLN_modulation(c).chunk(3, dim=-1)
        return x + gate * self.mlp(self.in_ln(x) * (1 + scale) + shift)


class FinalNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = RMSNorm(width)
        self.adaLN_modulation = modulation(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        scale, shift = self.adaLN_modulation(c).chunk(2, dim=-1)  # scale first, unlike the blocks
        return self.norm_final(x) * (1 + scale) + shift


class Head(nn.Module):
    """The masked-bit head, section 3: ids [B, K] in {0, 1, 2}, latent [B, W], mask_ratio [B] -> logits [B, K, 2]."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        width, bits = spec.head_width, spec.bits_per_token
        bit_width = -(-width // bits)
        self.input_embed = nn.Embedding(3, bit_width)
        self.input_proj = nn.Linear(bits * bit_width, width)
        self.ln_pre = RMSNorm(width)
        self.t_embedder = TimestepEmbedder(width)
        self.transformer = nn.ModuleList(HeadBlock(width) for _ in range(spec.head_layers))
        self.adaln_before_head = FinalNorm(width)
        self.output_embed = nn.Linear(width, 2 * bits)

    def forward(self, ids: Tensor, latent: Tensor, mask_ratio: Tensor) -> Tensor:
        x = self.ln_pre(self.input_proj(self.input_embed(ids).flatten(1)))
        c = F.silu(self.t_embedder(mask_ratio) + latent)
        for block in self.transformer:
            x = block(x, c)
        return self.output_embed(self.adaln_before_head(x, c)).unflatten(-1, (-1, 2))


class Generator(nn.Module):
    """The autoregressive trunk and its head, sections 2 to 4."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        d = spec.hidden_size
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.pos_embed = nn.Parameter(torch.empty(1, spec.num_tokens + 128, d))
        self.target_aware_pos_embed = nn.Parameter(torch.empty(1, spec.num_tokens + 128, d))
        self.timesteps_embeddings = nn.Parameter(torch.empty(1, spec.num_tokens + 100, d))
        self.embeddings = nn.Embedding(spec.num_classes + 4, d)
        bit_width = -(-d // spec.bits_per_token)
        self.input_embeddings = nn.Embedding(3, bit_width)
        self.input_merge = nn.Linear(bit_width * spec.bits_per_token, d)
        self.blocks = nn.ModuleList(Block(spec) for _ in range(spec.num_layers))
        self.norm = RMSNorm(d)
        self.latent_condition_proj = nn.Linear(d, spec.head_width)
        self.lm_head = Head(spec)

    def class_embedding(self, class_ids: Tensor) -> Tensor:
        """[B] -> [B, 1, D]. The id `spec.unconditional_class` selects the last row."""
        return self.embeddings(class_ids + 3).unsqueeze(1)

    def latents(
        self,
        x: Tensor,
        class_embedding: Tensor,
        start: int,
        own: Tensor,
        target: Tensor,
        caches: list[tuple[Tensor, Tensor]] | None,
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the trunk over T positions that begin at sequence position `start`.

        x [B, T, D] without positional tables, class_embedding [B, 1, D], own and target [B, T] table rows (F + grid
        index; the prefix's own rows are 0..F-1) -> latents [B, T, W] and the grown caches.
        """
        x = x + self.pos_embed[0, own] + self.target_aware_pos_embed[0, target]
        condition = class_embedding + self.timesteps_embeddings[:, start : start + x.shape[1]]
        grown = []
        for i, block in enumerate(self.blocks):
            x, cache = block(x, condition, own, target, None if caches is None else caches[i])
            grown.append(cache)
        return self.latent_condition_proj(self.norm(x)), grown

    def prefix_latents(self, class_ids: Tensor, first_target: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """class_ids [B], first_target [B] grid indices -> latents [B, F, W] and caches."""
        f, b = self.spec.prefix_length, class_ids.shape[0]
        embedding = self.class_embedding(class_ids)
        x = torch.cat((self.cls_token.expand(b, 1, -1), embedding.expand(-1, f - 1, -1)), dim=1)
        own = torch.arange(f, device=class_ids.device).expand(b, f)
        target = (f + first_target)[:, None].expand(b, f)
        return self.latents(x, embedding, 0, own, target, None)

    def token_latents(
        self,
        bits: Tensor,
        class_ids: Tensor,
        step: int,
        grid: Tensor,
        target: Tensor,
        caches: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """bits [B, K] of the token generated at `step`, at grid index grid [B], predicting target [B] -> [B, 1, W]."""
        f = self.spec.prefix_length
        x = self.input_merge(self.input_embeddings(bits.long()).flatten(1)).unsqueeze(1)
        own, target = f + grid[:, None], f + target[:, None]
        return self.latents(x, self.class_embedding(class_ids), f + step, own, target, caches)


def gumbel(u: Tensor) -> Tensor:
    """Gumbel noise from uniforms in [0, 1), float32 (section 4.3)."""
    return -torch.log(torch.clamp(-torch.log(torch.clamp(u, min=1e-20)), min=1e-20))


def sample_token(
    head: Head,
    latent: Tensor,
    guidance: float | None,
    recipe: Recipe,
    u_bits: Tensor,
    u_confidence: Tensor,
) -> Tensor:
    """Draw the K bits of one token (section 4.2).

    latent [B or 2B, W] (conditional rows first); guidance None runs conditional rows only; u_bits [S, B, K, 2] and
    u_confidence [S, B, K] are uniform in [0, 1). Returns bits [B, K] int64.
    """
    rows = latent.shape[0]
    images = rows if guidance is None else rows // 2
    bits = sum(recipe.allocation)
    passes = len(recipe.allocation)
    device = latent.device
    ids = torch.full((images, bits), 2, device=device)
    done = 0
    for s, count in enumerate(recipe.allocation):
        masked = ids == 2
        ratio = torch.full((rows,), 1 - done / bits, dtype=torch.float32, device=device)
        logits = head(ids if guidance is None else torch.cat((ids, ids)), latent, ratio).float()
        if guidance is not None:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + guidance * (conditional - unconditional)  # [B, K, 2]
        temperature = recipe.temperature * (1 - s / passes)
        drawn = torch.where(masked, (logits + temperature * gumbel(u_bits[s])).argmax(-1), ids)
        done += count
        if s == passes - 1:
            return drawn
        confidence = logits.gather(-1, drawn[..., None]).squeeze(-1).masked_fill(~masked, torch.inf)
        confidence = confidence + temperature * gumbel(u_confidence[s])
        left = torch.full((images,), round(bits * (1 - done / bits)), device=device)
        left = torch.clamp(torch.minimum(masked.sum(-1) - 1, left), min=1)
        cutoff = confidence.sort(dim=-1).values.gather(-1, left[:, None] - 1)
        ids = torch.where(confidence <= cutoff, 2, drawn)
    raise AssertionError("an allocation is never empty")


@torch.inference_mode()
def generate_bits(
    generator: Generator,
    class_ids: Sequence[int],
    recipe: Recipe,
    noise: NoiseSource,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample all tokens of B images on the generator's device: the authors' loop.

    class_ids [B]; `noise` gives the uniforms of every token and the generation order of every image. Returns bits
    [B, N, K] uint8, tokens in raster order. `progress(done, total)` is called per token.
    """
    spec, device = generator.spec, generator.cls_token.device
    conditional = torch.tensor(class_ids, device=device)
    images = len(class_ids)
    guided = recipe.guidance > 1
    rows = torch.cat((conditional, torch.full_like(conditional, spec.unconditional_class))) if guided else conditional
    copies = 2 if guided else 1
    order = torch.from_numpy(noise.orders(spec.num_tokens)).to(device)  # [B, N]
    uniforms = noise.uniforms(spec.num_tokens, len(recipe.allocation), spec.bits_per_token)
    u_bits, u_confidence = (torch.from_numpy(u).to(device) for u in uniforms)  # [N, S, B, K, 2], [N, S, B, K]
    latent, caches = generator.prefix_latents(rows, order[:, 0].repeat(copies))
    result = torch.empty(images, spec.num_tokens, spec.bits_per_token, dtype=torch.uint8, device=device)
    for n in range(spec.num_tokens):
        scale = guidance_at(n, recipe.guidance, spec.num_tokens) if guided else None
        drawn = sample_token(generator.lm_head, latent[:, -1], scale, recipe, u_bits[n], u_confidence[n])
        result[torch.arange(images, device=device), order[:, n]] = drawn.to(torch.uint8)
        if progress is not None:
            progress(n + 1, spec.num_tokens)
        if n + 1 < spec.num_tokens:
            grid, target = order[:, n].repeat(copies), order[:, n + 1].repeat(copies)
            latent, caches = generator.token_latents(drawn.repeat(copies, 1), rows, n, grid, target, caches)
    return result


class DecoderAttention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, DECODER_HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))


class DecoderMlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class DecoderBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.attn = DecoderAttention(width)
        self.norm2 = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.mlp = DecoderMlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _Decoder(nn.Module):
    def __init__(self, width: int, layers: int, cells: int, pixels: int) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(1, width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + cells, width))
        self.ln_pre = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.transformer = nn.ModuleList(DecoderBlock(width) for _ in range(layers))
        self.ln_post = nn.LayerNorm(width, LAYER_NORM_EPS)
        self.ffn = nn.Sequential(nn.Conv2d(width, 3 * pixels**2, 1))
        self.conv_out = nn.Conv2d(3, 3, 3, padding=1)


class Decoder(nn.Module):
    """The tokenizer's decoder, section 5: bits of the fine grid [B, cells, token_size] -> image [B, 3, H, W].

    The image is as it leaves `conv_out`, about -1 to 1; `runtime.sampling.to_uint8` makes pixels of it.
    """

    def __init__(self, width: int, layers: int, token_size: int, cells: int, pixels: int) -> None:
        super().__init__()
        self.pixels = pixels
        self.quantize = nn.ModuleDict({"out_proj": nn.Linear(token_size, width)})
        self.decoder = _Decoder(width, layers, cells, pixels)

    def forward(self, bits: Tensor) -> Tensor:
        d = self.decoder
        x = self.quantize["out_proj"](bits.to(d.class_embedding.dtype) * 2 - 1)  # [B, cells, width]
        x = torch.cat((d.class_embedding.expand(x.shape[0], 1, -1), x), dim=1) + d.positional_embedding
        x = d.ln_pre(x)
        for block in d.transformer:
            x = block(x)
        x = d.ln_post(x[:, 1:])
        grid = int(x.shape[1] ** 0.5)
        x = d.ffn(x.transpose(1, 2).unflatten(-1, (grid, grid)))  # [B, p*p*3, grid, grid]
        x = x.unflatten(1, (self.pixels, self.pixels, 3)).permute(0, 3, 4, 1, 5, 2)  # [B, 3, grid, p, grid, p]
        return d.conv_out(x.flatten(4, 5).flatten(2, 3))


def build_generator(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Generator:
    """The reference generator with the checkpoint's weights, in eval mode."""
    with torch.device("meta"):
        model = Generator(checkpoint.spec)
    model.load_state_dict({k: v.to(dtype) for k, v in checkpoint.generator.items()}, assign=True)
    return model.eval()


def build_decoder(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> Decoder:
    """The reference decoder with the checkpoint's weights, in eval mode."""
    width, token_size = checkpoint.tokenizer["quantize.out_proj.weight"].shape
    layers = sum(name.endswith(".norm1.weight") for name in checkpoint.tokenizer)
    with torch.device("meta"):
        model = Decoder(width, layers, token_size, checkpoint.spec.image_seq_len, checkpoint.spec.decoder_patch_size)
    model.load_state_dict({k: v.to(dtype) for k, v in checkpoint.tokenizer.items()}, assign=True)
    return model.eval()
