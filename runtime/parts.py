"""Which part of the model a tensor or layer belongs to, and so how often it is read (docs/model.md section 6)."""

import re

TRUNK, HEAD_MODULATION, HEAD_PASS = "trunk", "head_modulation", "head_pass"
MODULATION, DECODER = "modulation", "decoder"
PARTS = {
    TRUNK: re.compile(r"blocks\.\d+\.(attn|mlp)\.|latent_condition_proj"),
    HEAD_MODULATION: re.compile(r"lm_head\..*adaLN_modulation"),
    HEAD_PASS: re.compile(r"lm_head\.(transformer\.\d+\.mlp|output_embed|bit_embedding)"),
    MODULATION: re.compile(r"blocks\.\d+\.adaLN_modulation"),
    DECODER: re.compile(r"decoder\.|quantize\."),
}
PER_IMAGE = (MODULATION, DECODER)


def part_of(name: str) -> str | None:
    """One of PARTS, or None for what is read by the row (tables), or hardly at all."""
    return next((part for part, pattern in PARTS.items() if pattern.match(name)), None)


def reads_per_token(name: str, passes: int) -> int:
    """How often one token with S head passes reads it."""
    return {TRUNK: 1, HEAD_MODULATION: 1, HEAD_PASS: passes}.get(part_of(name) or "", 0)
