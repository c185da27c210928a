"""Does an engine draw what the reference model would have drawn? Answered for every single decision.

`replay` feeds an engine's bits to the reference model, all tokens at once (teacher forcing), and repeats every
sampling decision from the reference's latents with the same noise. If each token comes out equal, the sequential
reference would have drawn the same image, by induction; where one differs, the margin tells whether the decision was
a floating-point tie. One image of BAR-B takes seconds here, and minutes when drawn token by token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from bar_edge.export.model import Generator
from bar_edge.runtime.noise import NoiseSource, gumbel
from bar_edge.runtime.sampling import Schedule, guidance_at, sample_token, to_tokens
from bar_edge.runtime.spec import Recipe

TIE = 1e-4  # of the largest logit: a closer decision may fall either way in float32


@dataclass(frozen=True)
class Replay:
    """What the reference says of B images of N tokens."""

    differing_bits: NDArray[np.int64]  # [B, N]
    # [B, N] distance of the closest decision from a tie, as a fraction of the largest logit; NaN where the reference's
    # logits are not finite
    margins: NDArray[np.float32]
    latents: NDArray[np.float32]  # [rows, N, W] of the reference, by generation step, conditional rows first

    @property
    def unexplained(self) -> int:
        """Tokens that differ although no decision was a tie, or of which the reference cannot tell (margin NaN)."""
        differs = (self.differing_bits > 0) & (self.margins >= TIE)
        return int((differs | np.isnan(self.margins)).sum())

    @property
    def images_with_ties(self) -> int:
        """Images in which a tie fell the other way."""
        return int((self.differing_bits > 0).any(axis=1).sum())


@torch.inference_mode()
def replay(
    generator: Generator,
    bits: NDArray[np.uint8],
    class_ids: Sequence[int],
    recipe: Recipe,
    noise: NoiseSource,
) -> Replay:
    """Repeat the decisions behind `bits` [B, image_seq_len, token_size] (fine grid) with the reference model."""
    spec, device = generator.spec, generator.cls_token.device
    images, tokens, passes = len(class_ids), spec.num_tokens, len(recipe.allocation)
    order = noise.orders(tokens)
    drawn = np.take_along_axis(to_tokens(bits, spec), order[:, :, None], axis=1)  # [B, N, K] by generation step
    guided = recipe.guidance > 1
    copies = 2 if guided else 1
    rows = torch.tensor([*class_ids, *([spec.unconditional_class] * images if guided else [])], device=device)
    repeated = (np.tile(drawn, (copies, 1, 1)), np.tile(order, (copies, 1)))
    latents = teacher_forced_latents(generator, rows, *(torch.from_numpy(array).to(device) for array in repeated))
    u_bits, u_confidence = noise.uniforms(tokens, passes, spec.bits_per_token)
    scale = np.array([guidance_at(n, recipe.guidance, tokens) for n in range(tokens)], dtype=np.float32)
    schedule = Schedule.of(recipe, spec.bits_per_token)
    differing = np.empty((images, tokens), dtype=np.int64)
    margins = np.empty((images, tokens), dtype=np.float32)
    finite = np.ones((images, tokens), dtype=np.bool_)
    for i in range(images):  # the tokens of an image stand in the place of the images of a batch
        latent = torch.cat([latents[row] for row in range(i, len(rows), images)])  # [copies*N, W]

        def head(
            known: NDArray[np.bool_],
            ones: NDArray[np.bool_],
            s: int,
            latent: torch.Tensor = latent,
            finite: NDArray[np.bool_] = finite[i],
        ) -> NDArray[np.float32]:
            ids = torch.from_numpy(np.where(known, ones, 2).astype(np.int64)).to(device).repeat(copies, 1)
            ratio = torch.full((len(latent),), float(schedule.mask_ratio[s]), device=device)
            logits: NDArray[np.float32] = generator.lm_head(ids, latent, ratio).float().cpu().numpy()
            finite &= np.isfinite(logits).all(axis=(1, 2)).reshape(copies, tokens).all(axis=0)
            return logits

        with np.errstate(over="ignore", invalid="ignore"):  # the margins tell
            again, margin = sample_token(
                head, schedule, scale[:, None, None],
                gumbel(u_bits[:, :, i].swapaxes(0, 1)), gumbel(u_confidence[:, :, i].swapaxes(0, 1)),
            )  # fmt: skip
        margins[i] = np.where(finite[i], margin, np.nan)
        differing[i] = (again != drawn[i]).sum(axis=1)
    return Replay(differing, margins, latents.cpu().numpy())


@torch.inference_mode()
def teacher_forced_latents(
    generator: Generator, class_ids: torch.Tensor, drawn: torch.Tensor, order: torch.Tensor
) -> torch.Tensor:
    """Latents [rows, N, W] that condition each token, given the tokens before it: one causal pass over everything.

    class_ids [rows], drawn [rows, N, K] by generation step, order [rows, N] grid indices.
    """
    spec = generator.spec
    f, rows = spec.prefix_length, len(class_ids)
    embedding = generator.class_embedding(class_ids)  # [rows, 1, D]
    previous = generator.input_embeddings(drawn[:, :-1].long()).flatten(2)  # [rows, N-1, K*e]
    x = torch.cat(
        (generator.cls_token.expand(rows, 1, -1), embedding.expand(-1, f - 1, -1), generator.input_merge(previous)),
        dim=1,
    )
    own = torch.cat((torch.arange(f, device=order.device).expand(rows, f), f + order[:, :-1]), dim=1)
    target = torch.cat((order[:, :1].expand(rows, f), order[:, 1:]), dim=1) + f
    latents, _ = generator.latents(x, embedding, 0, own, target, None)
    return latents[:, f - 1 :]
