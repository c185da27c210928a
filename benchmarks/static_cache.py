"""The reference model with a preallocated KV cache and fixed shapes: what `torch.compile` can make one graph of.

The modules and weights are those of `export/model.py`; only attention is replaced. The step of a token is two compiled
functions, trunk and head, that see the same shapes at every token. On a GPU they are replayed as CUDA graphs, and the
prefix, which is not compiled, as well: our engines replay theirs, so launches from the host would be what is compared.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bar_edge.export.model import Attention, Generator, sample_token
from bar_edge.runtime.errors import EngineError
from bar_edge.runtime.noise import NoiseSource
from bar_edge.runtime.sampling import guidance_at
from bar_edge.runtime.spec import Recipe

_WARM_UPS = 3  # the first compiles, all load kernels and allocate what a capture may not
# A function of tensors at fixed addresses -> what computes it again, and the tensor where the result then is.
Capture = Callable[[Callable[[], Tensor]], tuple[Callable[[], None], Tensor]]


def compile_static(function: Callable[..., Any]) -> Any:
    """One graph for one set of shapes."""
    return torch.compile(function, dynamic=False, fullgraph=True)


def capture_cuda(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """A CUDA graph of what `function` launches.

    The function runs several times before that: doing again what it did must change nothing. Raises EngineError if it
    does what cannot be captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            output = function()
    except Exception as error:
        cause = error.__context__ or error  # the end of a broken capture raises once more
        raise EngineError(
            f"PyTorch did what a CUDA graph cannot hold ({type(cause).__name__}: {cause}); launched from the host it "
            "would be no fair baseline, so leave this form out"
        ) from error
    return graph.replay, output


class Captured:
    """A function of tensors, captured when shapes are new and replayed from then on.

    What a call returns is overwritten by the next one.
    """

    def __init__(self, function: Callable[..., Tensor], capture_with: Capture = capture_cuda) -> None:
        self._function, self._capture_with = function, capture_with
        self._inputs: tuple[Tensor, ...] = ()  # at the addresses that were captured

    def __call__(self, *arguments: Tensor) -> Tensor:
        """Raises EngineError if the function cannot be captured."""
        if [given.shape for given in arguments] != [held.shape for held in self._inputs]:
            inputs = tuple(given.clone() for given in arguments)
            self._replay, self._output = self._capture_with(lambda: self._function(*inputs))
            self._inputs = inputs
        for held, given in zip(self._inputs, arguments, strict=True):
            held.copy_(given)
        self._replay()
        return self._output


