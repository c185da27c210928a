"""Tables: nothing is cut and nothing is markup, however wide the terminal is."""

import os
import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console
from rich.text import Text

from bar_edge.runtime import plan_tables, planning, workload
from bar_edge.runtime.devices import find_device
from bar_edge.runtime.plan_accuracy import Deviation
from bar_edge.runtime.spec import VARIANTS
from bar_edge.runtime.tables import FiguresTable

WIDTHS = (30, 40, 80, 120)


def shown(table: FiguresTable, width: int) -> str:
    console = Console(width=width, file=StringIO(), record=True)
    console.print(table)
    return console.export_text()


def table(name: str) -> FiguresTable:
    made = FiguresTable("the [title]")
    made.add_texts("name")
    made.add_numbers("first\nnumber", "second")
    made.add_row(name, "1,234,567", Text("8.9", style="red"))
    made.add_row("other", "1", "")
    return made


def test_names_fold_and_numbers_do_not():
    lines = shown(table("a name that is too long"), 40).splitlines()
    assert lines[0].rstrip() == "the [title]"
    (row,) = (line for line in lines if "1,234,567" in line)
    assert row.split() == ["a", "name", "that", "is", "too", "1,234,567", "8.9"]
    assert any(line.strip() == "long" for line in lines)


def test_where_numbers_do_not_fit_rows_become_lists():
    assert [line.rstrip() for line in shown(table("n" * 20), 24).splitlines()] == [
        "the [title]", "", "name         nnnnnnnnnnn", "             nnnnnnnnn",
        "first number 1,234,567", "second       8.9", "", "name         other", "first number 1", "",
    ]  # fmt: skip


@pytest.mark.parametrize("width", WIDTHS)
def test_strings_are_no_markup(width):
    for name in ("bb[x]", "c[/b]", "[red]"):
        assert name in shown(table(name), width)


@pytest.mark.parametrize("width", WIDTHS)
def test_plans_are_shown_whole(width):
    device = find_device("orin")
    work = workload.of_variant(VARIANTS["bar_b"], workload.INT8_WEIGHT)
    prediction = planning.predict(work, device, 8)
    text = shown(plan_tables.plan_table("c[/b]", device, [(prediction, 123_456)]), width)
    assert "c[/b] on" in text and "…" not in text
    token, image = prediction.token.seconds * 1e3, prediction.image_seconds
    for figure in ("int8-weight", f"{token:.2f}", f"{image:.3f}", "123,456"):
        assert figure in text


@pytest.mark.parametrize("width", WIDTHS)
def test_deviations_are_shown_whole(width):
    one = Deviation("a_[x].json", "bundle", "int4-weight", 1, "peak_memory", 765, 12_345 * 2.0**20, 23_456 * 2.0**20)
    text = shown(plan_tables.deviation_table([one]), width)
    assert "…" not in text
    for figure in ("a_[x].json", "765", "12,345 MiB", "23,456 MiB", "+90.0%"):
        assert figure in text


@pytest.mark.parametrize(("columns", "as_table"), [(None, True), ("40", False)])
def test_what_is_redirected_is_as_wide_as_it_needs_unless_told(columns, as_table):
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    if columns is not None:
        environment["COLUMNS"] = columns
    program = "import sys; from bar_edge.runtime.cli import main; sys.argv = ['bar-edge', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", program, "plan", "bar_b", "--device", "orin"]
    done = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8", check=True, timeout=60)
    assert "…" not in done.stdout
    assert any(len(line) > 100 for line in done.stdout.splitlines()) == as_table
