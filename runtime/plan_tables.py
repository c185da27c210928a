"""Plans and their errors as tables for people."""

from collections.abc import Mapping, Sequence

from rich.table import Table
from rich.text import Text

from bar_edge.runtime.devices import Device
from bar_edge.runtime.plan_accuracy import PEAK_MEMORY, TARGET, Deviation
from bar_edge.runtime.planning import Prediction
from bar_edge.runtime.tables import FiguresTable

PROJECTION = "projection, nothing measured on this device"
MEASURED = "constants measured and fitted on this device, see --against"
_DENSE = (0, 0, 0, 0)  # no padding, so that 80 columns hold everything


def plan_table(model: str, device: Device, plans: Sequence[tuple[Prediction, int]]) -> Table:
    """One row for every precision and batch; `plans` pairs a prediction with the largest batch that fits."""
    state = MEASURED if device.measured else PROJECTION
    table = FiguresTable(f"{model} on {device.title}\n{state}", _DENSE)
    table.add_texts("precision")
    table.add_numbers("batch", "MB a\ntoken", "ms a\ntoken")
    table.add_texts("mostly")
    table.add_numbers("first\ntoken\nms", "s an\nimage", "bytes\nalone s", "MiB", "largest\nbatch")
    for plan, largest in plans:
        memory = f"{plan.memory_bytes / 2**20:,.0f}"
        table.add_row(
            plan.precision, str(plan.batch), f"{plan.token_bytes / 1e6:,.0f}", f"{plan.token.seconds * 1e3:.2f}",
            plan.token.limit, f"{plan.first_token_seconds * 1e3:.1f}", f"{plan.image_seconds:.3f}",
            f"{plan.reading_seconds:.3f}", memory if plan.fits else f"{memory},\ndoes not fit", f"{largest:,}",
        )  # fmt: skip
    return table


def source_table(sources: Mapping[str, str]) -> Table:
    """Where a device's figures come from."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for figure, source in sources.items():
        table.add_row(Text(figure), Text(source))
    return table


def deviation_table(found: Sequence[Deviation]) -> Table:
    """Every measured figure beside the plan's."""
    within = sum(abs(one.error) <= TARGET for one in found)
    table = FiguresTable(f"{within} of {len(found)} measured figures within {TARGET:.0%}", _DENSE)
    table.add_texts("result", "precision")
    table.add_numbers("batch")
    table.add_texts("figure")
    table.add_numbers("samples", "measured", "plan", "error")
    for one in found:
        table.add_row(
            one.file, one.precision, str(one.batch), one.stage.replace("_", " "), str(one.samples),
            _figure(one, one.measured), _figure(one, one.predicted), f"{one.error:+.1%}",
            style=None if abs(one.error) <= TARGET else "bold red",
        )  # fmt: skip
    return table


def _figure(one: Deviation, value: float) -> str:
    if one.stage == PEAK_MEMORY:
        return f"{value / 2**20:,.0f} MiB"
    return f"{value * 1e3:,.0f} ms" if value >= 1 else f"{value * 1e3:,.1f} ms"
