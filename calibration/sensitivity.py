"""Which layers may be integers within a quality budget.

Each layer alone is quantized in an otherwise fp32 step and led along recorded trajectories; its KL divergence is the
harm it does. If the fully quantized step exceeds the budget, layers go back to fp32, most harm per byte first, until it
holds. The plot shows every layer's harm.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bar_edge.calibration.probe import ProbeEngine
from bar_edge.calibration.quality import Recorded, TeacherForced, teacher_forced
from bar_edge.runtime.bundle import Bundle
from bar_edge.runtime.errors import CalibrationError
from bar_edge.runtime.progress import Progress, silent


@dataclass(frozen=True)
class Sensitivity:
    """The outcome of a search."""

    budget: float  # fraction of flips allowed
    before: TeacherForced  # everything quantized
    after: TeacherForced
    harm: dict[str, float]  # layer -> KL divergence when it alone is quantized; empty if the budget held at once
    kept_fp32: tuple[str, ...]


def search(
    recorded: list[Recorded],
    bundle: Bundle,
    wanted: Mapping[str, str],
    fixed: Mapping[str, str],
    weight_bytes: Mapping[str, int],
    *,
    budget: float,
    threads: int = 0,
    progress: Progress = silent,
) -> Sensitivity:
    """Find the layers to keep in fp32.

    Args:
        recorded: fp32 trajectories that were not calibrated on.
        bundle: a folder whose weights hold every layer both ways.
        wanted: step layer -> precision, everything quantized.
        fixed: other layers -> precision, which stay quantized in all that is measured but a layer's own harm.
        weight_bytes: step layer -> bytes of its fp32 weights, what keeping it costs.
        budget: the fraction of flipped decisions allowed.

    Raises CalibrationError if the budget does not hold even with all step layers in fp32.
    """

    def measure(precisions: Mapping[str, str], what: str) -> TeacherForced:
        engine = ProbeEngine(bundle, precisions, threads)
        try:
            return teacher_forced(recorded, engine, progress, what)
        finally:
            engine.close()

    before = measure({**fixed, **wanted}, "sensitivity: everything quantized")
    if before.flips <= budget:
        return Sensitivity(budget, before, before, {}, ())
    harm = {
        layer: measure({layer: kind}, f"sensitivity: layer {i + 1} of {len(wanted)}").kl
        for i, (layer, kind) in enumerate(wanted.items())
    }
    order = sorted(wanted, key=lambda layer: harm[layer] / weight_bytes[layer], reverse=True)
    low, high = 1, len(order)  # the budget fails with low - 1 layers kept; find the fewest that hold
    results: dict[int, TeacherForced] = {}

    def keeping(count: int) -> TeacherForced:
        if count not in results:
            quantized = {**fixed, **{layer: wanted[layer] for layer in order[count:]}}
            results[count] = measure(quantized, f"sensitivity: {count} layers kept")
        return results[count]

    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if keeping(middle).flips <= budget else (middle + 1, high)
    after = keeping(low)
    if after.flips > budget:
        raise CalibrationError(
            f"a budget of {budget:.2%} flips cannot be held: with trunk and head in fp32, {after.flips:.2%} still "
            "flip by the modulation's integers; allow more, or keep its layers with --keep"
        )
    return Sensitivity(budget, before, after, harm, tuple(order[:low]))


def plot(result: Sensitivity, path: Path) -> None:
    """Bars of every layer's KL divergence, layers kept in fp32 in another colour."""
    from matplotlib.figure import Figure

    layers = list(result.harm)
    figure = Figure(figsize=(max(7.0, 0.16 * len(layers) + 2), 6), layout="constrained")
    axes = figure.subplots()
    colours = ["#c44e52" if layer in result.kept_fp32 else "#4c72b0" for layer in layers]
    axes.bar(range(len(layers)), [result.harm[layer] for layer in layers], color=colours)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=6)
    if any(harm > 0 for harm in result.harm.values()):
        axes.set_yscale("log")
    axes.set_ylabel("KL if quantized alone, nats a bit", fontsize=9)
    axes.set_title(
        f"{len(result.kept_fp32)} layers kept in fp32 (red): {result.before.flips:.2%} flips before, "
        f"{result.after.flips:.2%} after, budget {result.budget:.2%}",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)