class StaticAttention(nn.Module):
    """The reference's attention over a cache [rows, H, F+N, d] that is written in place."""

    def __init__(self, attention: Attention, rows: int, positions: int, head_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner = attention
        shape = (rows, attention.heads, positions, head_dim)
        device = attention.qkv.weight.device
        self.register_buffer("k", torch.zeros(shape, dtype=dtype, device=device), persistent=False)
        self.register_buffer("v", torch.zeros(shape, dtype=dtype, device=device), persistent=False)

    def forward(self, x: Tensor, own: Tensor, target: Tensor, positions: Tensor) -> tuple[Tensor, None]:
        """x [rows, T, D], positions [T] -> [rows, T, D]; the second value stands for the cache nobody passes on."""
        a = self.inner
        b, t, width = x.shape
        q, k, v = a.qkv(x).view(b, t, 3, a.heads, -1).permute(2, 0, 3, 1, 4)  # each [rows, H, T, d]
        q, k = a.q_norm(q), a.k_norm(k)
        half = a.heads // 2
        q = torch.cat((a.rope(q[:, :half], own), a.rope(q[:, half:], target)), dim=1)
        self.k.index_copy_(2, positions, a.rope(k, own))
        self.v.index_copy_(2, positions, v)
        seen = torch.arange(self.k.shape[2], device=x.device) <= positions[:, None]  # [T, F+N]
        out = F.scaled_dot_product_attention(q, self.k, self.v, attn_mask=seen)
        return a.proj(out.transpose(1, 2).reshape(b, t, width)), None


class StaticCacheSampler:
    """Samples batches of a fixed number of images with a fixed recipe. Takes the generator over: it serves nobody else.

    `compile_with` turns a function into the one that runs; tests pass the identity. `capture_with` captures what was
    compiled and the prefix; None captures on a GPU only.
    """

    def __init__(
        self,
        generator: Generator,
        images: int,
        recipe: Recipe,
        compile_with: Callable[..., Any] = compile_static,
        capture_with: Capture | None = None,
    ) -> None:
        self.spec, self.recipe, self._model = generator.spec, recipe, generator
        self._guided = recipe.guidance > 1
        rows = images * (2 if self._guided else 1)
        dtype = generator.cls_token.dtype
        positions = self.spec.prefix_length + self.spec.num_tokens
        for block in generator.blocks:
            attention = block.attn.inner if isinstance(block.attn, StaticAttention) else block.attn
            block.attn = StaticAttention(attention, rows, positions, self.spec.head_dim, dtype)
        if capture_with is None and generator.cls_token.is_cuda:
            capture_with = capture_cuda
        functions = (self._prefix, compile_with(self._trunk), compile_with(self._head))
        self.prefix, self.trunk, self.head = (
            function if capture_with is None else Captured(function, capture_with) for function in functions
        )

    @torch.inference_mode()
    def sample(
        self, class_ids: Sequence[int], noise: NoiseSource, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """class_ids [B] -> bits [B, N, K] uint8, tokens in raster order; drawn in that order."""
        spec, model = self.spec, self._model
        device = model.cls_token.device
        rows = torch.tensor(class_ids, device=device)
        if self._guided:
            rows = torch.cat((rows, torch.full_like(rows, spec.unconditional_class)))
        uniforms = noise.uniforms(spec.num_tokens, len(self.recipe.allocation), spec.bits_per_token)
        u_bits, u_confidence = (torch.from_numpy(u).to(device) for u in uniforms)
        embedding = model.class_embedding(rows)  # [rows, 1, D]
        scales = torch.tensor(
            [guidance_at(n, self.recipe.guidance, spec.num_tokens) for n in range(spec.num_tokens)], device=device
        )
        steps = torch.arange(spec.num_tokens, device=device)
        drawn, latent = [], self.prefix(embedding)
        for n in range(spec.num_tokens):
            bits = self.head(latent, scales[n], u_bits[n], u_confidence[n])
            drawn.append(bits.to(torch.uint8))  # a copy: a captured head overwrites its bits
            if progress is not None:
                progress(n + 1, spec.num_tokens)
            if n + 1 < spec.num_tokens:
                latent = self.trunk(bits, embedding, steps[n : n + 1])
        return torch.stack(drawn, dim=1)

    def _prefix(self, embedding: Tensor) -> Tensor:
        """embedding [rows, 1, D] -> latent [rows, W] of the first token; fills the cache. Not compiled."""
        f, b = self.spec.prefix_length, embedding.shape[0]
        x = torch.cat((self._model.cls_token.expand(b, 1, -1), embedding.expand(-1, f - 1, -1)), dim=1)
        own = torch.arange(f, device=embedding.device)
        return self._latent(x, embedding, own, own, torch.full_like(own, f))

    def _trunk(self, bits: Tensor, embedding: Tensor, token: Tensor) -> Tensor:
        """bits [B, K] of grid index `token` [1] -> latent [rows, W] that conditions the next."""
        model = self._model
        bits = bits.repeat(embedding.shape[0] // bits.shape[0], 1)
        x = model.input_merge(model.input_embeddings(bits).flatten(1)).unsqueeze(1)
        position = self.spec.prefix_length + token
        return self._latent(x, embedding, position, position, position + 1)

    def _latent(self, x: Tensor, embedding: Tensor, positions: Tensor, own: Tensor, target: Tensor) -> Tensor:
        """x [rows, T, D]; positions, own, target [T], the same for all rows -> [rows, W] of the last position."""
        model = self._model
        x = x + model.pos_embed[0, own] + model.target_aware_pos_embed[0, target]
        condition = embedding + model.timesteps_embeddings[:, positions]
        own, target = (rows.expand(x.shape[0], -1) for rows in (own, target))
        for block in model.blocks:
            x, _ = block(x, condition, own, target, positions)
        return model.latent_condition_proj(model.norm(x[:, -1]))

    def _head(self, latent: Tensor, scale: Tensor, u_bits: Tensor, u_confidence: Tensor) -> Tensor:
        """The S passes of one token, sampling included -> bits [B, K] int64."""
        guidance = scale if self._guided else None
        return sample_token(self._model.lm_head, latent, guidance, self.recipe, u_bits, u_confidence)
