"""The search keeps the fewest layers that hold the budget, the most harmful per byte first."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from bar_edge.calibration import sensitivity
from bar_edge.calibration.quality import TeacherForced
from bar_edge.calibration.sensitivity import Sensitivity, plot, search
from bar_edge.runtime.errors import CalibrationError

HARM = {"a": 0.001, "b": 0.040, "c": 0.008, "d": 0.0001, "e": 0.020}  # flips when quantized alone; they add up
BYTES = {"a": 100, "b": 10000, "c": 100, "d": 100, "e": 1000}
BY_HARM_PER_BYTE = ["c", "e", "a", "b", "d"]  # 80, 20, 10, 4 and 1 millionth a byte


def outcome(flips: float) -> TeacherForced:
    return TeacherForced(4, 1000, flips, [flips], [flips] * 4, flips / 10, [flips / 10], [flips / 10] * 4, 30.0, 30.0)


@pytest.fixture
def measured(monkeypatch) -> list[dict[str, str]]:
    """Every mixture that was measured; flips are the sum of those of the layers that are quantized."""
    asked: list[dict[str, str]] = []

    def engine(bundle: object, precisions: Mapping[str, str], threads: int) -> SimpleNamespace:
        asked.append(dict(precisions))
        return SimpleNamespace(precisions=precisions, close=lambda: None)

    monkeypatch.setattr(sensitivity, "ProbeEngine", engine)
    monkeypatch.setattr(
        sensitivity, "teacher_forced", lambda recorded, engine, *rest: outcome(sum(map(HARM.get, engine.precisions)))
    )
    return asked


@pytest.fixture
def find(measured) -> Callable[[float], Sensitivity]:
    wanted = dict.fromkeys(HARM, "int8")
    return lambda budget: search([], None, wanted, {}, BYTES, budget=budget)


def test_the_fewest_layers_in_order_of_harm_per_byte_hold_the_budget(find):
    left = [sum(HARM[x] for x in BY_HARM_PER_BYTE[count:]) for count in range(len(HARM) + 1)]
    for budget in (0.0, 0.00005, 0.0005, 0.0402, 0.0412, 0.05, 0.0621, 0.069):
        found = find(budget)
        kept = list(found.kept_fp32)
        assert kept == BY_HARM_PER_BYTE[: len(kept)]
        assert left[len(kept)] <= budget + 1e-12 < left[len(kept) - 1]
        assert found.after.flips == pytest.approx(left[len(kept)]) and found.before.flips == pytest.approx(left[0])
        assert found.harm == {layer: pytest.approx(flips / 10) for layer, flips in HARM.items()}
        assert found.budget == budget


def test_a_budget_that_holds_at_once_measures_once_and_keeps_nothing(find, measured):
    found = find(0.07)
    assert (found.kept_fp32, found.harm, found.after) == ((), {}, found.before)
    assert measured == [dict.fromkeys(HARM, "int8")]


def test_each_layer_is_measured_alone(find, measured):
    find(0.01)
    assert [mixture for mixture in measured if len(mixture) == 1][: len(HARM)] == [{x: "int8"} for x in HARM]
    assert len(measured) <= 1 + len(HARM) + 4  # a bisection behind it, not a walk


def test_other_layers_stay_quantized_in_all_but_a_layers_own_harm(monkeypatch, measured):
    monkeypatch.setitem(HARM, "modulation", 0.0005)
    found = search([], None, dict.fromkeys(BYTES, "int8"), {"modulation": "int8"}, BYTES, budget=0.0412)
    alone, together = ([m for m in measured if (len(m) == 1) is one] for one in (True, False))
    assert alone == [{layer: "int8"} for layer in BYTES] and all("modulation" in mixture for mixture in together)
    assert found.kept_fp32 == ("c", "e", "a")  # without the modulation's flips two would do
    assert "modulation" not in found.harm


def test_a_budget_that_is_just_reached_holds(find):
    found = find(0.0412)
    assert find(found.after.flips).kept_fp32 == found.kept_fp32


def test_a_recording_that_not_even_fp32_follows_is_refused(monkeypatch, find):
    monkeypatch.setattr(sensitivity, "teacher_forced", lambda *rest: outcome(0.2))
    with pytest.raises(CalibrationError, match=r"a budget of 1.00% flips cannot be held: with trunk and head"):
        find(0.01)


def test_the_plot_shows_every_layer_and_what_was_kept(find, tmp_path):
    found = find(0.0412)
    assert found.kept_fp32 == ("c", "e")
    wide = replace(found, harm={f"lm_head.transformer.{i}.mlp.w12": 10.0**-i for i in range(1, 60)} | found.harm)
    sizes = []
    for i, result in enumerate((found, wide)):
        path = tmp_path / f"{i}.png"
        plot(result, path)
        with Image.open(path) as image:
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3).astype(int)
            sizes.append(image.width)
        for colour in ((0xC4, 0x4E, 0x52), (0x4C, 0x72, 0xB0)):  # kept and quantized
            assert (np.abs(pixels - colour).max(axis=1) < 3).sum() > 50
    assert sizes[1] > sizes[0]


def test_a_layer_without_any_harm_can_be_plotted(find, tmp_path):
    """A logarithm has no zero."""
    found = find(0.0412)
    plot(replace(found, harm=dict.fromkeys(found.harm, 0.0)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
