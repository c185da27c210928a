"""The exact algebra of docs/model.md section 6: the same function of the same weights, fewer bytes read per token.

`rewrite` turns a checkpoint into the tensors the graphs use. Values are computed in float32 (float64 inside sums that
replace a product) and only when they are written, so that the model is never in memory twice. What changes:

- norm weights in front of a modulation move into its scale rows: `norm(x)·w·(1+c)+s` becomes `rms(x)·c'+s`, where
  `c' = w·(1+c)` is again linear in the modulation's input. The final norm moves into `latent_condition_proj`.
- the concatenated bit embeddings and the projection behind them become a base vector and one row per bit.
- SwiGLU's hidden width is padded with zero rows and columns to a multiple of 128.
- the decoder's `2·bit - 1` moves into `quantize.out_proj`.

Tensors that keep their meaning keep their checkpoint name; new ones are named in `NEW_NAMES`.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from bar_edge.export.checkpoint import Checkpoint
from bar_edge.runtime.errors import CheckpointError
from bar_edge.runtime.spec import padded
from bar_edge.runtime.weights import PendingTensor

NEW_NAMES = {
    "symbol_embedding": "[C+6, D]: embeddings.weight, then cls_token, then a generated token whose bits are all 0",
    "bit_embedding": "[K, D]: what bit k adds to a generated token when it is 1",
    "blocks.i.attn.qk_norm.weight": "[2H, d]: q_norm.weight for every head, then k_norm.weight",
    "rope_cos": "[F+N, d/2]: one frequency per pair of channels",
    "rope_sin": "[F+N, d/2]",
    "lm_head.masked_embedding": "[W]: the head's input when every bit is masked",
    "lm_head.bit_embedding": "[2K, W]: what bit k adds when it is known (rows 0..K-1) and when it is 1 (rows K..2K-1)",
}

Array = NDArray[np.float32]


class Rewriter:
    """Computes rewritten tensors on demand from a checkpoint."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._tensors = {**checkpoint.generator, **checkpoint.tokenizer}
        self._spec = checkpoint.spec
        self.pending: dict[str, PendingTensor] = {}
        self._plan()

    def _get(self, name: str) -> Array:
        values = self._tensors[name].to(torch.float32).numpy()
        if not np.isfinite(values).all():
            raise CheckpointError(f"{name} holds NaN or infinite values; the checkpoint is damaged")
        return values

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def _plan(self) -> None:
        spec = self._spec
        d, w, k, rows = spec.hidden_size, spec.head_width, spec.bits_per_token, spec.prefix_length + spec.num_tokens
        add = self._add
        add("symbol_embedding", (spec.num_symbols, d), self._symbol_embedding)
        add("bit_embedding", (k, d), lambda: self._trunk_rows()[1])
        for name in ("pos_embed", "target_aware_pos_embed"):
            add(name, (rows, d), lambda name=name: self._get(name)[0, :rows])  # type: ignore[misc]
        add("timesteps_embeddings", (rows, d), lambda: self._get("timesteps_embeddings")[0, :rows])
        for kind in ("cos", "sin"):
            add(f"rope_{kind}", (rows, spec.head_dim // 2), lambda kind=kind: self._rope(kind))  # type: ignore[misc]
        for i in range(spec.num_layers):
            block = f"blocks.{i}"
            self._add(
                f"{block}.attn.qk_norm.weight",
                (2 * spec.num_heads, spec.head_dim),
                lambda block=block: np.repeat(  # type: ignore[misc]
                    [self._get(f"{block}.attn.{norm}.weight") for norm in ("q_norm", "k_norm")], spec.num_heads, axis=0
                ),
            )
            for linear in ("attn.qkv", "attn.proj"):
                self._copy_linear(f"{block}.{linear}")
            self._swiglu(f"{block}.mlp", d)
            # the rows of the modulation are shift, scale, gate for attention, then for the MLP
            norms = {1: f"{block}.norm1.weight", 4: f"{block}.norm2.weight"}
            self._modulation(f"{block}.adaLN_modulation.1", 6, norms)
        self._fold_final_norm()
        for name in ("lm_head.t_embedder.W", "lm_head.ln_pre.weight"):
            self._copy(name)
        for linear in ("t_embedder.mlp.0", "t_embedder.mlp.2", "output_embed"):
            self._copy_linear(f"lm_head.{linear}")
        add("lm_head.masked_embedding", (w,), lambda: self._head_rows()[0])
        add("lm_head.bit_embedding", (2 * k, w), lambda: self._head_rows()[1])
        for i in range(spec.head_layers):
            block = f"lm_head.transformer.{i}"
            self._swiglu(f"{block}.mlp", w)
            self._modulation(f"{block}.adaLN_modulation.1", 3, {1: f"{block}.in_ln.weight"})
        final = "lm_head.adaln_before_head"
        self._modulation(f"{final}.adaLN_modulation.1", 2, {0: f"{final}.norm_final.weight"})
        self._plan_decoder()

    def _plan_decoder(self) -> None:
        name = "quantize.out_proj"
        self._add(f"{name}.weight", self._shape(f"{name}.weight"), lambda: 2 * self._get(f"{name}.weight"))
        self._add(
            f"{name}.bias",
            self._shape(f"{name}.bias"),
            lambda: self._get(f"{name}.bias") - self._get(f"{name}.weight").sum(axis=1, dtype=np.float64),
        )
        width = self._shape(f"{name}.weight")[0]
        self._add("decoder.ffn.0.weight", (self._shape("decoder.ffn.0.weight")[0], width),
                  lambda: self._get("decoder.ffn.0.weight")[:, :, 0, 0])  # fmt: skip
        for other in self._tensors:
            if other.startswith("decoder.") and other not in self.pending:
                self._copy(other)

    def _add(self, name: str, shape: tuple[int, ...], make) -> None:  # type: ignore[no-untyped-def]
        self.pending[name] = PendingTensor(np.dtype(np.float32), shape, make)

    def _copy(self, name: str) -> None:
        self._add(name, self._shape(name), lambda: self._get(name))

    def _copy_linear(self, name: str) -> None:
        self._copy(f"{name}.weight")
        self._copy(f"{name}.bias")

    def _fold_final_norm(self) -> None:
        name = "latent_condition_proj"
        self._add(
            f"{name}.weight",
            self._shape(f"{name}.weight"),
            lambda: self._get(f"{name}.weight") * self._get("norm.weight")[None],
        )
        self._copy(f"{name}.bias")

    def _modulation(self, name: str, pieces: int, norms: dict[int, str]) -> None:
        """Fold the weight of the norm in front into the scale rows given by piece index."""

        def make(part: str) -> Array:
            values = self._get(f"{name}.{part}").copy()
            values_by_piece = values.reshape(pieces, -1, *values.shape[1:])
            for piece, norm in norms.items():
                weight = self._get(norm)
                if part == "weight":
                    values_by_piece[piece] *= weight[:, None]
                else:
                    values_by_piece[piece] = weight * (1 + values_by_piece[piece])
            return values

        for part in ("weight", "bias"):
            self._add(f"{name}.{part}", self._shape(f"{name}.{part}"), lambda part=part: make(part))  # type: ignore[misc]

    def _swiglu(self, name: str, width: int) -> None:
        hidden = self._shape(f"{name}.w3.weight")[1]
        extra = padded(hidden) - hidden

        def w12(part: str) -> Array:
            values = self._get(f"{name}.w12.{part}")
            halves = values.reshape(2, hidden, *values.shape[1:])
            return np.pad(halves, [(0, 0), (0, extra)] + [(0, 0)] * (values.ndim - 1)).reshape(-1, *values.shape[1:])

        self._add(f"{name}.w12.weight", (2 * padded(hidden), width), lambda: w12("weight"))
        self._add(f"{name}.w12.bias", (2 * padded(hidden),), lambda: w12("bias"))
        self._add(f"{name}.w3.weight", (width, padded(hidden)),
                  lambda: np.pad(self._get(f"{name}.w3.weight"), [(0, 0), (0, extra)]))  # fmt: skip
        self._copy(f"{name}.w3.bias")

    def _table_rows(self, embedding: str, projection: str) -> NDArray[np.float64]:
        """[3, K, out]: what bit k adds to the projection's output when its id is 0, 1 or 2 (masked)."""
        table = self._get(embedding).astype(np.float64)  # [3, e]
        weight = self._get(f"{projection}.weight").astype(np.float64)  # [out, K*e]
        split = weight.reshape(weight.shape[0], self._spec.bits_per_token, table.shape[1])
        return np.einsum("oke,ve->vko", split, table)

    def _trunk_rows(self) -> tuple[Array, Array]:
        rows = self._table_rows("input_embeddings.weight", "input_merge")
        base = rows[0].sum(axis=0) + self._get("input_merge.bias")
        return base.astype(np.float32), (rows[1] - rows[0]).astype(np.float32)

    def _head_rows(self) -> tuple[Array, Array]:
        rows = self._table_rows("lm_head.input_embed.weight", "lm_head.input_proj")
        base = rows[2].sum(axis=0) + self._get("lm_head.input_proj.bias")
        deltas = np.concatenate((rows[0] - rows[2], rows[1] - rows[0]))
        return base.astype(np.float32), deltas.astype(np.float32)

    def _symbol_embedding(self) -> Array:
        base, _ = self._trunk_rows()
        return np.concatenate((self._get("embeddings.weight"), self._get("cls_token")[0], base[None]))

    def _rope(self, kind: str) -> Array:
        first = self._get(f"blocks.0.attn.rope.freqs_{kind}")
        for i in range(self._spec.num_layers):
            values = self._get(f"blocks.{i}.attn.rope.freqs_{kind}")
            if not np.array_equal(values, first) or not np.array_equal(values[:, 0::2], values[:, 1::2]):
                raise CheckpointError(
                    f"blocks.{i}.attn.rope.freqs_{kind} differs between blocks or within pairs of channels; "
                    "the rotary tables of a BAR checkpoint are equal in all blocks"
                )
        return first[:, 0::2]
