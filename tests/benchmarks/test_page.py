"""The report as a page and on the terminal; the page also in a real browser, where there is one."""

import base64
import copy
import itertools
import re
import shutil
import subprocess
from collections.abc import Sequence
from html.parser import HTMLParser

import pytest
from rich.console import Console

from bar_edge.benchmarks import charts, command, tables
from bar_edge.benchmarks.page import page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def figures(measured):
    return charts.draw(measured[0])


@pytest.fixture(scope="module")
def text(measured, figures):
    return page(*measured, figures)


class Links(HTMLParser):
    """Everything a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.found += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        assert tag not in ("script", "link", "iframe", "object")


def test_nothing_is_fetched(text):
    links = Links()
    links.feed(text)
    assert any(link.startswith("data:image/png;base64,") for link in links.found)
    assert all(link.startswith(("data:", "#")) for link in links.found)
    assert "url(http" not in text and "@import" not in text


def test_every_contender_chart_and_proof_is_on_the_page(measured, figures, text):
    for entry in measured[0]["contenders"]:
        assert text.count(entry["name"]) >= 2
    assert {"latency", "stages", "throughput"} <= set(figures)
    assert text.count("<svg") == len(figures)
    assert "failed: batch 1" in text
    assert len(re.findall("data:image/png", text)) == 7  # two of each that was timed, one of the one that failed


def test_figures_within_a_decade_can_be_read_from_the_axis(measured):
    report = copy.deepcopy(measured[0])
    rates = itertools.cycle((0.013, 0.035, 0.07))
    for entry in report["contenders"]:
        for batch in entry.get("batches", ()):
            rate = batch["images_per_second"] = next(rates)
            batch["image"] = {"samples": [1 / rate] * 2, "count": 2} | dict.fromkeys(
                ("min", "p50", "p90", "max"), 1 / rate
            )
    figures = charts.draw(report)
    (throughput,), (latency,) = figures["throughput"].axes, figures["latency"].axes
    assert {0.02, 0.05} <= _within(throughput.get_yticks(), throughput.get_ylim())
    assert {20, 50} <= _within(latency.get_xticks(), latency.get_xlim())


def _within(ticks: Sequence[float], limits: tuple[float, float]) -> set[float]:
    return {tick for tick in ticks if limits[0] <= tick <= limits[1]}


def test_dollars_in_names_are_no_formulas(measured):
    report = copy.deepcopy(measured[0])
    report["contenders"][1]["name"] = r"a$\nowhere$"
    assert charts.to_svg(charts.draw(report)["latency"]).startswith("<svg")


def test_names_are_escaped(measured, figures):
    report = copy.deepcopy(measured[0])
    report["contenders"][1]["name"] = "<script>alert(1)</script>"
    assert "<script>" not in page(report, {}, {})
    assert "bar-edge bench &lt;the command&gt;" in page(report, {}, {})


def test_images_survive_the_way_into_the_page(measured, text):
    from io import BytesIO

    import numpy as np
    from PIL import Image

    first = base64.b64decode(re.search(r'src="data:image/png;base64,([^"]+)"', text)[1])
    expected = next(iter(measured[1].values()))[0]
    assert np.array_equal(np.asarray(Image.open(BytesIO(first))), expected)


def test_charts_of_a_report_without_figures_are_none(measured):
    report = copy.deepcopy(measured[0])
    for entry in report["contenders"]:
        entry.pop("batches", None)
    assert charts.draw(report) == {}
    assert "Where the time goes" in page(report, {}, {})


def test_the_terminal_shows_everyone_in_eighty_columns(measured):
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    command.show(measured[0], console)
    shown = console.export_text()
    for entry in measured[0]["contenders"]:
        assert entry["name"] in shown
    assert "no p99 of images: that takes 100 rounds, there were 6" in shown.replace("\n", " ")


def test_notes_tell_a_noisy_run(measured):
    report = copy.deepcopy(measured[0])
    image = report["contenders"][0]["batches"][0]["image"]
    image["p90"] = 3 * image["min"]
    assert any("PyTorch fp32 at batch 1 (3.0 ×)" in note for note in tables.notes(report))


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_a_browser_lays_the_page_out_without_complaint(text, tmp_path):
    import numpy as np
    from PIL import Image

    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    arguments = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--hide-scrollbars", "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1240,3000", f"--screenshot={tmp_path / 'page.png'}", (tmp_path / "report.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr  # what the page itself complains about
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert pixels.shape[:2] == (3000, 1240)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 200  # charts and images are drawn
    assert not (pixels[2500:] == pixels[0, 0]).all()
