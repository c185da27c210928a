"""What moved between two reports, beyond the noise that their own samples show.

Noise is the scatter within each run (`figures.change`). Drift of the machine between runs is another matter: the
machine's own bandwidth, measured in every round of both, is compared in the same way and told first.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.text import Text

from bar_edge.benchmarks.bench import FORMAT, FORMAT_VERSION
from bar_edge.benchmarks.figures import Change, change
from bar_edge.benchmarks.tables import compact, number
from bar_edge.runtime.errors import RequestError
from bar_edge.runtime.tables import FiguresTable

_FIGURES = {"image": "image", "first_token": "first token", "decode": "decode"}
_DESCRIBED = ("machine", "settings", "versions")
_COLOURS = {"slower": "red", "faster": "green"}
_BEST = {"bytes_per_second": "it read memory", "gpu_bytes_per_second": "its GPU copied memory"}


@dataclass(frozen=True)
class Movement:
    """One figure of one contender in both reports. `change` is None where there are too few samples to judge."""

    contender: str
    batch_size: int
    figure: str
    before: float  # median, seconds
    after: float
    change: Change | None

    @property
    def verdict(self) -> str:
        """faster, slower, within noise, or too few samples."""
        if self.change is None:
            return "too few samples"
        if not self.change.beyond_noise:
            return "within noise"
        return "slower" if self.change.ratio > 1 else "faster"


def read(path: Path) -> dict[str, Any]:
    """A report's JSON. Raises RequestError if it is none that this version reads."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(
            f"{path}: cannot be read as JSON ({error}); give a report.json of `bar-edge bench`"
        ) from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise RequestError(f"{path}: not a report of `bar-edge bench`; give its report.json")
    if report.get("format_version") != FORMAT_VERSION:
        raise RequestError(
            f"{path}: report format {report.get('format_version')!r}, this version reads {FORMAT_VERSION}; run it again"
        )
    try:
        _check_parts(report)
    except KeyError as error:
        raise RequestError(f"{path}: has no {error}; give a whole report.json of `bar-edge bench`") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise RequestError(f"{path}: is damaged ({error}); give a whole report.json of `bar-edge bench`") from error
    return report


def movements(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Movement]:
    """Every figure that both reports have."""
    old = dict(_batches(before))
    for key, batch in _batches(after):
        if key not in old:
            continue
        for figure in filter(lambda name: name in old[key] and name in batch, _FIGURES):
            a, b = old[key][figure], batch[figure]
            yield Movement(*key, figure, a["p50"], b["p50"], change(a["samples"], b["samples"]))


def remarks(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What keeps the two from being comparable, and who is in one only."""
    found = []
    for what in _DESCRIBED:
        differing = [key for key in before[what] if before[what][key] != after[what].get(key)]
        if differing:
            told = ", ".join(f"{key} {before[what][key]} then {after[what].get(key)}" for key in differing)
            found.append(f"{what} differ: {told}")
    for best, what in _BEST.items():
        if best in before["machine_best"] and best in after["machine_best"]:
            drift = change(*(report["machine_best"][best]["samples"] for report in (before, after)))
            if drift is not None and drift.beyond_noise:
                found.append(f"the machine itself moved: {what} at {drift.ratio:.2f} × the speed of the first run")
    timed = [{f"{name} at batch {size}" for (name, size), _ in _batches(report)} for report in (before, after)]
    for which, others, here in (("first", timed[1], timed[0]), ("second", timed[0], timed[1])):
        if only := sorted(here - others):
            found.append(f"timed in the {which} report only: {', '.join(only)}")
    return found


def table(moved: list[Movement]) -> FiguresTable:
    """For the terminal."""
    result = compact("medians in ms, and the second as a multiple of the first", "before", "after", "ratio", "95 %")
    result.add_texts("figure: verdict")
    for one in moved:
        interval = f"{one.change.low:.3f} to {one.change.high:.3f}" if one.change else "-"
        result.add_row(
            one.contender, str(one.batch_size), number(one.before * 1e3), number(one.after * 1e3),
            f"{one.after / one.before:.3f}", interval,
            Text.assemble(f"{_FIGURES[one.figure]}: ", (one.verdict, _COLOURS.get(one.verdict, ""))),
        )  # fmt: skip
    return result


def _check_parts(report: Mapping[str, Any]) -> None:
    """Look at all that is compared. Raises KeyError where it is not there, others where it is something else."""
    for part in _DESCRIBED:
        report[part].keys()
    sampled = list(report["machine_best"].values())
    for key, batch in _batches(report):
        hash(key)
        sampled += [batch[figure] for figure in _FIGURES if figure in batch]
    for figures in sampled:
        np.array([figures["p50"], *figures["samples"]], dtype=np.float64)


def _batches(report: Mapping[str, Any]) -> Iterator[tuple[tuple[str, int], Mapping[str, Any]]]:
    for entry in report["contenders"]:
        for batch in entry.get("batches", ()):
            yield (entry["name"], batch["batch_size"]), batch
