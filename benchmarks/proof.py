"""Whether a contender draws what the reference draws: the condition for being timed."""

from dataclasses import dataclass

import numpy as np

from bar_edge.benchmarks.contenders import Drawn, Judgement

_BROKEN = 0.25  # of all bits: half of what guessing gets wrong
_EQUAL_DB = 99.0  # JSON has no infinity


@dataclass(frozen=True)
class Proof:
    """One batch beside the reference's, from the same noise."""

    passed: bool
    sentence: str
    differing_bits: float | None = None  # fraction; a bit that differs changes all that is drawn after it
    identical_images: float | None = None  # fraction
    psnr_db: float | None = None  # median over images
    judged_differing_bits: float | None = None  # fraction, each token judged from the contender's own past


def of_reference() -> Proof:
    """What the reference is to itself."""
    return Proof(True, "the reference", 0.0, 1.0, _EQUAL_DB)


def refused(reason: str) -> Proof:
    """Of a contender that cannot be the reference and has none."""
    return Proof(False, reason)


def compare(reference: Drawn, drawn: Drawn, judgement: Judgement | None, *, exact: bool) -> Proof:
    """An exact contender (fp32) must draw the same bits, unless the judge finds that only ties fell the other way.

    Others are described, and refused only if they draw something else altogether, which takes a judge to see.
    """
    wrong = (drawn.bits != reference.bits).reshape(len(drawn.bits), -1)
    judged = judgement.differing_bits / judgement.total_bits if judgement is not None else None
    passed, sentence = _exact(drawn, reference, int(wrong.sum()), judgement) if exact else _inexact(wrong, judged)
    psnr = float(np.median([_psnr(*pair) for pair in zip(reference.pixels, drawn.pixels, strict=True)]))
    return Proof(passed, sentence, float(wrong.mean()), float((~wrong.any(axis=1)).mean()), psnr, judged)


def _exact(drawn: Drawn, reference: Drawn, wrong: int, judgement: Judgement | None) -> tuple[bool, str]:
    if wrong == 0:
        levels = int(np.abs(drawn.pixels.astype(int) - reference.pixels).max())
        return levels <= 1, f"the same {drawn.bits.size:,} bits, pixels within {levels} of 255 levels"
    if judgement is None:
        return False, f"{wrong:,} of {drawn.bits.size:,} bits differ, and there is no PyTorch baseline to say why"
    if judgement.tokens_unexplained == 0:
        return True, f"the same bits but for {judgement.tokens_differing} tokens in which a floating-point tie fell"
    return False, f"{judgement.tokens_unexplained} tokens are not what the reference draws from the same past"


def _inexact(wrong: np.ndarray, judged: float | None) -> tuple[bool, str]:
    drift = f"{wrong.mean():.1%} of bits differ when drawing freely"
    if judged is None:
        return True, drift
    sentence = f"{judged:.2%} of bits are not what the reference draws from the same past; {drift}"
    return judged <= _BROKEN, sentence


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = float(np.square(a.astype(np.float64) - b).mean())
    return min(_EQUAL_DB, 10 * float(np.log10(255**2 / error))) if error else _EQUAL_DB
